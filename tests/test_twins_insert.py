"""The insertions: experts solve them and take over anywhere, nothing else counts as success, clearances are as said."""

import math

import numpy as np
import pytest
import torch

import twins
from twinrl.env import image_key
from twins import rotation
from twins.snapshot import Snapshot
from twins.tasks.insertion import TOUCH

HEXAGON, COLUMNS = "insert-hexagon-block", "insert-triple-column-block"
BOTH = pytest.mark.parametrize("task", [HEXAGON, COLUMNS])
COUNT = 32


def make(task, count=2, **options):
    return twins.make_env(task, count, render=False, **options)


def run(env, act, steps=100):
    """Play to the end; returns success (N,) and the lengths of the episodes (N,)."""
    history = []
    for _ in range(steps):
        if env.done.all():
            break
        history.append(env.step_chunk(act()[:, None]))
    success, mask = (
        np.concatenate([getattr(h, name) for h in history], axis=1) for name in ("success", "mask")
    )
    return success.any(axis=1), mask.sum(axis=1)


def idle(env, steps=1, gripper=1.0):
    action = np.zeros((env.num_envs, steps, 7), np.float32)
    action[..., 6] = gripper
    return action


def put(env, offset, lean=0.0, yaw=0.0, velocity=(0.0, 0.0, 0.0)):
    """Put the block at `offset` (m) from where it is inserted, in the socket's frame, leaning and turned (rad)."""
    everyone, now = np.arange(env.num_envs), env.snapshot()
    turn = now.turn["socket"] @ rotation.about_z(yaw) @ rotation.exp(np.array([lean, 0.0, 0.0]))
    foot = env.task.finish.position[2]
    offset = rotation.apply(now.turn["socket"], np.add(offset, [0.0, 0.0, foot]))
    env.simulation.place(everyone, "block", now.position["socket"] + offset, turn)
    env.simulation.push(everyone, "block", velocity)


def symmetry(env):
    return 2 * math.pi / env.task.finish.turns


@BOTH
@pytest.mark.parametrize(
    ("options", "region", "least"),
    [
        ({}, "id", 0.95),
        ({}, "ood", 0.95),
        ({"randomisation": "full"}, "all", 0.9),
        ({"variant": "standin"}, "all", 0.9),
    ],
)
def test_the_expert_succeeds(task, options, region, least):
    env = make(task, COUNT, **options)
    env.reset(seed=11, options={"region": region})
    success, lengths = run(env, env.expert)
    assert success.mean() >= least
    assert np.median(lengths) < 60


@BOTH
def test_the_expert_is_a_function_of_the_state_and_takes_over_anywhere(task):
    env = make(task, COUNT, max_steps=150)
    env.reset(seed=1, options={"region": "all"})
    rng = np.random.default_rng(0)
    env.step_chunk(rng.normal(0, 0.03, (COUNT, 12, 7)).astype(np.float32))
    np.testing.assert_array_equal(env.expert(), env.expert())
    success, _ = run(env, lambda: env.expert(noise=0.2), steps=150)
    assert success.mean() >= 0.9


@BOTH
def test_the_expert_takes_over_with_the_block_askew_in_the_hand(task):
    env = make(task, COUNT, max_steps=150)
    env.reset(seed=3, options={"region": "all"})
    for _ in range(20):
        env.step_chunk(env.expert()[:, None])
    wild = np.random.default_rng(0).normal(0, [0.03] * 3 + [0.2] * 3 + [0], (COUNT, 6, 7))
    env.step_chunk(wild.astype(np.float32))
    success, _ = run(env, env.expert, steps=120)
    assert success.mean() >= 0.85


