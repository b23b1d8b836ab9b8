"""The Redis form of the store: payload lies in Redis too, so the service can come back on any host.

One key holds each record. Payload, index entry, dedupe state and counters go into Redis with one transaction, and
out of it with one. The segment files are a bounded cache of what was inserted or fetched last, for readers on the
same host: they may be missing, in part or altogether, and are never synced. An entry's place (file, offset) is this
host's; file 0 means that the record is not in the cache.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from buffer_service import record
from buffer_service.entry import Entry
from buffer_service.file_store import LEAST_CAPACITY, FileStore
from buffer_service.files import FILE_BYTES, Found
from buffer_service.redis_address import Redis, RedisError, explain, information
from buffer_service.store import Recovery
from twinrl.core.errors import ConfigError, TwinRLError, WireError
from twinrl.core.segment import Schema, Segment

log = logging.getLogger(__name__)
CACHE_BYTES = 4 << 30
BATCH_BYTES = 64 << 20  # payload in one transaction
KEYS = 1000  # asked for at once
RESERVE = 0.1  # of Redis's memory limit, for the index and what is under way
LOOK_SECONDS = 0.5  # between two looks at Redis's memory and at the cache's files
GIVES_WAY = "twin"  # what goes first when Redis's memory is full


class RedisStore(FileStore):
    """Payload in Redis; segment files in `folder` are a cache."""

    form = "redis"
    _adoption = ", or set redis.adopt to go on with it in this folder"

    def __init__(
        self,
        folder: Path,
        redis: Redis,
        run: str,
        schema: Schema,
        capacity: dict[str, int] | int | None = None,
        flush: str = "everysec",
        remover: str = "oldest",
        *,
        cache_bytes: int = CACHE_BYTES,
        adopt: bool = False,
        **options: Any,
    ) -> None:
        """`cache_bytes`: of segment files. `adopt`: go on with a run that another folder, now lost, began."""
        if cache_bytes < 8 * LEAST_CAPACITY:
            raise ConfigError(f"a cache of {cache_bytes} bytes is too small; at least 8 MiB")
        self._adopts, self._cache_bytes = adopt, cache_bytes
        self._pending: collections.Counter[int] = collections.Counter()  # records not yet published
        self._fetched: dict[
            int, Entry
        ] = {}  # with their new places in the cache, not yet published
        self._gone: dict[int, str] = {}  # ids whose payload is gone, and why; not yet evicted
        self._orphans: set[int] = set()  # ids whose eviction Redis has forgotten
        self._guard = threading.Lock()  # of what a fetch notes for the committer
        self._room, self._looked = float("inf"), {"memory": 0.0, "cache": 0.0}
        self.group_bytes, self._used = BATCH_BYTES, 0
        super().__init__(folder, redis, run, schema, capacity, flush, remover, **options)

    def _payload(self, id: int) -> str:
        return self._key(f"payload:{id}")

    def _file_bytes(self, source: str) -> int:
        share = self._cache_bytes // (8 * max(self._files.appenders, 1))
        return min(super()._file_bytes(source), max(share, LEAST_CAPACITY), FILE_BYTES)

    # -- start -------------------------------------------------------------------------------------------

    def recover(self) -> Recovery:
        indexed, cached = self._read_index(), self._scan_cache()
        kept, repaired, lost = [], [], []
        ordered = [indexed[id] for id in sorted(indexed)]
        for entry, whole in zip(ordered, self._whole(ordered), strict=True):
            found = cached.pop((entry.writer, entry.sequence), None)
            if found is not None and found.length == entry.length:
                entry = entry._replace(file=found.file, offset=found.offset)
            else:
                entry = entry._replace(file=0, offset=0)
            if whole:
                kept.append(entry)
            elif entry.file and record.intact(super().raw(entry)):
                repaired.append(entry)
            else:
                lost.append(entry)
        self._next = max([*indexed, self.counters["last_id"], 0]) + 1
        reindexed = self._reindex(sorted(cached.values(), key=lambda each: each.time))
        self.commit([*repaired, *reindexed], lost)
        self.publish(sorted([*kept, *repaired, *reindexed]), [])
        self.committed = dict(self.appended)
        self._drop_files(set(self._files.numbers()) - set(self._live))
        return Recovery(len(self.entries), len(reindexed) + len(repaired), lost)

    def _scan_cache(self) -> dict[tuple[str, int], Found]:
        """What the files of earlier processes on this host hold."""
        cached = {}
        for found in self._files.scan():
            with contextlib.suppress(WireError):
                header = record.header(self._mapped.map(found.file), found.offset)
                cached[header["writer"], header["sequence"]] = found
        return cached

    def _whole(self, entries: Collection[Entry]) -> Iterator[bool]:
        """Of each entry, whether Redis holds as many bytes as it should."""
        ordered = list(entries)
        for place in range(0, len(ordered), KEYS):
            part = ordered[place : place + KEYS]
            with self._redis.pipeline(transaction=False) as pipeline:
                for entry in part:
                    pipeline.strlen(self._payload(entry.id))
                lengths = pipeline.execute()
            yield from (n == entry.length for n, entry in zip(lengths, part, strict=True))

    # -- in and out --------------------------------------------------------------------------------------

    def _taken(self, segment: Segment, file: int, offset: int, length: int) -> Entry:
        self._pending[file] += 1
        return super()._taken(segment, file, offset, length)

    def _write(
        self, entries: list[Entry], evicted: Sequence[Entry], changed: Sequence[Entry]
    ) -> None:
        for batch in list(self._batches(entries)) or [[]]:
            super()._write(batch, evicted, changed)
            evicted, changed = (), ()

    def _batches(self, entries: Iterable[Entry]) -> Iterator[list[Entry]]:
        """Runs of entries whose payload is small enough for one transaction."""
        batch: list[Entry] = []
        total = 0
        for entry in entries:
            if batch and total + entry.length > self.group_bytes:
                yield batch
                batch, total = [], 0
            batch.append(entry)
            total += entry.length
        if batch:
            yield batch

    def _add_payload(
        self, pipeline: Any, entries: Collection[Entry], evicted: Sequence[Entry]
    ) -> None:
        # First what goes, so that Redis has room for what comes.
        gone = [*(entry.id for entry in evicted), *self._orphans]
        if gone:
            pipeline.delete(*(self._payload(id) for id in gone))
        for entry in entries:
            if entry.id not in self.entries:  # else its payload is there, only the entry changes
                pipeline.set(self._payload(entry.id), super().raw(entry))

    def publish(
        self, entries: list[Entry], evicted: list[Entry], changed: Sequence[Entry] = ()
    ) -> None:
        for entry in entries:
            if self._pending[entry.file] > 0:
                self._pending[entry.file] -= 1
        super().publish(entries, evicted, changed)

    def evictions(self, entries: list[Entry]) -> list[Entry]:
        evicted = {entry.id: entry for entry in super().evictions(entries)}
        evicted |= self._losses()
        coming = sum(entry.length for entry in entries)
        short = self._shortage(coming) - sum(entry.length for entry in evicted.values())
        for id in self._order[GIVES_WAY]:
            if short <= 0:
                break
            if id not in evicted:
                evicted[id] = self.entries[id]
                short -= evicted[id].length
        return list(evicted.values())

    def _losses(self) -> dict[int, Entry]:
        """Entries found without their payload when somebody wanted it."""
        with self._guard:
            gone, self._gone = self._gone, {}
        lost = {}
        for id, reason in gone.items():
            entry = self.entries.get(id)
            if entry is not None:  # else it was evicted meanwhile
                lost[id] = entry
                log.error(
                    "lost: segment %d (%s, writer %s number %d, %d steps): its payload %s",
                    *(id, entry.source, entry.writer, entry.sequence, entry.steps, reason),
                )
        return lost

    def _shortage(self, coming: int) -> float:
        """Bytes that must go before `coming` bytes fit into Redis's memory."""
        now = time.monotonic()
        if now - self._looked["memory"] > LOOK_SECONDS or self._room < coming:
            self._looked["memory"] = now
            told = information(self._redis, "memory")
            limit = told.get("maxmemory", 0)
            self._used = told.get("used_memory", 0)
            used = self._used - told.get("mem_not_counted_for_evict", 0)
            self._room = limit * (1 - RESERVE) - used if limit else float("inf")
            # Redis counts what it has been sent of a transaction, even of one that it will refuse.
            self.group_bytes = min(BATCH_BYTES, max(limit // 16, 1 << 20)) if limit else BATCH_BYTES
        self._room -= coming
        return -self._room

    # -- reading -----------------------------------------------------------------------------------------

    def raw(self, entry: Entry) -> memoryview:
        with self._guard:
            entry = self._fetched.get(entry.id, entry)
        if entry.file:
            with contextlib.suppress(FileNotFoundError):
                return super().raw(entry)
        try:
            value = self._redis.get(self._payload(entry.id))
        except RedisError as error:
            raise TwinRLError(f"segment {entry.id} cannot be read: {explain(error)}") from None
        reason = "is damaged: its checksum does not fit"
        if value is None:
            reason = "is missing in Redis"
        elif len(value) == entry.length and record.intact(value):
            self._remember(entry, value)
            return memoryview(value)
        with self._guard:
            self._gone[entry.id] = reason
        raise FileNotFoundError(f"the payload of segment {entry.id} {reason}")

    def recall(self, entry: Entry) -> Entry:
        self.raw(entry)
        with self._guard:
            return self._fetched.get(entry.id, entry)

    def _remember(self, entry: Entry, value: bytes) -> None:
        """Put a fetched record into the cache: `moves` tells readers where it lies."""
        try:
            file, offset, _ = self._files.append_record(
                f"fetched {entry.source}", [value], entry.length, self._file_bytes(entry.source)
            )
        except OSError as error:
            log.warning("segment %d does not fit into the cache: %s", entry.id, error)
            return
        with self._guard:
            self._fetched[entry.id] = entry._replace(file=file, offset=offset)

    def moves(self) -> list[Entry]:
        with self._guard:
            fetched, self._fetched = self._fetched, {}
        changed = {id: entry for id, entry in fetched.items() if id in self.entries}
        if time.monotonic() - self._looked["cache"] < LOOK_SECONDS:
            return list(changed.values())
        self._looked["cache"] = time.monotonic()
        numbers = [number for number in sorted(self._live) if number]
        excess = sum(self._files.size(number) for number in numbers) - self._cache_bytes
        for number in numbers:
            if excess <= 0:
                break
            if self._files.is_active(number) or self._pending[number]:
                continue
            excess -= self._files.size(number)
            for entry in self.entries.values():
                if entry.file == number and entry.id not in changed:
                    changed[entry.id] = entry._replace(file=0, offset=0)
        return list(changed.values())

    # -- Redis was away ----------------------------------------------------------------------------------

    def reconnect(self, redis: Redis) -> None:
        self._redis = redis
        entries = list(self.entries.values())
        missing = [e for e, whole in zip(entries, self._whole(entries), strict=True) if not whole]
        there = {int(id) for id in redis.hkeys(self._key("index"))}
        self._orphans = there - set(self.entries)
        for batch in self._batches(missing):
            self._put_again(batch)
        super().reconnect(redis)
        self._orphans = set()

    def _put_again(self, entries: list[Entry]) -> None:
        """Payload that Redis lost with its last seconds: what the cache holds goes back, the rest is lost."""
        with self._redis.pipeline(transaction=True) as pipeline:
            if self._lease is not None:
                self._lease.guard(pipeline)
            for entry in entries:
                try:
                    pipeline.set(self._payload(entry.id), super().raw(entry))
                except FileNotFoundError:
                    with self._guard:
                        self._gone[entry.id] = "was lost by Redis and is not in the cache"
            pipeline.execute()

    def stats(self) -> dict[str, Any]:
        """How full Redis, as last looked at, and the cache are, bytes."""
        cached = sum(nbytes for number, nbytes in self._live_bytes.items() if number)
        return {"replay/redis_bytes": self._used, "replay/cache_bytes": cached}
