"""The way to the inference actor in a Ray cluster."""

from __future__ import annotations

import time
from functools import cached_property
from typing import Any

import ray

from actors.batching import Answer, Request
from twinrl.core.errors import DeadlineError

INFERENCE = "inference"  # the actor's name in the run's namespace
AGAIN = 0.2  # s until an actor that died is asked again


class RayInference:
    """Takes requests to the inference actor, found by name; made anywhere.

    Where the actor dies with a request, it is asked again, which changes nothing in the answer: Ray brings the
    actor back, and it acts again as soon as it has weights.
    """

    def __init__(self, name: str = INFERENCE) -> None:
        self._name = name

    @cached_property
    def _actor(self) -> Any:
        return ray.get_actor(self._name)

    def __reduce__(self) -> tuple[Any, ...]:
        return RayInference, (self._name,)

    def __call__(self, request: Request) -> Answer:
        """The answer, at the latest a little after the request's patience; else DeadlineError."""
        deadline = time.monotonic() + request.patience + 5.0  # the actor says it better
        while True:
            left = deadline - time.monotonic()
            try:
                return ray.get(self._actor.infer.remote(request), timeout=max(left, 0.0))
            except ray.exceptions.GetTimeoutError:
                raise DeadlineError(
                    f"the inference actor gave no answer within {request.patience:g} s"
                ) from None
            except ray.exceptions.RayActorError as error:
                if left < 0:
                    raise DeadlineError(
                        f"the inference actor died and is not back: {error}"
                    ) from None
                time.sleep(AGAIN)