@BOTH
def test_the_expert_takes_over_a_block_that_stands_on_the_rim(task):
    env = make(task, COUNT, max_steps=150)
    env.reset(seed=3, options={"region": "all"})
    rng = np.random.default_rng(0)
    aside = rng.uniform(-0.006, 0.006, (COUNT, 2))
    height = np.full(COUNT, env.task.rim + 0.001)
    put(env, np.column_stack([aside, height]), yaw=rng.uniform(-0.3, 0.3, COUNT))
    fell_in = env.step_chunk(idle(env, 3)).success.any(axis=1)
    success, _ = run(env, env.expert, steps=150)
    assert fell_in.mean() < 0.3
    assert (success | fell_in).mean() >= 0.85


def test_the_expert_stands_a_tipped_hexagon_up():
    env = make(HEXAGON, COUNT, max_steps=150)
    env.reset(seed=3, options={"region": "all"})
    rng, everyone = np.random.default_rng(0), np.arange(COUNT)
    low, high = [0.4, -0.25, 0.028], [0.55, 0.25, 0.028]
    lying = rotation.exp(np.array([math.pi / 2, 0.0, 0.0]))
    turn = rotation.about_z(rng.uniform(-math.pi, math.pi, COUNT)) @ lying
    env.simulation.place(everyone, "block", rng.uniform(low, high, (COUNT, 3)), turn)
    success, _ = run(env, env.expert, steps=150)
    assert success.mean() >= 0.75


@BOTH
def test_an_inserted_block_is_success_at_every_angle_that_fits(task):
    env = make(task)
    for k in range(env.task.finish.turns):
        env.reset(seed=k)
        put(env, (0.0, 0.0, 0.0), yaw=k * symmetry(env))
        assert env.step_chunk(idle(env)).success.all()


def test_a_hexagon_is_inserted_either_way_up_and_columns_only_downwards():
    for task, fits in ((HEXAGON, True), (COLUMNS, False)):
        env = make(task)
        env.reset(seed=0)
        put(env, (0.0, 0.0, 0.0 if fits else 0.06), lean=math.pi)
        assert env.step_chunk(idle(env, 8)).success.any(axis=1).tolist() == [fits] * 2


@BOTH
@pytest.mark.parametrize("direction", [(1, 0), (0, 1), (-1, 0), (0, -1)])
def test_the_clearance_is_three_quarters_of_a_millimetre(task, direction):
    for aside, fits in ((0.0006, True), (0.0022, False)):
        env = make(task)
        env.reset(seed=0)
        put(env, (aside * direction[0], aside * direction[1], env.task.rim + 0.001))
        result = env.step_chunk(idle(env, 12))
        assert result.success.any(axis=1).tolist() == [fits] * 2


@BOTH
@pytest.mark.parametrize(
    ("offset", "lean", "turned", "velocity", "gripper"),
    [
        ((0.0, 0.0, 0.4), 0.0, 0.0, (0.0, 0.0, 0.0), 1.0),  # hovering over it
        ((0.0, 0.0, 0.0), 0.0, 0.0, (0.0, 0.0, 2.0), 1.0),  # thrown upwards out of it
        ((-0.1, 0.0, 0.06), 0.0, 0.0, (1.2, 0.0, 0.4), 1.0),  # thrown across it
        ((0.16, 0.0, 0.0), 0.0, 0.0, (0.0, 0.0, 0.0), 1.0),  # beside it
        (
            (0.0, 0.0, 0.031),
            0.0,
            0.5,
            (0.0, 0.0, 0.0),
            1.0,
        ),  # on top, turned so that it does not fit
        ((0.0, 0.0, 0.08), 0.0, 0.5, (0.0, 0.0, 0.0), 1.0),  # dropped onto it like that
        ((0.0, 0.012, 0.04), 0.3, 0.0, (0.0, 0.0, 0.0), 1.0),  # tilted on top
        ((0.0, 0.0, 0.0), 0.0, 0.0, (0.0, 0.0, 0.0), 0.0),  # inserted, but the gripper is closing
    ],
)
def test_success_cannot_be_faked(task, offset, lean, turned, velocity, gripper):
    env = make(task)
    env.reset(seed=0)
    put(env, offset, lean, turned * symmetry(env), velocity)
    result = env.step_chunk(idle(env, 2, gripper))
    assert not result.success.any() and not result.reward.any()
    if turned or lean:  # it stays where it is and never becomes one
        assert not env.step_chunk(idle(env, 12)).success.any()


