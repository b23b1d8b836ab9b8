"""Our PPO on gymnasium's tasks: PPOFlow with C = 1, K = 1, s = 1 and a wide noise band, from scratch.

A thin collector plays a vector environment in this process and hands the algorithm the segments that twin actors would send.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv

from experiments.learning_curve import LearningCurve
from learner.algorithms.ppoflow import PPOFlow, PPOFlowConfig
from learner.features import encode
from learner.stages.begin import prepare
from policies.vla import VLA
from twinrl.core.segment import Segment
from twinrl.env import STATE

RANDOM_STEPS = 512  # that fit the view of the state, and count
SETTINGS: dict[str, dict[str, Any]] = {
    "Pendulum-v1": {
        "gamma": 0.9,
        "noise_rms": 1.0,
        "chunks": 64,
        "minibatch": 128,
        "max_learning_rate": 1e-3,
        "max_kl": 0.03,
    },
    "InvertedPendulum-v5": {
        "gamma": 0.99,
        "lam": 0.9,
        "noise_rms": 0.3,
        "chunks": 32,
        "minibatch": 64,
        "epochs": 5,
        "clip": 0.4,
        "learning_rate": 3e-4,
        "max_learning_rate": 1e-3,
    },
    "Reacher-v5": {"gamma": 0.9, "noise_rms": 0.5, "chunks": 128, "minibatch": 256},
}
COMMON: dict[str, Any] = {
    "envs": 8,  # copies that are played together; an iteration is this many times `chunks` steps
    "lam": 0.95,
    "ratio_power": 1.0,
    "learning_rate": 1e-3,
    "max_learning_rate": 3e-3,
    "critic_hidden": 64,
    "critic_learning_rate": 3e-3,
    "critic_updates": 30,
    "critic_memory": 4,
    "critic_warmup": 0,
    "normalise_values": True,
    "epochs": 10,
    "max_kl": 0.1,
}


class Collector:
    """Plays `envs` copies of a task, one action a chunk, and makes segments of what happened.

    First episodes are cut short at different times, so that an iteration sees all parts of an episode: copies that go
    through the same part together make every iteration another task.
    """

    def __init__(self, env_id: str, envs: int, seed: int) -> None:
        self.envs: VectorEnv = gymnasium.make_vec(
            env_id,
            num_envs=envs,
            vectorization_mode="sync",
            vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
        )
        observation, _ = self.envs.reset(seed=seed)
        self._observation = observation.astype(np.float32)
        self._episode = np.arange(envs)
        self._steps = np.zeros(envs, int)  # of the present episodes
        limit = self.envs.spec.max_episode_steps
        self._cut_at = (
            np.arange(1, envs + 1) * limit // envs
        )  # steps of all; an episode of each ends
        self.played = 0  # environment steps

    def random_play(self, steps: int, seed: int) -> np.ndarray:
        """Observations (at least `steps`, O) under random actions."""
        self.envs.action_space.seed(seed)
        seen = [self._observation]
        while len(seen) * self.envs.num_envs < steps:
            self._step(self.envs.action_space.sample())
            seen.append(self._observation)
        return np.concatenate(seen)

    def collect(self, policy: VLA, generator: torch.Generator, chunks: int, version: int) -> list:
        """Segments of `chunks` steps of every environment, cut where episodes end."""
        count = self.envs.num_envs
        columns: dict[str, list[np.ndarray]] = {}
        for _ in range(chunks):
            with torch.inference_mode():
                action, info = policy.act({STATE: self._observation}, "", generator, explore=True)
            row = {STATE: self._observation, "policy.path": info["path"]}
            row |= {"policy.log_prob": info["log_prob"], "episode": self._episode.copy()}
            row |= {"first_step": self._steps.copy()}
            row |= self._step(action[:, 0])
            for key, value in row.items():
                columns.setdefault(key, []).append(value)
        log = {key: np.stack(values, 1) for key, values in columns.items()}  # (N, T, ...)
        ended = log["terminated"] | log["truncated"]
        segments = []
        for i in range(count):
            ends = np.union1d(np.flatnonzero(ended[i]) + 1, [chunks])
            for start, end in zip(np.append(0, ends[:-1]), ends, strict=True):
                part = {key: value[i, start:end] for key, value in log.items()}
                segments.append(_segment(part, version))
        return segments

    def _step(self, action: np.ndarray) -> dict[str, np.ndarray]:
        """One step of all; what it gave, with the observation after it before any reset."""
        observation, reward, terminated, truncated, info = self.envs.step(action)
        observation = observation.astype(np.float32)
        after, done = observation, terminated | truncated
        if done.any():
            after = observation.copy()
            for i in np.flatnonzero(done):
                after[i] = info["final_obs"][i]
        self.played += len(done)
        cut = (self._cut_at == self.played // len(done)) & ~done
        if cut.any():
            observation = self.envs.reset(options={"reset_mask": cut})[0].astype(np.float32)
            truncated, done = truncated | cut, done | cut
        self._observation = observation
        self._steps = np.where(done, 0, self._steps + 1)
        self._episode = np.where(done, self._episode + len(done), self._episode)
        return {
            "after": after,
            "reward": reward.astype(np.float32),
            "terminated": terminated,
            "truncated": truncated,
        }


def _segment(part: dict[str, np.ndarray], version: int) -> Segment:
    """A segment as an actor writes it, of the columns that PPOFlow reads."""
    steps = len(part["reward"])
    header = {
        "source": "twin",
        "episode": str(part["episode"][0]),
        "first_step": int(part["first_step"][0]),
        "instruction": "",
    }
    columns = {
        key: part[key]
        for key in ("reward", "terminated", "truncated", "policy.path", "policy.log_prob")
    }
    columns[STATE] = np.concatenate([part[STATE], part["after"][-1:]])
    columns["chunk_step"] = np.arange(steps, dtype=np.int32)
    columns["policy_version"] = np.full(steps, version, np.int64)
    return Segment(header, columns)


def train(env_id: str, seed: int, steps: int, **overrides: Any) -> dict[str, Any]:
    """{"returns", "seconds", "curve"} of one run of `steps` environment steps; `overrides` of SETTINGS.

    `noise_rms` is the exploration at the start, in normalised actions.
    """
    settings = {**COMMON, **SETTINGS[env_id], **overrides}
    envs, chunks, noise = (settings.pop(key) for key in ("envs", "chunks", "noise_rms"))
    torch.manual_seed(seed)
    curve = LearningCurve(env_id, steps)
    collector = Collector(env_id, envs, seed)
    space = collector.envs.single_action_space
    policy = VLA(
        state_dim=collector.envs.single_observation_space.shape[0],
        pose_dim=0,
        cameras=(),
        chunk=1,
        action_dim=space.shape[0],
        integration_steps=1,
        start_noise=0.0,
        latent=8,
        hidden=64,
        critics=0,
    )
    states = collector.random_play(RANDOM_STEPS, seed)
    policy.fit_begin(states, space.low, space.high)
    prepare(policy, encode(policy, {STATE: states}, ""), seed, noise)
    algorithm = PPOFlow(policy, PPOFlowConfig(**settings), 0, seed=seed)
    generator = torch.Generator().manual_seed(seed)

    def act(observation: np.ndarray) -> np.ndarray:
        noise = torch.Generator().manual_seed(0)
        with torch.inference_mode():
            return policy.act({STATE: observation}, "", noise, explore=False)[0][:, 0]

    while collector.played < steps:
        segments = collector.collect(policy, generator, chunks, algorithm.iteration)
        algorithm.update(segments, algorithm.iteration)
        curve.update(collector.played, act)
    return curve.result(act)
