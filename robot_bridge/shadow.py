"""`twinrl attach --shadow`: the policy is asked as usual, what it plans is shown, and the arm is not commanded.

There is no control loop here, so nothing calls the driver's `servo`, and nothing resets the arm, for a reset moves it.
No start is asked for: an evaluation's starts are each played once, and one that a still arm took would count as a
failure, or be missing. So there is no episode, no result, no segment, and none of the robot's minutes are used.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from robot_bridge import frames
from robot_bridge.bridge import Settings
from robot_bridge.control import REST, Plan
from robot_bridge.driver import Commanded, Driver
from robot_bridge.link import Link
from robot_bridge.operator import Operator
from robot_bridge.pilot import Pilot
from robot_bridge.planned import PlannedPath
from robot_bridge.protocol import Job
from robot_bridge.recorder import Seen
from robot_bridge.safety import SafetyFilter
from robot_bridge.spool import Spool
from robot_bridge.watchdog import ESTOP, HOLDING, STOPPED, Watchdog, heed, obey

LOOK = 0.02  # s between looks at what is wanted
SHADOW = "shadow"  # what a robot does that only shows what the policy plans


class Shadow:
    """One attached robot that stands still. `run` returns when it is told to leave."""

    def __init__(
        self,
        link: Link,
        driver: Driver,
        operator: Operator,
        safety: SafetyFilter,
        watchdog: Watchdog,
        spool: Spool,
        job: Job,
        settings: Settings,
    ) -> None:
        self._link, self._driver, self._operator = link, driver, operator
        self._safety, self._watchdog = safety, watchdog
        self._spool, self._job, self._codec = spool, job, settings.codec
        period = 1.0 / (job.control_hz * settings.speed_scale * settings.speed)
        self._pilot = Pilot(link, settings.codec, period, self._show, job.run, settings.max_lag)
        self._pace = job.chunk * period  # s, real time, that a chunk would be executed for
        self._path = PlannedPath(driver, safety)
        self._stop = threading.Event()
        self._doing, self._reason = HOLDING, "no chunk has come yet"
        self._estop_seen, self._chunks, self._due = 0, 0, 0.0

    def stop(self) -> None:
        """Leave."""
        self._stop.set()

    def state(self) -> dict[str, Any]:
        """What goes out with each heartbeat."""
        return {
            "doing": self._doing,
            "reason": self._reason,
            "path": self._path.told,
            "estop_seen": self._estop_seen,
            "chunk_ms": self._pilot.latency_ms,
            "totals": {"shadow_chunks": self._chunks, "stale_chunks": self._pilot.refused},
            **self._spool.stats(),  # what an earlier attach has left; it stays there
        }

    def run(self) -> None:
        """Ask for chunks until told to leave."""
        # Noise off: what is shown is what the policy would do when it is evaluated.
        parameters = {"explore": False, "record": False}
        self._pilot.begin(
            f"{self._link.name}-{self._spool.id}-shadow", parameters, self._job.instruction
        )
        try:
            while not (self._stop.is_set() or self._link.wishes.detach):
                if self._link.fatal is not None:
                    raise self._link.fatal
                self._look()
                self._stop.wait(LOOK)
        finally:
            self._doing = "leaving"
            self._pilot.forget()
            self._link.close()

    def _look(self) -> None:
        for mark in self._operator.marks():
            obey(mark, self._watchdog)  # what else it says is of episodes, and there is none
        self._estop_seen = heed(self._link.wishes, self._watchdog, self._estop_seen)
        ruling = self._watchdog.ask()
        self._operator.notice(ruling)
        if not ruling.may_move:
            state = STOPPED if ruling.state == ESTOP else ruling.state
            self._stand(state, ruling.reason)
        elif self._pilot.reason:
            self._stand(HOLDING, self._pilot.reason)
        if ruling.may_move and self._pilot.may_ask and time.monotonic() >= self._due:
            self._ask()

    def _ask(self) -> None:
        """For a chunk from here: the commanded pose is where the arm stands."""
        measured, images = self._driver.measure(), self._driver.frames()
        missing = [name for name in self._driver.cameras if name not in images]
        if missing:
            self._stand(HOLDING, f"no image of camera {missing[0]!r} has come")
            return
        self._safety.begin(measured.pose, 1.0)
        state = self._driver.state(measured, Commanded(measured.pose, REST, REST))
        seen = {frames.key_of(name): frame.image for name, frame in images.items()}
        self._due = time.monotonic() + self._pace
        self._pilot.ask(0, Seen(state, frames.encode(seen, self._codec)))

    def _show(self, plan: Plan) -> None:
        self._path.show(plan.actions)
        self._chunks += 1
        self._doing, self._reason = SHADOW, ""

    def _stand(self, doing: str, reason: str) -> None:
        self._doing, self._reason = doing, reason
        self._path.clear()