@BOTH
def test_what_stands_in_the_hole_must_be_straight_down_still_and_free(task):
    env = make(task)
    env.reset(seed=0)
    put(env, (0.0, 0.0, 0.0))
    env.step_chunk(idle(env))
    now, task, one = env.snapshot(), env.task, np.ones(2)
    assert task.success(now, one).all()
    block, turn, still = now.position["block"], now.turn["block"], now.velocity["block"]

    def moved(*shift):
        return now._replace(position={**now.position, "block": block + shift})

    def moving(i, speed):
        return now._replace(velocity={"block": still + speed * np.eye(6)[i]})

    leaning = turn @ rotation.exp(np.array([0.0, 0.06, 0.0]))
    fakes = {
        "half in": moved(0.0, 0.0, 0.5 * task.rim),
        "almost in": moved(0.0, 0.0, 0.004),
        "through the table": moved(0.0, 0.0, -0.01),
        "aside": moved(0.004, 0.0, 0.0),
        "leaning": now._replace(turn={**now.turn, "block": leaning}),
        "falling": moving(2, -0.1),
        "sliding": moving(0, 0.05),
        "spinning": moving(5, 2.0),
        "between the fingers": now._replace(width=0.0 * now.width + task.grasp.width),
        "touched": now._replace(contact={TOUCH: np.ones(2, bool)}),
    }
    for name, fake in fakes.items():
        assert not task.success(fake, one).any(), name
    assert not task.success(now, 0.3 * one).any()


@BOTH
def test_a_block_held_in_the_hole_is_no_success_until_it_is_let_go(task):
    env = make(task, max_steps=200)
    env.reset(seed=0)
    low = np.zeros(2, bool)
    for _ in range(70):
        low = env.task.inserted(env.snapshot())
        if low.all():
            break
        action = env.expert()
        # One that has arrived waits for the other, and keeps hold of its block.
        action[low] = 0.0
        assert not env.step_chunk(action[:, None]).success.any()
    assert low.all()
    held = env.step_chunk(idle(env, 6, gripper=0.0))
    assert env.task.held(env.snapshot()).all() and not held.success.any()
    success, _ = run(env, env.expert, steps=12)
    assert success.all()


@BOTH
def test_a_lost_block_ends_the_episode_as_a_failure(task):
    env = make(task)
    env.reset(seed=0)
    away = np.array([[0.5, 0.7, env.task.finish.position[2]]])
    env.simulation.place(np.array([0]), "block", away, np.eye(3)[None])
    result = env.step_chunk(idle(env))
    assert result.terminated[:, 0].tolist() == [True, False]
    assert not result.success.any() and not result.truncated.any()


@BOTH
def test_an_episode_repeats_bit_for_bit_from_its_configuration(task):
    env = make(task, 3, randomisation="full")
    env.reset(seed=5, options={"region": "all"})
    configuration = env.configurations()[2]
    actions = []
    for _ in range(40):
        actions.append(env.expert())
        result = env.step_chunk(actions[-1][:, None])
    other = make(task, 1, randomisation="full")
    other.reset(options={"configurations": [configuration]})
    for action in actions:
        again = other.step_chunk(action[2:, None])
    np.testing.assert_array_equal(
        again.observation["observation.state"][0], result.observation["observation.state"][2]
    )
    np.testing.assert_array_equal(
        other.snapshot().position["block"][0], env.snapshot().position["block"][2]
    )


@BOTH
def test_regions_are_the_two_halves_of_the_table(task):
    env = make(task, 40)
    for region, side in (("id", -1), ("ood", 1)):
        env.reset(seed=0, options={"region": region})
        blocks, sockets = (
            np.array([c[n] for c in env.configurations()]) for n in ("block", "socket")
        )
        assert (side * blocks[:, 1] > 0).all()
        assert (np.linalg.norm((blocks - sockets)[:, :2], axis=1) > 0.15).all()
        assert np.ptp(blocks[:, 2]) > 0.8 and np.ptp(sockets[:, 2]) > 0.8


