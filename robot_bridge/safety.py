"""The safety filter: between everything that commands and the arm. Small enough to review in one sitting.

Two gates, and nothing reaches the arm by another way. `step` makes of an action, whoever chose it, the pose that
the arm may be asked for at the end of a control step. `tick` makes of a wanted pose the next set-point, at the
arm's own rate, whatever it is told: every limit on position, speed, acceleration and jerk is kept there once more.

A software filter is not a safety function: the arm's own limits and a hardware emergency stop are required.
"""

from __future__ import annotations

import collections
import copy
from typing import Counter, Deque, NamedTuple

import numpy as np

from robot_bridge.limits import Box, Limits
from robot_bridge.motion import DOWN, POSE, Smoother, exp, log, shorten, turned, window

FRAMES = ("base", "tool")
ROUNDING = 1e-9
ASKED = 1e-6  # m and rad: an action arrives in single precision


class Measured(NamedTuple):
    """What an arm says of itself."""

    time: float  # s, this PC's monotonic clock
    pose: np.ndarray  # (6,) measured, see robot_bridge.motion
    joints: np.ndarray  # (J,) rad
    width: float  # m between the fingers
    force: float = 0.0  # N at the tool
    fault: str = ""  # why it does not move: a reflex, a lost connection


class Verdict(NamedTuple):
    """What may be executed of an action."""

    action: np.ndarray  # (7,) float32, what the target moves by, and the gripper
    target: np.ndarray  # (6,) where the arm may be at the step's end
    causes: list[str]  # why it differs from what was asked for; empty: nothing was changed
    refused: bool  # the whole command was replaced by standing still


