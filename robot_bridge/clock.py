"""The robot's own time: what it spends on what, and the pace of its steps."""

from __future__ import annotations

import time

KINDS = ("motion", "reset", "wait", "held", "idle", "takeover")


class RobotClock:
    """Counts seconds of the robot's time by kind and paces them, `speed` times faster than real time.

    motion + reset + wait are the robot's minutes: what a real arm would have been busy for. A wait is counted as
    it was measured, at any speed: a real arm would have waited as long. Holds by a person and idling between
    episodes are counted apart; takeover is a part of motion.
    """

    def __init__(self, speed: float = 1.0) -> None:
        if not speed > 0:
            raise ValueError(f"speed is {speed}, must be above 0")
        self.speed = speed
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._due = self._free = time.monotonic()

    @property
    def seconds(self) -> float:
        """The robot's time so far."""
        return sum(self._seconds[kind] for kind in ("motion", "reset", "wait"))

    def stats(self) -> dict[str, float]:
        """Seconds by kind, and in all."""
        return {"seconds": self.seconds, **{f"{k}_seconds": v for k, v in self._seconds.items()}}

    def count(self, kind: str, seconds: float) -> None:
        """Count without waiting."""
        self._seconds[kind] += seconds

    def spend(self, kind: str, seconds: float) -> bool:
        """Count `seconds` and wait until they are over on the robot's clock; a late step does not hurry the next.

        Whether there was time left: False when the caller was late.
        """
        self._seconds[kind] += seconds
        length = seconds / self.speed
        self._due = max(self._due, time.monotonic() - length) + length
        left = self._due - time.monotonic()
        time.sleep(max(0.0, left))
        self._free = time.monotonic()
        return left > 0.0

    def lapse(self, kind: str, hidden: float = 0.0) -> None:
        """Count the real time since the last `spend` or `lapse`, less what hides behind the motion before."""
        now = time.monotonic()
        self._seconds[kind] += max(0.0, now - self._free - hidden)
        self._free = now
