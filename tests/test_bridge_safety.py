"""The safety filter: whatever is commanded, what reaches the arm is within every limit at every tick."""

import numpy as np
import pytest

from robot_bridge.limits import Limits, make_limits
from robot_bridge.motion import DOWN, Smoother, exp, log, shorten, turned, window
from robot_bridge.safety import Measured, SafetyFilter
from twinrl.core.errors import ConfigError

RATE, PERIOD = 100.0, 0.1
PILLAR = ((0.5, -0.1, 0.0), (0.6, 0.1, 0.3))
LIMITS = Limits(keep_out=(*Limits().keep_out, PILLAR))
START = np.array([0.4, 0.0, 0.2, 0.0, 0.0, 0.3])
RANGE = np.array([[-2.8] * 7, [2.8] * 7])
EPSILON = 1e-6


def make(limits=LIMITS, **options):
    made = SafetyFilter(limits, RATE, PERIOD, RANGE, **options)
    made.begin(START, 1.0)
    return made


def seen(pose=START, joints=None, force=0.0):
    return Measured(
        0.0, np.asarray(pose, float), np.zeros(7) if joints is None else joints, 0.08, force
    )


def adversarial(rng, size):
    """Numbers of every size, with infinities, denormals and NaN mixed in; half of the time sensible ones."""
    numbers = rng.normal(size=size) * 10.0 ** rng.uniform(-8, 300)
    special = [np.nan, np.inf, -np.inf, 1e308, -1e308, 5e-324, 0.0]
    for i in np.flatnonzero(rng.random(size) < 0.15):
        numbers[i] = special[rng.integers(len(special))]
    return numbers if rng.random() < 0.5 else rng.normal(size=size) * 0.1 + 0.2


def check_path(poses, limits, places=True):
    """Set-points (T, 6) at RATE keep all limits on place, speed, acceleration and jerk."""
    path = np.array(poses)
    assert np.isfinite(path).all()
    for part, names in (
        (path[:, :3], ("speed", "acceleration", "jerk")),
        (path[:, 3:], ("turn_speed", "turn_acceleration", "turn_jerk")),
    ):
        for order, name in enumerate(names, 1):
            rate = np.diff(part, n=order, axis=0) * RATE**order
            fastest = np.linalg.norm(rate, axis=1).max(initial=0.0)
            assert fastest <= getattr(limits, name) * (1 + EPSILON), (name, fastest)
    assert np.linalg.norm(path[:, 3:], axis=1).max() <= limits.tilt_rad + EPSILON
    if places:
        low, high = map(np.array, limits.workspace)
        assert (path[:, :3] >= low - EPSILON).all() and (path[:, :3] <= high + EPSILON).all()
        for corners in limits.keep_out:
            low, high = map(np.array, corners)
            inside = ((path[:, :3] > low + EPSILON) & (path[:, :3] < high - EPSILON)).all(axis=1)
            assert not inside.any()


def follow(safety, actions, measure=lambda setpoint: setpoint):
    """Set-points (T, 6) of control steps, interpolated as the control loop does."""
    path = [safety.setpoint]
    ticks = round(PERIOD * RATE)
    for action in actions:
        start = safety.target
        verdict = safety.step(action, seen(measure(path[-1])))
        for k in range(1, ticks + 1):
            wanted = start + (verdict.target - start) * k / ticks
            path.append(safety.tick(wanted, seen(measure(path[-1]))))
    return path


def test_no_set_point_leaves_the_limits_whatever_is_wanted():
    """10,000 adversarial poses at the arm's rate, with poses, joints and forces that are nonsense as well."""
    rng, safety = np.random.default_rng(0), make()
    path = [safety.setpoint]
    wanted = None
    for _ in range(10_000):
        if rng.random() < 0.2:
            wanted = None if rng.random() < 0.1 else adversarial(rng, 6)
            if rng.random() < 0.5:
                wanted = np.array(
                    [*rng.uniform((0.1, -0.6, -0.1), (0.9, 0.6, 0.7)), *rng.normal(size=3)]
                )
        measured = seen(path[-1] + rng.normal(size=6) * 0.005)
        if rng.random() < 0.02:
            measured = seen(adversarial(rng, 6), adversarial(rng, 7), rng.normal() * 100)
        path.append(safety.tick(wanted, measured))
    check_path(path, LIMITS)
    travelled = np.linalg.norm(np.diff(np.array(path)[:, :3], axis=0), axis=1).sum()
    assert travelled > 3.0, "the filter must not win by standing still"
    expected = {
        "not_finite",
        "pose_unknown",
        "workspace",
        "keep_out",
        "force_n",
        "joint_margin_rad",
    }
    assert expected <= set(safety.counts), safety.counts


