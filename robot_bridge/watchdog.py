"""Whether the arm may move: holds that end by themselves, and two latches that only a person at the robot releases.

| state | begins | ends |
| --- | --- | --- |
| hold | no heartbeat for `heartbeat_s`, the plan ended more than `plan_s` ago, a camera is not well | when all is well |
| stopped | a hold in mid-episode lasted `latch_s`, a fault, or the stop key | `rearm`, by a person at the robot |
| e-stop | key, pedal, page or API | `release`, then `rearm`, by a person at the robot |

A software stop is not a safety function: a hardware stop button within reach is required.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any, Callable, NamedTuple

log = logging.getLogger(__name__)

MOVING, HOLDING, STOPPED, ESTOP = "moving", "holding", "stopped", "estop"


class Patience(NamedTuple):
    """How long what may be missing; s of real time."""

    heartbeat_s: float = 0.25  # since the cluster's last sign of life
    plan_s: float = 0.1  # since the present plan ended
    latch_s: float = 2.0  # of a hold, until it is latched
    camera_s: float = 0.3  # since a camera's newest frame
    skew_s: float = (
        0.03  # between an image and the arm, or two clocks: told beyond it, nothing holds
    )


class Ruling(NamedTuple):
    """What holds at present."""

    state: str
    reason: str  # empty while the arm may move
    by_person: bool = False  # it stands because somebody wants it to

    @property
    def may_move(self) -> bool:
        """The arm may move."""
        return self.state == MOVING


class Watchdog:
    """Told of signs of life, plans and wishes from any thread; asked by the control loop in every tick."""

    def __init__(
        self, patience: Patience, now: Callable[[], float] = time.monotonic, linked: bool = True
    ) -> None:
        """Without `linked` there is no cluster whose signs of life count."""
        if not min(patience) > 0:
            raise ValueError(f"patience must be above 0: {patience}")
        self.patience, self._now, self._linked = patience, now, linked
        self._lock = threading.Lock()
        self._heard = now()
        self._planned: float | None = None  # when the plan ends; None: nothing is planned
        self._estop = self._stop = self._wish = self._blind = ""
        self._since: float | None = None  # of the present hold
        self.held_at = 0.0  # when the last hold began
        self.holds = self.stops = 0

    def hear(self) -> None:
        """The cluster gave a sign of life."""
        with self._lock:
            self._heard = self._now()

    @property
    def silent_s(self) -> float:
        """Time since the last sign of life."""
        return self._now() - self._heard

    def plan(self, until: float | None) -> None:
        """What is planned, by policy or person, ends at `until`; None: no motion is due, so none is missing."""
        with self._lock:
            self._planned = until
            if until is None:
                self._since = None

    def blind(self, reason: str) -> None:
        """In mid-episode: what is wrong with the cameras; "" while they are well."""
        with self._lock:
            self._blind = reason

    def wish(self, reason: str) -> None:
        """Somebody wants the arm to stand (not a latch: "" ends it)."""
        with self._lock:
            self._wish = reason

    def stop(self, reason: str) -> None:
        """Latched until `rearm`."""
        with self._lock:
            self._latch(reason)

    def estop(self, reason: str) -> None:
        """Latched until `release`, and stopped after that."""
        with self._lock:
            self._estop = reason
            self._latch(reason)

    def release(self) -> None:
        """A person at the robot has released the e-stop; the arm stays stopped."""
        with self._lock:
            self._estop = ""

    def rearm(self) -> bool:
        """A person at the robot lets it move again; False while the e-stop is not released."""
        with self._lock:
            if self._estop:
                return False
            self._stop, self._since = "", None
            return True

    def ask(self) -> Ruling:
        """What holds now."""
        with self._lock:
            now = self._now()
            if self._estop:
                return Ruling(ESTOP, f"emergency stop: {self._estop}")
            if self._stop:
                return Ruling(STOPPED, f"stopped: {self._stop}")
            if self._wish:
                self._since = None  # a person's wish is no failure, however long it lasts
                return Ruling(HOLDING, self._wish, True)
            reason = self._missing(now)
            if not reason:
                self._since = None
                return Ruling(MOVING, "")
            if self._since is None:
                self._since, self.holds = now, self.holds + 1
                self.held_at = now
            due = self._planned is not None or self._blind
            if due and now - self._since >= self.patience.latch_s:
                self._latch(f"held for {self.patience.latch_s:g} s, since {reason}")
                return Ruling(STOPPED, f"stopped: {self._stop}")
            return Ruling(HOLDING, reason)

    def _missing(self, now: float) -> str:
        if self._blind:
            return self._blind
        silent = now - self._heard
        if self._linked and silent > self.patience.heartbeat_s:
            return f"the gateway has been silent for {silent:.1f} s"
        if self._planned is not None and now - self._planned > self.patience.plan_s:
            return f"no chunk has come for {now - self._planned:.1f} s after the last one's end"
        return ""

    def _latch(self, reason: str) -> None:
        if not self._stop:
            self.stops += 1
            self._stop = reason
        self._since = None


def heed(wishes: Any, watchdog: Watchdog, estop_seen: int) -> int:
    """Hand on to `watchdog` what the cluster wants (`robot_bridge.link.Wishes`).

    `estop_seen` is the number of the last emergency stop that was heeded; returns what it is now.
    """
    if wishes.estop > estop_seen:
        estop_seen = wishes.estop
        watchdog.estop("asked for from the cluster")
        log.warning("emergency stop was asked for: latched until it is released on this PC")
    wish = "held from the cluster" if wishes.hold else ""
    watchdog.wish("the run is paused" if wishes.paused and not wish else wish)
    return estop_seen


def obey(said: str, watchdog: Watchdog) -> bool:
    """Hand on what the operator says, "MARK" or "stop:REASON"; False where it says nothing of stops."""
    mark, _, reason = said.partition(":")
    if mark == "stop":
        watchdog.stop(reason or "the operator's stop key")
    elif mark == "estop":
        watchdog.estop("the operator's key")
    elif mark == "release":
        watchdog.release()
    elif mark == "rearm":
        if not watchdog.rearm():
            log.warning("not rearmed: the emergency stop has to be released first")
    else:
        return False
    return True
