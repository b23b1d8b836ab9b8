"""The learner: one process that holds the policy, trains it stage by stage and publishes its weights.

The stages' loops are in learner/stages/; this class has what they share: the policy and its version, checkpoints,
statistics, and the way to stop.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from learner import distributed
from learner.checkpoint import CheckpointWriter, load_checkpoint, restore_policy, snapshot
from learner.failures import save_failure
from learner.optimiser import NonFiniteLossError
from policies.registry import make_policy
from policies.weights import to_arrays
from twinrl.core.errors import ConfigError, TwinRLError
from twinrl.weights import WeightSink


class Learner:
    """Everything arrives as factories and plain values, so the same class runs in a test without Ray.

    `make_reader()` connects to the replay service, `make_reporter(name, stats)` reports statistics and events.
    `device`: auto (a GPU if this process sees one), cpu, cuda or cuda:N. `precision` of what supervised stages compute:
    auto (bfloat16 on a GPU), float32 or bfloat16. A learner that is one of several ranks (learner/distributed.py) is
    made as `helper` on all ranks but 0, and does everything but publish, save and report.
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
        device: str = "auto",
        precision: str = "auto",
        helper: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        self.policy_config, self.instruction, self.seed = policy_config, instruction, seed
        self.device = choose_device(device)
        self._half = uses_bfloat16(precision, self.device)
        self._helper = helper
        self.policy = make_policy(policy_config).to(self.device)
        self.version = -1
        self._checkpoints, self._sink = checkpoints, sink
        self._writer = CheckpointWriter()
        self.reader = make_reader()
        self._stop, self._paused = threading.Event(), threading.Event()
        self._checkpoint = threading.Event()
        self._stage, self._progress = "idle", 0.0
        self._updates = self._batches = 0
        self._losses: dict[str, float] = {}
        self.data_waited = self._clock_waited = 0.0  # s that stages waited for batches or segments
        self._clock, self._clock_updates, self._clock_batches = time.monotonic(), 0, 0
        self._publishing = self._clock_publishing = 0.0  # s
        self.acting_lag = self.held_versions = 0  # see `hear_lag`; versions that waited for it
        self.reporter = make_reporter("learner", self.stats)
        place = f"{threads} threads" if self.device.type == "cpu" else str(self.device)
        self.reporter.event("info", f"learner is ready on {place}")

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
        self._writer.flush()
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

    def hear_lag(self, versions: int) -> None:
        """The policy that acts for the arms is so many versions behind the newest: publishing may have to wait."""
        self.acting_lag = versions

    def close(self) -> None:
        """Report a last time and close."""
        self.stop()
        self._writer.close()
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
            self._writer.flush()
            self._sink.flush()  # what the summary names can be had from now on
        except NonFiniteLossError as error:
            path = save_failure(self._checkpoints.parent / "failures", stage, self.policy, error)
            raise TwinRLError(f"{stage}: {error}; batch and norms are in {path}") from error
        finally:
            self._stage = "idle"
        return {**(summary or {}), "seconds": time.monotonic() - began, "version": self.version}

    # -- what stages use ---------------------------------------------------------------------------------

    @property
    def stopping(self) -> bool:
        """Someone asked the stage to end."""
        return self._stop.is_set()

    def goes_on(self) -> bool:
        """Nobody asked the stage to end; holds here while paused. With several ranks rank 0 decides, and all must ask."""
        while True:
            wish = "end" if self.stopping else "hold" if self._paused.is_set() else "go on"
            wish = distributed.agree(wish)
            if wish != "hold":
                return wish == "go on"
            time.sleep(0.1)

    def autocast(self) -> torch.autocast:
        """Context in which a supervised loss is computed in the learner's precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._half)

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
        # Several ranks hold together, in `goes_on`: none may wait for the others for as long as a pause lasts.
        while self._paused.is_set() and not self.stopping and distributed.size() == 1:
            time.sleep(0.1)

    def publish(self) -> int:
        """Hand out the policy's weights as the next version: copied here, between two updates, sent in the background."""
        if self._helper:
            self.version += 1
            return self.version
        began = time.monotonic()
        self._sink.publish(self.version + 1, to_arrays(self.policy))
        self.version += 1
        self._publishing += time.monotonic() - began
        return self.version

    def save(self, name: str, algorithm: dict[str, Any] | None = None) -> Path:
        """Copy checkpoint `name` and write it in the background; it is on disk when the stage has ended."""
        path = self._checkpoints / f"{name}.pt"
        if self._helper:
            return path
        content = snapshot(
            stage=name,
            version=self.version,
            policy=self.policy,
            policy_config=self.policy_config,
            algorithm=algorithm,
        )
        self._writer.save(path, content)
        return path

    def finish(self, name: str) -> None:
        """Write checkpoint `name` of a stage that is done, and remove NAME-running."""
        self.save(name)
        self._writer.flush()
        if not self._helper:
            (self._checkpoints / f"{name}-running.pt").unlink(missing_ok=True)

    def has(self, name: str) -> bool:
        """Checkpoint `name` exists."""
        self._writer.flush()
        return (self._checkpoints / f"{name}.pt").exists()

    def begin(self, name: str, start: str | None) -> tuple[bool, dict[str, Any]]:
        """Restore what stage `name` left when it was interrupted, else checkpoint `start` (None: the policy as it is).

        Returns whether it was interrupted, and the algorithm's state.
        """
        if distributed.agree(self.has(f"{name}-running")):
            return True, self.restore(f"{name}-running")
        return False, self.restore(start) if start is not None else {}

    def restore(self, name: str) -> dict[str, Any]:
        """Load checkpoint `name` into the policy, and torch's random state; versions never go back.

        Returns the algorithm's state.
        """
        self._writer.flush()
        path = self._checkpoints / f"{name}.pt"
        state = load_checkpoint(path)
        restore_policy(self.policy, state, path)
        torch.set_rng_state(state["rng"])
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
            "learner/acting_lag": self.acting_lag,
            "learner/held_versions": self.held_versions,
            "policy/version": self.version,
        }
        self._clock_publishing = self._publishing
        self._clock_waited = self.data_waited
        self._clock, self._clock_updates, self._clock_batches = now, updates, batches
        if self._stage != "idle":
            data.update(self.losses())
        return data

    def losses(self) -> dict[str, float]:
        """The newest losses, also of a stage that has ended."""
        return {f"loss/{key}": value for key, value in self._losses.items()}


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device that exists; ConfigError otherwise."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu" and not re.fullmatch(r"cuda(:\d+)?", name):
        raise ConfigError(f"device {name!r}: one of auto, cpu, cuda, cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {name!r}: this process sees {torch.cuda.device_count()} GPUs; take auto or cpu"
        )
    return device


def uses_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether supervised losses are computed in bfloat16."""
    if precision not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"precision {precision!r}: one of auto, float32, bfloat16")
    return precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
