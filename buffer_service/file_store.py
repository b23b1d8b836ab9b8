"""The file form of the store: payload in mapped segment files, index in Redis."""

from __future__ import annotations

import collections
import json
import logging
import os
import secrets
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgpack
from redis.exceptions import OutOfMemoryError

from buffer_service import record
from buffer_service.entry import CUT, LEASE, OPEN, Entry, describe
from buffer_service.files import FILE_BYTES, Found, MappedFiles, SegmentFiles, identity, path_of
from buffer_service.promise import keeps, promise
from buffer_service.redis_address import Redis, appendfsync, prefix
from buffer_service.redis_lease import RedisLease
from buffer_service.store import FLUSH_POLICIES, REMOVERS, SCHEMA_CURE, Recovery, Store
from twinrl.core.errors import ConfigError, Rejected, ResumeError, WireError
from twinrl.core.segment import SOURCES, Schema, Segment

log = logging.getLogger(__name__)
LEAST_CAPACITY = 1 << 20
COMPACT_BELOW = 0.5  # a sealed file with a smaller share of live bytes is rewritten


class FileStore(Store):
    """Payload in mapped segment files in `folder`; Redis holds index, dedupe state, cursors and counters."""

    form = "files"
    _adoption = ""  # how to continue that run here, where it can be done
    _adopts = False  # whether a run that another folder began may be continued in an empty one

    def __init__(
        self,
        folder: Path,
        redis: Redis,
        run: str,
        schema: Schema,
        capacity: dict[str, int] | int | None = None,
        flush: str = "everysec",
        remover: str = "oldest",
        lease: RedisLease | None = None,
    ) -> None:
        """`capacity`: bytes to keep of each source, or of twins (None, or a source left out: as many as fit).

        lease: held, where a service on another host could reach this Redis; it guards every transaction.
        """
        if flush not in FLUSH_POLICIES:
            raise ConfigError(f"flush is {flush!r}, must be one of {', '.join(FLUSH_POLICIES)}")
        if remover not in REMOVERS:
            raise ConfigError(f"remover is {remover!r}, must be one of {', '.join(REMOVERS)}")
        self.capacity = _capacities(capacity)
        self.schema, self.flush_policy, self.remover = schema, flush, remover
        self.folder = folder
        self._redis, self._prefix, self._lease = redis, prefix(run), lease
        synced = appendfsync(redis)
        if trouble := keeps(flush, synced, self.form):
            raise ConfigError(trouble)
        self.promise = promise(flush, synced, self.form)
        self._files = SegmentFiles(folder, durable=self.form == "files" and flush != "never")
        self._mapped = MappedFiles(folder)
        self.entries, self.appended, self.committed = {}, {}, {}
        self.cursors, self.counters = {}, collections.defaultdict(int)
        self.priorities, self.open_episodes = {}, {}
        self._new_priorities: dict[int, float] = {}
        self.bytes = dict.fromkeys(SOURCES, 0)
        self.transitions = dict.fromkeys(SOURCES, 0)
        self._order: dict[str, dict[int, None]] = {source: {} for source in SOURCES}  # oldest first
        self._live: collections.Counter[int] = collections.Counter()  # segments in each file
        self._live_bytes: collections.Counter[int] = collections.Counter()
        self._sparse: set[int] = set()  # files that lost others than their oldest segments
        self._next = 1
        self._identify(folder)

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _file_bytes(self, source: str) -> int:
        """Small files when little is kept or many write, so that eviction gives bytes back soon."""
        share = 8 * max(self._files.appenders, 1)
        return min(
            FILE_BYTES, max(self.capacity.get(source, 8 * FILE_BYTES) // share, LEAST_CAPACITY)
        )

    def _identify(self, folder: Path) -> None:
        """Folder and Redis must belong together, and to the same schema."""
        path = folder / "identity.json"
        mine = identity(folder)
        theirs = {k.decode(): v.decode() for k, v in self._redis.hgetall(self._key("run")).items()}
        if theirs.get("form") == "redis" != self.form:
            raise ResumeError(
                f"the payload of the run under {self._prefix!r} lies in Redis: set replay.store to redis"
            )
        if theirs and not mine and self._adopts:
            # Under a new token: the old folder, if it comes back, is not this run's any more.
            mine = {"token": secrets.token_hex(8), "schema": theirs["schema"]}
            self._write_identity(path, mine)
        elif theirs and theirs["token"] != mine.get("token"):
            raise ResumeError(
                f"Redis already holds another run under {self._prefix!r} (of {theirs['folder']}): "
                f"start this run under another run.name, or delete those keys{self._adoption}"
            )
        digest = self.schema.digest()
        if mine and mine["schema"] != digest:
            raise ResumeError(
                f"{folder} holds segments of schema {mine['schema']}, the configuration gives "
                f"{digest}: {SCHEMA_CURE}"
            )
        if not mine:
            mine = {"token": secrets.token_hex(8), "schema": digest}
            self._write_identity(path, mine)
        self.token = mine["token"]
        self._identity = {**mine, "folder": str(folder), "form": self.form}
        self._redis.hset(self._key("run"), mapping=self._identity)

    def _write_identity(self, path: Path, identity: dict[str, str]) -> None:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(identity))
        os.replace(temporary, path)

    def recover(self) -> Recovery:
        indexed = self._read_index()
        found = {(each.file, each.offset): each for each in self._files.scan()}
        lost = [
            e for e in indexed.values() if not self._holds(e, found.pop((e.file, e.offset), None))
        ]
        for entry in lost:
            del indexed[entry.id]
        self._next = max([*indexed, *(e.id for e in lost), self.counters["last_id"], 0]) + 1
        reindexed = self._reindex(sorted(found.values(), key=lambda each: each.time))
        entries = sorted([*indexed.values(), *reindexed])
        self.commit(reindexed, lost)
        self.publish(entries, [])
        self.committed = dict(self.appended)
        self._drop_files(set(self._files.numbers()) - set(self._live))
        return Recovery(len(entries), len(reindexed), lost)

    def _read_index(self) -> dict[int, Entry]:
        """Fill the fields from Redis and return its index."""
        for writer, sequence in self._redis.hgetall(self._key("writers")).items():
            self.appended[writer.decode()] = int(sequence)
        for name, value in self._redis.hgetall(self._key("counters")).items():
            self.counters[name.decode()] = int(value)
        for name, value in self._redis.hgetall(self._key("cursors")).items():
            self.cursors[name.decode()] = msgpack.unpackb(value)
        for id, value in self._redis.hgetall(self._key("priorities")).items():
            self.priorities[int(id)] = float(value)
        return {
            int(id): Entry(*msgpack.unpackb(value))
            for id, value in self._redis.hgetall(self._key("index")).items()
        }

    def _holds(self, entry: Entry, found: Found | None) -> bool:
        """Whether the record of an index entry is there."""
        if found is not None:
            return found.length == entry.length
        try:  # behind a damaged record the walk through the file saw nothing
            raw = self.raw(entry)
            header = record.header(raw)
        except (OSError, ValueError, WireError):
            return False
        name = (header.get("writer"), header.get("sequence"))
        return name == (entry.writer, entry.sequence) and record.intact(raw)

    def _reindex(self, found: Iterable[Found]) -> list[Entry]:
        entries = []
        for each in found:
            try:
                segment = self._mapped.segment(each.file, each.offset)
                entry = describe(self._next, segment, each.file, each.offset, each.length)
            except (WireError, KeyError) as error:
                log.error("file %d, byte %d: cannot be read: %s", each.file, each.offset, error)
                continue
            # Evicted segments lie in files with live ones for a while: they are no news. And where a crash
            # left a gap in a writer's numbers, the writer has no acknowledgement and sends again from there.
            last = self.appended.get(entry.writer, -1)
            follows = last == -1 or entry.sequence == last + 1 or each.sealed
            if entry.sequence > last and follows:
                entries.append(entry)
                self.appended[entry.writer] = entry.sequence
                self._next += 1
        self.count(entries)
        return entries

    def count(self, entries: Iterable[Entry]) -> None:
        """Add new entries to the counters that outlive restarts."""
        for entry in entries:
            self.counters[f"inserted/{entry.source}"] += entry.steps

    def append(self, segment: Segment) -> Entry:
        source = segment.header["source"]
        return self._taken(segment, *self._files.append(segment, self._file_bytes(source)))

    def allocate(self, writer: str, source: str, nbytes: int) -> tuple[int, int]:
        return self._files.allocate(writer, source, self._file_bytes(source), nbytes)

    def written(self, file: int, offset: int, length: int) -> Segment:
        try:
            whole = self._mapped.map(file)
            found = record.prefix(whole, offset)
            if found is None or found.length != length:
                raise WireError(f"no record of {length} bytes lies at byte {offset}")
            return record.decode(whole, offset)
        except (OSError, WireError) as error:
            raise Rejected(f"segment file {file}: {error}") from None

    def adopt(self, segment: Segment, file: int, offset: int, length: int) -> Entry:
        header = segment.header
        self._files.adopt(header["writer"], header["source"], file, offset, length)
        return self._taken(segment, file, offset, length)

    def placed(self, writer: str, source: str) -> tuple[int, int] | None:
        return self._files.owned(writer, source)

    def _taken(self, segment: Segment, file: int, offset: int, length: int) -> Entry:
        entry = describe(self._next, segment, file, offset, length)
        self._next += 1
        self.appended[entry.writer] = entry.sequence
        return entry

    def evictions(self, entries: list[Entry]) -> list[Entry]:
        evicted: list[Entry] = []
        for source, capacity in self.capacity.items():
            coming = sum(entry.length for entry in entries if entry.source == source)
            excess = self.bytes[source] + coming - capacity
            if excess <= 0:
                continue
            order: Iterable[int] = self._order[source]
            if self.remover == "lowest_priority":
                # Sorting costs, so some more than needed goes. What was never drawn has no priority: it stays.
                order = sorted(order, key=lambda id: (self.priorities.get(id, float("inf")), id))
                excess += capacity // 64
            for id in order:
                if excess <= 0:
                    break
                evicted.append(self.entries[id])
                excess -= self.entries[id].length
        return evicted

    def moves(self) -> list[Entry]:
        # Where the oldest go, whole files empty by themselves.
        for number in self._sparse:
            if self._files.is_active(number) or number not in self._live:
                continue
            size = path_of(self.folder, number).stat().st_size
            if self._live_bytes[number] >= COMPACT_BELOW * size:
                continue
            self._sparse.discard(number)
            moved = []
            for entry in [e for e in self.entries.values() if e.file == number]:
                # A file of its own: another thread appends to the source's.
                place = self._files.append_record(
                    f"moved {entry.source}", [self.raw(entry)], entry.length, size
                )
                moved.append(entry._replace(file=place[0], offset=place[1]))
            self._files.sync()  # what was durable stays durable: the old file is about to go
            return moved
        return []

    def commit(
        self, entries: list[Entry], evicted: list[Entry], changed: Sequence[Entry] = ()
    ) -> None:
        if self.flush_policy == "always" and (entries or changed):
            self._files.sync()
        try:
            self._write(entries, evicted, changed)
        except OutOfMemoryError:
            if not evicted:
                raise
            self._forget(evicted)  # Redis takes nothing now, but it lets go
            if entries or changed:  # else the counters can wait
                self._write(entries, evicted, changed)

    def _write(
        self, entries: list[Entry], evicted: Sequence[Entry], changed: Sequence[Entry]
    ) -> None:
        writers = {entry.writer: entry.sequence for entry in entries}
        self._transact([*entries, *changed], writers, evicted)

    def _forget(self, evicted: Sequence[Entry]) -> None:
        """Evict, with nothing in the transaction that needs memory."""
        with self._redis.pipeline(transaction=True) as pipeline:
            if self._lease is not None:
                self._lease.guard(pipeline)
            self._add_payload(pipeline, [], evicted)
            for name in ("index", "priorities"):
                pipeline.hdel(self._key(name), *(entry.id for entry in evicted))
            pipeline.execute()

    def _transact(
        self,
        entries: Collection[Entry],
        writers: dict[str, int],
        evicted: Sequence[Entry],
        anew: bool = False,
    ) -> None:
        index = {entry.id: msgpack.packb(entry) for entry in entries}
        if index:
            self.counters["last_id"] = max(self.counters["last_id"], *index)
        priorities = dict(self.priorities if anew else self._new_priorities)
        with self._redis.pipeline(transaction=True) as pipeline:
            if self._lease is not None:
                self._lease.guard(pipeline)
            self._add_payload(pipeline, entries, evicted)
            if anew:
                pipeline.delete(self._key("index"), self._key("priorities"))
                pipeline.hset(self._key("run"), mapping=self._identity)
            if index:
                pipeline.hset(self._key("index"), mapping=index)
            if writers:
                pipeline.hset(self._key("writers"), mapping=writers)
            if priorities:
                pipeline.hset(self._key("priorities"), mapping=priorities)
            if evicted:
                for name in ("index", "priorities"):
                    pipeline.hdel(self._key(name), *(entry.id for entry in evicted))
            cursors = {name: msgpack.packb(each) for name, each in dict(self.cursors).items()}
            if cursors:
                pipeline.hset(self._key("cursors"), mapping=cursors)
            if self.counters:
                pipeline.hset(self._key("counters"), mapping=dict(self.counters))
            pipeline.execute()
        for id, value in priorities.items():
            if self._new_priorities.get(id) == value:
                del self._new_priorities[id]

    def _add_payload(
        self, pipeline: Any, entries: Collection[Entry], evicted: Sequence[Entry]
    ) -> None:
        """Add to a transaction what it needs beside the index."""

    def set_priorities(self, values: dict[int, float]) -> None:
        known = {id: value for id, value in values.items() if id in self.entries}
        self.priorities |= known
        self._new_priorities |= known

    def publish(
        self, entries: list[Entry], evicted: list[Entry], changed: Sequence[Entry] = ()
    ) -> None:
        for entry in entries:
            self.bytes[entry.source] += entry.length
            self.transitions[entry.source] += entry.steps
            self._order[entry.source][entry.id] = None
            self.committed[entry.writer] = entry.sequence
            self._place(entry)
        for entry in changed:
            if entry.id in self.entries:
                self._displace(self.entries[entry.id])
                self._place(entry)
        for entry in evicted:
            order = self._order[entry.source]
            if next(iter(order)) != entry.id:
                self._sparse.add(self.entries[entry.id].file)
            del order[entry.id]
            self._displace(self.entries.pop(entry.id))
            self.priorities.pop(entry.id, None)
            self._new_priorities.pop(entry.id, None)
            self.bytes[entry.source] -= entry.length
            self.transitions[entry.source] -= entry.steps
        self._drop_files({n for n, live in self._live.items() if not live})

    def _place(self, entry: Entry) -> None:
        self.entries[entry.id] = entry
        self._live[entry.file] += 1
        self._live_bytes[entry.file] += entry.length
        episode = (entry.writer, entry.episode)
        if entry.end != OPEN:
            self.open_episodes.pop(episode, None)
        elif entry.id >= self.open_episodes.get(episode, 0):
            self.open_episodes[episode] = entry.id

    def _displace(self, entry: Entry) -> None:
        self._live[entry.file] -= 1
        self._live_bytes[entry.file] -= entry.length
        if self.open_episodes.get((entry.writer, entry.episode)) == entry.id:
            del self.open_episodes[entry.writer, entry.episode]

    def abandoned(self, writer: str) -> list[Entry]:
        ids = [id for (name, _), id in self.open_episodes.items() if name == writer]
        return [self.entries[id]._replace(end=CUT, marked=LEASE) for id in ids]

    def release(self, writer: str) -> None:
        self._files.release(writer)

    def _drop_files(self, numbers: set[int]) -> None:
        for number in numbers:
            if not self._files.is_active(number):
                self._files.delete(number)
                self._live.pop(number, None)
                self._live_bytes.pop(number, None)
                self._sparse.discard(number)
                self._mapped.forget(set(self._live))

    def raw(self, entry: Entry) -> memoryview:
        return self._mapped.raw(entry.file, entry.offset, entry.length)

    def recall(self, entry: Entry) -> Entry:
        return entry

    def flush(self) -> None:
        self._files.sync()

    def reconnect(self, redis: Redis) -> None:
        self._redis = redis
        self._transact(self.entries.values(), self.committed, [], anew=True)

    def close(self) -> None:
        self._files.close()
        self._transact([], {}, [])
        self._redis.close()


def _capacities(capacity: dict[str, int] | int | None) -> dict[str, int]:
    if capacity is None:
        return {}
    found = capacity if isinstance(capacity, dict) else {"twin": capacity}
    for source, nbytes in found.items():
        if source not in SOURCES:
            raise ConfigError(f"capacity names source {source!r}; sources are {', '.join(SOURCES)}")
        if nbytes < LEAST_CAPACITY:
            raise ConfigError(
                f"a capacity of {nbytes} bytes for {source} holds no segment; at least 1 MiB"
            )
    return dict(found)
