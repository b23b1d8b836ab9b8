"""On-policy consumption from several replay services: a cursor in each."""

from __future__ import annotations

import collections
import contextlib
import heapq
import time
from typing import TYPE_CHECKING, Any

from buffer_service.cursor import Cursor, within
from buffer_service.entry import Entry
from twinrl.core.errors import DeadlineError
from twinrl.core.segment import Segment

if TYPE_CHECKING:
    from buffer_service.sharded_reader import ShardedReader


class ShardedCursor:
    """A Cursor over all services: each segment once, in order within a service, by time of insertion between them.

    An episode is in one service, so its segments come in order. A service that is lost is passed over, and goes on
    where it was when it is back; one that comes in later begins with its first segment.
    """

    def __init__(
        self,
        reader: ShardedReader,
        name: str,
        *,
        source: str | None = "twin",
        task: str | None = None,
        position: dict[int, int] | int | None = None,
    ) -> None:
        """`position`: start here instead of where the last commits stand: a checkpoint's own record, also one of a
        Cursor, of the time when there was one service."""
        self._reader, self.name = reader, name
        self._filter: dict[str, Any] = {"source": source, "task": task}
        self._start = _by_service(position)
        self._cursors: dict[int, Cursor] = {}
        self._meet()

    @property
    def position(self) -> dict[int, int]:
        """{service: number there of the last segment passed by}. Setting it starts anew from there."""
        return self._start | {number: each.position for number, each in self._cursors.items()}

    @position.setter
    def position(self, position: dict[int, int] | int) -> None:
        self._start = _by_service(position)
        for number, cursor in self._cursors.items():
            if number in self._start:  # others were not known then: they are where they are
                cursor.position = self._start[number]

    @property
    def counts(self) -> dict[str, int]:
        """Segments taken, skipped for lag, and lost to eviction."""
        total: collections.Counter[str] = collections.Counter(taken=0, skipped=0, evicted=0)
        for cursor in self._cursors.values():
            total.update(cursor.counts)
        return dict(total)

    def take(
        self,
        *,
        min_segments: int = 1,
        max_transitions: int | None = None,
        current_version: int | None = None,
        max_lag: int | None = None,
        timeout: float = 30.0,
    ) -> list[Segment]:
        """See `Cursor.take`. Where a service is lost while it is asked, less than `min_segments` may come."""
        end = time.monotonic() + timeout
        found: dict[int, tuple[list[Entry], list[Entry]]] = {}

        def enough() -> bool:
            found.clear()
            living = self._reader.parts
            for number, cursor in self._cursors.items():
                if number in living:
                    found[number] = cursor.look(current_version, max_lag)
            return sum(len(fresh) for fresh, _ in found.values()) >= min_segments

        while True:
            try:
                # In turns: a service that came in meanwhile has no cursor yet.
                self._meet()
                left = max(end - time.monotonic(), 0.0)
                self._reader.wait_for(enough, min(left, 1.0), lambda: "")
            except DeadlineError as error:
                if time.monotonic() < end:
                    continue
                fresh, late = (sum(len(each[i]) for each in found.values()) for i in (0, 1))
                raise DeadlineError(
                    f"cursor {self.name!r} waited {timeout:g} s for {min_segments} segments behind "
                    f"{self.position}: {fresh} are there, {late} lag too far; {error}"
                ) from None
            here = self._advance(found, max_transitions)
            if here:
                return here

    def pass_by(self) -> None:
        """Go behind everything that is indexed now, of whatever source."""
        self._meet()
        for cursor in self._cursors.values():
            cursor.pass_by()

    def commit(self, deadline: float | None = None) -> None:
        """Make position and counts durable, each service its own. A lost one's stays where its last commit was:
        whoever has a checkpoint gives its `position`."""
        deadline = self._reader.deadline if deadline is None else deadline
        living = self._reader.parts
        failed: list[str] = []
        for number, cursor in self._cursors.items():
            if number in living:
                try:
                    cursor.commit(deadline)
                except DeadlineError as error:
                    failed.append(f"shard {number}: {error}")
        if failed and len(failed) == len(self._cursors):
            raise DeadlineError("; ".join(failed))

    def stats(self) -> dict[str, Any]:
        """Where it stands in each service and what it took, skipped for lag, and lost to eviction."""
        return {
            **{f"cursor/position/{n}": position for n, position in self.position.items()},
            **{f"cursor/{k}": v for k, v in self.counts.items()},
        }

    def _advance(
        self, found: dict[int, tuple[list[Entry], list[Entry]]], max_transitions: int | None
    ) -> list[Segment]:
        merged = heapq.merge(
            *([(number, entry) for entry in fresh] for number, (fresh, _) in found.items()),
            key=lambda each: each[1].time,
        )
        order = list(merged)
        order = order[: len(list(within([entry for _, entry in order], max_transitions)))]
        segments: dict[tuple[int, str, int], Segment] = {}
        for number in {number for number, _ in order}:
            chosen = [entry for n, entry in order if n == number]
            with contextlib.suppress(DeadlineError):  # lost just now: it stays where it was
                for each in self._cursors[number].advance(chosen, found[number][1]):
                    segments[number, each.header["writer"], each.header["sequence"]] = each
        names = ((number, entry.writer, entry.sequence) for number, entry in order)
        return [segments[name] for name in names if name in segments]

    def _meet(self) -> None:
        """A cursor for each service that has none yet."""
        for number, reader in self._reader.parts.items():
            if number not in self._cursors:
                with contextlib.suppress(DeadlineError):
                    start = self._start.get(number)
                    self._cursors[number] = Cursor(
                        reader, self.name, **self._filter, position=start
                    )


def _by_service(position: dict[int, int] | int | None) -> dict[int, int]:
    if position is None:
        return {}
    return {0: position} if isinstance(position, int) else dict(position)
