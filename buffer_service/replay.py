"""The replay service's methods: take segments in, keep them, say who may sample what.

Three threads: the server's (requests, one after the other), the committer's and the ticker's (syncs once a second,
ends long polls). Every field of the store is touched under one lock.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np

from buffer_service.changes import Changes
from buffer_service.committer import Abandon, Change, Committer, Delete, Insert
from buffer_service.entry import Entry
from buffer_service.limiter import ONLINE, RateLimiter
from buffer_service.polls import MAX_WAIT, Polls
from buffer_service.redis_address import Redis
from buffer_service.rows import RowGatherer, row_codec, wanted
from buffer_service.store import SCHEMA_CURE, Store
from twinrl.core import arguments, wire
from twinrl.core.errors import Rejected, TwinRLError
from twinrl.core.segment import SOURCES, Schema, Segment, check
from twinrl.core.sockets import MAX_MESSAGE_BYTES, Request, Server

log = logging.getLogger(__name__)
TICK = 0.1  # s
MAX_ENTRIES = 1000  # in one answer
MAX_FETCH_BYTES = 128 << 20
MAX_RECALL_BYTES = 32 << 20  # others wait meanwhile
MAX_PRIORITIES = 10_000  # in one answer
MAX_IDS = 100_000  # in one request
MAX_WRITERS = 100_000  # names that a service knows
MAX_CURSORS = 1000
MAX_CURSOR_VALUES = 16
MAX_COUNT = 1 << 40  # transitions in one request
LEASE_SECONDS = (
    60.0  # a writer that is silent for so long is dead; a living one says hello more often
)


class Service:
    """Answers the replay methods on a Server; `store` must be recovered already."""

    def __init__(
        self,
        store: Store,
        server: Server,
        schema: Schema,
        limiter: RateLimiter | None = None,
        redis_again: Callable[[], Redis] | None = None,
        lease: float = LEASE_SECONDS,
    ) -> None:
        """`redis_again()` connects to Redis anew after it was away, and starts it if it is ours.

        lease: s without a word after which a writer's open episodes are closed as truncated.
        """
        self.store, self.server, self.schema = store, server, schema
        self.limiter = limiter or RateLimiter()
        self._lock = threading.RLock()
        self._committer = Committer(store, self._lock, redis_again, self._published)
        self._polls = Polls(self._lock)
        self._sessions: dict[str, str] = {}
        self._lease, self._start = lease, time.monotonic()
        self._heard: dict[str, float] = {}  # monotonic s of each writer's last word
        self._changes = Changes()
        self._boot = format(time.time_ns(), "x")  # readers start over when it changes
        self._stop = threading.Event()
        self._rates = {
            "inserts": 0,
            "samples": 0,
            "bytes": 0,
            "repeats": 0,
            "time": time.monotonic(),
        }
        self._rows = RowGatherer(schema)
        self._restore_limiter()
        for method in (
            *(
                "hello",
                "insert",
                "allocate",
                "insert_file",
                "index",
                "fetch",
                "recall",
                "rows",
                "permit",
            ),
            *("priorities", "priorities_read", "delete", "cursor_read", "cursor_commit", "info"),
        ):
            server.bind(method, getattr(self, method))
        self._ticker = threading.Thread(target=self._tick_loop, name="ticker", daemon=True)

    def start(self) -> Service:
        """Begin to serve."""
        self._committer.start()
        self._ticker.start()
        self.server.start()
        return self

    def close(self) -> None:
        """Stop serving; what came in is committed and durable then."""
        self.server.close()
        self._rows.close()
        self._stop.set()
        self._ticker.join(30)
        self._committer.close()

    @property
    def failure(self) -> Exception | None:
        """What ended one of the threads, which serves nobody then."""
        return self._committer.failure or self.server.failure

    # Methods, each called in the server's thread.

    def hello(self, request: Request) -> dict[str, Any]:
        """Compare protocol and schema; tell a writer its last numbers, a reader where the files lie."""
        args = request.args
        if args.get("protocol") != wire.PROTOCOL:
            raise Rejected(
                f"replay speaks protocol {wire.PROTOCOL}, you {args.get('protocol')!r}: "
                "install the same TwinRL version on both sides"
            )
        digest = args.get("digest")
        if digest is not None and digest != self.schema.digest():
            raise Rejected(
                f"replay holds segments of schema {self.schema.digest()} {tuple(self.schema)}, yours is "
                f"{digest}: {SCHEMA_CURE}"
            )
        answer = {
            "schema": list(self.schema),
            "host": socket.gethostname(),
            "folder": str(self.store.folder),
            "token": self.store.token,
            "form": self.store.form,
            "flush": self.store.flush_policy,
            "lease": self._lease,
            "limited": self.limiter.samples_per_insert is not None,
        }
        if args.get("writer") is not None:
            writer, session = _writer(args), _session(args)
            with self._lock:
                if not args.get("probe") and session is not None:
                    self._admit(writer)
                    if self._sessions.get(writer) != session:
                        # Its predecessor is dead: nobody ends the episodes that it left open.
                        self.store.release(writer)
                        self._committer.put(Abandon(writer, None))
                    self._sessions[writer] = session
                self._check_session(writer, session)
                answer["appended"] = self.store.appended.get(writer, -1)
                answer["committed"] = self.store.committed.get(writer, -1)
        return answer

    def insert(self, request: Request) -> Future | dict[str, Any]:
        """Take a segment; acknowledged when it is durable. Repeats are dropped, gaps are refused."""
        segment = Segment(arguments.mapping(request.args, "header"), request.arrays)
        check(segment, self.schema)
        header = segment.header
        with self._lock:
            return self._insert(
                request.args,
                *(header["writer"], header["sequence"]),
                lambda: self.store.append(segment),
            )

    def allocate(self, request: Request) -> dict[str, Any]:
        """A file for a writer on this host to put its records into; `bytes`: of its next one."""
        args = request.args
        writer, source = _writer(args), arguments.text(args, "source")
        nbytes = arguments.integer(args, "bytes", low=1, high=MAX_MESSAGE_BYTES)
        if source not in SOURCES:
            raise Rejected(f"source {source!r} is none of {', '.join(SOURCES)}")
        with self._lock:
            self._check_session(writer, _session(args))
            try:
                file, size = self.store.allocate(writer, source, nbytes)
            except OSError as error:
                raise self._full(error) from None
        return {"file": file, "size": size}

    def insert_file(self, request: Request) -> Future | dict[str, Any]:
        """`insert` of a record that its writer put into the file it was allocated, where that file's content ends.

        Where it does not lie there (the service or Redis was away), {"refused", "anew"} asks to allocate anew.
        """
        args = request.args
        writer, source = _writer(args), arguments.text(args, "source")
        sequence = arguments.integer(args, "sequence")
        place = tuple(arguments.integer(args, name) for name in ("file", "offset", "length"))
        with self._lock:
            if sequence <= self.store.appended.get(writer, -1):
                return self._insert(args, writer, sequence, None)
            if self.store.placed(writer, source) != place[:2]:
                self._check_session(writer, _session(args))
                expected = self.store.appended.get(writer, -1) + 1
                oldest = arguments.integer(args, "oldest", sequence)
                return {"refused": True, "expected": max(expected, oldest), "anew": True}
            segment = self.store.written(*place)
            check(segment, self.schema)
            header = segment.header
            names = (header["writer"], header["sequence"], header["source"])
            if names != (writer, sequence, source):
                raise Rejected(f"the record is {names}, not {(writer, sequence, source)}")
            return self._insert(args, writer, sequence, lambda: self.store.adopt(segment, *place))

    def _insert(
        self, args: dict[str, Any], writer: str, sequence: int, take: Callable[[], Entry] | None
    ) -> Future | dict[str, Any]:
        # The writer knows all before `oldest` as acknowledged.
        oldest = arguments.integer(args, "oldest", sequence)
        future: Future = Future()
        self._check_session(writer, _session(args))
        last = self.store.appended.get(writer, -1)
        if sequence <= last:
            self._rates["repeats"] += 1
            self._committer.put(Insert(None, writer, future))
        elif take is not None and (sequence == last + 1 or sequence == oldest):
            try:
                self._committer.put(Insert(take(), writer, future))
            except OSError as error:
                raise self._full(error) from None
        else:
            # Overtaken by a later one while the service was away: take them in order only.
            return {"refused": True, "expected": max(last + 1, oldest)}
        return future

    def _full(self, error: OSError) -> TwinRLError:
        return TwinRLError(f"replay cannot write {self.store.folder}: {error}; make room there")

    def index(self, request: Request) -> Future:
        """Entries with an id above `after`, and what became of others since change `seen`; waits up to `wait` s."""
        args = request.args
        after, seen = arguments.integer(args, "after", 0), arguments.integer(args, "seen", 0)
        sampled = arguments.integer(args, "sampled", 0, high=MAX_COUNT)
        wait = arguments.seconds(args, "wait", 0.0, MAX_WAIT)
        if sampled:
            with self._lock:
                self._count_samples(sampled)

        def ready(late: bool) -> dict[str, Any] | None:
            entries = self._entries_after(after)
            known = (args.get("boot"), seen)
            if not entries and not late and known == (self._boot, self._changes.newest):
                return None
            gone, changed = self._changes.since(seen)
            return {
                "entries": entries,
                "boot": self._boot,
                "seen": self._changes.newest,
                "gone": gone,
                "changed": changed,
            }

        return self._polls.add(ready, wait)

    def fetch(self, request: Request) -> tuple[dict[str, Any], wire.Arrays]:
        """Whole records by id, for readers on other hosts. `missing` were evicted; ask again for the rest."""
        records, missing, total = {}, [], 0
        with self._lock:
            for id in arguments.integers(request.args, "ids", MAX_IDS)[: wire.MAX_ARRAYS]:
                entry = self.store.entries.get(id)
                if entry is not None and total and total + entry.length > MAX_FETCH_BYTES:
                    break
                raw = self._raw(entry)
                if raw is None:
                    missing.append(id)
                    continue
                total += len(raw)
                records[str(id)] = np.frombuffer(raw, np.uint8)
        return {"missing": missing}, records

    def recall(self, request: Request) -> dict[str, Any]:
        """Bring records back into the segment files for a reader on this host: entries with their places, some at a time.

        `missing` were evicted. Without room for one its place is file 0: then it can be fetched.
        """
        entries, missing, total = [], [], 0
        with self._lock:
            for id in arguments.integers(request.args, "ids", MAX_IDS):
                if total > MAX_RECALL_BYTES:
                    break
                try:
                    entry = self.store.recall(self.store.entries[id])
                except (KeyError, FileNotFoundError):
                    missing.append(id)
                    continue
                entries.append(entry)
                total += entry.length
        return {"entries": entries, "missing": missing}

    def _raw(self, entry: Entry | None) -> memoryview | None:
        """A segment's record; None when it was evicted, or its bytes turn out to be lost."""
        with contextlib.suppress(FileNotFoundError):
            return None if entry is None else self.store.raw(entry)
        return None

    def rows(self, request: Request) -> Future | dict[str, Any]:
        """A batch of `windows` [[segment, start, length, second], ...] of up to `chunk` steps, for readers elsewhere.

        `missing` segments were evicted; there are no columns then.
        """
        windows, chunk = wanted(request.args, self.schema)
        codec = row_codec(request.args)
        entries, records, missing = {}, {}, []
        with self._lock:
            for id in {id for window in windows for id in (window[0], window[3]) if id}:
                entry = self.store.entries.get(id)
                raw = self._raw(entry)
                if entry is None or raw is None:
                    missing.append(id)
                else:
                    entries[id], records[id] = entry, raw
        if missing:
            return {"missing": missing, "instructions": []}
        return self._rows.submit(windows, chunk, entries, records, codec)

    def permit(self, request: Request) -> Future:
        """Ask the limiter for `sample` transitions (0: whether inserting may go on), waiting up to `wait` s."""
        transitions = arguments.integer(request.args, "sample", 0, high=MAX_COUNT)
        wait = arguments.seconds(request.args, "wait", 0.0, MAX_WAIT)
        who = arguments.text(request.args, "who", "somebody", 200)

        def ready(late: bool) -> dict[str, Any] | None:
            why_not = reason()
            if why_not and not late:
                return None
            if not why_not and not self.limiter.open:
                self._count_samples(transitions)
            return {"granted": not why_not, "reason": why_not, "open": self.limiter.open}

        def reason() -> str:
            return (
                self.limiter.why_not_sample(transitions)
                if transitions
                else self.limiter.why_not_insert()
            )

        with self._lock:
            reason()  # Rejected, if it can never be granted
        return self._polls.add(ready, wait, who, reason)

    def priorities(self, request: Request) -> Future:
        """Set the priority of each segment of `ids`; durable when answered. Those of evicted ones are dropped."""
        ids, values = arguments.integers(request.args, "ids", MAX_IDS), request.args.get("values")
        if not isinstance(values, list) or len(ids) != len(values):
            raise Rejected(f"priorities need as many values as ids ({len(ids)})")
        if not all(arguments.is_number(value) and value > 0 for value in values):
            raise Rejected("a priority is a positive finite number")
        future: Future = Future()
        with self._lock:
            self.store.set_priorities(
                {id: float(value) for id, value in zip(ids, values, strict=True)}
            )
            self._committer.put(Change(future))
        return future

    def priorities_read(self, request: Request) -> dict[str, Any]:
        """The priorities that were set, of segments with an id above `after`, rising; some at a time."""
        after = arguments.integer(request.args, "after", 0)
        with self._lock:
            ids = sorted(id for id in self.store.priorities if id > after)[:MAX_PRIORITIES]
            return {"ids": ids, "values": [self.store.priorities[id] for id in ids]}

    def delete(self, request: Request) -> Future:
        """Delete segments for good, of whatever source; durable when answered with how many there were."""
        future: Future = Future()
        self._committer.put(Delete(arguments.integers(request.args, "ids", MAX_IDS), future))
        return future

    def cursor_read(self, request: Request) -> dict[str, Any]:
        """A named cursor as last committed; one that nobody committed stands at 0."""
        name = arguments.text(request.args, "name", longest=200)
        with self._lock:
            return dict(self.store.cursors.get(name, {"position": 0}))

    def cursor_commit(self, request: Request) -> Future:
        """Set a named cursor: `position` and the counts `taken`, `skipped`, `evicted`, durable when answered."""
        name = arguments.text(request.args, "name", longest=200)
        given = arguments.mapping(request.args, "values")
        if len(given) > MAX_CURSOR_VALUES or any(len(key) > 100 for key in given):
            raise Rejected(f"a cursor has at most {MAX_CURSOR_VALUES} values with short names")
        values = {key: arguments.integer(given, key) for key in given}
        future: Future = Future()
        with self._lock:
            if name not in self.store.cursors and len(self.store.cursors) >= MAX_CURSORS:
                raise Rejected(f"there are {MAX_CURSORS} cursors already")
            self.store.cursors[name] = values
            self._committer.put(Change(future))
        return future

    def info(self, request: Request) -> dict[str, Any]:
        """Sizes by source, task and region, and the statistics."""
        sizes: dict[str, dict[str, int]] = {}
        with self._lock:
            for entry in self.store.entries.values():
                key = f"{entry.source}/{entry.task}/{entry.region}"
                size = sizes.setdefault(key, {"segments": 0, "transitions": 0, "bytes": 0})
                size["segments"] += 1
                size["transitions"] += entry.steps
                size["bytes"] += entry.length
            return {
                "sizes": sizes,
                "counters": dict(self.store.counters),
                "cursors": dict(self.store.cursors),
                "writers": dict(self.store.committed),
                "waiting": self._waiting(),
                "stats": self._sizes(),
                "form": self.store.form,
                "promise": self.store.promise,
                "flush": self.store.flush_policy,
                "remover": self.store.remover,
                "capacity": dict(self.store.capacity),
            }

    def stats(self) -> dict[str, Any]:
        """Sizes, rates since the last call, and who waits for what."""
        with self._lock:
            now, before = time.monotonic(), self._rates
            self._rates = dict.fromkeys(before, 0) | {"time": now}
            seconds = max(now - before["time"], 1e-6)
            waiting = self._waiting()
            return {
                **self._sizes(),
                "replay/promise": self.store.promise,
                "replay/inserts_per_s": before["inserts"] / seconds,
                "replay/samples_per_s": before["samples"] / seconds,
                "replay/insert_bytes_per_s": before["bytes"] / seconds,
                "replay/repeats": before["repeats"],
                "replay/waiting": len(waiting),
                "replay/waiting_for": "; ".join(waiting),
                **{f"replay/waited_s/{who}": s for who, s in self._polls.waited().items()},
            }

    # What the three threads share.

    def _sizes(self) -> dict[str, Any]:
        sizes: dict[str, Any] = {
            "replay/segments": len(self.store.entries),
            "replay/bytes": sum(self.store.bytes.values()),
            **self.store.stats(),
        }
        for source in SOURCES:
            sizes[f"replay/transitions/{source}"] = self.store.transitions[source]
        return sizes

    def _waiting(self) -> list[str]:
        return self._polls.waiting() + (
            [self._committer.trouble] if self._committer.trouble else []
        )

    def _check_session(self, writer: str, session: str | None) -> None:
        self._admit(writer)
        self._heard[writer] = time.monotonic()  # robots' segments come through the gateway, without
        if session is None:
            return
        if self._sessions.setdefault(writer, session) != session:
            raise Rejected(
                f"the writer name {writer!r} was taken over by a newer process: "
                "give every writer a name of its own"
            )

    def _admit(self, writer: str) -> None:
        """A writer's name is kept for ever, so there must not be endlessly many."""
        if writer in self._sessions or writer in self.store.appended:
            return
        if max(len(self._sessions), len(self.store.appended)) >= MAX_WRITERS:
            raise Rejected(f"{MAX_WRITERS} writers' names are known already: use one of them again")

    def _restore_limiter(self) -> None:
        counters = self.store.counters
        self.limiter.inserted = sum(counters[f"inserted/{source}"] for source in ONLINE)
        self.limiter.sampled = counters["sampled"]

    def _count_samples(self, transitions: int) -> None:
        self.limiter.sampled += transitions
        self.store.counters["sampled"] = self.limiter.sampled
        self._rates["samples"] += transitions

    def _entries_after(self, after: int) -> list[Entry]:
        entries = []
        for id in reversed(self.store.entries):  # newest first: a follower wants the last few
            if id <= after:
                break
            entries.append(self.store.entries[id])
        return entries[::-1][:MAX_ENTRIES]

    def _tick_loop(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(TICK):
            self._polls.answer()
            if time.monotonic() - last >= 1.0:
                last = time.monotonic()
                self._committer.put(Change(Future()))  # the sample count
                self._expire(last)
                try:
                    self.store.flush()
                except OSError as error:
                    log.error("segment files cannot be synced: %s", error)

    def _expire(self, now: float) -> None:
        with self._lock:
            silent = [
                writer
                for writer in {name for name, _ in self.store.open_episodes} | set(self._heard)
                if now - self._heard.get(writer, self._start) > self._lease
            ]
            for writer in silent:
                self._heard.pop(writer, None)
                self._committer.put(Abandon(writer, self._lease))

    def _published(self, entries: list[Entry], gone: list[Entry], changed: list[Entry]) -> bool:
        """Called by the committer, with the lock held, for what is durable now."""
        self._changes.add(gone, changed)
        self.limiter.inserted += sum(e.steps for e in entries if e.source in ONLINE)
        self._rates["inserts"] += sum(entry.steps for entry in entries)
        self._rates["bytes"] += sum(entry.length for entry in entries)
        if entries or gone or changed:
            self._polls.answer()
        return bool(self.limiter.why_not_insert())


def _writer(args: dict[str, Any]) -> str:
    return arguments.text(args, "writer", shortest=1)


def _session(args: dict[str, Any]) -> str | None:
    return None if args.get("session") is None else arguments.text(args, "session")
