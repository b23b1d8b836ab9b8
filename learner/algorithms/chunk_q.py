"""Off-policy RL on executed action chunks: Q-chunking's critic (Li et al. 2025) in RLPD's setting.

    y = sum_i gamma^i r_i + gamma^L * min_2 Q'(o', A'),   A' ~ flow policy,   clamped to what the reward allows

The actor is the flow policy itself: cloned from demonstrations, takeovers and successes, anchored to the policy it
started from, and improved at acting time by choosing the best of N of its chunks under the critic. No gradient of the
critic enters the policy, so an over-estimated action can mislead a choice among plausible chunks, but not invent one.

    L_actor = L_flow(imitation) + w * E || ODE(o, x_0) - ODE_start(o, x_0) ||^2   over observations no person acted on
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from learner.algorithms.sft import ImitationData
from learner.features import FeatureCache
from policies.policy import Policy


@dataclass(frozen=True)
class ChunkQConfig:
    """Settings of the chunk critic and its actor."""

    gamma: float = 0.99  # per control step
    step_cost: float = 0.0  # subtracted from the reward of each executed step
    reward_bounds: tuple[float, float] = (
        0.0,
        1.0,
    )  # smallest and largest sum of an episode's rewards
    # True: values average over the time left, which the critic is not told. False: bootstrap, with a step_cost.
    timeout_is_terminal: bool = True
    target_members: int = 2  # critics whose minimum is the target
    target_candidates: int = 1  # chunks of which the best continues, in the target
    critic_learning_rate: float = 3e-4
    tau: float = 0.005  # target critics follow by this share
    actor_learning_rate: float = 2e-4
    actor_every: int = 2  # critic updates for one actor update
    actor_warmup: int = 500  # critic-only updates at the start
    anchor: float = 3.0  # w, keeps what the policy could do where no person corrected it
    imitation_batch: int = 256
    imitation_draws: int = 1
    gradient_norm: float = 1.0
    ema: float = 0.995  # decay of the averaged actor, which is what acts
    candidates: int = 4  # chunks among which the acting policy chooses


class ChunkQ:
    """Trains the policy's chunk critics on any executed data, and its flow head on what is worth repeating."""

    def __init__(
        self, policy: Policy, config: ChunkQConfig, cache: FeatureCache, seed: int = 0
    ) -> None:
        if policy.critic is None:
            raise ValueError("the policy was built without critics (critics=0)")
        self.policy, self.config, self.cache, self.step = policy, config, cache, 0
        self.target = deepcopy(policy.critic).requires_grad_(False)
        self._generator = torch.Generator().manual_seed(seed)
        # Gradients move this copy; the policy that acts is its average.
        self.actor = deepcopy(policy.flow)
        self._critic_optimiser = torch.optim.Adam(
            policy.critic.parameters(), config.critic_learning_rate, fused=True
        )
        self._actor_optimiser = torch.optim.Adam(
            self.actor.parameters(), config.actor_learning_rate, fused=True
        )
        self.reference = deepcopy(policy.flow).requires_grad_(False)
        policy.candidates.fill_(1)

    def update(
        self, batch: Mapping[str, np.ndarray], imitation: ImitationData | None = None
    ) -> dict[str, float]:
        """One critic step on `batch`, every `actor_every`-th time an actor step on `imitation`.

        Once the critic has had `actor_warmup` updates, it also chooses for the acting policy.

        `batch`: `observation.*` and `next.observation.*` (B, ...), `action` (B, C, 7) physical, `step_mask` and
        `reward` (B, C), `terminated`, `truncated`, `steps` (B,); optional `observation.id`, `next.observation.id`
        (see FeatureCache) and `intervention` (B, C).
        """
        features = self.cache.lookup(batch)
        metrics = self._update_critic(batch, features)
        self.step += 1
        warm = self.step > self.config.actor_warmup
        self.policy.candidates.fill_(self.config.candidates if warm else 1)
        if warm and self.step % self.config.actor_every == 0 and imitation is not None:
            taken = np.asarray(batch.get("intervention", np.zeros((len(features), 1)))).any(axis=1)
            metrics |= self._update_actor(imitation, features[torch.from_numpy(~taken)])
        return metrics

    def targets(self, batch: Mapping[str, np.ndarray], following: Tensor) -> Tensor:
        """y (B,) from a batch and the `following` observations' features (B, F)."""
        config = self.config
        mask = torch.as_tensor(batch["step_mask"], dtype=torch.float32)
        powers = config.gamma ** torch.arange(mask.shape[1], dtype=torch.float32)
        reward = torch.as_tensor(batch["reward"], dtype=torch.float32) - config.step_cost
        reward = (reward * mask * powers).sum(1)
        ended = torch.as_tensor(batch["terminated"])
        if config.timeout_is_terminal:
            ended = ended | torch.as_tensor(batch["truncated"])
        discount = config.gamma ** torch.as_tensor(batch["steps"], dtype=torch.float32)
        with torch.no_grad():
            continuation = self._continuation(following)
        y = reward + discount * continuation * ~ended
        low, high = config.reward_bounds
        low -= config.step_cost / (1.0 - config.gamma) if config.step_cost else 0.0
        return y.clamp(low, high)

    def _continuation(self, features: Tensor) -> Tensor:
        """min over a random subset of target critics of Q'(o', A') (B,), A' the best of the candidates."""
        count, batch = self.config.target_candidates, len(features)
        tiled = features.repeat_interleave(count, dim=0)
        chunks = self.policy.sample(tiled, generator=self._generator)
        members = torch.randperm(self.target.members, generator=self._generator)
        values = self.target(self.policy.summary(tiled), chunks, chunks.new_ones(chunks.shape[:2]))
        values = values[members[: self.config.target_members]].amin(0)
        return values.view(batch, count).amax(1)

    def _update_critic(self, batch: Mapping[str, np.ndarray], features: Tensor) -> dict[str, float]:
        policy = self.policy
        y = self.targets(batch, self.cache.lookup(batch, "next."))
        chunk = policy.action_normaliser(torch.as_tensor(batch["action"], dtype=torch.float32))
        mask = torch.as_tensor(batch["step_mask"], dtype=torch.float32)
        values = policy.critic(policy.summary(features), chunk, mask)  # (E, B)
        loss = (values - y).square().mean(1).sum()
        self._critic_optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(policy.critic.parameters(), 10.0)
        self._critic_optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.target.parameters()), list(policy.critic.parameters()), self.config.tau
            )
        return {
            "critic_loss": float(loss.detach()) / policy.critic.members,
            "critic_gradient_norm": float(norm),
            "target_mean": float(y.mean()),
            "value_mean": float(values.detach().mean()),
            "value_spread": float(values.detach().std(0).mean()),  # disagreement between members
        }

    def _update_actor(self, imitation: ImitationData, kept: Tensor) -> dict[str, float]:
        config = self.config
        imitated = imitation.loss(
            self.actor, config.imitation_batch, config.imitation_draws, self._generator
        )
        noise = torch.randn(len(kept), self.actor.dim, generator=self._generator)
        with torch.no_grad():
            before = self.reference.integrate(kept, noise, self.policy.integration_steps)
        now = self.actor.integrate(kept, noise, self.policy.integration_steps)
        drift = (now - before).square().sum() / max(1, before.numel())
        loss = imitated + config.anchor * drift
        self._actor_optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.actor.parameters(), config.gradient_norm)
        self._actor_optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.policy.flow.parameters()), list(self.actor.parameters()), 1.0 - config.ema
            )
        return {"imitation_loss": float(imitated.detach()), "drift": float(drift.detach())}

    def state_dict(self) -> dict[str, Any]:
        """Everything but the policy's weights (which hold critics and the averaged actor) and the data."""
        return {
            "step": self.step,
            "target": self.target.state_dict(),
            "actor": self.actor.state_dict(),
            "reference": self.reference.state_dict(),
            "critic_optimiser": self._critic_optimiser.state_dict(),
            "actor_optimiser": self._actor_optimiser.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.step = state["step"]
        self.target.load_state_dict(state["target"])
        self.actor.load_state_dict(state["actor"])
        self.reference.load_state_dict(state["reference"])
        self._critic_optimiser.load_state_dict(state["critic_optimiser"])
        self._actor_optimiser.load_state_dict(state["actor_optimiser"])
        self._generator.set_state(state["generator"])
