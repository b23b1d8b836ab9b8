"""What a distributed run has in other processes, in memory: a runner, the stand-in arm, and a replay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from actors.segmenter import Segmenter
from learner.dataset import executed_windows
from twinrl.core.segment import SOURCES, Segment
from twinrl.env import IMAGE_PREFIX
from twins import make_env


def collect_into(env: Any, source: str, segments: list[Segment]) -> Segmenter:
    """A segmenter that appends to `segments`."""

    def sink(header: dict[str, Any], columns: dict[str, np.ndarray]) -> None:
        segments.append(Segment(header, columns))

    prefix = f"{source}-{id(segments):x}"
    return Segmenter(env, sink, source=source, task="pick-and-place", prefix=prefix)


class Runner:
    """A policy in this process, as evaluation and actors want it."""

    def __init__(self, policy: torch.nn.Module, seed: int) -> None:
        self.policy = policy
        self._generator = torch.Generator().manual_seed(seed)

    def infer(
        self, observation: dict, instruction: str | Sequence[str], explore: bool
    ) -> tuple[np.ndarray, dict]:
        """See `policies.runner.PolicyRunner.infer`."""
        with torch.inference_mode():
            return self.policy.act(observation, instruction, self._generator, explore)


class StandIn:
    """The simulated arm in its own time: one episode after the other, every step with its images."""

    def __init__(self, policy: torch.nn.Module, settings: dict[str, Any], seed: int) -> None:
        self._settings = settings
        self._env = make_env(
            num_envs=1,
            seed=seed + 9000,
            variant="standin",
            max_steps=settings["max_steps"],
            observe=settings.get("observe", "images"),
        )
        self._runner = Runner(policy, seed + 1)
        self._segments: list[Segment] = []
        self._segmenter = collect_into(self._env, "real", self._segments)
        self.minutes, self.episodes, self.takeovers = 0.0, 0, 0
        self._recent: list[bool] = []

    def episode(self, configuration: dict[str, Any] | None) -> Segment:
        """One episode; `configuration` says where things lie, the arm's nature stays its own."""
        env, everyone = self._env, np.ones(1, bool)
        start = env.draw("all")
        if configuration is not None:
            start |= {key: value for key, value in configuration.items() if key != "draw"}
        observation, _ = env.reset(options={"configurations": [start]})
        self._segmenter.begin(observation, everyone)
        taken: list[bool] = []
        chunk, acting = np.zeros((1, 0, 7), np.float32), False
        while not env.done.all():
            if not acting and len(taken) >= self._settings["slow_after"]:
                acting = self.takeovers < self._settings["takeovers"]
                self.takeovers += acting
            if acting:
                chunk = env.expert(0.0)[:, None]
            elif not chunk.shape[1]:
                chunk, _ = self._runner.infer(observation, env.instructions(), explore=False)
            step = env.step_chunk(chunk[:, :1])
            self._segmenter.add(step)
            observation, chunk = step.observation, chunk[:, 1:]
            taken.append(acting)
        self._segmenter.cut(everyone)
        segment = self._segments.pop()
        segment.columns["intervention"] = np.array(taken)
        self.episodes += 1
        self.minutes += (len(taken) / env.control_hz + self._settings["reset_seconds"]) / 60.0
        self._recent.append(bool(segment.columns["success"][-1]) and not acting)
        return segment

    def stats(self) -> dict[str, Any]:
        """Robot minutes, takeovers, and the share of the last 20 episodes that the policy finished alone."""
        return {
            "minutes": self.minutes,
            "takeovers": self.takeovers,
            "alone": float(np.mean(self._recent[-20:])),
        }


class Replay:
    """Windows of executed steps by source, with their frames where the segments hold them."""

    def __init__(self, chunk: int, seed: int) -> None:
        self._chunk, self._rng = chunk, np.random.default_rng(seed)
        self._segments: list[Segment] = []
        self._columns: dict[str, list[np.ndarray]] = {}
        self._source = np.zeros(0, np.int64)

    def add(self, segments: list[Segment]) -> None:
        """All windows of `segments`, whole episodes."""
        batch = executed_windows(segments, self._chunk)
        for key in ("frame", "next.frame"):
            batch[key][:, 0] += len(self._segments)
        self._segments += segments
        for key, value in batch.items():
            self._columns.setdefault(key, []).append(value)
        self._source = np.concatenate([self._source, batch["source"]])

    def sample(
        self, count: int, mix: tuple[float, ...] = (0.25, 0.25, 0.5)
    ) -> dict[str, np.ndarray]:
        """`count` windows, sources in the ratio of `mix` (in the order of SOURCES)."""
        for key, parts in self._columns.items():
            if len(parts) > 1:
                self._columns[key] = [np.concatenate(parts)]
        sizes = np.bincount(self._source, minlength=len(SOURCES))
        share = np.where(sizes > 0, mix, 0.0)
        counts = self._rng.multinomial(count, share / share.sum())
        rows = np.concatenate(
            [
                self._rng.choice(np.flatnonzero(self._source == number), size)
                for number, size in enumerate(counts)
                if size
            ]
        )
        batch = {key: parts[0][rows] for key, parts in self._columns.items()}
        cameras = [key for key in self._segments[0].columns if key.startswith(IMAGE_PREFIX)]
        for prefix in ("", "next."):
            frames = batch.pop(f"{prefix}frame")
            if not cameras:  # a state is encoded again faster than it is found
                continue
            batch[f"{prefix}observation.id"] = (frames[:, 0] << 20) + frames[:, 1]
            for key in cameras:
                images = [self._segments[s].columns[key][row] for s, row in frames]
                batch[prefix + key] = np.stack(images)
        return batch
