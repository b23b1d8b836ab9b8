"""Deterministic returns of a policy while it trains, the same way for every side of experiments/baselines.py.

Imports numpy and gymnasium only: the peers' environments (benchmarks/peers) load it too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

Act = Callable[[np.ndarray], np.ndarray]  # observations (N, O) float32 -> actions (N, A), noise off

RESETS = 777_000  # seed of the first evaluated reset; disjoint from training
POINTS = 20  # of a curve
EPISODES = 10  # evaluated at each point
FINAL_EPISODES = 50


def play(env_id: str, act: Act, episodes: int, envs: int = 10) -> np.ndarray:
    """Undiscounted returns (episodes,) of `act` from the resets that all policies are evaluated on."""
    returns = []
    for first in range(0, episodes, envs):
        count = min(envs, episodes - first)
        fleet = gymnasium.make_vec(env_id, num_envs=count, vectorization_mode="sync")
        seeds = [RESETS + first + i for i in range(count)]
        observation, _ = fleet.reset(seed=seeds)
        total, playing = np.zeros(count), np.ones(count, bool)
        while playing.any():
            actions = act(observation.astype(np.float32))
            observation, reward, terminated, truncated, _ = fleet.step(actions)
            total += np.where(playing, reward, 0.0)
            playing &= ~(terminated | truncated)  # what follows an end is the next episode's
        fleet.close()
        returns.append(total)
    return np.concatenate(returns)


def random_returns(env_id: str, episodes: int = 100) -> np.ndarray:
    """Returns (episodes,) of actions drawn uniformly from the action space."""
    space = gymnasium.make(env_id).action_space
    rng = np.random.default_rng(0)

    def act(observation: np.ndarray) -> np.ndarray:
        shape = (len(observation), *space.shape)
        return rng.uniform(space.low, space.high, shape).astype(np.float32)

    return play(env_id, act, episodes)


class LearningCurve:
    """Mean return over steps and seconds. Seconds are the process's own time on its one thread, evaluation left out.

    On an idle core they are the wall clock; on a shared one they still say what a run costs.
    """

    def __init__(self, env_id: str, steps: int, points: int = POINTS) -> None:
        """A run of `steps` environment steps is measured at `points` even distances."""
        self.env_id, self.steps = env_id, steps
        self._marks = np.linspace(0, steps, points + 1)[1:]
        self._measured = 0
        self._seconds, self._since = 0.0, time.process_time()
        self.rows: list[tuple[int, float, float]] = []

    def update(self, done: int, act: Act) -> None:
        """After `done` environment steps: measure `act` if a mark was passed."""
        if self._measured == len(self._marks) or done < self._marks[self._measured]:
            return
        self._measured = int(np.searchsorted(self._marks, done, side="right"))
        self._stop()
        score = float(play(self.env_id, act, EPISODES).mean())
        self.rows.append((int(done), self._seconds, score))
        share = done / self.steps
        print(
            f"  {share:4.0%}  {done:>8} steps  {self._seconds:6.1f} s  return {score:9.2f}",
            flush=True,
        )
        self._since = time.process_time()

    def result(self, act: Act) -> dict[str, Any]:
        """The trained policy's `returns`, the training's `seconds`, and the `curve` [[steps, seconds, return]]."""
        self._stop()
        returns = play(self.env_id, act, FINAL_EPISODES)
        return {
            "returns": [float(value) for value in returns],
            "seconds": self._seconds,
            "curve": [list(row) for row in self.rows],
        }

    def _stop(self) -> None:
        self._seconds += time.process_time() - self._since
        self._since = time.process_time()
