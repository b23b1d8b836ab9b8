"""Weights through Ray's object store: published once, mapped by every actor of a node without a copy."""

from __future__ import annotations

import time
from functools import cached_property
from typing import Any

import ray

from twinrl.core.errors import DeadlineError, TwinRLError
from twinrl.weights import Weights

KEEP = 3  # newest versions whose objects stay alive, for actors that are just fetching them


class WeightStore:
    """A Ray actor that knows the newest version's object."""

    def __init__(self) -> None:
        self._published: list[tuple[int, Any]] = []
        self._kept: dict[int, Any] = {}

    def publish(self, version: int, boxed: list[Any]) -> int:
        """Announce the object (a one-element list, so that Ray hands over the reference)."""
        if self._published and version <= self._published[-1][0]:
            return self._published[-1][0]
        self._published = [*self._published, (version, boxed[0])][-KEEP:]
        return version

    def keep(self, version: int, kept: bool) -> None:
        """Hold on to a version that is to be evaluated, or let it go."""
        if not kept:
            self._kept.pop(version, None)
        elif version not in self._kept:
            self._kept[version] = self.exactly(version)[1][0]

    def exactly(self, version: int) -> tuple[int, list[Any]]:
        """(version, [object]); KeyError when it is gone."""
        known = dict(self._published) | self._kept
        if version not in known:
            raise KeyError(f"policy version {version} is gone; there are {sorted(known)}")
        return version, [known[version]]

    def newest(self, newer_than: int) -> tuple[int, list[Any]] | None:
        """(version, [object]) if there is one above `newer_than`."""
        if not self._published or self._published[-1][0] <= newer_than:
            return None
        version, reference = self._published[-1]
        return version, [reference]


STORE = "weights"  # the store's name in the run's namespace


class RayWeightSink:
    """The learner's end."""

    @cached_property
    def _store(self) -> Any:
        return ray.get_actor(STORE)

    def publish(self, weights: Weights) -> None:
        """Copy out to the object store and announce; returns when it is announced."""
        reference = ray.put((weights.arrays, weights.checksum))
        ray.get(self._store.publish.remote(weights.version, [reference]), timeout=60)

    def newest(self) -> int:
        """The newest published version, -1 for none."""
        answer = ray.get(self._store.newest.remote(-1), timeout=60)
        return -1 if answer is None else answer[0]


class RayWeightSource:
    """An actor's end. `poll` never waits: the question is asked in the background, one at a time."""

    def __init__(self) -> None:
        self._asked: Any = None

    @cached_property
    def _store(self) -> Any:
        return ray.get_actor(STORE)

    def poll(self, newer_than: int) -> Weights | None:
        """The newest weights above `newer_than` if their answer has arrived."""
        if self._asked is None:
            self._asked = self._store.newest.remote(newer_than)
        ready, _ = ray.wait([self._asked], timeout=0)
        if not ready:
            return None
        answer, self._asked = ray.get(self._asked), None
        return self._fetch(answer) if answer and answer[0] > newer_than else None

    def wait(self, newer_than: int, timeout: float) -> Weights:
        """The newest weights above `newer_than`; DeadlineError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            answer = ray.get(self._store.newest.remote(newer_than), timeout=timeout)
            if answer is not None:
                return self._fetch(answer)
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"waited {timeout:g} s for a policy version above {newer_than}: "
                    "the learner has published none"
                )
            time.sleep(0.05)

    def get(self, version: int) -> Weights:
        """Exactly `version`."""
        try:
            return self._fetch(ray.get(self._store.exactly.remote(version), timeout=60))
        except ray.exceptions.RayTaskError as error:
            raise TwinRLError(str(error.cause)) from None

    @staticmethod
    def _fetch(answer: tuple[int, list[Any]]) -> Weights:
        version, (reference,) = answer
        arrays, checksum = ray.get(reference, timeout=60)
        return Weights(version, arrays, checksum)
