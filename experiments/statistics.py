"""What experiments say about several seeds: interquartile means, bootstrap intervals, times that were not reached.

Agarwal et al. (2021), "Deep reinforcement learning at the edge of the statistical precipice", recommend interquartile means with
bootstrap intervals, stratified by task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 10_000


class Interval(NamedTuple):
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


def iqm(values: np.ndarray | Sequence[float]) -> float:
    """Interquartile mean: the mean of the middle half, the values at its borders weighted by what lies inside."""
    ordered = np.sort(np.ravel(values)).astype(float)
    count = len(ordered)
    if not count:
        raise ValueError("an interquartile mean needs at least one value")
    # Value i stands for the stretch [i, i + 1) of the sorted sample; the middle half is [count / 4, 3 count / 4).
    edges = np.clip(np.arange(count + 1), count / 4, 3 * count / 4)
    weight = np.diff(edges)
    return float(weight @ ordered / weight.sum())


def bootstrap(
    groups: Sequence[np.ndarray],
    statistic: Callable[[list[np.ndarray]], float],
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """`statistic` of `groups` with the percentile bootstrap's interval: each group, (n_g, ...), is drawn again by itself.

    A group is what was sampled independently: the seeds of one task on one side. Rows of a group are its seeds.
    """
    rng = np.random.default_rng(seed)
    values = [
        statistic([group[rng.integers(len(group), size=len(group))] for group in groups])
        for _ in range(draws)
    ]
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(float(statistic(list(groups))), float(low), float(high))


def time_to(curve: Sequence[Sequence[float]], target: float, column: int = 1) -> float:
    """`column` of the first row [steps, seconds, score] of `curve` whose score reaches `target`; inf if none does."""
    return next((row[column] for row in curve if row[2] >= target), float("inf"))


class Censored(NamedTuple):
    """A median time; `reached` is False where half or more of the runs never arrived: then it is a lower bound."""

    value: float
    reached: bool

    def __str__(self) -> str:
        return f"{'' if self.reached else '>= '}{self.value:.1f}"


def censored_median(times: Sequence[float], budgets: Sequence[float]) -> Censored:
    """Median of `times`, inf for runs that ended at `budgets` without arriving.

    No assumption about the missing times is needed while fewer than half are missing; otherwise the median of what
    each run took at least is returned as a lower bound.
    """
    bounded = np.minimum(times, budgets)
    median = float(np.median(times))
    if np.isfinite(median):
        return Censored(median, True)
    return Censored(float(np.median(bounded)), False)


def clustered(outcomes: np.ndarray, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Mean of `outcomes` (seeds, resets), with the interval of a cluster bootstrap: whole seeds are drawn again, and of
    each so drawn its resets."""
    values = np.asarray(outcomes, float)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"outcomes are {values.shape}, must be (seeds, resets), some of each")
    seeds, resets = values.shape
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    for i in range(draws):
        rows = rng.integers(seeds, size=seeds)
        means[i] = values[rows[:, None], rng.integers(resets, size=(seeds, resets))].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def paired(ours: np.ndarray, theirs: np.ndarray, draws: int = DRAWS) -> Interval:
    """Mean gain of `ours` over `theirs`, (seeds, resets) each, paired by seed and reset; interval as `clustered`."""
    first, second = np.asarray(ours, float), np.asarray(theirs, float)
    if first.shape != second.shape:
        raise ValueError(f"paired outcomes are {first.shape} and {second.shape}, must be equal")
    return clustered(first - second, draws)