def _states(task):
    """Snapshots from all phases of an episode with the commanded poses and openings, in one batch."""
    env = make(task, 16)
    env.reset(seed=2, options={"region": "all"})
    found = []
    for _ in range(36):
        action = env.expert()
        found.append((env.snapshot(), *env.targets(), action[:, 6].astype(float)))
        env.step_chunk(action[:, None])
    parts = list(zip(*found, strict=True))
    return (
        env.task,
        Snapshot(*(_joined(p) for p in zip(*parts[0], strict=True))),
        *map(_joined, parts[1:]),
    )


def _joined(parts):
    if isinstance(parts[0], dict):
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    return np.concatenate(parts)


def _torch(value, dtype):
    if isinstance(value, dict):
        return {name: _torch(v, dtype) for name, v in value.items()}
    tensor = torch.from_numpy(np.ascontiguousarray(value))
    return tensor if tensor.dtype == torch.bool else tensor.to(dtype)


@BOTH
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_tensors_get_the_same_answers_as_arrays(task, dtype, near):
    task, now, target, turn, gripper = _states(task)
    tensors = Snapshot(*(_torch(part, dtype) for part in now))
    given, given_turn, opening = (_torch(v, dtype) for v in (target, turn, gripper))
    assert task.success(now, gripper).any() and not task.success(now, gripper).all()
    np.testing.assert_array_equal(task.success(tensors, opening), task.success(now, gripper))
    np.testing.assert_array_equal(task.lost(tensors), task.lost(now))
    privileged = task.privileged(tensors)
    assert privileged.dtype == torch.float32
    assert privileged.shape[1] == len(task.privileged_names)
    np.testing.assert_allclose(privileged, task.privileged(now), atol=max(near, 1e-6))
    terms = task.terms(tensors, opening)
    assert set(terms) == set(task.term_names)
    for name, value in task.terms(now, gripper).items():
        assert value.min() >= 0.0 and value.max() <= 1.0
        np.testing.assert_allclose(terms[name], value, atol=10 * near)
    expert = task.expert(tensors, given, given_turn)
    assert expert.dtype == dtype
    off = np.abs(expert.numpy() - task.expert(now, target, turn)).max(axis=1) > 10 * near
    # With seven digits a state may fall on the other side of one of the expert's thresholds.
    assert off.mean() <= (0.0 if dtype == torch.float64 else 0.01)


@BOTH
def test_terms_rise_to_one_and_privileged_numbers_do_not_see_the_symmetry(task):
    env = make(task, 1)
    env.reset(seed=0)
    start = env.task.terms(env.snapshot(), np.ones(1))
    assert start["insert"] == start["align"] == start["grasp"] == 0.0
    seen = []
    for k in range(2):
        put(env, (0.0, 0.0, 0.0), yaw=k * symmetry(env))
        seen.append(env.task.privileged(env.snapshot()))
    np.testing.assert_allclose(seen[0], seen[1], atol=1e-5)
    end = env.task.terms(env.snapshot(), np.ones(1))
    assert end["insert"] > 0.99 and end["align"] > 0.99


@BOTH
def test_block_and_hole_are_seen_at_64_pixels(task):
    env = twins.make_env(task, 8)
    observation, _ = env.reset(seed=0, options={"region": "all"})
    for image in observation[image_key("side")].astype(int):
        red, green, blue = np.moveaxis(image, -1, 0)
        block = red > 2.5 * blue if task == HEXAGON else green > 1.4 * red
        hole, walls = image.max(axis=-1) < 50, (blue > 150) & (red > 130)
        assert block.sum() >= 12 and walls.sum() >= 15
        rows, columns = np.nonzero(hole)
        assert len(rows) >= 3 and len(columns) >= 3
