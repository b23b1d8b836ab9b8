"""PPOFlow (Choi et al. 2026): PPO on the exact likelihood of a flow policy's noisy integration path.

The encoder is frozen: features are computed once an iteration. The critic sees the twin's privileged state and the
proprioception, or, where nothing is privileged, what the policy sees; it knows no time, so a time-out bootstraps (see gae).

    log pi(path | o) = sum_k log N(x_{k+1}; x_k + v / K, sigma^2),   r = (pi / pi_old)^s
    L = -E[min(r A, clip(r, 1 - eps, 1 + eps) A)] + w_anchor * L_flow(demonstrations)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from learner import distributed
from learner.algorithms.sft import ImitationData
from learner.features import encode
from learner.optimiser import Optimiser
from learner.rollout import Rollout, gae, rollout
from policies.critic import StateValue
from policies.policy import Policy
from twinrl.core.segment import Segment

CRITICS = ("auto", "state", "features")
LIKELIHOOD_ROWS = 1024  # chunks whose likelihood is computed at once


@dataclass(frozen=True)
class PPOFlowConfig:
    """Settings of PPOFlow."""

    gamma: float = 0.99  # per control step
    lam: float = 0.95  # GAE, per chunk
    clip: float = 0.2
    ratio_power: float = 0.3  # s, at K = 2; the more integration steps, the smaller
    noise: str = "head"  # exploration: the learnable noise head, or "sde" (Flow-SDE)
    learning_rate: float = 1e-5  # flow and noise heads, at the start: it adapts to max_kl
    max_learning_rate: float = 1e-3
    critic: str = (
        "auto"  # what it sees: "state" (privileged and proprioception), or the policy's "features"
    )
    critic_hidden: int = 256
    critic_learning_rate: float = 1e-3
    normalise_values: bool = False  # for returns that are far from 0 .. 1
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
    train_encoder: bool = (
        False  # what comes before the flow too; of pi0 that is LoRA, as in the paper
    )


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
        if config.critic not in CRITICS:
            raise ValueError(f"critic {config.critic!r}: one of {', '.join(CRITICS)}")
        self.policy, self.config, self.anchor = policy, config, anchor
        # Without cameras the state is all that the policy sees, and the shorter of the two.
        blind = config.critic == "auto" and not privileged_dim and bool(policy.cameras)
        self._on_features = config.critic == "features" or blind
        state_dim = privileged_dim + len(policy.state_normaliser.centre)
        dim = policy.flow.summary_dim if self._on_features else state_dim
        self.value = StateValue(dim, config.critic_hidden).to(policy.device)
        self._value_centre, self._value_scale = 0.0, 1.0
        self.iteration = 0
        self._memory: list[dict[str, Tensor]] = []
        self._generator = torch.Generator().manual_seed(seed)
        # Optimisers of their own: the ratio power scales the policy's gradient, not the critic's.
        parameters = list(policy.flow.parameters())
        if config.train_encoder:
            parameters += policy.encoder_parameters()
        self._optimiser = Optimiser(parameters, config.learning_rate, clip=config.gradient_norm)
        self._critic_optimiser = Optimiser(
            self.value.network.parameters(), config.critic_learning_rate
        )

    def update(self, segments: Sequence[Segment], version: int) -> dict[str, float]:
        """One PPO iteration on `segments`; `version` is that of the weights the policy holds now."""
        data = rollout(segments, self.config.gamma)
        features = encode(self.policy, data.observation, data.instruction)
        transitions = self._transitions(data, features)
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

    # -- values ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _transitions(self, data: Rollout, features: Tensor) -> dict[str, Tensor]:
        """What the critic is fitted to, on the policy's device: a rollout without images and paths."""
        if self._on_features:
            here = self.policy.summary(features)
            final = encode(self.policy, data.final, data.final_instruction)
            after = here.roll(-1, 0)
            after[torch.from_numpy(data.last)] = self.policy.summary(final)
        else:
            here, after = (self._tensor(rows) for rows in (data.critic, data.next_critic))
        names = ("reward", "discount", "terminated", "chained")
        rest = {name: torch.from_numpy(getattr(data, name)) for name in names}
        return {"critic": here, "next_critic": after, **rest}

    @torch.no_grad()
    def _advantages(self, transitions: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Advantages (M,) and value targets (M,), advantage + value, under the present critic."""
        states = torch.cat([transitions["critic"], transitions["next_critic"]])
        values = self._value_centre + self._value_scale * self.value(states).cpu().numpy()
        value, next_value = np.split(values, 2)
        reward, discount, terminated, chained = (
            transitions[key].numpy() for key in ("reward", "discount", "terminated", "chained")
        )
        advantage = gae(reward, discount, value, next_value, terminated, chained, self.config.lam)
        return self._tensor(advantage), self._tensor(advantage + value)

    def _fit_critic(self) -> float:
        """Regress the value of the last iterations' states on today's targets; -> mean loss.

        An iteration alone has too few episodes for a value function, and a policy that moves little in one has
        nearly the values of the ones before.
        """
        states = torch.cat([transitions["critic"] for transitions in self._memory])
        targets = torch.cat([self._advantages(transitions)[1] for transitions in self._memory])
        if self.config.normalise_values:
            self._rescale_values(targets)
        targets = (targets - self._value_centre) / self._value_scale
        total = 0.0
        for _ in range(self.config.critic_updates):
            rows = torch.randint(len(states), (self.config.minibatch,), generator=self._generator)
            own, weight = distributed.share(rows), distributed.size() / len(rows)
            error = functional.mse_loss(self.value(states[own]), targets[own], reduction="sum")
            loss = error * weight
            self._critic_optimiser.step(loss)
            total += float(loss.detach())
        count = self.config.critic_updates
        return self._value_scale**2 * total / count if count else float("nan")

    @torch.no_grad()
    def _rescale_values(self, targets: Tensor) -> None:
        """Let the network's unit follow the targets' moments; its last layer keeps what it says (PopArt, van Hasselt 2016).

        Before anything was learned there is nothing to keep.
        """
        centre, scale = float(targets.mean()), max(float(targets.std()), 1e-3)
        if self.iteration:
            last = self.value.network[-1]
            last.weight.mul_(self._value_scale / scale)
            last.bias.mul_(self._value_scale).add_(self._value_centre - centre).div_(scale)
        self._value_centre, self._value_scale = centre, scale

    # -- policy ------------------------------------------------------------------------------------------

    def _improve(
        self, data: Rollout, features: Tensor, advantage: Tensor, version: int
    ) -> dict[str, float]:
        config = self.config
        path, mask = self._tensor(data.path), self._executed(data)
        proximal, behaviour_weight = self._proximal(data, features, path, mask, version)
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        kls, clipped, anchors, norms = [], [], [], []
        stopped = False
        for whole in self._minibatches(len(path), config.epochs):
            # With several ranks, all have the same segments and each computes its share of a minibatch.
            rows, weight = distributed.share(whole), distributed.size() / len(whole)
            executed = None if mask is None else mask[rows]
            seen = self._encoded(data, rows) if config.train_encoder else features[rows]
            log_prob = self.policy.flow.path_log_prob(seen, path[rows], executed)
            log_ratio = config.ratio_power * (log_prob - proximal[rows])
            ratio = log_ratio.exp()
            with torch.no_grad():  # Schulman's low-variance estimate, of the tempered ratio
                kl = float((ratio - 1.0 - log_ratio).sum() * weight)
            kl = distributed.mean([kl])[0]
            stopped = kl > config.max_kl
            if stopped:
                break
            objective = torch.minimum(
                ratio * advantage[rows],
                ratio.clamp(1.0 - config.clip, 1.0 + config.clip) * advantage[rows],
            )
            loss = -(behaviour_weight[rows] * objective).sum() * weight
            if self.anchor is not None and config.anchor:
                imitation = self.anchor.loss(
                    self.policy.flow, config.anchor_batch, 1, self._generator
                )
                loss = loss + config.anchor * imitation
                anchors.append(float(imitation.detach()))
            norms.append(self._optimiser.step(loss))
            kls.append(kl)
            clipped.append(float(((ratio - 1.0).abs() > config.clip).float().sum() * weight))
        self._adapt(len(kls), stopped, kls[-1] if kls else 0.0, len(path))
        return {
            "kl": kls[-1] if kls else float("nan"),
            "clip_fraction": float(np.mean(clipped)) if clipped else float("nan"),
            "first_kl": kls[0]
            if kls
            else float("nan"),  # 0 but for rounding, unless the policy lags
            "gradient_norm": float(np.mean(norms)) if norms else float("nan"),
            "updates": float(len(kls)),
            "learning_rate": self._optimiser.learning_rate,
            "anchor_loss": float(np.mean(anchors)) if anchors else float("nan"),
            "behaviour_weight": float(behaviour_weight.mean()),
        }

    def _encoded(self, data: Rollout, rows: Tensor) -> Tensor:
        """Features (B, ...) of the chunks `rows`, with gradient."""
        chosen = rows.cpu().numpy()
        observation = {key: column[chosen] for key, column in data.observation.items()}
        instruction = [data.instruction[row] for row in chosen]
        return self.policy.encode(self.policy.to_tensors(observation), instruction)

    def _executed(self, data: Rollout) -> Tensor | None:
        """(M, D) float32, 1 where a number of the chunk was executed; None where all count.

        At K = 1 the numbers are independent given x_0, and what nobody executed has no part in the reward. With more
        steps they are not, and the path counts as a whole.
        """
        chunk, steps = self.policy.chunk, data.path.shape[1] - 1
        if steps > 1 or (data.length == chunk).all():
            return None
        executed = np.arange(chunk) < data.length[:, None]
        return self._tensor(executed.repeat(self.policy.action_dim, 1).astype(np.float32))

    def _adapt(self, updates: int, stopped: bool, kl: float, chunks: int) -> None:
        """Let the learning rate follow the KL: many small steps on an iteration's data, up to max_kl.

        A likelihood is as steep as its noise is small, so no learning rate suits all K and noise bands.
        """
        planned = self.config.epochs * math.ceil(chunks / self.config.minibatch)
        rate = self._optimiser.learning_rate
        if stopped and updates < 0.7 * planned:
            self._optimiser.learning_rate = max(rate / 1.5, 1e-7)
        elif not stopped and kl < 0.5 * self.config.max_kl:
            self._optimiser.learning_rate = min(rate * 1.5, self.config.max_learning_rate)

    @torch.no_grad()
    def _proximal(
        self, data: Rollout, features: Tensor, path: Tensor, mask: Tensor | None, version: int
    ) -> tuple[Tensor, Tensor]:
        """Log-probability (M,) of the proximal policy, and (pi_prox / pi_behaviour)^s (M,).

        Decoupled PPO (Hilton et al. 2022): the clip is centred on the policy as it is now, and data of older
        versions are corrected by a truncated importance weight. Without lag the two policies are one: the stored
        log-probability serves and the weight is 1. Where a mask leaves numbers out, the stored sum does not say what
        the rest had, so the proximal policy is asked; the weight stays that of the whole chunk, whose mean over what
        was not executed is the weight of what was.
        """
        behaviour = self._tensor(data.log_prob)
        lagging = self._tensor(data.version < version)
        proximal, weight = behaviour, torch.ones_like(behaviour)
        if lagging.any():
            proximal = torch.where(lagging, self._log_prob(features, path), behaviour)
            weight = (self.config.ratio_power * (proximal - behaviour)).exp()
        if mask is not None:
            proximal = self._log_prob(features, path, mask)
        return proximal, weight.clamp(max=self.config.max_behaviour_weight)

    def _log_prob(self, features: Tensor, path: Tensor, mask: Tensor | None = None) -> Tensor:
        """Log-probability (M,) of all paths under the present policy."""
        parts = []
        for start in range(0, len(path), LIKELIHOOD_ROWS):
            rows = slice(start, start + LIKELIHOOD_ROWS)
            executed = None if mask is None else mask[rows]
            parts.append(self.policy.flow.path_log_prob(features[rows], path[rows], executed))
        return torch.cat(parts)

    def _minibatches(self, count: int, epochs: int) -> Iterator[Tensor]:
        for _ in range(epochs):
            yield from torch.randperm(count, generator=self._generator).split(self.config.minibatch)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.policy.device)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the policy's weights and the anchor's data."""
        return {
            "iteration": self.iteration,
            "memory": self._memory,
            "value": self.value.state_dict(),
            "value_moments": (self._value_centre, self._value_scale),
            "optimiser": self._optimiser.state_dict(),
            "critic_optimiser": self._critic_optimiser.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.iteration = state["iteration"]
        self._memory = list(state["memory"])
        self.value.load_state_dict(state["value"])
        self._value_centre, self._value_scale = state["value_moments"]
        self._optimiser.load_state_dict(state["optimiser"])
        self._critic_optimiser.load_state_dict(state["critic_optimiser"])
        self._generator.set_state(state["generator"])
