"""The rollout actor without its policy: against the same environment stepped in a bare loop, in the same chunks."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from actors.twin_actor import TwinActor
from benchmarks import _envs_play
from buffer_service.testing import Bench
from twinrl.core.segment import Schema
from twinrl.weights import Weights, checksum

CHUNK = 8
ROUND_CHUNKS = 4


class Unthinking:
    """In the policy's place: actions that were drawn before."""

    version = 0

    def __init__(self, count: int) -> None:
        actions = np.random.default_rng(0).normal(0, 0.01, (count, CHUNK, 7))
        self.actions = actions.astype(np.float32)

    def infer(self, observation: Any, instruction: str, *, explore: bool) -> Any:
        """The actions, and nothing to be recorded with them."""
        return self.actions, {}

    def adopt(self, weights: Weights, exactly: bool = False) -> None:
        """Weights of a policy that is not there."""
        self.version = weights.version

    def seed(self, seed: int) -> None:
        """Nothing is drawn."""


class NoWeights:
    """Version 0, for ever."""

    _only = Weights(0, {}, checksum({}))

    def poll(self, newer_than: int) -> Weights | None:
        """Nothing newer."""
        return None

    def wait(self, newer_than: int, timeout: float) -> Weights:
        """The only version."""
        return self._only

    def get(self, version: int) -> Weights:
        """The only version."""
        return self._only


class Silent:
    """In the dashboard's place."""

    def event(self, *_: Any) -> None:
        """Nobody listens."""

    def close(self) -> None:
        """Nothing is open."""


class Actors:
    """An actor with a replay service in a process of its own, and its environment for the bare loop."""

    def __init__(self, count: int, image_size: int) -> None:
        self.env = env = _envs_play.make(count, image_size=image_size)
        self._folder = tempfile.TemporaryDirectory(prefix="envs-")
        schema = Schema(env.state_dim, env.privileged_dim, tuple(env.cameras), image_size, CHUNK)
        self._bench = Bench(Path(self._folder.name) / "run")
        self._bench.start(schema=schema, capacity=1 << 30)
        self._runner = Unthinking(count)
        env.close = lambda: None  # the actor closes what it was lent
        self._actor = TwinActor(
            "bench",
            seed=0,
            task=_envs_play.TASK,
            num_envs=count,
            make_env=lambda *_, **__: env,
            make_runner=lambda: self._runner,
            make_writer=lambda name: self._bench.writer(name, schema=schema),
            make_reader=lambda: None,
            make_reporter=lambda *_: Silent(),
            weights=NoWeights(),
        )

    def collect(self, chunks: int) -> float:
        """Control steps a second of the actor, until its last segment is acknowledged."""
        steps = self.env.num_envs * chunks * CHUNK
        start = time.perf_counter()
        done = self._actor.collect(
            start_version=0, steps=steps, round_chunks=ROUND_CHUNKS, max_lag=1 << 30, region="id"
        )
        return done / (time.perf_counter() - start)

    def bare(self, chunks: int) -> float:
        """The same of a loop that only steps the environment and resets what has ended."""
        env, done = self.env, 0
        start = time.perf_counter()
        env.reset(seed=0)
        for _ in range(chunks):
            step = env.step_chunk(self._runner.actions)
            done += int(step.mask.sum())
            if step.done.any():
                env.reset(options={"reset_mask": step.done, "region": "id"})
        return done / (time.perf_counter() - start)

    def close(self) -> None:
        """End actor and service."""
        self._actor.close()
        self._bench.close()
        self._folder.cleanup()
