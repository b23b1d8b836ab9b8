"""Adapters of simulators that step all their environments at once, on stand-ins that refuse wrong arguments."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from twins.backends import find_backend
from twins.backends.lockstep import BURIED
from twins.env import TwinEnv
from twins.tasks import make_task

STANDINS = str(Path(__file__).parent / "standins")
FOREIGN = ("isaacgym", "isaaclab", "mani_skill", "sapien", "toy")
SIZE = 8
BACKENDS = {
    "isaac-gym": {"pipeline": "gpu"},
    "isaac-gym, states on the host": {"pipeline": "cpu"},
    "maniskill": {"backend": "physx_cuda"},
    "isaac-lab": {},
}
DRAW = {"friction": 1.0, "mass": 1.0, "servo": 1.0, "light": 0.6, "lamp": [-0.3, 0.2]}


@pytest.fixture(autouse=True)
def standins(monkeypatch):
    """The stand-ins under the simulators' names, for one test."""
    monkeypatch.syspath_prepend(STANDINS)
    yield
    for name in list(sys.modules):
        if name.partition(".")[0] in FOREIGN:
            del sys.modules[name]


@pytest.fixture(params=sorted(BACKENDS))
def make(request):
    """Makes a simulation: make(task name, count)."""
    factory = find_backend(request.param.partition(",")[0]).load()
    made = []

    def build(task="pick-and-place", count=3, **options):
        given = {"cameras": ("side", "wrist"), "image_size": SIZE, **options}
        made.append(factory(make_task(task), count, **BACKENDS[request.param], **given))
        return made[-1]

    yield build
    for simulation in made:
        simulation.close()


def configuration(task="pick-and-place", **changes):
    things = [thing.name for thing in make_task(task).things]
    colours = {name: [0.0] * 3 for name in ("table", "floor", "arm", *things)}
    draw = {**DRAW, "cameras": {"side": [0.0] * 6, "wrist": [0.0] * 6}, "colours": colours}
    places = {name: [0.45 + 0.1 * i, -0.1 + 0.2 * i, 0.3] for i, name in enumerate(things)}
    return {"joints": [0.0] * 7, "draw": draw, **places, **changes}


def three(task="pick-and-place"):
    return [configuration(task, joints=[0.06 * k] * 7) for k in range(3)]


def move(simulation, ids, joint=0.1, opening=1.0):
    ids = np.asarray(ids)
    simulation.step(ids, (simulation.joints(ids) + joint)[:, None], np.full(len(ids), opening))


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(_arrays(first), _arrays(second), strict=True))


def _arrays(snapshot):
    for value in snapshot:
        yield from value.values() if isinstance(value, dict) else [value]


def test_configurations_are_what_the_snapshot_shows(make):
    simulation, ids = make(), np.arange(3)
    simulation.configure(ids, three())
    now = simulation.snapshot(ids)
    home = np.array(simulation.scene["arm"]["home"])
    assert simulation.joints(ids) == pytest.approx(home + np.array([[0.0], [0.06], [0.12]]))
    assert now.width == pytest.approx([0.08] * 3)
    assert now.position["object"] == pytest.approx(np.tile([0.45, -0.1, 0.018], (3, 1)))
    assert now.position["basket"] == pytest.approx(np.tile([0.55, 0.1, 0.0], (3, 1)))
    assert np.arctan2(now.turn["object"][:, 1, 0], now.turn["object"][:, 0, 0]) == pytest.approx(
        [0.3] * 3
    )
    assert set(now.velocity) == {"object"} and not now.velocity["object"].any()
    assert now._fields == type(now)._fields and now.memory == {}


def test_a_configuration_gives_the_same_state_wherever_it_is_put(make):
    simulation = make()
    simulation.configure(np.arange(3), three())
    move(simulation, [0, 1, 2])
    simulation.configure(np.array([2]), three()[:1])
    first = simulation.snapshot(np.array([2]))
    simulation.configure(np.array([0]), three()[:1])
    assert same(first, simulation.snapshot(np.array([0])))


