"""Transformer layers: self-attention over a prefix, and the action expert's, which also reads the prefix's cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

RATIO = 4  # width of a feed-forward layer over that of its tokens


def head_count(width: int, head_dim: int) -> int:
    """How many heads tokens of `width` have; ValueError unless it is a whole number."""
    if width % head_dim:
        raise ValueError(f"a width of {width} is no multiple of head_dim {head_dim}")
    return width // head_dim


def feed_forward(width: int) -> nn.Sequential:
    """LayerNorm, Linear, GELU, Linear: (..., width) -> (..., width)."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, RATIO * width),
        nn.GELU(),
        nn.Linear(RATIO * width, width),
    )


class Block(nn.Module):
    """Pre-norm self-attention and feed-forward."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.heads = head_count(width, head_dim)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed = feed_forward(width)

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        """`x` (B, T, width); `seen` (B, 1, 1, T) bool, tokens that may be attended to; None for all."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, head_dim) each
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.feed(x)


class CachedBlock(nn.Module):
    """A layer of the action expert: C action tokens attend to one another and to the prefix's keys and values.

    S points of a row share its cache: their queries stand in one product with it, so that it is never copied.
    """

    def __init__(self, width: int, prefix_width: int, head_dim: int) -> None:
        super().__init__()
        self.heads = head_count(width, head_dim)
        self.scale = head_dim**-0.5
        self.prefix = nn.Linear(prefix_width, 2 * width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed = feed_forward(width)

    def cache(self, prefix: Tensor) -> tuple[Tensor, Tensor]:
        """Prefix tokens (B, T, prefix_width) -> keys and values (B, H, T, head_dim)."""
        both = self.prefix(prefix).view(*prefix.shape[:2], 2, self.heads, -1)
        keys, values = both.permute(2, 0, 3, 1, 4)
        return keys, values

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None) -> Tensor:
        """`x` (B, S, C, width) with a row's cache (B, H, T, head_dim); `hidden` (B, 1, 1, T) bool is padding."""
        batch, points, chunk, width = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, points, chunk, 3, self.heads, -1)
        q, own_keys, own_values = qkv.permute(3, 0, 4, 1, 2, 5)  # (B, H, S, C, head_dim) each
        q = q * self.scale
        to_prefix = q.flatten(2, 3) @ keys.transpose(-1, -2)  # (B, H, S * C, T)
        if hidden is not None:
            to_prefix = to_prefix.masked_fill(hidden, -torch.inf)
        to_own = (q @ own_keys.transpose(-1, -2)).flatten(2, 3)  # (B, H, S * C, C)
        weights = torch.cat([to_prefix, to_own], dim=-1).softmax(-1).to(values.dtype)
        weight_prefix, weight_own = weights.split([keys.shape[2], chunk], dim=-1)
        mixed = weight_prefix @ values  # (B, H, S * C, head_dim)
        mixed = mixed.view_as(q) + weight_own.view(*q.shape[:3], chunk, chunk) @ own_values
        x = x + self.out(mixed.permute(0, 2, 3, 1, 4).reshape(batch, points, chunk, width))
        return x + self.feed(x)
