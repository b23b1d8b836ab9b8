"""How an actor gets better than what it imitates: two ways to use a critic, after Q-chunking and after FQL.

Both leave the flow policy itself to imitation, so that no gradient of a critic enters it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from learner.optimiser import Optimiser
from policies.policy import Policy


@dataclass(frozen=True)
class ImprovementConfig:
    """Settings of both ways."""

    candidates: int = 4  # best of n: chunks among which the acting policy chooses
    target_candidates: int = 1  # best of n: chunks of which the best continues, in the target
    one_step_learning_rate: float = 3e-4
    bc_weight: float = (
        10.0  # one step: of the distance to the flow policy's chunk, in units of reward
    )
    q_weight: float = 1.0  # one step: of the critics' mean, in units of its size
    exploration: float = 0.1  # one step: noise where exploration is wanted, normalised units


class Improvement(Protocol):
    """What ChunkQ asks of either."""

    def propose(self, features: Tensor) -> Tensor:
        """Chunks (B, N, C, A), normalised and without gradient, that the improved actor may take."""

    def update(self, features: Tensor, warm: bool) -> dict[str, float]:
        """One step at `features` (B, ...); `warm`: the critics may be listened to."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class BestOfN:
    """Q-chunking (Li et al. 2025): act by the best of N chunks of the flow policy under the critics (Policy.choose).

    Nothing is trained: an over-estimated action can mislead a choice among plausible chunks, but not invent one.
    """

    def __init__(
        self, policy: Policy, config: ImprovementConfig, generator: torch.Generator
    ) -> None:
        self.policy, self.config, self._generator = policy, config, generator
        policy.candidates.fill_(1)

    @torch.no_grad()
    def propose(self, features: Tensor) -> Tensor:
        """`target_candidates` chunks of the flow policy."""
        count = self.config.target_candidates
        tiled = features.repeat_interleave(count, dim=0)
        chunks = self.policy.sample(tiled, generator=self._generator)
        return chunks.view(len(features), count, *chunks.shape[1:])

    def update(self, features: Tensor, warm: bool) -> dict[str, float]:
        """Let the acting policy choose once the critics are warm."""
        self.policy.candidates.fill_(self.config.candidates if warm else 1)
        return {}

    def state_dict(self) -> dict[str, Any]:
        """How many chunks the acting policy chooses from at present."""
        return {"candidates": int(self.policy.candidates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.policy.candidates.fill_(state["candidates"])


class OneStep:
    """FQL (Park et al. 2025), on chunks QC-FQL: a one-step actor that is distilled from the flow and climbs the critics.

        L = w_bc * E || mu(o, z) - ODE(o, z) ||^2 / D - w_q * E mean_m Q_m(o, clip(mu(o, z))) / E |Q| + overshoot

    The distance holds it near what was imitated: a weak anchor with few critics finds their errors instead. Without
    anything to imitate w_bc is 0, and this is DDPG with an ensemble. Critics know actions within the limits only: they
    judge the clipped chunk, their gradient passes the clip as if it were not there, and what overshoots is pulled back,
    so that an actor at a limit can leave it again.
    """

    def __init__(
        self, policy: Policy, config: ImprovementConfig, generator: torch.Generator
    ) -> None:
        if policy.one_step is None:
            raise ValueError("the policy was built without a one-step actor (one_step=False)")
        self.policy, self.config, self._generator = policy, config, generator
        policy.candidates.fill_(1)
        policy.one_step.active.fill_(not config.bc_weight)  # there is nothing to copy first
        policy.one_step.exploration.fill_(config.exploration)
        self._optimiser = Optimiser(
            policy.one_step.network.parameters(), config.one_step_learning_rate, clip=10.0
        )

    @torch.no_grad()
    def propose(self, features: Tensor) -> Tensor:
        """One chunk: of the one-step actor once it acts, before that of the flow."""
        if self.policy.one_step.active:
            chunks = self.policy.sample_one_step(features, generator=self._generator)
            return self.policy.clip(chunks)[:, None]
        return self.policy.sample(features, generator=self._generator)[:, None]

    def update(self, features: Tensor, warm: bool) -> dict[str, float]:
        """Distil, and once the critics are warm climb them too; from then on the one-step actor acts."""
        policy, config = self.policy, self.config
        noise = policy.flow.start((len(features), policy.flow.dim), features, self._generator)
        chunk = policy.sample_one_step(features, noise)
        overshoot = chunk - policy.clip(chunk).detach()
        loss = overshoot.square().mean()
        metrics = {"one_step_overshoot": float(loss.detach())}
        if config.bc_weight:
            with torch.no_grad():
                shown = policy.sample(features, noise)
            distance = (chunk - shown).square().mean()
            loss = loss + config.bc_weight * distance
            metrics["one_step_distance"] = float(distance.detach())
        if warm:
            value = self._value(features, chunk - overshoot.detach())
            scale = value.detach().abs().mean().clamp_min(1e-3)
            loss = loss - config.q_weight * value.mean() / scale
            metrics["one_step_value"] = float(value.detach().mean())
        self._optimiser.step(loss)
        policy.one_step.active.fill_(warm or not config.bc_weight)
        return metrics

    def _value(self, features: Tensor, chunk: Tensor) -> Tensor:
        """mean_m Q_m (B,), whose gradient reaches the chunk (B, C, A) and leaves the critics alone."""
        critic = self.policy.critic.requires_grad_(False)
        value = self.policy.value(features, chunk)
        critic.requires_grad_(True)
        return value

    def state_dict(self) -> dict[str, Any]:
        """The actor itself is the policy's."""
        active = bool(self.policy.one_step.active)
        return {"active": active, "optimiser": self._optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.policy.one_step.active.fill_(state["active"])
        self._optimiser.load_state_dict(state["optimiser"])


IMPROVEMENTS = {"best_of_n": BestOfN, "one_step": OneStep}