def test_no_action_leaves_the_limits():
    """10,000 adversarial actions through both gates."""
    rng, safety = np.random.default_rng(1), make()
    actions = [adversarial(rng, 7) for _ in range(2000)]
    wild = [
        np.array([*shorten(rng.normal(size=3), 0.03), *rng.normal(size=3) * 0.1, rng.normal()])
        for _ in range(8000)
    ]
    order = rng.permutation(10_000)
    path = follow(safety, [(actions + wild)[i] for i in order])
    check_path(path, LIMITS)
    assert np.linalg.norm(np.diff(np.array(path)[:, :3], axis=0), axis=1).sum() > 20.0
    assert {"not_finite", "step_m", "step_rad", "workspace", "keep_out", "gripper"} <= set(
        safety.counts
    )


def test_what_is_allowed_passes_unchanged_and_arrives():
    """Slow steps in free space: every action is executed as asked, and set-points end where they add up to."""
    safety = make(Limits())
    action = np.array([0.01, 0.004, 0.008, 0.0, 0.0, 0.05, 0.5])
    path = follow(safety, [action] * 10 + [np.array([0, 0, 0, 0, 0, 0, 0.5])] * 3)
    assert not safety.counts
    np.testing.assert_allclose(path[-1][:3], START[:3] + 10 * action[:3], atol=1e-9)
    np.testing.assert_allclose(path[-1][3:], [0, 0, 0.8], atol=1e-9)
    check_path(path, LIMITS)


def test_the_executed_action_is_what_the_target_moved_by():
    """Also where it was shortened, in both frames."""
    rng = np.random.default_rng(2)
    for frame in ("base", "tool"):
        safety = make(frame=frame)
        for _ in range(300):
            before = safety.target.copy()
            verdict = safety.step(rng.normal(size=7) * 0.05, seen(before))
            move, turn = verdict.action[:3].astype(float), verdict.action[3:6].astype(float)
            facing = exp(before[3:]) @ DOWN
            if frame == "tool":
                move, turn = facing @ move, facing @ turn
            np.testing.assert_allclose(before[:3] + move, verdict.target[:3], atol=1e-7)
            np.testing.assert_allclose(turned(before[3:], turn), verdict.target[3:], atol=1e-6)


def test_refusal_stands_still_and_keeps_the_gripper():
    """A refused command changes nothing, also not what is held."""
    safety = make()
    safety.step(np.array([0, 0, 0, 0, 0, 0, 0.2]), seen())
    for action, pose, age, cause in (
        (np.full(7, np.nan), START, 0.0, "not_finite"),
        (np.zeros(6), START, 0.0, "not_finite"),
        (np.zeros(7), START * np.nan, 0.0, "pose_unknown"),
        (np.zeros(7), START, 5.0, "stale"),
        (np.zeros(7), START, float("nan"), "stale"),
    ):
        verdict = safety.step(action, seen(pose), age)
        assert verdict.refused and verdict.causes == [cause]
        np.testing.assert_allclose(verdict.action, [0, 0, 0, 0, 0, 0, 0.2])
        np.testing.assert_array_equal(verdict.target, START)


def test_too_much_force_makes_it_go_back_the_way_it_came():
    """It leaves the contact, its target goes with it, and it goes on when the force is gone."""
    safety = make()
    forward = np.array([0.0, 0.02, 0.0, 0, 0, 0, 1.0])
    path = follow(safety, [forward] * 5)
    touched = path[-1].copy()
    for _ in range(40):
        path.append(
            safety.tick(safety.target, seen(path[-1], force=30.0 if len(path) < 56 else 0.0))
        )
    assert touched[1] - path[-1][1] > 0.9 * LIMITS.backoff_m - 0.01
    assert np.linalg.norm(path[-1] - safety.target) < 1e-3
    assert safety.counts["force_n"] == 1
    path += follow(safety, [forward] * 3)[1:]
    assert path[-1][1] > safety.target[1] - 0.02
    check_path(path, LIMITS)


