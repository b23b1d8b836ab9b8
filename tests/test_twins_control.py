"""The control law's kernels against the same law in NumPy, written out here step by step."""

import itertools

import numpy as np
import pytest
import torch

from robot_bridge.motion import Smoother, between
from twinrl.core.gripper import TOGGLED, Gripper, GripperKind
from twinrl.core.interpolation import SMOOTHING, TICKS, weights
from twins import control, kernels, kinematics, make_env, rotation, scene
from twins.kinematics import BOX, MAX_SHIFT, MAX_TURN, REACH, REACH_TURN

COUNT = 24
EVERYONE = np.arange(COUNT)


class Reference:
    """What a controller does, for all environments, in float64."""

    def __init__(self, joints, latency):
        self.joints, self.latency = joints, latency
        self.goals = [joints] * 3
        self.target, self.turn = kinematics.forward(joints)
        self.queue = [(self.target, self.turn, np.ones(len(joints)))] * control.PENDING

    def command(self, actions, measured, disturbance):
        executed = np.concatenate(
            [
                rotation.clip_norm(actions[:, :3], MAX_SHIFT),
                rotation.clip_norm(actions[:, 3:6], MAX_TURN),
                actions[:, 6:].clip(0, 1),
            ],
            axis=1,
        )
        moved = executed[:, :6] + disturbance
        tip, tool = kinematics.forward(measured)
        target = tip + rotation.clip_norm(self.target + moved[:, :3] - tip, REACH)
        self.target = target.clip(*BOX)
        lead = rotation.log(rotation.exp(moved[:, 3:]) @ self.turn @ tool.swapaxes(1, 2))
        self.turn = rotation.exp(rotation.clip_norm(lead, REACH_TURN)) @ tool
        self.queue = [(self.target, self.turn, executed[:, 6]), *self.queue[:-1]]
        target, turn, opening = (
            np.stack([self.queue[late][part][i] for i, late in enumerate(self.latency)])
            for part in range(3)
        )
        self.joints = kinematics.solve(self.joints, target, turn)
        self.goals = [self.joints, *self.goals[:2]]
        path = np.einsum("km,mnj->nkj", weights(), np.array(self.goals))
        return executed, path, opening


def start(seed=0):
    rng = np.random.default_rng(seed)
    joints = kinematics.HOME + 0.15 * rng.normal(size=(COUNT, 7))
    return rng, joints, np.arange(COUNT) % control.PENDING


def test_every_step_is_that_of_the_law_in_numpy():
    """Big and small actions, late commands, disturbed, with an arm that trails and one that is far astray."""
    rng, measured, latency = start()
    controller, reference = control.Controller(COUNT), Reference(measured, latency)
    controller.begin(EVERYONE, measured, latency)
    for k in range(40):
        scale = rng.choice([0.005, 0.05, 0.4], size=(COUNT, 1))
        actions = rng.normal(size=(COUNT, 7)) * scale + [0, 0, 0, 0, 0, 0, 0.5]
        disturbance = rng.normal(size=(COUNT, 6)) * 0.01 * (k % 2)
        wanted = reference.command(actions, measured, disturbance)
        found = controller.command(EVERYONE, actions, measured, disturbance)
        for name, a, b in zip(("executed", "path", "opening"), found, wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5, err_msg=f"{name} of step {k}")
        np.testing.assert_allclose(controller.target.numpy(), reference.target, atol=2e-6)
        np.testing.assert_allclose(controller.turn.numpy(), reference.turn, atol=2e-6)
        reference.joints = controller.joints.numpy()[:, 0].astype(float)
        reference.goals[0] = reference.joints
        measured = measured + 0.6 * (reference.joints - measured)
    np.testing.assert_allclose(controller.actions.numpy()[:, 0], wanted[0], atol=1e-6)


def test_the_state_is_what_was_measured_and_commanded():
    rng, joints, latency = start(1)
    controller = control.Controller(COUNT)
    controller.begin(EVERYONE, joints, latency)
    actions = rng.normal(size=(2, COUNT, 7)) * 0.02
    first, second = (controller.command(EVERYONE, a, joints)[0].copy() for a in actions)
    tcp, turn = kinematics.forward(joints + 0.05)
    width, noise = rng.uniform(0, 0.08, COUNT), rng.normal(size=(COUNT, 6)) * 0.01
    state = controller.observe(EVERYONE, tcp, turn, width, noise)
    target, facing = controller.target.numpy(), controller.turn.numpy()
    wanted = [
        tcp + noise[:, :3],
        rotation.log(turn @ kinematics.DOWN) + noise[:, 3:],
        width[:, None],
        target - tcp,
        rotation.log(facing @ turn.swapaxes(1, 2)),
        second,
        first,
    ]
    assert state.shape == (COUNT, kernels.STATE_DIM)
    np.testing.assert_allclose(state, np.concatenate(wanted, axis=1), atol=3e-6)


