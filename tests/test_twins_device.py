"""The environment that lives on one device, on warp's CPU device; marked `gpu`, the same on CUDA."""

import gc
import resource

import mujoco
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from twinrl.env import IMAGE_PREFIX, PRIVILEGED, STATE
from twins import make_env
from twins.device_worlds import TooManyContacts
from twins.tasks import TASKS, make_task

DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))
REST = np.array([0, 0, 0, 0, 0, 0, 1], np.float32)
PICK = "pick-and-place"


def on_device(task=PICK, count=4, device="cpu", render=False, **settings):
    return make_env(task, count, backend="mujoco-warp", device=device, render=render, **settings)


def rest(count, chunk=1):
    return np.tile(REST, (count, chunk, 1))


def difference(a, b):
    return np.abs(np.asarray(a, float) - np.asarray(b, float))


def play(env, steps):
    """Success by environment when the expert plays."""
    success = np.zeros(env.num_envs, bool)
    for _ in range(steps):
        success |= env.step_chunk(env.expert()[:, None]).success.any(axis=1)
        if env.done.all():
            break
    return success


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("task", sorted(TASKS))
def test_it_is_the_environment_of_the_cpu(task, device):
    settings = {"randomisation": "full", "image_size": 32, "seed": 5, "region": "all"}
    ours = on_device(task, 3, device, render=True, **settings)
    theirs = make_env(task, 3, **settings)
    assert ours.single_observation_space == theirs.single_observation_space
    (first, info), (expected, other) = ours.reset(), theirs.reset()
    assert info["configurations"] == other["configurations"]
    assert list(first) == list(expected)
    for key, value in expected.items():
        assert first[key].dtype == value.dtype and first[key].shape == value.shape, key
        if key.startswith(IMAGE_PREFIX):
            assert difference(first[key], value).mean() < 0.1, key  # of 255
        else:
            np.testing.assert_allclose(first[key], value, atol=1e-4, err_msg=key)
    actions = theirs.expert()
    np.testing.assert_allclose(ours.expert(), actions, atol=1e-3)
    for step in range(3):
        actions = theirs.expert()[:, None]
        one, two = ours.step_chunk(actions), theirs.step_chunk(actions)
        np.testing.assert_allclose(one.states, two.states, atol=1e-3, err_msg=f"step {step}")
        np.testing.assert_allclose(one.privileged, two.privileged, atol=5e-3)
        for name in ("action", "reward", "terminated", "truncated", "success", "mask", "invalid"):
            value, wanted = getattr(one, name), getattr(two, name)
            assert value.dtype == wanted.dtype and value.shape == wanted.shape, name
            np.testing.assert_allclose(value, wanted, atol=1e-6, err_msg=name)
    for key in (key for key in expected if key.startswith(IMAGE_PREFIX)):
        assert difference(one.observation[key], two.observation[key]).mean() < 0.1
    ours.close(), theirs.close()


@pytest.mark.parametrize("device", DEVICES)
def test_the_expert_succeeds_as_often_as_on_the_cpu(device):
    count = 12 if device == "cpu" else 1024
    settings = {"randomisation": "full", "seed": 11}
    ours = on_device(count=count, device=device, **settings)
    theirs = make_env(PICK, 12, render=False, **settings)
    ours.reset(), theirs.reset()
    success, expected = play(ours, 64), play(theirs, 64)
    assert success.mean() >= 0.9 and expected.mean() >= 0.9
    assert ours.invalid_episodes == 0
    if device == "cpu":
        assert (success == expected).sum() >= 11


