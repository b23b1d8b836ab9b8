"""The rate limiter: how often what the actors bring (twin, real) is sampled. Demonstrations are outside of it.

    difference = inserted * samples_per_insert - sampled            all counted in transitions

Sampling waits until `min_size` transitions came in, and while it would push the difference below
`samples_per_insert * min_size - error`. Inserting waits while the difference is above
`samples_per_insert * min_size + error`. With no `samples_per_insert` only `min_size` counts.
"""

from __future__ import annotations

import math

from twinrl.core.errors import ConfigError, Rejected

ONLINE = ("twin", "real")


class RateLimiter:
    """Says whether inserting and sampling may go on, and if not, why."""

    def __init__(
        self,
        samples_per_insert: float | None = None,
        min_size: int = 0,
        error: float | None = None,
        largest_batch: int = 0,
    ) -> None:
        """`error` and `largest_batch` in transitions; refuses settings with which both sides would wait."""
        if min_size < 0:
            raise ConfigError(f"min_size is {min_size}, must not be negative")
        if largest_batch < 0:
            raise ConfigError(f"largest_batch is {largest_batch}, must not be negative")
        if error is not None and not 0 <= error < math.inf:
            raise ConfigError(f"error is {error:g}, must be a number of transitions")
        if samples_per_insert is not None:
            if not samples_per_insert < math.inf:
                raise ConfigError(
                    f"samples_per_insert is {samples_per_insert:g}: nothing could ever be inserted; "
                    "it must be finite, or None for no ratio"
                )
            if samples_per_insert <= 0:
                raise ConfigError(
                    f"samples_per_insert is {samples_per_insert:g}: nothing could ever be sampled; "
                    "it must be positive, or None for no ratio"
                )
            if error is None:
                error = max(largest_batch, samples_per_insert * max(min_size, 1))
            least = max(largest_batch / 2, samples_per_insert)
            if error < least:
                raise ConfigError(
                    f"error={error:g} can deadlock: between the bounds lie {2 * error:g} transitions, "
                    f"less than one batch of {largest_batch} (or one insert, worth "
                    f"{samples_per_insert:g} samples) needs, so learner and actors would wait for "
                    f"each other; error must be at least {least:g}"
                )
        self.samples_per_insert, self.min_size = samples_per_insert, min_size
        self.error = error
        self.inserted = 0  # transitions of the ONLINE sources, ever
        self.sampled = 0  # transitions drawn from them, ever

    @property
    def difference(self) -> float:
        """How many samples what was inserted is still worth."""
        return self.inserted * (self.samples_per_insert or 0) - self.sampled

    @property
    def open(self) -> bool:
        """Whether sampling needs no permit any more."""
        return self.samples_per_insert is None and self.inserted >= self.min_size

    def why_not_insert(self) -> str:
        """Empty when inserting may go on."""
        if self.samples_per_insert is None or self.inserted < self.min_size:
            return ""
        above = self.difference - self.samples_per_insert * self.min_size - (self.error or 0)
        if above <= 0:
            return ""
        return (
            f"inserting waits until {above:.0f} more transitions are sampled: {self.inserted} inserted, "
            f"{self.sampled} sampled, {self.samples_per_insert:g} samples per insert"
        )

    def why_not_sample(self, transitions: int) -> str:
        """Empty when `transitions` may be sampled now. Rejected when they never could be."""
        if self.inserted < self.min_size:
            missing = self.min_size - self.inserted
            return (
                f"sampling waits for {missing} more inserted transitions: {self.inserted} of at least "
                f"{self.min_size} came in"
            )
        if self.samples_per_insert is None:
            return ""
        error = self.error or 0
        if transitions > 2 * error:
            raise Rejected(
                f"a batch of {transitions} transitions could never be sampled with error={error:g}: "
                f"set the limiter's error to at least {transitions / 2:g}"
            )
        below = self.samples_per_insert * self.min_size - error - self.difference + transitions
        if below <= 0:
            return ""
        inserts = below / self.samples_per_insert
        return (
            f"sampling waits for {inserts:.0f} more inserted transitions: {self.inserted} inserted, "
            f"{self.sampled} sampled, {self.samples_per_insert:g} samples per insert"
        )
