"""Where observations of arms wait for a policy, and policies wait for observations."""

from __future__ import annotations

import itertools
import time
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np


class Question(NamedTuple):
    """An observation that waits for its chunk."""

    id: str
    robot: str
    header: dict[str, Any]
    arrays: dict[str, np.ndarray]
    future: Future  # the robot's
    deadline: float


class Taker(NamedTuple):
    """A policy server that waits for observations."""

    future: Future
    limit: int
    deadline: float


class Desk:
    """Not thread-safe: its owner locks.

    A robot has one question at a time, a new one replaces it. A question that was handed out and not answered
    within `patience` seconds is handed out again: whoever had it may be dead. The first answer counts.
    """

    def __init__(self, boot: str, patience: float = 2.0) -> None:
        self._boot, self._patience = boot, patience
        self._numbers = itertools.count(1)
        self._questions: dict[str, Question] = {}
        self._handed: dict[str, float] = {}  # question: when
        self._takers: list[Taker] = []
        self._seen = -1e9
        self.answered = self.late = 0

    @property
    def staffed(self) -> bool:
        """A policy server was here not long ago."""
        return bool(self._takers) or time.monotonic() - self._seen < 5.0

    def ask(
        self, robot: str, header: dict[str, Any], arrays: dict[str, np.ndarray], timeout: float
    ) -> Future:
        """A robot's observation; the Future gives its chunk or {"wait": reason}."""
        self.withdraw(robot, "a newer observation took its place")
        future: Future = Future()
        name = f"{self._boot}.{next(self._numbers)}"
        deadline = time.monotonic() + timeout
        self._questions[name] = Question(name, robot, header, arrays, future, deadline)
        self._match()
        return future

    def withdraw(self, robot: str, reason: str) -> None:
        """The robot waits no more."""
        for question in [q for q in self._questions.values() if q.robot == robot]:
            self._drop(question, reason)

    def take(self, limit: int, timeout: float) -> Future:
        """A policy server's wish for observations; the Future gives a list of Questions."""
        self._seen = time.monotonic()
        taker = Taker(Future(), limit, self._seen + timeout)
        self._takers.append(taker)
        self._match()
        return taker.future

    def give(self, name: str, result: dict[str, Any], arrays: dict[str, np.ndarray]) -> bool:
        """The chunk for a question; False when nobody waits for it any more."""
        self._seen = time.monotonic()
        question = self._pop(name)
        if question is None:
            self.late += 1
            return False
        self.answered += 1
        question.future.set_result((result, arrays))
        return True

    def find(self, name: str) -> Question | None:
        """A question that is still open."""
        return self._questions.get(name)

    def tick(self) -> None:
        """Let go of whoever waited long enough."""
        now = time.monotonic()
        for question in [q for q in self._questions.values() if q.deadline < now]:
            what = "gave no chunk yet" if question.id in self._handed else "is busy"
            self._drop(question, f"the policy server {what if self.staffed else 'is away'}")
        for taker in [t for t in self._takers if t.deadline < now]:
            self._takers.remove(taker)
            taker.future.set_result([])
        self._match()

    def _match(self) -> None:
        now = time.monotonic()
        open_ = [
            q
            for q in self._questions.values()
            if now - self._handed.get(q.id, -1e9) > self._patience
        ]
        while open_ and self._takers:
            taker = self._takers.pop()  # the newest: an old one may be a dead server's
            batch, open_ = open_[: taker.limit], open_[taker.limit :]
            self._handed.update((q.id, now) for q in batch)
            taker.future.set_result(batch)

    def _pop(self, name: str) -> Question | None:
        self._handed.pop(name, None)
        return self._questions.pop(name, None)

    def _drop(self, question: Question, reason: str) -> None:
        self._pop(question.id)
        question.future.set_result(({"wait": reason}, {}))


def pack_questions(questions: list[Question]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The answer to a policy server: headers, and each question's arrays under its index."""
    headers = [{"id": q.id, **q.header} for q in questions]
    arrays: dict[str, np.ndarray] = {}
    for i, question in enumerate(questions):
        arrays.update({f"{i}/{name}": array for name, array in question.arrays.items()})
    return {"requests": headers}, arrays
