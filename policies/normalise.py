"""Affine normalisation fitted to data and stored beside the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

METHODS = ("quantiles", "moments")
QUANTILE_ROWS = 1 << 20  # of more, evenly spaced ones: torch sorts no more than 16 million numbers


class Normaliser(nn.Module):
    """Maps physical units to about [-1, 1] (or unit variance) per dimension, and back.

    `centre` and `scale` are (D,) float32 buffers, so they travel, load and are checksummed with the weights:
    a policy never meets the statistics of another data set.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def fit(self, values: Tensor, method: str, minimum_scale: float = 1e-6) -> None:
        """Fit to `values` (B, D) by one of METHODS."""
        check_method(method)
        fit = self.fit_quantiles if method == "quantiles" else self.fit_moments
        fit(values, minimum_scale=minimum_scale)

    @torch.no_grad()
    def fit_quantiles(self, values: Tensor, low: float = 0.01, minimum_scale: float = 1e-6) -> None:
        """Map the `low` and 1 - `low` quantiles of `values` (B, D) to -1 and +1.

        `minimum_scale` (physical units) keeps a dimension that hardly moved from being blown up.
        """
        values = values[:: -(-len(values) // QUANTILE_ROWS)].float()
        wanted = torch.tensor([low, 1.0 - low], device=values.device)
        lower, upper = torch.stack([torch.quantile(column, wanted) for column in values.T], dim=1)
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


def check_method(method: str) -> None:
    """Raise ValueError unless `method` is one of METHODS."""
    if method not in METHODS:
        raise ValueError(f"normalisation {method!r}: one of {', '.join(METHODS)}")
