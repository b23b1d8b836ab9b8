"""Instructions as a bag of hashed words: enough to tell tasks apart without a tokenizer's vocabulary."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn


@lru_cache(maxsize=1024)
def tokens(instruction: str, buckets: int) -> tuple[int, ...]:
    """Bucket number of each word. crc32, because Python's own hash differs between processes."""
    words = "".join(c if c.isalnum() else " " for c in instruction.lower()).split()
    return tuple(zlib.crc32(word.encode()) % buckets for word in words)


class InstructionEncoder(nn.Module):
    """Mean of hashed word embeddings."""

    def __init__(self, dim: int = 16, buckets: int = 512) -> None:
        super().__init__()
        self.buckets = buckets
        self.embedding = nn.EmbeddingBag(buckets, dim, mode="mean")

    def forward(self, instruction: str | Sequence[str], batch: int) -> Tensor:
        """One instruction for all, or one for each of `batch` rows -> (batch, dim) float32."""
        same = isinstance(instruction, str)
        rows = [instruction] if same else list(instruction)
        if not same and len(rows) != batch:
            raise ValueError(f"{len(rows)} instructions for {batch} observations")
        bags = [tokens(row, self.buckets) for row in rows]
        flat = torch.tensor([token for bag in bags for token in bag], dtype=torch.long)
        starts = torch.tensor([0] + [len(bag) for bag in bags[:-1]], dtype=torch.long).cumsum(0)
        embedded = self.embedding(flat, starts)
        return embedded.expand(batch, -1) if same else embedded
