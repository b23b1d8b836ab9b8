"""Simulations that fail under a rollout actor: a real worker killed for real, and evaluation that plays again."""

import os
import signal
import sys
import threading
import time

import numpy as np
import pytest

import twins
from actors.evaluate import RETRIES, evaluate
from actors.twin_actor import TwinActor
from twinrl.core.errors import TwinRLError
from twinrl.weights import Weights

ENVS, C = 4, 4


class StillRunner:
    """A policy that holds the arm where it is."""

    version = 0

    def adopt(self, weights, exactly=False):
        self.version = weights.version

    def seed(self, seed):
        pass

    def infer(self, observation, instruction, explore):
        actions = np.zeros((len(observation["observation.state"]), C, 7), np.float32)
        actions[..., 6] = 1.0
        return actions, {"log_prob": np.zeros(len(actions), "f4")}


class OneVersion:
    """Weights that were published once."""

    def wait(self, newer_than, timeout):
        return Weights(0, {}, 0, verified=True)

    def poll(self, newer_than):
        return None


class Kept:
    """A writer and reporter that keep what they get."""

    def __init__(self):
        self.segments, self.events = [], []

    def write(self, header, columns):
        self.segments.append((header, columns))

    def event(self, level, text):
        self.events.append((level, text))

    def stats(self):
        return {}

    def flush(self, timeout):
        pass

    def close(self):
        pass


@pytest.fixture
def kept():
    return Kept()


@pytest.fixture
def actor(kept):
    actor = TwinActor(
        "twin-0",
        seed=0,
        task="pick-and-place",
        num_envs=ENVS,
        make_env=lambda count, **options: twins.make_env(
            num_envs=count, python=sys.executable, render=False, max_steps=12, **options
        ),
        make_runner=StillRunner,
        make_writer=lambda name: kept,
        make_reader=lambda: None,
        make_reporter=lambda name, stats: kept,
        weights=OneVersion(),
    )
    yield actor
    actor.close()


def test_a_killed_simulator_costs_its_unfinished_segments_and_the_actor_goes_on(actor, kept):
    def kill():
        deadline = time.monotonic() + 60
        while actor.stats()["env/steps"] < 2 * ENVS * C and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(actor._env.simulation.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    told = {}
    collecting = threading.Thread(
        target=lambda: told.update(
            steps=actor.collect(start_version=0, steps=8000, round_chunks=2, max_lag=9999)
        )
    )
    collecting.start()
    killer.join(90)
    deadline = time.monotonic() + 120
    while not actor._invalid and time.monotonic() < deadline:
        time.sleep(0.02)
    before = len(kept.segments)
    while len(kept.segments) < before + 4 * ENVS and time.monotonic() < deadline:
        time.sleep(0.02)
    stats = actor.stats()
    actor.stop()
    collecting.join(120)
    assert not collecting.is_alive() and len(kept.segments) >= before + 4 * ENVS
    assert stats["env/invalid_episodes"] == ENVS and stats["worker/restarts"] == 1
    assert 0 <= stats["env/dropped_segments"] <= ENVS
    (level, text), *rest = [e for e in kept.events if "void" in e[1]]
    assert level == "warning" and "4 of 4 simulations failed" in text and not rest

    # Each episode's segments follow on each other without a gap, and only whole chunks were dropped.
    episodes = {}
    for header, columns in kept.segments:
        episodes.setdefault(header["episode"], []).append((header, columns))
    unfinished = [parts for parts in episodes.values() if not parts[-1][0]["last"]]
    for parts in episodes.values():
        at = 0
        for header, columns in parts:
            assert header["first_step"] == at
            at += len(columns["action"])
            assert np.isfinite(columns["observation.state"]).all()
    # Open are at most those that the kill, and at the end the stop, interrupted.
    assert len(unfinished) <= 2 * ENVS and len(episodes) > len(unfinished)


@pytest.mark.parametrize(("retry", "starts"), [(1.0, ENVS), (0.0, 4 * ENVS)])
def test_a_failed_start_is_tried_again_and_told_success_is_that_of_fresh_ones(
    actor, kept, retry, starts
):
    steps = 4 * 12 * ENVS  # four episodes in each environment
    actor.collect(start_version=0, steps=steps, round_chunks=1, max_lag=9999, retry=retry)
    ended = [header["configuration"] for header, _ in kept.segments if header["last"]]
    assert len(ended) == 4 * ENVS
    assert len({configuration["seed"] for configuration in ended}) == starts
    first = {region: sum(c["region"] == region for c in ended[:starts]) for region in ("id", "ood")}
    assert {region: len(results) for region, results in actor._recent.items()} == first
    assert not any(any(results) for results in actor._recent.values())


class Failing:
    """An environment whose simulation fails the first `times` times in the episode that starts from `n` = 1."""

    num_envs = 2

    def instructions(self):
        return ["hold"] * self.num_envs

    def __init__(self, times):
        self._env = twins.make_env(num_envs=2, render=False, max_steps=C)
        self._left = times

    def reset(self, **arguments):
        return self._env.reset(**arguments)

    def step_chunk(self, actions):
        found = self._env.step_chunk(actions)
        bad = np.array([c["seed"] == 1 for c in self._env.configurations()]) & found.done
        if not self._left or not bad.any():
            return found
        self._left -= 1
        return found._replace(invalid=bad, mask=found.mask & ~bad[:, None])


def test_evaluation_plays_again_what_its_simulation_failed():
    starts = [{"seed": seed, "region": "id"} for seed in range(5)]
    whole = evaluate(Failing(0), StillRunner(), starts)
    again = evaluate(Failing(RETRIES), StillRunner(), starts)
    np.testing.assert_array_equal(again.steps, whole.steps)
    np.testing.assert_array_equal(again.success, whole.success)
    assert (whole.steps == C).all()
    with pytest.raises(TwinRLError, match="failed 4 times"):
        evaluate(Failing(RETRIES + 1), StillRunner(), starts)
