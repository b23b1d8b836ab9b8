"""The committer: makes durable whatever came in since it last looked, all with one transaction, and then says so.

Inserts, deletions, cursors and priorities wait for each other only here, so that many small ones cost one
round trip to Redis and at most one sync.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

from buffer_service.entry import Entry
from buffer_service.redis_address import FORGETFUL, Redis, RedisError, explain
from buffer_service.redis_lease import LeaseLost
from buffer_service.store import Store
from twinrl.core.errors import TwinRLError

log = logging.getLogger(__name__)
RETRY_SECONDS, MOST_RETRY_SECONDS = 0.2, 2.0


class Insert(NamedTuple):
    """A written payload, or (without entry) a repeat of one. Answered with {"acknowledged", "repeated", "hold"}."""

    entry: Entry | None
    writer: str
    future: Future


class Change(NamedTuple):
    """Something in the store's fields is to be made durable. Answered with {}."""

    future: Future


class Delete(NamedTuple):
    """Segments that somebody asked to delete. Answered with {"deleted"}."""

    ids: list[int]
    future: Future


class Abandon(NamedTuple):
    """A writer's open episodes are to be closed: it is silent for longer than its lease, or was started anew."""

    writer: str
    seconds: float | None  # the lease; None: a successor has its name, and files of its own already


Work = Insert | Change | Delete | Abandon


class Committer:
    """One thread between the service and its store."""

    def __init__(
        self,
        store: Store,
        lock: threading.RLock,
        redis_again: Callable[[], Redis] | None,
        published: Callable[[list[Entry], list[Entry], list[Entry]], bool],
    ) -> None:
        """`lock` guards the store's fields. redis_again: see `Service`. published(new, gone, changed) is called
        with the lock held when all of it is durable; it says whether inserting has to wait now.
        """
        self._store, self._lock = store, lock
        self._redis_again, self._published = redis_again, published
        self._work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._held: list[Work | None] = []  # taken out of the queue before their turn
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)
        self.failure: Exception | None = None  # what ended the thread
        self.trouble = ""  # what acknowledgements wait for, if not for their turn
        self._since = 0.0  # monotonic s, when that began

    def start(self) -> None:
        """Begin to commit."""
        self._thread.start()

    def close(self) -> None:
        """Commit what there is and close the store."""
        self._stop.set()
        self._work.put(None)
        self._thread.join(30)

    def put(self, work: Work) -> None:
        """Have it done with the next commit."""
        self._work.put(work)

    def _run(self) -> None:
        try:
            running = True
            while running:
                group, self._held = self._held or [self._work.get()], []
                while not self._work.empty():
                    group.append(self._work.get())
                group, self._held = self._portion(group)
                work = [each for each in group if each is not None]
                running = len(work) == len(group)
                if work:
                    self._commit(work)
            # Here, because a Redis restarted by this thread ends with it.
            self._store.close()
        except RedisError as error:
            log.error("Redis is away at the end (%s); the next start reads the headers", error)
        except Exception as error:
            log.exception("the committer failed")
            self.failure = error

    def _portion(self, group: list[Work | None]) -> tuple[list[Work | None], list[Work | None]]:
        """What is done with one transaction, and what after it."""
        total = 0
        for number, each in enumerate(group):
            total += each.entry.length if isinstance(each, Insert) and each.entry else 0
            if total > self._store.group_bytes and number:
                return group[:number], group[number:]
        return group, []

    def _commit(self, work: list[Work]) -> None:
        entries = [each.entry for each in work if isinstance(each, Insert) and each.entry]
        moved = self._moved()
        with self._lock:
            self._store.count(entries)
            changes = {entry.id: entry for entry in moved} | self._closed(work)
        while True:
            with self._lock:
                evicted = {entry.id: entry for entry in self._store.evictions(entries)}
                gone = evicted | self._deletions(work)
            known = self._store.entries
            changed = [e for id, e in changes.items() if id in known and id not in gone]
            try:
                self._store.commit(entries, list(gone.values()), changed)
                break
            except RedisError as error:
                if not self._wait_for_redis(error):
                    raise
                work = self._delete_first(work)
        self.trouble = ""
        with self._lock:
            self._store.publish(entries, list(gone.values()), changed)
            hold = self._published(entries, list(gone.values()), changed)
            committed = dict(self._store.committed)
        for each in work:
            if isinstance(each, Insert):
                acknowledged = each.entry.sequence if each.entry else committed[each.writer]
                each.future.set_result(
                    {"acknowledged": acknowledged, "repeated": each.entry is None, "hold": hold}
                )
            elif isinstance(each, Delete):
                each.future.set_result({"deleted": len(gone) - len(evicted)})
            elif isinstance(each, Change):
                each.future.set_result({})

    def _moved(self) -> list[Entry]:
        try:
            return self._store.moves()
        except OSError as error:
            log.error("a mostly empty segment file cannot be rewritten: %s", error)
            return []

    def _deletions(self, work: list[Work]) -> dict[int, Entry]:
        ids = [id for each in work if isinstance(each, Delete) for id in each.ids]
        return {id: self._store.entries[id] for id in ids if id in self._store.entries}

    def _closed(self, work: list[Work]) -> dict[int, Entry]:
        closed: dict[int, Entry] = {}
        for each in work:
            if isinstance(each, Abandon):
                why = "was started anew"
                if each.seconds is not None:
                    self._store.release(each.writer)
                    why = f"is silent for {each.seconds:g} s"
                for entry in self._store.abandoned(each.writer):
                    closed[entry.id] = entry
                    log.warning(
                        "writer %s %s: episode %s is closed as truncated after %d steps",
                        *(each.writer, why, entry.episode),
                        entry.first_step + entry.steps,
                    )
        return closed

    def _delete_first(self, work: list[Work]) -> list[Work]:
        """Do the deletions of `work` and those that came in meanwhile: a full Redis waits for them. Gives the rest."""
        while not self._work.empty():
            self._held.append(self._work.get())
        early = [each for each in [*work, *self._held] if isinstance(each, Delete)]
        rest = [each for each in work if not isinstance(each, Delete)]
        self._held = [each for each in self._held if not isinstance(each, Delete)]
        if not early:
            return rest
        gone = list(self._deletions(early).values())
        try:
            self._store.commit([], gone)
        except RedisError:
            return [*rest, *early]
        with self._lock:
            self._store.publish([], gone)
            self._published([], gone, [])
        for each in early:
            each.future.set_result({"deleted": len(gone)})
        return rest

    def _wait_for_redis(self, error: Exception) -> bool:
        """Until it is worth trying again; False when the service is to end.

        A Redis that was away may have forgotten its last second, so it is told everything again. One that refuses
        to write is asked again.
        """
        if not self.trouble:
            self._since = time.monotonic()
            log.warning("%s", explain(error))
        forgetful = isinstance(error, FORGETFUL)
        while not self._stop.is_set():
            waited = time.monotonic() - self._since
            self.trouble = f"acknowledgements wait {waited:.0f} s: {explain(error)}"
            self._stop.wait(min(max(waited / 5, RETRY_SECONDS), MOST_RETRY_SECONDS))
            if not forgetful:
                return not self._stop.is_set()
            try:
                if self._redis_again is not None:
                    redis = self._redis_again()
                    with self._lock:
                        self._store.reconnect(redis)
                    log.warning("Redis is back after %.1f s", time.monotonic() - self._since)
                    return True
            except LeaseLost:
                raise
            except (RedisError, TwinRLError) as again:
                error = again
        return False
