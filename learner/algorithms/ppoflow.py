"""PPOFlow (Choi et al. 2026): PPO on the exact likelihood of a flow policy's noisy integration path.

The encoder is frozen: features are computed once an iteration. The critic sees the twin's privileged state and the
proprioception; it knows no time, so a time-out bootstraps (see gae).

    log pi(path | o) = sum_k log N(x_{k+1}; x_k + v / K, sigma^2),   r = (pi / pi_old)^s
    L = -E[min(r A, clip(r, 1 - eps, 1 + eps) A)] + w_anchor * L_flow(demonstrations)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from learner.algorithms.sft import ImitationData
from learner.features import encode
from learner.rollout import Rollout, gae, rollout
from policies.critic import StateValue
from policies.policy import Policy
from twinrl.core.segment import Segment


@dataclass(frozen=True)
class PPOFlowConfig:
    """Settings of PPOFlow."""

    gamma: float = 0.99  # per control step
    lam: float = 0.95  # GAE, per chunk
    clip: float = 0.2
    ratio_power: float = 0.3  # s, at K = 2; the more integration steps, the smaller
    learning_rate: float = 1e-5  # flow and noise heads, at the start: it adapts to max_kl
    critic_learning_rate: float = 1e-3
    epochs: int = 4
    critic_updates: int = 48  # minibatches an iteration
    critic_memory: int = (
        8  # iterations whose states the critic keeps fitting, with targets of today
    )
    minibatch: int = 256  # chunks
    gradient_norm: float = 0.5
    max_kl: float = 0.03  # tempered KL at which an iteration's policy epochs stop
    critic_warmup: int = 3  # iterations before the policy moves
    anchor: float = 0.1  # weight of flow matching on demonstrations
    anchor_batch: int = 64
    max_behaviour_weight: float = 2.0  # truncation of pi_prox / pi_behaviour where the policy lags


class PPOFlow:
    """Updates a policy's flow head from whole on-policy segments, each given once."""

    def __init__(
        self,
        policy: Policy,
        config: PPOFlowConfig,
        privileged_dim: int,
        anchor: ImitationData | None = None,
        seed: int = 0,
    ) -> None:
        self.policy, self.config, self.anchor = policy, config, anchor
        self.value = StateValue(privileged_dim + len(policy.state_normaliser.centre))
        self.iteration = 0
        self._memory: list[dict[str, Tensor]] = []
        self._generator = torch.Generator().manual_seed(seed)
        self._parameters = list(policy.flow.parameters())
        # Optimisers of their own: the ratio power scales the policy's gradient, not the critic's.
        self._optimiser = torch.optim.Adam(self._parameters, config.learning_rate, fused=True)
        self._critic_optimiser = torch.optim.Adam(
            self.value.network.parameters(), config.critic_learning_rate, fused=True
        )

    def update(self, segments: Sequence[Segment], version: int) -> dict[str, float]:
        """One PPO iteration on `segments`; `version` is that of the weights the policy holds now."""
        data = rollout(segments, self.config.gamma)
        features = encode(self.policy, data.observation, data.instruction)
        transitions = _transitions(data)
        if self.iteration == 0:
            self.value.normaliser.fit_moments(transitions["critic"], minimum_scale=1e-3)
        self._memory = [*self._memory, transitions][-self.config.critic_memory :]
        advantage, target = self._advantages(transitions)
        metrics = {
            "chunks": float(len(advantage)),
            "advantage_std": float(advantage.std()),
            "value_mean": float(target.mean()),
            "lag": float(version - data.version.mean()),
            "critic_loss": self._fit_critic(),
        }
        self.iteration += 1
        if self.iteration > self.config.critic_warmup:
            metrics |= self._improve(data, features, advantage, version)
        return metrics

    @torch.no_grad()
    def _advantages(self, transitions: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Advantages (M,) and value targets (M,), advantage + value, under the present critic."""
        value = self.value(transitions["critic"]).numpy()
        next_value = self.value(transitions["next_critic"]).numpy()
        reward, discount, terminated, chained = (
            transitions[key].numpy() for key in ("reward", "discount", "terminated", "chained")
        )
        advantage = gae(reward, discount, value, next_value, terminated, chained, self.config.lam)
        return torch.from_numpy(advantage), torch.from_numpy(advantage + value)

    def _fit_critic(self) -> float:
        """Regress the value of the last iterations' states on today's targets; -> mean loss.

        An iteration alone has too few episodes for a value function, and a policy that moves little in one has
        nearly the values of the ones before.
        """
        states = torch.cat([transitions["critic"] for transitions in self._memory])
        targets = torch.cat([self._advantages(transitions)[1] for transitions in self._memory])
        losses = []
        for _ in range(self.config.critic_updates):
            rows = torch.randint(len(states), (self.config.minibatch,), generator=self._generator)
            loss = functional.mse_loss(self.value(states[rows]), targets[rows])
            self._critic_optimiser.zero_grad()
            loss.backward()
            self._critic_optimiser.step()
            losses.append(float(loss.detach()))
        return float(np.mean(losses)) if losses else float("nan")

    def _improve(
        self, data: Rollout, features: Tensor, advantage: Tensor, version: int
    ) -> dict[str, float]:
        config = self.config
        path = torch.as_tensor(data.path)
        proximal, behaviour_weight = self._proximal(data, features, path, version)
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        kls, clipped, anchors, norms = [], [], [], []
        stopped = False
        for rows in self._minibatches(len(path), config.epochs):
            log_ratio = config.ratio_power * (
                self.policy.path_log_prob(features[rows], path[rows]) - proximal[rows]
            )
            ratio = log_ratio.exp()
            with torch.no_grad():  # Schulman's low-variance estimate, of the tempered ratio
                kl = float((ratio - 1.0 - log_ratio).mean())
            stopped = kl > config.max_kl
            if stopped:
                break
            objective = torch.minimum(
                ratio * advantage[rows],
                ratio.clamp(1.0 - config.clip, 1.0 + config.clip) * advantage[rows],
            )
            loss = -(behaviour_weight[rows] * objective).mean()
            if self.anchor is not None and config.anchor:
                imitation = self.anchor.loss(
                    self.policy.flow, config.anchor_batch, 1, self._generator
                )
                loss = loss + config.anchor * imitation
                anchors.append(float(imitation.detach()))
            self._optimiser.zero_grad()
            loss.backward()
            norms.append(float(nn.utils.clip_grad_norm_(self._parameters, config.gradient_norm)))
            self._optimiser.step()
            kls.append(kl)
            clipped.append(float(((ratio - 1.0).abs() > config.clip).float().mean()))
        self._adapt(len(kls), stopped, kls[-1] if kls else 0.0, len(path))
        return {
            "kl": kls[-1] if kls else float("nan"),
            "clip_fraction": float(np.mean(clipped)) if clipped else float("nan"),
            "first_kl": kls[0]
            if kls
            else float("nan"),  # 0 but for rounding, unless the policy lags
            "gradient_norm": float(np.mean(norms)) if norms else float("nan"),
            "updates": float(len(kls)),
            "learning_rate": self._optimiser.param_groups[0]["lr"],
            "anchor_loss": float(np.mean(anchors)) if anchors else float("nan"),
            "behaviour_weight": float(behaviour_weight.mean()),
        }

    def _adapt(self, updates: int, stopped: bool, kl: float, chunks: int) -> None:
        """Let the learning rate follow the KL: many small steps on an iteration's data, up to max_kl.

        A likelihood is as steep as its noise is small, so no learning rate suits all K and noise bands.
        """
        planned = self.config.epochs * math.ceil(chunks / self.config.minibatch)
        group = self._optimiser.param_groups[0]
        if stopped and updates < 0.7 * planned:
            group["lr"] = max(group["lr"] / 1.5, 1e-7)
        elif not stopped and kl < 0.5 * self.config.max_kl:
            group["lr"] = min(group["lr"] * 1.5, 1e-3)

    @torch.no_grad()
    def _proximal(
        self, data: Rollout, features: Tensor, path: Tensor, version: int
    ) -> tuple[Tensor, Tensor]:
        """Log-probability (M,) of the proximal policy, and (pi_prox / pi_behaviour)^s (M,).

        Decoupled PPO (Hilton et al. 2022): the clip is centred on the policy as it is now, and data of older
        versions are corrected by a truncated importance weight. Without lag the two policies are one: the stored
        log-probability serves and the weight is 1.
        """
        behaviour = torch.as_tensor(data.log_prob)
        lagging = torch.from_numpy(data.version < version)
        if not lagging.any():
            return behaviour, torch.ones_like(behaviour)
        present = torch.cat(
            [
                self.policy.path_log_prob(features[rows], path[rows])
                for rows in torch.arange(len(path)).split(1024)
            ]
        )
        proximal = torch.where(lagging, present, behaviour)
        weight = (self.config.ratio_power * (proximal - behaviour)).exp()
        return proximal, weight.clamp(max=self.config.max_behaviour_weight)

    def _minibatches(self, count: int, epochs: int):
        for _ in range(epochs):
            yield from torch.randperm(count, generator=self._generator).split(self.config.minibatch)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the policy's weights and the anchor's data."""
        return {
            "iteration": self.iteration,
            "memory": self._memory,
            "value": self.value.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "critic_optimiser": self._critic_optimiser.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.iteration = state["iteration"]
        self._memory = list(state["memory"])
        self.value.load_state_dict(state["value"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._critic_optimiser.load_state_dict(state["critic_optimiser"])
        self._generator.set_state(state["generator"])


def _transitions(data: Rollout) -> dict[str, Tensor]:
    """What the critic is fitted to: a rollout without images and paths."""
    names = ("critic", "next_critic", "reward", "discount", "terminated", "chained")
    return {name: torch.from_numpy(getattr(data, name)) for name in names}
