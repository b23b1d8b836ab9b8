"""Where segments are kept: the Store interface and its file form.

The order that makes an acknowledgement a promise: `append` writes the payload, `commit` makes it as durable as
the flush policy says and then puts index entry, dedupe state and counters into Redis with one transaction.
A process that dies in between leaves payload without an entry, which `recover` indexes from its own header.
"""

from __future__ import annotations

import collections
import json
import logging
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import msgpack

from buffer_service import record
from buffer_service.embedded_redis import Redis
from buffer_service.entry import Entry, describe
from buffer_service.files import FILE_BYTES, Found, MappedFiles, SegmentFiles, identity
from twinrl.core.errors import ConfigError, ResumeError, WireError
from twinrl.core.segment import SOURCES, Schema, Segment

log = logging.getLogger(__name__)
FLUSH_POLICIES = ("always", "everysec")
EVICTABLE = "twin"  # what people and robots did is never evicted
SCHEMA_CURE = (
    "take the configuration the run was started with, or start a new run with another run.name"
)


class Recovery(NamedTuple):
    """What a start found."""

    segments: int  # in the index now
    reindexed: int  # payloads that had no index entry
    lost: list[Entry]  # index entries whose bytes are gone


class Store(ABC):
    """Segments with their index, in order of insertion.

    `append` is called by one thread, `commit` and `flush` by others; the caller guards the fields with a lock.
    """

    entries: dict[int, Entry]  # committed, by id, oldest first
    appended: dict[str, int]  # writer -> highest sequence number taken in
    committed: dict[str, int]  # writer -> highest sequence number that may be acknowledged
    cursors: dict[str, dict[str, int]]  # name -> {"position", "taken", "skipped", ...}
    counters: dict[str, int]  # kept over restarts: inserted and sampled transitions

    @abstractmethod
    def recover(self) -> Recovery:
        """Bring index and payload together. Called once, before anything else."""

    @abstractmethod
    def append(self, segment: Segment) -> Entry:
        """Write the payload; not yet visible, not yet to be acknowledged."""

    @abstractmethod
    def evictions(self, entries: list[Entry]) -> list[Entry]:
        """Which segments must go when `entries` come in."""

    @abstractmethod
    def commit(self, entries: list[Entry], evicted: list[Entry]) -> None:
        """Make `entries` durable: payload first, then one transaction. May be repeated after a failure."""

    @abstractmethod
    def publish(self, entries: list[Entry], evicted: list[Entry]) -> None:
        """Show committed entries in the fields above and forget the evicted ones."""

    @abstractmethod
    def raw(self, entry: Entry) -> memoryview:
        """The record of a segment. FileNotFoundError when it was evicted."""

    @abstractmethod
    def flush(self) -> None:
        """What `everysec` does every second."""

    @abstractmethod
    def reconnect(self, redis: Redis) -> None:
        """Redis came back, perhaps without its last second: tell it everything again."""

    @abstractmethod
    def close(self) -> None:
        """Leave everything durable."""


