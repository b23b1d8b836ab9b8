"""The arm's kinematics against an independent computation and against MuJoCo."""

import mujoco
import numpy as np
import pytest

from twins import kinematics, rotation, scene
from twins.tasks.pick_and_place import PickAndPlace


def _dh_tool(joints):
    """The tool's pose from homogeneous matrices, written apart from the code under test."""
    # theta offsets are none; a, alpha, d as in Franka's documentation
    table = [
        (0, 0, 0.333),
        (0, -90, 0),
        (0, 90, 0.316),
        (0.0825, 90, 0),
        (-0.0825, -90, 0.384),
        (0, 90, 0),
        (0.088, 90, 0),
    ]
    pose = np.eye(4)
    for (a, alpha, d), theta in zip(table, joints, strict=True):
        ca, sa = np.cos(np.radians(alpha)), np.sin(np.radians(alpha))
        ct, st = np.cos(theta), np.sin(theta)
        pose = pose @ np.array(
            [
                [ct, -st, 0, a],
                [st * ca, ct * ca, -sa, -d * sa],
                [st * sa, ct * sa, ca, d * ca],
                [0, 0, 0, 1],
            ]
        )
    c = np.sqrt(0.5)
    flange = np.array([[c, c, 0, 0], [-c, c, 0, 0], [0, 0, 1, 0.107 + 0.1034], [0, 0, 0, 1]])
    return pose @ flange


@pytest.fixture(scope="module")
def joints():
    rng = np.random.default_rng(0)
    return rng.uniform(*kinematics.LIMITS.T, size=(50, 7))


def test_forward_kinematics_equals_denavit_hartenberg(joints):
    position, turn = kinematics.forward(joints)
    expected = np.array([_dh_tool(q) for q in joints])
    np.testing.assert_allclose(position, expected[:, :3, 3], atol=1e-12)
    np.testing.assert_allclose(turn, expected[:, :3, :3], atol=1e-12)


def test_simulated_arm_has_the_same_kinematics_and_limits(joints):
    model = scene.build_scene(PickAndPlace()).compile()
    data = mujoco.MjData(model)
    position, turn = kinematics.forward(joints)
    for q, p, r in zip(joints, position, turn, strict=True):
        data.qpos[:7] = q
        mujoco.mj_kinematics(model, data)
        np.testing.assert_allclose(data.site("tcp").xpos, p, atol=1e-12)
        np.testing.assert_allclose(data.site("tcp").xmat.reshape(3, 3), r, atol=1e-12)
    np.testing.assert_allclose(model.jnt_range[:7], kinematics.LIMITS)
    assert model.opt.timestep == 0.002


def test_home_points_the_hand_straight_down():
    position, turn = kinematics.forward(kinematics.HOME[None])
    np.testing.assert_allclose(position[0], [0.45, 0, 0.24], atol=1e-4)
    np.testing.assert_allclose(turn[0], kinematics.DOWN, atol=1e-4)


def test_inverse_kinematics_reaches_reachable_poses_within_limits():
    rng = np.random.default_rng(1)
    count = 200
    position = rng.uniform([0.35, -0.3, 0.02], [0.68, 0.3, 0.35], size=(count, 3))
    turn = rotation.about_z(rng.uniform(-0.9, 0.9, count)) @ kinematics.DOWN
    start = np.tile(kinematics.HOME, (count, 1))
    joints = kinematics.solve(start, position, turn, iterations=40)
    reached, held = kinematics.forward(joints)
    assert np.linalg.norm(reached - position, axis=1).max() < 2e-3
    assert np.linalg.norm(rotation.log(held @ turn.swapaxes(1, 2)), axis=1).max() < 0.01
    assert (joints >= kinematics.LIMITS[:, 0]).all() and (joints <= kinematics.LIMITS[:, 1]).all()


def test_inverse_kinematics_treats_every_environment_alone():
    position = np.array([[0.5, 0.1, 0.1], [0.4, -0.2, 0.2]])
    turn = np.stack([kinematics.DOWN] * 2)
    start = np.tile(kinematics.HOME, (2, 1))
    both = kinematics.solve(start, position, turn)
    alone = [kinematics.solve(start[i : i + 1], position[i : i + 1], turn[:1])[0] for i in (0, 1)]
    np.testing.assert_array_equal(both, alone)


def test_rotation_vectors_survive_the_round_trip_up_to_half_a_turn():
    rng = np.random.default_rng(2)
    axis = rng.normal(size=(100, 3))
    axis /= np.linalg.norm(axis, axis=1, keepdims=True)
    for angle in (0.0, 1e-7, 1e-3, 1.0, np.pi - 1e-4):
        np.testing.assert_allclose(
            rotation.log(rotation.exp(axis * angle)), axis * angle, atol=1e-9
        )
    quat = rotation.quaternion(axis)
    np.testing.assert_allclose(rotation.matrix(quat), rotation.exp(axis), atol=1e-12)


def test_half_turns_fold_to_the_smallest_grasp_angle():
    angle = np.array([0.3, 0.3 + np.pi, 0.3 - np.pi, 1.8])
    np.testing.assert_allclose(rotation.wrap_half_turn(angle), [0.3, 0.3, 0.3, 1.8 - np.pi])
