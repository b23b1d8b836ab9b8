"""What a policy is told of the world: poses instead of images, with noise, in the arm's frame or from the hand."""

import numpy as np
import pytest

import twins
from deploy.description import world_options
from robot_bridge.driver import Commanded, make_driver
from robot_bridge.protocol import Job, make_job
from twinrl.core.errors import ConfigError
from twinrl.core.segment import Schema
from twinrl.env import PRIVILEGED, STATE
from twins import rotation
from twins.observe import STATE_NAMES, Poses
from twins.randomise import (
    CAMERA_SHIFT,
    FRICTION,
    LIGHT,
    MASS,
    MAX_LATENCY,
    POSE_NOISE,
    SERVO,
    STANDIN,
    nominal_of,
)
from twins.tasks import make_task

OWN = len(STATE_NAMES)
POSES = (
    *("object_x", "object_y", "object_z", "object_sin_2yaw", "object_cos_2yaw"),
    *("basket_x", "basket_y"),
)


def make(count=4, **options):
    return twins.make_env(num_envs=count, **options)


def column(env, name):
    return env.state_names.index(name)


def test_poses_follow_the_arms_own_numbers():
    """Without noise they are the privileged ones; the first numbers are those of a job with images."""
    env, plain = make(observe="state", seed=3), make(render=False, seed=3)
    observation, _ = env.reset(seed=5)
    other, _ = plain.reset(seed=5)
    assert env.cameras == () and set(observation) == {STATE, PRIVILEGED}
    assert env.state_names == STATE_NAMES + POSES
    known = [env.privileged_names.index(name) for name in POSES]
    chunk = np.stack([env.expert()] * 3, axis=1)
    for seen, unseen in (
        (observation, other),
        (env.step_chunk(chunk).observation, plain.step_chunk(chunk).observation),
    ):
        np.testing.assert_array_equal(seen[STATE][:, :OWN], unseen[STATE])
        np.testing.assert_allclose(seen[STATE][:, OWN:], seen[PRIVILEGED][:, known], atol=1e-6)
    assert env.single_observation_space[STATE].shape == (OWN + len(POSES),)
    env.close(), plain.close()


def test_relative_places_are_those_of_state_minus_the_measured_tool():
    """One says what the other does, noise included: turns are the same, places differ by the tool."""
    options = {"seed": 1, "randomisation": {"pose_noise": 1.0, "state_noise": 1.0}}
    absolute, relative = make(observe="state", **options), make(observe="relative", **options)
    a, _ = absolute.reset(seed=8)
    r, _ = relative.reset(seed=8)
    assert relative.state_dim == absolute.state_dim
    for thing, axes in (("object", "xyz"), ("basket", "xy")):
        for axis in axes:
            place = a[STATE][:, column(absolute, f"{thing}_{axis}")]
            tool = a[STATE][:, column(absolute, f"tcp_{axis}")]
            seen = r[STATE][:, column(relative, f"{thing}_from_hand_{axis}")]
            np.testing.assert_allclose(seen, place - tool, atol=1e-6)
    turn = column(absolute, "object_sin_2yaw")
    assert relative.state_names[turn] == "object_sin_2yaw"
    np.testing.assert_array_equal(a[STATE][:, turn], r[STATE][:, turn])
    absolute.close(), relative.close()


def test_noise_of_a_pose_is_white_and_of_the_configuration():
    """Its deviation is the draw's; each step and each thing has its own; a repeated episode has the same."""
    env = make(24, observe="state", variant="standin", seed=2)
    observation, _ = env.reset(seed=4)
    still = np.zeros((24, 30, 7), np.float32)
    still[:, :, 6] = 1.0
    step = env.step_chunk(still)
    seen = step.states[:, :, [column(env, name) for name in POSES]]
    true = step.privileged[:, :, [env.privileged_names.index(name) for name in POSES]]
    error = seen - true
    places = error[:, :, [0, 1, 2, 5, 6]]
    assert STANDIN["pose_noise"] == POSE_NOISE
    np.testing.assert_allclose(places.std(), POSE_NOISE, rtol=0.05)
    assert abs(places.mean()) < 0.1 * POSE_NOISE
    flat = places.reshape(-1, 5)
    mixed = np.corrcoef(flat.T) - np.eye(5)
    assert np.abs(mixed).max() < 0.15  # 720 numbers each
    following = np.corrcoef(places[:, 1:].ravel(), places[:, :-1].ravel())[0, 1]
    assert abs(following) < 0.06  # 3480 pairs
    # 6 mrad for each mm, and the angle is doubled.
    yaw = rotation.wrap(
        np.arctan2(seen[..., 3], seen[..., 4]) - np.arctan2(true[..., 3], true[..., 4]), 2 * np.pi
    )
    np.testing.assert_allclose(yaw.std(), 2 * 6 * POSE_NOISE, rtol=0.1)
    again, _ = env.reset(options={"configurations": env.configurations()})
    np.testing.assert_array_equal(again[STATE], observation[STATE])
    env.close()


def test_randomisation_draws_the_strength_and_privileged_numbers_stay_true():
    """Strengths fill their range; what a critic is told has no noise, whatever the policy sees."""
    env = make(128, observe="state", randomisation={"pose_noise": 1.0})
    observation, _ = env.reset(seed=0)
    drawn = np.array([c["draw"]["pose_noise"] for c in env.configurations()])
    assert 0 <= drawn.min() < 0.0005 and 0.0035 < drawn.max() <= POSE_NOISE
    true = env.snapshot().position["object"]
    np.testing.assert_allclose(observation[PRIVILEGED][:, :3], true, atol=1e-6)
    assert np.abs(observation[STATE][:, OWN : OWN + 3] - true).max() > 0.004
    env.close()


