"""Affine normalisation fitted to data and stored beside the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Normaliser(nn.Module):
    """Maps physical units to about [-1, 1] (or unit variance) per dimension, and back.

    `centre` and `scale` are (D,) float32 buffers, so they travel, load and are checksummed with the weights:
    a policy never meets the statistics of another data set.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    @torch.no_grad()
    def fit_quantiles(self, values: Tensor, low: float = 0.01, minimum_scale: float = 1e-6) -> None:
        """Map the `low` and 1 - `low` quantiles of `values` (B, D) to -1 and +1.

        `minimum_scale` (physical units) keeps a dimension that hardly moved from being blown up.
        """
        lower, upper = torch.quantile(values.float(), torch.tensor([low, 1.0 - low]), dim=0)
        self.centre.copy_((lower + upper) / 2)
        self.scale.copy_(((upper - lower) / 2).clamp_min(minimum_scale))

    @torch.no_grad()
    def fit_moments(self, values: Tensor, minimum_scale: float = 1e-6) -> None:
        """Map `values` (B, D) to mean 0 and standard deviation 1."""
        self.centre.copy_(values.float().mean(0))
        self.scale.copy_(values.float().std(0, correction=0).clamp_min(minimum_scale))

    @torch.no_grad()
    def fix(self, dims: slice | list[int], low: float, high: float) -> None:
        """Overrule the fit of some dimensions: their range [low, high] is known (the gripper)."""
        self.centre[dims] = (low + high) / 2
        self.scale[dims] = (high - low) / 2

    def forward(self, values: Tensor) -> Tensor:
        """Physical (..., D) -> normalised (..., D)."""
        return (values - self.centre) / self.scale

    def inverse(self, values: Tensor) -> Tensor:
        """Normalised (..., D) -> physical (..., D)."""
        return values * self.scale + self.centre
