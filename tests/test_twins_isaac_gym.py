"""The adapter of Isaac Gym on a stand-in of its modules, in this process and through a worker."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import twins
from twins.backends.isaac_gym import IsaacGym
from twins.backends.isaac_gym_scene import BITS, HAND_BITS, LINK_BITS
from twins.backends.lockstep import describe
from twins.randomise import CHANGES
from twins.tasks import make_task
from twins.trial import main as trial

ROOT = Path(__file__).parent.parent
STANDINS = str(ROOT / "tests" / "standins")
SIZE = 8
COLOURS = ("table", "floor", "arm", "object", "basket")


@pytest.fixture(autouse=True)
def gymapi(monkeypatch):
    """The stand-in's `gymapi`, for one test."""
    monkeypatch.syspath_prepend(STANDINS)
    from isaacgym import gymapi

    yield gymapi
    for name in list(sys.modules):
        if name.partition(".")[0] in ("isaacgym", "toy"):
            del sys.modules[name]


@pytest.fixture
def simulation():
    made = IsaacGym(make_task("pick-and-place"), 2, cameras=("side", "wrist"), image_size=SIZE)
    yield made
    made.close()


def configuration(**draw):
    nominal = {"friction": 1.0, "mass": 1.0, "servo": 1.0, "light": 0.6, "lamp": [-0.3, 0.2]}
    nominal["cameras"] = {"side": [0.0] * 6, "wrist": [0.0] * 6}
    nominal["colours"] = {name: [0.0] * 3 for name in COLOURS}
    places = {"object": [0.45, -0.1, 0.3], "basket": [0.6, 0.1]}
    return {"joints": [0.0] * 7, "draw": nominal | draw, **places}


def actor_of(simulation, i, name):
    scenes = simulation._scenes
    return scenes.envs[i].actors[scenes.actors[name][i]]


# -- the calls -----------------------------------------------------------------------------------------------


def test_states_are_written_once_before_each_simulation(simulation, gymapi):
    """Isaac Gym keeps the last of two writes only; the stand-in refuses the second."""
    ids = np.arange(2)
    for _ in range(3):
        simulation.configure(ids, [configuration()] * 2)
        simulation.configure(ids[:1], [configuration()])
    gymapi.HISTORY.clear()
    simulation.step(ids, simulation.joints(ids)[:, None], np.ones(2))
    assert gymapi.HISTORY.count("set_actor_root_state_tensor_indexed") == 1
    assert gymapi.HISTORY.count("set_dof_state_tensor_indexed") == 1
    assert gymapi.HISTORY.count("simulate") == 10  # 0.1 s at 100 Hz
    gymapi.HISTORY.clear()
    simulation.step(ids, simulation.joints(ids)[:, None], np.ones(2))
    assert "set_dof_state_tensor_indexed" not in gymapi.HISTORY, "nothing was stale"


def test_joints_in_another_order_are_found(simulation):
    """The stand-in's asset has its joints by name, fingers first."""
    assert simulation._scenes.dof_names[:2] == ["finger_left", "finger_right"]
    ids = np.arange(2)
    simulation.configure(ids, [configuration()] * 2)
    goal = simulation.joints(ids) + np.linspace(-0.05, 0.07, 7)
    for _ in range(5):
        simulation.step(ids, goal[:, None], np.ones(2))
    assert simulation.joints(ids) == pytest.approx(goal, abs=1e-3)
    assert simulation.snapshot(ids).width == pytest.approx([0.08, 0.08])


def test_links_meet_the_table_and_hands_what_lies_there(simulation):
    for i in range(2):
        arm = simulation._scenes.envs[i].actors[simulation._scenes.arms[i]]
        bits = {}
        solid = [link for link in arm.asset.urdf.links for _ in link.collisions]
        for link, value in zip(solid, arm.filter, strict=True):
            bits.setdefault(link.name, set()).add(value)
        assert bits["link4"] == {LINK_BITS} and bits["hand"] == bits["finger_left"] == {HAND_BITS}
    for name, role in (("table", "table"), ("object", "free"), ("basket", "placed")):
        assert set(actor_of(simulation, 1, name).filter) == {BITS[role]}
    collide = {
        (a, b): not first & second
        for a, first in {"link": LINK_BITS, "hand": HAND_BITS, **BITS}.items()
        for b, second in {"link": LINK_BITS, "hand": HAND_BITS, **BITS}.items()
    }
    assert collide["link", "table"] and collide["hand", "table"] and collide["free", "table"]
    assert collide["hand", "free"] and collide["hand", "placed"] and collide["free", "placed"]
    assert not (collide["link", "hand"] or collide["hand", "hand"] or collide["link", "free"])


