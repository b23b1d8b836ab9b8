"""What happened to entries that readers already know: evictions, deletions, episodes closed, records moved."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable

from buffer_service.entry import Entry

KEPT = 200_000  # a reader that is further behind compares everything anew


class Changes:
    """A numbered log. Readers say which number they saw last."""

    def __init__(self) -> None:
        self._log: collections.deque[int | Entry] = collections.deque(maxlen=KEPT)
        self.newest = 0

    def add(self, gone: Iterable[Entry], changed: Iterable[Entry]) -> None:
        """Note entries that are no more, and the new state of others."""
        news = [*changed, *(entry.id for entry in gone)]
        self._log.extend(news)
        self.newest += len(news)

    def since(self, seen: int) -> tuple[list[int] | None, list[Entry]]:
        """(ids that are gone, changed entries) after number `seen`; None when the log does not reach back."""
        count = self.newest - seen
        if count < 0 or count > len(self._log):
            return None, []
        news = list(itertools.islice(reversed(self._log), count))[::-1]
        changed = {each.id: each for each in news if isinstance(each, Entry)}
        gone = {each for each in news if isinstance(each, int)}
        return sorted(gone), [entry for id, entry in changed.items() if id not in gone]