@pytest.mark.parametrize("device", DEVICES)
def test_a_grasp_does_not_slip(device):
    env = on_device(count=4, device=device, seed=2)
    env.reset()
    held = np.zeros(4, bool)
    for _ in range(40):
        now = env.snapshot()
        held |= (now.position["object"][:, 2] > 0.08) & env.task.held(now)
        if held.all():
            break
        actions = env.expert()
        actions[held] = 0.0
        env.step_chunk(actions[:, None])
    assert held.all()

    def in_hand():
        now = env.snapshot()
        return np.einsum("nij,ni->nj", now.tcp_turn, now.position["object"] - now.tcp)

    still = np.zeros((4, 1, 7), np.float32)  # the gripper stays closed
    for _ in range(5):
        env.step_chunk(still)
    before = in_hand()
    for _ in range(20):  # 2 s
        env.step_chunk(still)
    slip = np.linalg.norm(in_hand() - before, axis=1)
    print(f"slip in 2 s of holding: {1000 * slip.max():.2f} mm")
    assert slip.max() < 0.5e-3
    assert env.task.held(env.snapshot()).all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_configuration_repeats_the_episode_bit_for_bit_anywhere_in_the_batch(device):
    env = on_device(count=3, device=device, randomisation="full", seed=4)
    env.reset()
    actions = np.random.default_rng(0).normal(scale=0.02, size=(3, 6, 7)).astype(np.float32)
    first, given = env.step_chunk(actions), env.configurations()
    env.reset(options={"configurations": [given[2], given[0], given[1]]})
    again = env.step_chunk(actions[[2, 0, 1]])
    for name in ("states", "privileged", "action", "reward"):
        assert (getattr(again, name) == getattr(first, name)[[2, 0, 1]]).all(), name


def test_a_reset_and_a_step_leave_the_others_alone():
    env = on_device(count=3, render=True, image_size=16, seed=1)
    env.reset()
    env.step_chunk(env.expert()[:, None])
    state = env.simulation.qpos.clone()
    before, _ = env.reset(options={"reset_mask": np.zeros(3, bool)})
    after, _ = env.reset(options={"reset_mask": np.array([False, True, False])})
    for key, value in before.items():
        assert (after[key][[0, 2]] == value[[0, 2]]).all(), key
        assert (after[key][1] != value[1]).any(), key
    assert (env.simulation.qpos[[0, 2]] == state[[0, 2]]).all()

    short = on_device(count=2, max_steps=2, seed=1)
    short.reset()
    short.step_chunk(rest(2))
    short.reset(options={"reset_mask": np.array([False, True])})
    result = short.step_chunk(
        rest(2, chunk=3)
    )  # ends the first after one step, the second after two
    assert result.mask.tolist() == [[True, False, False], [True, True, False]]
    assert result.truncated.tolist() == [[True, False, False], [False, True, False]]
    assert not result.states[0, 1:].any() and not result.action[0, 1:].any()
    still = short.simulation.qpos.clone()
    again = short.step_chunk(rest(2))
    assert not again.mask.any() and not again.reward.any()
    assert (short.simulation.qpos == still).all()
    assert (again.observation[STATE] == result.observation[STATE]).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("what", ["position", "velocity", "speed", "mass"])
def test_a_diverged_simulation_ends_alone_and_comes_back(what, device, caplog):
    settings = {"render": True, "image_size": 16, "seed": 1}
    good, bad = (on_device(count=4, device=device, **settings) for _ in range(2))
    (seen, _), _ = bad.reset(), good.reset()
    worlds = bad.simulation
    if what == "position":
        worlds.qpos[2, -6] = float("nan")
    elif what == "velocity":
        worlds.qvel[2, 3] = float("inf")
    elif what == "speed":
        worlds.qvel[2, -5] = 1e6
    else:
        worlds._fields["body_mass"][2] = float("nan")
    actions = good.expert()[:, None]
    result, expected = bad.step_chunk(actions), good.step_chunk(actions)
    others = [0, 1, 3]
    assert result.invalid.tolist() == [False, False, True, False]
    assert result.done[2] and not result.mask[2].any() and not result.reward[2].any()
    assert bad.invalid_episodes == 1 and "1 episodes are void: [2]" in caplog.text
    for key, value in result.observation.items():
        assert np.isfinite(value).all(), key
        assert (value[2] == seen[key][2]).all(), key  # the last good one
        assert (value[others] == expected.observation[key][others]).all(), key
    again, _ = bad.reset(options={"reset_mask": bad.done})
    assert np.isfinite(again[STATE]).all()
    for _ in range(3):
        result = bad.step_chunk(rest(4))
    assert not result.invalid.any() and bad.invalid_episodes == 1


