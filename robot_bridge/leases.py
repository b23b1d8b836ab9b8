"""Which robots are attached, what they said last, and what the cluster wants of each."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from robot_bridge.incoming import Incoming
from robot_bridge.planned import MOST_CAMERAS, MOST_POINTS
from robot_bridge.protocol import NAME_TAKEN, NOT_ATTACHED
from twinrl.core import arguments
from twinrl.core.errors import Rejected, WireError

FIGURES = ("chunk_ms", "spool_segments", "spool_bytes")  # of a robot's state
CLOCKS = ("skew_ms", "clock_offset_ms", "clock_uncertainty_ms")  # of it, where they are known
TOTALS = (
    *("seconds", "episodes", "invalid", "successes", "takeovers", "holds"),
    *("steps", "interventions"),
)
RECENT = 20  # episodes whose steps the intervention rate is the share of
MOST_ALARMS = 20
COUNTED = ("filter/", "camera/")  # how totals begin that are figures


class Robot:
    """One name in the run, attached or not."""

    def __init__(self, name: str, saved: dict[str, Any] | None = None) -> None:
        saved = saved or {}
        self.name = name
        self.kind = saved.get("kind", "")
        self.host = saved.get("host", "")
        self.writer = saved.get("writer", "")
        self.session = saved.get("session", "")
        self.numbering: dict[str, int] = saved.get("numbering", {"sequence": 0, "episode": 0})
        self.before: dict[str, float] = saved.get("before", {})  # totals of earlier sessions
        self.now: dict[str, float] = saved.get("now", {})  # totals of this session
        # After a restart of the gateway it has one lease's time to be heard again.
        self.attached = bool(saved.get("attached", False))
        self.seen = time.monotonic() if self.attached else 0.0
        self.state: dict[str, Any] = {}
        self.frames: dict[str, Any] = {}  # of the last observation
        self.frames_time = 0.0  # when it came, Unix time
        self.incoming = Incoming()  # segments, and what is remembered for them
        self.version, self.policy_lag = -1, 0  # of the last chunk; versions behind the newest
        self.heard = int(saved.get("heard", 0))  # number of the last alarm
        self.filtered = -1e9  # when an event told of its safety filter
        self.told: dict[
            str, float
        ] = {}  # interventions of its safety filter, by cause, that events have told of
        self.cameras: list[str] = saved.get("cameras", [])
        self.shadow = bool(saved.get("shadow", False))  # its arm is not commanded
        self.hold = self.detach = False
        self.estop = 0
        self.start: dict[str, Any] | None = saved.get("start")  # what it plays
        self.results: list[bool] = []  # success of the last episodes
        # Of the last RECENT episodes: steps, and those of them that a person commanded.
        self.recent: list[list[int]] = saved.get("recent", [])

    @property
    def lease_age(self) -> float:
        """Seconds since it was heard."""
        return time.monotonic() - self.seen

    def total(self, key: str) -> float:
        """Over all sessions of this name in the run."""
        return self.before.get(key, 0) + self.now.get(key, 0)

    def begin(self, session: str) -> None:
        """A new session counts from zero: what the old one had is kept."""
        if session != self.session:
            keys = set(self.before) | set(self.now)
            self.before = {key: self.total(key) for key in keys}
            self.now, self.told, self.heard, self.session = {}, {}, 0, session

    def hear(self, state: dict[str, Any]) -> None:
        """A sign of life; WireError if what is shown and summed of it is of another kind."""
        totals = arguments.mapping({"totals": {}, **state}, "totals")
        for name in (*FIGURES, *CLOCKS):
            arguments.number(state, name, 0.0)
        for name in ("doing", "reason"):
            arguments.text(state, name, "")
        arguments.integer(state, "estop_seen", 0)
        _check_path(state.get("path", {}))
        _check_alarms(state.get("alarms", []))
        self.seen, self.state = time.monotonic(), state
        self.now = {k: float(v) for k, v in totals.items() if arguments.is_number(v)}

    def judge(self, newest: int, version: int | None = None) -> None:
        """How far the policy that acts is behind `newest`, when it gives a chunk of `version`, or is asked for one."""
        self.version = self.version if version is None else version
        self.policy_lag = max(0, newest - self.version) if self.version >= 0 else 0

    def alarms(self) -> list[tuple[str, str]]:
        """(level, text) of what it has told and nobody has heard yet."""
        found = []
        for number, level, text in self.state.get("alarms", ()):
            if number > self.heard:
                self.heard = number
                found.append((level, text))
        return found

    def count_episode(self, number: int) -> None:
        """An episode with this number has ended."""
        self.numbering = dict(self.numbering, episode=max(self.numbering["episode"], number + 1))

    def count_interventions(self, finished: dict[str, Any]) -> None:
        """An episode has ended, with so many `steps` and so many `interventions` among them."""
        counts = [int(finished.get(key, 0)) for key in ("steps", "interventions")]
        self.recent = [*self.recent, counts][-RECENT:]

    def untold(self) -> dict[str, int]:
        """Interventions of the safety filter, {cause: how many}, since the last call."""
        filtered = {k[len("filter/") :]: n for k, n in self.now.items() if k.startswith("filter/")}
        new = {cause: int(n - self.told.get(cause, 0)) for cause, n in filtered.items()}
        self.told = filtered
        return {cause: n for cause, n in new.items() if n > 0}

    def count_segment(self, header: dict[str, Any]) -> None:
        """A segment with this header was acknowledged."""
        if header["writer"] == self.writer:
            following = max(self.numbering["sequence"], header["sequence"] + 1)
            self.numbering = dict(self.numbering, sequence=following)

    def obey(self, action: str) -> None:
        """Keep what the cluster wants: hold, release, detach or estop."""
        if action in ("hold", "release"):
            self.hold = action == "hold"
        elif action == "detach":
            self.detach = self.attached
        else:
            self.estop = max(self.estop, int(self.state.get("estop_seen", 0))) + 1

    def wishes(self, paused: bool) -> dict[str, Any]:
        """What rides on the answer to a heartbeat."""
        return {"hold": self.hold, "detach": self.detach, "estop": self.estop, "paused": paused}

    def saved(self) -> dict[str, Any]:
        """What survives the gateway."""
        names = (
            *("kind", "host", "writer", "session", "attached", "cameras", "start"),
            *("numbering", "before", "now", "heard", "shadow", "recent"),
        )
        return {name: getattr(self, name) for name in names}

    def describe(self) -> dict[str, Any]:
        """For the page and the command line."""
        doing = self.state.get("doing", "idle") if self.attached else "gone"
        recent = self.results[-50:]
        return {
            "name": self.name,
            "kind": self.kind,
            "host": self.host,
            "attached": self.attached,
            "state": doing,
            "reason": self.state.get("reason", ""),
            "lease_age": round(self.lease_age, 3) if self.seen else None,
            "minutes": self.total("seconds") / 60,
            "success": sum(recent) / len(recent) if recent else None,
            "intervention_rate": rate_of([self]),
            "intervention_minutes": self.total("takeover_seconds") / 60,
            "hold": self.hold,
            "shadow": self.shadow,
            "policy_lag": self.policy_lag if self.attached else 0,
            "start": self.start,
            **{key: self.total(key) for key in TOTALS if key != "seconds"},
            "last": self.state,
        }

    def stats(self) -> dict[str, Any]:
        """Flat, for the metrics stream."""
        row = self.describe()
        data = {key: row[key] for key in ("state", "minutes", "takeovers", "episodes", "holds")}
        for key in ("attached", "hold", "shadow", "policy_lag"):
            data[key] = float(row[key])
        data["cameras"] = ",".join(self.cameras)
        data.update({k: self.total(k) for k in self.now if k.startswith(COUNTED)})
        data["intervention_minutes"] = row["intervention_minutes"]
        for key in ("success", "intervention_rate"):
            if row[key] is not None:
                data[key] = row[key]
        for key in FIGURES:
            data[key] = float(self.state.get(key, 0.0))
        data.update({key: float(self.state[key]) for key in CLOCKS if key in self.state})
        return {f"robot/{self.name}/{key}": value for key, value in data.items()}


def rate_of(robots: Iterable[Robot]) -> float | None:
    """The share of the steps of `robots`' last RECENT episodes each that a person commanded; None without a step."""
    recent = [counts for robot in robots for counts in robot.recent]
    steps = sum(steps for steps, _ in recent)
    return sum(commanded for _, commanded in recent) / steps if steps else None