class FileStore(Store):
    """Payload in mapped segment files in `folder`; Redis holds index, dedupe state, cursors and counters."""

    def __init__(
        self,
        folder: Path,
        redis: Redis,
        run: str,
        schema: Schema,
        capacity: int | None = None,
        flush: str = "everysec",
    ) -> None:
        """`capacity`: bytes of twin segments to keep (None: as many as the disk takes)."""
        if flush not in FLUSH_POLICIES:
            raise ConfigError(f"flush is {flush!r}, must be one of {', '.join(FLUSH_POLICIES)}")
        if capacity is not None and capacity < 1 << 20:
            raise ConfigError(f"a capacity of {capacity} bytes holds no segment; at least 1 MiB")
        self.capacity, self.schema, self._always = capacity, schema, flush == "always"
        self.folder = folder
        self._redis, self._prefix = redis, f"twinrl:{run}:"
        self._files, self._mapped = SegmentFiles(folder), MappedFiles(folder)
        # Small files when little is kept, so that eviction gives bytes back soon.
        self._file_bytes = min(FILE_BYTES, max((capacity or 8 * FILE_BYTES) // 8, 1 << 20))
        self.entries, self.appended, self.committed = {}, {}, {}
        self.cursors, self.counters = {}, collections.defaultdict(int)
        self.bytes = dict.fromkeys(SOURCES, 0)
        self.transitions = dict.fromkeys(SOURCES, 0)
        self._twins: collections.deque[int] = collections.deque()
        self._live: collections.Counter[int] = collections.Counter()  # segments in each file
        self._next = 1
        self._identify(folder)

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _identify(self, folder: Path) -> None:
        """Folder and Redis must belong together, and to the same schema."""
        path = folder / "identity.json"
        mine = identity(folder)
        theirs = {k.decode(): v.decode() for k, v in self._redis.hgetall(self._key("run")).items()}
        if theirs and theirs["token"] != mine.get("token"):
            raise ResumeError(
                f"Redis already holds another run under {self._prefix!r} (of {theirs['folder']}): "
                "start this run under another run.name, or delete those keys"
            )
        digest = self.schema.digest()
        if mine and mine["schema"] != digest:
            raise ResumeError(
                f"{folder} holds segments of schema {mine['schema']}, the configuration gives "
                f"{digest}: {SCHEMA_CURE}"
            )
        if not mine:
            mine = {"token": secrets.token_hex(8), "schema": digest}
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(mine))
            os.replace(temporary, path)
        self.token = mine["token"]
        self._identity = {**mine, "folder": str(folder)}
        self._redis.hset(self._key("run"), mapping=self._identity)

    def recover(self) -> Recovery:
        indexed = {
            int(id): Entry(*msgpack.unpackb(value))
            for id, value in self._redis.hgetall(self._key("index")).items()
        }
        for writer, sequence in self._redis.hgetall(self._key("writers")).items():
            self.appended[writer.decode()] = int(sequence)
        for name, value in self._redis.hgetall(self._key("counters")).items():
            self.counters[name.decode()] = int(value)
        for name, value in self._redis.hgetall(self._key("cursors")).items():
            self.cursors[name.decode()] = msgpack.unpackb(value)
        found = {each.id: each for each in self._files.scan()}
        lost = [entry for entry in indexed.values() if not self._holds(entry, found.get(entry.id))]
        for entry in lost:
            del indexed[entry.id]
        reindexed = self._reindex(each for id, each in sorted(found.items()) if id not in indexed)
        entries = sorted([*indexed.values(), *reindexed])
        self._next = max([*found, *(entry.id for entry in entries), self.counters["last_id"]]) + 1
        self.commit(reindexed, lost)
        self.publish(entries, [])
        self.committed = dict(self.appended)
        self._drop_files(set(self._files.numbers()) - set(self._live))
        return Recovery(len(entries), len(reindexed), lost)

    def _holds(self, entry: Entry, found: Found | None) -> bool:
        """Whether the record of an index entry is there."""
        if found is not None:
            return (found.file, found.offset, found.length) == entry[-3:]
        try:  # behind a damaged record the walk through the file saw nothing
            return record.holds(self.raw(entry), entry.id)
        except (OSError, ValueError):
            return False

    def _reindex(self, found: Iterable[Found]) -> list[Entry]:
        entries = []
        for each in found:
            try:
                segment = self._mapped.segment(each.file, each.offset)
                entry = describe(each.id, segment, each.file, each.offset, each.length)
            except (WireError, KeyError) as error:
                log.error("the record of segment %d cannot be read: %s", each.id, error)
                continue
            # Evicted segments lie in files with live ones for a while: they are no news. And where a crash
            # left a gap in a writer's numbers, the writer has no acknowledgement and sends again from there.
            last = self.appended.get(entry.writer, -1)
            follows = last == -1 or entry.sequence == last + 1 or each.sealed
            if entry.sequence > last and follows:
                entries.append(entry)
                self.appended[entry.writer] = entry.sequence
        self.count(entries)
        return entries

    def count(self, entries: Iterable[Entry]) -> None:
        """Add new entries to the counters that outlive restarts."""
        for entry in entries:
            self.counters[f"inserted/{entry.source}"] += entry.steps

    def append(self, segment: Segment) -> Entry:
        place = self._files.append(self._next, segment, self._file_bytes)
        entry = describe(self._next, segment, *place)
        self._next += 1
        self.appended[entry.writer] = entry.sequence
        return entry

    def evictions(self, entries: list[Entry]) -> list[Entry]:
        if self.capacity is None:
            return []
        coming = sum(entry.length for entry in entries if entry.source == EVICTABLE)
        excess, evicted = self.bytes[EVICTABLE] + coming - self.capacity, []
        for id in self._twins:
            if excess <= 0:
                break
            evicted.append(self.entries[id])
            excess -= self.entries[id].length
        return evicted

    def commit(self, entries: list[Entry], evicted: list[Entry]) -> None:
        if self._always and entries:
            self._files.sync()
        writers = {entry.writer: entry.sequence for entry in entries}
        self._transact(entries, writers, evicted)

    def _transact(
        self,
        entries: Iterable[Entry],
        writers: dict[str, int],
        evicted: list[Entry],
        anew: bool = False,
    ) -> None:
        index = {entry.id: msgpack.packb(entry) for entry in entries}
        if index:
            self.counters["last_id"] = max(self.counters["last_id"], *index)
        with self._redis.pipeline(transaction=True) as pipeline:
            if anew:
                pipeline.delete(self._key("index"))
                pipeline.hset(self._key("run"), mapping=self._identity)
            if index:
                pipeline.hset(self._key("index"), mapping=index)
            if writers:
                pipeline.hset(self._key("writers"), mapping=writers)
            if evicted:
                pipeline.hdel(self._key("index"), *(entry.id for entry in evicted))
            cursors = {name: msgpack.packb(each) for name, each in dict(self.cursors).items()}
            if cursors:
                pipeline.hset(self._key("cursors"), mapping=cursors)
            if self.counters:
                pipeline.hset(self._key("counters"), mapping=dict(self.counters))
            pipeline.execute()

    def publish(self, entries: list[Entry], evicted: list[Entry]) -> None:
        for entry in entries:
            self.entries[entry.id] = entry
            self.bytes[entry.source] += entry.length
            self.transitions[entry.source] += entry.steps
            self._live[entry.file] += 1
            if entry.source == EVICTABLE:
                self._twins.append(entry.id)
            self.committed[entry.writer] = entry.sequence
        for entry in evicted:
            del self.entries[entry.id]
            self._twins.popleft()
            self.bytes[entry.source] -= entry.length
            self.transitions[entry.source] -= entry.steps
            self._live[entry.file] -= 1
        self._drop_files({n for n, live in self._live.items() if not live})

    def _drop_files(self, numbers: set[int]) -> None:
        for number in numbers:
            if not self._files.is_active(number):
                self._files.delete(number)
                del self._live[number]
                self._mapped.forget(set(self._live))

    def raw(self, entry: Entry) -> memoryview:
        return self._mapped.raw(entry.file, entry.offset, entry.length)

    def flush(self) -> None:
        self._files.sync()

    def reconnect(self, redis: Redis) -> None:
        self._redis = redis
        self._transact(self.entries.values(), self.committed, [], anew=True)

    def close(self) -> None:
        self._files.close()
        self._transact([], {}, [])
        self._redis.close()
