"""Networks of the action expert: velocity fields that policies/flow.py integrates."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from policies.flow import TIME_FEATURES, FlowExpert
from policies.layers import bfloat16_where, fourier, mlp
from policies.transformer import CachedBlock


class MLPExpert(FlowExpert):
    """A velocity field of fully connected layers on flat `features` (B, F): the cheapest, for a CPU."""

    def __init__(
        self, features: int, dim: int, hidden: int = 256, layers: int = 3, noisy_steps: int = 0
    ) -> None:
        super().__init__(dim, features, noisy_steps)
        # The first layer is split, so that K integration steps project the features once.
        self.project = nn.Linear(features, hidden)
        self.point = nn.Linear(dim + TIME_FEATURES, hidden, bias=False)
        self.network = nn.Sequential(
            nn.LayerNorm(hidden), nn.GELU(), mlp(hidden, hidden, dim, layers - 1)
        )

    def condition(self, features: Tensor) -> Tensor:
        """(B, F) -> (B, 1, hidden)."""
        return self.project(features)[:, None]

    def field(self, condition: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Velocity (B, S, D)."""
        return self.network(condition + self.point(torch.cat([x, fourier(t)], dim=-1)))

    def summary(self, features: Tensor) -> Tensor:
        """The features themselves."""
        return features


class Prefix(NamedTuple):
    """What the points of a row share."""

    context: Tensor  # (B, 1, width), the summary as each action token gets it
    keys: list[Tensor]  # a layer: (B, H, T, head_dim)
    values: list[Tensor]
    hidden: Tensor  # (B, 1, 1, T) bool: padding


class TransformerExpert(FlowExpert):
    """Action tokens that attend to one another and to a prefix's cached keys and values (pi0's action expert).

    Features are rows (B, T + R, d): T tokens of the trunk, the first of them its readout, a row of zeros being padding;
    then `numbers` numbers (poses, state, instruction) in R rows, the last filled up with zeros. Tokens tell where to
    look, numbers what is known exactly: a linear map of them is added to each action token.
    """

    def __init__(
        self,
        token_dim: int,
        numbers: int,
        chunk: int,
        action_dim: int,
        width: int = 128,
        layers: int = 2,
        head_dim: int = 32,
        noisy_steps: int = 0,
        half: bool = False,
    ) -> None:
        """`half`: compute in bfloat16. Not for PPO across devices: they round a velocity differently, and a path's
        likelihood with it."""
        super().__init__(chunk * action_dim, token_dim + numbers, noisy_steps)
        self.numbers, self.rows = numbers, math.ceil(numbers / token_dim)
        self.chunk, self.action_dim, self.half = chunk, action_dim, half
        self.network = ActionTransformer(token_dim, chunk, action_dim, width, layers, head_dim)
        self.context = nn.Linear(self.summary_dim, width)

    def condition(self, features: Tensor) -> Prefix:
        """The prefix's keys and values in each layer, once for all points and integration steps."""
        tokens = features[:, : features.shape[1] - self.rows]
        hidden = (tokens == 0).all(-1)[:, None, None]
        with bfloat16_where(self.half, features):
            cache = [block.cache(tokens) for block in self.network.blocks]
            context = self.context(self.summary(features))[:, None]
        return Prefix(context, [k for k, _ in cache], [v for _, v in cache], hidden)

    def field(self, condition: Prefix, x: Tensor, t: Tensor) -> Tensor:
        """Velocity (B, S, D)."""
        points = x.unflatten(-1, (self.chunk, self.action_dim))
        with bfloat16_where(self.half, x):
            velocity = self.network(points, fourier(t), *condition)
        return velocity.flatten(2).to(x.dtype)

    def summary(self, features: Tensor) -> Tensor:
        """Readout and numbers (B, d + numbers)."""
        numbers = features[:, features.shape[1] - self.rows :].flatten(1)[:, : self.numbers]
        return torch.cat([features[:, 0], numbers], dim=-1)

    def as_rows(self, numbers: Tensor) -> Tensor:
        """Numbers (B, numbers) as the last rows (B, R, d) of features."""
        token_dim = self.summary_dim - self.numbers
        padding = self.rows * token_dim - self.numbers
        return nn.functional.pad(numbers, (0, padding)).unflatten(1, (self.rows, token_dim))


class ActionTransformer(nn.Module):
    """The network of TransformerExpert; a module of its own, so that it can be compiled."""

    def __init__(
        self,
        token_dim: int,
        chunk: int,
        action_dim: int,
        width: int,
        layers: int,
        head_dim: int,
    ) -> None:
        super().__init__()
        self.inward = nn.Linear(action_dim, width)
        self.step = nn.Parameter(0.02 * torch.randn(chunk, width))
        self.time = nn.Sequential(
            nn.Linear(TIME_FEATURES, width), nn.GELU(), nn.Linear(width, width)
        )
        self.blocks = nn.ModuleList(CachedBlock(width, token_dim, head_dim) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.outward = nn.Linear(width, action_dim)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        hidden: Tensor,
    ) -> Tensor:
        """`x` (B, S, C, A), embedded times `t` (B, S, TIME_FEATURES), and a Prefix -> velocity (B, S, C, A)."""
        tokens = self.inward(x) + self.step + (context + self.time(t))[:, :, None]
        for block, k, v in zip(self.blocks, keys, values, strict=True):
            tokens = block(tokens, k, v, hidden)
        return self.outward(self.norm(tokens))
