"""What a job takes: memory, the proportional share of every process below the launcher, and the cores' time."""

from __future__ import annotations

import time

import psutil

PERIOD = 5.0  # s; reading the shares of large mappings costs some milliseconds a process


class Memory:
    """Present and largest use in MB, and the seconds that cores have computed, measured at most every PERIOD seconds."""

    def __init__(self) -> None:
        self.now = self.peak = 0.0
        self._measured = -PERIOD
        # By process, as it was last seen: one that has ended has still computed.
        self._computed: dict[tuple[int, float], float] = {}

    @property
    def core_seconds(self) -> float:
        """What this process and all below it have computed; of one that has ended, up to PERIOD s are missing."""
        return sum(self._computed.values())

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
                times, name = process.cpu_times(), (process.pid, process.create_time())
                self._computed[name] = times.user + times.system
            except psutil.Error:  # it has just ended
                continue
        self.now = total / 1e6
        self.peak = max(self.peak, self.now)
        return self.now