def test_too_little_room_for_contacts_says_how_much_is_needed():
    env = on_device(count=3, seed=1, options={"contacts": 5})
    env.reset()
    with pytest.raises(
        TooManyContacts,
        match=r"3 environments had 6\.0 contacts each and room for 5.*option contacts",
    ):
        env.step_chunk(rest(3))
    assert env.done.all()


def test_too_little_room_for_constraints_ends_only_those_that_needed_more(caplog):
    env = on_device(count=3, seed=1, options={"constraints": 24})
    env.reset()
    invalid = np.zeros(3, bool)
    for _ in range(20):
        actions = env.expert()
        actions[1:] = REST  # these two never grasp
        result = env.step_chunk(actions[:, None])
        invalid |= result.invalid
        if invalid.any():
            break
    assert invalid.tolist() == [True, False, False]
    assert "environments [0] needed up to" in caplog.text and "constraints" in caplog.text
    assert env.simulation.usage_waiting().constraints > 24
    assert env.simulation.stats()["room/constraints"] > 1 > env.simulation.stats()["room/contacts"]


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_are_the_devices_own(device):
    env = on_device(count=3, device=device, render=True, image_size=16, options={"tensors": True})
    numpy = on_device(count=3, device=device, render=True, image_size=16)
    (first, _), _ = env.reset(), numpy.reset()
    actions = env.expert(noise=0.3)
    assert all(value.device.type == device for value in (*first.values(), actions))
    given = numpy.expert(noise=0.3)
    assert np.array_equal(actions.cpu().numpy(), given)
    result, wanted = env.step_chunk(actions[:, None]), numpy.step_chunk(given[:, None])
    for key, value in result.observation.items():
        assert value.data_ptr() == first[key].data_ptr()  # no copy, ever
        assert np.array_equal(value.cpu().numpy(), wanted.observation[key]), key
    for name, value in result._asdict().items():
        if name != "observation":
            assert isinstance(value, torch.Tensor), name
            assert np.array_equal(value.cpu().numpy(), getattr(wanted, name)), name
    assert isinstance(result.done, torch.Tensor) and not result.done.any()
    mask = torch.tensor([True, False, False], device=env.device)
    env.reset(options={"reset_mask": mask})
    observation, reward, terminated, truncated, info = env.step(actions)
    assert observation[PRIVILEGED].shape == (3, env.privileged_dim) and reward.shape == (3,)
    assert not (terminated | truncated | info["invalid"]).any()


def test_actions_that_are_not_finite():
    env = on_device(count=3)
    env.reset()
    actions = rest(3, chunk=2)
    actions[1, 1, 4] = np.nan
    with pytest.raises(ValueError, match=r"environments \[1\] are not finite"):
        env.step_chunk(actions)
    assert not env.done.any()
    with pytest.raises(ValueError, match=r"actions are \(3, 7\), expected \(3, C, 7\)"):
        env.step_chunk(actions[:, 0])

    tensors = on_device(count=3, options={"tensors": True})
    tensors.reset()
    result = tensors.step_chunk(torch.from_numpy(actions))
    assert result.invalid.tolist() == [False, True, False]  # it does not wait to say so
    assert result.mask[:, 0].tolist() == [True, False, True]
    with pytest.raises(ValueError, match=r"environments \[1\] are not finite"):
        tensors.reset(options={"reset_mask": result.done})
    tensors.reset(options={"reset_mask": result.done})  # said once
    assert not tensors.step_chunk(torch.from_numpy(rest(3))).invalid.any()


