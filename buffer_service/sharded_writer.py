"""A writer for several replay services: every episode to one of them."""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

from buffer_service.shards import CONNECT_SECONDS, Links
from buffer_service.writer import Writer
from twinrl.core import wire
from twinrl.core.errors import DeadlineError
from twinrl.core.keys import Keys
from twinrl.core.segment import Schema

log = logging.getLogger(__name__)
AHEAD_BYTES = 32 << 20  # one with so much more in its queue than another gets no new episodes
LOST_SECONDS = 10.0  # with something to acknowledge and no acknowledgement
TURN_SECONDS = 1.0  # that a new episode waits for room in one shard, before it looks at the others
MAX_EPISODES = 1 << 16  # under way at once; those that never end are forgotten


class ShardedWriter:
    """A Writer with several services behind it. Thread-safe.

    New episodes go to the services by turns; to one with 32 MiB more unacknowledged than another, or that acknowledges
    nothing for 10 s, only when that is over. All segments of an episode go to one service.
    What it did not acknowledge, and what is still to come of its episodes, waits here and is sent when it is back:
    it may hold some of it already, so nobody else may get it. Nothing is lost as long as this writer lives; where
    the queue of such a service is full, `write` of one of its episodes blocks, as it does with one service.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        keys: Keys,
        writer: str,
        *,
        schema: Schema,
        deadline: float = 30.0,
        lost_after: float = LOST_SECONDS,
        **options: Any,
    ) -> None:
        """addresses: see `Links`. `options` are those of a Writer, for each service: `queue_bytes` holds for one."""
        self.writer, self.schema, self.deadline = writer, schema, deadline
        self._lost_after = lost_after
        self._lock = threading.Lock()
        self._episodes: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._turn = 0
        self._progress: dict[int, tuple[int, float]] = {}  # acknowledged, since (monotonic s)
        self._lost: dict[int, float] = {}  # silent since, monotonic s
        self._links: Links[Writer] | None = None

        def make(number: int, address: str) -> Writer:
            given = {"schema": schema, "deadline": CONNECT_SECONDS, **options}
            return Writer(address, keys, writer, **given)

        self._links = Links(addresses, keys, make, self._look, deadline)

    @property
    def direct(self) -> bool:
        """Whether all payloads go into the services' files rather than over sockets."""
        return all(each.direct for each in self._connected().values())

    def write(
        self, header: dict[str, Any], columns: wire.Arrays, deadline: float | None = None
    ) -> int:
        """Queue a segment; returns its number in its service. See `Writer.write`."""
        end = time.monotonic() + (self.deadline if deadline is None else deadline)
        episode = header["episode"]
        with self._lock:
            given = self._episodes.get(episode)
        while True:
            number = self._choose() if given is None else given
            left = max(end - time.monotonic(), 0.0)
            turn = left if given is not None else min(left, TURN_SECONDS)
            try:
                sequence = self._connected()[number].write(header, columns, turn)
                break
            except DeadlineError as error:
                if time.monotonic() >= end:
                    raise DeadlineError(f"shard {number}: {error}") from None
        ended = header["last"] or columns["terminated"][-1] or columns["truncated"][-1]
        with self._lock:
            if ended:
                self._episodes.pop(episode, None)
            else:
                self._episodes[episode] = number
                if len(self._episodes) > MAX_EPISODES:
                    self._episodes.popitem(last=False)
        return sequence

    def flush(self, deadline: float | None = None) -> None:
        """Wait until the services that live have acknowledged everything written to them.

        What waits for a lost one stays queued, and is in `stats`; `close` does not pass over it.
        """
        end = time.monotonic() + (self.deadline if deadline is None else deadline)
        self._flush(end, passing=True)

    def stats(self) -> dict[str, Any]:
        """Those of a writer over all services, how many there are, and what is known of the lost ones."""
        assert self._links is not None
        links, lost = self._links, dict(self._lost)
        missing = links.missing()
        each = {number: writer.stats() for number, writer in self._connected().items()}
        keys = ("queued_segments", "queued_bytes", "acknowledged", "resent", "dropped", "blocked_s")
        waiting = [self._describe(number, each[number]) for number in lost]
        waiting += [f"shard {n} at {links.addresses[n]}: {text}" for n, text in missing.items()]
        if not waiting:
            waiting = [text for stats in each.values() if (text := stats["writer/waiting_for"])][:1]
        return {
            **{f"writer/{key}": sum(s[f"writer/{key}"] for s in each.values()) for key in keys},
            "writer/direct": self.direct,
            "writer/waiting_for": "; ".join(waiting),
            "writer/shards": len(links.addresses),
            "writer/shards_lost": len(lost) + len(missing),
        }

    def close(self, deadline: float | None = None) -> None:
        """Flush and close. DeadlineError when something stays unacknowledged, which is lost then."""
        end = time.monotonic() + (self.deadline if deadline is None else deadline)
        try:
            self._flush(end, passing=False)
        finally:
            assert self._links is not None
            for writer in self._links.close().values():
                try:
                    writer.close(0.0)
                except DeadlineError as error:
                    log.debug("closed with unacknowledged segments: %s", error)

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.close(None if kind is None else 0.0)

    def _flush(self, end: float, passing: bool) -> None:
        for number, writer in self._connected().items():
            while True:
                try:
                    writer.flush(min(max(end - time.monotonic(), 0.0), TURN_SECONDS))
                    break
                except DeadlineError as error:
                    self._look()
                    if passing and number in self._lost:
                        log.warning("passed over: %s", self._describe(number, writer.stats()))
                        break
                    if time.monotonic() >= end:
                        raise DeadlineError(f"shard {number}: {error}") from None

    def _choose(self) -> int:
        """The service for a new episode."""
        connected = self._connected()
        queued = {n: each.stats()["writer/queued_bytes"] for n, each in connected.items()}
        living = {n: size for n, size in queued.items() if n not in self._lost} or queued
        most = min(living.values()) + AHEAD_BYTES
        equal = [number for number, size in living.items() if size <= most]
        with self._lock:
            self._turn += 1
            return equal[self._turn % len(equal)]

    def _look(self) -> None:
        """Note who acknowledges and who does not; by the links' thread twice a second."""
        now = time.monotonic()
        for number, writer in self._connected().items():
            stats = writer.stats()
            acknowledged = stats["writer/acknowledged"]
            before, since = self._progress.get(number, (-1, now))
            if acknowledged != before or not stats["writer/queued_segments"]:
                self._progress[number] = (acknowledged, now)
                if self._lost.pop(number, None) is not None:
                    log.warning("shard %d acknowledges again", number)
            elif now - since > self._lost_after and number not in self._lost:
                self._lost[number] = since
                log.warning("%s", self._describe(number, stats))

    def _connected(self) -> dict[int, Writer]:
        return {} if self._links is None else self._links.connected

    def _describe(self, number: int, stats: dict[str, Any]) -> str:
        assert self._links is not None
        silent = time.monotonic() - self._lost.get(number, time.monotonic())
        return (
            f"shard {number} at {self._links.addresses[number]} acknowledged nothing for {silent:.0f} s: "
            f"{stats['writer/queued_segments']} segments wait for it, new episodes go to the others; "
            f"{stats['writer/waiting_for']}"
        )
