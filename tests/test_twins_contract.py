"""One contract for every environment, whatever simulates it and in whichever process: a case is one line of CASES."""

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import twins
from twinrl.env import ACTION_DIM, PRIVILEGED, STATE, image_key

STANDINS = str(Path(__file__).parent / "standins")  # of simulators that cannot run everywhere
COUNT, CHUNK, SIZE = 3, 4, 32
SHORT = 6  # control steps of an episode in which every end is seen


class Case(NamedTuple):
    """A kind of environment."""

    name: str
    make: Callable[..., Any]  # make(count, seed=, max_steps=) -> Env
    repeatable: bool = True  # bit for bit, from seeds and configurations
    breaks: Callable[[Any], Any] | None = None  # makes environment 1 fail in its next step
    lost_together: bool = False  # `breaks` voids the others' episodes too: they share a process


def make(
    count: int = COUNT, *, task: str = "pick-and-place", backend: str = "mujoco", **more: Any
) -> Any:
    """An environment by the names of the configuration."""
    return twins.make_env(task, count, backend=backend, image_size=SIZE, **more)


def spoil_mujoco(env: Any) -> None:
    env.simulation.qpos[1, 3] = np.nan


def spoil_cartpole(env: Any) -> None:
    env._fleet._envs[1].unwrapped.state = np.full(4, np.nan)


def spoil_picture(env: Any) -> None:
    env._fleet._envs[1].unwrapped.wind[:] = np.inf


def kill_process(env: Any) -> None:
    os.kill(env._fleet._env.processes[1].pid, signal.SIGKILL)


def kill_worker(env: Any) -> None:
    os.kill(getattr(env, "simulation", env).pid, signal.SIGKILL)


OWN = {"python": sys.executable, "path": [STANDINS], "start_seconds": 300}
SERVED = {"options": {"worker": OWN}}
PICTURE = {"task": "picture_env:twinrl-test/Picture-v0", "backend": "gymnasium"}
CARTPOLE = {"task": "CartPole-v1", "backend": "gymnasium"}

CASES = [
    Case("mujoco", partial(make, cameras=("side",)), breaks=spoil_mujoco),
    Case(
        "mujoco randomised",
        partial(make, cameras=("wrist",), randomisation="full", region="all"),
        breaks=spoil_mujoco,
    ),
    Case(
        "mujoco with errands",
        partial(make, task="follow-instruction", cameras=("side",), region="all"),
        breaks=spoil_mujoco,
    ),
    Case(
        "mujoco in a worker",
        partial(make, cameras=("side",), **SERVED),
        breaks=kill_worker,
        lost_together=True,
    ),
    Case(
        "mujoco-warp",
        partial(make, backend="mujoco-warp", cameras=("side",), randomisation="full"),
        breaks=spoil_mujoco,
    ),
    Case(
        "mujoco-warp with errands",
        partial(make, task="follow-instruction", backend="mujoco-warp", cameras=("side",)),
        breaks=spoil_mujoco,
    ),
    Case("cartpole", partial(make, **CARTPOLE), breaks=spoil_cartpole),
    Case(
        "cartpole in processes",
        partial(make, **CARTPOLE, options={"vectorization": "async"}),
        breaks=kill_process,
        lost_together=True,
    ),
    Case("cartpole vectorised", partial(make, **CARTPOLE, options={"vectorization": "vector"})),
    Case("pendulum", partial(make, task="Pendulum-v1", backend="gymnasium")),
    Case("acrobot", partial(make, task="Acrobot-v1", backend="gymnasium")),
    Case("mountain car", partial(make, task="MountainCarContinuous-v0", backend="gymnasium")),
    Case(
        "pictures",
        partial(make, **PICTURE, cameras=("view", "render"), options={"privileged": ["wind"]}),
        breaks=spoil_picture,
    ),
    Case(
        "pictures in a worker",
        partial(make, **PICTURE, cameras=("view", "render"), options={"worker": OWN}),
        breaks=kill_worker,
        lost_together=True,
    ),
    Case(
        "isaac-gym's stand-in",
        partial(make, backend="isaac-gym", cameras=("side",), options={"pipeline": "gpu"}),
        repeatable=False,
    ),
    Case(
        "isaac-gym's stand-in in a worker",
        partial(make, backend="isaac-gym", cameras=("wrist",), **SERVED),
        repeatable=False,
        breaks=kill_worker,
        lost_together=True,
    ),
    Case(
        "isaac-lab's stand-in",
        partial(make, backend="isaac-lab", cameras=("side",)),
        repeatable=False,
    ),
    Case(
        "maniskill's stand-in",
        partial(make, backend="maniskill", cameras=("side",), options={"backend": "physx_cuda"}),
        repeatable=False,
    ),
]


