"""Supervised fine-tuning: flow matching on demonstrated action chunks (pi0).

L = E || v(x_t, t | o) - (A - eps) ||^2 with x_t = (1 - t) eps + t A, masked where no action was demonstrated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from learner.dataset import Windows, source_probabilities
from learner.features import encode
from policies.flow import FlowExpert
from policies.policy import Policy


@dataclass(frozen=True)
class SFTConfig:
    """Settings of supervised fine-tuning."""

    steps: int = 1000  # gradient steps
    batch: int = 256  # windows a step
    draws: int = 2  # pairs (t, eps) for each window
    learning_rate: float = 1e-3  # peak; linear warm-up, then cosine to zero
    warmup: int = 100  # steps
    weight_decay: float = 1e-4
    gradient_norm: float = 1.0
    ema: float = 0.999  # decay of the averaged weights, which are the result
    shares: Mapping[str, float] = field(
        default_factory=lambda: {"demo": 0.5, "twin": 0.5}
    )  # how often each source is drawn


class ImitationData:
    """Encoded windows, drawn by source: what flow-matching losses train on while the encoder is frozen."""

    def __init__(self, policy: Policy, windows: Windows, shares: Mapping[str, float]) -> None:
        self._shares = dict(shares)
        width = policy.chunk * windows.action.shape[-1]
        self.features = torch.zeros(0, *policy.feature_shape)  # (N, ...)
        self.mask = self.chunk = torch.zeros(0, width)  # (N, D), chunks normalised
        self._source = np.zeros(0, np.int64)
        self.extend(policy, windows)

    def extend(self, policy: Policy, windows: Windows) -> None:
        """Add windows; only these are encoded."""
        features = encode(policy, windows.observation, windows.instruction)
        mask = torch.as_tensor(windows.mask)[..., None].expand(-1, -1, windows.action.shape[-1])
        mask = mask.flatten(1).contiguous()
        chunk = policy.action_normaliser(torch.as_tensor(windows.action)).flatten(1) * mask
        self.features = torch.cat([self.features, features])
        self.mask, self.chunk = torch.cat([self.mask, mask]), torch.cat([self.chunk, chunk])
        self._source = np.concatenate([self._source, windows.source])
        self._probability = torch.as_tensor(source_probabilities(self._source, self._shares))

    def __len__(self) -> int:
        return len(self.features)

    def loss(
        self, flow: FlowExpert, batch: int, draws: int, generator: torch.Generator
    ) -> torch.Tensor:
        """Mean flow-matching loss of `batch` drawn windows."""
        rows = torch.multinomial(self._probability, batch, replacement=True, generator=generator)
        return flow.matching_loss(
            self.features[rows], self.chunk[rows], self.mask[rows], draws, generator
        ).mean()


class SFT:
    """Trains the flow head on windows with a frozen encoder."""

    def __init__(self, policy: Policy, config: SFTConfig, windows: Windows, seed: int = 0) -> None:
        """Fits the policy's view of the state to `windows`; its actions' scale is the caller's (fit_actions)."""
        self.policy, self.config, self.step = policy, config, 0
        policy.fit_states(windows.state)
        self.data = ImitationData(policy, windows, config.shares)
        self._generator = torch.Generator().manual_seed(seed)
        self._parameters = list(policy.flow.parameters())
        self._average = [parameter.detach().clone() for parameter in self._parameters]
        self._optimiser = torch.optim.AdamW(
            self._parameters, config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimiser, self._rate)

    def _rate(self, step: int) -> float:
        progress = min(1.0, step / self.config.steps)
        return (
            min(1.0, (step + 1) / self.config.warmup)
            * 0.5
            * (1.0 + float(np.cos(np.pi * progress)))
        )

    @property
    def done(self) -> bool:
        """All gradient steps were made."""
        return self.step >= self.config.steps

    def update(self) -> dict[str, float]:
        """One gradient step; after the last one the policy holds the averaged weights."""
        loss = self.data.loss(
            self.policy.flow, self.config.batch, self.config.draws, self._generator
        )
        self._optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters, self.config.gradient_norm)
        self._optimiser.step()
        self._schedule.step()
        self.step += 1
        # A young average follows quickly, so that it never remembers the initial weights.
        decay = min(self.config.ema, (1.0 + self.step) / (10.0 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self._average, self._parameters, 1.0 - decay)
            if self.done:
                torch._foreach_copy_(self._parameters, self._average)
        return {"flow_loss": float(loss.detach()), "gradient_norm": float(norm)}

    def state_dict(self) -> dict[str, Any]:
        """Everything but the policy's weights and the data."""
        return {
            "step": self.step,
            "average": self._average,
            "optimiser": self._optimiser.state_dict(),
            "schedule": self._schedule.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.step = state["step"]
        for mine, theirs in zip(self._average, state["average"], strict=True):
            mine.copy_(theirs)
        self._optimiser.load_state_dict(state["optimiser"])
        self._schedule.load_state_dict(state["schedule"])
        self._generator.set_state(state["generator"])
