"""Features of a frozen encoder, computed once: on a CPU the encoder is most of a training step's cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from policies.policy import Policy
from twinrl.env import STATE, image_key


@torch.no_grad()
def encode(
    policy: Policy,
    observation: Mapping[str, np.ndarray],
    instruction: str | Sequence[str],
    batch: int = 128,
) -> Tensor:
    """Observation arrays (N, ...) -> features (N, ...) float32 without gradient, `batch` rows at a time."""
    keys = (STATE, *map(image_key, policy.cameras))
    rows = len(observation[STATE])
    same = isinstance(instruction, str)
    parts = []
    for start in range(0, rows, batch):
        part = slice(start, start + batch)
        tensors = policy.to_tensors({key: observation[key][part] for key in keys})
        parts.append(policy.encode(tensors, instruction if same else instruction[part]))
    return torch.cat(parts) if parts else torch.zeros(0, *policy.feature_shape)


class FeatureCache:
    """Features by observation id: an observation that is drawn many times is encoded once.

    Holds while the encoder stays as it is; `clear` it otherwise. Memory: the features of one observation each.
    """

    def __init__(self, policy: Policy, instruction: str, capacity: int = 200_000) -> None:
        self.policy = policy
        self.instruction = instruction
        self._row: dict[int, int] = {}
        self._table = torch.zeros(1024, *policy.feature_shape)
        self._capacity = capacity
        self._hits = self._misses = 0

    def clear(self) -> None:
        """Forget everything."""
        self._row.clear()

    def lookup(self, batch: Mapping[str, np.ndarray], prefix: str = "") -> Tensor:
        """Features (B, ...) of a batch's observations (`prefix` "" or "next.").

        `<prefix>observation.id` (B,) int64 names them; without that key all are encoded.
        """
        observation = {
            key: batch[prefix + key] for key in (STATE, *map(image_key, self.policy.cameras))
        }
        ids = batch.get(prefix + "observation.id")
        if ids is None:
            return encode(self.policy, observation, self.instruction)
        names, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
        known = np.array([int(name) in self._row for name in names], dtype=bool)
        fresh = first[~known]
        self._hits += int(known.sum())
        self._misses += len(fresh)
        if len(fresh):
            features = encode(
                self.policy,
                {key: value[fresh] for key, value in observation.items()},
                self.instruction,
            )
            self._store(names[~known], features)
        rows = torch.tensor([self._row[int(name)] for name in names])
        return self._table[rows[torch.from_numpy(inverse.reshape(-1))]]

    def stats(self) -> dict[str, float]:
        """Entries, and the share of lookups answered without encoding since the last call."""
        total = self._hits + self._misses
        share = self._hits / total if total else 0.0
        self._hits = self._misses = 0
        return {"entries": len(self._row), "hit_share": share}

    def _store(self, names: np.ndarray, features: Tensor) -> None:
        if len(self._row) + len(names) > self._capacity:
            self.clear()  # simple and rare: the next batches fill it again
        start = len(self._row)
        while start + len(names) > len(self._table):
            self._table = torch.cat([self._table, torch.zeros_like(self._table)])
        self._table[start : start + len(names)] = features
        self._row.update((int(name), start + i) for i, name in enumerate(names))
