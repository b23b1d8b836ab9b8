"""Layers shared by policy and critics."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def mlp(inputs: int, hidden: int, outputs: int, layers: int = 2) -> nn.Sequential:
    """`layers` hidden layers of Linear, LayerNorm and GELU, then a Linear."""
    parts: list[nn.Module] = []
    for width in [inputs] + [hidden] * (layers - 1):
        parts += [nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU()]
    return nn.Sequential(*parts, nn.Linear(hidden, outputs))


def bfloat16_where(half: bool, like: Tensor) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 on the device of `like` if `half`; else whatever the caller computes in goes on."""
    return torch.autocast(like.device.type, torch.bfloat16) if half else nullcontext()


def fourier(t: Tensor, frequencies: int = 4) -> Tensor:
    """Embed times (..., 1) in [0, 1] as sines and cosines (..., 2 * frequencies)."""
    angles = t * (math.pi * 2.0 ** torch.arange(frequencies, dtype=t.dtype, device=t.device))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class EnsembleLinear(nn.Module):
    """E independent linear layers evaluated as one batched product: (E, B, I) -> (E, B, O).

    `members` (M,) int64 evaluates these alone: (M, B, I) -> (M, B, O).
    """

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))

    def forward(self, x: Tensor, members: Tensor | None = None) -> Tensor:
        if members is None:
            return torch.baddbmm(self.bias, x, self.weight)
        return torch.baddbmm(self.bias[members], x, self.weight[members])