def cases(which: Callable[[Case], bool]) -> Any:
    return pytest.mark.parametrize("case", list(filter(which, CASES)), ids=lambda case: case.name)


every = cases(lambda case: True)


@pytest.fixture(scope="module", autouse=True)
def standins():
    """The stand-ins under the simulators' names, for these tests alone."""
    before = set(sys.modules)
    sys.path.insert(0, STANDINS)
    yield
    sys.path.remove(STANDINS)
    for name, module in list(sys.modules.items()):
        if name not in before and (getattr(module, "__file__", None) or "").startswith(STANDINS):
            del sys.modules[name]


class Pair(NamedTuple):
    """Two equal environments that all tests of a case share: some take seconds to start."""

    env: Any
    other: Any
    first: list[Any]  # what their first resets gave


@pytest.fixture(scope="module")
def pairs(standins):
    """{case name: Pair}, filled as they are asked for."""
    found = {}
    yield found
    for pair in found.values():
        pair.env.close()
        pair.other.close()


@pytest.fixture
def pair(case, pairs):
    """The case's Pair."""
    if case.name not in pairs:
        env, other = case.make(seed=5), case.make(seed=5)
        pairs[case.name] = Pair(env, other, [env.reset(), other.reset()])
    return pairs[case.name]


def draw(env, seed, steps=CHUNK):
    """(N, steps, 7) float32 small actions."""
    low, high = (
        np.clip(edge, -1, 1) for edge in (env.single_action_space.low, env.single_action_space.high)
    )
    rng = np.random.default_rng(seed)
    centre, spread = (low + high) / 2, (high - low) / 4
    shape = (env.num_envs, steps, ACTION_DIM)
    return (centre + spread * rng.uniform(-1, 1, shape)).astype(np.float32)


def check_observation(env, observation):
    size = (env.image_size, env.image_size, 3)
    expected = {
        STATE: ((env.state_dim,), np.float32),
        PRIVILEGED: ((env.privileged_dim,), np.float32),
        **{image_key(camera): (size, np.uint8) for camera in env.cameras},
    }
    assert set(observation) == set(expected)
    for key, (shape, dtype) in expected.items():
        assert observation[key].shape == (env.num_envs, *shape), key
        assert observation[key].dtype == dtype, key
        assert np.isfinite(observation[key]).all(), key


def check_step(env, step, chunk):
    n = env.num_envs
    shapes = {
        "states": ((env.state_dim,), np.float32),
        "privileged": ((env.privileged_dim,), np.float32),
        "action": ((ACTION_DIM,), np.float32),
        "reward": ((), np.float32),
        **dict.fromkeys(("terminated", "truncated", "success", "mask"), ((), bool)),
    }
    for name, (shape, dtype) in shapes.items():
        value = np.asarray(getattr(step, name))
        assert value.shape == (n, chunk, *shape), name
        assert value.dtype == dtype, name
        assert np.isfinite(value).all(), name
        assert not value[~step.mask].any(), f"{name} is not zero where nothing was executed"
    check_observation(env, step.observation)
    assert not (step.terminated & step.truncated).any()
    ends = step.terminated | step.truncated
    assert (ends.sum(1) <= 1).all()
    lengths = step.mask.sum(1)
    np.testing.assert_array_equal(step.mask, np.arange(chunk) < lengths[:, None])
    invalid = np.zeros(n, bool) if step.invalid is None else step.invalid
    assert invalid.shape == (n,) and not (invalid & ends.any(1)).any()
    np.testing.assert_array_equal(step.done, invalid | ends.any(1))
    for i in np.flatnonzero(ends.any(1)):
        assert ends[i].argmax() == lengths[i] - 1, "nothing is executed after an end"
    for i in np.flatnonzero(lengths > 0):
        last = step.states[i, lengths[i] - 1]
        np.testing.assert_array_equal(step.observation[STATE][i], last)
        np.testing.assert_array_equal(
            step.observation[PRIVILEGED][i], step.privileged[i, lengths[i] - 1]
        )


def same(first, second, rows=slice(None)):
    """Two observations, or steps, are the same bit for bit in `rows`."""
    if not isinstance(first, dict):
        for name in ("states", "privileged", "action", "reward", "terminated", "truncated", "mask"):
            np.testing.assert_array_equal(
                getattr(first, name)[rows], getattr(second, name)[rows], name
            )
        first, second = first.observation, second.observation
    for key in first:
        np.testing.assert_array_equal(first[key][rows], second[key][rows], key)


