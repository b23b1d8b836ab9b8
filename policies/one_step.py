"""An actor that maps noise to a chunk in one step: what FQL distils a flow policy into (Park et al. 2025)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from policies.layers import mlp


class OneStepActor(nn.Module):
    """mu(o, z): a chunk (B, D), normalised, from a policy's summary (B, summary_dim) and noise z (B, D).

    One evaluation instead of K, and short enough for the gradient of a critic to go through. Two buffers travel with
    its weights: `active`, whether `Policy.act` uses it, and `exploration`, the standard deviation of the noise added
    to its chunks where exploration is wanted (normalised units).
    """

    def __init__(self, summary_dim: int, dim: int, hidden: int = 256, layers: int = 2) -> None:
        super().__init__()
        self.dim = dim
        self.network = mlp(summary_dim + dim, hidden, dim, layers)
        nn.init.zeros_(self.network[-1].weight)  # begins in the middle of the actions' range
        nn.init.zeros_(self.network[-1].bias)
        self.register_buffer("active", torch.tensor(False))
        self.register_buffer("exploration", torch.tensor(0.1))

    def forward(self, summary: Tensor, noise: Tensor) -> Tensor:
        """(B, summary_dim), (B, D) -> (B, D), which may lie outside the policy's limits."""
        return self.network(torch.cat([summary, noise], dim=-1))
