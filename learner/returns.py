"""What episodes brought from each step on: the Monte-Carlo returns that Cal-QL calibrates by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from twinrl.core.segment import Segment


def returns_to_go(
    segments: Sequence[Segment], gamma: float, step_cost: float = 0.0
) -> list[np.ndarray]:
    """sum_k gamma^k (r_{t+k} - step_cost) until the episode's end, (T,) float32 for each segment.

    -inf where the rest of the episode is not among `segments`: nothing is known then.
    """
    episodes: dict[str, list[int]] = defaultdict(list)
    for number, segment in enumerate(segments):
        episodes[segment.header["episode"]].append(number)
    found: list[np.ndarray] = [np.zeros(0, np.float32)] * len(segments)
    for numbers in episodes.values():
        following, expected = -np.inf, None
        for number in sorted(numbers, key=lambda n: -segments[n].header.get("first_step", 0)):
            columns = segments[number].columns
            steps = len(columns["reward"])
            first = segments[number].header.get("first_step", 0)
            if columns["terminated"][-1] or columns["truncated"][-1]:
                following = 0.0
            elif first + steps != expected:  # a segment is missing in between
                following = -np.inf
            values = np.zeros(steps, np.float32)
            for t in reversed(range(steps)):
                following = columns["reward"][t] - step_cost + gamma * following
                values[t] = following
            found[number], expected = values, first
    return found
