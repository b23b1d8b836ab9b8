"""Off-policy RL on mixed sources over action chunks: imitation where people showed something, critics for the rest.

Three parts, one file each where they have a paper of their own:

- critics of executed chunks, whoever decided them (learner/algorithms/chunk_critic.py: RLPD, Q-chunking);
- the flow policy, cloned from demonstrations, takeovers and successes, anchored to the policy it started from:

      L_flow = L_matching(imitation) + w * E || ODE(o, z) - ODE_start(o, z) ||^2   over observations no person acted on

- what acts, better than the flow policy by the critics (learner/algorithms/improvement.py: best of N, or one step).

Without critics, `improvement` "none", what remains is HG-DAgger (Kelly et al. 2019): cloning of takeovers as they come.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner.algorithms.chunk_critic import ChunkCritics, CriticConfig, Executed
from learner.algorithms.improvement import IMPROVEMENTS, Improvement, ImprovementConfig
from learner.algorithms.sft import ImitationData
from learner.features import FeatureCache
from learner.optimiser import Optimiser
from policies.policy import Policy


@dataclass(frozen=True)
class ChunkQConfig(CriticConfig, ImprovementConfig):
    """Settings of all parts."""

    improvement: str = "best_of_n"  # or one_step, or none: imitation alone
    horizon: int = 1  # chunks of executed steps in a return before it bootstraps
    offline_updates: int = 0  # made on what others left, before the arm brings anything
    actor_every: int = 2  # critic updates for one actor update
    actor_warmup: int = 500  # critic-only updates at the start
    actor_learning_rate: float = 2e-4  # of the flow
    anchor: float = 3.0  # w, keeps what the flow could do where no person corrected it
    imitation_batch: int = 256
    imitation_draws: int = 1
    gradient_norm: float = 1.0
    ema: float = 0.995  # decay of the averaged flow, which is the policy's

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise ValueError(f"horizon is {self.horizon}, must be at least 1 chunk")
        if self.improvement not in (*IMPROVEMENTS, "none"):
            raise ValueError(
                f"improvement is {self.improvement!r}, not one of {(*IMPROVEMENTS, 'none')}"
            )


class ChunkQ:
    """Trains a policy's critics on any executed data, its flow on what is worth repeating, and what acts on both."""

    def __init__(
        self, policy: Policy, config: ChunkQConfig, cache: FeatureCache, seed: int = 0
    ) -> None:
        self.policy, self.config, self.cache, self.step = policy, config, cache, 0
        self.window = config.horizon * policy.chunk  # H, executed steps of what `update` takes
        self._generator = torch.Generator().manual_seed(seed)
        self.critics: ChunkCritics | None = None
        self.improvement: Improvement | None = None
        if config.improvement != "none":
            self.critics = ChunkCritics(policy, config, self._generator)
            self.improvement = IMPROVEMENTS[config.improvement](policy, config, self._generator)
        self.flow = _AnchoredFlow(policy, config, self._generator)

    def update(
        self, batch: Mapping[str, np.ndarray], imitation: ImitationData | None = None
    ) -> dict[str, float]:
        """One critic step on `batch`; every `actor_every`-th time an actor step, the flow's on `imitation`.

        `batch`: `observation.*` and `next.observation.*` (B, ...), `action` (B, H, A) physical, `step_mask` and
        `reward` (B, H) with H = `window` (n-step returns; the chunk that is judged is the first C steps), `terminated`,
        `truncated`, `steps` (B,); optional `observation.id`, `next.observation.id` (see FeatureCache),
        and `intervention` (B, C). ValueError for windows of another length.
        """
        found = np.shape(batch["reward"])[1]
        if found != self.window:
            raise ValueError(
                f"windows of {found} executed steps, should be {self.window}: horizon {self.config.horizon} times a "
                f"chunk of {self.policy.chunk}"
            )
        features = self.cache.lookup(batch).to(self.policy.device)
        metrics: dict[str, float] = {}
        if self.critics is not None:
            metrics = self._update_critics(batch, features)
        self.step += 1
        warm = self.step > self.config.actor_warmup or self.critics is None
        if self.step % self.config.actor_every == 0:
            if warm and imitation is not None:
                taken = np.asarray(batch.get("intervention", np.zeros((len(features), 1))))
                kept = features[torch.from_numpy(~taken.any(axis=1)).to(features.device)]
                metrics |= self.flow.update(imitation, kept)
            if self.improvement is not None:
                metrics |= self.improvement.update(features, warm)
        return metrics

    def _update_critics(
        self, batch: Mapping[str, np.ndarray], features: Tensor
    ) -> dict[str, float]:
        policy, critics = self.policy, self.critics
        executed = Executed.of(batch, policy)
        following = self.cache.lookup(batch, "next.").to(policy.device)
        proposed = self.improvement.propose(following)
        y = critics.targets(executed, critics.continuation(policy.summary(following), proposed))
        return critics.update(executed, policy.summary(features), y)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the policy's weights (critics, averaged flow, what acts) and the data."""
        return {
            "step": self.step,
            "critics": self.critics.state_dict() if self.critics else None,
            "improvement": self.improvement.state_dict() if self.improvement else None,
            "flow": self.flow.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.step = state["step"]
        if self.critics is not None:
            self.critics.load_state_dict(state["critics"])
            self.improvement.load_state_dict(state["improvement"])
        self.flow.load_state_dict(state["flow"])
        self._generator.set_state(state["generator"])


class _AnchoredFlow:
    """The flow as a student of demonstrations that forgets little of what it could do at the start."""

    def __init__(self, policy: Policy, config: ChunkQConfig, generator: torch.Generator) -> None:
        self.policy, self.config, self._generator = policy, config, generator
        # Gradients move this copy; the policy's is its average.
        self.student = deepcopy(policy.flow)
        self.reference = deepcopy(policy.flow).requires_grad_(False)
        self._optimiser = Optimiser(
            self.student.parameters(), config.actor_learning_rate, clip=config.gradient_norm
        )

    def update(self, imitation: ImitationData, kept: Tensor) -> dict[str, float]:
        """One step on `imitation`, anchored at the features `kept` (B', ...)."""
        config, steps = self.config, self.policy.integration_steps
        imitated = imitation.loss(
            self.student, config.imitation_batch, config.imitation_draws, self._generator
        )
        loss, metrics = imitated, {}
        if config.anchor:
            noise = self.student.start((len(kept), self.student.dim), kept, self._generator)
            with torch.no_grad():
                before = self.reference.integrate(kept, noise, steps)
            now = self.student.integrate(kept, noise, steps)
            drift = (now - before).square().sum() / max(1, before.numel())
            loss = loss + config.anchor * drift
            metrics["drift"] = float(drift.detach())
        self._optimiser.step(loss)
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.policy.flow.parameters()),
                list(self.student.parameters()),
                1.0 - config.ema,
            )
        return {"imitation_loss": float(imitated.detach()), **metrics}

    def state_dict(self) -> dict[str, Any]:
        """Everything but the averaged flow, which is the policy's."""
        return {
            "student": self.student.state_dict(),
            "reference": self.reference.state_dict(),
            "optimiser": self._optimiser.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.student.load_state_dict(state["student"])
        self.reference.load_state_dict(state["reference"])
        self._optimiser.load_state_dict(state["optimiser"])
