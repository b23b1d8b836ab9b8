"""How much memory a job takes: the proportional share of every process below the launcher, shared pages once."""

from __future__ import annotations

import time

import psutil

PERIOD = 5.0  # s; reading the shares of large mappings costs some milliseconds a process


class Memory:
    """Present and largest use in MB, measured at most every PERIOD seconds."""

    def __init__(self) -> None:
        self.now = self.peak = 0.0
        self._measured = -PERIOD

    def measure(self) -> float:
        """MB in use by this process and all below it."""
        if time.monotonic() - self._measured < PERIOD:
            return self.now
        self._measured = time.monotonic()
        total = 0
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except psutil.Error:  # it has just ended
                continue
        self.now = total / 1e6
        self.peak = max(self.peak, self.now)
        return self.now
