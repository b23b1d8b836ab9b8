"""The cluster's side of the bridge, and the only thing that members outside the cluster see.

It authenticates, holds leases, passes observations to the policy server and chunks back, and relays segments to
the replay service: it never acknowledges for it. It keeps no data of its own but who was there and for how long.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
import uuid
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from robot_bridge import frames, protocol
from robot_bridge.desk import Desk, pack_questions
from robot_bridge.episodes import Episodes
from robot_bridge.leases import Leases, Robot, rate_of
from robot_bridge.protocol import Features, Job
from robot_bridge.relay import Relay
from robot_bridge.weights_relay import WeightsRelay
from twinrl.core import arguments, spec
from twinrl.core.errors import Rejected, ResumeError, WireError
from twinrl.core.keys import Keys, allowed_publics
from twinrl.core.metrics import Reporter
from twinrl.core.segment import IMAGE_PREFIX, Schema
from twinrl.core.sockets import Answer, Request, Server
from twinrl.core.spec import Dimension
from twinrl.weights_slots import slots_folder

log = logging.getLogger(__name__)
TICK = 0.05  # s
LONGEST_POLL = 30.0  # s
QUIET_S = 5.0  # between two events that tell of a robot's filter; its counts tell all
MAX_ROBOTS = 1000  # names in a run
LARGEST_RESULT = 64 << 10  # bytes as JSON, of what a robot tells of an episode
ROBOT_ACTIONS = ("hold", "release", "detach", "estop")
RUN_ACTIONS = ("pause", "resume", "checkpoint")


class Gateway:
    """`address` is what robots dial, `internal_address` an additional one inside the cluster."""

    def __init__(
        self,
        run_dir: str | Path,
        address: str,
        internal_address: str,
        replay_address: str,
        job: Job,
        metrics_address: str = "",
    ) -> None:
        self.job = job
        self._path = Path(run_dir) / "gateway.json"
        folder = Path(run_dir) / "keys"
        saved = _read(self._path)
        self._lock = threading.RLock()
        self._leases = Leases(job.lease_s, saved.get("robots"))
        self._episodes = Episodes(saved, self._why_not_begin)
        self._desk = Desk(uuid.uuid4().hex[:8])
        self._paused, self._checkpoints = bool(saved.get("paused", False)), 0
        self._saved, self._save_due = "", 0.0
        cluster = Keys.load(folder / "cluster.key")
        self._relay = Relay(replay_address, cluster, job.schema)
        self._weights = WeightsRelay(slots_folder(run_dir))
        allowed = {
            k: role for role in ("robot", "cluster") for k in allowed_publics(folder, [role])
        }
        own = Keys.load(folder / "server.key")
        self._server = Server("gateway", address, own, allowed, extra=internal_address)
        self.address = self._server.address
        for method in (
            *(self.hello, self.attach, self.heartbeat, self.episode),
            *(self.observe, self.segment, self.detach),
        ):
            self._bind("robot", method)
        for method in (
            *(self.policy_take, self.policy_give, self.set_configurations, self.results),
            *(
                self.robots,
                self.robot,
                self.camera,
                self.command,
                self.pause,
                self.resume,
                self.run_state,
            ),
        ):
            self._bind("cluster", method)
        for method in (self._weights.offer, self._weights.chunk):  # for holders of any key
            name = f"weights_{method.__name__}"
            self._server.bind(name, lambda request, method=method: method(request.args))
        self._reporter = None
        if metrics_address:
            self._reporter = Reporter(metrics_address, cluster, "gateway", "gateway", self.stats)
        self._stop = threading.Event()
        self._ticker = threading.Thread(target=self._tick_for_ever, name="ticker", daemon=True)

    def start(self) -> Gateway:
        """Serve in threads of its own."""
        self._server.start()
        self._ticker.start()
        return self

    def close(self) -> None:
        """Stop serving; robots hold and come back to whoever serves next."""
        self._stop.set()
        if self._ticker.is_alive():
            self._ticker.join(2)
        self._server.close()
        self._relay.close()
        self._weights.close()
        with self._lock:
            self._save()
        if self._reporter is not None:
            self._reporter.close()

    def stats(self) -> dict[str, Any]:
        """Flat statistics of the gateway and of every robot."""
        with self._lock:
            robots = list(self._leases.robots.values())
            counts: dict[str, Any] = {
                "robots": sum(robot.attached for robot in robots),
                "robot_minutes": sum(robot.total("seconds") for robot in robots) / 60,
                "intervention_minutes": sum(r.total("takeover_seconds") for r in robots) / 60,
                "chunks": self._desk.answered,
                "late_chunks": self._desk.late,
                "paused": self._paused,
                **self._relay.stats(),
                **self._weights.stats(),
                **self._server.stats(),
            }
            rate = rate_of(robots)
            if rate is not None:
                counts["intervention_rate"] = rate
            data: dict[str, Any] = {f"gateway/{k}": float(v) for k, v in counts.items()}
            for robot in robots:
                data.update(robot.stats())
        return data

    # Methods of robots, each called in the server's thread.

    def hello(self, request: Request) -> dict[str, Any]:
        """What the run is."""
        self._check_version(request.args)
        return {"job": self.job.to_header()}

    def attach(self, request: Request) -> dict[str, Any]:
        """A robot joins, or comes back."""
        args = request.args
        name = arguments.text(args, "name", longest=100, shortest=1)
        for field in ("kind", "writer", "session", "host"):
            arguments.text(args, field)
        if name not in self._leases.robots and len(self._leases.robots) >= MAX_ROBOTS:
            raise Rejected(f"{MAX_ROBOTS} robots' names are known already: use one of them again")
        try:
            self._check_version(args)
            self._check_features(args)
            robot = self._leases.attach(name, args)
        except Rejected as error:
            self._event("warning", f"robot {name} was refused: {error}", name, "rejected")
            raise
        self._save()
        text = f"robot {name} ({robot.kind}) attached from {robot.host}"
        text += ", in shadow: it is not commanded" if robot.shadow else ""
        self._event("info", text, name, "attached")
        told = {"job": self.job.to_header(), "numbering": robot.numbering}
        return {**told, "time": time.time()}

    def heartbeat(self, request: Request) -> dict[str, Any]:
        """A sign of life; the answer says what the cluster wants."""
        robot = self._leases.find(request.args)
        takeovers, before = robot.now.get("takeovers", 0), robot.state.get("doing")
        if "state" in request.args:
            robot.hear(arguments.mapping(request.args, "state"))
        doing = robot.state.get("doing")
        if robot.now.get("takeovers", 0) > takeovers:
            self._event("info", f"a person took over robot {robot.name}", robot.name, "takeover")
        if doing != before and doing in ("holding", "stopped"):
            text = f"robot {robot.name} is {doing}: {robot.state.get('reason', '')}"
            self._event("warning", text, robot.name, "held")
        if time.monotonic() - robot.filtered > QUIET_S:
            self._tell_filtered(robot)
        for level, text in robot.alarms():
            self._event(level, f"robot {robot.name}: {text}", robot.name, "alarm")
        return {**robot.wishes(self._paused), "time": time.time()}

    def episode(self, request: Request) -> Future:
        """Where the next episode starts; takes the result of the last."""
        robot = self._leases.find(request.args)
        finished, timeout = _finished(request.args), _seconds(request.args)
        self._episodes.finish(robot, finished)
        return self._episodes.ask(robot, timeout)

    def observe(self, request: Request) -> Future:
        """What an arm sees, for the next chunk."""
        robot, args = self._leases.find(request.args), request.args
        images = frames.check(request.arrays, args["codec"], self.job.schema.image_size)
        self._check_observation(images)
        single = {k: v[0] if k.startswith(IMAGE_PREFIX) else v for k, v in images.items()}
        robot.frames, robot.frames_time = frames.split(request.arrays), time.time()
        robot.incoming.recent.keep(robot.frames)
        robot.judge(self._weights.newest())
        header = {
            "robot": robot.name,
            "episode": arguments.text(args, "episode"),
            "step": arguments.integer(args, "step"),
            "instruction": arguments.text(args, "instruction", self.job.instruction),
            "parameters": arguments.mapping({"parameters": {}, **args}, "parameters"),
        }
        return self._desk.ask(robot.name, header, single, _seconds(args))

    def segment(self, request: Request) -> Future | dict[str, Any]:
        """A piece of a segment; the last one is answered with the replay service's acknowledgement."""
        robot = self._leases.find(request.args)
        told, arrived = robot.incoming.add(request.args, request.arrays, robot.writer)
        if arrived is None:
            return told
        header = arrived.header
        answer = self._relay.send(*arrived)
        answer.add_done_callback(lambda done: done.exception() or robot.count_segment(header))
        return answer

    def detach(self, request: Request) -> None:
        """A robot leaves."""
        robot = self._leases.find(request.args)
        finished = _finished(request.args)
        robot.hear(arguments.mapping({"state": {}, **request.args}, "state"))
        self._episodes.finish(robot, finished)
        self._tell_filtered(robot)
        self._let_go(robot, "info", f"robot {robot.name} left")

    # Methods of the cluster.

    def policy_take(self, request: Request) -> Future:
        """Observations for a policy server."""
        limit = arguments.integer(request.args, "limit", 1, low=1)
        taken = self._desk.take(limit, _seconds(request.args))
        self._episodes.tick()
        answer: Future = Future()
        taken.add_done_callback(lambda done: answer.set_result(pack_questions(done.result())))
        return answer

    def policy_give(self, request: Request) -> dict[str, Any]:
        """A chunk, or why there is none."""
        args, arrays = request.args, request.arrays
        if args.get("refused"):
            return {"used": self._desk.give(args["request"], {"wait": str(args["refused"])}, {})}
        action = arrays.get("action")
        if action is None or action.dtype.str != "<f4" or action.shape != (self.job.chunk, 7):
            found = "none" if action is None else f"{action.dtype.str}{action.shape}"
            raise WireError(f"a chunk is <f4({self.job.chunk}, 7), not {found}")
        for name in arrays:
            if name != "action" and not name.startswith("policy."):
                raise WireError(f"array {name!r} is neither action nor policy.*")
        # How old it is, is judged now: however long it travels, it does not get older by that.
        version, newest = int(args["version"]), self._weights.newest()
        question = self._desk.find(args["request"])
        if question is not None:
            self._leases.named(question.robot).judge(newest, version)
        told = {"version": version, "newest": newest, "run": self.job.run}
        return {"used": self._desk.give(args["request"], told, arrays)}

    def set_configurations(self, request: Request) -> dict[str, Any]:
        """Where episodes start from now on."""
        args = request.args
        version = self._episodes.starts.replace(
            list(args["configurations"]), args.get("order", "random"), args.get("parameters", {})
        )
        self._save()
        self._episodes.tick()
        return {"version": version}

    def results(self, request: Request) -> dict[str, Any]:
        """How episodes ended."""
        return {"results": self._episodes.since(arguments.integer(request.args, "since", 0))}

    def robots(self, request: Request) -> Answer:
        """Every robot that was ever attached, with its last frames."""
        arrays = {}
        for robot in self._leases.robots.values():
            for camera, data in frames.thumbnails(robot.frames).items():
                arrays[f"frame/{robot.name}/{camera}"] = data
        rows = [robot.describe() for robot in self._leases.robots.values()]
        return {"robots": rows, "paused": self._paused, "run": self.job.run}, arrays

    def robot(self, request: Request) -> dict[str, Any]:
        """One robot's row, with the path that it plans."""
        return {"robot": self._leases.named(request.args["robot"]).describe()}

    def camera(self, request: Request) -> Answer:
        """The last frame of one camera as JPEG."""
        robot = self._leases.named(request.args["robot"])
        data = frames.thumbnails(robot.frames).get(request.args["camera"])
        return {"time": robot.frames_time}, {} if data is None else {"jpeg": data}

    def command(self, request: Request) -> dict[str, Any]:
        """What a person asks of a robot or of the run."""
        action, target = request.args["action"], request.args.get("target")
        if action in RUN_ACTIONS and not target:
            self._paused = {"pause": True, "resume": False}.get(action, self._paused)
            self._checkpoints += action == "checkpoint"
            self._event("info", f"{action} was asked for", "", action)
            self._episodes.tick()
            return self.run_state(request)
        if action not in ROBOT_ACTIONS:
            known = ", ".join((*RUN_ACTIONS, *(f"{a} ROBOT" for a in ROBOT_ACTIONS)))
            raise Rejected(f"no command {action!r} for {target or 'the run'}; known: {known}")
        robot = self._leases.named(target)
        robot.obey(action)
        level = "warning" if action == "estop" else "info"
        self._event(level, f"{action} was asked of robot {robot.name}", robot.name, action)
        return {"robot": robot.describe()}

    def pause(self, request: Request) -> dict[str, Any]:
        """All arms hold."""
        return self.command(request._replace(args={"action": "pause"}))

    def resume(self, request: Request) -> dict[str, Any]:
        """Go on after `pause`."""
        return self.command(request._replace(args={"action": "resume"}))

    def run_state(self, request: Request) -> dict[str, Any]:
        """What was asked of the run."""
        return {"paused": self._paused, "checkpoints": self._checkpoints}

    # Inside.

    def _bind(self, role: str, method: Any) -> None:
        def handler(request: Request) -> Any:
            if request.role != role:
                text = f"{method.__name__!r} is for holders of the run's {role} key"
                raise Rejected(f"{text}, you hold its {request.role} key")
            with self._lock:
                return method(request)

        self._server.bind(method.__name__, handler)

    def _check_version(self, args: dict[str, Any]) -> None:
        advice = protocol.version_advice(args, self.job.software)
        if advice:
            raise Rejected(advice)

    def _check_features(self, args: dict[str, Any]) -> None:
        wanted = protocol.features_of(self.job.schema)
        state_dim, cameras, image_size = args["features"]
        robot = Features(int(state_dim), tuple(cameras), int(image_size))
        unlike = protocol.differences(robot, wanted)
        if unlike:
            raise Rejected(
                f"robot {args['kind']!r} does not fit run {self.job.run!r}: {'; '.join(unlike)}. "
                "Give the driver what the run has (--robot-option), or start a run with the robot's values"
            )
        own = [Dimension(*map(str, each)) for each in args.get("dimensions") or ()]
        table = spec.differences(own, self.job.dimensions) if self.job.dimensions else ""
        if table:
            raise Rejected(
                f"the numbers of observation.state of robot {args['kind']!r} mean something else than those of run "
                f"{self.job.run!r}:\n{table}"
            )
        if args.get("digest") != wanted.digest():
            raise Rejected(
                "robot and run record different columns: "
                + protocol.update_advice(args, self.job.software)
            )

    def _check_observation(self, arrays: dict[str, Any]) -> None:
        schema = self.job.schema
        image = ("|u1", (1, schema.image_size, schema.image_size, 3))
        expected = {IMAGE_PREFIX + camera: image for camera in schema.cameras}
        expected["observation.state"] = ("<f4", (schema.state_dim,))
        found = {name: (array.dtype.str, array.shape) for name, array in arrays.items()}
        if found != expected:
            raise WireError(f"an observation of {found}, the run's is {expected}")

    def _tell_filtered(self, robot: Robot) -> None:
        """An event for what the robot's safety filter did since the last one: none is left out, not each has its own."""
        causes = robot.untold()
        if causes:
            robot.filtered = time.monotonic()
            counted = ", ".join(f"{cause} ({n})" if n > 1 else cause for cause, n in causes.items())
            text = f"the safety filter of robot {robot.name} intervened: {counted}"
            self._event("info", text, robot.name, "filtered")

    def _why_not_begin(self, robot: Robot) -> str:
        if not robot.attached:
            return "not attached"
        if robot.shadow:
            return "in shadow: it plays no episode"
        if self._paused:
            return "the run is paused"
        if robot.hold or robot.detach:
            return "held from the cluster"
        return "" if self._desk.staffed else "no policy server takes observations yet"

    def _let_go(self, robot: Robot, level: str, text: str) -> None:
        robot.attached, robot.detach = False, False
        robot.incoming.forget()
        self._episodes.drop(robot)
        self._desk.withdraw(robot.name, "the robot left")
        self._event(level, text, robot.name, "left")

    def _tick_for_ever(self) -> None:
        while not self._stop.wait(TICK):
            with self._lock:
                self._tick()

    def _tick(self) -> None:
        try:
            for robot in self._leases.silent():
                text = (
                    f"robot {robot.name} was silent for {self.job.lease_s:g} s and counts as gone"
                )
                self._let_go(robot, "warning", text)
            self._desk.tick()
            self._episodes.tick()
            self._relay.tick()
            self._weights.tick()
            if time.monotonic() > self._save_due:
                self._save_due = time.monotonic() + 1.0
                self._save()
        except Exception:  # every deadline hangs on the ticker: it must go on, and loudly
            log.exception("the gateway's ticker failed")

    def _save(self) -> None:
        robots = {name: robot.saved() for name, robot in self._leases.robots.items()}
        state = {"robots": robots, "paused": self._paused, **self._episodes.saved()}
        # Whatever a member made us keep must not hinder the rest from being saved.
        text = json.dumps(state, default=repr, skipkeys=True)
        if text != self._saved:
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text(text)
            os.replace(temporary, self._path)
            self._saved = text

    def _event(self, level: str, text: str, robot: str, what: str) -> None:
        log.log(logging.WARNING if level == "warning" else logging.INFO, "%s", text)
        if self._reporter is not None:
            self._reporter.event(level, text, robot=robot, what=what)