def test_what_is_not_stepped_stays_where_it_is(make):
    simulation = make()
    simulation.configure(np.arange(3), three())
    move(simulation, [0, 1, 2])
    before = simulation.snapshot(np.array([1]))
    for _ in range(3):
        move(simulation, [0, 2])
    assert same(before, simulation.snapshot(np.array([1])))
    joints = simulation.joints(np.arange(3))
    assert (joints[0] > joints[1]).all()
    simulation.step(np.array([1]), joints[1:2, None], np.ones(1))  # and goes on from there
    assert simulation.joints(np.array([1])) == pytest.approx(joints[1:2], abs=1e-3)


def test_arms_go_where_they_are_told(make):
    simulation, ids = make(), np.arange(3)
    simulation.configure(ids, three())
    goal = np.array(simulation.scene["arm"]["home"]) + np.array([[0.1], [-0.1], [0.0]])
    for _ in range(5):
        simulation.step(ids, goal[:, None], np.array([1.0, 0.5, 0.0]))
    assert simulation.joints(ids) == pytest.approx(goal, abs=1e-3)
    assert simulation.snapshot(ids).width == pytest.approx([0.08, 0.04, 0.0], abs=1e-3)


def test_images_show_what_was_configured_and_what_was_done(make):
    """The stand-ins paint the hand's place and the last body's: both follow at once, in the right environment."""
    simulation, ids = make(), np.arange(3)
    simulation.configure(ids, three())
    before = simulation.images(ids)
    assert set(before) == {"side", "wrist"}
    assert before["side"].shape == (3, SIZE, SIZE, 3) and before["side"].dtype == np.uint8
    _, counts = np.unique(before["side"][:, 0, 0, 0], return_counts=True)
    assert len(counts) == 3  # three postures, three hands
    state = simulation.snapshot(ids)
    assert np.array_equal(simulation.images(np.array([2]))["side"][0], before["side"][2])
    assert same(state, simulation.snapshot(ids)), "looking changes nothing"
    for _ in range(2):
        move(simulation, [1], -0.1)
    after = simulation.images(ids)["side"]
    assert not np.array_equal(after[1], before["side"][1])
    assert np.array_equal(after[[0, 2]], before["side"][[0, 2]])


def test_the_expert_finishes_its_task(make):
    simulation = None

    def factory(task, count, **options):
        nonlocal simulation
        simulation = make(task.name, count, **options)
        return simulation

    env = TwinEnv(make_task("pick-and-place"), 3, factory, image_size=SIZE, seed=3)
    env.reset()
    touched = np.zeros(3, bool)
    for _ in range(env.max_steps):
        env.step_chunk(env.expert()[:, None])
        touched |= simulation.snapshot(np.arange(3)).contact["object", "gripper"]
        if env.done.all():
            break
    now = simulation.snapshot(np.arange(3))
    assert env._success.all() and touched.all()
    assert not now.contact["object", "gripper"].any()
    assert not env._invalid.any()


def test_a_simulation_that_diverges_shows_it_and_disturbs_nobody(make, monkeypatch):
    simulation, ids = make(), np.arange(3)
    simulation.configure(ids, three())
    read = simulation._read

    def broken():
        dofs, roots, pressing = read()
        dofs[1], roots[1] = np.nan, np.inf
        return dofs, roots, pressing

    with monkeypatch.context() as patched:
        patched.setattr(simulation, "_read", broken)
        move(simulation, ids)
    now = simulation.snapshot(ids)
    assert not np.isfinite(now.tcp[1]).any() and np.isfinite(now.tcp[[0, 2]]).all()
    assert not now.contact["object", "gripper"].any()
    for _ in range(2):
        move(simulation, [0, 2])  # the stand-ins refuse to be given numbers that are not finite
        assert np.isfinite(simulation.snapshot(np.array([0, 2])).tcp).all()
    simulation.configure(np.array([1]), three()[:1])
    move(simulation, ids)
    assert np.isfinite(simulation.snapshot(ids).tcp).all()


