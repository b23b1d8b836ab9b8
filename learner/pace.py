"""When a stage may publish: no faster than whoever acts for the arms takes versions up."""

from __future__ import annotations

import time

HOLD_SECONDS = 10.0  # a version waits no longer than this, however far the arms' policy lags


class Pace:
    """Holds the next version back while the policy that acts for the arms is more than `most` versions behind.

    Arms refuse chunks of a policy that is too old. Its server may be slow to take weights up, or nobody may be asking for
    chunks at all; then a version goes out every `hold_s` seconds. Updates go on meanwhile: what is published later is newer.
    """

    def __init__(self, most: int, hold_s: float = HOLD_SECONDS) -> None:
        self._most, self._hold_s = most, hold_s
        self._since: float | None = None  # when a version became due
        self.held = 0  # versions that had to wait

    def due(self) -> None:
        """A version should go out."""
        if self._since is None:
            self._since = time.monotonic()

    def publishes(self, lag: int) -> bool:
        """Whether the version that is due goes out now, when arms are served by one `lag` versions old."""
        if self._since is None:
            return False
        waited = time.monotonic() - self._since
        if lag > self._most and waited < self._hold_s:
            return False
        self.held += lag > self._most
        self._since = None
        return True
