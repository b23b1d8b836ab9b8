"""What to draw: parts of a batch, and windows of up to C executed steps.

A window of L steps starts at a step t that has a frame and ends at t + L, which has a frame too or is the
terminal state. L is C, or less where the episode ends first (the tail). A window that reaches its segment's end
goes on in the next segment of the episode, once that is there; a third one is never touched: where two segments
are too short for C steps and the episode goes on, no window starts.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from buffer_service.entry import CUT, OPEN, TERMINATED, Entry
from buffer_service.gather import Batch, Windows
from buffer_service.selectors import BY
from twinrl.core.errors import ConfigError
from twinrl.core.segment import SOURCES

__all__ = ["Batch", "Draw", "discounted", "draws", "split", "window_starts", "windows_at"]


@dataclass(frozen=True)
class Draw:
    """A part of a batch: which windows, and how they are drawn."""

    share: float = 1.0  # of the batch, relative to the other parts'
    source: str | None = None  # None: any, also for the next three
    task: str | None = None
    region: str | None = None
    success: bool | None = None  # True: of episodes that succeeded; False: that ended without
    newest: int | None = None  # only of the newest so many segments
    by: str = "uniform"  # or "priority" or "fresh"
    exponent: float = 0.6  # "priority": drawn in proportion to priority ** exponent
    importance: float = 0.4  # "priority": weight = (windows * probability) ** -importance
    half_life: float = 100_000.0  # "fresh": transitions that halve the chance of what came before
    relative: bool = True  # "priority": divide the weights by the largest of the batch

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.source is not None and self.source not in SOURCES:
            raise ConfigError(f"mix names {self.source!r}, sources are {', '.join(SOURCES)}")
        if self.by not in BY:
            raise ConfigError(f"a draw by {self.by!r}; it can be by {', '.join(BY)}")
        if not 0 <= self.share < float("inf"):
            raise ConfigError(f"a draw's share is {self.share}, must be positive, or 0 for nothing")
        if self.newest is not None and self.newest < 1:
            raise ConfigError(f"newest={self.newest} leaves no segment to draw from")
        if self.half_life <= 0 or self.exponent < 0 or self.importance < 0:
            raise ConfigError(
                f"half_life={self.half_life:g} must be positive, exponent={self.exponent:g} and "
                f"importance={self.importance:g} not negative"
            )

    def key(self, chunk: int) -> tuple:
        """What the table that it draws from depends on."""
        weighing = {"priority": self.exponent, "fresh": self.half_life}.get(self.by)
        return (chunk, self.source, self.task, self.region, self.success, self.by, weighing)

    def passes(self, entry: Entry) -> bool:
        """Whether a segment belongs to it, its episode's success apart."""
        return (
            self.source in (None, entry.source)
            and self.task in (None, entry.task)
            and self.region in (None, entry.region)
        )


def draws(
    mix: Mapping[str, float] | Sequence[Draw] | None,
    task: str | None,
    region: str | None,
    newest: int | None,
    by: str,
) -> list[Draw]:
    """The parts of a batch: `mix` as {source: share} or as parts already, or one part of everything."""
    same = {"task": task, "region": region, "newest": newest, "by": by}
    if mix is None:
        return [Draw(**same)]
    if isinstance(mix, Mapping):
        parts = [Draw(share, source, **same) for source, share in mix.items()]
    else:
        parts = list(mix)
        given = {k: v for k, v in same.items() if v not in (None, "uniform")}
        if given:
            raise ConfigError(f"{', '.join(given)} belong into the parts of the mix")
    parts = [part for part in parts if part.share > 0]
    if not parts:
        raise ConfigError(f"mix={mix!r} gives every part a share of 0")
    return parts


