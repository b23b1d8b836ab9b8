"""The inference actor: gathers rows of many callers into batches for one policy."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.batching import Answer, Assembler, Request, Shape, instructions, shape_of
from policies.streams import Streams, stream
from twinrl.core.errors import DeadlineError
from twinrl.weights import Weights, WeightSource

LOOK = 0.01  # s between looks for a version that a caller asks for
LOAD = 20.0  # s for weights that are known to be there
REMEMBERED = 1024  # latencies, of which the percentiles are


@dataclass(eq=False)
class _Waiting:
    """A request that is not answered yet."""

    request: Request
    shape: Shape
    future: asyncio.Future[Answer]
    began: float

    @property
    def kind(self) -> tuple[Any, ...]:
        """What all of a batch have in common. Who asks for an exact version (an evaluation) shares with nobody: the
        sizes of a batch decide how sums are rounded, and what is alone repeats itself bit for bit."""
        request = self.request
        alone = id(self) if request.exactly else 0
        return request.explore, self.shape, alone


class InferenceActor:
    """Answers `infer` in batches of at most `max_rows` rows, which begin at the latest `deadline` s after their first
    request came, or when the batch before is done.

    Batches are padded to powers of two, so that the policy meets few shapes. A batch is of one version: weights are
    adopted between batches. An error is told to the callers of its batch and to nobody else.
    """

    def __init__(
        self,
        name: str,
        *,
        make_runner: Callable[[], Any],
        make_reporter: Callable[..., Any],
        weights: WeightSource,
        max_rows: int = 256,
        deadline: float = 0.002,
    ) -> None:
        """`make_runner()` gives a PolicyRunner."""
        self._runner, self._weights = make_runner(), weights
        self._max_rows, self._deadline = max_rows, deadline
        self._waiting: list[_Waiting] = []
        self._newest, self._fresh = (
            -1,
            None,
        )  # the newest version seen; its weights until they are adopted
        self._assembler = Assembler(max_rows)
        # Computing in a thread of its own: meanwhile requests arrive.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inference")
        self._task: asyncio.Task[None] | None = None
        self._arrived = asyncio.Event()
        self._answered = self._rows = self._failed = 0
        self._latencies: deque[float] = deque(maxlen=REMEMBERED)
        self._batches = self._batch_rows = self._padded = 0  # since the last report
        self._clock = time.monotonic()
        self._reporter = make_reporter(name, self.stats)

    async def ping(self) -> int:
        """The policy version in use."""
        return self._runner.version

    async def infer(self, request: Request) -> Answer:
        """The answer, at the latest after `request.patience` s. ValueError for what can never be answered."""
        shape = shape_of(request.observation, self._runner.keys, request.rows)
        if not 0 < request.rows <= self._max_rows:
            raise ValueError(
                f"a request of {request.rows} rows; this inference actor takes 1 to {self._max_rows}: raise "
                "inference.max_rows or have fewer environments in an actor"
            )
        if not isinstance(request.instruction, str) and len(request.instruction) != request.rows:
            raise ValueError(f"{len(request.instruction)} instructions for {request.rows} rows")
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(request, shape, future, time.monotonic()))
        self._arrived.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._serve())
        return await future

    def stats(self) -> dict[str, Any]:
        """Totals; percentiles of the last 1024 latencies, from a request's arrival to its answer; and since the last
        call rows a second, rows in a batch, and which share of what was computed was no padding."""
        now, latencies = time.monotonic(), np.array(self._latencies or [0.0]) * 1e3
        batches, rows, padded = self._batches, self._batch_rows, self._padded
        self._batches = self._batch_rows = self._padded = 0
        span, self._clock = max(now - self._clock, 1e-6), now
        return {
            "inference/answered": self._answered,
            "inference/failed": self._failed,
            "inference/waiting": len(self._waiting),
            "inference/rows": self._rows,
            "inference/rows_per_s": rows / span,
            "inference/batch_rows": rows / max(batches, 1),
            "inference/occupancy": rows / max(padded, 1),
            "inference/latency_p50_ms": float(np.quantile(latencies, 0.5)),
            "inference/latency_p99_ms": float(np.quantile(latencies, 0.99)),
            "policy/version": self._runner.version,
        }

    async def _serve(self) -> None:
        """Batch after batch, as long as somebody waits."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            self._expire()
            first = self._first()
            if first is None:
                await loop.run_in_executor(self._thread, self._look)
                if self._first() is None:
                    await asyncio.sleep(LOOK)
                continue
            await self._gather(first)
            batch = self._take(first)
            try:
                answers = await loop.run_in_executor(self._thread, self._answer, batch)
            except Exception as error:
                self._failed += len(batch)
                for waiting in batch:
                    _settle(waiting.future, error)
                continue
            now = time.monotonic()
            for waiting, answer in zip(batch, answers, strict=True):
                self._latencies.append(now - waiting.began)
                _settle(waiting.future, answer)

    def _expire(self) -> None:
        """Tell callers whose patience has ended what they waited for; forget those that are gone."""
        now, kept = time.monotonic(), []
        for waiting in self._waiting:
            request = waiting.request
            if waiting.future.done():
                continue
            if now - waiting.began <= request.patience:
                kept.append(waiting)
                continue
            self._failed += 1
            error = DeadlineError(
                f"waited {request.patience:g} s for an answer by policy version {request.version}; the inference "
                f"actor knows {self._newest}, and {len(self._waiting)} requests wait"
            )
            _settle(waiting.future, error)
        self._waiting = kept

    def _ready(self, waiting: _Waiting) -> bool:
        """Its version is there, or will have to be fetched by its number."""
        request = waiting.request
        return request.exactly or 0 <= max(request.version, 0) <= self._newest

    def _first(self) -> _Waiting | None:
        return next((waiting for waiting in self._waiting if self._ready(waiting)), None)

    def _matching(self, first: _Waiting) -> list[_Waiting]:
        """Who can share a batch with `first`, as far as there is room."""
        taken, rows = [], 0
        for waiting in self._waiting:
            fits = rows + waiting.request.rows <= self._max_rows
            if fits and waiting.kind == first.kind and self._ready(waiting):
                taken.append(waiting)
                rows += waiting.request.rows
        return taken

    async def _gather(self, first: _Waiting) -> None:
        """Wait until the batch is full or its deadline is over."""
        until = first.began + self._deadline
        while not first.request.exactly and (left := until - time.monotonic()) > 0:
            if sum(waiting.request.rows for waiting in self._matching(first)) >= self._max_rows:
                break
            self._arrived.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)

    def _take(self, first: _Waiting) -> list[_Waiting]:
        batch = self._matching(first)
        self._waiting = [waiting for waiting in self._waiting if waiting not in batch]
        return batch

    # -- in the computing thread ---------------------------------------------------------------------------

    def _look(self) -> None:
        """Whether there are newer weights; costs next to nothing where there are none."""
        weights: Weights | None = self._weights.poll(self._newest)
        if weights is not None:
            self._newest, self._fresh = weights.version, weights

    def _load(self, first: Request) -> None:
        """Have the version that a batch asks for: exactly that one, or the newest."""
        runner = self._runner
        if first.exactly:
            if runner.version != first.version:
                runner.adopt(self._weights.get(first.version))
            return
        self._look()
        if runner.version != self._newest:  # newer ones, or an evaluation's were in use
            weights = self._fresh or self._weights.wait(self._newest - 1, LOAD)
            runner.adopt(weights)
            self._newest, self._fresh = weights.version, None

    def _answer(self, batch: Sequence[_Waiting]) -> list[Answer]:
        requests = [waiting.request for waiting in batch]
        self._load(requests[0])
        counts = [request.rows for request in requests]
        observation = self._assembler.assemble(requests, batch[0].shape)
        padded = len(next(iter(observation.values())))
        numbers = Streams(
            [(stream(r.seed, r.call), rows) for r, rows in zip(requests, counts, strict=True)],
            padded,
        )
        chunks, columns = self._runner.act(
            observation, instructions(requests, padded), requests[0].explore, numbers
        )
        ends = np.cumsum(counts)
        answers = [
            Answer(
                chunks[end - rows : end],
                {key: column[end - rows : end] for key, column in columns.items()},
                self._runner.version,
            )
            for end, rows in zip(ends, counts, strict=True)
        ]
        self._answered += len(batch)
        self._rows += int(ends[-1])
        self._batches += 1
        self._batch_rows += int(ends[-1])
        self._padded += padded
        return answers


def _settle(future: asyncio.Future[Answer], outcome: Answer | Exception) -> None:
    """Give a caller the outcome, unless it has gone."""
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
