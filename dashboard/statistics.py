"""The statistics behind every success rate and gain that TwinRL reports. Success is 0 or 1 per episode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z95 = 1.959963984540054  # two-sided 95 % point of the normal distribution
Outcomes = Sequence[int] | Sequence[bool] | np.ndarray


class Rate(NamedTuple):
    """A success rate with its 95 % interval."""

    rate: float
    low: float
    high: float
    episodes: int


class Gain(NamedTuple):
    """A difference of success rates over the same resets, its 95 % interval, and McNemar's p value."""

    gain: float
    low: float
    high: float
    p: float
    episodes: int


def wilson(successes: int, episodes: int, z: float = Z95) -> Rate:
    """Wilson's score interval: right also near 0 and 1, where the textbook interval has no width.

    It solves |p - k/n| = z sqrt(p (1 - p) / n) for p. Without episodes the interval is [0, 1].
    """
    if not 0 <= successes <= episodes:
        raise ValueError(f"{successes} successes in {episodes} episodes")
    if episodes == 0:
        return Rate(math.nan, 0.0, 1.0, 0)
    p, z2n = successes / episodes, z * z / episodes
    centre = p + z2n / 2
    half = z * math.sqrt(p * (1 - p) / episodes + z2n / (4 * episodes))
    low, high = (centre - half) / (1 + z2n), (centre + half) / (1 + z2n)
    # Exact at the ends; rounding would leave 1e-17 there.
    low = 0.0 if successes == 0 else max(0.0, low)
    high = 1.0 if successes == episodes else min(1.0, high)
    return Rate(p, low, high, episodes)


def success_rate(outcomes: Outcomes) -> Rate:
    """Wilson's interval of a list of 0s and 1s."""
    values = _binary(outcomes)
    return wilson(int(values.sum()), len(values))


def paired_gain(before: Outcomes, after: Outcomes, samples: int = 10_000, seed: int = 0) -> Gain:
    """Mean of after - before over the same resets, with a percentile bootstrap interval over resets.

    Resets are redrawn, not outcomes: whatever makes a reset easy or hard is in both lists and cancels.
    """
    first, second = _binary(before), _binary(after)
    if len(first) != len(second):
        raise ValueError(f"paired outcomes need equal lengths, got {len(first)} and {len(second)}")
    n = len(first)
    if n == 0:
        raise ValueError("no episodes to compare")
    # A difference is -1, 0 or 1, so a redrawn mean needs only how often each was drawn.
    better, worse = int((second > first).sum()), int((second < first).sum())
    draws = np.random.default_rng(seed).multinomial(
        n, [better / n, worse / n, (n - better - worse) / n], samples
    )
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / n, [0.025, 0.975])
    return Gain((better - worse) / n, float(low), float(high), mcnemar(before, after), n)


def mcnemar(before: Outcomes, after: Outcomes) -> float:
    """Exact two-sided p value that resets turn from failure to success as often as back."""
    first, second = _binary(before), _binary(after)
    if len(first) != len(second):
        raise ValueError(f"paired outcomes need equal lengths, got {len(first)} and {len(second)}")
    better, worse = int((second > first).sum()), int((second < first).sum())
    n = better + worse
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**n)


def _binary(outcomes: Outcomes) -> np.ndarray:
    values = np.asarray(outcomes).reshape(-1).astype(float)
    if not np.isin(values, (0.0, 1.0)).all():
        raise ValueError(f"outcomes are 0 or 1, got {sorted(set(values.tolist()))[:5]}")
    return values.astype(int)