class SafetyFilter:
    """Keeps an arm within `limits`; `counts` holds interventions by cause.

    `rate_hz` set-points a second, `period_s` a control step; actions are deltas of the commanded pose in `frame`.
    """

    def __init__(
        self,
        limits: Limits,
        rate_hz: float,
        period_s: float,
        joint_range: np.ndarray | None = None,
        frame: str = "base",
    ) -> None:
        """`joint_range` (2, J) rad: the low and the high end of each joint."""
        if frame not in FRAMES:
            raise ValueError(f"frame is {frame!r}, not one of {FRAMES}")
        self.limits, self.frame = limits.checked(), frame
        self.tick_s = 1.0 / rate_hz
        self.counts: Counter[str] = collections.Counter()
        self._step_m = min(limits.step_m, limits.speed * period_s)
        self._step_rad = min(limits.step_rad, limits.turn_speed * period_s)
        self._low, self._high = (np.array(corner) for corner in limits.workspace)
        self._keep_out = [(np.array(low), np.array(high)) for low, high in limits.keep_out]
        self._joints = None
        if joint_range is not None:
            inward = np.array([[limits.joint_margin_rad], [-limits.joint_margin_rad]])
            self._joints = np.asarray(joint_range, float) + inward
        self._smoother = Smoother(
            np.zeros(POSE),
            max(
                window(limits.speed, limits.acceleration, self.tick_s),
                window(limits.turn_speed, limits.turn_acceleration, self.tick_s),
            ),
            max(
                window(limits.acceleration, limits.jerk, self.tick_s),
                window(limits.turn_acceleration, limits.turn_jerk, self.tick_s),
            ),
        )
        self.begin(np.zeros(POSE), 1.0)

    def begin(self, pose: np.ndarray, gripper: float) -> None:
        """The arm stands at `pose` (6,), its gripper open by `gripper` (0..1). Motion starts from there."""
        pose = np.asarray(pose, float)
        self.target, self.gripper = pose.copy(), float(gripper)
        self.setpoint = pose.copy()
        self._smoother.begin(pose)
        self._path: Deque[np.ndarray] = collections.deque(maxlen=round(2.0 / self.tick_s))
        self._back = 0.0  # m that are still to be gone back
        self._before: Measured | None = None  # in the tick before
        self._now: set[str] = set()

    # -- control steps ---------------------------------------------------------------------------------------

    def step(self, action: np.ndarray, measured: Measured, age: float = 0.0) -> Verdict:
        """Check `action` (7,) that was due `age` s ago: deltas of the commanded pose, and the gripper's opening."""
        wanted = np.asarray(action, np.float64).reshape(-1)
        if wanted.shape != (7,) or not np.isfinite(wanted).all():
            return self._refuse("not_finite")
        if not np.isfinite(measured.pose).all():
            return self._refuse("pose_unknown")
        if not 0.0 <= age <= self.limits.stale_s:
            return self._refuse("stale")
        causes: list[str] = []
        move, turn = shorten(wanted[:3], self._step_m), shorten(wanted[3:6], self._step_rad)
        if not np.allclose(move, wanted[:3], rtol=0.0, atol=ASKED):
            causes.append("step_m")
        if not np.allclose(turn, wanted[3:6], rtol=0.0, atol=ASKED):
            causes.append("step_rad")
        target = self._moved(move, turn)
        allowed = self._allowed(target, measured.pose, causes)
        gripper = min(max(wanted[6], 0.0), 1.0)
        if gripper != wanted[6]:
            causes.append("gripper")
        done = self._delta(self.target, allowed)
        self.target, self.gripper = allowed, gripper
        self.counts.update(causes)
        return Verdict(np.array([*done, gripper], np.float32), allowed.copy(), causes, False)

    def preview(self, actions: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
        """Where the tool (n, 3) would be after each of `actions` (n, 7), and what of them would be changed: {cause: steps}.

        From the present target and by an arm that follows; nothing is commanded, counted or changed.
        """
        trial = copy.copy(
            self
        )  # `step` replaces what it changes, so the copy's changes are its own
        trial.counts = collections.Counter()
        unknown = np.zeros(0)
        points = np.empty((len(actions), 3))
        for point, action in zip(points, actions):
            trial.step(action, Measured(0.0, trial.target, unknown, 0.0))
            point[:] = trial.target[:3]
        return points, dict(trial.counts)

    def _moved(self, move: np.ndarray, turn: np.ndarray) -> np.ndarray:
        """The commanded pose after an action's deltas in this filter's frame."""
        if self.frame == "tool":
            facing = exp(self.target[3:]) @ DOWN
            move, turn = facing @ move, facing @ turn
        return np.concatenate([self.target[:3] + move, turned(self.target[3:], turn)])

    def _delta(self, start: np.ndarray, target: np.ndarray) -> np.ndarray:
        """The action's six numbers that lead from the commanded pose `start` to `target`."""
        move = target[:3] - start[:3]
        turn = log(exp(target[3:]) @ exp(start[3:]).T)
        if self.frame == "tool":
            facing = exp(start[3:]) @ DOWN
            move, turn = facing.T @ move, facing.T @ turn
        return np.concatenate([move, turn])

    def _allowed(self, target: np.ndarray, pose: np.ndarray, causes: list[str]) -> np.ndarray:
        """The nearest to `target` that the limits on poses admit, no farther off than a step."""
        limits, place = self.limits, target[:3]
        led = pose[:3] + shorten(place - pose[:3], limits.lead_m)
        if not np.allclose(led, place, atol=ROUNDING):
            causes.append("lead_m")
        boxed = np.clip(led, self._low, self._high)
        if not np.array_equal(boxed, led):
            causes.append("workspace")
        # Outside already, the way back in is taken at the pace of any other step.
        boxed = self.target[:3] + shorten(boxed - self.target[:3], self._step_m)
        if any(_crosses(box, self.target[:3], boxed) for box in self._keep_out):
            causes.append("keep_out")
            boxed = self.target[:3]
        facing = shorten(target[3:], limits.tilt_rad)
        if not np.array_equal(facing, target[3:]):
            causes.append("tilt_rad")
        return np.concatenate([boxed, facing])

    def stand(self) -> np.ndarray:
        """The action (7,) that changes nothing: no motion, the gripper as it is."""
        return np.array([0, 0, 0, 0, 0, 0, self.gripper], np.float32)

    def _refuse(self, cause: str) -> Verdict:
        self.counts[cause] += 1
        return Verdict(self.stand(), self.target.copy(), [cause], True)

    # -- set-points ------------------------------------------------------------------------------------------

    def tick(self, wanted: np.ndarray | None, measured: Measured) -> np.ndarray:
        """The next set-point (6,), on the way to `wanted` (6,); None: come to rest."""
        causes: set[str] = set()
        last = self._smoother.last
        goal = self._backed_off(last, measured, causes)
        if goal is None:
            goal = last if wanted is None else np.asarray(wanted, float)
            if goal.shape != (POSE,) or not np.isfinite(goal).all():
                causes.add("not_finite")
                goal = last
            elif not np.isfinite(measured.pose).all():
                causes.add("pose_unknown")
                goal = last
            elif not _near(last, measured.pose, self.limits.lead_m + self._step_m):
                causes.add("lead_m")  # it does not follow, or the measurement is nonsense
                goal = last
            elif self._races(measured):
                causes.add("joint_speed")
                goal = last
            self._before = measured
            goal = self._paced(last, goal, causes)
            if not np.array_equal(goal, last):
                self._path.append(last)
        self.setpoint = self._smoother(goal)
        # Counted when it begins, not a hundred times a second.
        self.counts.update(causes - self._now)
        self._now = causes
        return self.setpoint

    def settle(self, start: np.ndarray) -> np.ndarray:
        """What was commanded is given up: the next action adds to where the set-points come to rest.

        Returns the six numbers of the action that led there from the commanded pose `start` (6,).
        """
        self.target = self._smoother.last
        return self._delta(start, self.target)

    @property
    def settling(self) -> int:
        """Ticks after which set-points rest when nothing is wanted."""
        return len(self._smoother.inputs) + 1

    @property
    def backing_off(self) -> bool:
        """The arm goes back along its own path: the target is to be taken from `setpoint` afterwards."""
        return self._back > 0.0

    def _paced(self, last: np.ndarray, goal: np.ndarray, causes: set[str]) -> np.ndarray:
        limits = self.limits
        boxed = np.clip(goal[:3], self._low, self._high)
        if not np.array_equal(boxed, goal[:3]):
            causes.add("workspace")
        place = last[:3] + shorten(boxed - last[:3], limits.speed * self.tick_s)
        turn = last[3:] + shorten(
            shorten(goal[3:], limits.tilt_rad) - last[3:], limits.turn_speed * self.tick_s
        )
        paced = np.concatenate([place, turn])
        low, high = self._smoother.hull(paced)
        for box in self._keep_out:
            if _touches(box, low[:3], high[:3]) and not _leaves(box, last[:3], place):
                causes.add("keep_out")
                return last
        return paced

    def _backed_off(
        self, last: np.ndarray, measured: Measured, causes: set[str]
    ) -> np.ndarray | None:
        """The next input on the way back, None where there is no reason to go back."""
        cause = self._too_much(measured)
        if cause:
            causes.add(cause)
            self._back = max(self._back, self.limits.backoff_m)
        if self._back <= 0.0:
            return None
        if not self._path:
            self._back = 0.0
            return last
        goal = self._path.pop()
        self._back -= float(np.linalg.norm(goal[:3] - last[:3])) + ROUNDING
        if self._back <= 0.0 or not self._path:
            self._back = 0.0
            self.target = goal.copy()
        return goal

    def _too_much(self, measured: Measured) -> str:
        """Which measured quantity says that the way forward is wrong; "" for none."""
        if not measured.force <= self.limits.force_n:
            return "force_n"
        if self._joints is None or not len(measured.joints):
            return ""
        low, high = self._joints
        if not ((measured.joints >= low) & (measured.joints <= high)).all():
            return "joint_margin_rad"
        return ""

    def _races(self, measured: Measured) -> bool:
        """A joint turns faster than it may, as near a singular pose."""
        before = self._before
        if before is None or len(before.joints) != len(measured.joints) or not len(before.joints):
            return False
        passed = max(self.tick_s, measured.time - before.time)  # a late tick is no fast joint
        return not np.abs(measured.joints - before.joints).max() <= self.limits.joint_speed * passed


def _near(one: np.ndarray, other: np.ndarray, limit: float) -> bool:
    """Whether two poses' positions are at most `limit` m apart in each direction."""
    return bool(np.abs(one[:3] - other[:3]).max() <= limit)


def _crosses(box: tuple[np.ndarray, np.ndarray], start: np.ndarray, end: np.ndarray) -> bool:
    """Whether the way from `start` to `end` touches the inside of `box`, unless it leads straight out of it."""
    low, high = box
    if _inside(box, start):
        return not _leaves(box, start, end)
    along = end - start
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second = (low - start) / along, (high - start) / along
    still = along == 0.0
    if (still & ((start <= low) | (start >= high))).any():
        return False
    enter = np.where(still, -np.inf, np.minimum(first, second)).max()
    leave = np.where(still, np.inf, np.maximum(first, second)).min()
    return bool(max(enter, 0.0) < min(leave, 1.0))


def _inside(box: tuple[np.ndarray, np.ndarray], point: np.ndarray) -> bool:
    return bool(((point > box[0]) & (point < box[1])).all())


def _touches(box: tuple[np.ndarray, np.ndarray], low: np.ndarray, high: np.ndarray) -> bool:
    return bool(((high > box[0]) & (low < box[1])).all())


def _leaves(box: tuple[np.ndarray, np.ndarray], start: np.ndarray, end: np.ndarray) -> bool:
    """Whether a move within `box` is straight up and out: the only way that is always free."""
    return bool(_inside(box, start) and end[2] >= start[2] and (end[:2] == start[:2]).all())


__all__ = ["Box", "Limits", "Measured", "SafetyFilter", "Verdict"]
