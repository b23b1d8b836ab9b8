"""A runner whose policy lives in the inference actor: the interface of policies/runner.py without weights or torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Protocol

import numpy as np

from actors.batching import Answer, Request
from twinrl.env import Observation
from twinrl.weights import Weights

Ask = Callable[[Request], Answer]


class Runner(Protocol):
    """What a rollout needs of a policy; PolicyRunner and RemoteRunner are the two."""

    version: int  # that acts, or acted last

    def adopt(self, weights: Weights, exactly: bool = False) -> None:
        """Act with `weights` from now on; `exactly`: with no newer ones, should others want them."""

    def infer(
        self, observation: Observation, instruction: str | Sequence[str], explore: bool
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Observations {key: (N, ...)} -> chunks (N, C, 7) float32 in physical units and `policy.*` columns.

        `version` is then that of the policy that acted. RuntimeError before the first `adopt`.
        """

    def seed(self, seed: int) -> None:
        """Restart the random stream, which is a function of the seed and of the number of answers since."""


class RemoteRunner:
    """Asks the inference actor. Adopting costs nothing: the version is asked for, the weights stay where they are.

    A shared policy adopts versions by itself, so `version` may rise by itself too, from answer to answer.
    """

    def __init__(self, ask: Ask, seed: int = 0) -> None:
        """`ask` takes the request to the inference actor and waits for the answer."""
        self.version = -1
        self._ask = ask
        self._exactly = False
        self._seed, self._calls = seed, 0

    def adopt(self, weights: Weights, exactly: bool = False) -> None:
        """See Runner."""
        self.version, self._exactly = weights.version, exactly

    def infer(
        self, observation: Observation, instruction: str | Sequence[str], explore: bool
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """See Runner."""
        if self.version < 0:
            raise RuntimeError("no weights were adopted: a policy without a version never acts")
        place = self._seed, self._calls, self.version, self._exactly
        answer = self._ask(Request(observation, instruction, explore, *place))
        self._calls += 1
        self.version = answer.version
        return answer.chunk, answer.columns

    def seed(self, seed: int) -> None:
        """See Runner."""
        self._seed, self._calls = seed, 0


class SingleInference:
    """One observation at a time, as arms have them, by the newest version; may be called from several threads."""

    def __init__(self, ask: Ask, seed: int = 0, patience: float = 20.0) -> None:
        """`patience`: s to wait for an answer, and before the first publish for the first version."""
        self._ask, self._seed, self._patience = ask, seed, patience
        self._calls = count()

    def __call__(
        self, observation: Observation, instruction: str, explore: bool
    ) -> tuple[np.ndarray, dict[str, np.ndarray], int]:
        """Observation {key: (...)} -> (chunk (C, 7), `policy.*` columns, policy version)."""
        rows = {key: np.asarray(value)[None] for key, value in observation.items()}
        request = Request(rows, instruction, explore, self._seed, next(self._calls))
        answer = self._ask(request._replace(patience=self._patience))
        columns = {key: column[0] for key, column in answer.columns.items()}
        return answer.chunk[0], columns, answer.version
