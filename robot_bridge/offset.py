"""How far another computer's clock is from this one's, from requests and their answers, as NTP finds it."""

from __future__ import annotations

import collections
import time
from typing import Any, Callable, Deque, NamedTuple

SAMPLES = 100  # of which the one with the shortest way counts: 5 s of heartbeats


class Sample(NamedTuple):
    """One request and its answer."""

    delay: float  # s, there and back
    ahead: float  # s, their clock's time less our monotonic time, at the middle of the way


class ClockOffset:
    """Told of each answer by one thread, read by any.

    Half of the delay is where the truth may lie to either side, if the ways there and back are not alike; so the sample
    with the shortest delay of the newest ones is taken. Against our monotonic clock, so that a step of our own clock
    is seen at once.
    """

    def __init__(
        self,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._monotonic, self._wall = monotonic, wall
        self._samples: Deque[Sample] = collections.deque(maxlen=SAMPLES)
        self._best: Sample | None = None

    def hear(self, sent: float, heard: float, theirs: float) -> None:
        """A request of `sent` was answered by `heard`, both s of our monotonic clock, at `theirs`, s of their clock."""
        self._samples.append(Sample(heard - sent, theirs - (sent + heard) / 2))
        self._best = min(self._samples)

    @property
    def seconds(self) -> float | None:
        """What has to be added to our clock (Unix time) for theirs, s; None while nothing was heard."""
        best = self._best
        return None if best is None else best.ahead - (self._wall() - self._monotonic())

    @property
    def uncertainty(self) -> float:
        """s to either side."""
        best = self._best
        return 0.0 if best is None else best.delay / 2

    def header(self) -> dict[str, Any]:
        """For what is stored; empty while nothing was heard."""
        seconds = self.seconds
        if seconds is None:
            return {}
        return {"clock_offset_s": seconds, "clock_uncertainty_s": self.uncertainty}

    def state(self) -> dict[str, Any]:
        """For the heartbeat, ms."""
        seconds = self.seconds
        if seconds is None:
            return {}
        return {"clock_offset_ms": 1e3 * seconds, "clock_uncertainty_ms": 1e3 * self.uncertainty}
