"""What becomes of cameras, words and the state: a prefix of tokens, the first of which is read out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from policies.transformer import Block


class LatentTrunk(nn.Module):
    """One token: all that was seen through one layer. The cheapest, for a CPU."""

    def __init__(self, vision: Mapping[str, nn.Module], state: int, words: int, width: int) -> None:
        super().__init__()
        seen = sum(camera.tokens * camera.dim for camera in vision.values())
        self.tokens = 1
        self.fuse = nn.Sequential(
            nn.Linear(seen + state + words, width), nn.LayerNorm(width), nn.GELU()
        )

    def forward(
        self, seen: Mapping[str, Tensor], state: Tensor, words: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """As TransformerTrunk.forward, with T = 1."""
        parts = [camera.flatten(1) for camera in seen.values()]
        return self.fuse(torch.cat([*parts, state, words[2]], dim=-1))[:, None]


class TransformerTrunk(nn.Module):
    """Self-attention over camera tokens, words, the state and a readout.

    Padding is a row of zeros: nobody attends to it, and whoever reads the prefix can tell it by that.
    """

    def __init__(
        self,
        vision: Mapping[str, nn.Module],
        state: int,
        words: int,
        width: int,
        *,
        layers: int,
        head_dim: int,
        vector_tokens: int,
        longest: int,
    ) -> None:
        """`vector_tokens`: how many tokens a camera becomes whose encoder gives one vector. `longest`: words."""
        super().__init__()
        self.longest = longest
        self.counts = {
            name: camera.tokens if camera.tokens > 1 else vector_tokens
            for name, camera in vision.items()
        }
        self.cameras = nn.ModuleDict(
            {
                name: nn.Linear(
                    camera.dim, width * (self.counts[name] if camera.tokens == 1 else 1)
                )
                for name, camera in vision.items()
            }
        )
        self.words = nn.Linear(words, width)
        self.state = nn.Linear(state, width)
        self.tokens = 2 + sum(self.counts.values()) + longest
        # What each token is: readout, state, a camera's n-th, the n-th word.
        self.kind = nn.Parameter(0.02 * torch.randn(self.tokens, width))
        self.blocks = nn.ModuleList(Block(width, head_dim) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(
        self, seen: Mapping[str, Tensor], state: Tensor, words: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """`seen`: camera -> (B, tokens, dim) or (B, dim); `state` (B, state); `words` as InstructionEncoder gives them.

        -> tokens (B, T, width): readout, state, cameras, words. ValueError for more than `longest` words.
        """
        embedded, present, _ = words
        batch, length = present.shape
        if length > self.longest:
            raise ValueError(
                f"an instruction of {length} words, and this policy reads {self.longest}: raise `words`"
            )
        parts = [state.new_zeros(batch, 1, self.kind.shape[1]), self.state(state)[:, None]]
        for name, projection in self.cameras.items():
            parts.append(projection(seen[name]).view(batch, self.counts[name], -1))
        parts.append(self.words(embedded))
        # Padding that all rows share is left out here and put back as zeros.
        x = torch.cat(parts, dim=1)
        x = x + self.kind[: x.shape[1]]
        known = present.new_ones(batch, x.shape[1] - length)
        seen_tokens = torch.cat([known, present], dim=1)
        mask = seen_tokens[:, None, None]
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x) * seen_tokens[..., None]
        return torch.nn.functional.pad(x, (0, 0, 0, self.longest - length))
