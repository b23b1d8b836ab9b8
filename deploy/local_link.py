"""A policy in the bridge's own process instead of a run: what `robot_bridge.link.Link` is, without a network."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from robot_bridge import frames
from robot_bridge.link import Wishes
from robot_bridge.offset import ClockOffset
from twinrl.env import Observation

Infer = Callable[[Observation, str], tuple[np.ndarray, int]]


class LocalLink:
    """Gives starts, chunks of `infer` and acknowledgements; `results` are what the bridge tells of its episodes."""

    def __init__(
        self, name: str, infer: Infer, image_size: int, region: str, episodes: int
    ) -> None:
        self.name, self.wishes, self.fatal = name, Wishes(), None
        self.connected, self.silent_s = True, 0.0
        self.sent_bytes = self.spared_bytes = 0
        self.offset = ClockOffset()  # there is no other clock
        self.results: list[dict[str, Any]] = []
        self._infer, self._image_size, self._region = infer, image_size, region
        self._left = episodes or None
        self._given = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="policy")
        self._lock = threading.Lock()

    @property
    def judged(self) -> list[dict[str, Any]]:
        """Results that say something of the policy: neither discarded by a person nor spoilt by a fault."""
        return [r for r in self.results if not r["discarded"] and not r["invalid"]]

    def episode(self, finished: dict[str, Any] | None, timeout: float) -> dict[str, Any]:
        """The next episode's start, drawn by the arm."""
        self._hear(finished)
        self._given += 1
        parameters = {"explore": False, "record": False}
        start = {"id": str(self._given), "configuration": None, "region": self._region}
        return {"start": {**start, "parameters": parameters}}

    def observe(self, args: dict[str, Any], arrays: dict[str, np.ndarray]) -> Future:
        """The policy's chunk for what is seen."""
        return self._pool.submit(self._answer, dict(args), dict(arrays))

    def forget(self, future: Future) -> None:
        """A chunk that nobody waits for any more."""
        future.cancel()

    def segment(self, sequence: int, data: bytes, stop: Any = None) -> dict[str, Any]:
        """Nothing is kept here."""
        return {"acknowledged": sequence}

    def close(self, finished: dict[str, Any] | None = None) -> None:
        """The last episode's result."""
        self._hear(finished)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _answer(
        self, args: dict[str, Any], arrays: dict[str, np.ndarray]
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        plain = frames.check(arrays, args["codec"], self._image_size)
        observation = {
            key: value if key.startswith(frames.IMAGE_PREFIX) else value[None]
            for key, value in plain.items()
        }
        action, version = self._infer(observation, args["instruction"])
        return {"version": version}, {"action": action}

    def _hear(self, finished: dict[str, Any] | None) -> None:
        if finished and all(r["episode"] != finished["episode"] for r in self.results):
            self.results.append(finished)
