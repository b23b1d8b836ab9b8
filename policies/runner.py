"""Runs a policy of a known version: the one way in which actors, evaluation and the bridge get actions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from policies.registry import make_policy
from policies.weights import WeightsError, load_arrays


class PolicyRunner:
    """A policy, its version and its random stream. Until weights are loaded it refuses to act."""

    def __init__(self, config: dict[str, Any], seed: int = 0) -> None:
        self.policy = make_policy(config).eval()
        self.version = -1
        self._generator = torch.Generator().manual_seed(seed)

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
        """Observations of N environments -> chunks (N, C, 7) float32 in physical units, info (see VLA.act)."""
        if self.version < 0:
            raise RuntimeError("no weights were loaded: a policy without a version never acts")
        with torch.inference_mode():
            return self.policy.act(observation, instruction, self._generator, explore)

    def seed(self, seed: int) -> None:
        """Restart the random stream (an evaluation repeats itself)."""
        self._generator.manual_seed(seed)
