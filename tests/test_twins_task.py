"""Pick-and-place: the expert solves it, and nothing else counts as success. And of any task: its configurations
repeat an episode, changes are switched and scaled, and one more is one file.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import twins
from twinrl.env import image_key
from twins import randomise, rotation
from twins.labels import labelled_scenes
from twins.tasks import TASKS, make_task, task_names
from twins.tasks import pick_and_place as task

COUNT = 64


def run(env, act, steps=64):
    """Play to the end; returns success (N,) and the transitions."""
    history = []
    for _ in range(steps):
        if env.done.all():
            break
        history.append(env.step_chunk(act()[:, None]))
    success = np.concatenate([h.success for h in history], axis=1).any(axis=1)
    return success, history


@pytest.mark.parametrize(
    ("options", "region", "least"),
    [
        ({}, "id", 0.95),
        ({}, "ood", 0.95),
        ({"randomisation": "full"}, "all", 0.9),
        ({"variant": "standin"}, "all", 0.9),
    ],
)
def test_the_expert_succeeds(options, region, least):
    env = twins.make_env(num_envs=COUNT, render=False, **options)
    env.reset(seed=11, options={"region": region})
    success, history = run(env, env.expert)
    assert success.mean() >= least
    lengths = np.concatenate([h.mask for h in history], axis=1).sum(axis=1)
    assert np.median(lengths) < 40


def test_the_expert_is_a_function_of_the_state_and_takes_over_anywhere():
    env = twins.make_env(num_envs=32, render=False, max_steps=90)
    env.reset(seed=1, options={"region": "all"})
    rng = np.random.default_rng(0)
    env.step_chunk(rng.normal(0, 0.03, (32, 12, 7)).astype(np.float32))
    np.testing.assert_array_equal(env.expert(), env.expert())
    success, _ = run(env, lambda: env.expert(noise=0.2), steps=90)
    assert success.mean() >= 0.9


def _stand(env, height, velocity=(0, 0, 0), sideways=0.0):
    """Put the banana over the middle of the basket, the hand out of the way, fingers open."""
    everyone = np.arange(env.num_envs)
    position = env.snapshot().position["basket"] + [sideways, 0, height]
    env.simulation.place(everyone, "object", position, rotation.about_z(np.zeros(env.num_envs)))
    env.simulation.push(everyone, "object", velocity)


def _idle(gripper=1.0, steps=1):
    action = np.zeros((2, steps, 7), np.float32)
    action[..., 6] = gripper
    return action


def test_a_banana_lying_in_the_basket_is_success():
    env = twins.make_env(num_envs=2, render=False)
    env.reset(seed=0)
    _stand(env, task.RADIUS + 2 * task.WALL)
    assert env.step_chunk(_idle()).success.all()


@pytest.mark.parametrize(
    ("height", "velocity", "sideways", "gripper"),
    [
        (0.25, (0, 0, 0), 0.0, 1.0),  # above it
        (0.12, (0, 0, 0.7), 0.0, 1.0),  # thrown upwards
        (0.1, (1.5, 0, 0), -0.05, 1.0),  # thrown across it
        (0.03, (0, 0, 0), 0.13, 1.0),  # beside it
        (0.026, (0, 0, 0), 0.0, 0.0),  # the gripper is closing
    ],
)
def test_success_cannot_be_faked(height, velocity, sideways, gripper):
    env = twins.make_env(num_envs=2, render=False)
    env.reset(seed=0)
    _stand(env, height, velocity, sideways)
    result = env.step_chunk(_idle(gripper))
    assert not result.success.any() and not result.reward.any()


def test_a_banana_held_inside_the_basket_is_no_success_until_it_is_let_go():
    env = twins.make_env(num_envs=2, render=False, max_steps=200)
    env.reset(seed=0)
    for _ in range(64):
        action = env.expert()
        if (action[:, 6] > 0.5).all() and env.task.held(env.snapshot()).any():
            break
        # Once one of them is ready to let go, wait with it for the other.
        action[env.task.held(env.snapshot()), 6] = 0.0
        env.step_chunk(action[:, None])
    lower = _idle(gripper=0.0, steps=6)
    lower[..., 2] = -0.03
    held = env.step_chunk(lower)
    offset = held.privileged[:, -1, :2] - held.privileged[:, -1, 5:7]
    assert (np.abs(offset) < task.BASKET_HALF).all() and (held.privileged[:, -1, 2] < 0.055).all()
    assert held.privileged[:, -1, 7].all() and not held.success.any()
    opened = env.step_chunk(_idle(steps=3))
    up = _idle(steps=6)
    up[..., 2] = 0.03
    assert (opened.success.any(axis=1) | env.step_chunk(up).success.any(axis=1)).all()


def test_a_lost_banana_ends_the_episode_as_a_failure():
    env = twins.make_env(num_envs=2, render=False)
    env.reset(seed=0)
    env.simulation.place(
        np.array([0]), "object", np.array([[0.5, 0.7, task.RADIUS]]), np.eye(3)[None]
    )
    result = env.step_chunk(_idle())
    assert result.terminated[:, 0].tolist() == [True, False]
    assert not result.success.any() and not result.truncated.any()


def _yellow(images):
    red, green, blue = np.moveaxis(images.astype(int), -1, 0)
    return ((red > 90) & (green > 70) & (blue < 0.5 * green)).sum(axis=(1, 2))


def _blue(images):
    red, _, blue = np.moveaxis(images.astype(int), -1, 0)
    return (blue > 1.6 * red).sum(axis=(1, 2))


def test_images_show_object_and_basket_and_differ_between_environments():
    env = twins.make_env(num_envs=20)
    observation, _ = env.reset(seed=0, options={"region": "all"})
    side, wrist = (observation[image_key(name)] for name in env.cameras)
    assert (_yellow(side) >= 20).all() and (_blue(side) >= 80).all()
    assert len({image.tobytes() for image in side}) == env.num_envs
    assert len({image.tobytes() for image in wrist}) == env.num_envs


def test_randomised_looks_and_the_standin_change_the_picture():
    places = [{"seed": 1, "region": "id"}]
    pictures = []
    for options in ({}, {"variant": "standin"}, {"randomisation": {"colour": 1.0}}):
        env = twins.make_env(num_envs=1, **options)
        observation, _ = env.reset(options={"configurations": places})
        pictures.append(observation[image_key("side")].astype(int))
    for changed in pictures[1:]:
        assert np.abs(changed - pictures[0]).mean() > 3


def test_labelled_scenes_tell_the_truth_and_leave_the_environment_alone():
    env = twins.make_env(num_envs=2, image_size=32)
    env.reset(seed=0)
    images, states, labels = labelled_scenes(env, 150, np.random.default_rng(0))
    assert images["side"].shape == (150, 32, 32, 3)
    assert states.shape == (150, env.state_dim) and labels.shape == (150, env.privileged_dim)
    name = env.privileged_names.index
    tcp = states[:, :3]
    relative = labels[:, name("object_from_tcp_x") : name("object_from_tcp_x") + 3]
    np.testing.assert_allclose(labels[:, :3] - tcp, relative, atol=1e-6)
    held = labels[:, name("held")] > 0.5
    assert 0.1 < held.mean() < 0.5
    assert (np.linalg.norm(relative[held], axis=1) < 0.04).all()
    np.testing.assert_allclose(np.hypot(labels[:, 3], labels[:, 4]), 1.0, atol=1e-6)
    assert (labels[:, 1] > 0).any() and (labels[:, 1] < 0).any()
    # A label of the place must agree with the picture: the further left, the further left.
    lying = ~held & (labels[:, 2] < 0.03)
    columns = [_centre_column(image) for image in images["side"][lying]]
    seen = np.isfinite(columns)
    assert seen.sum() > 40
    assert np.corrcoef(np.array(columns)[seen], labels[lying, 1][seen])[0, 1] > 0.95
    other = twins.make_env(num_envs=2, image_size=32)
    other.reset(seed=0)
    ours, theirs = (e.step_chunk(e.expert()[:, None]) for e in (env, other))
    np.testing.assert_array_equal(ours.states, theirs.states)
    np.testing.assert_array_equal(
        ours.observation[image_key("side")], theirs.observation[image_key("side")]
    )


def _centre_column(image):
    red, green, blue = np.moveaxis(image.astype(int), -1, 0)
    _, columns = np.nonzero((blue < 0.35 * red) & (blue < 0.45 * green))
    return columns.mean() if len(columns) else np.nan


@pytest.mark.parametrize("name", TASKS)
def test_a_configuration_repeats_an_episode_bit_for_bit_from_json_text(name):
    env = twins.make_env(name, 4, image_size=16, randomisation="full")
    env.reset(seed=9, options={"region": "all"})
    text = json.dumps(env.configurations())
    first = [env.step_chunk(env.expert(noise=0.2)[:, None]) for _ in range(25)]
    actions = np.concatenate([step.action for step in first], axis=1)
    # Elsewhere: other environments around it, other draws before, another default of randomisation.
    other = twins.make_env(name, 5, image_size=16, variant="standin")
    other.reset(seed=1)
    given = [None, *json.loads(text)]
    other.reset(options={"configurations": given})
    assert json.dumps(other.configurations()[1:]) == text
    padded = np.concatenate([np.zeros((1, 25, 7), np.float32), actions])
    for k, one in enumerate(first):
        again = other.step_chunk(padded[:, k : k + 1])
        for part in (
            "states",
            "privileged",
            "reward",
            "success",
            "terminated",
            "truncated",
            "mask",
        ):
            np.testing.assert_array_equal(getattr(again, part)[1:], getattr(one, part), part)
        for key, value in one.observation.items():
            np.testing.assert_array_equal(again.observation[key][1:], value, key)


@pytest.mark.parametrize("name", TASKS)
def test_every_change_is_drawn_recorded_scaled_and_switched(name):
    """Of each change alone: at 0 it is nominal, at 0.5 within half the range, and the others stay nominal."""
    parts = {
        "poses": lambda c: [c[thing.name] for thing in make_task(name).things],
        "joints": lambda c: c["joints"],
        "light": lambda c: [c["draw"]["light"], *c["draw"]["lamp"]],
        "camera": lambda c: list(c["draw"]["cameras"].values()),
        "colour": lambda c: list(c["draw"]["colours"].values()),
    }
    of_draw = set(randomise.CHANGES) - set(parts)
    parts |= {key: lambda c, key=key: c["draw"][key] for key in of_draw}
    assert set(parts) == set(randomise.CHANGES)

    def spread(scales, part):
        env = twins.make_env(name, 48, render=False, randomisation=scales)
        env.reset(seed=3)
        values = np.array([np.ravel(parts[part](c)) for c in env.configurations()])
        return np.ptp(values, axis=0).max()

    off = dict.fromkeys(randomise.CHANGES, 0.0)
    for change in randomise.CHANGES:
        if change == "latency":  # whole steps: half of the range is 0 or 1
            assert (
                spread(off | {change: 0.5}, change) == 1
                and spread(off | {change: 1.0}, change) == 2
            )
            continue
        full, half = spread(off | {change: 1.0}, change), spread(off | {change: 0.5}, change)
        assert full > 0 and half <= 0.8 * full, change
        assert spread(off, change) == 0, change
    everything = twins.make_env(name, 1, render=False, randomisation=off | {"mass": 1.0})
    everything.reset(seed=3)
    draw = everything.configurations()[0]["draw"]
    assert {**draw, "mass": 1.0, "colours": {}} == {
        key: value for key, value in randomise.TWIN.items() if key != "thing_colours"
    } | {"colours": {}}


def test_a_narrower_range_of_a_task_is_taken():
    scales = randomise.scales("full", {"action_noise": 0.5})
    assert scales["action_noise"] == 0.5 and scales["mass"] == 1.0
    assert randomise.scales({"action_noise": 0.5}, {"action_noise": 0.5})["action_noise"] == 0.25


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The document's example as an installed package with an entry point; its source."""
    text = (Path(__file__).parent.parent / "docs/tasks.md").read_text()
    (source,) = (
        b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "class CubeOnPlate" in b
    )
    (entry,) = re.findall(r"```toml\n(.*?)```", text, re.S)
    group, name, target = re.search(r'"(.+)"\]\n(\S+) = "(.+)"', entry).groups()
    module = target.partition(":")[0]
    path = tmp_path / (module.replace(".", "/") + ".py")
    path.parent.mkdir(parents=True)
    path.write_text(source)
    info = tmp_path / "my_tasks-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-tasks\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for loaded in [each for each in sys.modules if each.split(".")[0] == module.split(".")[0]]:
        del sys.modules[loaded]