def split(
    count: int, shares: Sequence[float], sizes: Sequence[int], generator: np.random.Generator
) -> list[int]:
    """How many of `count` windows to draw from each part: by `shares`, shared among those that have windows.

    Whole parts are fixed and only the rest is drawn, so a batch keeps to the mix closely.
    """
    weight = np.array(shares, float) * (np.array(sizes) > 0)
    exact = count * weight / weight.sum()
    counts = exact.astype(np.int64)
    rest = count - int(counts.sum())
    if rest:
        left = exact - counts
        counts += generator.multinomial(rest, left / left.sum())
    return counts.tolist()


def window_starts(entry: Entry, following: Entry | None, chunk: int) -> Sequence[int]:
    """Every step at which a window of up to `chunk` steps may start, rising.

    `following`: the next segment of the episode, where there is one.
    """
    steps, end, frames = entry.steps, entry.end, entry.frame_step
    more = 0
    if end == OPEN and following is not None:
        more, end = following.steps, following.end
    last = steps if end != OPEN else min(steps, max(steps + more - chunk + 1, 0))
    if frames is None and (not more or following.frame_step is None):
        return range(last)
    if not more:
        return _sparse(tuple(frames), None, steps, 0, end, chunk)
    frames = range(steps + 1) if frames is None else frames
    after = following.frame_step
    after = tuple(range(more + 1)) if after is None else tuple(after)
    return _sparse(tuple(frames), after, steps, more, end, chunk)


@functools.lru_cache(maxsize=4096)
def _sparse(
    frames: tuple[int, ...],
    after: tuple[int, ...] | None,
    steps: int,
    more: int,
    end: int,
    chunk: int,
) -> Sequence[int]:
    """`window_starts` where not every step has a frame; segments of a job look much the same."""
    reach = steps + more
    seen = set(frames)
    if after is not None:
        seen.update(
            steps + t for t in after if t
        )  # a window that ends at `steps` lies in the first
    if end == TERMINATED:
        seen.add(reach)  # nothing is bootstrapped there, so no frame is needed
    return tuple(
        t
        for t in frames
        if t < steps and (end != OPEN or t + chunk <= reach) and min(t + chunk, reach) in seen
    )


def windows_at(
    entries: Sequence[Entry],
    followings: Sequence[Entry | None],
    start: Sequence[int],
    length: Sequence[int],
) -> Windows:
    """Windows of `length` steps (or what there is) from step `start` of each of `entries` on.

    The vectorised form of this is the index's; this one serves whoever has only entries.
    """
    rows = []
    for entry, following, begin, count in zip(entries, followings, start, length, strict=True):
        here = min(count, entry.steps - begin)
        extra = 0 if following is None else min(count - here, following.steps)
        last = following if extra else entry
        after = extra or begin + here
        next_frame = _frame(last, after)
        second = extra > 0 and next_frame >= 0
        if extra and not second:  # a terminal state without a frame
            next_frame = _frame(entry, entry.steps)
        cut = last.end == CUT and after == last.steps
        rows.append(
            (
                *(entry.id, begin, here, following.id if extra else 0, extra),
                *(_frame(entry, begin), next_frame, second, cut, SOURCES.index(entry.source)),
            )
        )
    columns = list(zip(*rows, strict=True))
    kinds = [bool if name in ("next_second", "cut") else np.int64 for name in Windows._fields]
    return Windows(*(np.array(c, kind) for c, kind in zip(columns, kinds, strict=True)))


def _frame(entry: Entry, step: int) -> int:
    """The row of the last frame at or before `step`, -1 for none."""
    frames = entry.frame_step
    return step if frames is None else bisect.bisect_right(frames, step) - 1


def discounted(batch: Batch, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """(returns, discounts) (B,) float32 of n-step learning: y = returns + discounts * V(next observation).

    returns = sum_i gamma^i reward_i over the executed steps; discounts = gamma^steps, 0 after a terminal state.
    """
    powers = gamma ** np.arange(batch["reward"].shape[1])
    returns = (batch["reward"] * batch["step_mask"] * powers).sum(axis=1)
    discounts = gamma ** batch["steps"] * ~batch["terminated"]
    return returns.astype(np.float32), discounts.astype(np.float32)
