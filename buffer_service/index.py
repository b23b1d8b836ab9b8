"""The reader's own index: entries, their order within episodes, and the tables that draw from them.

Everything is kept up to date entry by entry; what a draw needs lies in arrays with a row for each segment.
Not thread-safe: the reader's lock guards it.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from buffer_service.entry import CUT, OPEN, Entry
from buffer_service.gather import Places, Windows
from buffer_service.sampler import Draw, split, window_starts
from buffer_service.selectors import Ragged, Table
from twinrl.core.segment import SOURCES, Schema


class _Episode:
    """The segments of an episode that are there."""

    def __init__(self) -> None:
        self.starts: dict[int, int] = {}  # first step -> segment
        self.ends: dict[int, int] = {}  # step after the last -> segment
        self.success = self.ended = False


class Chosen(NamedTuple):
    """B windows drawn for a batch."""

    windows: Windows
    row: np.ndarray  # (B,) of the segments in `places`
    second_row: np.ndarray  # (B,) of those the windows go on in; `row` where there is none
    weight: np.ndarray  # (B,) float32, importance weights; 1 where a part has none
    rows: np.ndarray  # every row among these, once
    ids: np.ndarray  # their segments


class Index:
    """What is known of the segments in the replay."""

    def __init__(self, schema: Schema) -> None:
        rows = 64
        self.entries: dict[int, Entry] = {}  # by id, rising
        self.count: collections.Counter[str] = collections.Counter()  # segments of each source
        self.bytes = 0  # of all records
        self.files: collections.Counter[int] = collections.Counter()  # segments in each file
        self.places = Places(schema, rows)
        self.priority: dict[int, float] = {}  # of segments that have one
        self._row: dict[int, int] = {}
        self._free = list(range(rows))[::-1]
        self._id = np.zeros(rows, np.int64)
        self.file = np.zeros(rows, np.int64)  # by row, like what follows
        self._steps = np.zeros(rows, np.int64)
        self._end = np.zeros(rows, np.int8)
        self._source = np.zeros(rows, np.int64)
        self._next = np.full(rows, -1, np.int64)  # the row of the episode's next segment
        self._frames = Ragged(np.int32, rows)  # last frame at or before each step; none where dense
        self._episodes: dict[tuple[str, str], _Episode] = {}
        self._tables: dict[tuple, tuple[Draw, int, Table]] = {}  # with the chunk

    # -- what comes and goes -----------------------------------------------------------------------------

    def put(self, entry: Entry) -> None:
        """Take in an entry, or what is known of one now."""
        old = self.entries.get(entry.id)
        if old is not None:
            if old == entry:
                return
            if not _same_place(old, entry):
                self.places.forget(self._row[entry.id])
            self._count_out(old)
        else:
            self._new_row(entry)
        if self.entries and old is None and entry.id < next(reversed(self.entries)):
            self.entries[entry.id] = entry  # out of order: after a crash of the service only
            self.entries = dict(sorted(self.entries.items()))
        self.entries[entry.id] = entry
        self.bytes += entry.length
        self.count[entry.source] += 1
        self.files[entry.file] += 1
        row = self._row[entry.id]
        self._end[row], self.file[row] = entry.end, entry.file
        self._join_episode(entry, row)

    def remove(self, id: int) -> None:
        """Forget a segment."""
        entry = self.entries.pop(id, None)
        if entry is None:
            return
        self.priority.pop(id, None)
        self._count_out(entry)
        for _, _, table in self._tables.values():
            table.remove(id)
        row = self._row.pop(id)
        self._id[row] = 0
        self.places.forget(row)
        if self._frames.offset[row] >= 0:
            self._frames.drop(row)
        self._free.append(row)
        self._leave_episode(entry)

    def entry_at(self, row: int) -> Entry:
        """The entry of a row."""
        return self.entries[int(self._id[row])]

    def row(self, id: int) -> int:
        """The row of a segment, -1 where there is none."""
        return self._row.get(id, -1)

    def forget_place(self, id: int) -> None:
        """The memory of a segment may go."""
        if id in self._row:
            self.places.forget(self._row[id])

    def _count_out(self, entry: Entry) -> None:
        self.bytes -= entry.length
        self.count[entry.source] -= 1
        self.files[entry.file] -= 1
        if not self.files[entry.file]:
            del self.files[entry.file]

    def _new_row(self, entry: Entry) -> None:
        if not self._free:
            self._grow()
        row = self._row[entry.id] = self._free.pop()
        self._id[row], self._steps[row] = entry.id, entry.steps
        self._source[row], self._next[row] = SOURCES.index(entry.source), -1
        if entry.frame_step is not None:
            steps = np.arange(entry.steps + 1)
            self._frames.put(row, np.searchsorted(entry.frame_step, steps, side="right") - 1)

    def _grow(self) -> None:
        size = len(self._id)
        for name in ("_id", "file", "_steps", "_end", "_source", "_next"):
            array = getattr(self, name)
            setattr(self, name, np.concatenate([array, np.zeros_like(array)]))
        self._frames.grow(2 * size)
        self.places.grow(2 * size)
        self._free = list(range(size, 2 * size))[::-1]

    # -- episodes ----------------------------------------------------------------------------------------

    def _join_episode(self, entry: Entry, row: int) -> None:
        key = (entry.writer, entry.episode)
        episode = self._episodes.get(key)
        if episode is None:
            episode = self._episodes[key] = _Episode()
        behind = entry.first_step + entry.steps
        episode.starts[entry.first_step] = episode.ends[behind] = entry.id
        verdict = (episode.success, episode.ended)
        episode.success |= entry.success
        episode.ended |= entry.end != OPEN
        following = episode.starts.get(behind)
        self._next[row] = -1 if following is None else self._row[following]
        before = episode.ends.get(entry.first_step)
        if before is not None:
            self._next[self._row[before]] = row
        if verdict != (episode.success, episode.ended):
            self._offer(episode.starts.values())  # the verdict on all of its segments changed
        else:
            self._offer([entry.id] if before is None else [before, entry.id])

    def _leave_episode(self, entry: Entry) -> None:
        key = (entry.writer, entry.episode)
        episode = self._episodes[key]
        behind = entry.first_step + entry.steps
        if episode.ends.get(behind) == entry.id:
            del episode.ends[behind]
        if episode.starts.get(entry.first_step) == entry.id:
            del episode.starts[entry.first_step]
            before = episode.ends.get(entry.first_step)
            if before is not None:
                self._next[self._row[before]] = -1
                self._offer([before])
        if not episode.starts:
            del self._episodes[key]

    def _following(self, entry: Entry) -> Entry | None:
        row = self._next[self._row[entry.id]]
        return None if row < 0 else self.entries.get(int(self._id[row]))

    def episodes(self, draw: Draw) -> Iterator[list[Entry]]:
        """The segments of every episode that is there as a whole, in the order in which the episodes began."""
        for episode in list(self._episodes.values()):
            whole, step = [], 0
            while (id := episode.starts.get(step)) is not None:
                whole.append(self.entries[id])
                step += whole[-1].steps
            if (
                whole
                and whole[-1].end != OPEN
                and draw.passes(whole[0])
                and draw.success in (None, episode.success)
            ):
                yield whole

    # -- tables ------------------------------------------------------------------------------------------

    def _offer(self, ids: Iterable[int]) -> None:
        """Tell the tables of new or changed segments."""
        if not self._tables:
            return
        for entry in [self.entries[id] for id in ids]:
            for draw, chunk, table in self._tables.values():
                self._offer_to(draw, chunk, table, entry)

    def _offer_to(self, draw: Draw, chunk: int, table: Table, entry: Entry) -> None:
        if not draw.passes(entry):
            return
        if draw.success is not None:
            episode = self._episodes[entry.writer, entry.episode]
            fits = episode.success if draw.success else episode.ended and not episode.success
            if not fits:
                table.remove(entry.id)
                return
        starts = window_starts(entry, self._following(entry), chunk)
        row = self._row[entry.id]
        table.put(entry.id, row, entry.steps, starts, self.priority.get(entry.id))

    def table(self, draw: Draw, chunk: int) -> Table:
        """The table that `draw` draws from; made when it is asked for first."""
        key = draw.key(chunk)
        if key not in self._tables:
            table = Table(draw.by, draw.exponent, draw.half_life)
            for entry in self.entries.values():
                self._offer_to(draw, chunk, table, entry)
            self._tables[key] = (draw, chunk, table)
        return self._tables[key][2]

    def newest_times(self, draw: Draw, chunk: int) -> list[float]:
        """When the `draw.newest` newest segments with windows came in, oldest first."""
        assert draw.newest is not None
        ids = self.table(draw, chunk).newest(draw.newest)
        return [self.entries[id].time for id in ids.tolist()]

    def choose(
        self, parts: Sequence[Draw], count: int, chunk: int, generator: np.random.Generator
    ) -> Chosen:
        """`count` windows by `parts`, of which one at least must have some."""
        tables = [self.table(part, chunk) for part in parts]
        counts = split(count, [p.share for p in parts], [t.windows for t in tables], generator)
        rows, starts, weights = [], [], []
        for part, table, number in zip(parts, tables, counts, strict=True):
            if not number:
                continue
            drawn = table.draw(number, generator, part.newest)
            rows.append(drawn.row)
            starts.append(drawn.start)
            weight = np.ones(number)
            if part.by == "priority":
                weight = (drawn.windows * drawn.probability) ** -part.importance
                if part.relative:
                    weight /= weight.max()
            weights.append(weight.astype(np.float32))
        joined = (np.concatenate(each) for each in (rows, starts, weights))
        return self._windows(*joined, chunk)

    def _windows(
        self, row: np.ndarray, start: np.ndarray, weight: np.ndarray, chunk: int
    ) -> Chosen:
        length = np.minimum(chunk, self._steps[row] - start)
        second_row = np.where(length < chunk, self._next[row], -1)
        second_row = np.where(self._end[row] == OPEN, second_row, -1)
        crossing = second_row >= 0
        second_row = np.where(crossing, second_row, row)
        extra = np.where(crossing, np.minimum(chunk - length, self._steps[second_row]), 0)
        after = np.where(crossing, extra, start + length)
        next_frame = self._frame(second_row, after)
        second = crossing & (next_frame >= 0)
        lost = crossing & ~second  # a terminal state without a frame
        if lost.any():
            next_frame = np.where(lost, self._frame(row, self._steps[row]), next_frame)
        windows = Windows(
            id=self._id[row],
            start=start,
            length=length,
            second=np.where(crossing, self._id[second_row], 0),
            extra=extra,
            frame=self._frame(row, start),
            next_frame=next_frame,
            next_second=second,
            cut=(self._end[second_row] == CUT) & (after == self._steps[second_row]),
            source=self._source[row],
        )
        rows = np.unique(np.concatenate([row, second_row]) if crossing.any() else row)
        return Chosen(windows, row, second_row, weight, rows, self._id[rows])

    def _frame(self, row: np.ndarray, step: np.ndarray) -> np.ndarray:
        """The row of the last frame at or before `step` of each segment, -1 for none."""
        offset = self._frames.offset[row]
        sparse = offset >= 0
        if not sparse.any():
            return step
        return np.where(sparse, self._frames.values[np.where(sparse, offset + step, 0)], step)

    def set_priorities(
        self, ids: np.ndarray, steps: np.ndarray, values: np.ndarray
    ) -> dict[int, float]:
        """Priorities of the windows that start there; returns those of the segments they lie in."""
        tables = [table for _, _, table in self._tables.values() if table.by == "priority"]
        touched: dict[int, float] = {}
        for table in tables:
            touched |= table.set_priorities(ids, steps, values)
        if not tables:  # nobody draws by priority here: the mean is what others begin with
            for id in np.unique(ids).tolist():
                if id in self.entries:
                    touched[id] = float(values[ids == id].mean())
        self.priority |= touched
        return touched


def _same_place(old: Entry, new: Entry) -> bool:
    return (old.file, old.offset, old.length) == (new.file, new.offset, new.length)