class Leases:
    """All robots of the run by name. A robot that is silent for `lease_s` is gone, and its name free."""

    def __init__(self, lease_s: float, saved: dict[str, Any] | None = None) -> None:
        self.lease_s = lease_s
        self.robots = {name: Robot(name, state) for name, state in (saved or {}).items()}

    def attach(self, name: str, args: dict[str, Any]) -> Robot:
        """Give `name` to the session in `args`; Rejected when a live one has it."""
        robot = self.robots.setdefault(name, Robot(name))
        session, writer = str(args["session"]), str(args["writer"])
        # The same writer is the same spool, which only one process can hold: the other session is dead.
        if robot.attached and session != robot.session and writer != robot.writer:
            left = max(0.0, self.lease_s - robot.lease_age)
            raise Rejected(
                f"{NAME_TAKEN}a robot called {name!r} is attached from {robot.host} and was heard "
                f"{robot.lease_age:.1f} s ago: attach with another --name, e.g. {name}-2, or, if it is dead, "
                f"again in {left:.0f} s"
            )
        if writer != robot.writer:
            robot.numbering = {"sequence": 0, "episode": 0}
        if session != robot.session:
            robot.estop = 0  # whoever starts attach again at the robot releases the latch
        robot.begin(session)
        robot.kind, robot.host, robot.writer = str(args["kind"]), str(args["host"]), writer
        robot.attached, robot.seen, robot.detach = True, time.monotonic(), False
        robot.shadow = bool(args.get("shadow", False))
        robot.cameras, robot.state = [str(name) for name in args["features"][1]], {}
        return robot

    def find(self, args: dict[str, Any]) -> Robot:
        """The attached robot that a request is from."""
        robot = self.robots.get(str(args.get("name")))
        if robot is None or not robot.attached or robot.session != args.get("session"):
            raise Rejected(f"{NOT_ATTACHED}{args.get('name')!r} has no lease here (any more)")
        robot.seen = time.monotonic()
        return robot

    def named(self, name: Any) -> Robot:
        """A robot of the run by name."""
        if name not in self.robots:
            raise Rejected(f"no robot {name!r}; known: {', '.join(self.robots) or 'none'}")
        return self.robots[name]

    def silent(self) -> list[Robot]:
        """Robots whose lease has run out just now."""
        return [r for r in self.robots.values() if r.attached and r.lease_age > self.lease_s]


