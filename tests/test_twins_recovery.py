"""What goes wrong in a simulation stays there, and long runs do not grow.

TWINRL_LONG=1 plays 2,000 rounds of resets and makes 2,000 scenes instead of 60 and 32; -s shows by how much they grew.
"""

import gc
import logging
import os
import subprocess
import sys

import numpy as np
import pytest

import twins
from twins.tasks import TASKS
from twins.tasks.task import TABLE

LONG = bool(os.environ.get("TWINRL_LONG"))
ROUNDS, SCENES = (2000, 2000) if LONG else (60, 32)
GROWTH = 2.0  # MiB that half a run may grow by
ENVS, BROKEN = 4, np.array([1])


def actions(seed, steps):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 0.02, (ENVS, steps, 7)).astype(np.float32)


def nan_joint(env):
    env.simulation.qpos[BROKEN, 2] = np.nan


def nan_thing(env):
    env.simulation.place(BROKEN, env.task.grasped, np.full((1, 3), np.nan), np.eye(3)[None])


def infinite_speed(env):
    env.simulation.push(BROKEN, env.task.grasped, np.array([[np.inf, 0.0, 0.0]]))


def huge_speed(env):
    env.simulation.push(BROKEN, env.task.grasped, np.array([[0.0, 1e7, 1e7]]))


def huge_joint_speed(env):
    env.simulation.qvel[BROKEN, :7] = 1e300


def in_the_hand(env):
    now = env.snapshot()
    env.simulation.place(BROKEN, env.task.grasped, now.tcp[BROKEN], np.eye(3)[None])


def in_the_goal(env):
    now = env.snapshot()
    goal = now.position[env.task.goal][BROKEN]
    env.simulation.place(BROKEN, env.task.grasped, goal, np.eye(3)[None])


def under_the_table(env):
    now = env.snapshot()
    deep = now.position[env.task.grasped][BROKEN] - [0.0, 0.0, 0.3]
    env.simulation.place(BROKEN, env.task.grasped, deep, np.eye(3)[None])


def arm_in_the_table(env):
    bent = np.array([[0.0, 1.6, 0.0, -0.4, 0.0, 2.0, 0.8]])
    env.simulation.place_arm(BROKEN, bent, 0.0)


FATAL = (nan_joint, nan_thing, infinite_speed, huge_speed, huge_joint_speed)
VIOLENT = (in_the_hand, in_the_goal, under_the_table, arm_in_the_table)


@pytest.mark.parametrize("name", sorted(TASKS))
@pytest.mark.parametrize("harm", [*FATAL, *VIOLENT], ids=lambda harm: harm.__name__)
def test_harm_to_one_simulation_stays_in_it_and_a_reset_mends_it(name, harm):
    env, calm = (twins.make_env(name, ENVS, render=False) for _ in range(2))
    for e in (env, calm):
        e.reset(seed=0)
        e.step_chunk(actions(1, 2))
    harm(env)
    result, other = env.step_chunk(actions(2, 4)), calm.step_chunk(actions(2, 4))
    for key, value in result.observation.items():
        assert np.isfinite(value).all(), key
    for value in (result.states, result.privileged, result.reward, result.action):
        assert np.isfinite(value).all()
    assert not result.success[BROKEN].any()
    if harm in FATAL:
        assert result.invalid.tolist() == [False, True, False, False]
        assert not result.mask[BROKEN].any() and result.done[BROKEN].all()
        assert env.invalid_episodes == 1
    others = np.array([0, 2, 3])
    assert not result.invalid[others].any()
    np.testing.assert_array_equal(result.states[others], other.states[others])
    np.testing.assert_array_equal(result.privileged[others], other.privileged[others])

    mask = np.arange(ENVS) == BROKEN
    env.reset(options={"reset_mask": mask})
    configurations = env.configurations()
    fresh = twins.make_env(name, ENVS, render=False)
    fresh.reset(options={"configurations": configurations})
    again, clean = env.step_chunk(actions(3, 6)), fresh.step_chunk(actions(3, 6))
    assert not again.invalid.any()
    np.testing.assert_array_equal(again.states[BROKEN], clean.states[BROKEN])
    np.testing.assert_array_equal(again.privileged[BROKEN], clean.privileged[BROKEN])


