"""Batches made ahead of whoever trains on them."""

from __future__ import annotations

import queue
import threading
import time
from typing import Any

import numpy as np

from buffer_service.gather import Batch
from buffer_service.reader import Reader
from twinrl.core.errors import DeadlineError, TwinRLError

TURN_SECONDS = 1.0  # the longest that drawing waits at a time, so that `close` is heard


class _Lane:
    """What one thread makes."""

    def __init__(self, depth: int, seed: int) -> None:
        self.generator = np.random.default_rng(seed)
        self.ready: queue.Queue[Batch] = queue.Queue(depth)
        self.spare: queue.SimpleQueue[Batch] = queue.SimpleQueue()
        for _ in range(depth + 2):  # those ahead, one in the making, one in use
            self.spare.put({})


class Prefetcher:
    """An iterator over batches that threads of its own draw, `depth` of them ahead, into arrays that they reuse.

    It begins when the first is asked for. A batch is good until the next one is asked for. What is drawn ahead does
    not know of what came in since: `depth` + 1 batches. Its random numbers are its own, so the same seed draws the
    same from the same index.
    """

    def __init__(
        self,
        reader: Reader,
        batch_size: int,
        *,
        depth: int = 2,
        threads: int = 1,
        deadline: float | None = None,
        seed: int | None = None,
        **arguments: Any,
    ) -> None:
        """arguments: of `Reader.sample`. threads: two keep a link busy where batches come over the network, and each
        is `depth` ahead; on the service's host one is best. deadline: s that asking for a batch waits at most, the
        reader's by default. seed: of the draws; None takes one from the reader's generator."""
        if depth < 1 or threads < 1:
            raise ValueError(
                f"depth={depth}, threads={threads} make nothing ahead; at least 1 each"
            )
        self._reader = reader
        self._arguments = {"batch_size": batch_size, **arguments}
        self._deadline = reader.deadline if deadline is None else deadline
        seed = int(reader.generator.integers(1 << 62)) if seed is None else seed
        self._lanes = [_Lane(depth, seed + n) for n in range(threads)]
        self._in_use: tuple[_Lane, Batch] | None = None
        self._failure: BaseException | None = None
        self._trouble = ""
        self._stop = threading.Event()
        self.batches, self.wait_s, self.last_wait_s = 0, 0.0, 0.0
        self._begin: float | None = None  # of the first question
        self._threads = [
            threading.Thread(target=self._run, args=(lane,), name="prefetch", daemon=True)
            for lane in self._lanes
        ]

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Batch:
        """The next batch. DeadlineError says what it waited for; what ended a thread is raised here too."""
        since = time.monotonic()
        if self._begin is None and not self._stop.is_set():
            self._begin = since
            for thread in self._threads:
                thread.start()
        if self._in_use is not None:
            lane, batch = self._in_use
            lane.spare.put(batch)
            self._in_use = None
        lane = self._lanes[
            self.batches % len(self._lanes)
        ]  # in turn: the order does not hang on speed
        try:
            batch = self._wait(lane, since + self._deadline)
        finally:
            self.last_wait_s = time.monotonic() - since
            self.wait_s += self.last_wait_s
        self.batches += 1
        self._in_use = (lane, batch)
        return batch

    @property
    def data_wait(self) -> float:
        """The share of the time since the first batch was asked for that was spent waiting for batches."""
        if self._begin is None:
            return 0.0
        return self.wait_s / max(time.monotonic() - self._begin, 1e-9)

    def stats(self) -> dict[str, Any]:
        """What was made and waited for."""
        return {
            "prefetch/batches": self.batches,
            "prefetch/ready": sum(lane.ready.qsize() for lane in self._lanes),
            "prefetch/wait_s": self.wait_s,
            "prefetch/data_wait": self.data_wait,
            "prefetch/trouble": self._trouble,
        }

    def close(self) -> None:
        """End the threads; batches that were made ahead are lost."""
        self._stop.set()
        if self._begin is not None:
            for thread in self._threads:
                thread.join(self._reader.deadline + 10)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _wait(self, lane: _Lane, end: float) -> Batch:
        while True:
            try:
                return lane.ready.get(timeout=min(max(end - time.monotonic(), 0.0), 0.2))
            except queue.Empty:
                pass
            if self._failure is not None and lane.ready.empty():
                raise self._failure
            if self._stop.is_set():
                raise TwinRLError("the prefetcher was closed")
            if time.monotonic() >= end:
                raise DeadlineError(
                    f"no batch within {self._deadline:g} s: {self._trouble or 'one is being made'}"
                )

    def _run(self, lane: _Lane) -> None:
        try:
            while not self._stop.is_set():
                batch = self._draw(lane, lane.spare.get())
                while batch is not None and not self._stop.is_set():
                    try:
                        lane.ready.put(batch, timeout=0.2)
                        break
                    except queue.Full:
                        continue
        except BaseException as error:  # whatever it is, the consumer must hear of it
            self._failure = error

    def _draw(self, lane: _Lane, spare: Batch) -> Batch | None:
        while not self._stop.is_set():
            try:
                batch = self._reader.sample(
                    **self._arguments, generator=lane.generator, out=spare, deadline=TURN_SECONDS
                )
            except DeadlineError as error:
                # Nobody may be waiting: an idle learner is no reason to give up. `__next__` has the deadline.
                self._trouble = str(error)
                continue
            self._trouble = ""
            return batch
        return None
