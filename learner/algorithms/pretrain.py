"""Encoder pretraining: regress object poses from labelled twin renders of randomised appearance.

Poses are free in a twin. Learning to see before learning to act makes both cheap, and an encoder that has met
random light, colours and cameras takes a real scene for one more draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from policies.vla import VLA
from twinrl.env import STATE, image_key


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of encoder pretraining."""

    steps: int = 1500  # gradient steps
    batch: int = 128  # scenes a step
    learning_rate: float = 4e-3  # peak of a one-cycle schedule
    weight_decay: float = 1e-4
    gradient_norm: float = 1.0


class Pretrain:
    """Trains a policy's encoder and pose head on labelled scenes held in memory."""

    def __init__(
        self,
        policy: VLA,
        config: PretrainConfig,
        observation: Mapping[str, np.ndarray],
        labels: np.ndarray,
        instruction: str,
        seed: int = 0,
    ) -> None:
        """`observation`: images (N, H, W, 3) uint8, state (N, S); `labels` (N, pose_dim) physical units."""
        self.policy, self.config, self.instruction = policy, config, instruction
        self.step = 0
        self.labels = torch.as_tensor(labels, dtype=torch.float32)
        keys = (STATE, *map(image_key, policy.cameras))
        self.observation = {key: torch.as_tensor(observation[key]) for key in keys}
        policy.fit_scenes(self.observation[STATE], self.labels)
        self._generator = torch.Generator().manual_seed(seed)
        self._optimiser = torch.optim.AdamW(
            policy.encoder_parameters(),
            config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimiser, config.learning_rate, total_steps=config.steps, pct_start=0.1
        )

    @property
    def done(self) -> bool:
        """All gradient steps were made."""
        return self.step >= self.config.steps

    def update(self) -> dict[str, float]:
        """One gradient step on a random batch."""
        rows = torch.randint(len(self.labels), (self.config.batch,), generator=self._generator)
        features = self.policy.encode(
            {key: value[rows] for key, value in self.observation.items()}, self.instruction
        )
        target = self.policy.pose_normaliser(self.labels[rows])
        loss = functional.mse_loss(self.policy.predict_pose(features), target)
        self._optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            self.policy.encoder_parameters(), self.config.gradient_norm
        )
        self._optimiser.step()
        self._schedule.step()
        self.step += 1
        return {"pose_loss": float(loss.detach()), "gradient_norm": float(norm)}

    @torch.no_grad()
    def errors(self, observation: Mapping[str, np.ndarray], labels: np.ndarray) -> np.ndarray:
        """Root mean square error (pose_dim,) of held-out labels, in their own units."""
        parts = []
        for start in range(0, len(labels), 128):
            rows = slice(start, start + 128)
            features = self.policy.encode(
                {key: torch.as_tensor(observation[key][rows]) for key in self.observation},
                self.instruction,
            )
            pose = self.policy.pose_normaliser.inverse(self.policy.predict_pose(features))
            parts.append(pose.numpy() - labels[rows])
        return np.sqrt(np.mean(np.square(np.concatenate(parts)), axis=0))

    def state_dict(self) -> dict[str, Any]:
        """Everything but the policy's weights and the data."""
        return {
            "step": self.step,
            "optimiser": self._optimiser.state_dict(),
            "schedule": self._schedule.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.step = state["step"]
        self._optimiser.load_state_dict(state["optimiser"])
        self._schedule.load_state_dict(state["schedule"])
        self._generator.set_state(state["generator"])
