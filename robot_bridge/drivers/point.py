"""A point that goes exactly where it is told: for trying a link without an arm or a simulator.

Its observations tell what they are: `observation.state` is tool position, gripper, step and episode, and every
pixel of a frame is the step's number.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from robot_bridge.driver import Driver, Observation, Outcome
from robot_bridge.protocol import Job
from twinrl.core.segment import IMAGE_PREFIX

HOME = (0.45, 0.0, 0.2)  # m
GOAL, CLOSE = (0.6, 0.1, 0.1), 0.02  # m, where an episode succeeds


class PointDriver(Driver):
    """Succeeds within 2 cm of a goal; truncates after `steps`."""

    kind = "point"
    state_names = ("tcp_x", "tcp_y", "tcp_z", "gripper", "step", "episode")

    def __init__(self, steps: int = 24, reset_seconds: float = 0.5) -> None:
        self.reset_seconds = float(reset_seconds)
        self.steps = int(steps)
        self._position, self._gripper = np.array(HOME), 1.0
        self._step = self._episode = 0

    def connect(self, job: Job) -> None:
        """Take the job's cameras and image size."""
        self.cameras, self.image_size = tuple(job.schema.cameras), job.schema.image_size

    def disconnect(self) -> None:
        """Nothing to leave."""

    def reset(self, configuration: dict[str, Any] | None, region: str) -> dict[str, Any]:
        """Go to `configuration["start"]`, home without."""
        configuration = dict(configuration or {"start": list(HOME)}, region=region)
        self._position = np.array(configuration.get("start", HOME), float)
        self._step, self._gripper = 0, 1.0
        self._episode += 1
        return configuration

    def read(self) -> Observation:
        """Where it is, and frames that show the step's number."""
        size = (self.image_size, self.image_size, 3)
        state = [*self._position, self._gripper, self._step, self._episode]
        frames = {
            IMAGE_PREFIX + name: np.full(size, self._step % 256, np.uint8) for name in self.cameras
        }
        return {"observation.state": np.array(state, np.float32), **frames}

    def command(self, action: np.ndarray) -> np.ndarray:
        """Move at once."""
        self._position = self._position + action[:3]
        self._gripper = float(action[6])
        self._step += 1
        return np.asarray(action, np.float32)

    def judge(self) -> Outcome:
        """Success at the goal."""
        success = bool(np.linalg.norm(self._position - GOAL) < CLOSE)
        return Outcome(float(success), success, not success and self._step >= self.steps, success)

    def tool(self) -> np.ndarray:
        """Where it is."""
        return self._position.copy()

    def expert(self, noise: float) -> np.ndarray:
        """Straight to the goal."""
        move = np.subtract(GOAL, self._position)
        move *= min(1.0, 0.03 / max(float(np.linalg.norm(move)), 1e-9))
        return np.array([*move, 0, 0, 0, 1], np.float32)
