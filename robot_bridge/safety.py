"""The safety filter: between everything that commands and the driver. Small enough to review in one sitting.

A software filter is not a safety function: the arm's own limits and a hardware emergency stop are required.
"""

from __future__ import annotations

import collections
from typing import Counter, NamedTuple, Tuple

import numpy as np

Box = Tuple[Tuple[float, float, float], Tuple[float, float, float]]  # low and high corner, m
ALONG = 8  # points of a step's path that are looked at; a box must be thicker than step_m / ALONG


class Limits(NamedTuple):
    """What a command may ask for. Positions in m in the robot base frame, of the tool centre point."""

    step_m: float = 0.04  # longest translation in one control step
    step_rad: float = 0.25  # longest rotation in one control step
    lead_m: float = 0.2  # how far the commanded pose may lead the measured one
    workspace: Box = (
        (0.22, -0.45, 0.005),
        (0.81, 0.45, 0.55),
    )  # its floor keeps the tool off the table
    keep_out: tuple[Box, ...] = ()  # boxes the tool must not enter
    gripper: tuple[float, float] = (0.0, 1.0)
    stale_s: float = 1.0  # a command older than this is refused


class Verdict(NamedTuple):
    """What may be executed, and why it differs from what was asked for."""

    action: np.ndarray  # (7,) float32
    causes: list[str]  # empty: nothing was changed
    refused: bool  # the whole command was replaced by standing still


class SafetyFilter:
    """Turns any command into one within the limits. `counts` holds interventions by cause."""

    def __init__(self, limits: Limits | None = None) -> None:
        limits = limits or Limits()
        low, high = map(np.asarray, limits.workspace)
        if not (low < high).all():
            raise ValueError(f"workspace {limits.workspace} has no inside")
        if min(limits.step_m, limits.step_rad, limits.lead_m, limits.stale_s) <= 0:
            raise ValueError(f"limits must be above 0: {limits}")
        self.limits = limits
        self.counts: Counter[str] = collections.Counter()
        self._gripper = limits.gripper[1]

    def __call__(
        self, action: np.ndarray, target: np.ndarray, tool: np.ndarray, age: float = 0.0
    ) -> Verdict:
        """Check `action` (7,) that is `age` s old; it moves the commanded `target` (3,), `tool` (3,) is measured."""
        wanted = np.asarray(action, np.float64).reshape(-1)
        causes: list[str] = []
        if wanted.shape != (7,) or not np.isfinite(wanted).all():
            return self._refuse("not_finite")
        if not np.isfinite(target).all() or not np.isfinite(tool).all():
            return self._refuse("pose_unknown")
        if not 0.0 <= age <= self.limits.stale_s:
            return self._refuse("stale")
        move = shorten(wanted[:3], self.limits.step_m)
        turn = shorten(wanted[3:6], self.limits.step_rad)
        if not np.array_equal(move, wanted[:3]):
            causes.append("step_m")
        if not np.array_equal(turn, wanted[3:6]):
            causes.append("step_rad")
        move = self._inside(move, np.asarray(target, float), np.asarray(tool, float), causes)
        low, high = self.limits.gripper
        gripper = min(max(wanted[6], low), high)
        if gripper != wanted[6]:
            causes.append("gripper")
        self._gripper = gripper
        self.counts.update(causes)
        return Verdict(np.array([*move, *turn, gripper], np.float32), causes, False)

    def stand(self) -> np.ndarray:
        """The command that changes nothing: no motion, the gripper as it is."""
        return np.array([0, 0, 0, 0, 0, 0, self._gripper], np.float32)

    def _refuse(self, cause: str) -> Verdict:
        self.counts[cause] += 1
        return Verdict(self.stand(), [cause], True)

    def _inside(
        self, move: np.ndarray, target: np.ndarray, tool: np.ndarray, causes: list[str]
    ) -> np.ndarray:
        low, high = map(np.asarray, self.limits.workspace)
        aim = tool + shorten(target + move - tool, self.limits.lead_m)
        if not np.allclose(aim, target + move, atol=1e-9):
            causes.append("lead_m")
        boxed = np.clip(aim, low, high)
        if not np.array_equal(boxed, aim):
            causes.append("workspace")
        # Outside already, the way back in is taken at the pace of any other step.
        move = shorten(boxed - target, self.limits.step_m)
        for box in self.limits.keep_out:
            if self._enters(box, target, move):
                causes.append("keep_out")
                return np.zeros(3)
        return move

    @staticmethod
    def _enters(box: Box, target: np.ndarray, move: np.ndarray) -> bool:
        low, high = map(np.asarray, box)
        if ((target > low) & (target < high)).all():
            return bool(
                move[2] < 0 or np.abs(move[:2]).max() > 0
            )  # inside already: straight up only
        points = target + np.linspace(0, 1, ALONG + 1)[1:, None] * move
        return bool(((points > low) & (points < high)).all(axis=1).any())


def shorten(vector: np.ndarray, limit: float) -> np.ndarray:
    """`vector` with its direction kept and its length at most `limit`."""
    # Scaled by the largest part first: the square of a huge number would overflow.
    largest = np.abs(vector).max()
    if largest == 0.0:
        return vector
    length = largest * np.linalg.norm(vector / largest)
    return vector if length <= limit else (vector / largest) * (limit * largest / length)
