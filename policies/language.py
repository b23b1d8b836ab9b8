"""Instructions as hashed words: enough to tell tasks apart without a tokenizer's vocabulary."""

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
    """Hashed word embeddings: one for each word, and their mean."""

    def __init__(self, dim: int = 16, buckets: int = 512) -> None:
        super().__init__()
        self.buckets = buckets
        self.embedding = nn.Embedding(buckets, dim)
        # Words that were never met keep the beginning's size, and so say little beside those that were.
        nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(
        self, instruction: str | Sequence[str], batch: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One instruction for all, or one for each of `batch` rows.

        -> words (batch, L, dim) float32, which of them are words and not padding (batch, L) bool, and the words' mean
        (batch, dim). L is the length of the longest instruction.
        """
        same = isinstance(instruction, str)
        rows = [instruction] if same else list(instruction)
        if not same and len(rows) != batch:
            raise ValueError(f"{len(rows)} instructions for {batch} observations")
        found = [tokens(row, self.buckets) for row in rows]
        longest = max(map(len, found), default=0)
        device = self.embedding.weight.device
        index = torch.tensor(
            [[*each, *[0] * (longest - len(each))] for each in found], dtype=torch.long
        ).view(len(rows), longest)
        count = torch.tensor([len(each) for each in found])
        present = (torch.arange(longest) < count[:, None]).to(device)
        words = self.embedding(index.to(device)) * present[..., None]
        mean = words.sum(1) / count.clamp_min(1).to(device)[:, None]
        if same:
            return tuple(each.expand(batch, *each.shape[1:]) for each in (words, present, mean))
        return words, present, mean