@every
def test_what_comes_out_is_what_was_described(pair):
    env = pair.env
    spec = env.spec
    assert (len(spec.state_names), len(spec.privileged_names)) == (
        env.state_dim,
        env.privileged_dim,
    )
    assert (spec.cameras, spec.image_size) == (tuple(env.cameras), env.image_size)
    assert (spec.instruction, spec.max_steps) == (env.instruction, env.max_steps)
    assert spec.control_hz == env.control_hz > 0 and "id" in spec.regions
    assert env.num_envs == COUNT and env.instruction and env.max_steps > CHUNK
    observation, info = env.reset(seed=0)
    check_observation(env, observation)
    assert env.single_observation_space.contains({k: v[0] for k, v in observation.items()})
    assert info["configurations"] == env.configurations()
    told = env.instructions()
    assert len(told) == COUNT and all(isinstance(text, str) and text for text in told)
    step = env.step_chunk(draw(env, 0))
    assert env.instructions() == told
    check_step(env, step, CHUNK)
    assert step.mask.all() or step.done.any()
    for action in step.action[step.mask]:
        assert env.single_action_space.contains(action)
    assert (step.observation[STATE] != observation[STATE]).any()
    for camera in env.cameras:
        assert step.observation[image_key(camera)].std() > 0


@every
def test_an_episode_begins_with_a_reset_ends_once_and_stays_ended(case):
    env = case.make(max_steps=SHORT)
    assert env.max_steps == env.spec.max_steps == SHORT
    nothing = env.step_chunk(draw(env, 15, 2))
    assert not nothing.mask.any() and not nothing.done.any()
    env.reset(seed=1)
    chunk = SHORT - 2
    first = env.step_chunk(draw(env, 1, chunk))
    check_step(env, first, chunk)
    going = ~first.done
    assert going.any()
    second = env.step_chunk(draw(env, 2, chunk))
    check_step(env, second, chunk)
    assert second.done[going].all() and second.mask[going].sum(1).max() == 2
    assert second.truncated[going, 1].any()
    for _ in range(2):
        after = env.step_chunk(draw(env, 3, 2))
        assert not after.mask.any() and not after.done.any()
        same(after.observation, second.observation)
    env.close()
    env.close()


@every
def test_a_reset_of_a_part_leaves_the_others_alone(case, pair):
    env, calm = pair.env, pair.other
    for e in (env, calm):
        e.reset(seed=2)
        before = e.step_chunk(draw(e, 4, 2))
    mask = np.array([False, True, False])
    untouched = env.configurations()
    observation, info = env.reset(options={"reset_mask": mask, "region": "id"})
    check_observation(env, observation)
    same(observation, before.observation, ~mask) if case.repeatable else None
    after = env.configurations()
    assert info["configurations"] == after
    assert [a == b for a, b in zip(after, untouched, strict=True)] == [True, False, True]
    assert (observation[STATE][1] != before.observation[STATE][1]).any()
    step, expected = env.step_chunk(draw(env, 5)), calm.step_chunk(draw(calm, 5))
    check_step(env, step, CHUNK)
    if case.repeatable:
        same(step, expected, ~mask)
    nobody, _ = env.reset(options={"reset_mask": np.zeros(COUNT, bool)})
    same(nobody, step.observation)


@every
def test_what_is_given_out_is_not_written_to_again(pair):
    env = pair.env
    observation, _ = env.reset(seed=3)
    kept = {key: value.copy() for key, value in observation.items()}
    step = env.step_chunk(draw(env, 6, 2))
    states, seen = step.states.copy(), {k: v.copy() for k, v in step.observation.items()}
    env.step_chunk(draw(env, 7, 2))
    env.reset(seed=4)
    same(observation, kept)
    same(step.observation, seen)
    np.testing.assert_array_equal(step.states, states)


@every
def test_seeds_repeat_and_differ(case, pair):
    (observation, info), (second, also) = pair.first
    assert info == also
    assert len({json.dumps(c, sort_keys=True) for c in info["configurations"]}) == COUNT
    env, other = pair.env, pair.other
    other.reset()
    again, repeated = env.reset(seed=11)
    third, too = other.reset(seed=11)
    assert repeated == too != info
    assert (observation[STATE] != again[STATE]).any()
    if case.repeatable:
        same(observation, second)
        same(again, third)
        same(env.step_chunk(draw(env, 8)), other.step_chunk(draw(other, 8)))


