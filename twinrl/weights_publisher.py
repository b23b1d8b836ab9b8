"""The learner's end of the weight channel: one memory copy in the caller's time, everything else in a thread.

The copy goes straight into the shared-memory file that readers will map (twinrl.weights_slots), so there is no other,
and gives the checksum; the thread completes the file, announces the version and makes the next file ready.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from twinrl.core.errors import DeadlineError, TwinRLError
from twinrl.weights import checksum as checksum_of
from twinrl.weights_slots import SlotWriter

KEEP = 3  # newest versions that stay, for actors that are just loading them
ON_THE_WAY = 2  # versions copied but not announced; another publish waits
LARGE = 256 << 20  # bytes from which the checksum is computed with the copy
PATIENCE = 60.0  # s that it waits

Announce = Callable[[int, int, dict[str, np.ndarray]], Collection[int]]


class Publisher:
    """A WeightSink into `folder`.

    `announce(version, checksum, views)` is called in the thread once a version can be opened; it gives the versions
    that must stay. Without it the newest `keep` do.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = KEEP,
        announce: Announce | None = None,
    ) -> None:
        self._writer = SlotWriter(folder)
        self._keep, self._announce = keep, announce or self._newest_few
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
        slot = None
        try:
            slot, table = self._writer.take(arrays)
            # In one pass a large set is with its readers sooner; a small one is there soon in any case, and the
            # thread computes its checksum: a copy alone holds the learner up least.
            checksum = slot.fill(arrays, table) if slot.size >= LARGE else slot.copy(arrays, table)
        except BaseException:
            if slot is not None:
                self._writer.give_back(slot)
            self._room.release()
            raise
        with self._idle:
            self._open += 1
        self._jobs.put((version, slot, table, checksum))
        self._last = version

    def flush(self, timeout: float = PATIENCE) -> None:
        """Return when everything published is handed out, or raise why it could not be."""
        with self._idle:
            if not self._idle.wait_for(lambda: self._open == 0, timeout):
                raise DeadlineError(f"waited {timeout:g} s for published weights to be handed out")
        self._raise_failure()

    def newest(self) -> int:
        """The newest version that was handed out, -1 for none."""
        return max(self._writer.versions, default=-1)

    def close(self, remove: bool = False) -> None:
        """Hand out what was published and end; `remove` the versions, too."""
        self._jobs.put(None)
        self._thread.join(PATIENCE)
        self._writer.close(remove)
        self._raise_failure()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            version, slot, table, checksum = job
            try:
                if checksum is None:
                    checksum = checksum_of(slot.views(table))
                self._writer.seal(slot, version, checksum, table)
                stay = self._announce(version, checksum, slot.views(table))
                self._writer.retain(stay)
            except Exception as error:
                self._failure = error if isinstance(error, TwinRLError) else _failed(version, error)
            finally:
                self._room.release()
                with self._idle:
                    self._open -= 1
                    self._idle.notify_all()

    def _newest_few(self, *_: Any) -> Collection[int]:
        return self._writer.versions[-self._keep :]

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


def _failed(version: int, error: Exception) -> TwinRLError:
    failure = TwinRLError(
        f"policy version {version} was not handed out: {type(error).__name__}: {error}"
    )
    failure.__cause__ = error
    return failure
