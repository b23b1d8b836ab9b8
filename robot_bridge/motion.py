"""How a target becomes motion: straight interpolation between control steps, and set-points of bounded derivatives.

Poses are six numbers here: position of the tool centre point in m, and the rotation vector that turns a tool which
points straight down into the present one, in rad; both in the robot's base frame.
"""

from __future__ import annotations

import math

import numpy as np

POSE = 6


class Smoother:
    """Set-points from wanted poses, by two moving averages one after the other.

    The mean over a window has, if what goes in moves at most at speed v, an acceleration of at most 2 v / T for a
    window of T seconds; a second one bounds the jerk by 2 a / T likewise. A mean of points lies within their convex
    hull: what goes in lies in a box, so does what comes out, without overshoot. Price: a delay of half the windows.
    """

    def __init__(self, pose: np.ndarray, first: int, second: int) -> None:
        """Start at rest at `pose` (6,); the windows have `first` and `second` ticks."""
        self._first = np.empty((max(1, first), POSE))
        self._second = np.empty((max(1, second), POSE))
        self.begin(pose)

    def begin(self, pose: np.ndarray) -> None:
        """At rest at `pose`, from now on."""
        self._first[:], self._second[:] = pose, pose
        # All inputs that a set-point is a mean of, the newest last.
        self.inputs = np.tile(pose, (len(self._first) + len(self._second) - 1, 1))

    @property
    def last(self) -> np.ndarray:
        """The input that came last, (6,)."""
        return self.inputs[-1].copy()

    def hull(self, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Low and high corner (6,) of the box that the set-point after `pose` cannot leave."""
        held = self.inputs[1:]
        if not len(held):
            return pose, pose
        return np.minimum(held.min(axis=0), pose), np.maximum(held.max(axis=0), pose)

    def __call__(self, pose: np.ndarray) -> np.ndarray:
        """The set-point (6,) after input `pose` (6,)."""
        for window in (self.inputs, self._first, self._second):
            window[:-1] = window[1:]
        self.inputs[-1] = self._first[-1] = pose
        self._second[-1] = self._first.mean(axis=0)
        return self._second.mean(axis=0)


def window(change: float, limit: float, period_s: float) -> int:
    """Ticks of the window after which a quantity that changes by at most 2 `change` has a rate of at most `limit`."""
    return max(1, math.ceil(2.0 * change / (limit * period_s) - 1e-9))


def between(start: np.ndarray, goal: np.ndarray, share: float) -> np.ndarray:
    """The pose (6,) at `share` of the way from `start` to `goal`."""
    return start + (goal - start) * min(max(share, 0.0), 1.0)


def shorten(vector: np.ndarray, limit: float) -> np.ndarray:
    """`vector` with its direction kept and its length at most `limit`."""
    # Scaled by the largest part first: the square of a huge number would overflow.
    largest = np.abs(vector).max()
    if largest == 0.0:
        return vector
    unit = vector / largest
    length = float(np.linalg.norm(unit))  # from 1 to 1.8
    return vector if largest <= limit / length else unit * (limit / length)


DOWN = np.diag([1.0, -1.0, -1.0])  # the tool points straight down


def turned(turn: np.ndarray, by: np.ndarray) -> np.ndarray:
    """The rotation vector (3,) of a pose after a further rotation `by` (3,) rad in the base frame."""
    return log(exp(by) @ exp(turn))


def exp(vector: np.ndarray) -> np.ndarray:
    """The rotation matrix (3, 3) of a rotation vector (3,) in rad."""
    angle = float(np.linalg.norm(vector))
    cross = np.array(
        [
            [0.0, -vector[2], vector[1]],
            [vector[2], 0.0, -vector[0]],
            [-vector[1], vector[0], 0.0],
        ]
    )
    if angle < 1e-6:
        return np.eye(3) + cross + cross @ cross / 2.0
    a, b = math.sin(angle) / angle, (1.0 - math.cos(angle)) / angle**2
    return np.eye(3) + a * cross + b * (cross @ cross)


def log(matrix: np.ndarray) -> np.ndarray:
    """The rotation vector (3,) of a rotation matrix (3, 3), of a length below pi."""
    skew = np.array(
        [
            matrix[2, 1] - matrix[1, 2],
            matrix[0, 2] - matrix[2, 0],
            matrix[1, 0] - matrix[0, 1],
        ]
    )
    sine, cosine = np.linalg.norm(skew) / 2.0, (np.trace(matrix) - 1.0) / 2.0
    angle = math.atan2(sine, cosine)
    if angle < 1e-6:
        return skew / 2.0
    if sine > 1e-6:
        return skew * (angle / (2.0 * sine))
    # Half a turn: the axis is what the matrix leaves as it is.
    column = int(np.argmax(np.diag(matrix)))
    axis = (matrix[:, column] + np.eye(3)[column]) / 2.0
    return axis * (angle / np.linalg.norm(axis))
