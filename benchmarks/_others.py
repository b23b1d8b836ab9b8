"""How much of the processors other programs use meanwhile: a figure is worth as much as the machine was quiet."""

from __future__ import annotations

import contextlib
import time

import psutil

QUIET = 0.15  # cores that others may use in a quiet row


class Others:
    """What programs outside this process's tree take of the processors."""

    def __init__(self) -> None:
        self._me = psutil.Process()
        self.start()

    def start(self) -> None:
        """Begin to measure."""
        self._before = self._used()

    def cores(self) -> float:
        """Mean since `start`, in cores."""
        now = self._used()
        return max(0.0, now[1] - self._before[1]) / max(now[0] - self._before[0], 1e-3)

    def wait(self, patience: float) -> float:
        """Return when it is quiet, or after `patience` seconds; gives what of it is left."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            self.start()
            time.sleep(0.25)
            if self.cores() <= QUIET:
                break
        return end - time.monotonic()

    def _used(self) -> tuple[float, float]:
        total = psutil.cpu_times()
        busy = sum(total) - total.idle - total.iowait - total.guest - total.guest_nice
        own = 0.0
        for process in [self._me, *self._me.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                own += times.user + times.system
        return time.monotonic(), busy - own
