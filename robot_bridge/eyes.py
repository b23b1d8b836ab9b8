"""What there is to be seen at a moment, and whether it may be believed."""

from __future__ import annotations

import collections
import time
from typing import Counter, Dict, NamedTuple

import numpy as np

from robot_bridge.camera_guard import NOTHING, CameraGuard, Wrong
from robot_bridge.driver import Commanded, Driver, Frame
from robot_bridge.safety import Measured

LOOK_S = 0.03  # between looks at the cameras, about as often as they send


class View(NamedTuple):
    """What there is to be seen at one moment."""

    measured: Measured
    state: np.ndarray  # (S,) float32
    frames: Dict[str, Frame]

    @property
    def skew(self) -> float:
        """s between what the arm says of itself and the oldest image."""
        return max((self.measured.time - frame.time for frame in self.frames.values()), default=0.0)


class Eyes:
    """A driver's cameras and the guard over them. Called from one thread at a time.

    `wrong` is what is wrong with them now, `fault` what was in this episode: its images may be worth nothing from
    before that was noticed. `counts` holds the faults by kind.
    """

    def __init__(self, driver: Driver, tick_s: float, age_s: float) -> None:
        """`age_s`: of the newest frame of a camera, until it is late."""
        self._driver = driver
        self._every = max(1, round(LOOK_S / tick_s))
        self._tick_s, self._age_s = tick_s, age_s
        self.counts: Counter[str] = collections.Counter()
        self.begin()

    def begin(self) -> None:
        """A new episode."""
        driver = self._driver
        self._guard: CameraGuard | None = None
        if driver.tolerance is not None and driver.cameras:
            tolerance = driver.tolerance._replace(age_s=self._age_s)
            self._guard = CameraGuard(driver.cameras, tolerance, driver.lockstep)
        self._ticks = 0
        self.wrong, self.fault = NOTHING, ""

    def tick(self) -> None:
        """A tick has gone by: look whether the cameras are well, if it is time to.

        A simulated clock's images are rendered when asked for: there it is at a control step's end, unless the arm
        stands for want of them.
        """
        self._ticks += 1
        if self._guard is None or self._ticks % self._every:
            return
        if not self._driver.lockstep or self.wrong.kind:
            self._judge(self._driver.frames())

    def view(self, measured: Measured, commanded: Commanded) -> View:
        """What is seen."""
        frames = self._driver.frames()
        self._judge(frames)
        return View(measured, self._driver.state(measured, commanded), frames)

    def _judge(self, frames: Dict[str, Frame]) -> None:
        if self._guard is None:
            return
        now = self._ticks * self._tick_s if self._driver.lockstep else time.monotonic()
        wrong = self._guard(frames, now)
        failed = self._driver.blind()
        if failed:
            wrong = Wrong("missing", failed)
        if wrong.kind and wrong.kind != self.wrong.kind:
            self.counts[wrong.kind] += 1
        self.wrong = wrong
        self.fault = self.fault or wrong.text
