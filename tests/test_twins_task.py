"""Pick-and-place: the expert solves it, nothing else counts as success, and twins can be retargeted."""

import numpy as np
import pytest

import twins
from twinrl.env import image_key
from twins import rotation
from twins.labels import labelled_scenes
from twins.retarget import Demonstration, Tracker, retarget
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


@pytest.fixture(scope="module")
def demonstrations():
    env = twins.make_env(num_envs=8, render=False)
    env.reset(seed=21, options={"region": "id"})
    success, history = run(env, env.expert)
    states, actions, mask = (
        np.concatenate([getattr(h, name) for h in history], axis=1)
        for name in ("states", "action", "mask")
    )
    return [
        Demonstration.of(states[i, mask[i]], actions[i, mask[i]], env.configurations()[i])
        for i in np.flatnonzero(success)
    ]


@pytest.mark.parametrize(
    ("options", "noise"),
    [({}, 0.0), ({"randomisation": "full"}, 0.2), ({"variant": "standin"}, 0.2)],
)
def test_demonstrations_of_one_half_succeed_retargeted_to_the_other(demonstrations, options, noise):
    env = twins.make_env(num_envs=48, render=False, **options)
    env.reset(seed=5, options={"region": "ood"})
    tracker = Tracker(env, demonstrations)
    tracker.begin()
    success, _ = run(env, lambda: tracker.actions(noise)[1])
    assert success.mean() >= 0.7


def test_a_demonstration_retargeted_to_itself_passes_through_its_own_grasp(demonstrations):
    shown = demonstrations[0]
    plan = retarget(shown, shown.configuration, task.PickAndPlace())
    grasp = int(np.flatnonzero(shown.gripper < 0.5)[0])
    gates = np.flatnonzero(plan.gates)
    np.testing.assert_allclose(plan.targets[gates[0]], shown.targets[grasp], atol=1e-12)
    np.testing.assert_allclose(plan.turns[gates[0]], shown.turns[grasp], atol=1e-12)
    assert plan.gripper[gates].tolist() == [1.0, 0.0, 0.0, 1.0]


def test_a_demonstration_without_a_grasp_is_refused(demonstrations):
    broken = demonstrations[0]._replace(gripper=np.ones(len(demonstrations[0].gripper)))
    with pytest.raises(ValueError, match="never grasps"):
        retarget(broken, broken.configuration, task.PickAndPlace())


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
