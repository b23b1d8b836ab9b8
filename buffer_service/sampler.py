"""Windows: stretches of up to C executed steps of one segment, what a chunk critic learns from.

A window of L steps starts at a step t that has a frame and ends at t + L, which has a frame too or is the
terminal state. L is C, or less where the episode ends first (the tail).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from buffer_service.entry import OPEN, TERMINATED, Entry
from twinrl.core.segment import IMAGE_PREFIX, SOURCES, Segment

Batch = dict[str, np.ndarray]
_STEP_COLUMNS = ("action", "reward", "intervention")
_STATES = ("observation.state", "privileged.state")


class Window(NamedTuple):
    """Steps t .. t + length of a segment."""

    entry: Entry
    start: int
    length: int


def window_starts(entry: Entry, chunk: int) -> Sequence[int]:
    """Every step at which a window of up to `chunk` steps may start, rising."""
    steps, ended = entry.steps, entry.end != OPEN
    if entry.frame_step is None:
        return range(steps if ended else max(steps - chunk + 1, 0))
    frames = set(entry.frame_step)
    if entry.end == TERMINATED:
        frames.add(steps)  # nothing is bootstrapped there, so no frame is needed
    return [
        t
        for t in entry.frame_step
        if t < steps and (ended or t + chunk <= steps) and min(t + chunk, steps) in frames
    ]


class Windows:
    """The windows of the segments of one source that pass a filter; drawn uniformly."""

    def __init__(self, chunk: int, source: str, task: str | None, region: str | None) -> None:
        self._chunk, self._filter = chunk, (source, task, region)
        self._starts: dict[int, Sequence[int]] = {}  # by segment id, oldest first
        self._entries: dict[int, Entry] = {}
        self._order: list[int] | None = None
        self._ends = np.zeros(0, np.int64)

    def add(self, entry: Entry) -> None:
        """Take in a segment, if it passes and has windows."""
        source, task, region = self._filter
        if entry.source != source or task not in (None, entry.task):
            return
        if region not in (None, entry.region):
            return
        starts = window_starts(entry, self._chunk)
        if len(starts):
            self._starts[entry.id], self._entries[entry.id] = starts, entry
            self._order = None

    def remove(self, id: int) -> None:
        """Forget a segment."""
        if self._starts.pop(id, None) is not None:
            del self._entries[id]
            self._order = None

    def __len__(self) -> int:
        self._prepare()
        return int(self._ends[-1]) if len(self._ends) else 0

    def draw(self, count: int, generator: np.random.Generator, newest: int | None) -> list[Window]:
        """`count` windows, uniformly and with repetition; of the `newest` segments only, when given."""
        self._prepare()
        order, ends = self._order or [], self._ends
        low = 0 if newest is None or newest >= len(order) else int(ends[len(order) - newest - 1])
        numbers = generator.integers(low, len(self), count)
        places = np.searchsorted(ends, numbers, side="right")
        windows = []
        # Offsets are negative: they count back from the end of a segment's windows.
        for place, offset in zip(places.tolist(), (numbers - ends[places]).tolist(), strict=True):
            id = order[place]
            entry, start = self._entries[id], self._starts[id][offset]
            windows.append(Window(entry, start, min(self._chunk, entry.steps - start)))
        return windows

    def _prepare(self) -> None:
        if self._order is None:
            self._order = list(self._starts)
            self._ends = np.cumsum([len(starts) for starts in self._starts.values()])


def split(
    count: int, mix: dict[str, float], sizes: dict[str, int], generator: np.random.Generator
) -> dict[str, int]:
    """How many of `count` windows to draw from each source: by `mix`, shared among those that have windows.

    Whole parts are fixed and only the rest is drawn, so a batch keeps to the mix closely.
    """
    weights = {source: weight for source, weight in mix.items() if weight > 0 and sizes[source]}
    total = sum(weights.values())
    exact = {source: count * weight / total for source, weight in weights.items()}
    counts = {source: int(value) for source, value in exact.items()}
    rest = count - sum(counts.values())
    if rest:
        left = np.array([exact[source] - counts[source] for source in exact])
        for place, extra in enumerate(generator.multinomial(rest, left / left.sum())):
            counts[list(exact)[place]] += int(extra)
    return counts


def gather(
    windows: Sequence[Window], segments: Sequence[Segment], chunk: int, out: Batch | None = None
) -> Batch:
    """The batch of `windows`; `segments[i]` is the segment of `windows[i]`. Fills the arrays of `out` if given.

    observation.images.CAMERA (B, H, W, 3) uint8, observation.state (B, S) float32, privileged.state (B, P) when
    every segment has it, each also with the prefix "next." for the state after the window; action (B, C, 7),
    reward (B, C), intervention (B, C) bool, step_mask (B, C) bool: the step was executed, zeros elsewhere;
    terminated, truncated (B,) bool of the last executed step; steps (B,) int64 = L; source (B,) int64 in
    SOURCES; policy_version (B,) int64 of the first step; segment, step (B,) int64; instruction (B,) str.
    A terminal state without a frame has the last frame before it as its next image.
    """
    size = len(windows)
    batch = _allocate(segments, size, chunk, out)
    images = [
        (name, batch[name], batch["next." + name])
        for name in batch
        if name.startswith(IMAGE_PREFIX)
    ]
    states = [(name, batch[name], batch["next." + name]) for name in _STATES if name in batch]
    steps = [(name, batch[name]) for name in _STEP_COLUMNS]
    pairs = list(zip(windows, segments, strict=True))
    for row, ((entry, start, length), (_, columns)) in enumerate(pairs):
        end = start + length
        frames = entry.frame_step
        first = start if frames is None else bisect.bisect_left(frames, start)
        last = end if frames is None else bisect.bisect_right(frames, end) - 1
        for name, now, after in images:
            column = columns[name]
            now[row] = column[first]
            after[row] = column[last]
        for name, now, after in states:
            column = columns[name]
            now[row] = column[start]
            after[row] = column[end]
        for name, target in steps:
            target[row, :length] = columns[name][start:end]
            if length < chunk:
                target[row, length:] = 0
    for name in ("terminated", "truncated"):
        batch[name][:] = [s.columns[name][w.start + w.length - 1] for w, s in pairs]
    batch["policy_version"][:] = [s.columns["policy_version"][w.start] for w, s in pairs]
    lengths = np.array([window.length for window in windows])
    batch["steps"][:] = lengths
    batch["step_mask"][:] = np.arange(chunk) < lengths[:, None]
    batch["source"][:] = [SOURCES.index(window.entry.source) for window in windows]
    batch["segment"][:] = [window.entry.id for window in windows]
    batch["step"][:] = [window.start for window in windows]
    batch["instruction"] = np.array([segment.header["instruction"] for segment in segments])
    return batch


def _allocate(segments: Sequence[Segment], size: int, chunk: int, out: Batch | None) -> Batch:
    shapes: dict[str, tuple] = {}
    for name, column in segments[0].columns.items():
        if name.startswith(IMAGE_PREFIX) or name in _STATES:
            if name == "privileged.state" and not all(name in each.columns for each in segments):
                continue
            for key in (name, "next." + name):
                shapes[key] = ((size, *column.shape[1:]), column.dtype)
    for name in _STEP_COLUMNS:
        column = segments[0].columns[name]
        shapes[name] = ((size, chunk, *column.shape[1:]), column.dtype)
    shapes["step_mask"] = ((size, chunk), np.bool_)
    for name in ("terminated", "truncated"):
        shapes[name] = ((size,), np.bool_)
    for name in ("steps", "source", "policy_version", "segment", "step"):
        shapes[name] = ((size,), np.int64)
    batch = {}
    for name, (shape, dtype) in shapes.items():
        given = None if out is None else out.get(name)
        fits = given is not None and given.shape == shape and given.dtype == dtype
        batch[name] = given if given is not None and fits else np.empty(shape, dtype)
    return batch
