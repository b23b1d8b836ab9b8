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


class Prefetcher:
    """An iterator over batches that a thread of its own draws, `depth` of them ahead, into arrays that it reuses.

    It begins when the first is asked for. A batch is good until the next one is asked for. What is drawn ahead does
    not know of what came in since: `depth` + 1 batches. Its random numbers are its own, so the same seed draws the same from the same index.
    """

    def __init__(
        self,
        reader: Reader,
        batch_size: int,
        *,
        depth: int = 2,
        deadline: float | None = None,
        seed: int | None = None,
        **arguments: Any,
    ) -> None:
        """arguments: of `Reader.sample`. deadline: s that asking for a batch waits at most, the reader's by default.
        seed: of the draws; None takes one from the reader's generator."""
        if depth < 1:
            raise ValueError(f"depth={depth} makes nothing ahead; at least 1")
        self._reader = reader
        self._arguments = {"batch_size": batch_size, **arguments}
        self._deadline = reader.deadline if deadline is None else deadline
        seed = int(reader.generator.integers(1 << 62)) if seed is None else seed
        self._generator = np.random.default_rng(seed)
        self._ready: queue.Queue[Batch] = queue.Queue(depth)
        self._spare: queue.SimpleQueue[Batch] = queue.SimpleQueue()
        for _ in range(depth + 2):  # those ahead, one in the making, one in use
            self._spare.put({})
        self._in_use: Batch | None = None
        self._failure: BaseException | None = None
        self._trouble = ""
        self._stop = threading.Event()
        self.batches, self.wait_s, self.last_wait_s = 0, 0.0, 0.0
        self._begin: float | None = None  # of the first question
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Batch:
        """The next batch. DeadlineError says what it waited for; what ended the thread is raised here too."""
        since = time.monotonic()
        if self._begin is None and not self._stop.is_set():
            self._begin = since
            self._thread.start()
        if self._in_use is not None:
            self._spare.put(self._in_use)
            self._in_use = None
        try:
            batch = self._wait(since + self._deadline)
        finally:
            self.last_wait_s = time.monotonic() - since
            self.wait_s += self.last_wait_s
        self.batches += 1
        self._in_use = batch
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
            "prefetch/ready": self._ready.qsize(),
            "prefetch/wait_s": self.wait_s,
            "prefetch/data_wait": self.data_wait,
            "prefetch/trouble": self._trouble,
        }

    def close(self) -> None:
        """End the thread; batches that were made ahead are lost."""
        self._stop.set()
        if self._begin is not None:
            self._thread.join(self._reader.deadline + 10)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _wait(self, end: float) -> Batch:
        while True:
            try:
                return self._ready.get(timeout=min(max(end - time.monotonic(), 0.0), 0.2))
            except queue.Empty:
                pass
            if self._failure is not None and self._ready.empty():
                raise self._failure
            if self._stop.is_set():
                raise TwinRLError("the prefetcher was closed")
            if time.monotonic() >= end:
                raise DeadlineError(
                    f"no batch within {self._deadline:g} s: {self._trouble or 'one is being made'}"
                )

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                spare = self._spare.get()
                batch = self._draw(spare)
                while batch is not None and not self._stop.is_set():
                    try:
                        self._ready.put(batch, timeout=0.2)
                        break
                    except queue.Full:
                        continue
        except BaseException as error:  # whatever it is, the consumer must hear of it
            self._failure = error

    def _draw(self, spare: Batch) -> Batch | None:
        while not self._stop.is_set():
            try:
                batch = self._reader.sample(
                    **self._arguments, generator=self._generator, out=spare, deadline=TURN_SECONDS
                )
            except DeadlineError as error:
                # Nobody may be waiting: an idle learner is no reason to give up. `__next__` has the deadline.
                self._trouble = str(error)
                continue
            self._trouble = ""
            return batch
        return None