@every
def test_a_configuration_is_plain_and_repeats_its_episode(case, pair):
    env = pair.env
    first, info = env.reset(seed=6)
    step = env.step_chunk(draw(env, 9))
    configurations = json.loads(json.dumps(info["configurations"]))
    assert configurations == info["configurations"]
    # In another place, beside others, among fewer.
    other = case.make(2, seed=77)
    other.reset()
    other.step_chunk(draw(other, 10, 2))
    mask = np.array([False, True])
    again, _ = other.reset(
        options={"reset_mask": mask, "configurations": [None, configurations[0]]}
    )
    assert other.configurations()[1] == configurations[0]
    actions = draw(other, 10)
    actions[1] = draw(env, 9)[0]
    repeated = other.step_chunk(actions)
    if case.repeatable:
        for key in (STATE, PRIVILEGED):
            np.testing.assert_array_equal(first[key][0], again[key][1])
        np.testing.assert_array_equal(step.states[0], repeated.states[1])
        for key, value in step.observation.items():
            np.testing.assert_array_equal(value[0], repeated.observation[key][1], key)
        np.testing.assert_array_equal(step.reward[0], repeated.reward[1])
    other.close()


@every
def test_a_configuration_repeats_what_is_asked(pair):
    env, other = pair.env, pair.other
    env.reset(seed=4)
    told, given = env.instructions(), json.loads(json.dumps(env.configurations()))
    other.reset(seed=5)
    other.reset(options={"configurations": given})
    assert other.instructions() == told
    mask = np.array([False, True, False])
    other.reset(options={"reset_mask": mask, "configurations": [None, given[0], None]})
    assert other.instructions() == [told[0], told[0], told[2]]


@cases(lambda case: case.repeatable)
def test_chunks_are_cut_as_one_likes(pair):
    env, other = pair.env, pair.other
    actions = draw(env, 12, 6)
    env.reset(seed=7)
    other.reset(seed=7)
    whole = env.step_chunk(actions)
    parts = [other.step_chunk(actions[:, a:b]) for a, b in ((0, 1), (1, 4), (4, 6))]
    for name in ("states", "privileged", "action", "reward", "mask"):
        joined = np.concatenate([getattr(part, name) for part in parts], axis=1)
        np.testing.assert_array_equal(getattr(whole, name), joined, name)
    same(whole.observation, parts[-1].observation)


@every
def test_nonsense_is_refused_by_name_and_changes_nothing(pair):
    env = pair.env
    observation, _ = env.reset(seed=8)
    broken = draw(env, 13)
    broken[1, 2, 3] = np.nan
    broken[2, 0, 0] = np.inf
    with pytest.raises(ValueError, match=r"\[1, 2\].*not finite"):
        env.step_chunk(broken)
    for shape in ((COUNT, ACTION_DIM), (COUNT, 2, ACTION_DIM + 1), (COUNT + 1, 2, ACTION_DIM)):
        with pytest.raises(Exception, match="expected"):
            env.step_chunk(np.zeros(shape, np.float32))
    nobody, _ = env.reset(options={"reset_mask": np.zeros(COUNT, bool)})
    same(observation, nobody)
    assert env.step_chunk(draw(env, 14)).mask.any()


@cases(lambda case: case.breaks is not None)
def test_a_failure_is_told_voids_the_episode_and_goes_by(case, pair):
    env, calm, failed = pair.env, pair.other, pair.env.invalid_episodes
    for e in (env, calm):
        e.reset(seed=9)
        before = e.step_chunk(draw(e, 16, 2))
    case.breaks(env)
    step, expected = env.step_chunk(draw(env, 17)), calm.step_chunk(draw(calm, 17))
    check_step(env, step, CHUNK)
    hit = np.ones(COUNT, bool) if case.lost_together else np.array([False, True, False])
    assert step.invalid.tolist() == hit.tolist()
    assert not step.mask[hit].any()
    same(step.observation, before.observation, hit)  # the last good ones
    if case.repeatable:
        same(step, expected, ~hit)
    assert env.invalid_episodes - failed == hit.sum()
    assert not env.step_chunk(draw(env, 18, 1)).done[hit].any(), "said once"
    env.reset(options={"reset_mask": hit})
    again = env.step_chunk(draw(env, 19))
    check_step(env, again, CHUNK)
    assert again.mask[hit].any(1).all() and not again.invalid.any()
