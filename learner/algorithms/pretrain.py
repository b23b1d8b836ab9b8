"""Encoder pretraining: regress object poses from labelled twin renders of randomised appearance.

Poses are free in a twin. Learning to see before learning to act makes both cheap, and an encoder that has met
random light, colours and cameras takes a real scene for one more draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from learner import distributed
from learner.optimiser import Optimiser, one_cycle
from policies.vla import VLA
from policies.weights import published
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
        instruction: str | Sequence[str],
        seed: int = 0,
    ) -> None:
        """`observation`: images (N, H, W, 3) uint8, state (N, S); `labels` (N, pose_dim) physical units.

        `instruction` is what is asked in all scenes, or in each: labels may depend on it.
        """
        self.policy, self.config = policy, config
        self.instruction = instruction if isinstance(instruction, str) else np.array(instruction)
        self.step = 0
        distributed.broadcast(published(policy).values())
        self.labels = torch.as_tensor(labels, dtype=torch.float32)
        keys = (STATE, *map(image_key, policy.cameras))
        self.observation = {key: torch.as_tensor(observation[key]) for key in keys}
        policy.fit_scenes(self.observation[STATE].to(policy.device), self.labels.to(policy.device))
        self._generator = torch.Generator().manual_seed(seed)
        self._optimiser = Optimiser(
            policy.encoder_parameters(),
            config.learning_rate,
            weight_decay=config.weight_decay,
            clip=config.gradient_norm,
            schedule=one_cycle(config.steps),
        )

    @property
    def done(self) -> bool:
        """All gradient steps were made."""
        return self.step >= self.config.steps

    def update(self) -> dict[str, float]:
        """One gradient step on a random batch; with several ranks on this rank's share of it."""
        rows = torch.randint(len(self.labels), (self.config.batch,), generator=self._generator)
        own = distributed.share(rows)
        features = self._features(self.observation, self.instruction, own)
        target = self.policy.pose_normaliser(self.labels[own].to(self.policy.device))
        loss = functional.mse_loss(self.policy.predict_pose(features), target)
        loss = loss * (len(own) * distributed.size() / len(rows))
        norm = self._optimiser.step(loss, lambda: {"rows": own, "target": target})
        self.step += 1
        return {"pose_loss": float(loss.detach()), "gradient_norm": norm}

    def _features(
        self, observation: Mapping[str, torch.Tensor], instruction: str | np.ndarray, rows: Any
    ) -> torch.Tensor:
        """Features of the scenes `rows`, on the policy's device."""
        seen = {key: value[rows].to(self.policy.device) for key, value in observation.items()}
        told = instruction if isinstance(instruction, str) else instruction[rows].tolist()
        return self.policy.encode(seen, told)

    @torch.no_grad()
    def errors(
        self,
        observation: Mapping[str, np.ndarray],
        labels: np.ndarray,
        instruction: str | Sequence[str] | None = None,
    ) -> np.ndarray:
        """Root mean square error (pose_dim,) of held-out labels, in their own units.

        `instruction` as in the constructor; None where all scenes have the same.
        """
        told = self.instruction if instruction is None else instruction
        told = told if isinstance(told, str) else np.array(told)
        seen = {key: torch.as_tensor(observation[key]) for key in self.observation}
        parts = []
        for start in range(0, len(labels), 128):
            rows = slice(start, start + 128)
            pose = self.policy.predict_pose(self._features(seen, told, rows))
            parts.append(
                self.policy.pose_normaliser.inverse(pose).float().cpu().numpy() - labels[rows]
            )
        return np.sqrt(np.mean(np.square(np.concatenate(parts)), axis=0))

    def state_dict(self) -> dict[str, Any]:
        """Everything but the policy's weights and the data."""
        return {
            "step": self.step,
            "optimiser": self._optimiser.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.step = state["step"]
        self._optimiser.load_state_dict(state["optimiser"])
        self._generator.set_state(state["generator"])
