"""The learner: one process that holds the policy, trains it stage by stage and publishes its weights.

The stages' loops are in learner/stages/; this class has what they share: the policy and its version, checkpoints,
statistics, and the way to stop.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from learner.checkpoint import load_checkpoint, restore_policy, save_checkpoint
from policies.registry import make_policy
from policies.weights import to_arrays
from twinrl.core.errors import TwinRLError
from twinrl.weights import WeightSink


class Learner:
    """Everything arrives as factories and plain values, so the same class runs in a test without Ray.

    `make_reader()` connects to the replay service, `make_reporter(name, stats)` reports statistics and events.
    """

    def __init__(
        self,
        *,
        policy_config: dict[str, Any],
        instruction: str,
        checkpoints: Path,
        make_reader: Callable[[], Any],
        make_reporter: Callable[..., Any],
        sink: WeightSink,
        seed: int,
        threads: int = 1,
    ) -> None:
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        self.policy_config, self.instruction, self.seed = policy_config, instruction, seed
        self.policy = make_policy(policy_config)
        self.version = -1
        self._checkpoints, self._sink = checkpoints, sink
        self.reader = make_reader()
        self._stop, self._paused = threading.Event(), threading.Event()
        self._checkpoint = threading.Event()
        self._stage, self._progress = "idle", 0.0
        self._updates = self._batches = 0
        self._losses: dict[str, float] = {}
        self.data_waited = self._clock_waited = 0.0  # s that stages waited for batches or segments
        self._clock, self._clock_updates, self._clock_batches = time.monotonic(), 0, 0
        self._publishing = self._clock_publishing = 0.0  # s
        self.reporter = make_reporter("learner", self.stats)
        self.reporter.event("info", f"learner is ready on {threads} threads")

    def ping(self) -> int:
        """The policy's version, once the learner is ready."""
        return self.version

    def progress(self) -> float:
        """How far the running stage is, 0..1."""
        return self._progress

    def republish(self, name: str) -> int:
        """Publish checkpoint `name` again, as a new version; returns that."""
        self.restore(name)
        self.publish()
        self._sink.flush()
        return self.version

    def carry_over(self, start: str, name: str) -> dict[str, Any]:
        """Checkpoint `start` becomes checkpoint `name` and is published: a stage of no length."""
        self.restore(start)
        self.publish()
        self._sink.flush()
        self.save(name)
        return {"version": self.version, "seconds": 0.0}

    def stop(self) -> None:
        """End the running stage after its present update."""
        self._stop.set()

    def pause(self, paused: bool) -> None:
        """Hold after the present update, or go on."""
        self._paused.set() if paused else self._paused.clear()

    def ask_checkpoint(self) -> None:
        """Let the running stage write a checkpoint soon."""
        self._checkpoint.set()

    def close(self) -> None:
        """Report a last time and close."""
        self.stop()
        self._sink.close()
        self.reporter.close()
        self.reader.close()

    def run(self, stage: str, **arguments: Any) -> dict[str, Any]:
        """Run a stage of learner.stages.STAGES by name; returns its summary."""
        from learner.stages import STAGES  # the stages import this module's class

        if stage not in STAGES:
            raise TwinRLError(f"unknown stage {stage!r}: one of {', '.join(STAGES)}")
        self._stop.clear()
        self._stage, self._progress, self._losses = stage, 0.0, {}
        began = time.monotonic()
        try:
            summary = STAGES[stage](self, **arguments)
            self._sink.flush()  # what the summary names can be had from now on
        finally:
            self._stage = "idle"
        return {**(summary or {}), "seconds": time.monotonic() - began, "version": self.version}

    # -- what stages use ---------------------------------------------------------------------------------

    @property
    def stopping(self) -> bool:
        """Someone asked the stage to end."""
        return self._stop.is_set()

    def checkpoint_asked(self) -> bool:
        """Somebody wants a checkpoint now; asking answers once."""
        asked = self._checkpoint.is_set()
        self._checkpoint.clear()
        return asked

    def note(self, metrics: dict[str, float], progress: float, batches: int = 1) -> None:
        """Count an update, remember its losses, and how far the stage is (0..1). Holds here while paused."""
        self._updates += 1
        self._batches += batches
        self._progress = progress
        for key, value in metrics.items():
            if value == value:  # not a number that does not exist
                self._losses[key] = float(value)
        while self._paused.is_set() and not self.stopping:
            time.sleep(0.1)

    def publish(self) -> int:
        """Hand out the policy's weights as the next version: copied here, between two updates, sent in the background."""
        began = time.monotonic()
        self._sink.publish(self.version + 1, to_arrays(self.policy))
        self.version += 1
        self._publishing += time.monotonic() - began
        return self.version

    def save(self, name: str, algorithm: dict[str, Any] | None = None) -> Path:
        """Write checkpoint `name`."""
        path = self._checkpoints / f"{name}.pt"
        save_checkpoint(
            path,
            stage=name,
            version=self.version,
            policy=self.policy,
            policy_config=self.policy_config,
            algorithm=algorithm,
        )
        return path

    def has(self, name: str) -> bool:
        """Checkpoint `name` exists."""
        return (self._checkpoints / f"{name}.pt").exists()

    def restore(self, name: str) -> dict[str, Any]:
        """Load checkpoint `name` into the policy; versions never go back. Returns the algorithm's state."""
        path = self._checkpoints / f"{name}.pt"
        state = load_checkpoint(path)
        restore_policy(self.policy, state, path)
        self.version = max(self.version, state["version"], self._sink.newest())
        return state["algorithm"]

    def stats(self) -> dict[str, Any]:
        """Rates since the last call, progress and the newest losses."""
        now, updates, batches = time.monotonic(), self._updates, self._batches
        span = max(now - self._clock, 1e-6)
        data: dict[str, Any] = {
            "learner/stage": "paused" if self._paused.is_set() else self._stage,
            "learner/progress": self._progress,
            "learner/updates": updates,
            "learner/updates_per_s": (updates - self._clock_updates) / span,
            "learner/batches_per_s": (batches - self._clock_batches) / span,
            "learner/publish_share": (self._publishing - self._clock_publishing) / span,
            "learner/data_wait": (self.data_waited - self._clock_waited) / span,
            "policy/version": self.version,
        }
        self._clock_publishing = self._publishing
        self._clock_waited = self.data_waited
        self._clock, self._clock_updates, self._clock_batches = now, updates, batches
        if self._stage != "idle":
            data.update({f"loss/{key}": value for key, value in self._losses.items()})
        return data
