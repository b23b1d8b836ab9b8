"""Scenes as files: what a simulator reads there is what MuJoCo has."""

import json

import mujoco
import numpy as np
import pytest

from twins import kinematics, scene
from twins.backends.geometry import Chain, Solid, compose, matrix, quaternion, touching, turned
from twins.backends.lockstep import scene_bodies
from twins.export import export, main
from twins.export_urdf import arm_urdf, body_urdf, roll_pitch_yaw
from twins.scene_description import describe_scene
from twins.tasks import TASKS, make_task

JOINTS = [*(f"joint{i + 1}" for i in range(7)), "finger_left", "finger_right"]


@pytest.fixture(scope="module", params=sorted(TASKS))
def task(request):
    return make_task(request.param)


@pytest.fixture(scope="module")
def description(task):
    return describe_scene(task)


@pytest.fixture(scope="module")
def model(task):
    return scene.build_scene(task).compile()


@pytest.fixture(scope="module")
def arm(description):
    return mujoco.MjModel.from_xml_string(_with(arm_urdf(description["arm"])))


def _with(urdf):
    """A URDF that MuJoCo reads as it stands: no links merged, nothing balanced or discarded."""
    options = '<mujoco><compiler fusestatic="false" discardvisual="false" balanceinertia="false"/></mujoco>'
    return urdf.replace("</robot>", options + "</robot>")


def _postures(count=40):
    low, high = kinematics.LIMITS.T
    return np.random.default_rng(5).uniform(low, high, (count, 7))


def test_description_is_json(description):
    assert json.loads(json.dumps(description)) == description


def test_chain_agrees_with_the_kinematics(description):
    chain, joints = Chain(description["arm"]), _postures()
    assert chain.joints == JOINTS
    position, turn = chain.tool(chain.frames(np.c_[joints, np.full((len(joints), 2), 0.02)]))
    expected, expected_turn = kinematics.forward(joints)
    assert np.abs(position - expected).max() < 1e-9
    assert np.abs(turn - expected_turn).max() < 1e-9


def test_urdf_of_the_arm_agrees_with_the_kinematics(description, arm):
    data, tool = mujoco.MjData(arm), description["arm"]["tool"]
    assert [arm.joint(i).name for i in range(arm.njnt)] == JOINTS
    for joints in _postures():
        data.qpos[:7] = joints
        mujoco.mj_kinematics(arm, data)
        hand = data.body("hand").xpos, data.body("hand").xmat.reshape(3, 3)
        position, turn = compose(hand, (np.array(tool["position"]), np.eye(3)))
        expected, expected_turn = kinematics.forward(joints[None])
        assert np.abs(position - expected[0]).max() < 1e-9
        assert np.abs(turn - expected_turn[0]).max() < 1e-9


def test_urdf_of_the_arm_has_the_scene_s_masses_limits_and_shapes(arm, model):
    for name in ("link1", "link4", "link7", "hand", "finger_left", "finger_right"):
        ours, theirs = model.body(name), arm.body(name)
        assert theirs.mass == pytest.approx(ours.mass, rel=1e-12)
        assert np.abs(_inertia(theirs) - _inertia(ours)).max() < 1e-9
        assert theirs.ipos == pytest.approx(ours.ipos, abs=1e-12)
    for name in JOINTS:
        assert arm.joint(name).range == pytest.approx(model.joint(name).range, rel=1e-12)
        limit = model.actuator(name).forcerange[1]
        assert arm.jnt_actfrcrange[arm.joint(name).id, 1] == pytest.approx(limit)
    assert _sizes(arm, "finger_left") == _sizes(model, "finger_left")
    assert _sizes(arm, "link4") == _sizes(model, "link4")


def _inertia(body):
    axes = matrix(body.iquat)
    return axes @ np.diag(body.inertia) @ axes.T


def _sizes(model, body):
    geoms = np.flatnonzero(model.geom_bodyid == model.body(body).id)
    return sorted({tuple(np.round(model.geom_size[g], 9)) for g in geoms})


def test_urdf_of_things_has_the_scene_s_masses_and_shapes(description, model):
    for body in scene_bodies(description):
        if body.mass:
            text = _with(body_urdf(body)).replace("</robot>", _sliding(body.name))
            found = mujoco.MjModel.from_xml_string(text)
            ours, theirs = model.body(body.name), found.body(body.name)
            assert theirs.mass == pytest.approx(ours.mass, rel=1e-12)
            assert np.abs(_inertia(theirs) - _inertia(ours)).max() < 1e-12
            assert theirs.ipos == pytest.approx(ours.ipos, abs=1e-12)
            assert _sizes(found, body.name) == _sizes(model, body.name)


def _sliding(name):
    """A joint, without which MuJoCo takes a body for a part of the world."""
    return (
        '<link name="rail"/><joint name="slide" type="prismatic"><axis xyz="1 0 0"/>'
        f'<parent link="rail"/><child link="{name}"/>'
        '<limit lower="-1" upper="1" effort="1" velocity="1"/></joint></robot>'
    )


