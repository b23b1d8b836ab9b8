"""The safety filter: whatever is commanded, what comes out is within the limits."""

import numpy as np
import pytest

from robot_bridge.safety import Limits, SafetyFilter, shorten

LIMITS = Limits(keep_out=(((0.5, -0.1, 0.0), (0.6, 0.1, 0.3)),))
LOW, HIGH = map(np.array, LIMITS.workspace)
EPSILON = 1e-6


def adversarial(rng):
    """Commands of every size, with infinities, denormals and NaN mixed in."""
    action = rng.normal(size=7) * 10.0 ** rng.uniform(-8, 300)
    special = [np.nan, np.inf, -np.inf, 1e308, -1e308, 5e-324, 0.0]
    for i in np.flatnonzero(rng.random(7) < 0.15):
        action[i] = special[rng.integers(len(special))]
    return action if rng.random() < 0.5 else rng.normal(size=7) * 0.03


def test_no_command_leaves_the_limits():
    """10,000 adversarial commands, one after the other, move a target that stays where it may be."""
    rng = np.random.default_rng(0)
    safety = SafetyFilter(LIMITS)
    target = np.array([0.4, 0.0, 0.2])
    low, high = map(np.array, LIMITS.keep_out[0])
    for _ in range(10_000):
        tool = target + rng.normal(size=3) * 0.01
        verdict = safety(adversarial(rng), target, tool, rng.uniform(0, 1.2))
        action = verdict.action.astype(float)
        assert np.isfinite(action).all()
        assert np.linalg.norm(action[:3]) <= LIMITS.step_m + EPSILON
        assert np.linalg.norm(action[3:6]) <= LIMITS.step_rad + EPSILON
        assert 0.0 <= action[6] <= 1.0
        target = target + action[:3]
        assert (target >= LOW - EPSILON).all() and (target <= HIGH + EPSILON).all()
        assert not ((target > low + EPSILON) & (target < high - EPSILON)).all()
    assert {"not_finite", "stale", "step_m", "step_rad", "workspace", "gripper"} <= set(
        safety.counts
    )
    assert safety.counts["keep_out"] > 0


def test_what_is_allowed_passes_unchanged():
    """The twins' own step limits are narrower than the filter's: it must not cripple a policy."""
    rng = np.random.default_rng(1)
    safety = SafetyFilter()
    for _ in range(1000):
        action = np.array(
            [*shorten(rng.normal(size=3), 0.03), *shorten(rng.normal(size=3), 0.2), 0.5]
        )
        verdict = safety(action, np.array([0.5, 0.0, 0.3]), np.array([0.48, 0.02, 0.3]))
        assert verdict.causes == [] and not verdict.refused
        np.testing.assert_allclose(verdict.action, action, atol=1e-7)
    assert not safety.counts


def test_refusal_stands_still_and_keeps_the_gripper():
    """A refused command changes nothing, also not what is held."""
    safety = SafetyFilter()
    where = np.array([0.5, 0.0, 0.3])
    safety(np.array([0, 0, 0, 0, 0, 0, 0.2]), where, where)
    for action, pose, age, cause in (
        (np.full(7, np.nan), where, 0.0, "not_finite"),
        (np.zeros(6), where, 0.0, "not_finite"),
        (np.zeros(7), where * np.nan, 0.0, "pose_unknown"),
        (np.zeros(7), where, 5.0, "stale"),
        (np.zeros(7), where, float("nan"), "stale"),
    ):
        verdict = safety(action, pose, pose, age)
        assert verdict.refused and verdict.causes == [cause]
        np.testing.assert_allclose(verdict.action, [0, 0, 0, 0, 0, 0, 0.2])


def test_the_table_is_kept_out():
    """A tool just above the table may not go lower, and comes back if it is below."""
    safety = SafetyFilter()
    low = safety.limits.workspace[0][2]
    where = np.array([0.5, 0.0, low + 0.01])
    down = safety(np.array([0, 0, -0.04, 0, 0, 0, 1]), where, where)
    assert where[2] + down.action[2] >= low - EPSILON and "workspace" in down.causes
    below = np.array([0.5, 0.0, low - 0.1])
    up = safety(np.zeros(7), below, below)
    assert 0 < up.action[2] <= safety.limits.step_m + EPSILON


def test_the_target_does_not_run_away_from_the_arm():
    """A blocked arm's target leads the measured pose by a bounded distance."""
    safety = SafetyFilter(Limits(lead_m=0.1))
    tool, target = np.array([0.4, 0.0, 0.2]), np.array([0.4, 0.0, 0.2])
    for _ in range(20):
        target = target + safety(np.array([0.03, 0, 0, 0, 0, 0, 1.0]), target, tool).action[:3]
        assert np.linalg.norm(target - tool) <= 0.1 + EPSILON
    assert safety.counts["lead_m"] > 0


@pytest.mark.parametrize(
    "limits",
    [
        Limits(workspace=((0, 0, 0), (1, 0, 1))),
        Limits(step_m=0.0),
        Limits(stale_s=-1.0),
    ],
)
def test_limits_that_cannot_be_meant_are_refused(limits):
    """Every limit is checked when the filter is made."""
    with pytest.raises(ValueError, match=r"limits|workspace"):
        SafetyFilter(limits)
