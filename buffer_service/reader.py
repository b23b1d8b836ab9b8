"""The reading side: follows the index, maps the segment files (or asks over the network), draws batches."""

from __future__ import annotations

import collections
import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from buffer_service import record
from buffer_service.cursor import Cursor
from buffer_service.entry import CUT, Entry
from buffer_service.files import MappedFiles, identity
from buffer_service.gather import Batch, allocate, belongs, decoded, gather, row_bytes
from buffer_service.index import Chosen, Index
from buffer_service.limiter import ONLINE
from buffer_service.sampler import Draw, draws
from buffer_service.writer import greet
from twinrl.core import wire
from twinrl.core.codec import Encoded, check_codec
from twinrl.core.errors import DeadlineError, Rejected, RemoteError, WireError
from twinrl.core.keys import Keys
from twinrl.core.segment import Schema, Segment
from twinrl.core.sockets import Client

FOLLOW_SECONDS = 1.0  # how long the service may hold the question for news
NEWS_SECONDS = 1.5  # beyond that; a question that met a dying service is never answered
SILENCE_SECONDS = 5.0  # without an answer for so long, ask anew
LOCKED = 100  # entries that are taken in at a time
SLOWEST = 2e6  # bytes/s of the slowest link on which an answer is waited for
PRIORITY_SECONDS = 0.5  # between two messages with priorities
MAPPED_COST = 16 << 10  # bytes that a decoded segment in a mapped file takes


