"""The robot actor: takes the observations of attached arms from the gateway and gives back action chunks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from twinrl.env import Observation

Infer = Callable[[Observation, str, bool], tuple[np.ndarray, dict[str, np.ndarray], int]]


class RobotActor:
    """Serves any number of arms; each waits for its own chunk only.

    `make_link()` connects to the gateway; `infer` is the inference actor's call.
    """

    def __init__(
        self,
        name: str,
        *,
        make_link: Callable[[], Any],
        make_reporter: Callable[..., Any],
        infer: Infer,
        threads: int = 4,
    ) -> None:
        self._link, self._infer = make_link(), infer
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="arm")
        self._stop = threading.Event()
        self._chunks = self._failed = 0
        self._latency = 0.0
        self._version = -1
        self._reporter = make_reporter(name, self.stats)

    def ping(self) -> str:
        """Answers once the actor is ready."""
        return "ready"

    def stats(self) -> dict[str, Any]:
        """Chunks given, smoothed time from observation to chunk, version that acted last."""
        return {
            "robot_actor/chunks": self._chunks,
            "robot_actor/failed": self._failed,
            "robot_actor/latency_ms": self._latency * 1e3,
            "policy/version": self._version,
        }

    def run(self) -> int:
        """Serve until `stop`; returns the number of chunks given."""
        while not self._stop.is_set():
            request = self._link.take(timeout=1.0)
            if request is not None:
                self._pool.submit(self._answer, request)
        return self._chunks

    def stop(self) -> None:
        """Stop serving; arms hold when their chunk has ended."""
        self._stop.set()

    def _answer(self, request: Any) -> None:
        began = time.monotonic()
        try:
            actions, info, version = self._infer(
                request.observation, request.instruction, request.explore
            )
            self._link.give(request, actions, info, version)
        except Exception as error:
            self._failed += 1
            self._reporter.event("error", f"no chunk for {request.robot}: {error}")
            return
        self._version = version
        self._chunks += 1
        self._latency = 0.9 * self._latency + 0.1 * (time.monotonic() - began)
