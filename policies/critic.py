"""Value functions: V of a twin's full state, Q of an executed action chunk."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from policies.layers import EnsembleLinear, mlp
from policies.normalise import Normaliser


class StateValue(nn.Module):
    """V(state): only the learner has it, so it may see what the policy must not."""

    def __init__(self, dim: int, hidden: int = 256) -> None:
        super().__init__()
        self.normaliser = Normaliser(dim)
        self.network = mlp(dim, hidden, 1, 3)

    def forward(self, state: Tensor) -> Tensor:
        """(B, dim) -> (B,)."""
        return self.network(self.normaliser(state).clamp(-5.0, 5.0)).squeeze(-1)


class ChunkCritic(nn.Module):
    """E critics Q(features, chunk, mask) with LayerNorm, which bounds extrapolation (RLPD)."""

    def __init__(self, features: int, chunk: int, action: int, members: int = 5, hidden: int = 256):
        super().__init__()
        self.members = members
        self.first = EnsembleLinear(members, features + chunk * (action + 1), hidden)
        self.second = EnsembleLinear(members, hidden, hidden)
        self.last = EnsembleLinear(members, hidden, 1)
        # One LayerNorm without parameters serves all members: each row is normalised by itself.
        self.hidden = hidden

    def forward(
        self, features: Tensor, chunk: Tensor, mask: Tensor, members: Tensor | None = None
    ) -> Tensor:
        """`features` (B, F), normalised `chunk` (B, C, A), `mask` (B, C) of executed steps -> Q (E, B).

        Steps that were not executed enter as zeros with their mask, whatever the chunk holds there. `members` (M,)
        int64: only these critics, -> (M, B).
        """
        mask = mask.to(features.dtype)
        x = torch.cat([features, (chunk * mask[..., None]).flatten(1), mask], dim=-1)
        x = x.expand(self.members if members is None else len(members), -1, -1)
        x = functional.gelu(functional.layer_norm(self.first(x, members), (self.hidden,)))
        x = functional.gelu(functional.layer_norm(self.second(x, members), (self.hidden,)))
        return self.last(x, members).squeeze(-1)