@pytest.mark.parametrize(
    "name", ["insert-hexagon-block", "insert-triple-column-block", "erase-whiteboard"]
)
def test_every_task_tells_the_poses_of_its_things(name):
    """Each thing has a place; velocities, contacts and progress are told to nobody but the critic."""
    spec = twins.describe(name, observe="state")
    task = make_task(name)
    told = spec.state_names[OWN:]
    for thing in task.things:
        assert {f"{thing.name}_x", f"{thing.name}_y"} <= set(told)
    assert set(told) < set(task.privileged_names)
    assert not any("_v" in n or "from" in n or n in ("held", "pressed", "wiped") for n in told)
    env = twins.make_env(name, 2, observe="state")
    observation, _ = env.reset(seed=0)
    known = [env.privileged_names.index(n) for n in told]
    np.testing.assert_allclose(
        observation[STATE][:, OWN:], observation[PRIVILEGED][:, known], atol=1e-6
    )
    env.close()


def test_mistakes_say_what_would_be_right():
    """A wrong word, cameras beside poses, a backend with its own observation, a task without poses."""
    with pytest.raises(ValueError, match="did you mean 'state'"):
        make(observe="stat")
    with pytest.raises(ValueError, match="no cameras, but cameras are"):
        make(observe="state", cameras=("side",))
    with pytest.raises(ValueError, match=r"task\.observe"):
        twins.describe("CartPole-v1", backend="gymnasium", observe="state")

    class Blind:
        name, things, privileged_names = "blind", make_task("pick-and-place").things, ("held",)

    with pytest.raises(ValueError, match="no privileged number"):
        Poses(Blind(), "state")


@pytest.mark.parametrize("observe", ["state", "relative"])
def test_the_simulated_arm_sends_what_the_twin_shows(observe):
    """The run's job says how things are seen, so the arm's features fit and the names are the twin's."""
    spec = twins.describe("pick-and-place", observe=observe)
    schema = Schema(len(spec.state_names), 14, spec.cameras, spec.image_size, 4)
    job = make_job(
        schema, {"run": "r", "task": "pick-and-place", "instruction": "i", "observe": observe}
    )
    assert Job.from_header(job.to_header()) == job
    driver = make_driver("sim", seed=1)
    driver.connect(job, 50.0)
    assert tuple(dimension.name for dimension in driver.dimensions) == spec.state_names
    driver.reset(None, "id")
    measured = driver.measure()
    rest = np.zeros(7, np.float32)
    observation = {STATE: driver.state(measured, Commanded(measured.pose, rest, rest))}
    assert set(observation) == {STATE}
    assert observation[STATE].shape == (schema.state_dim,)
    np.testing.assert_allclose(measured.pose, observation[STATE][:6], atol=0.06)
    driver.disconnect()


@pytest.mark.parametrize("observe", ["state", "relative"])
def test_poses_on_a_device_are_those_of_the_cpu(observe):
    """The same configurations give the same numbers, noise included, at a reset and after steps."""
    settings = {"seed": 5, "region": "all", "observe": observe, "randomisation": "full"}
    ours, theirs = make(3, backend="mujoco-warp", **settings), make(3, **settings)
    assert ours.state_names == theirs.state_names
    (first, _), (expected, _) = ours.reset(), theirs.reset()
    np.testing.assert_allclose(first[STATE], expected[STATE], atol=1e-4)
    assert first[STATE].dtype == np.float32 and first[STATE].shape == expected[STATE].shape
    chunk = np.stack([theirs.expert()] * 2, axis=1)
    one, two = ours.step_chunk(chunk), theirs.step_chunk(chunk)
    np.testing.assert_allclose(one.states, two.states, atol=1e-3)
    np.testing.assert_allclose(one.observation[STATE], one.states[:, -1])
    ours.close(), theirs.close()


def test_realities_lie_in_the_randomised_range_and_are_always_the_same():
    """Each number is a stand-in of its own, fixed for all of its episodes; wrong names say what there is."""
    first, other = (nominal_of(f"reality-{number}") for number in (1, 2))
    assert nominal_of("reality-1") == first != other and set(first) == set(STANDIN)
    for number in range(40):
        found = nominal_of(f"reality-{number}")
        assert found["latency"] in range(MAX_LATENCY + 1)
        for name, (low, high) in {"friction": FRICTION, "mass": MASS, "servo": SERVO}.items():
            assert low <= found[name] <= high
        assert LIGHT[0] <= found["light"] <= LIGHT[1] and 0 <= found["pose_noise"] <= POSE_NOISE
        for name, shift in CAMERA_SHIFT.items():
            assert np.linalg.norm(found["cameras"][name][:3]) <= shift
        assert np.abs(found["thing_colours"]).max() <= 0.03
    env = make(3, observe="state", variant="reality-1")
    env.reset(seed=0)
    draws = [configuration["draw"] for configuration in env.configurations()]
    assert all(draw["mass"] == pytest.approx(first["mass"]) for draw in draws)
    assert all(draw["latency"] == first["latency"] for draw in draws)
    env.close()
    with pytest.raises(ValueError, match="reality-NUMBER"):
        make(variant="reality-x")
    assert world_options("real-7") == {"variant": "reality-7"}
    with pytest.raises(ConfigError, match="unknown world 'reel'"):
        world_options("reel")
