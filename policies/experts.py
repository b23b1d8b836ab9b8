"""Networks of the action expert: velocity fields that policies/flow.py integrates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from policies.flow import TIME_FEATURES, FlowExpert
from policies.layers import fourier, mlp


class MLPExpert(FlowExpert):
    """A velocity field of fully connected layers on flat `features` (B, F): the cheapest, for a CPU."""

    def __init__(
        self, features: int, dim: int, hidden: int = 256, layers: int = 3, noisy_steps: int = 0
    ) -> None:
        super().__init__(dim, features, noisy_steps)
        # The first layer is split, so that K integration steps project the features once.
        self.project = nn.Linear(features, hidden)
        self.point = nn.Linear(dim + TIME_FEATURES, hidden, bias=False)
        self.body = nn.Sequential(
            nn.LayerNorm(hidden), nn.GELU(), mlp(hidden, hidden, dim, layers - 1)
        )

    def condition(self, features: Tensor) -> Tensor:
        """(B, F) -> (B, 1, hidden)."""
        return self.project(features)[:, None]

    def field(self, condition: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Velocity (B, S, D)."""
        return self.body(condition + self.point(torch.cat([x, fourier(t)], dim=-1)))

    def summary(self, features: Tensor) -> Tensor:
        """The features themselves."""
        return features
