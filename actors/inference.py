"""The inference actor: gathers observations from many callers into batches for one policy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from twinrl.env import Observation
from twinrl.weights import WeightSource

FIRST_WEIGHTS = 20.0  # s to wait for the first published version
Waiting = tuple[Observation, str, bool, asyncio.Future]


class InferenceActor:
    """Answers `infer` calls in batches of at most `max_batch`, at the latest `deadline` s after the first.

    New weights are adopted between batches, so one batch never mixes versions.
    """

    def __init__(
        self,
        name: str,
        *,
        make_runner: Callable[[], Any],
        make_reporter: Callable[..., Any],
        weights: WeightSource,
        max_batch: int = 64,
        deadline: float = 0.002,
    ) -> None:
        self._runner, self._weights = make_runner(), weights
        self._max_batch, self._deadline = max_batch, deadline
        self._waiting: list[Waiting] = []
        self._answered, self._batches, self._latency = 0, 0, 0.0
        self._task: asyncio.Task | None = None
        self._reporter = make_reporter(name, self.stats)

    async def ping(self) -> int:
        """The policy version in use."""
        return self._runner.version

    async def infer(
        self, observation: Observation, instruction: str, explore: bool
    ) -> tuple[np.ndarray, dict[str, np.ndarray], int]:
        """One observation {key: (...)} -> (chunk (C, 7), `policy.*` columns, policy version)."""
        began = time.monotonic()
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((observation, instruction, explore, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._answer())
        answer = await future
        self._latency = 0.95 * self._latency + 0.05 * (time.monotonic() - began)
        return answer

    def stats(self) -> dict[str, Any]:
        """Totals, smoothed latency and the mean number of observations in a batch."""
        return {
            "inference/answered": self._answered,
            "inference/latency_ms": self._latency * 1e3,
            "inference/occupancy": self._answered / max(self._batches, 1),
            "policy/version": self._runner.version,
        }

    async def _answer(self) -> None:
        while self._waiting:
            if len(self._waiting) < self._max_batch:
                await asyncio.sleep(self._deadline)
            _, instruction, explore, _ = self._waiting[0]
            batch = [w for w in self._waiting if w[1] == instruction and w[2] == explore]
            batch = batch[: self._max_batch]
            taken = {id(w) for w in batch}
            self._waiting = [w for w in self._waiting if id(w) not in taken]
            try:
                self._run(batch, instruction, explore)
            except Exception as error:
                for *_, future in batch:
                    if not future.done():
                        future.set_exception(error)

    def _run(self, batch: list[Waiting], instruction: str, explore: bool) -> None:
        if self._runner.version < 0:  # the first time there is nothing to act with meanwhile
            weights = self._weights.wait(-1, FIRST_WEIGHTS)
        else:
            weights = self._weights.poll(self._runner.version)
        if weights is not None:
            weights.verify()
            self._runner.load(weights.version, weights.arrays)
        observation = {key: np.stack([w[0][key] for w in batch]) for key in batch[0][0]}
        actions, info = self._runner.infer(observation, instruction, explore)
        for i, (*_, future) in enumerate(batch):
            if not future.done():
                columns = {key: value[i] for key, value in info.items()}
                future.set_result((actions[i], columns, self._runner.version))
        self._answered += len(batch)
        self._batches += 1