class HostWaits(TorchDispatchMode):
    """Records what on a GPU would make the host wait: values read, and numbers brought there."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        read = any(part in name for part in ("_local_scalar_dense", "nonzero", "aten.equal"))
        brought = "lift_fresh" in name and args[0].ndim > 0
        index = args[1] if name.startswith("aten.index") and len(args) > 1 else None
        masks = isinstance(index, (list, tuple)) and any(
            part is not None and part.dtype == torch.bool for part in index
        )
        if read or brought or masks:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_what_makes_the_host_wait_is_noticed():
    values = torch.zeros(3, 4)
    for wait in (
        lambda: bool(values.any()),
        lambda: values[values > 0],
        lambda: values[:, [0, 1]],
        lambda: torch.asarray([1.0, 2.0]),
        lambda: values.sum().item(),
    ):
        with HostWaits() as waits:
            wait()
        assert waits.found


@pytest.mark.parametrize("task", sorted(TASKS))
def test_a_step_never_waits_for_the_device(task):
    weights = dict.fromkeys(make_task(task).term_names, 0.1)
    settings = {"randomisation": "full", "reward": weights, "options": {"tensors": True}}
    env = on_device(task, 2, render=True, image_size=16, **settings)
    env.reset()
    env.step_chunk(env.expert()[:, None])  # constants of the task are brought once
    with HostWaits() as waits:
        actions = env.expert()
        result = env.step_chunk(actions[:, None])
    assert not waits.found
    assert np.isfinite(result.states.numpy()).all()


def test_what_draws_change_is_what_mujoco_would_compute():
    env = on_device(count=2, randomisation="full", seed=3)
    env.reset()
    draw = env.configurations()[1]["draw"]
    model = make_env(PICK, 1, render=False).simulation.model
    body = model.body("object").id
    model.body_mass[body] *= draw["mass"]
    model.body_inertia[body] *= draw["mass"]
    mujoco.mj_setConst(model, mujoco.MjData(model))
    for name in (
        "body_mass",
        "body_inertia",
        "body_subtreemass",
        "body_invweight0",
        "dof_invweight0",
    ):
        ours = env.simulation._fields[name][1].numpy()
        np.testing.assert_allclose(ours, getattr(model, name), rtol=1e-5, err_msg=name)
    friction = model.geom_friction[:, 0] * draw["friction"]
    np.testing.assert_allclose(
        env.simulation._fields["geom_friction"][1, :, 0], friction, rtol=1e-5
    )
    assert draw["mass"] != 1.0 and draw["friction"] != 1.0


def test_resets_take_no_more_memory():
    env = on_device(count=2, render=True, image_size=16, randomisation="full")

    def resident():
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB

    for _ in range(20):
        env.reset()
    before = resident()
    for _ in range(40):
        env.reset()
        env.step_chunk(rest(2))
    assert resident() - before < 8


def test_what_is_hidden_is_hidden_as_on_the_cpu():
    settings = {"image_size": 64, "cameras": ("side",), "seed": 3}
    ours = on_device("erase-whiteboard", 2, render=True, **settings)
    theirs = make_env("erase-whiteboard", 2, **settings)
    (before, _), _ = ours.reset(), theirs.reset()
    shapes = [
        shape.name for thing in ours.task.things if thing.name == "ink" for shape in thing.shapes
    ]
    gone = np.array([True, False])
    ours.simulation.hide({name: torch.from_numpy(gone) for name in shapes})
    theirs.simulation.hide(np.arange(2), dict.fromkeys(shapes, gone))
    images = {"side": torch.zeros(2, 64, 64, 3, dtype=torch.uint8)}
    ours.simulation.images(images, torch.ones(2, dtype=torch.bool))
    seen, expected = images["side"].numpy(), theirs.simulation.images(np.arange(2))["side"]
    assert difference(seen, expected).mean() < 0.1
    first = before[IMAGE_PREFIX + "side"]
    assert difference(seen[0], first[0]).max() > 50 and (seen[1] == first[1]).all()


@pytest.mark.parametrize(("device", "says"), [("cuda:99", "cuda:99"), ("tpu", "not one of")])
def test_a_device_that_is_not_there(device, says):
    with pytest.raises(ValueError, match=says):
        on_device(count=1, device=device)


@pytest.mark.parametrize("device", DEVICES)
def test_physics_without_early_stopping_is_the_same(device):
    envs = [
        on_device(count=2, device=device, seed=6, options={"conditional": c}) for c in (True, False)
    ]
    results = []
    for env in envs:
        env.reset()
        results.append(env.step_chunk(rest(2, chunk=2)))
    assert (results[0].states == results[1].states).all()
