"""Long polls: requests that wait for something to come true, answered late."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

MAX_WAIT = 10.0  # s, the longest that one is held; whoever waits longer asks again
AGAIN_SECONDS = 5.0  # asking again within that, somebody waits on
MAX_CLIENTS = 256  # whose waits are counted each by itself


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
        self._since: dict[str, tuple[float, float]] = {}  # who -> waits since, answered last
        self._waited: dict[str, float] = {}  # who -> s, of waits that are over

    def add(
        self,
        ready: Callable[[bool], dict[str, Any] | None],
        wait: float,
        who: str = "",
        reason: Callable[[], str] = lambda: "",
    ) -> Future:
        """Answer with what `ready(late)` gives once it is not None; it is called with late=True after `wait` s.

        `who` waits and for what (`reason`) is shown in `waiting`, where `reason` is not empty. Who asks again after
        a late answer waits on: the time runs from the first question.
        """
        now = time.monotonic()
        with self._lock:
            self._end_waits(now)
            since, _ = self._since.get(who, (now, now))
            poll = _Poll(ready, reason, who, since, now + min(wait, MAX_WAIT), Future())
            self._waiting.append(poll)
        self.answer()
        return poll.future

    def answer(self) -> None:
        """Answer those that are ready or late: called after every change and by the clock."""
        answers, failures = [], []
        with self._lock:
            now, waiting = time.monotonic(), []
            for poll in self._waiting:
                late = now >= poll.deadline
                try:
                    answer = poll.ready(late)
                except Exception as error:  # its own: the others must not suffer
                    failures.append((poll.future, error))
                    continue
                if answer is None:
                    waiting.append(poll)
                else:
                    answers.append((poll.future, answer))
                    if poll.who:
                        self._answered(poll, now, still=late and bool(poll.reason()))
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

    def waited(self) -> dict[str, float]:
        """s that everybody who gave a name waited for a reason until now."""
        now = time.monotonic()
        with self._lock:
            self._end_waits(now)
            waited = dict(self._waited)
            for poll in self._waiting:
                if poll.who and poll.reason():
                    waited[poll.who] = waited.get(poll.who, 0.0) + now - poll.since
            return waited

    def _answered(self, poll: _Poll, now: float, still: bool) -> None:
        if still:
            self._since[poll.who] = (poll.since, now)
            return
        self._since.pop(poll.who, None)
        self._count(poll.who, now - poll.since)

    def _end_waits(self, now: float) -> None:
        """Of those that did not ask again."""
        for who, (since, last) in list(self._since.items()):
            asking = any(poll.who == who for poll in self._waiting)
            if now - last > AGAIN_SECONDS and not asking:
                del self._since[who]
                self._count(who, last - since)

    def _count(self, who: str, seconds: float) -> None:
        if seconds < 1e-3:
            return
        who = who if who in self._waited or len(self._waited) < MAX_CLIENTS else "others"
        self._waited[who] = self._waited.get(who, 0.0) + seconds