class Reader:
    """A local index of the replay, and the segments behind it. Thread-safe."""

    def __init__(
        self,
        address: str,
        keys: Keys,
        run_dir: str | Path | None = None,
        *,
        schema: Schema | None = None,
        name: str = "reader",
        seed: int = 0,
        deadline: float = 30.0,
        cache_bytes: int = 2 << 30,
        codec: str = "raw",
        changed: threading.Condition | None = None,
    ) -> None:
        """Maps the files in `run_dir` (or where the service says they are) when they are on this host.

        Elsewhere it fetches whole segments and keeps them, as long as all of the replay fits into `cache_bytes`;
        beyond that the service gathers each batch and sends its rows only, the images in `codec`, which a slow link
        is worth (docs/codecs.md). `name` is shown where somebody waits.
        changed: guards the index, with an RLock, and is notified when it changes; for several readers in one.
        """
        self.name, self.deadline = name, deadline
        self.generator = np.random.default_rng(seed)
        self._client = Client("replay", address, keys, timeout=deadline)
        try:
            digest = None if schema is None else schema.digest()
            hello = greet(self._client, {"digest": digest}, deadline)
        except BaseException:
            self._client.close()
            raise
        state, privileged, cameras, *rest = hello["schema"]
        self.schema = Schema(state, privileged, tuple(cameras), *rest)
        folder = Path(hello["folder"]) if run_dir is None else Path(run_dir) / "replay"
        here = identity(folder).get("token") == hello["token"]
        self._mapped = MappedFiles(folder) if here else None
        self._recalls = here and hello["form"] == "redis"  # the files there are only a cache
        self._index = Index(self.schema)
        # Segments that are no views of mapped files, and those with encoded columns; with what they cost.
        self._decoded: collections.OrderedDict[int, tuple[Segment, int]] = collections.OrderedDict()
        self._cache_bytes, self._cached = cache_bytes, 0
        self._codec = check_codec(codec)
        self._boot, self._seen, self._evicted_to = "", 0, 0
        self._open = False  # the limiter asks for no permits
        self._sampled = 0  # transitions to be reported
        self._priorities: dict[int, float] = {}  # to be sent
        self._priorities_sent = 0.0  # monotonic s
        self._counts: collections.Counter[str] = collections.Counter()
        self._trouble = ""
        self._stop = False
        self._changed = changed or threading.Condition(threading.RLock())
        self._thread = threading.Thread(target=self._follow, name="replay index", daemon=True)
        self._thread.start()

    @property
    def mapped(self) -> bool:
        """Whether the segment files are mapped rather than fetched."""
        return self._mapped is not None

    @property
    def trouble(self) -> str:
        """Why the service did not answer last; empty when it did."""
        return self._trouble

    def close(self) -> None:
        """Stop following; views of mapped segments stay valid."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        self._thread.join(5)
        self._client.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def stats(self) -> dict[str, Any]:
        """What is known and what was drawn."""
        with self._changed:
            return {
                "reader/segments": len(self._index.entries),
                "reader/batches": self._counts["batches"],
                "reader/fetched_bytes": self._counts["fetched"],
                "reader/cached_bytes": self._cached,
                "reader/priorities_waiting": len(self._priorities),
                "reader/waited_s": self._counts["waited"],
                "reader/trouble": self._trouble,
            }

    def info(self) -> dict[str, Any]:
        """The service's own account: sizes by source/task/region, counters, who waits."""
        return self._client.call("info")[0]

    def entries(
        self, source: str | None = None, task: str | None = None, region: str | None = None
    ) -> list[Entry]:
        """The index now, oldest first, of what passes the filter."""
        part = Draw(source=source, task=task, region=region)
        with self._changed:
            return [entry for entry in self._index.entries.values() if part.passes(entry)]

    def entries_after(self, id: int, source: str | None, task: str | None) -> list[Entry]:
        """The entries of the filter with a higher id, oldest first."""
        with self._changed:
            known = self._index.entries
            newer = itertools.takewhile(lambda each: each > id, reversed(known))
            entries = [known[each] for each in newer]
        return [e for e in entries[::-1] if source in (None, e.source) and task in (None, e.task)]

    def cursor(self, name: str, **options: Any) -> Cursor:
        """A Cursor; `options` are its."""
        return Cursor(self, name, **options)

    def sync(self, deadline: float | None = None) -> None:
        """Until the index holds everything that was acknowledged before this call."""
        deadline = self.deadline if deadline is None else deadline
        with self._changed:
            newest = after = self._newest()
            seen = self._seen
        while True:
            args = {"after": after, "boot": self._boot, "seen": seen, "sampled": 0, "wait": 0.0}
            page = self.call("index", args, deadline)["entries"]
            if not page:
                break
            newest = after = Entry(*page[-1]).id
        self.wait_for(
            lambda: self._newest() >= newest,
            deadline,
            lambda: f"the index to reach segment {newest}",
        )

    def wait(
        self, segments: int = 1, source: str | None = None, deadline: float | None = None
    ) -> None:
        """Until the index holds so many segments (of `source`)."""

        self.wait_for(
            lambda: self.count(source) >= segments,
            deadline,
            lambda: (
                f"{segments} segments of {source or 'any source'}; {self.count(source)} are there"
            ),
        )

    def count(self, source: str | None = None) -> int:
        """How many segments (of `source`) the index holds."""
        with self._changed:
            return len(self._index.entries) if source is None else self._index.count[source]

    def segments(
        self,
        source: str | None = None,
        task: str | None = None,
        region: str | None = None,
        newest: int | None = None,
    ) -> Iterator[Segment]:
        """Decoded segments in order of insertion, of what is indexed now; the `newest` so many only."""
        entries = self.entries(source, task, region)
        if newest is not None:
            entries = entries[max(len(entries) - newest, 0) :]
        size = 1 if self.mapped else 16
        for place in range(0, len(entries), size):
            for segment in self.load(entries[place : place + size]):
                if segment is not None:
                    yield segment

    def trajectories(
        self,
        source: str | None = None,
        task: str | None = None,
        region: str | None = None,
        success: bool | None = None,
    ) -> Iterator[list[Segment]]:
        """The decoded segments of each episode that is there from its first step to its end, in order."""
        with self._changed:
            episodes = list(self._index.episodes(Draw(1.0, source, task, region, success)))
        for entries in episodes:
            segments = [segment for segment in self.load(entries) if segment is not None]
            if len(segments) == len(entries):
                yield segments

    def sample(
        self,
        batch_size: int,
        *,
        chunk: int | None = None,
        mix: Mapping[str, float] | Sequence[Draw] | None = None,
        task: str | None = None,
        region: str | None = None,
        newest: int | None = None,
        by: str = "uniform",
        generator: np.random.Generator | None = None,
        out: Batch | None = None,
        deadline: float | None = None,
    ) -> Batch:
        """A batch of windows of up to `chunk` steps (the schema's C); its arrays: see `gather.gather`. With it come
        instruction (B,) str and weight (B,) float32, importance weights where a part is drawn by priority, else 1.

        mix: share of each source, e.g. {"demo": 0.25, "twin": 0.25, "real": 0.5}, or a list of `Draw`; None draws
        every window with the same probability. Shares of parts without windows go to the others. newest: of each
        part's newest so many segments only. by: "uniform", "priority" (see `update_priorities`) or "fresh".
        generator: the reader's own by default. out: an earlier batch, to be overwritten. Waits for data and for the
        limiter up to `deadline` s.
        """
        chunk, generator = chunk or self.schema.chunk, generator or self.generator
        parts = draws(mix, task, region, newest, by)
        end = time.monotonic() + (self.deadline if deadline is None else deadline)
        online = sum(part.share for part in parts if part.source in (None, *ONLINE))
        share = online / sum(part.share for part in parts)
        self._ask_permit(round(batch_size * chunk * share), end)
        batch = None
        while batch is None:
            batch = self._draw(parts, batch_size, chunk, generator, out, end)
        self._counts["batches"] += 1
        return batch

    def weigh(self, part: Draw, chunk: int) -> tuple[int, float]:
        """(windows, their total weight) of what `part` draws from."""
        with self._changed:
            return self._index.table(part, chunk).weigh(part.newest)

    def newest_times(self, part: Draw, chunk: int) -> list[float]:
        """When the `part.newest` segments that it draws from came in, oldest first (s since the epoch)."""
        with self._changed:
            return self._index.newest_times(part, chunk)

    def update_priorities(self, batch: Batch, values: np.ndarray) -> None:
        """Set the priorities (> 0, e.g. the errors of the critic) of the windows of `batch`, (B,).

        They count here at once. The service gets one figure for each segment, from which other readers, and this
        one after a restart, begin: for its windows as a whole the chance to be drawn is the same then.
        """
        values = np.abs(np.asarray(values, np.float64)).reshape(-1)
        if values.shape != batch["segment"].shape or not np.isfinite(values).all():
            raise ValueError(
                f"{values.shape} priorities for a batch of {len(batch['segment'])}; "
                "each must be a finite number"
            )
        values = np.maximum(values, 1e-6)
        with self._changed:
            self._priorities |= self._index.set_priorities(batch["segment"], batch["step"], values)

    def flush_priorities(self, deadline: float | None = None) -> None:
        """Until the service has every priority set until now, durably."""
        with self._changed:
            self._priorities_sent = 0.0
        self.wait_for(
            lambda: not self._priorities and not self._counts["priorities_under_way"],
            deadline,
            lambda: f"the service to take {len(self._priorities)} priorities",
        )

    def load(self, entries: list[Entry]) -> list[Segment | None]:
        """The segments of `entries`, every column an array; None where one was evicted meanwhile."""
        found: dict[int, Segment] = {}
        with self._changed:
            absent = [entry for entry in entries if not self._hold(entry, found)]
        found |= self._fetch(absent)
        with self._changed:
            self._shrink()
        return [
            _closed(decoded(found[entry.id]), entry) if entry.id in found else None
            for entry in entries
        ]

    def call(self, method: str, args: dict[str, Any], deadline: float) -> dict[str, Any]:
        """A request to the service, repeated while it is away, for `deadline` s."""
        return self._request(method, args, deadline)[0]

    def _request(
        self, method: str, args: dict[str, Any], deadline: float, nbytes: int = 0
    ) -> tuple[dict[str, Any], wire.Arrays]:
        """nbytes: of the answer."""
        end = time.monotonic() + deadline
        silence = SILENCE_SECONDS + nbytes / SLOWEST
        while True:
            try:
                return self._client.call(method, args, timeout=min(silence, deadline))
            except Rejected:
                raise
            except (DeadlineError, RemoteError) as error:
                if time.monotonic() >= end or self._stop:
                    raise DeadlineError(
                        f"replay did not answer {method!r} for {deadline:g} s: {error}"
                    ) from None
                with self._changed:
                    self._changed.wait(0.1)

    # -- drawing -----------------------------------------------------------------------------------------

    def _draw(
        self,
        parts: list[Draw],
        count: int,
        chunk: int,
        generator: np.random.Generator,
        out: Batch | None,
        end: float,
    ) -> Batch | None:
        """A batch; None when a segment was evicted in between."""

        def what() -> str:
            sources = sorted({part.source or "any source" for part in parts})
            held = len(self._index.entries)
            return (
                f"a window of {chunk} steps from {'/'.join(sources)}; "
                f"the index holds {held} segments, none with one"
            )

        held: dict[int, Segment] = {}
        with self._changed:
            self.wait_for(
                lambda: any(self._index.table(part, chunk).windows for part in parts),
                end - time.monotonic(),
                what,
            )
            chosen = self._index.choose(parts, count, chunk, generator)
            absent = self._locate(chosen, held)
            whole = self.mapped or self._index.bytes <= self._cache_bytes
            if not absent:
                keep = self._keep_alive(chosen, held)
                addresses = self._addresses(chosen)
        if absent:
            if not whole:
                return self._ask_rows(chosen, chunk, out)
            held |= self._fetch(absent)
            with self._changed:
                if not self._adopt(chosen, held):
                    return None
                keep = self._keep_alive(chosen, held)
                addresses = self._addresses(chosen)
                self._shrink()
        first, second, instruction = addresses
        fields = self._index.places.fields
        batch = gather(chosen.windows, fields, first, second, chunk, out, held)
        del keep  # only now may maps and segments go
        return {**batch, "weight": chosen.weight, "instruction": instruction}

    def _locate(self, chosen: Chosen, held: dict[int, Segment]) -> list[Entry]:
        """See that the places of all chosen segments are known; gives those that must be fetched for it."""
        places, absent = self._index.places, []
        wanted = ~places.known[chosen.rows] | places.coded[chosen.rows]
        for row in chosen.rows[wanted].tolist():
            entry = self._index.entry_at(row)
            if places.known[row] or entry.id in self._decoded or not self._map_place(row, entry):
                if not self._hold(entry, held):
                    absent.append(entry)
                elif not places.known[row]:
                    places.put(row, entry, held[entry.id])
        return absent

    def _map_place(self, row: int, entry: Entry) -> bool:
        """Learn the places of a segment in a mapped file; False when that is not enough to read it."""
        if self._mapped is None:
            return False
        try:
            file = self._mapped.map(entry.file)
            self._index.places.put_record(row, entry, file, entry.offset)
        except (FileNotFoundError, WireError):
            return False
        return not self._index.places.coded[row]

    def _adopt(self, chosen: Chosen, held: dict[int, Segment]) -> bool:
        """Take in the places of fetched segments; False when a chosen one is gone by now."""
        places, index = self._index.places, self._index
        for row, id in zip(chosen.rows.tolist(), chosen.ids.tolist(), strict=True):
            if index.row(id) != row or (not places.known[row] and id not in held):
                return False
            if not places.known[row]:
                places.put(row, index.entries[id], held[id])
        return True

    def _addresses(self, chosen: Chosen) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the chosen segments' columns, and their instructions: copies, good while the memory is kept."""
        places = self._index.places
        instruction = np.array(places.instructions)[places.instruction[chosen.row]]
        return places.addresses[chosen.row], places.addresses[chosen.second_row], instruction

    def _keep_alive(self, chosen: Chosen, held: dict[int, Segment]) -> list[Any]:
        """What the chosen segments' memory belongs to."""
        keep: list[Any] = [dict(held)]
        if self._decoded:
            keep += [self._decoded[id] for id in chosen.ids.tolist() if id in self._decoded]
        if self._mapped is not None:
            files = np.unique(self._index.file[chosen.rows]).tolist()
            for file in files:
                with contextlib.suppress(FileNotFoundError):  # its segments were fetched
                    keep.append(self._mapped.map(file))
        return keep

    def _hold(self, entry: Entry, held: dict[int, Segment]) -> bool:
        """Put a segment that is at hand into `held`; False when it must be fetched."""
        if entry.id in self._decoded:
            self._decoded.move_to_end(entry.id)
            held[entry.id] = self._decoded[entry.id][0]
            return True
        if self._mapped is None:
            return False
        try:
            segment = self._mapped.segment(entry.file, entry.offset)
        except (FileNotFoundError, WireError):  # evicted, or no longer in this host's files
            return False
        if not belongs(segment.header, entry):
            return False
        held[entry.id] = segment
        if any(isinstance(column, Encoded) for column in segment.columns.values()):
            self._keep(entry.id, segment, MAPPED_COST)
        return True

    def _keep(self, id: int, segment: Segment, cost: int) -> None:
        if id not in self._decoded:
            self._decoded[id] = (segment, cost)
            self._cached += cost

    def _fetch(self, entries: list[Entry]) -> dict[int, Segment]:
        """Whole segments from the service, which are kept; those that are evicted are dropped."""
        ids, fetched = {entry.id for entry in entries}, {}
        nbytes = sum(entry.length for entry in entries)
        if self._recalls:
            self._recall(ids, fetched)
        while ids:
            answer, records = self._request("fetch", {"ids": sorted(ids)}, self.deadline, nbytes)
            here = {int(id): record.decode(raw, verify=True) for id, raw in records.items()}
            fetched |= here
            with self._changed:
                self._counts["fetched"] += sum(len(raw) for raw in records.values())
                for id in answer["missing"]:
                    self._drop(id)
                for id, segment in here.items():
                    if id in self._index.entries:
                        self._keep(id, segment, segment.nbytes)
            ids -= {*answer["missing"], *here}
        return fetched

    def _recall(self, ids: set[int], held: dict[int, Segment]) -> None:
        """Have the service bring segments back into the files on this host; moves what is at hand then to `held`."""
        asked = sorted(ids)
        while asked:
            answer = self._request("recall", {"ids": asked}, self.deadline)[0]
            entries = [Entry(*fields) for fields in answer["entries"]]
            with self._changed:
                for id in answer["missing"]:
                    self._drop(id)
                for entry in entries:
                    if entry.id in self._index.entries:
                        self._index.put(entry)
                    if self._hold(entry, held):
                        ids.discard(entry.id)
            ids -= set(answer["missing"])
            done = {*answer["missing"], *(entry.id for entry in entries)}
            asked = [id for id in asked if id not in done]

    def _ask_rows(self, chosen: Chosen, chunk: int, out: Batch | None) -> Batch | None:
        """The batch as the service gathers it; None when a segment was evicted."""
        windows = chosen.windows
        columns = (windows.id, windows.start, windows.length + windows.extra, windows.second)
        args = {"windows": np.stack(columns, axis=1).tolist(), "chunk": chunk, "codec": self._codec}
        nbytes = len(windows.id) * row_bytes(self.schema, chunk)
        answer, arrays = self._request("rows", args, self.deadline, nbytes)
        with self._changed:
            self._counts["fetched"] += sum(array.nbytes for array in arrays.values())
            for id in answer["missing"]:
                self._drop(id)
        if answer["missing"]:
            return None
        instruction = np.array(answer["instructions"])[arrays["instruction"]]
        fields, size = self._index.places.fields, len(windows.id)
        batch = allocate(fields, size, chunk, out, privileged="privileged.state" in arrays)
        for name, array in batch.items():
            column = arrays[name]
            if isinstance(column, Encoded):
                column.decode(array)
            else:
                np.copyto(array, column)
        return {**batch, "weight": chosen.weight, "instruction": instruction}

    def _ask_permit(self, transitions: int, end: float) -> None:
        if not transitions:
            return
        since = time.monotonic()
        while not self._open:
            left = max(end - time.monotonic(), 0.0)
            args = {"sample": transitions, "wait": min(left, 1.0), "who": self.name}
            answer = self.call("permit", args, max(left, 0.1) + SILENCE_SECONDS)
            self._open = answer["open"]
            if answer["granted"] and not self._open:
                return
            if not answer["granted"] and time.monotonic() >= end:
                waited = time.monotonic() - since
                raise DeadlineError(f"{self.name} waited {waited:.1f} s: {answer['reason']}")
        with self._changed:
            self._sampled += transitions  # told to the service with the next question for news

    def wait_for(
        self, condition: Callable[[], Any], deadline: float | None, what: Callable[[], str]
    ) -> None:
        """Until `condition`, checked when the index changes, is true; DeadlineError says `what` was missing."""
        deadline = self.deadline if deadline is None else max(deadline, 0.0)
        with self._changed:
            if not self._changed.wait_for(lambda: self._stop or condition(), deadline):
                trouble = f" ({self._trouble})" if self._trouble else ""
                raise DeadlineError(f"{self.name} waited {deadline:g} s for {what()}{trouble}")

    def _follow(self) -> None:
        while not self._stop:
            with self._changed:
                sampled, self._sampled = self._sampled, 0
            try:
                self._send_priorities()
                self._learn(sampled)
                self._trouble = ""
            except (DeadlineError, RemoteError) as error:
                with self._changed:
                    self._sampled += sampled
                    self._trouble = str(error)
                    self._changed.wait(0.2)
        try:
            self._send_priorities()
        except (DeadlineError, RemoteError) as error:
            self._trouble = str(error)

    def _send_priorities(self) -> None:
        with self._changed:
            now = time.monotonic()
            if not self._priorities or (
                now - self._priorities_sent < PRIORITY_SECONDS and not self._stop
            ):
                return
            sending, self._priorities = self._priorities, {}
            self._priorities_sent = now
            self._counts["priorities_under_way"] = len(sending)
        args = {"ids": list(sending), "values": list(sending.values())}
        try:
            self._client.call("priorities", args, timeout=NEWS_SECONDS)
        except (DeadlineError, RemoteError):
            with self._changed:
                self._priorities = sending | self._priorities
            raise
        finally:
            with self._changed:
                self._counts["priorities_under_way"] = 0
                self._changed.notify_all()

    def _learn(self, sampled: int) -> None:
        """Ask for news and take them in; after a restart of the service, or far behind, compare everything."""
        news = self._ask_index(self._newest(), self._seen, sampled, FOLLOW_SECONDS)
        if news["boot"] == self._boot and news["gone"] is not None:
            changed = [Entry(*fields) for fields in news["changed"]]
            fresh = [Entry(*fields) for fields in news["entries"]]
            with self._changed:  # one that is not known yet comes later, as it is then
                changed = [entry for entry in changed if entry.id in self._index.entries]
            for place in range(0, len(fresh), LOCKED):  # between them a batch may be drawn
                with self._changed:
                    self._take(fresh[place : place + LOCKED], [])
            with self._changed:
                self._take(changed, news["gone"])
                self._note(news)
            return
        self._compare()

    def _compare(self) -> None:
        """Make the index equal to the service's."""
        priorities: dict[int, float] = {}
        while True:
            after = {"after": max(priorities, default=0)}
            page = self._client.call("priorities_read", after, timeout=NEWS_SECONDS)[0]
            priorities |= zip(page["ids"], page["values"], strict=True)
            if not page["ids"]:
                break
        entries: dict[int, Entry] = {}
        begin = None
        while True:
            seen = 0 if begin is None else begin["seen"]
            news = self._ask_index(next(reversed(entries), 0), seen, 0, 0.0)
            begin = begin or news
            if news["boot"] != begin["boot"]:
                return  # again, from the start
            page = [Entry(*fields) for fields in news["entries"]]
            entries.update((entry.id, entry) for entry in page)
            if not page:
                break
        with self._changed:
            if self._mapped is not None:  # the number of a deleted file may have been given again
                self._mapped.forget(set())
                self._index.places.known[:] = False
            for id, mine in list(self._index.entries.items()):
                theirs = entries.get(id)  # after a crash of the machine a number may come again
                if theirs and (theirs.writer, theirs.sequence) != (mine.writer, mine.sequence):
                    self._drop(id)
            for id in priorities.keys() & entries.keys():
                self._index.priority.setdefault(id, priorities[id])
            self._take(entries.values(), [id for id in self._index.entries if id not in entries])
            self._open = False
            self._note(begin)

    def _note(self, news: dict[str, Any]) -> None:
        self._boot, self._seen = news["boot"], news["seen"]
        self._evicted_to = news.get("evicted_to", 0)

    def _newest(self) -> int:
        with self._changed:
            return next(reversed(self._index.entries), 0)

    def _ask_index(self, after: int, seen: int, sampled: int, wait: float) -> dict[str, Any]:
        known = {"after": after, "boot": self._boot, "seen": seen, "evicted_to": self._evicted_to}
        args = {**known, "sampled": sampled, "wait": wait}
        return self._client.call("index", args, timeout=wait + NEWS_SECONDS)[0]

    def _take(self, entries: Iterable[Entry], gone: list[int]) -> None:
        for entry in entries:
            self._index.put(entry)
        for id in gone:
            self._drop(id)
        if gone and self._mapped is not None:
            self._mapped.forget(set(self._index.files))
        self._changed.notify_all()

    def _drop(self, id: int) -> None:
        self._index.remove(id)
        _, cost = self._decoded.pop(id, (None, 0))
        self._cached -= cost

    def _shrink(self) -> None:
        """Keep to `cache_bytes`; what a batch holds stays until that is made."""
        while self._cached > self._cache_bytes:
            id, (_, cost) = self._decoded.popitem(last=False)
            self._cached -= cost
            self._index.forget_place(id)


def _closed(segment: Segment, entry: Entry) -> Segment:
    """The segment with the end that the index gives it: an episode whose writer died is truncated."""
    terminated, truncated = (segment.columns[name] for name in ("terminated", "truncated"))
    if entry.end != CUT or terminated[-1] or truncated[-1]:
        return segment
    truncated = truncated.copy()
    truncated[-1] = True
    truncated.flags.writeable = False
    return Segment({**segment.header, "last": True}, {**segment.columns, "truncated": truncated})
