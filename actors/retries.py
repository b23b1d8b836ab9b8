"""Starts from which the policy failed, to be tried again: practice goes where it is needed."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

KEPT = 512  # failed starts; older ones are forgotten, since the policy has changed since


class Retries:
    """Hands each failed start out once, the oldest first; who fails again comes again.

    The simplest form of prioritised level replay (Jiang et al. 2021, arXiv 2010.03934): the rest of the resets stay
    fresh, so that nothing is practised away from what is evaluated.
    """

    def __init__(self, share: float, num_envs: int, rng: np.random.Generator) -> None:
        self._share, self._rng = share, rng
        self._failed: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self.trying = np.zeros(num_envs, bool)  # whose present episode is a retry

    def add(self, configurations: list[dict[str, Any]], failed: np.ndarray) -> None:
        """The episodes of `failed` (N,) ended without success; they had begun as `configurations` say."""
        self._failed.extend(configurations[i] for i in np.flatnonzero(failed))

    def starts(self, mask: np.ndarray) -> list[dict[str, Any] | None]:
        """For the N environments of which those in `mask` begin anew: a failed start, or None for a fresh one."""
        self.trying[mask] = False
        starts: list[dict[str, Any] | None] = [None] * len(mask)
        for i in np.flatnonzero(mask):
            if self._failed and self._rng.random() < self._share:
                starts[i] = self._failed.popleft()
                self.trying[i] = True
        return starts