def _check_path(path: Any) -> None:
    """WireError unless `path` is what a robot may tell: {}, or points (n, 3), pixels {camera: (n, 2)} and causes."""
    if path == {}:
        return
    try:
        _check_points(path["points"], 3)
        pixels = arguments.mapping(path, "pixels")
        if len(pixels) > MOST_CAMERAS:
            raise WireError(f"a planned path in {len(pixels)} cameras, {MOST_CAMERAS} at most")
        for points in pixels.values():
            _check_points(points, 2)
        if not all(isinstance(cause, str) for cause in path["causes"]):
            raise WireError("causes of a planned path are strings")
    except (KeyError, TypeError) as error:
        raise WireError(f"no planned path: {error!r}") from None


def _check_points(points: Any, size: int) -> None:
    if not isinstance(points, list) or len(points) > MOST_POINTS:
        raise WireError(f"a planned path is a list of at most {MOST_POINTS} points")
    for point in points:
        if (
            not isinstance(point, list)
            or len(point) != size
            or not all(map(arguments.is_number, point))
        ):
            raise WireError(f"a point of a planned path is {size} finite numbers")


def _check_alarms(told: Any) -> None:
    if not isinstance(told, list) or len(told) > MOST_ALARMS:
        raise WireError(f"alarms are a list of {MOST_ALARMS} at most")
    for each in told:
        if not isinstance(each, list) or len(each) != 3:
            raise WireError(f"an alarm is [number, level, text], not {each!r}")
        named = dict(zip(("number", "level", "text"), each))
        arguments.integer(named, "number")
        arguments.text(named, "text")
        if named["level"] not in ("info", "warning"):
            raise WireError(f"an alarm's level is info or warning, not {named['level']!r}")
