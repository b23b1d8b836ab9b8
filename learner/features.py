"""Features of a frozen encoder, computed once: on a CPU the encoder is most of a training step's cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from policies.policy import Policy
from twinrl.core.segment import Segment
from twinrl.env import STATE, image_key

STEP_BITS = 20  # an observation's id: its segment's, then its step


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
    if not parts:
        return torch.zeros(0, *policy.feature_shape, device=policy.device)
    return torch.cat(parts)


def feature_bytes(policy: Policy) -> int:
    """What the features of one observation take."""
    return 4 * math.prod(policy.feature_shape)


def with_ids(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A batch of the replay with names for its observations, by segment and step: an encoder sees each once."""
    first = batch["segment"].astype(np.int64) << STEP_BITS
    return {
        **batch,
        "observation.id": first + batch["step"],
        "next.observation.id": first + batch["step"] + batch["steps"],
    }


class FeatureCache:
    """Features by observation id: an observation that is drawn many times is encoded once.

    Holds while the encoder stays as it is; `clear` it otherwise. Lies on the policy's device and takes at most `memory`
    bytes, and no more than `capacity` observations.
    """

    def __init__(
        self, policy: Policy, instruction: str, capacity: int = 200_000, memory: int = 4 << 30
    ) -> None:
        self.policy = policy
        self.instruction = instruction
        self._row: dict[int, int] = {}
        self._capacity = max(1, min(capacity, memory // feature_bytes(policy)))
        rows = min(1024, self._capacity)
        self._table = torch.zeros(rows, *policy.feature_shape, device=policy.device)
        self._hits = self._misses = 0

    def clear(self) -> None:
        """Forget everything."""
        self._row.clear()

    def lookup(self, batch: Mapping[str, np.ndarray], prefix: str = "") -> Tensor:
        """Features (B, ...) of a batch's observations (`prefix` "" or "next.").

        `<prefix>observation.id` (B,) int64 names them; without that key all are encoded. `instruction` (B,) is what was
        asked in the episode of each; without that key it is the cache's.
        """
        told = batch.get("instruction", self.instruction)
        observation = {
            key: batch[prefix + key] for key in (STATE, *map(image_key, self.policy.cameras))
        }
        ids = batch.get(prefix + "observation.id")
        if ids is None:
            return encode(self.policy, observation, told)
        names, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
        if len(names) > self._capacity:
            return encode(self.policy, observation, told)
        fresh = self._unknown(names)
        if len(self._row) + int(fresh.sum()) > self._capacity:
            self.clear()  # simple and rare: the next batches fill it again
            fresh = self._unknown(names)
        self._hits += int((~fresh).sum())
        self._misses += int(fresh.sum())
        if fresh.any():
            rows = first[fresh]
            seen = {key: value[rows] for key, value in observation.items()}
            said = told if isinstance(told, str) else told[rows]
            self._store(names[fresh], encode(self.policy, seen, said))
        rows = torch.tensor([self._row[int(name)] for name in names])
        return self._table[rows[torch.from_numpy(inverse.reshape(-1))].to(self._table.device)]

    def add(self, segment_id: int, segment: Segment) -> None:
        """Encode all frames of a stored segment at once: as it comes in, for a fraction of what a few of them at each
        draw would take."""
        columns = segment.columns
        # Without cameras every step is seen.
        frames = columns.get("frame_step", np.arange(len(columns[STATE])))
        names = (segment_id << STEP_BITS) + frames.astype(np.int64)
        fresh = self._unknown(names)
        if not fresh.any() or len(self._row) + int(fresh.sum()) > self._capacity:
            return
        rows = {image_key(camera): columns[image_key(camera)] for camera in self.policy.cameras}
        rows[STATE] = columns[STATE][frames]
        seen = {key: value[fresh] for key, value in rows.items()}
        features = encode(self.policy, seen, segment.header["instruction"])
        self._store(names[fresh], features)

    def _unknown(self, names: np.ndarray) -> np.ndarray:
        return np.array([int(name) not in self._row for name in names], dtype=bool)

    def stats(self) -> dict[str, float]:
        """Entries, and the share of lookups answered without encoding since the last call."""
        total = self._hits + self._misses
        share = self._hits / total if total else 0.0
        self._hits = self._misses = 0
        return {"entries": len(self._row), "hit_share": share}

    def _store(self, names: np.ndarray, features: Tensor) -> None:
        start, end = len(self._row), len(self._row) + len(names)
        if end > len(self._table):
            rows = min(max(end, 2 * len(self._table)), self._capacity)
            grown = self._table.new_zeros(rows, *self._table.shape[1:])
            grown[:start] = self._table[:start]
            self._table = grown
        self._table[start:end] = features
        self._row.update((int(name), start + i) for i, name in enumerate(names))