def test_an_environment_is_the_same_alone_and_among_others_bit_for_bit():
    rng, joints, latency = start(2)
    together, some = control.Controller(COUNT), control.Controller(COUNT)
    chosen = np.array([1, 5, 22])
    actions = rng.normal(size=(3, COUNT, 7)) * 0.05
    together.begin(EVERYONE, joints, latency)
    some.begin(chosen, joints[chosen], latency[chosen])
    for a in actions:
        whole = together.command(EVERYONE, a, joints)
        part = some.command(chosen, a[chosen], joints[chosen])
        for x, y in zip(whole, part, strict=True):
            np.testing.assert_array_equal(x[chosen], y)
    assert (np.delete(some.target.numpy(), chosen, axis=0) == 0).all()
    assert len(some.command(chosen[:0], a[:0], joints[:0])[1]) == 0


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_mask_over_all_does_what_ids_do_and_leaves_the_others(kind):
    rng, joints, latency = start(3)
    by_ids, by_mask = control.Controller(COUNT), control.Controller(COUNT)
    mask = rng.uniform(size=COUNT) < 0.5
    ids = np.flatnonzero(mask)

    def given(array, dtype=np.float32):
        array = np.ascontiguousarray(array, dtype)
        return torch.from_numpy(array) if kind == "torch" else array

    by_ids.begin(ids, joints[ids], latency[ids])
    by_mask.begin_all(given(joints), given(latency, np.int32), given(mask, bool))
    for _ in range(3):
        actions, noise = rng.normal(size=(COUNT, 7)) * 0.05, rng.normal(size=(COUNT, 6)) * 0.003
        some = by_ids.command(ids, actions[ids], joints[ids], noise[ids])
        everyone = by_mask.command_all(
            given(actions), given(joints), given(mask, bool), given(noise)
        )
        for a, b in zip(some, everyone, strict=True):
            np.testing.assert_array_equal(a, b.numpy()[ids])
            assert (b.numpy()[~mask] == 0).all()
    for name in ("target", "turn", "joints", "actions"):
        np.testing.assert_array_equal(
            getattr(by_ids, name).numpy(), getattr(by_mask, name).numpy(), name
        )
    tcp, turn = kinematics.forward(joints)
    width = np.full(COUNT, 0.03)
    some = by_ids.observe(ids, tcp[ids], turn[ids], width[ids])
    everyone = by_mask.observe_all(given(tcp), given(turn), given(width), given(mask, bool))
    np.testing.assert_array_equal(some, everyone.numpy()[ids])


def test_the_commanded_pose_stays_in_its_box_and_near_the_arm():
    rng, joints, latency = start(4)
    box = np.array([(0.3, -0.1, 0.05), (0.6, 0.1, 0.3)])
    controller = control.Controller(COUNT, box=box)
    controller.begin(EVERYONE, joints, latency)
    tip, tool = kinematics.forward(joints)
    push = rng.normal(size=(COUNT, 7))
    for _ in range(20):
        controller.command(EVERYONE, push, joints)
    target, turn = controller.target.numpy(), controller.turn.numpy()
    assert (target >= box[0] - 1e-6).all() and (target <= box[1] + 1e-6).all()
    inside = tip.clip(*box)
    assert np.linalg.norm(target - inside, axis=1).max() < REACH + 1e-5
    lead = np.linalg.norm(rotation.log(turn @ tool.swapaxes(1, 2)), axis=1)
    assert lead.max() < REACH_TURN + 1e-5 and lead.min() > 0.5 * REACH_TURN


def test_orientations_stay_rotations_over_a_long_episode():
    rng, joints, latency = start(5)
    controller = control.Controller(COUNT)
    controller.begin(EVERYONE, joints, latency)
    for _ in range(2000):
        joints = controller.command(EVERYONE, rng.normal(size=(COUNT, 7)), joints)[1][:, -1].copy()
    turn = controller.turn.numpy().astype(float)
    eye = np.broadcast_to(np.eye(3), turn.shape)
    np.testing.assert_allclose(turn @ turn.swapaxes(1, 2), eye, atol=5e-6)


def test_tool_poses_are_those_of_the_kinematics():
    rng = np.random.default_rng(6)
    joints = rng.uniform(*kinematics.LIMITS.T, size=(200, 7)).astype(np.float32)
    tcp, turn = np.zeros((200, 3), np.float32), np.zeros((200, 3, 3), np.float32)
    control.forward(joints, tcp, turn)
    wanted = kinematics.forward(joints.astype(float))
    np.testing.assert_allclose(tcp, wanted[0], atol=2e-6)
    np.testing.assert_allclose(turn, wanted[1], atol=2e-6)


