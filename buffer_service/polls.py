"""Long polls: requests that wait for something to come true, answered late."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

MAX_WAIT = 10.0  # s, the longest that one is held; whoever waits longer asks again


class _Poll(NamedTuple):
    ready: Callable[[bool], dict[str, Any] | None]
    reason: Callable[[], str]
    who: str
    since: float  # monotonic s
    deadline: float
    future: Future


class Polls:
    """Requests held back. `lock` guards what their conditions read."""

    def __init__(self, lock: threading.RLock) -> None:
        self._lock = lock
        self._waiting: list[_Poll] = []

    def add(
        self,
        ready: Callable[[bool], dict[str, Any] | None],
        wait: float,
        who: str = "",
        reason: Callable[[], str] = lambda: "",
    ) -> Future:
        """Answer with what `ready(late)` gives once it is not None; it is called with late=True after `wait` s.

        `who` waits and for what (`reason`) is shown in `waiting`, where `reason` is not empty.
        """
        now = time.monotonic()
        poll = _Poll(ready, reason, who, now, now + min(wait, MAX_WAIT), Future())
        with self._lock:
            self._waiting.append(poll)
        self.answer()
        return poll.future

    def answer(self) -> None:
        """Answer those that are ready or late: called after every change and by the clock."""
        answers, failures = [], []
        with self._lock:
            now, waiting = time.monotonic(), []
            for poll in self._waiting:
                try:
                    answer = poll.ready(now >= poll.deadline)
                except Exception as error:  # its own: the others must not suffer
                    failures.append((poll.future, error))
                    continue
                if answer is None:
                    waiting.append(poll)
                else:
                    answers.append((poll.future, answer))
            self._waiting = waiting
        for future, answer in answers:
            future.set_result(answer)
        for future, error in failures:
            future.set_exception(error)

    def waiting(self) -> list[str]:
        """A sentence for each one that waits for a reason."""
        now = time.monotonic()
        with self._lock:
            return [
                f"{poll.who} waits {now - poll.since:.1f} s: {reason}"
                for poll in self._waiting
                if (reason := poll.reason())
            ]