def test_every_shape_is_written_once(task, description):
    written = [s["name"] for body in scene_bodies(description) for s in body.shapes]
    expected = [shape.name for thing in task.things for shape in thing.shapes]
    assert sorted(written) == sorted([*expected, "table", "floor"])


def test_mjcf_is_the_scene(task, model, tmp_path):
    paths = {path.name: path for path in export(task, tmp_path)}
    read = mujoco.MjModel.from_xml_path(str(paths["scene.xml"]))
    for field in ("nq", "nv", "nu", "ngeom", "ncam", "nsensor"):
        assert getattr(read, field) == getattr(model, field)
    for field in ("body_mass", "geom_size", "geom_pos", "jnt_range", "actuator_gainprm"):
        # MuJoCo writes six digits.
        assert getattr(read, field) == pytest.approx(getattr(model, field), rel=1e-5, abs=1e-6)
    assert read.opt.timestep == model.opt.timestep


def test_without_capsules_the_urdf_is_standard_and_as_large(description):
    body = next(b for b in scene_bodies(description) if b.role == "free")
    plain = body_urdf(body, capsules=False)
    assert "<capsule" not in plain + arm_urdf(description["arm"], capsules=False)
    many = sum(shape["kind"] == "capsule" for shape in body.shapes)
    assert plain.count("<collision") == sum(s["solid"] for s in body.shapes) + 2 * many


def test_command(tmp_path, capsys):
    assert main(["pick-and-place", "--out", str(tmp_path), "--no-capsules"]) == 0
    printed = capsys.readouterr().out.split()
    assert {name.rsplit("/", 1)[-1] for name in printed} >= {"scene.xml", "arm.urdf", "object.urdf"}
    assert main(["pick-and-plaice", "--out", str(tmp_path)]) == 2
    assert "did you mean 'pick-and-place'" in capsys.readouterr().err


def test_roll_pitch_yaw_turns_as_the_quaternion_does():
    rng = np.random.default_rng(3)
    quaternions = rng.normal(size=(200, 4))
    steep = [[0.5, 0.5, 0.5, 0.5], [0.5, -0.5, -0.5, 0.5], [np.sqrt(0.5), 0, np.sqrt(0.5), 0]]
    steep += [[np.sqrt(0.5), 0, -np.sqrt(0.5), 0], [0.5, 0.5, -0.5, 0.5]]
    for q in [*quaternions, *steep]:
        q = np.array(q) / np.linalg.norm(q)
        r, p, y = roll_pitch_yaw(q)
        axes = np.eye(3)
        back = turned(y * axes[2]) @ turned(p * axes[1]) @ turned(r * axes[0])
        assert np.abs(back - matrix(q)).max() < 1e-9


def test_quaternions_come_back():
    rng = np.random.default_rng(4)
    for vector in rng.normal(size=(100, 3)) * 3:
        assert np.abs(matrix(quaternion(turned(vector))) - turned(vector)).max() < 1e-12


def _shape(kind, size, position=(0, 0, 0), turn=(0, 0, 0)):
    q = quaternion(turned(np.array(turn, float)))
    return {
        "name": kind,
        "kind": kind,
        "size": size,
        "position": position,
        "quaternion": q,
        "solid": True,
    }


@pytest.mark.parametrize(
    "shape, reach",
    [
        (_shape("sphere", [0.03]), 0.03),
        (_shape("capsule", [0.02, 0.05], turn=(0, np.pi / 2, 0)), 0.02),
        (_shape("cylinder", [0.02, 0.04]), 0.04),
        (_shape("cylinder", [0.02, 0.04], turn=(np.pi / 2, 0, 0)), 0.02),
        (_shape("box", [0.02, 0.03, 0.01], turn=(0, 0, 0.7)), 0.01),
    ],
)
def test_touch_is_told_to_the_millimetre(shape, reach):
    """A shape above a table touches when its lowest point is within the gap, wherever it is on the table."""
    table = Solid([_shape("box", [0.4, 0.6, 0.02], position=(0, 0, -0.02))])
    heights = reach + np.array([-0.002, 0.0, 0.0025, 0.0045, 0.05])
    n = len(heights)
    spots = np.random.default_rng(6).uniform(-0.3, 0.3, (n, 2))
    still = np.zeros((n, 3)), np.broadcast_to(np.eye(3), (n, 3, 3))
    there = np.column_stack([spots, heights]), still[1]
    found = touching(Solid([shape]), there, table, still, 0.0035)
    assert found.tolist() == [True, True, True, False, False]


def test_crossed_bars_touch_where_their_edges_meet():
    bar = Solid([_shape("box", [0.1, 0.01, 0.01])])
    poses = np.array([[0.0, 0.0, 0.0]] * 3), np.broadcast_to(np.eye(3), (3, 3, 3))
    across = turned(np.array([0, 0, np.pi / 2]))
    above = np.array([[0, 0, 0.021], [0, 0, 0.03], [0.2, 0, 0.02]])
    found = touching(bar, poses, bar, (above, np.broadcast_to(across, (3, 3, 3))), 0.003)
    assert found.tolist() == [True, False, False]