def test_noise_is_a_function_of_seed_step_and_stream():
    count = 4000
    seed, step = np.arange(count, dtype=np.int32), np.zeros(count, np.int32)
    spread = np.full(count, 0.002, np.float32)
    spread[0] = 0.0

    def drawn(seed, step, spread, stream=0):
        out = np.full((len(seed), 6), np.nan, np.float32)
        control.noise(seed, step, spread, stream, out)
        return out

    first = drawn(seed, step, spread)
    assert (first[0] == 0).all()
    scale = 0.002 * np.array([1, 1, 1, 6, 6, 6])
    np.testing.assert_allclose(first.std(axis=0) / scale, 1, atol=0.05)
    np.testing.assert_allclose(first.mean(axis=0) / scale, 0, atol=0.06)
    others = (
        drawn(seed, step + 1, spread),
        drawn(seed, step, spread, 1),
        drawn(seed + 1, step, spread),
    )
    for other in others:
        correlation = np.corrcoef(np.c_[first, other].T)[:6, 6:]
        assert abs(correlation).max() < 0.08
    part = drawn(seed[7:9], step[7:9], spread[7:9])
    np.testing.assert_array_equal(part, first[7:9])


def test_ids_are_for_the_cpu_and_rows_must_fit():
    controller = control.Controller(2)
    with pytest.raises(ValueError, match="broadcast"):
        controller.command(np.arange(2), np.zeros((3, 7)), np.zeros((2, 7)))


def test_set_points_are_those_of_an_arms_control_loop():
    """The weighted sum of the last targets is what straight lines through two moving averages give, tick by tick."""
    rng = np.random.default_rng(7)
    targets = np.cumsum(rng.normal(size=(12, 6)) * 0.02, axis=0)
    smoother = Smoother(targets[0], *SMOOTHING)
    last = [targets[0]] * 3
    for start, goal in itertools.pairwise(targets):
        last = [goal, *last[:2]]
        wanted = np.array([smoother(between(start, goal, k / TICKS)) for k in range(1, TICKS + 1)])
        np.testing.assert_allclose(weights() @ np.array(last), wanted, atol=1e-12)
    np.testing.assert_allclose(weights().sum(axis=1), 1.0)
    with pytest.raises(ValueError, match="beyond one step"):
        weights(4, (5, 4))


@pytest.mark.parametrize(
    "kind",
    [
        control.FREE,
        GripperKind("continuous", step=0.1),
        GripperKind("binary", busy_s=0.6),
        GripperKind("binary", 0.2, 0.7, 0.25),
        GripperKind("continuous", busy_s=0.3, step=0.05),
    ],
)
def test_the_gripper_is_told_what_an_arms_driver_would_tell_it(kind):
    """The same openings wanted, the same commands at the same time, of every kind and timing."""
    rng, joints, latency = start(5)
    controller = control.Controller(COUNT, gripper=kind)
    controller.begin(EVERYONE, joints, 0 * latency)
    arms = [Gripper(kind) for _ in EVERYONE]
    actions = np.zeros((COUNT, 7))
    toggles = 0
    for k in range(60):
        # In places it stays as it was: what was refused while busy counts later.
        fresh = np.where(
            rng.uniform(size=COUNT) < 0.4, rng.uniform(-0.1, 1.1, COUNT), actions[:, 6]
        )
        actions[:, 6] = np.where(rng.uniform(size=COUNT) < 0.2, np.round(fresh), fresh)
        before = np.array([arm.commanded for arm in arms])
        for arm, wanted in zip(arms, actions[:, 6], strict=True):
            arm(float(np.float32(wanted)), k / scene.CONTROL_HZ + 1e-9 * k)
        told = np.array([arm.commanded for arm in arms])
        executed, _, opening = controller.command(EVERYONE, actions, joints)
        np.testing.assert_allclose(executed[:, 6], told, atol=1e-6, err_msg=f"step {k}")
        np.testing.assert_array_equal(executed[:, 6], opening)
        np.testing.assert_array_equal(controller.toggled(EVERYONE), np.abs(told - before) > TOGGLED)
        toggles += controller.toggled(EVERYONE).sum()
    assert toggles > COUNT


@pytest.mark.parametrize("weight", [-0.25, 0.0])
def test_opening_and_closing_costs_what_the_toggle_term_says(weight):
    env = make_env(
        num_envs=2,
        observe="state",
        reward={"toggle": weight},
        gripper={"kind": "binary", "busy_s": 0.3},
    )
    env.reset(seed=3)
    actions = np.zeros((2, 8, 7), np.float32)
    actions[0, :, 6] = [
        1.0,
        0.5,
        0.0,
        1.0,
        1.0,
        1.0,
        0.45,
        0.3,
    ]  # closes, cannot open for 0.3 s, opens, cannot close
    actions[1, :, 6] = 1.0
    found = env.step_chunk(actions)
    np.testing.assert_array_equal(found.action[0, :, 6], [1, 1, 0, 0, 0, 1, 1, 1])
    np.testing.assert_allclose(found.reward[0], weight * np.array([0, 0, 1, 0, 0, 1, 0, 0]))
    assert not found.reward[1].any()
