"""On-policy consumption: a named cursor that gives every segment once and in order."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from buffer_service.entry import Entry
from twinrl.core.errors import DeadlineError
from twinrl.core.segment import Segment

if TYPE_CHECKING:
    from buffer_service.reader import Reader


class Cursor:
    """A place in the order of insertion, kept by the service under `name`.

    Call `commit` when the learner's checkpoint is written; after a restart it goes on behind the last commit.
    What it passes by stays in the replay for off-policy use.
    """

    def __init__(
        self,
        reader: Reader,
        name: str,
        *,
        source: str | None = "twin",
        task: str | None = None,
        position: int | None = None,
    ) -> None:
        """`position`: start here instead of where the last commit stands (a checkpoint's own record)."""
        self._reader, self.name, self._filter = reader, name, (source, task)
        kept = reader.call("cursor_read", {"name": name}, reader.deadline)
        self._last: dict[str, int] = {}  # writer -> its highest sequence number passed by
        self.position = kept["position"] if position is None else position
        self.counts = {key: kept.get(key, 0) for key in ("taken", "skipped", "evicted")}

    @property
    def position(self) -> int:
        """The id of the last segment passed by. Setting it starts anew from there."""
        return self._position

    @position.setter
    def position(self, id: int) -> None:
        self._position = id
        self._last = {}

    def take(
        self,
        *,
        min_segments: int = 1,
        max_transitions: int | None = None,
        current_version: int | None = None,
        max_lag: int | None = None,
        timeout: float = 30.0,
    ) -> list[Segment]:
        """The next segments, at least `min_segments`, up to `max_transitions` (but one at least).

        Those whose oldest step lags `current_version` by more than `max_lag` versions are skipped and counted.
        """
        end = time.monotonic() + timeout
        while True:
            fresh, skipped = self._wait(
                min_segments, current_version, max_lag, end - time.monotonic(), timeout
            )
            here = self.advance(list(within(fresh, max_transitions)), skipped)
            if here:
                return here

    def look(
        self, current_version: int | None = None, max_lag: int | None = None
    ) -> tuple[list[Entry], list[Entry]]:
        """(segments behind the position that may be taken, those that lag too far)."""
        fresh: list[Entry] = []
        skipped: list[Entry] = []
        for entry in self._reader.entries_after(self._position, *self._filter):
            # A service that lost its newest index entries with its machine gives their segments new ids.
            if entry.sequence <= self._last.get(entry.writer, -1):
                continue
            late = (
                None not in (current_version, max_lag) and current_version - entry.version > max_lag
            )
            (skipped if late else fresh).append(entry)
        return fresh, skipped

    def advance(self, chosen: list[Entry], skipped: list[Entry]) -> list[Segment]:
        """Take `chosen`, the first of those that `look` gave, at least one, and pass by what is `skipped` before
        its last. Returns those that were not evicted."""
        segments = self._reader.load(chosen)
        self._position = chosen[-1].id
        passed = [entry for entry in skipped if entry.id < self._position]
        for entry in (*chosen, *passed):
            self._last[entry.writer] = max(self._last.get(entry.writer, -1), entry.sequence)
        here = [segment for segment in segments if segment is not None]
        self.counts["skipped"] += len(passed)
        self.counts["evicted"] += len(segments) - len(here)
        self.counts["taken"] += len(here)
        return here

    def pass_by(self) -> None:
        """Go behind everything that is indexed now, of whatever source."""
        self.position = max((e.id for e in self._reader.entries()), default=self.position)

    def commit(self, deadline: float | None = None) -> None:
        """Make position and counts durable."""
        args = {"name": self.name, "values": {"position": self.position, **self.counts}}
        self._reader.call(
            "cursor_commit", args, self._reader.deadline if deadline is None else deadline
        )

    def stats(self) -> dict[str, Any]:
        """Where it stands and what it took, skipped for lag, and lost to eviction."""
        return {
            "cursor/position": self.position,
            **{f"cursor/{k}": v for k, v in self.counts.items()},
        }

    def _wait(
        self,
        least: int,
        current: int | None,
        max_lag: int | None,
        left: float,
        timeout: float,
    ) -> tuple[list[Entry], list[Entry]]:
        found: tuple[list[Entry], list[Entry]] = ([], [])

        def enough() -> bool:
            nonlocal found
            found = self.look(current, max_lag)
            return len(found[0]) >= least

        try:
            self._reader.wait_for(enough, left, lambda: "")
        except DeadlineError:
            raise DeadlineError(
                f"cursor {self.name!r} waited {timeout:g} s for {least} segments behind "
                f"{self.position}: {len(found[0])} are there, {len(found[1])} lag too far"
            ) from None
        return found


def within(entries: list[Entry], max_transitions: int | None) -> Iterator[Entry]:
    """The first of `entries` up to so many transitions, but one at least."""
    steps = 0
    for place, entry in enumerate(entries):
        steps += entry.steps
        if place and max_transitions is not None and steps > max_transitions:
            return
        yield entry