def test_draws_reach_the_simulator(simulation):
    grey, shift = [0.05, -0.05, 0.0], [0.01, 0.0, 0.0, 0.0, 0.0, 0.1]
    drawn = configuration(
        friction=0.704,
        mass=2.0,
        servo=0.8,
        colours=dict.fromkeys(COLOURS, grey),
        cameras={"side": shift, "wrist": [0.0] * 6},
    )
    simulation.configure(np.arange(2), [configuration(), drawn])
    plain, changed = (actor_of(simulation, i, "object") for i in range(2))
    assert set(plain.friction) == {1.0} and changed.friction == pytest.approx([0.7] * 3)
    assert changed.mass["object"] == pytest.approx(0.24) and not plain.mass
    arms = [env.actors[0] for env in simulation._scenes.envs]
    row = simulation._scenes.dof_names.index("joint1")
    assert arms[0].servos["stiffness"][row] == pytest.approx(4500)
    assert arms[1].servos["stiffness"][row] == pytest.approx(0.8 * 4500)
    finger = simulation._scenes.dof_names.index("finger_left")
    assert arms[1].servos["stiffness"][finger] == pytest.approx(1000)
    assert changed.colours[0] == pytest.approx([1.0, 0.78, 0.1])
    eyes = [env.cameras[0].pose for env in simulation._scenes.envs]
    assert np.subtract(eyes[1][:3], eyes[0][:3]) == pytest.approx([0.01, 0, 0], abs=1e-6)
    assert simulation._scenes.envs[1].cameras[1].body == "hand"
    simulation.configure(np.array([1]), [configuration()])
    assert changed.mass["object"] == pytest.approx(0.12) and set(changed.friction) == {1.0}
    assert changed.colours[0] == pytest.approx([0.97, 0.83, 0.1])


def test_the_side_camera_looks_at_the_table(simulation):
    simulation.configure(np.arange(2), [configuration()] * 2)
    x, y, z, *quat = simulation._scenes.envs[0].cameras[0].pose
    from toy import rotation

    forward, up = rotation(np.array([quat[3], *quat[:3]]))[:, [0, 2]].T
    reach = -z / forward[2]
    assert [x + reach * forward[0], y + reach * forward[1]] == pytest.approx([0.42, 0.0], abs=0.01)
    assert up[2] > 0.5


def test_one_lamp_shines_on_all(simulation):
    bright, dark = configuration(light=0.7), configuration(light=0.5)
    simulation.configure(np.arange(2), [bright] * 2)
    assert simulation.sim.light == pytest.approx([0.7] * 3)
    with pytest.raises(
        ValueError, match=r"one lamp for all environments.*randomisation of 'light'"
    ):
        simulation.configure(np.array([1]), [dark])
    simulation.configure(np.arange(2), [dark] * 2)
    assert simulation.sim.light == pytest.approx([0.5] * 3)


def test_wrong_options_are_told():
    task = make_task("pick-and-place")
    with pytest.raises(ValueError, match="pipeline is 'cuda', not 'gpu' or 'cpu'"):
        IsaacGym(task, 1, pipeline="cuda")
    with pytest.raises(ValueError, match="pipeline 'gpu' needs a device 'cuda:N', not 'cpu'"):
        IsaacGym(task, 1, device="cpu")


def test_nothing_is_left_after_closing(simulation):
    simulation.close()
    simulation.close()
    with pytest.raises(AssertionError, match="destroyed"):
        simulation._simulate(1)
    simulation.sim = None


# -- the stand-in refuses what the real one does -------------------------------------------------------------


def test_the_stand_in_refuses_wrong_tensors(simulation, gymapi):
    from isaacgym.gymtorch import unwrap_tensor

    gym, sim = simulation.gym, simulation.sim
    states, wide = unwrap_tensor(simulation._root), torch.arange(2)
    with pytest.raises(AssertionError, match="int64, must be int32"):
        gym.set_actor_root_state_tensor_indexed(sim, states, unwrap_tensor(wide), 2)
    narrow = wide.to(torch.int32)
    with pytest.raises(AssertionError, match=r"Size.*3"):
        gym.set_actor_root_state_tensor_indexed(sim, states, unwrap_tensor(narrow), 3)
    with pytest.raises(AssertionError, match="have no joints"):
        ids = torch.tensor([1], dtype=torch.int32)
        gym.set_dof_state_tensor_indexed(sim, unwrap_tensor(simulation._dof), unwrap_tensor(ids), 1)
    with pytest.raises(Exception, match="contiguous"):
        unwrap_tensor(simulation._root.T)
    with pytest.raises(AttributeError, match="no property 'substep'"):
        gymapi.SimParams().substep = 2


