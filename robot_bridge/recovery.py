"""After a reflex or the like: the arm is made to take set-points again and goes up slowly, a few times by itself.

Then it is stopped until a person lets it move again; only of a simulated arm, beside which nobody stands, may time do that.
"""

from __future__ import annotations

import collections
import logging
import math
import time
from typing import Deque

import numpy as np

from robot_bridge.clock import RobotClock
from robot_bridge.driver import Driver
from robot_bridge.motion import between
from robot_bridge.safety import SafetyFilter
from robot_bridge.watchdog import ESTOP, STOPPED, Ruling, Watchdog
from twinrl.core.errors import TwinRLError

log = logging.getLogger(__name__)
RECOVERIES, WITHIN_S = 3, 600.0  # so many within so long, then a person is asked


class Recovery:
    """Called from the bridge's thread, while no episode runs."""

    def __init__(
        self,
        driver: Driver,
        safety: SafetyFilter,
        watchdog: Watchdog,
        clock: RobotClock,
        alone_s: float = 0.0,
    ) -> None:
        """`alone_s`: where nobody is there to let a stopped arm move again, it is an error after so long; 0: somebody is."""
        self._driver, self._safety, self._watchdog, self._clock = driver, safety, watchdog, clock
        self._done: Deque[float] = collections.deque(maxlen=RECOVERIES)
        self._alone_s, self._stopped = alone_s, math.inf

    def after(self, fault: str) -> None:
        """Clear `fault`, unless that was done too often; where that fails the arm is stopped."""
        now = time.monotonic()
        log.warning("the arm does not move: %s; the episode is truncated", fault)
        if len(self._done) == RECOVERIES and now - self._done[0] < WITHIN_S:
            self._watchdog.stop(
                f"{RECOVERIES} recoveries within {WITHIN_S:g} s, now {fault}: look at the arm"
            )
            return
        self._done.append(now)
        try:
            self._driver.recover()
            self.retreat()
        except TwinRLError as error:
            self._watchdog.stop(f"{fault}; {error}")

    def attend(self, ruling: Ruling) -> None:
        """Called while no episode runs: what becomes of an arm that stays stopped.

        TwinRLError where nobody can let it move again.
        """
        if ruling.state not in (STOPPED, ESTOP):
            self._stopped = math.inf
            return
        self._stopped = min(self._stopped, time.monotonic())
        waited, alone = time.monotonic() - self._stopped, self._driver.rearm_s
        if self._driver.simulated and ruling.state == STOPPED and 0.0 < alone < waited:
            log.warning("nobody stands beside a simulated arm: it may move again")
            self._watchdog.rearm()
        elif 0.0 < self._alone_s < waited:
            raise TwinRLError(
                f"{ruling.reason}. There is no terminal from which to let the arm move again (u)"
            )

    def retreat(self, height_m: float = 0.05, speed: float = 0.05) -> None:
        """Slowly straight up: away from whatever made the arm refuse to move."""
        measured = self._driver.measure()
        self._safety.begin(measured.pose, self._safety.gripper)
        start = self._safety.setpoint.copy()
        goal = start + np.array([0.0, 0.0, height_m, 0.0, 0.0, 0.0])
        tick_s = self._safety.tick_s
        ticks = math.ceil(height_m / speed / tick_s)
        for k in range(ticks + self._safety.settling):
            measured = self._driver.measure()
            if measured.fault or self._watchdog.ask().state in (STOPPED, ESTOP):
                return
            wanted = between(start, goal, (k + 1) / ticks)
            self._driver.servo(self._safety.tick(wanted, measured), self._safety.gripper)
            self._clock.spend("motion", tick_s)
