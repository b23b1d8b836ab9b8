"""A reader of several replay services: they look like one."""

from __future__ import annotations

import collections
import heapq
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from buffer_service.entry import Entry
from buffer_service.gather import Batch, allocate, fields_of
from buffer_service.reader import Reader, load_each
from buffer_service.sampler import Draw, draws
from buffer_service.sharded_cursor import ShardedCursor
from buffer_service.sharded_draw import Offer, Share, divide, join, offer, slices
from buffer_service.sharded_info import merge
from buffer_service.shards import CONNECT_SECONDS, Links, join_id, split_id
from twinrl.core.errors import DeadlineError
from twinrl.core.keys import Keys
from twinrl.core.segment import Schema, Segment

log = logging.getLogger(__name__)
LOST_SECONDS = 5.0  # without an answer, then nothing is drawn from a service
ANSWER_SECONDS = 15.0  # for the answer of a service that is asked for payload


class ShardedReader:
    """A Reader with several services behind it. Thread-safe.

    Ids are `shards.join_id`s. What is in order of insertion with one service is so within each, and by time of
    insertion between them. A service that does not answer for 5 s is lost: it is as if it held nothing, until it
    answers again; `stats` and the log say so. A batch has one array more: shard (B,) int64.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        keys: Keys,
        run_dir: str | Path | None = None,
        *,
        schema: Schema | None = None,
        name: str = "reader",
        seed: int = 0,
        deadline: float = 30.0,
        cache_bytes: int = 2 << 30,
        codec: str = "raw",
        lost_after: float = LOST_SECONDS,
    ) -> None:
        """addresses: see `Links`. run_dir: of the first service; the others say themselves where their files are.
        cache_bytes: of all services together. The rest is as for a Reader.
        """
        self.name, self.deadline = name, deadline
        self.generator = np.random.default_rng(seed)
        self._lost_after = lost_after
        self._lost: dict[int, str] = {}
        self._troubled: dict[int, float] = {}  # since, monotonic s
        self._counts: collections.Counter[str] = collections.Counter()
        self._pool: ThreadPoolExecutor | None = None
        # One lock for all indexes: what is asked of them together is of one moment.
        self._changed = threading.Condition(threading.RLock())
        self._links: Links[Reader] | None = None

        def make(number: int, address: str) -> Reader:
            reader = Reader(
                *(address, keys, None if number else run_dir),
                schema=schema,
                name=name,
                deadline=CONNECT_SECONDS,
                cache_bytes=cache_bytes // len(addresses),
                codec=codec,
                changed=self._changed,
            )
            reader.deadline = min(ANSWER_SECONDS, deadline)
            return reader

        self._links = Links(addresses, keys, make, self._look, deadline, self._changed)
        self.schema = next(iter(self._links.connected.values())).schema

    @property
    def mapped(self) -> bool:
        """Whether all segment files are mapped rather than fetched."""
        return all(reader.mapped for reader in self._connected().values())

    @property
    def parts(self) -> dict[int, Reader]:
        """The readers of the services that live, by number."""
        lost = self._lost
        return {n: reader for n, reader in self._connected().items() if n not in lost}

    def close(self) -> None:
        """Stop following; views of mapped segments stay valid."""
        assert self._links is not None
        readers = self._links.close().values()
        closing = [threading.Thread(target=reader.close) for reader in readers]
        for each in closing:
            each.start()
        for each in closing:
            each.join()
        if self._pool is not None:
            self._pool.shutdown(wait=False)

    def __enter__(self) -> ShardedReader:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def stats(self) -> dict[str, Any]:
        """Those of a reader over all services, how many there are, and what is known of the lost ones."""
        each = [reader.stats() for reader in self._connected().values()]
        keys = ("segments", "fetched_bytes", "cached_bytes", "priorities_waiting", "waited_s")
        lost = self._describe_lost()
        trouble = lost or [text for stats in each if (text := stats["reader/trouble"])]
        return {
            **{f"reader/{key}": sum(stats[f"reader/{key}"] for stats in each) for key in keys},
            "reader/batches": self._counts["batches"],
            "reader/trouble": "; ".join(trouble),
            "reader/waiting_for": "; ".join(lost),
            "reader/shards": 0 if self._links is None else len(self._links.addresses),
            "reader/shards_lost": len(lost),
        }

    def info(self) -> dict[str, Any]:
        """The services' own accounts: sizes and counters summed, who waits, and `shards`, each one's account."""
        accounts: dict[int, dict[str, Any]] = {}
        for number, reader in self.parts.items():
            answer = self._try(number, reader.info)
            if answer is not None:
                accounts[number] = answer
        if not accounts:
            raise DeadlineError("; ".join(["no replay service answers", *self._describe_lost()]))
        merged, lost = merge(accounts), self._describe_lost()
        return merged | {"lost": lost, "waiting": [*merged["waiting"], *lost]}

    def call(self, method: str, args: dict[str, Any], deadline: float) -> dict[str, Any]:
        """A request to the first service. `delete`, of ids from here, goes to each that holds some."""
        if method != "delete":
            reader = self._connected().get(0)
            if reader is None:
                raise DeadlineError(f"the first replay service does not answer {method!r}")
            return reader.call(method, args, deadline)
        deleted = 0
        for number, ids in _by_shard(args["ids"]).items():
            part = self.parts.get(number)
            if part is None:
                raise DeadlineError(f"shard {number}, which holds some of the segments, is away")
            deleted += part.call(method, {**args, "ids": ids}, deadline)["deleted"]
        return {"deleted": deleted}

    def cursor(self, name: str, **options: Any) -> ShardedCursor:
        """A Cursor over all services; `options` are its."""
        return ShardedCursor(self, name, **options)

    def entries(
        self, source: str | None = None, task: str | None = None, region: str | None = None
    ) -> list[Entry]:
        """The index now, oldest first, of what passes the filter."""
        return list(
            heapq.merge(
                *(
                    [e._replace(id=join_id(number, e.id)) for e in each]
                    for number, reader in self.parts.items()
                    if (each := reader.entries(source, task, region))
                ),
                key=lambda entry: entry.time,
            )
        )

    def sync(self, deadline: float | None = None) -> None:
        """Until the index holds everything that living services acknowledged before this call."""
        deadline = self.deadline if deadline is None else deadline
        end = time.monotonic() + deadline
        for number, reader in self.parts.items():
            while True:
                left = max(end - time.monotonic(), 0.1)
                try:
                    reader.sync(min(left, self._lost_after))
                    break
                except DeadlineError:
                    self._look()
                    if number in self._lost:
                        break
                    if time.monotonic() >= end:
                        raise

    def wait(
        self, segments: int = 1, source: str | None = None, deadline: float | None = None
    ) -> None:
        """Until the index holds so many segments (of `source`)."""

        def known() -> int:
            return sum(reader.count(source) for reader in self.parts.values())

        self.wait_for(
            lambda: known() >= segments,
            deadline,
            lambda: f"{segments} segments of {source or 'any source'}; the index holds {known()}",
        )

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
        """The segments of each episode that is there as a whole, service by service."""
        for reader in self.parts.values():
            yield from reader.trajectories(source, task, region, success)

    def load(self, entries: list[Entry]) -> list[Segment | None]:
        """The segments of `entries`; None where one was evicted meanwhile, or its service is away."""
        found: dict[int, Segment | None] = {}
        parts = self.parts
        for number, ids in _by_shard([entry.id for entry in entries]).items():
            if number not in parts:
                continue
            own = set(ids)
            local = [
                entry._replace(id=id)
                for entry in entries
                for shard, id in [split_id(entry.id)]
                if shard == number and id in own
            ]
            loaded = self._try(number, lambda part=parts[number], local=local: part.load(local))
            for entry, segment in zip(local, loaded or [None] * len(local), strict=True):
                found[join_id(number, entry.id)] = segment
        return [found.get(entry.id) for entry in entries]

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
        """See `Reader.sample`. The distribution is that of one service which held all that the living ones hold;
        `sharded_draw` says how. Only "fresh" is an approximation: it takes what came in as evenly divided.
        """
        chunk, generator = chunk or self.schema.chunk, generator or self.generator
        wanted = draws(mix, task, region, newest, by)
        end = time.monotonic() + (self.deadline if deadline is None else deadline)
        while True:
            shares = self._divide(wanted, batch_size, chunk, generator, end)
            batch = self._gather(shares, batch_size, chunk, generator, out, end)
            if batch is not None:
                self._counts["batches"] += 1
                return batch

    def update_priorities(self, batch: Batch, values: np.ndarray) -> None:
        """See `Reader.update_priorities`. Those of a lost service's windows are dropped."""
        values = np.asarray(values).reshape(-1)
        if values.shape != batch["segment"].shape:
            raise ValueError(f"{values.shape} priorities for a batch of {len(batch['segment'])}")
        shard, id = split_id(batch["segment"])
        parts = self.parts
        for number in np.unique(shard).tolist():
            if number in parts:
                here = shard == number
                own = {"segment": id[here], "step": batch["step"][here]}
                parts[number].update_priorities(own, values[here])

    def flush_priorities(self, deadline: float | None = None) -> None:
        """Until the living services have every priority set until now, durably."""
        end = time.monotonic() + (self.deadline if deadline is None else deadline)
        for reader in self.parts.values():
            reader.flush_priorities(max(end - time.monotonic(), 0.1))

    def wait_for(
        self, condition: Callable[[], Any], deadline: float | None, what: Callable[[], str]
    ) -> None:
        """Until `condition`, checked when an index changes, is true; DeadlineError says `what` was missing."""
        deadline = self.deadline if deadline is None else max(deadline, 0.0)
        with self._changed:
            if not self._changed.wait_for(condition, deadline):
                lost = self._describe_lost()
                trouble = f" ({'; '.join(lost)})" if lost else ""
                raise DeadlineError(f"{self.name} waited {deadline:g} s for {what()}{trouble}")

    # -- drawing -----------------------------------------------------------------------------------------

    def _divide(
        self,
        wanted: list[Draw],
        count: int,
        chunk: int,
        generator: np.random.Generator,
        end: float,
    ) -> dict[int, Share]:
        offers: dict[int, list[Offer]] = {}

        def some() -> bool:
            offers.clear()
            offers.update(offer(wanted, self.parts, len(self._connected()), chunk))
            return any(offer.windows for each in offers.values() for offer in each)

        def what() -> str:
            sources = sorted({part.source or "any source" for part in wanted})
            return f"a window of {chunk} steps from {'/'.join(sources)} in {len(offers)} shards"

        self.wait_for(some, end - time.monotonic(), what)
        return divide(wanted, offers, count, generator)

    def _gather(
        self,
        shares: dict[int, Share],
        size: int,
        chunk: int,
        generator: np.random.Generator,
        out: Batch | None,
        end: float,
    ) -> Batch | None:
        """The batch; None when a service was lost meanwhile, or has no window any more."""
        batch = allocate(fields_of(self.schema), size, chunk, out)
        given = None if out is None else out.get("shard")
        fits = given is not None and given.shape == (size,) and given.dtype == np.int64
        batch["shard"] = given if fits and given is not None else np.empty(size, np.int64)
        jobs = list(slices(batch, shares))
        parts = self._connected()

        def draw(job: tuple[int, Share, Batch], generator: np.random.Generator) -> Batch | None:
            number, share, rows = job
            left = max(min(end - time.monotonic(), ANSWER_SECONDS), 0.1)
            options = {"chunk": chunk, "mix": share.parts, "generator": generator, "out": rows}
            sample = parts[number].sample
            return self._try(number, lambda: sample(share.count, **options, deadline=left), end)

        remote = sum(not parts[number].mapped for number, *_ in jobs)
        if remote > 1:  # each answers in its own time
            if self._pool is None:
                self._pool = ThreadPoolExecutor(8, thread_name_prefix="shards")
            own = [np.random.default_rng(s) for s in generator.integers(1 << 62, size=len(jobs))]
            drawn = list(self._pool.map(draw, jobs, own))
        else:
            drawn = [draw(job, generator) for job in jobs]
        return join(batch, jobs, drawn)

    # -- who is there ------------------------------------------------------------------------------------

    def _connected(self) -> dict[int, Reader]:
        return {} if self._links is None else self._links.connected

    def _try(self, number: int, action: Callable[[], Any], end: float | None = None) -> Any:
        """What `action` gives; None when its service proves to be lost, or there is time until `end` to try again."""
        try:
            return action()
        except DeadlineError:
            with self._changed:
                trouble = self._connected()[number].trouble
                if trouble:
                    self._lose(number, trouble)
                elif end is None or time.monotonic() >= end:
                    raise
            return None

    def _look(self) -> None:
        """Note who answers and who does not; by the links' thread twice a second."""
        now = time.monotonic()
        with self._changed:
            for number, reader in self._connected().items():
                if not reader.trouble:
                    self._troubled.pop(number, None)
                    if number in self._lost:
                        self._lost = {n: t for n, t in self._lost.items() if n != number}
                        log.warning("shard %d answers again", number)
                        self._changed.notify_all()
                elif now - self._troubled.setdefault(number, now) > self._lost_after:
                    self._lose(number, reader.trouble)

    def _lose(self, number: int, trouble: str) -> None:
        if number not in self._lost:
            log.warning("shard %d is lost, the others go on: %s", number, trouble)
            self._changed.notify_all()
        self._lost = {**self._lost, number: trouble}

    def _describe_lost(self) -> list[str]:
        if self._links is None:
            return []
        lost = {**self._links.missing(), **self._lost}
        return [
            f"shard {number} at {self._links.addresses[number]} is away: {text}"
            for number, text in sorted(lost.items())
        ]


def _by_shard(ids: Iterable[int]) -> dict[int, list[int]]:
    """{service: numbers of the segments there}, in the order given."""
    found: dict[int, list[int]] = {}
    for each in ids:
        number, id = split_id(each)
        found.setdefault(number, []).append(id)
    return found