def test_the_stand_in_refuses_calls_out_of_order(simulation):
    gym, sim = simulation.gym, simulation.sim
    ids = np.arange(2)
    simulation.configure(ids, [configuration()] * 2)
    simulation.step(ids, simulation.joints(ids)[:, None], np.ones(2))
    with pytest.raises(AssertionError, match="prepared already"):
        gym.create_env(sim, None, None, 1)
    with pytest.raises(AssertionError, match="fetch_results"):
        gym.step_graphics(sim)
    with pytest.raises(AssertionError, match="step_graphics comes first"):
        gym.render_all_camera_sensors(sim)
    simulation._refresh()
    simulation._write(ids, simulation._dofs, simulation._roots)
    with pytest.raises(AssertionError, match="set twice"):
        simulation._write(ids, simulation._dofs, simulation._roots)


# -- beside Isaac Gym ----------------------------------------------------------------------------------------

OLD = [
    "twins/__init__.py",
    "twins/snapshot.py",
    "twins/export_urdf.py",
    *(f"twins/backends/{n}.py" for n in ("__init__", "contract", "geometry", "lockstep")),
    *(f"twins/backends/{n}.py" for n in ("isaac_gym", "isaac_gym_scene")),
]


@pytest.mark.parametrize("path", OLD)
def test_python_3_8_can_read_it(path):
    tree = ast.parse((ROOT / path).read_text(), feature_version=(3, 8))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = {keyword.arg for keyword in node.keywords}
            name = getattr(node.func, "id", "")
            assert not (name == "zip" and "strict" in keywords), f"{path}:{node.lineno}"
        if isinstance(node, ast.ImportFrom):
            assert node.module == "__future__" or not node.level, f"{path}:{node.lineno}"


def test_it_loads_nothing_that_isaac_gyms_python_lacks():
    lacking = {"mujoco", "gymnasium", "warp", "torch", "isaacgym", "pydantic", "array_api_compat"}
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {STANDINS!r}]; import twins.backends.isaac_gym; "
        f"loaded = {{name.partition('.')[0] for name in sys.modules}}; print(loaded & {lacking})"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert found.stdout.strip() == "set()"


def test_a_description_is_enough(simulation):
    """What crosses to a worker makes the same scene as the task itself."""
    task = make_task("pick-and-place")
    told = IsaacGym(describe(task, ("side",)), 2, cameras=("side",), image_size=SIZE)
    told.configure(np.arange(2), [configuration()] * 2)
    simulation.configure(np.arange(2), [configuration()] * 2)
    first, second = told.snapshot(np.arange(2)), simulation.snapshot(np.arange(2))
    assert np.array_equal(first.tcp, second.tcp) and first.contact.keys() == second.contact.keys()
    told.close()


def test_through_a_worker_from_the_configuration_alone():
    """`twins.backend: isaac-gym` with `twins.python`: the expert finishes, with what can be drawn drawn."""
    spread = {name: 1.0 for name in CHANGES if name not in ("light", "latency", "action_noise")}
    env = twins.make_env(
        "pick-and-place",
        2,
        backend="isaac-gym",
        python=sys.executable,
        options={"worker": {"path": [STANDINS]}, "device": "cuda:0"},
        randomisation=spread,
        image_size=SIZE,
        seed=2,
    )
    try:
        assert tuple(env.simulation.capabilities) == tuple(IsaacGym.capabilities)
        first, _ = env.reset()
        for _ in range(env.max_steps):
            result = env.step_chunk(env.expert()[:, None])
            if env.done.all():
                break
        assert result.success[:, -1].all() or env._success.all()
        images = result.observation["observation.images.side"]
        assert images.shape == (2, SIZE, SIZE, 3)
        assert not np.array_equal(images, first["observation.images.side"])
    finally:
        env.close()


def test_the_trial_that_the_docs_name(tmp_path, capsys):
    """`python -m twins.trial`: a line and pictures of what ran, an error where nothing could."""
    options = {"worker": {"path": [STANDINS]}, "device": "cuda:0"}
    common = ["--backend", "isaac-gym", "--python", sys.executable, "--task", "pick-and-place"]
    common += ["--envs", "2", "--episodes", "2", "--out", str(tmp_path)]
    assert trial([*common, "--options", json.dumps(options)]) == 0
    assert "pick-and-place: 100% of 2 episodes, 0 invalid" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert row["success"] == 1.0 and row["env_steps_per_s"] > 0
    names = {path.name for path in tmp_path.glob("*.png")}
    assert {"pick-and-place-reset-side.png", "pick-and-place-end-wrist.png"} <= names
    assert trial([*common, "--options", json.dumps({**options, "pipeline": "tpu"})]) == 1
    (row,) = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert "pipeline is 'tpu'" in row["error"]