def test_mujoco_s_warnings_are_logged_and_leave_no_file(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    env = twins.make_env("pick-and-place", 32, render=False, threads=2)
    env.reset(seed=0)
    env.simulation.qpos[::2, 2] = np.nan
    with caplog.at_level(logging.WARNING, logger="twins"):
        result = env.step_chunk(np.zeros((32, 1, 7), np.float32))
    assert result.invalid.sum() == 16
    assert list(tmp_path.iterdir()) == []
    told = [record.getMessage() for record in caplog.records]
    assert any("unstable" in message for message in told)
    assert any("episodes of environments" in message for message in told)


# -- memory ----------------------------------------------------------------------------------------------------


def resident():
    """MiB of this process that are in memory."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def scene(i):
    """An environment with images that has been used a little; task and image size change with `i`."""
    name = sorted(TASKS)[i % len(TASKS)]
    env = twins.make_env(name, 2, image_size=16 + 8 * (i % 3), randomisation="full", seed=i)
    env.reset()
    env.step_chunk(env.expert()[:, None])
    return env


def growth(step, count):
    """MiB by which the process grew in the calmer half of `count` calls of `step`, after a warm-up.

    A leak grows in both halves; a kernel that is compiled for the first time does not.
    """
    warm = max(12, count // 4)
    marks = []
    for i in range(warm + count):
        if i in (warm, warm + count // 2):
            marks.append(resident())
        step(i)
    marks.append(resident())
    first, second = np.diff(marks)
    print(f"{count} times: {first:.2f} MiB in the first half, {second:.2f} MiB in the second")
    return min(first, second)


def resets():
    """Growth over resets with new draws, with images."""
    env = twins.make_env("erase-whiteboard", 4, image_size=16, randomisation="full")

    def play(i):
        env.reset(seed=i, options={"region": "all"})
        env.step_chunk(env.expert()[:, None])

    return growth(play, ROUNDS)


def divergences():
    """Growth over simulations that diverge."""
    logging.disable(logging.WARNING)
    env = twins.make_env("pick-and-place", 4, render=False)

    def diverge(i):
        env.reset(seed=i)
        env.simulation.qpos[:, i % 7] = np.nan
        assert env.step_chunk(actions(i, 1)).invalid.all()

    return growth(diverge, ROUNDS // 6)


def scenes():
    """Growth over scenes that are made and closed."""
    return growth(lambda i: scene(i).close(), SCENES)


def scenes_kept():
    """Growth over scenes that stay: a leak made on purpose."""
    kept = []
    return growth(lambda i: kept.append(scene(i)), 12)


def measured(what):
    """MiB, in a process of its own: what other tests have freed would be used again, and hide a leak."""
    command = [sys.executable, __file__, what.__name__]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=3000, check=False)
    assert ended.returncode == 0, ended.stderr
    print(ended.stdout)
    return float(ended.stdout.split()[-1])


@pytest.mark.timeout(3600 if LONG else 600)
@pytest.mark.parametrize("what", [resets, divergences, scenes])
def test_what_is_repeated_does_not_grow(what):
    assert measured(what) < GROWTH


def test_the_measure_would_see_scenes_that_stay():
    assert measured(scenes_kept) > GROWTH


def test_every_task_names_its_parts():
    for make in TASKS.values():
        names = {thing.name for thing in make.things} | {"gripper", "arm", TABLE}
        assert {make.grasped, make.goal} <= names
        assert {part for pair in make.contacts for part in pair} <= names
        for boxes in make.regions.values():
            assert set(boxes) == {thing.name for thing in make.things}


if __name__ == "__main__":
    print(globals()[sys.argv[1]]())
