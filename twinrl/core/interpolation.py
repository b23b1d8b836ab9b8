"""How a commanded target becomes motion, the same in the twin and on the arm: one law, two forms.

Within a control step the wanted point goes straight from the last target to the next. Two moving averages over that, with
windows of `SMOOTHING` ticks, bound acceleration and jerk. The arm's control loop does this tick by tick
(`robot_bridge.motion.Smoother`); a twin, whose targets are known for whole steps, by a weighted sum of its last targets.
"""

from __future__ import annotations

from typing import Tuple

import numpy as np

TICKS = 10  # of a control step
SMOOTHING = (5, 4)  # ticks of the two windows
HISTORY = 3  # targets that a set-point depends on, the newest first


def weights(ticks: int = TICKS, windows: Tuple[int, int] = SMOOTHING) -> np.ndarray:
    """(ticks, HISTORY) such that set-point k of a step is the sum of the last targets, each times its weight.

    ValueError where the windows reach back beyond the step before.
    """
    first, second = windows
    if first + second - 2 > ticks:
        raise ValueError(f"windows of {windows} ticks reach beyond one step of {ticks} ticks")
    kernel = np.convolve(np.full(first, 1.0 / first), np.full(second, 1.0 / second))
    # Of the present step and the one before: how much of its own and of the last target each tick wants.
    share = np.arange(1, ticks + 1) / ticks
    wanted = np.zeros((2 * ticks, HISTORY))
    wanted[:ticks, 1], wanted[:ticks, 2] = share, 1.0 - share
    wanted[ticks:, 0], wanted[ticks:, 1] = share, 1.0 - share
    found = np.zeros((ticks, HISTORY))
    for k in range(ticks):
        for back, weight in enumerate(kernel):
            found[k] += weight * wanted[ticks + k - back]
    return found