def test_the_documented_example_is_a_task_of_another_package(example):
    assert example in task_names() and example not in TASKS
    for options in ({}, {"randomisation": "full"}):
        env = twins.make_env(example, 32, render=False, **options)
        env.reset(seed=4, options={"region": "all"})
        success, _ = run(env, env.expert)
        assert success.mean() >= 0.95
    images, _, labels = labelled_scenes(
        twins.make_env(example, 1, image_size=16), 40, np.random.default_rng(0)
    )
    assert images["side"].shape == (40, 16, 16, 3)
    assert 0.1 < (labels[:, env.privileged_names.index("held")] > 0.5).mean() < 0.6


def test_the_documented_example_runs_on_tensors(example):
    torch = pytest.importorskip("torch")
    env = twins.make_env(example, 3, render=False)
    env.reset(seed=0)
    one, now = env.task, env.snapshot()

    def tensor(array):
        given = torch.as_tensor(array)
        return given.float() if given.is_floating_point() else given

    there = type(now)(
        *({k: tensor(v) for k, v in p.items()} if isinstance(p, dict) else tensor(p) for p in now)
    )
    target, turn = env.targets()
    ours, theirs = one.expert(now, target, turn), one.expert(there, tensor(target), tensor(turn))
    np.testing.assert_allclose(theirs.numpy(), ours, atol=1e-5)
    np.testing.assert_allclose(one.privileged(there).numpy(), one.privileged(now), atol=1e-6)
    assert not one.success(there, torch.ones(3)).any() and not one.lost(there).any()


def test_the_documented_example_cannot_be_faked(example):
    env = twins.make_env(example, 2, render=False)
    everyone = np.arange(2)
    for height, sideways, gripper, good in (
        (0.0, 0.0, 1.0, True),
        (0.1, 0.0, 1.0, False),
        (0.0, 0.08, 1.0, False),
        (0.0, 0.0, 0.0, False),
    ):
        env.reset(seed=0)
        place = env.snapshot().position["plate"] + env.task.finish.position
        place = place + np.array([sideways, 0.0, height])
        env.simulation.place(everyone, "cube", place, np.tile(np.eye(3), (2, 1, 1)))
        assert (env.step_chunk(_idle(gripper)).success == good).all(), (height, sideways, gripper)
