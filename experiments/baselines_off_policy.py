"""Our off-policy learner from nothing, for experiments/baselines.py: ChunkQ with chunks of one step and nothing to imitate.

What acts is the one-step actor, without a distance to keep (`bc_weight` 0) and with exploration noise; critics are as in
stage 3, an ensemble with LayerNorm whose targets are n-step returns. Time limits bootstrap: these tasks go on.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch

from experiments.learning_curve import LearningCurve
from learner.algorithms.chunk_q import ChunkQ, ChunkQConfig
from learner.features import FeatureCache
from policies.registry import make_policy
from twinrl.env import STATE

SETTINGS: dict[str, Any] = {
    "random": 300,  # steps of random play at the start, which also say what states look like
    "hidden": 128,
    "critics": 4,
    "horizon": 3,  # steps of a return before it bootstraps
    "span": 10,  # steps of random play whose rewards are one unit of value
    "batch": 128,
    "updates": 1,  # for each step
    "algorithm": {
        "improvement": "one_step",
        "bc_weight": 0.0,
        "exploration": 0.2,
        "gamma": 0.98,
        "critic_learning_rate": 1e-3,
        "one_step_learning_rate": 3e-4,
        "tau": 0.01,
        "actor_every": 1,
        "actor_warmup": 300,
        "timeout_is_terminal": False,
        "reward_bounds": (-np.inf, np.inf),
    },
}


class Transitions:
    """Steps of one environment in order, drawn as windows of up to `horizon` steps."""

    def __init__(self, capacity: int, state_dim: int, action_dim: int, horizon: int, seed: int):
        self._state, self._following = np.zeros((2, capacity, state_dim), np.float32)
        self._action = np.zeros((capacity, 1, action_dim), np.float32)
        self._reward = np.zeros(capacity, np.float32)
        self._terminated, self._truncated, self._last = np.zeros((3, capacity), bool)
        self._horizon, self._size = horizon, 0
        self.reward_scale = 1.0  # what rewards are divided by when they are drawn
        self._rng = np.random.default_rng(seed)

    def add(
        self,
        state: np.ndarray,
        action: np.ndarray,
        reward: float,
        following: np.ndarray,
        terminated: bool,
        truncated: bool,
    ) -> None:
        """One step."""
        i = self._size
        self._state[i], self._following[i], self._action[i, 0] = state, following, action
        self._reward[i], self._terminated[i], self._truncated[i] = reward, terminated, truncated
        self._last[i] = terminated or truncated
        self._size += 1

    def mean_reward(self) -> float:
        """Mean size of the rewards so far."""
        return float(np.abs(self._reward[: self._size]).mean())

    def sample(self, count: int) -> dict[str, np.ndarray]:
        """A batch for ChunkQ.update; windows end where the episode does, or where it stands."""
        first = self._rng.integers(self._size, size=count)
        rows = np.minimum(first[:, None] + np.arange(self._horizon), self._size)
        ended = np.cumsum(self._last[np.minimum(rows, self._size - 1)], axis=1)
        inside = np.concatenate([np.ones((count, 1), bool), ended[:, :-1] == 0], axis=1)
        inside &= rows < self._size
        rows = np.minimum(rows, self._size - 1)
        steps = inside.sum(1)
        final = first + steps - 1
        return {
            STATE: self._state[first],
            "next." + STATE: self._following[final],
            "action": self._action[first],
            "reward": self._reward[rows] * inside / self.reward_scale,
            "step_mask": inside,
            "steps": steps,
            "terminated": self._terminated[final],
            "truncated": self._truncated[final],
        }


def train(
    env_id: str, seed: int, steps: int, settings: dict[str, Any] | None = None
) -> dict[str, Any]:
    """{"returns", "seconds", "curve"} of one run on one thread, see LearningCurve."""
    settings = {**SETTINGS, **(settings or {})}
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    curve = LearningCurve(env_id, steps)
    env = gymnasium.make(env_id)
    low, high = env.action_space.low, env.action_space.high
    replay = Transitions(steps, env.observation_space.shape[0], len(low), settings["horizon"], seed)
    policy = _policy(env, settings)
    config = ChunkQConfig(horizon=settings["horizon"], **settings["algorithm"])
    algorithm = ChunkQ(policy, config, FeatureCache(policy, ""), seed)
    generator = torch.Generator().manual_seed(seed)

    def act(states: np.ndarray, explore: bool = False) -> np.ndarray:
        with torch.inference_mode():
            return policy.act({STATE: states}, "", generator, explore)[0][:, 0]

    state = env.reset(seed=seed)[0].astype(np.float32)
    for step in range(1, steps + 1):
        known = step > settings["random"]
        action = act(state[None], explore=True)[0] if known else rng.uniform(low, high)
        following, reward, terminated, truncated, _ = env.step(action.astype(np.float32))
        replay.add(state, action, reward, following, terminated, truncated)
        state = following.astype(np.float32)
        if terminated or truncated:
            state = env.reset()[0].astype(np.float32)
        if step == settings["random"]:
            policy.fit_begin(replay.sample(4096)[STATE], low, high)
            # Values of about 1, whatever a task's rewards are: critics with LayerNorm start near 0 and move slowly.
            replay.reward_scale = replay.mean_reward() * settings["span"]
            for _ in range(algorithm.config.actor_warmup):
                algorithm.update(replay.sample(settings["batch"]))
        if known:
            for _ in range(settings["updates"]):
                algorithm.update(replay.sample(settings["batch"]))
        curve.update(step, act)
    return curve.result(act)


def _policy(env: gymnasium.Env, settings: dict[str, Any]) -> Any:
    """A small policy that sees the state alone and plans one step."""
    return make_policy(
        {
            "state_dim": env.observation_space.shape[0],
            "pose_dim": 0,
            "cameras": (),
            "chunk": 1,
            "action_dim": env.action_space.shape[0],
            "latent": 8,
            "hidden": settings["hidden"],
            "critics": settings["critics"],
            "one_step": True,
        }
    )
