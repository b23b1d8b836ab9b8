"""Where points of the robot's base frame lie in the images of cameras whose calibration is known."""

from __future__ import annotations

from typing import Dict, NamedTuple

import numpy as np

from robot_bridge.motion import exp

NEAREST = 0.01  # m in front of a camera; what is nearer has no place in its image


class Camera(NamedTuple):
    """A calibrated pinhole camera: x of its frame goes to the right of the image, y down, z out of the lens."""

    position: np.ndarray  # (3,) m
    turn: np.ndarray  # (3, 3) its axes as columns
    focal: float  # pixels
    centre: np.ndarray  # (2,) pixels, right and down from the image's upper left corner
    on_tool: bool = False  # position and turn are in the tool's frame, else in the base frame

    def project(self, points: np.ndarray, pose: np.ndarray) -> np.ndarray:
        """Pixels (n, 2), right and down, of `points` (n, 3) m in the base frame; NaN for those that are not before it.

        `pose` (6,) of the tool (`robot_bridge.motion`) places a camera that moves with it.
        """
        position, turn = self.position, self.turn
        if self.on_tool:
            facing = exp(np.asarray(pose[3:], float))
            position, turn = pose[:3] + facing @ position, facing @ turn
        seen = (np.asarray(points, float) - position) @ turn
        depth = np.where(seen[:, 2] < NEAREST, np.nan, seen[:, 2])
        return self.centre + self.focal * seen[:, :2] / depth[:, None]


def project(
    cameras: Dict[str, Camera], points: np.ndarray, pose: np.ndarray
) -> Dict[str, np.ndarray]:
    """`Camera.project` of each of `cameras`."""
    return {name: camera.project(points, pose) for name, camera in cameras.items()}
