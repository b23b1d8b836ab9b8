"""What a person should be told of an arm, although it may go on: numbered, so that each is told once."""

from __future__ import annotations

import collections
import logging
import threading
import time
from typing import Any, Callable, Deque, Tuple

from robot_bridge.eyes import View
from robot_bridge.offset import ClockOffset

log = logging.getLogger(__name__)
KEPT = 8  # of the newest, which ride on heartbeats
LONGEST = 500  # characters


class Lasting:
    """Whether something is so, which counts when it lasted for a moment; the same for its end."""

    def __init__(self, moment_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._moment_s, self._now = moment_s, now
        self.is_so = False
        self._since: float | None = None

    def __call__(self, so: bool) -> bool:
        """Whether it has changed just now."""
        if so == self.is_so:
            self._since = None
            return False
        now = self._now()
        if self._since is None:
            self._since = now
        if now - self._since < self._moment_s:
            return False
        self.is_so, self._since = so, None
        return True


class Alarms:
    """Events of this robot for the run, and two that are measured: images and clocks that are off by too much."""

    def __init__(self, limit_s: float, now: Callable[[], float] = time.monotonic) -> None:
        """`limit_s`: of an image's age against the arm's measurement, and of the clocks' offset."""
        self._limit_s = limit_s
        self._skew, self._clock = Lasting(1.0, now), Lasting(1.0, now)
        self._told: Deque[Tuple[int, str, str]] = collections.deque(maxlen=KEPT)
        self._number = 0
        self._lock = threading.Lock()
        self.skew_s = 0.0  # of the newest step, the camera's that is farthest off

    def tell(self, text: str, level: str = "warning") -> None:
        """An event; `level` is "warning" or "info"."""
        log.log(logging.WARNING if level == "warning" else logging.INFO, "%s", text)
        with self._lock:
            self._number += 1
            self._told.append((self._number, level, text[:LONGEST]))

    def skew(self, view: View) -> None:
        """A step has ended with this view, of an arm whose clock does not stand still."""
        off = {name: view.measured.time - frame.time for name, frame in view.frames.items()}
        if not off:
            return
        camera = max(off, key=lambda name: abs(off[name]))
        self.skew_s = off[camera]
        if not self._skew(abs(self.skew_s) > self._limit_s):
            return
        limit = f"{1e3 * self._limit_s:g} ms (--patience skew_s)"
        if self._skew.is_so:
            behind = "behind" if self.skew_s > 0 else "ahead of"
            self.tell(
                f"camera {camera!r} is {1e3 * abs(self.skew_s):.0f} ms {behind} the arm, for more than a second: over "
                f"{limit}"
            )
        else:
            self.tell(f"images and arm are within {limit} again", "info")

    def clock(self, offset: ClockOffset) -> None:
        """The clocks' offset as it is known now."""
        seconds = offset.seconds
        if seconds is None:
            return
        sure = abs(seconds) - offset.uncertainty
        if not self._clock(sure > self._limit_s):
            return
        found = f"{1e3 * seconds:+.0f} ms (give or take {1e3 * offset.uncertainty:.0f} ms)"
        if self._clock.is_so:
            self.tell(
                f"the gateway's clock is {found} from this PC's: what is compared between them is off by as much; the "
                "arm is not, everything on this PC uses its own monotonic clock"
            )
        else:
            self.tell(f"the gateway's clock is {found} from this PC's, which is well", "info")

    def state(self) -> dict[str, Any]:
        """For the heartbeat."""
        with self._lock:
            told = [list(each) for each in self._told]
        return {"alarms": told, "skew_ms": 1e3 * self.skew_s}
