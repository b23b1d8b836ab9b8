"""The learner's end of the weight channel: one memory copy in the caller's time, everything else in a thread.

The copy goes straight into the shared-memory file that readers will map (twinrl.weights_slots), so there is no other;
the thread computes the checksum just behind it, completes the file and announces the version.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from twinrl.core.checksum import digest
from twinrl.core.errors import DeadlineError, TwinRLError
from twinrl.weights import BLOCK, packed
from twinrl.weights_slots import SlotWriter

KEEP = 3  # newest versions that stay, for actors that are just loading them
ON_THE_WAY = 2  # versions copied but not announced; another publish waits
PATIENCE = 60.0  # s that it waits

Announce = Callable[[int, int, dict[str, np.ndarray]], Collection[int]]


class Publisher:
    """A WeightSink into `folder`.

    `announce(version, checksum, views)` is called in the thread once a version can be opened; it gives the versions
    that must stay. Without it the newest `keep` do. `newest()` gives the newest version of the run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = KEEP,
        announce: Announce | None = None,
        newest: Callable[[], int] | None = None,
    ) -> None:
        self._writer = SlotWriter(folder)
        self._keep, self._announce = keep, announce or self._newest_few
        self._newest = newest or (lambda: max(self._writer.versions, default=-1))
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._room = threading.Semaphore(ON_THE_WAY)
        self._idle = threading.Condition()
        self._open = 0
        self._failure: Exception | None = None
        self._last = max(self._writer.versions, default=-1)
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    def publish(self, version: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Copy `arrays`, which may change as soon as this returns, and hand them out in the background."""
        self._raise_failure()
        if version <= self._last:
            raise TwinRLError(f"policy version {version} comes after version {self._last}")
        if not self._room.acquire(timeout=PATIENCE):
            raise DeadlineError(
                f"waited {PATIENCE:g} s to publish version {version}: {ON_THE_WAY} earlier ones are not handed out yet"
            )
        try:
            slot, table = self._writer.take(arrays)
        except BaseException:
            self._room.release()
            raise
        with self._idle:
            self._open += 1
        copied: queue.SimpleQueue = queue.SimpleQueue()
        self._jobs.put((version, slot, table, copied))
        try:
            # By the block: each hand-over wakes the other thread, which then wants the interpreter, too.
            ready: list[Any] = []
            for part in slot.fill(arrays, table):
                ready.append(part)
                if len(part) == BLOCK:
                    copied.put(ready)
                    ready = []
            copied.put(ready)
        except BaseException as error:
            copied.put(error)
            raise
        copied.put(None)
        self._last = version

    def flush(self, timeout: float = PATIENCE) -> None:
        """Return when everything published is handed out, or raise why it could not be."""
        with self._idle:
            if not self._idle.wait_for(lambda: self._open == 0, timeout):
                raise DeadlineError(f"waited {timeout:g} s for published weights to be handed out")
        self._raise_failure()

    def newest(self) -> int:
        """The newest version that was handed out, -1 for none."""
        return self._newest()

    def close(self, remove: bool = False) -> None:
        """Hand out what was published and end; `remove` the versions, too."""
        self._jobs.put(None)
        self._thread.join(PATIENCE)
        self._writer.close(remove)
        self._raise_failure()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            version, slot, table, copied = job
            try:
                self._hand_out(version, slot, table, copied)
            except Exception as error:
                self._failure = error if isinstance(error, TwinRLError) else _failed(version, error)
            finally:
                self._room.release()
                with self._idle:
                    self._open -= 1
                    self._idle.notify_all()

    def _hand_out(self, version: int, slot: Any, table: list[Any], copied: Any) -> None:
        try:
            checksum = digest(*_digested(copied))
        except _Stopped:  # `publish` raises the reason itself
            self._writer.give_back(slot)
            return
        self._writer.seal(slot, version, checksum, table)
        self._writer.retain(self._announce(version, checksum, slot.views(table)))

    def _newest_few(self, *_: Any) -> Collection[int]:
        return self._writer.versions[-self._keep :]

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


class _Stopped(Exception):
    """The copy was not completed."""


def _digested(copied: queue.SimpleQueue) -> Iterator[bytes]:
    """What the checksum covers: labels as they come, blocks by their digests."""
    while (ready := copied.get()) is not None:
        if isinstance(ready, BaseException):
            raise _Stopped
        for part in ready:
            yield part if isinstance(part, bytes) else packed(digest(part))


def _failed(version: int, error: Exception) -> TwinRLError:
    failure = TwinRLError(
        f"policy version {version} was not handed out: {type(error).__name__}: {error}"
    )
    failure.__cause__ = error
    return failure
