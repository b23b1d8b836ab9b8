"""The reading side: follows the index, maps the segment files (or fetches), draws batches."""

from __future__ import annotations

import collections
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from buffer_service import record
from buffer_service.entry import Entry
from buffer_service.files import MappedFiles, identity
from buffer_service.limiter import ONLINE
from buffer_service.sampler import Batch, Window, Windows, gather, split
from buffer_service.writer import greet
from twinrl.core.errors import DeadlineError, Rejected, RemoteError
from twinrl.core.keys import Keys
from twinrl.core.segment import SOURCES, Schema, Segment
from twinrl.core.sockets import Client

FOLLOW_SECONDS = 1.0  # how long the service may hold the question for news
NEWS_SECONDS = 1.5  # beyond that; a question that met a dying service is never answered
SILENCE_SECONDS = 5.0  # without an answer for so long, ask anew
MAX_DECODED = 20_000  # segments kept decoded; mapped ones cost about 4 KiB each


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
    ) -> None:
        """Maps the files in `run_dir` (or where the service says they are) when they are on this host, else
        fetches segments and keeps `cache_bytes` of them. `name` is shown where somebody waits.
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
        self._entries: dict[int, Entry] = {}
        self._windows: dict[tuple, Windows] = {}
        self._decoded: collections.OrderedDict[int, Segment] = collections.OrderedDict()
        self._cache_bytes, self._cached = cache_bytes, 0
        self._boot = ""
        self._evicted_to = 0
        self._open = False  # the limiter asks for no permits
        self._sampled = 0  # transitions to be reported
        self._counts: collections.Counter[str] = collections.Counter()
        self._trouble = ""
        self._stop = False
        self._changed = threading.Condition(threading.RLock())
        self._thread = threading.Thread(target=self._follow, name="replay index", daemon=True)
        self._thread.start()

    @property
    def mapped(self) -> bool:
        """Whether the segment files are mapped rather than fetched."""
        return self._mapped is not None

    def close(self) -> None:
        """Stop following; views of mapped segments stay valid."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        self._client.close()
        self._thread.join(5)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def stats(self) -> dict[str, Any]:
        """What is known and what was drawn."""
        with self._changed:
            return {
                "reader/segments": len(self._entries),
                "reader/batches": self._counts["batches"],
                "reader/fetched_bytes": self._counts["fetched"],
                "reader/trouble": self._trouble,
            }

    def info(self) -> dict[str, Any]:
        """The service's own account: sizes by source/task/region, counters, who waits."""
        return self._client.call("info")[0]

    def entries(
        self, source: str | None = None, task: str | None = None, region: str | None = None
    ) -> list[Entry]:
        """The index now, oldest first, of what passes the filter."""
        with self._changed:
            return [
                entry
                for entry in self._entries.values()
                if source in (None, entry.source)
                and task in (None, entry.task)
                and region in (None, entry.region)
            ]

    def entries_after(self, id: int, source: str | None, task: str | None) -> list[Entry]:
        """The entries of the filter with a higher id, oldest first."""
        with self._changed:
            newer = itertools.takewhile(lambda each: each > id, reversed(self._entries))
            entries = [self._entries[each] for each in newer]
        return [e for e in entries[::-1] if source in (None, e.source) and task in (None, e.task)]

    def sync(self, deadline: float | None = None) -> None:
        """Until the index holds everything that was acknowledged before this call."""
        deadline = self.deadline if deadline is None else deadline
        with self._changed:
            newest = after = next(reversed(self._entries), 0)
        while True:
            args = {"after": after, "boot": self._boot, "sampled": 0, "wait": 0.0}
            page = self.call("index", args, deadline)["entries"]
            if not page:
                break
            newest = after = Entry(*page[-1]).id
        self.wait_for(
            lambda: next(reversed(self._entries), 0) >= newest,
            deadline,
            lambda: f"the index to reach segment {newest}",
        )

    def wait(
        self, segments: int = 1, source: str | None = None, deadline: float | None = None
    ) -> None:
        """Until the index holds so many segments (of `source`)."""
        self.wait_for(
            lambda: len(self.entries(source)) >= segments,
            deadline,
            lambda: (
                f"{segments} segments of {source or 'any source'}; "
                f"the index holds {len(self.entries(source))}"
            ),
        )

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

    def sample(
        self,
        batch_size: int,
        *,
        chunk: int | None = None,
        mix: dict[str, float] | None = None,
        task: str | None = None,
        region: str | None = None,
        newest: int | None = None,
        generator: np.random.Generator | None = None,
        out: Batch | None = None,
        deadline: float | None = None,
    ) -> Batch:
        """A batch of windows of up to `chunk` steps (the schema's C); its arrays: see `sampler.gather`.

        mix: share of each source, e.g. {"demo": 0.25, "twin": 0.25, "real": 0.5}; None draws every window with
        the same probability. Shares of sources without windows go to the others. newest: of each source's
        newest so many segments only. generator: the reader's own by default. out: an earlier batch, to be
        overwritten. Waits for data and for the limiter up to `deadline` s.
        """
        chunk, generator = chunk or self.schema.chunk, generator or self.generator
        for source in mix or {}:
            if source not in SOURCES:
                raise ValueError(f"mix names {source!r}, sources are {', '.join(SOURCES)}")
        end = time.monotonic() + (self.deadline if deadline is None else deadline)
        share = 1.0 if mix is None else sum(mix.get(s, 0) for s in ONLINE) / sum(mix.values())
        self._ask_permit(round(batch_size * chunk * share), end)
        windows: list[Window] = []
        segments: list[Segment] = []
        while len(windows) < batch_size:
            missing = batch_size - len(windows)
            drawn = self._draw(missing, chunk, mix, (task, region), newest, generator, end)
            loaded = self.load([window.entry for window in drawn])
            for window, segment in zip(drawn, loaded, strict=True):
                if segment is not None:
                    windows.append(window)
                    segments.append(segment)
        batch = gather(windows, segments, chunk, out)
        self._counts["batches"] += 1
        return batch

    def load(self, entries: list[Entry]) -> list[Segment | None]:
        """The segments of `entries`; None where one was evicted meanwhile."""
        with self._changed:
            missing = [entry for entry in entries if entry.id not in self._decoded]
            if self._mapped is None:
                self._fetch({entry.id for entry in missing})
            else:
                for entry in missing:
                    try:
                        self._keep(entry.id, self._mapped.segment(entry.file, entry.offset))
                    except FileNotFoundError:
                        self._drop(entry.id)
            found = [self._decoded.get(entry.id) for entry in entries]
            for entry in entries:
                if entry.id in self._decoded:
                    self._decoded.move_to_end(entry.id)
            self._shrink()
            return found

    def call(self, method: str, args: dict[str, Any], deadline: float) -> dict[str, Any]:
        """A request to the service, repeated while it is away, for `deadline` s."""
        end = time.monotonic() + deadline
        while True:
            try:
                return self._client.call(method, args, timeout=min(SILENCE_SECONDS, deadline))[0]
            except Rejected:
                raise
            except (DeadlineError, RemoteError) as error:
                if time.monotonic() >= end or self._stop:
                    raise DeadlineError(
                        f"replay did not answer {method!r} for {deadline:g} s: {error}"
                    ) from None
                with self._changed:
                    self._changed.wait(0.1)

    def _draw(
        self,
        count: int,
        chunk: int,
        mix: dict[str, float] | None,
        kind: tuple[str | None, str | None],  # task and region
        newest: int | None,
        generator: np.random.Generator,
        end: float,
    ) -> list[Window]:
        wanted = tuple(SOURCES if mix is None else (s for s, weight in mix.items() if weight > 0))

        def sizes() -> dict[str, int]:
            return {source: len(self._table((chunk, source, *kind))) for source in wanted}

        with self._changed:
            self.wait_for(
                lambda: any(sizes().values()),
                end - time.monotonic(),
                lambda: (
                    f"a window of {chunk} steps from {'/'.join(wanted)}; "
                    f"the index holds {len(self._entries)} segments, none with one"
                ),
            )
            known = sizes()
            shares: dict[str, float] = {s: float(known[s]) for s in wanted} if mix is None else mix
            windows: list[Window] = []
            for source, number in split(count, shares, known, generator).items():
                table = self._table((chunk, source, *kind))
                windows += table.draw(number, generator, newest)
            return windows

    def _table(self, key: tuple[int, str, str | None, str | None]) -> Windows:
        if key not in self._windows:
            self._windows[key] = Windows(*key)
            for entry in self._entries.values():
                self._windows[key].add(entry)
        return self._windows[key]

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
                self._learn(sampled)
                self._trouble = ""
            except (DeadlineError, RemoteError) as error:
                with self._changed:
                    self._sampled += sampled
                    self._trouble = str(error)
                    self._changed.wait(0.2)

    def _learn(self, sampled: int) -> None:
        """Ask for news and take them in; after a restart of the service, compare everything."""
        after = next(reversed(self._entries), 0)
        news = self._ask_index(after, sampled, FOLLOW_SECONDS)
        if news["boot"] == self._boot:
            self._take(news["entries"], news["evicted_to"])
            return
        entries: dict[int, Entry] = {}
        while True:
            news = self._ask_index(next(reversed(entries), 0), 0, 0.0)
            page = [Entry(*fields) for fields in news["entries"]]
            entries.update((entry.id, entry) for entry in page)
            if not page:
                break
        with self._changed:
            for id in [id for id in self._entries if id not in entries]:
                self._drop(id)
            self._boot, self._open, self._evicted_to = news["boot"], False, 0
            self._take([e for e in entries.values() if e.id not in self._entries], 0)

    def _ask_index(self, after: int, sampled: int, wait: float) -> dict[str, Any]:
        known = {"after": after, "boot": self._boot, "evicted_to": self._evicted_to}
        args = {**known, "sampled": sampled, "wait": wait}
        return self._client.call("index", args, timeout=wait + NEWS_SECONDS)[0]

    def _take(self, entries: list, evicted_to: int) -> None:
        with self._changed:
            for fields in entries:
                entry = Entry(*fields)
                self._entries[entry.id] = entry
                for windows in self._windows.values():
                    windows.add(entry)
            if evicted_to > self._evicted_to:
                self._evicted_to = evicted_to
                gone = list(itertools.takewhile(lambda id: id <= evicted_to, self._entries))
                for id in gone:
                    if self._entries[id].source == "twin":
                        self._drop(id)
                if self._mapped is not None:
                    self._mapped.forget({entry.file for entry in self._entries.values()})
            self._changed.notify_all()

    def _drop(self, id: int) -> None:
        self._entries.pop(id, None)
        segment = self._decoded.pop(id, None)
        if segment is not None and self._mapped is None:
            self._cached -= segment.nbytes
        for windows in self._windows.values():
            windows.remove(id)

    def _fetch(self, ids: set[int]) -> None:
        while ids:
            answer, records = self._client.call("fetch", {"ids": sorted(ids)})
            for id in answer["missing"]:
                self._drop(id)
            for id, raw in records.items():
                self._keep(int(id), record.decode(raw, verify=True))
                self._counts["fetched"] += len(raw)
            ids -= {*answer["missing"], *(int(id) for id in records)}

    def _keep(self, id: int, segment: Segment) -> None:
        self._decoded[id] = segment
        if self._mapped is None:
            self._cached += segment.nbytes

    def _shrink(self) -> None:
        while len(self._decoded) > MAX_DECODED or self._cached > self._cache_bytes:
            _, segment = self._decoded.popitem(last=False)
            if self._mapped is None:
                self._cached -= segment.nbytes
