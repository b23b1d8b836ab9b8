"""The learner as a Ray actor, and with `learner.ranks` above 1 several of them that share batches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray

from learner import distributed
from learner.learner import Learner
from twinrl.core.errors import DeadlineError
from twinrl.core.sockets import free_port

SHARED = ("pretrain", "sft", "twin_rl")  # stages that all ranks run
READY_SECONDS = 120.0  # for an actor that Ray brings back
HELPER_SECONDS = 60.0  # for the helpers to end when rank 0 has


class RayLearner(Learner):
    """The learner as a Ray actor: scenes arrive as top-level arguments, which Ray resolves without a copy.

    `helpers` are names of further RayLearners, ranks 1, 2, ...; each stage of SHARED forms their group anew, so that an
    actor which Ray brought back takes part in the next.
    """

    def __init__(self, *, helpers: Sequence[str] = (), **options: Any) -> None:
        super().__init__(**options)
        self._helpers = list(helpers)

    def run(self, stage: str, **arguments: Any) -> dict[str, Any]:
        """As Learner.run; on all ranks where the stage is one of SHARED."""
        if not self._helpers or stage not in SHARED:
            return super().run(stage, **arguments)
        address = f"tcp://{ray.util.get_node_ip_address()}:{free_port()}"
        size = 1 + len(self._helpers)
        held = ray.put(arguments)  # once for all
        calls = [
            _ready(name).help.remote(address, rank, size, stage, held)
            for rank, name in enumerate(self._helpers, start=1)
        ]
        with distributed.joined(address, 0, size, str(self.device)):
            summary = super().run(stage, **arguments)
        ray.get(calls, timeout=HELPER_SECONDS)
        return summary

    def help(
        self, address: str, rank: int, size: int, stage: str, arguments: dict[str, Any]
    ) -> None:
        """Run a stage as rank `rank` of `size`; rank 0 calls this."""
        with distributed.joined(address, rank, size, str(self.device)):
            super().run(stage, **arguments)

    def pretrain(self, options: dict[str, Any], *scenes: Any) -> dict[str, Any]:
        """Run the stage "pretrain" on labelled scenes."""
        return self.run("pretrain", scenes=scenes, options=options)

    def stats(self) -> dict[str, Any]:
        """The learner's figures, and its reader's: what it waits for, which shards are lost."""
        return {**super().stats(), **self.reader.stats()}


def _ready(name: str) -> Any:
    """The handle of an actor that answers; one that died is waited for while Ray brings it back."""
    ended = time.monotonic() + READY_SECONDS
    while True:
        try:
            actor = ray.get_actor(name)
            ray.get(actor.ping.remote(), timeout=max(1.0, ended - time.monotonic()))
            return actor
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            if time.monotonic() > ended:
                raise DeadlineError(f"{name} did not answer within {READY_SECONDS:g} s") from error
            time.sleep(0.5)