def serve(
    run_dir: str | Path,
    address: str,
    internal_address: str,
    replay_address: str,
    schema: Schema | dict[str, Any] | list[Any],
    job: dict[str, Any],
    metrics_address: str,
) -> None:
    """The gateway's process: serve until SIGTERM or SIGINT."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        # From a thread: within `stop.wait`, which a handler interrupts, `set` could wait for itself.
        signal.signal(number, lambda *_: threading.Thread(target=stop.set).start())
    made = protocol.make_job(schema, job)
    gateway = Gateway(run_dir, address, internal_address, replay_address, made, metrics_address)
    gateway.start()
    log.info("gateway of run %s on %s", made.run, gateway.address)
    while not stop.wait(1.0):
        pass
    gateway.close()


def _seconds(args: dict[str, Any]) -> float:
    return arguments.seconds(args, "timeout", 1.0, LONGEST_POLL)


def _finished(args: dict[str, Any]) -> dict[str, Any] | None:
    """What a robot tells of an episode; it is kept, and shown as JSON."""
    if not args.get("finished"):
        return None
    finished = arguments.mapping(args, "finished")
    number = arguments.text(finished, "episode").rpartition("-")[2]
    arguments.integer(finished, "interventions", 0, high=arguments.integer(finished, "steps", 0))
    try:
        size = len(json.dumps(finished))
    except (TypeError, ValueError) as error:
        raise WireError(f"how an episode ended cannot be kept as JSON: {error}") from None
    if not number.isdecimal() or size > LARGEST_RESULT:
        raise WireError(
            f"an episode's name ends in its number, its result has {LARGEST_RESULT} bytes at most"
        )
    return finished


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ResumeError(
            f"{path} is damaged ({error}): move it aside to start without it"
        ) from None
