"""A gripper's own calls, which may block, and the thread that makes them (its law is `twinrl.core.gripper`)."""

from __future__ import annotations

import abc
import math
import threading
import time

POLL = 0.03  # s between looks at the fingers
OVERDUE = 5.0  # s after which a command that has not ended is a fault
SILENT = 1.0  # s after which fingers that cannot be read are one: a lost packet is not


class Hand(abc.ABC):
    """A gripper's own calls, which may block: one thread makes all of them."""

    @abc.abstractmethod
    def start(self, opening: float) -> None:
        """Begin to open or close to `opening` (0..1)."""

    @abc.abstractmethod
    def is_done(self) -> bool:
        """What was begun has ended."""

    @abc.abstractmethod
    def width(self) -> float:
        """Between the fingers, m."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of the connection."""


class HandThread:
    """Carries commands out one after the other: of those that came meanwhile the newest, and none of the others.

    `width` (m) is what was read last; `fault` says why a command failed, until `clear`.
    """

    def __init__(self, hand: Hand) -> None:
        self._hand = hand
        self._wanted: float | None = None
        self._changed = threading.Condition()
        self._closing = False
        self.moving = False
        self.fault = ""
        self.width = float(hand.width())
        self._thread = threading.Thread(target=self._run, name="gripper", daemon=True)
        self._thread.start()

    def ask(self, opening: float) -> None:
        """Carry this out next."""
        with self._changed:
            self._wanted, self.moving = float(opening), True
            self._changed.notify()

    def clear(self) -> None:
        """Forget a fault."""
        self.fault = ""

    def close(self) -> None:
        """End the thread, then the connection."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(OVERDUE + 1.0)
        self._hand.close()

    def _run(self) -> None:
        due, read = math.inf, time.monotonic()
        while True:
            with self._changed:
                if self._closing:
                    return
                wanted = None
                if due == math.inf:  # nothing is under way
                    wanted, self._wanted = self._wanted, None
                    self.moving = wanted is not None
            try:
                if wanted is not None:
                    self._hand.start(wanted)
                    due = time.monotonic() + OVERDUE
                if due < math.inf and self._hand.is_done():
                    due = math.inf
                elif time.monotonic() > due:
                    raise TimeoutError(f"no end of a command after {OVERDUE:g} s")
            except Exception as error:  # whatever a vendor's library raises
                self.fault, due = f"the gripper: {error}", math.inf
            try:
                self.width, read = float(self._hand.width()), time.monotonic()
            except Exception as error:
                if time.monotonic() - read > SILENT:
                    self.fault = f"the gripper cannot be read: {error}"
            with self._changed:
                if self._wanted is None or due < math.inf:
                    self._changed.wait(POLL)