def test_hidden_shapes_are_out_of_sight_until_they_are_shown(make):
    task = "erase-whiteboard"
    simulation, ids = make(task), np.arange(3)
    simulation.configure(ids, three(task))
    names = list(make_task(task).hidden(_nothing_remembered(task)))
    rows = [[body.name for body in simulation.movable].index(name) for name in names[:2]]
    written = {}
    write = simulation._write

    def watch(who, dofs, roots):
        written.update({int(i): roots[k].copy() for k, i in enumerate(who)})
        write(who, dofs, roots)

    simulation._write = watch
    board = make_task(task).things[-1].height
    for flags in ([True, False, False], [True, True, False], [False, True, False]):
        simulation.hide(ids, {names[0]: np.array(flags)})
        simulation.images(ids)
        heights = [written[i][rows[0], 2] for i in range(3)]
        assert heights == [BURIED if gone else pytest.approx(board) for gone in flags]
        assert all(written[i][rows[1], 2] == pytest.approx(board) for i in range(3))
    assert np.isfinite(simulation.snapshot(ids).position["ink"]).all()
    simulation.configure(ids, three(task))
    simulation.images(ids)
    assert written[1][rows[0], 2] == pytest.approx(board)


def _nothing_remembered(task):
    return {name: np.zeros((1, *m.shape), m.dtype) for name, m in make_task(task).memory.items()}


def test_contacts_between_things_come_from_their_poses(make):
    task = "erase-whiteboard"
    simulation, ids = make(task), np.arange(3)
    places = [[0.55, 0.1, 0.0], [0.55, 0.1, 0.0], [0.4, -0.3, 0.0]]
    simulation.configure(
        ids, [configuration(task, board=[0.55, 0.1, 0.0], eraser=place) for place in places]
    )
    eraser, board = simulation._index["eraser"], simulation._solids["board"].shapes[0]
    low = simulation._solids["eraser"].probes((np.zeros((1, 3)), np.eye(3)[None]))
    stand = 2 * board["size"][2] - float((low[0][..., 2] - low[1]).min())
    simulation._roots[:, eraser, 2] = stand + np.array([0.001, 0.006, 0.0])
    touching = simulation.snapshot(ids).contact["eraser", "board"]
    assert touching.tolist() == [True, False, False]


@pytest.mark.parametrize("backend", ["maniskill", "isaac-lab"])
def test_draws_that_a_simulator_cannot_follow_are_refused(backend):
    factory = find_backend(backend).load()
    simulation = factory(make_task("pick-and-place"), 2, cameras=("side",), image_size=SIZE)
    wild = configuration()
    wild["draw"] = {**wild["draw"], "friction": 0.8, "mass": 1.5}
    with pytest.raises(ValueError, match=r"can't draw friction, mass for each environment"):
        simulation.configure(np.arange(1), [wild])
    wild = configuration()
    wild["draw"] = {**wild["draw"], "light": 0.5}
    with pytest.raises(ValueError, match="can't draw light "):
        simulation.configure(np.arange(1), [wild])
    simulation.close()


def test_one_environment_on_a_cpu_without_images():
    """ManiSkill needs no Vulkan device when nothing is to be seen."""
    factory = partial(find_backend("maniskill").load(), backend="physx_cpu")
    env = TwinEnv(make_task("pick-and-place"), 1, factory, cameras=(), seed=1)
    env.reset()
    while not env.done.all():
        env.step_chunk(env.expert()[:, None])
    assert env._success.all()
    env.close()


def test_newtons_c_mujoco_steps_one_world():
    with pytest.raises(ValueError, match="use_mujoco_cpu steps one world, not 2"):
        find_backend("newton").load()(make_task("pick-and-place"), 2, use_mujoco_cpu=True)


def test_wrong_counts_cameras_and_descriptions_are_told(make):
    with pytest.raises(ValueError, match="count is 0"):
        make(count=0)
    described = make(count=1).scene
    factory = find_backend("maniskill").load()
    with pytest.raises(ValueError, match="unknown camera 'top', not one of"):
        factory(described, 1, cameras=("top",))
    with pytest.raises(ValueError, match="format 7, not 1"):
        factory({**described, "format": 7}, 1)
