"""Critics of executed action chunks: RLPD's ensemble (Ball et al. 2023) with Q-chunking's targets (Li et al. 2025).

    y = sum_{i<L} gamma^i r_i + gamma^L * max_n min_{m in M} Q'_m(o', A'_n),   A' ~ actor,   clamped to what is possible
    L_critic = sum_m E (Q_m(o, A) - y)^2

L counts the steps that were executed, whoever decided them; o' is the observation after them. M is a random subset of
the ensemble.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from learner.optimiser import Optimiser
from policies.policy import Policy


@dataclass(frozen=True)
class CriticConfig:
    """Settings of the critics."""

    gamma: float = 0.99  # per control step
    step_cost: float = 0.0  # subtracted from the reward of each executed step
    reward_bounds: tuple[float, float] = (0.0, 1.0)  # of the sum of an episode's rewards
    # True: values average over the time left, which the critic is not told. False: bootstrap, with a step_cost.
    timeout_is_terminal: bool = True
    target_members: int = 2  # critics whose minimum is the target
    critic_learning_rate: float = 3e-4
    critic_gradient_norm: float = 10.0
    tau: float = 0.005  # target critics follow by this share


class Executed(NamedTuple):
    """B windows of executed steps as tensors: the first C of up to H >= C steps are the chunk that is judged."""

    chunk: Tensor  # (B, C, A), normalised
    mask: Tensor  # (B, C), 1 where a step was executed
    reward: Tensor  # (B, H), 0 where none was executed
    steps: Tensor  # (B,) float32, L: executed steps between o and o'
    terminated: Tensor  # (B,) bool
    truncated: Tensor  # (B,) bool

    @classmethod
    def of(cls, batch: Mapping[str, np.ndarray], policy: Policy) -> Executed:
        """From a replay batch, see ChunkQ.update."""

        def tensor(key: str, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.as_tensor(batch[key], dtype=dtype, device=policy.device)

        mask = tensor("step_mask")
        return cls(
            chunk=policy.action_normaliser(tensor("action")[:, : policy.chunk]),
            mask=mask[:, : policy.chunk],
            reward=tensor("reward") * mask,
            steps=tensor("steps"),
            terminated=tensor("terminated", torch.bool),
            truncated=tensor("truncated", torch.bool),
        )


class ChunkCritics:
    """Trains a policy's chunk critics towards targets of its own, slower copy of them."""

    def __init__(self, policy: Policy, config: CriticConfig, generator: torch.Generator) -> None:
        if policy.critic is None:
            raise ValueError("the policy was built without critics (critics=0)")
        if config.target_members > policy.critic.members:
            raise ValueError(
                f"target_members is {config.target_members}, the policy has {policy.critic.members} critics"
            )
        self.policy, self.config, self.step = policy, config, 0
        self.target = deepcopy(policy.critic).requires_grad_(False)
        self._generator = generator
        self._optimiser = Optimiser(
            policy.critic.parameters(),
            config.critic_learning_rate,
            clip=config.critic_gradient_norm,
        )

    @torch.no_grad()
    def continuation(self, summary: Tensor, chunks: Tensor) -> Tensor:
        """max_n min_{m in M} Q'_m (B,) of `summary` (B, F) and proposed `chunks` (B, N, C, A)."""
        members = torch.randperm(self.target.members, generator=self._generator)
        members = members[: self.config.target_members].to(summary.device)
        values = _each(self.target, summary, chunks, members)  # (M, B, N)
        return values.amin(0).amax(1)

    def targets(self, executed: Executed, continuation: Tensor) -> Tensor:
        """y (B,), clamped to what rewards and costs allow, from the `continuation` (B,) at o'."""
        config, reward = self.config, executed.reward
        powers = config.gamma ** torch.arange(reward.shape[1], device=reward.device)
        costs = config.step_cost * (powers.cumsum(0)[executed.steps.long() - 1])
        ended = executed.terminated
        if config.timeout_is_terminal:
            ended = ended | executed.truncated
        discount = config.gamma**executed.steps * ~ended
        y = (reward * powers).sum(1) - costs + discount * continuation
        low, high = config.reward_bounds
        low -= config.step_cost / (1.0 - config.gamma) if config.step_cost else 0.0
        return y.clamp(low, high)

    def update(self, executed: Executed, summary: Tensor, y: Tensor) -> dict[str, float]:
        """One step of the critics at `summary` (B, F) towards `y` (B,)."""
        critic = self.policy.critic
        values = critic(summary, executed.chunk, executed.mask)  # (E, B)
        error = (values - y).square().mean(1).sum()
        norm = self._optimiser.step(error)
        self.step += 1
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.target.parameters()), list(critic.parameters()), self.config.tau
            )
        values = values.detach()
        return {
            "critic_loss": float(error.detach()) / critic.members,
            "critic_gradient_norm": norm,
            "target_mean": float(y.mean()),
            "value_mean": float(values.mean()),
            "value_spread": float(values.std(0).mean()),  # disagreement between members
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything but the critics, which are the policy's."""
        return {
            "step": self.step,
            "target": self.target.state_dict(),
            "optimiser": self._optimiser.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.step = state["step"]
        self.target.load_state_dict(state["target"])
        self._optimiser.load_state_dict(state["optimiser"])


def _each(critic: torch.nn.Module, summary: Tensor, chunks: Tensor, members: Tensor) -> Tensor:
    """Q (M, B, N) of N whole chunks (B, N, C, A) at each of B summaries, by `members` (M,)."""
    batch, count = chunks.shape[:2]
    tiled = summary.repeat_interleave(count, dim=0) if count > 1 else summary
    flat = chunks.flatten(0, 1)
    return critic(tiled, flat, flat.new_ones(flat.shape[:2]), members).view(-1, batch, count)
