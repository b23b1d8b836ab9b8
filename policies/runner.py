"""Runs a policy of a known version: the one way in which actors, evaluation and the bridge get actions.

`actors/remote_runner.py` has the same interface for a policy that runs in another process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from policies.registry import make_policy
from policies.streams import Streams, stream
from policies.weights import WeightsError, load_arrays
from twinrl.env import STATE, image_key
from twinrl.weights import Weights


class PolicyRunner:
    """A policy, its version and its random stream. Until weights are loaded it refuses to act.

    What is random in an answer is a function of the seed and of how many answers were given since (`seed`).
    """

    def __init__(self, config: dict[str, Any], seed: int = 0, device: str = "cpu") -> None:
        """`config`: of policies.registry.make_policy; `device`: where it computes, as torch names it."""
        self.policy = make_policy(config).eval().to(device)
        self.version = -1
        self._seed, self._calls = seed, 0

    @property
    def keys(self) -> tuple[str, ...]:
        """What of an observation the policy looks at."""
        return (STATE, *map(image_key, self.policy.cameras))

    def adopt(self, weights: Weights, exactly: bool = False) -> None:
        """Act with `weights` from now on. `exactly` matters only where a policy is shared (RemoteRunner)."""
        weights.verify()
        self.load(weights.version, weights.arrays)

    def load(
        self, version: int, arrays: Mapping[str, np.ndarray], checksum: int | None = None
    ) -> None:
        """Take over the weights of `version`, all of them or none (WeightsError: the old ones stay).

        With `checksum` the arrays are compared with it first; without, their source has done so.
        """
        try:
            load_arrays(self.policy, arrays, checksum)
        except WeightsError as error:
            raise WeightsError(f"weights of version {version} are not loaded: {error}") from None
        self.version = version

    def infer(
        self, observation: Mapping[str, np.ndarray], instruction: str | Sequence[str], explore: bool
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Observations of N environments -> chunks (N, C, 7) float32 in physical units, info (see Policy.act).

        `instruction`: one for all, or one for each environment.
        """
        answer = self.act(observation, instruction, explore, stream(self._seed, self._calls))
        self._calls += 1
        return answer

    def act(
        self,
        observation: Mapping[str, np.ndarray],
        instruction: str | Sequence[str],
        explore: bool,
        generator: torch.Generator | Streams,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """`infer` with random numbers from `generator`."""
        if self.version < 0:
            raise RuntimeError("no weights were loaded: a policy without a version never acts")
        with torch.inference_mode():
            return self.policy.act(observation, instruction, generator, explore)

    def seed(self, seed: int) -> None:
        """Restart the random stream (an evaluation repeats itself)."""
        self._seed, self._calls = seed, 0
