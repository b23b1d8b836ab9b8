"""A point that goes exactly where it is told: for trying a link without an arm or a simulator.

Its observations tell what they are: `observation.state` is tool position, gripper, step and episode, and every
pixel of a frame is the step's number.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from robot_bridge.driver import Commanded, Driver, Frame, Outcome
from robot_bridge.protocol import Job
from robot_bridge.safety import Measured
from twinrl.core.spec import Dimension

HOME = (0.45, 0.0, 0.2)  # m
GOAL, CLOSE = (0.6, 0.1, 0.1), 0.02  # m, where an episode succeeds


STATE = ("tcp_x", "tcp_y", "tcp_z"), ("gripper", "step", "episode")


class PointDriver(Driver):
    """Succeeds within 2 cm of a goal; truncates after `steps`."""

    kind = "point"
    simulated = True
    tolerance = None
    dimensions = (
        *(Dimension(name, "m", "base") for name in STATE[0]),
        *(Dimension(name, "1", "") for name in STATE[1]),
    )

    def __init__(self, steps: int = 24, reset_seconds: float = 0.5, rate_hz: float = 100.0) -> None:
        self.reset_seconds, self.rate_hz = float(reset_seconds), float(rate_hz)
        self.steps = int(steps)
        self._pose, self._gripper = np.array([*HOME, 0.0, 0.0, 0.0]), 1.0
        self._step = self._episode = 0

    def connect(self, job: Job, speed: float) -> None:
        """Take the job's cameras and image size."""
        self.cameras, self.image_size = tuple(job.schema.cameras), job.schema.image_size
        self.lockstep = speed > 1.0

    def disconnect(self) -> None:
        """Nothing to leave."""

    def reset(self, configuration: dict[str, Any] | None, region: str) -> dict[str, Any]:
        """Go to `configuration["start"]`, home without."""
        configuration = dict(configuration or {"start": list(HOME)}, region=region)
        self._pose = np.array([*configuration.get("start", HOME), 0.0, 0.0, 0.0])
        self._step, self._gripper = 0, 1.0
        self._episode += 1
        return configuration

    def measure(self) -> Measured:
        """Where it is."""
        return Measured(time.monotonic(), self._pose.copy(), np.zeros(0), 0.08 * self._gripper)

    def servo(self, pose: np.ndarray, gripper: float) -> None:
        """Move at once."""
        self._pose, self._gripper = np.array(pose), float(gripper)

    def frames(self) -> dict[str, Frame]:
        """Frames that show the step's number."""
        size = (self.image_size, self.image_size, 3)
        image = np.full(size, self._step % 256, np.uint8)
        return {name: Frame(time.monotonic(), image) for name in self.cameras}

    def state(self, measured: Measured, commanded: Commanded) -> np.ndarray:
        """Position, gripper, step and episode."""
        numbers = [*measured.pose[:3], self._gripper, self._step, self._episode]
        return np.array(numbers, np.float32)

    def ended(self, action: np.ndarray) -> Outcome:
        """Success at the goal."""
        self._step += 1
        success = bool(np.linalg.norm(self._pose[:3] - GOAL) < CLOSE)
        return Outcome(float(success), success, not success and self._step >= self.steps, success)

    def expert(self, noise: float, commanded: np.ndarray) -> np.ndarray:
        """Straight to the goal."""
        move = np.subtract(GOAL, commanded[:3])
        move *= min(1.0, 0.03 / max(float(np.linalg.norm(move)), 1e-9))
        return np.array([*move, 0, 0, 0, 1], np.float32)