def test_a_joint_at_its_end_is_no_way_on():
    """Beyond the margin it goes back; with no way back known it stands."""
    safety = make()
    beyond = np.array([0, 0, 0, 0, 0, 2.75, 0.0])
    path = [safety.tick([*START, 0.1, 0, 0, 0, 0, 0], seen(joints=beyond)) for _ in range(30)]
    np.testing.assert_allclose(path, [START] * 30, atol=1e-12)
    assert safety.counts["joint_margin_rad"] == 1


def test_nothing_wanted_comes_to_rest_within_a_tenth_of_a_second():
    """As fast as acceleration and jerk admit, and without overshoot of what was allowed."""
    safety = make(Limits())
    path = follow(safety, [np.array([0.025, 0, 0, 0, 0, 0, 1.0])] * 5)
    safety.settle(safety.target)
    limit = safety.target[0]
    rest = [safety.tick(None, seen(path[-1])) for _ in range(30)]
    moving = [k for k in range(29) if not np.array_equal(rest[k], rest[k + 1])]
    assert max(moving) * 10 <= 150, "ms"
    assert max(p[0] for p in rest) <= limit + EPSILON
    check_path(path + rest, Limits())


def test_a_far_lead_waits_for_the_arm():
    """An arm that does not follow is not pushed on from farther and farther away."""
    safety = make()
    path = follow(safety, [np.array([0.0, 0.025, 0, 0, 0, 0, 1.0])] * 20, measure=lambda _: START)
    assert path[-1][1] - START[1] <= LIMITS.lead_m + LIMITS.step_m + EPSILON
    assert safety.counts["lead_m"] > 0


def test_the_smoother_keeps_to_its_inputs_hull_and_bounds():
    """Means of a random walk of speed 1: acceleration and jerk within the windows' bounds, no overshoot."""
    rng, dt = np.random.default_rng(4), 0.01
    first, second = window(1.0, 20.0, dt), window(20.0, 1000.0, dt)
    smoother = Smoother(np.zeros(6), first, second)
    point, inputs, outputs = np.zeros(6), [], []
    for _ in range(3000):
        point = point + shorten(rng.choice([-1.0, 1.0]) * np.eye(6)[0], 1.0) * dt
        inputs.append(point.copy())
        low, high = smoother.hull(point)
        outputs.append(smoother(point))
        assert (outputs[-1] >= low - 1e-12).all() and (outputs[-1] <= high + 1e-12).all()
    path = np.array(outputs)[:, 0]
    assert np.abs(np.diff(path, 2)).max() / dt**2 <= 20.0 + EPSILON
    assert np.abs(np.diff(path, 3)).max() / dt**3 <= 1000.0 + EPSILON
    for _ in range(first + second):
        last = smoother(point)
    np.testing.assert_allclose(last, point)


def test_rotations_are_those_of_the_twins():
    """The same exponential and logarithm, down to half a turn."""
    from twins import rotation

    rng = np.random.default_rng(5)
    for _ in range(500):
        vector = shorten(rng.normal(size=3) * 3, 3.1)
        np.testing.assert_allclose(exp(vector), rotation.exp(vector), atol=1e-12)
        np.testing.assert_allclose(log(exp(vector)), vector, atol=1e-7)
    np.testing.assert_allclose(np.abs(log(np.diag([1.0, -1.0, -1.0]))), [np.pi, 0, 0], atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"speeed": 1.0}, "did you mean 'speed'"),
        ({"speed": 0.0}, "above 0"),
        ({"speed": "fast"}, "must be a number"),
        ({"workspace": [0, 0, 0, 1, 1]}, "six numbers"),
        ({"workspace": [0, 0, 1, 1, 1, 0]}, "no inside"),
        ({"keep_out": [[0, -1, -1, 1, 1, 1]]}, "leaves nothing"),
        ({"tilt_rad": 3.1}, "no one way back"),
    ],
)
def test_limits_that_make_no_sense_are_refused(settings, text):
    """By name, with what would be right."""
    with pytest.raises(ConfigError, match=text):
        make_limits(settings)


def test_limits_that_differ_are_told():
    """Settable, and none silently."""
    limits = make_limits(
        {"speed": 0.1}, {"speed": 0.2, "workspace": [0.3, -0.2, 0.01, 0.6, 0.2, 0.4]}
    )
    assert limits.unusual() == {"speed": 0.2, "workspace": ((0.3, -0.2, 0.01), (0.6, 0.2, 0.4))}
    assert Limits().unusual() == {}
