"""Asks the policy for chunks, in good time, and hands them to the control loop when they come."""

from __future__ import annotations

import math
import time
from concurrent.futures import Future
from typing import Any, Callable, Dict

import numpy as np

from robot_bridge import frames
from robot_bridge.control import Plan
from robot_bridge.link import Link
from robot_bridge.recorder import STATE, Seen
from twinrl.core.errors import RemoteError

POLL = 1.0  # s, how long one question to the gateway stays open
SILENT = "no chunk from the policy server"
AGAIN = 0.05  # s until a question that was not answered is asked again


class Pilot:
    """`on_plan` gets every chunk, in the thread of the link."""

    def __init__(
        self,
        link: Link,
        codec: str,
        period_s: float,
        on_plan: Callable[[Plan], None],
        run: str,
        max_lag: int,
    ) -> None:
        """`period_s`: a control step, real time. Chunks of another run than `run`, or of a policy more than `max_lag`
        versions behind the run's newest, are refused."""
        self._link, self._codec, self._period_s, self._on_plan = link, codec, period_s, on_plan
        self._run, self._max_lag = run, max_lag
        self.refused = 0  # chunks
        self.latency_ms = 0.0  # from the question to the chunk, smoothed
        self._question: Future | None = None
        self.begin("", {}, "")

    def begin(self, episode: str, parameters: Dict[str, Any], instruction: str) -> None:
        """A new episode with the parameters of its start, and what is asked in it."""
        self.forget()
        self._episode, self._parameters, self._instruction = episode, parameters, instruction
        self._plans = 0
        self.reason = ""  # why there is no chunk
        self._asked = self._again = 0.0

    @property
    def ahead(self) -> int:
        """Steps before a chunk's end at which the next one has to be asked for, to come in time."""
        return 1 + math.ceil(self.latency_ms / 1e3 / self._period_s)

    @property
    def waiting_s(self) -> float:
        """For how long nobody has answered."""
        return time.monotonic() - self._asked if self._asked else 0.0

    @property
    def may_ask(self) -> bool:
        """No question is open, or the one that is will not be answered."""
        if self._question is not None:
            if time.monotonic() - self._sent < POLL + 0.5:
                return False
            self.reason = SILENT
            self.forget()
        return time.monotonic() >= self._again

    def ask(self, step: int, seen: Seen) -> None:
        """For the chunk that begins with `step`, at which `seen` was seen."""
        args = {
            "episode": self._episode,
            "step": step,
            "parameters": self._parameters,
            "instruction": self._instruction,
            "codec": self._codec,
            "timeout": POLL,
        }
        arrays = {STATE: seen.state, **frames.pack([seen.frames], self._codec)}
        self._sent = time.monotonic()
        self._asked = self._asked or self._sent
        future = self._link.observe(args, arrays)
        self._question = future
        future.add_done_callback(lambda done: self._take(done, step))

    def forget(self) -> None:
        """Whatever is still open is of no use any more."""
        question, self._question = self._question, None
        if question is not None:
            self._link.forget(question)

    def _take(self, answer: Future, step: int) -> None:
        if answer is not self._question or answer.cancelled():
            return  # forgotten meanwhile
        try:
            result, arrays = answer.result()
            plan = self._plan(result, arrays, step)
        except (RemoteError, KeyError) as error:
            plan, self.reason = None, str(error)
        if plan is None:
            self._again = time.monotonic() + AGAIN
        else:
            took = (time.monotonic() - self._sent) * 1e3
            self.latency_ms = 0.9 * self.latency_ms + 0.1 * took if self.latency_ms else took
            self.reason, self._asked = "", 0.0
            self._on_plan(plan)
        self._question = None

    def _plan(self, result: Dict[str, Any], arrays: Dict[str, Any], step: int) -> Plan | None:
        if "version" not in result:
            self.reason = str(result.get("wait", SILENT))
            return None
        self.reason = self._why_not(result)
        if self.reason:
            self.refused += 1
            return None
        info = {name: np.array(a) for name, a in arrays.items() if name.startswith("policy.")}
        actions = np.array(arrays["action"], np.float32)
        self._plans += 1
        return Plan(actions, int(result["version"]), self._plans - 1, info, step)

    def _why_not(self, result: Dict[str, Any]) -> str:
        """Why the policy that gave this chunk must not act; "" when it may."""
        version, newest = int(result["version"]), int(result.get("newest", -1))
        if result.get("run", self._run) != self._run:
            return f"the chunk is from run {result['run']!r}, this robot belongs to {self._run!r}"
        if version < 0:
            return "the policy server acts with weights that were never published"
        if newest - version > self._max_lag:
            return (
                f"the policy server acts with version {version}, the run's newest is {newest}: more than "
                f"{self._max_lag} behind (--max-lag)"
            )
        return ""
