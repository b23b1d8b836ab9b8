"""The reading side: follows the index, maps the segment files (or asks over the network), draws batches."""

from __future__ import annotations

import collections
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from buffer_service.cursor import Cursor
from buffer_service.entry import Entry
from buffer_service.files import MappedFiles, identity
from buffer_service.follower import Follower
from buffer_service.gather import Batch, allocate, gather, row_bytes
from buffer_service.index import Chosen, Index
from buffer_service.limiter import ONLINE
from buffer_service.sampler import Draw, draws
from buffer_service.shelf import Shelf
from buffer_service.writer import greet
from twinrl.core import wire
from twinrl.core.codec import Encoded, check_codec
from twinrl.core.errors import DeadlineError, Rejected, RemoteError
from twinrl.core.keys import Keys
from twinrl.core.segment import Schema, Segment
from twinrl.core.sockets import Client

SILENCE_SECONDS = 5.0  # without an answer for so long, ask anew
SLOWEST = 2e6  # bytes/s of the slowest link on which an answer is waited for


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
        self.name, self.deadline, self.address = name, deadline, address
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
        self._index = Index(self.schema)
        self._codec = check_codec(codec)
        self._counts: collections.Counter[str] = collections.Counter()
        self._waited = 0.0
        self._stop = False
        self._changed = changed or threading.Condition(threading.RLock())
        self._shelf = Shelf(
            self._index,
            self._changed,
            MappedFiles(folder) if here else None,
            cache_bytes,
            lambda method, args, nbytes: self._request(method, args, self.deadline, nbytes),
            recalls=here and hello["form"] == "redis",
        )
        self._follower = Follower(self._client, self._index, self._changed, self._shelf.forget)

    @property
    def mapped(self) -> bool:
        """Whether the segment files are mapped rather than fetched."""
        return self._shelf.mapped

    @property
    def trouble(self) -> str:
        """Why the service did not answer last; empty when it did."""
        return self._follower.trouble

    def close(self) -> None:
        """Stop following; views of mapped segments stay valid."""
        self._stop = True
        self._follower.close()
        self._client.close()
        self._follower.join()

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
                "reader/fetched_bytes": self._shelf.fetched,
                "reader/cached_bytes": self._shelf.cached,
                "reader/priorities_waiting": self._follower.unsent,
                "reader/waited_s": self._waited,
                "reader/trouble": self.trouble,
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
        known = self._follower.known
        newest = after = self._follower.newest()
        while True:
            args = {**known, "after": after, "sampled": 0, "wait": 0.0}
            page = self.call("index", args, deadline)["entries"]
            if not page:
                break
            newest = after = Entry(*page[-1]).id
        self.wait_for(
            lambda: self._follower.newest() >= newest,
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
        yield from load_each(self, self.entries(source, task, region), newest)

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
        if batch_size < 1 or chunk < 1:
            raise ValueError(f"batch_size={batch_size}, chunk={chunk}: at least 1 each")
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
            told = self._index.set_priorities(batch["segment"], batch["step"], values)
            self._follower.prioritise(told)

    def flush_priorities(self, deadline: float | None = None) -> None:
        """Until the service has every priority set until now, durably."""
        self._follower.hurry()
        self.wait_for(
            lambda: not self._follower.unsent,
            deadline,
            lambda: f"the service to take {self._follower.unsent} priorities",
        )

    def load(self, entries: list[Entry]) -> list[Segment | None]:
        """The segments of `entries`, every column an array; None where one was evicted meanwhile."""
        return self._shelf.load(entries)

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
            absent = self._shelf.locate(chosen, held)
            whole = self._shelf.keeps_all
            if not absent:
                keep = self._shelf.keep_alive(chosen, held)
                addresses = self._addresses(chosen)
        if absent:
            if not whole:
                return self._ask_rows(chosen, chunk, out)
            held |= self._shelf.fetch(absent)
            with self._changed:
                if not self._shelf.adopt(chosen, held):
                    return None
                keep = self._shelf.keep_alive(chosen, held)
                addresses = self._addresses(chosen)
                self._shelf.shrink()
        first, second, instruction = addresses
        fields = self._index.places.fields
        batch = gather(chosen.windows, fields, first, second, chunk, out, held)
        del keep  # only now may maps and segments go
        return {**batch, "weight": chosen.weight, "instruction": instruction}

    def _addresses(self, chosen: Chosen) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the chosen segments' columns, and their instructions: copies, good while the memory is kept."""
        places = self._index.places
        instruction = np.array(places.instructions)[places.instruction[chosen.row]]
        return places.addresses[chosen.row], places.addresses[chosen.second_row], instruction

    def _ask_rows(self, chosen: Chosen, chunk: int, out: Batch | None) -> Batch | None:
        """The batch as the service gathers it; None when a segment was evicted."""
        windows = chosen.windows
        columns = (windows.id, windows.start, windows.length + windows.extra, windows.second)
        args = {"windows": np.stack(columns, axis=1).tolist(), "chunk": chunk, "codec": self._codec}
        nbytes = len(windows.id) * row_bytes(self.schema, chunk)
        answer, arrays = self._request("rows", args, self.deadline, nbytes)
        with self._changed:
            self._shelf.fetched += sum(array.nbytes for array in arrays.values())
            for id in answer["missing"]:
                self._shelf.drop(id)
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
        try:
            while not self._follower.open:
                left = max(end - time.monotonic(), 0.0)
                args = {"sample": transitions, "wait": min(left, 1.0), "who": self.name}
                answer = self.call("permit", args, max(left, 0.1) + SILENCE_SECONDS)
                self._follower.open = answer["open"]
                if answer["granted"] and not answer["open"]:
                    return
                if not answer["granted"] and time.monotonic() >= end:
                    waited = time.monotonic() - since
                    raise DeadlineError(f"{self.name} waited {waited:.1f} s: {answer['reason']}")
        finally:
            self._waited += time.monotonic() - since
        self._follower.report(transitions)

    def wait_for(
        self, condition: Callable[[], Any], deadline: float | None, what: Callable[[], str]
    ) -> None:
        """Until `condition`, checked when the index changes, is true; DeadlineError says `what` was missing."""
        deadline = self.deadline if deadline is None else max(deadline, 0.0)
        with self._changed:
            if not self._changed.wait_for(lambda: self._stop or condition(), deadline):
                trouble = f" ({self.trouble})" if self.trouble else ""
                raise DeadlineError(f"{self.name} waited {deadline:g} s for {what()}{trouble}")


def load_each(reader: Any, entries: list[Entry], newest: int | None) -> Iterator[Segment]:
    """The segments of `entries` (of the `newest` so many) that are still there, a few loaded at a time.

    `reader`: a Reader or several as one.
    """
    if newest is not None:
        entries = entries[max(len(entries) - newest, 0) :]
    size = 1 if reader.mapped else 16
    for place in range(0, len(entries), size):
        for segment in reader.load(entries[place : place + size]):
            if segment is not None:
                yield segment
