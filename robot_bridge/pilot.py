"""Follows the policy's chunks: one action after the other, a new chunk asked for when the old one has ended."""

from __future__ import annotations

import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, Callable, NamedTuple

import numpy as np

from robot_bridge import frames
from robot_bridge.link import Link
from robot_bridge.recorder import STATE, Plan, Seen
from twinrl.core.errors import RemoteError

POLL = 1.0  # s, how long one question to the gateway stays open
SILENT = "no chunk from the policy server"


class Cue(NamedTuple):
    """The policy's next action."""

    action: np.ndarray  # (7,) float32
    plan: Plan
    index: int  # in the plan
    age: float  # s since it was due


class Pilot:
    """`watchdog_s`: how long a chunk may take before the arm must hold. `period_s`: one control step, real time."""

    def __init__(
        self, link: Link, codec: str, period_s: float, watchdog_s: float, stale_s: float
    ) -> None:
        self._link, self._codec = link, codec
        self._period_s, self._watchdog_s, self._stale_s = period_s, watchdog_s, stale_s
        self.latency_ms = 0.0  # from the question to the chunk, smoothed
        self.begin("", {}, "")

    def begin(self, episode: str, parameters: dict[str, Any], instruction: str) -> None:
        """A new episode with the parameters of its start, and what is asked in it."""
        self._episode, self._parameters, self._plans = episode, parameters, 0
        self._instruction = instruction
        self.drop()

    def drop(self) -> None:
        """What is left of the chunk is not executed."""
        self._plan: Plan | None = None
        self._index, self._arrived = 0, 0.0

    @property
    def ready(self) -> bool:
        """There is a next action, and it is not too late for it."""
        if self._plan is None or self._index >= len(self._plan.actions):
            return False
        return self._age() < self._stale_s

    def next(self) -> Cue:
        """The next action; `ready` comes first."""
        assert self._plan is not None, "no plan to follow"
        plan, index = self._plan, self._index
        cue = Cue(plan.actions[index], plan, index, self._age())
        self._index += 1
        return cue

    def ask(self, step: int, seen: Seen, on_late: Callable[[], bool]) -> str:
        """Get the chunk for what was just seen; why there is none, or "".

        After `watchdog_s` and then every 50 ms `on_late()` is called: it holds the arm and says whether a late
        chunk is still of use.
        """
        self.drop()
        began = time.monotonic()
        args = {
            "episode": self._episode,
            "step": step,
            "parameters": self._parameters,
            "instruction": self._instruction,
            "codec": self._codec,
            "timeout": POLL,
        }
        arrays = {STATE: seen.state, **frames.pack([seen.frames], self._codec)}
        future = self._link.observe(args, arrays)
        try:
            answer = self._wait(future, began, on_late)
            if answer is None:
                return SILENT
            result, arrays = answer
            if "version" not in result:
                return str(result.get("wait", SILENT))
            actions = np.array(arrays["action"], np.float32)
        except (RemoteError, KeyError) as error:
            return str(error)
        finally:
            self._link.forget(future)
        took = (time.monotonic() - began) * 1e3
        self.latency_ms = 0.9 * self.latency_ms + 0.1 * took if self.latency_ms else took
        info = {name: np.array(a) for name, a in arrays.items() if name.startswith("policy.")}
        self._plan = Plan(actions, int(result["version"]), self._plans, info)
        self._plans, self._arrived = self._plans + 1, time.monotonic()
        return ""

    def _wait(self, future: Future, began: float, on_late: Callable[[], bool]):
        pause = self._watchdog_s
        while True:
            try:
                return future.result(pause)
            except FutureTimeout:
                if not on_late() or time.monotonic() - began > POLL + 0.5:
                    return None
                pause = 0.05

    def _age(self) -> float:
        return max(0.0, time.monotonic() - self._arrived - self._index * self._period_s)
