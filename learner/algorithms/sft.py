"""Supervised fine-tuning: flow matching on demonstrated action chunks (pi0, Black et al. 2024).

L = E || v(x_t, t | o) - (A - eps) ||^2 with x_t = (1 - t) eps + t A, masked where no action was demonstrated.

On windows of interventions (source `real`) the same is HG-DAgger (Kelly et al. 2019): a person takes over where the
policy goes wrong, and only what the person did is cloned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner import distributed
from learner.dataset import Windows, concatenate, held_out, source_probabilities
from learner.features import encode, feature_bytes
from learner.optimiser import Optimiser, warm_cosine
from learner.overfitting import Overfitting
from policies.flow import FlowExpert
from policies.policy import Policy
from policies.weights import published

FEATURE_MEMORY = (
    8 << 30
)  # bytes of features that are kept; beyond it windows are encoded when they are drawn
SAMPLE = 512  # windows that a validation looks at, and whose features stand for all


@dataclass(frozen=True)
class SFTConfig:
    """Settings of supervised fine-tuning."""

    steps: int = 1000  # gradient steps
    batch: int = 256  # windows a step, of all ranks together
    accumulate: int = 1  # parts in which a batch is computed, where it does not fit into memory
    draws: int = 2  # pairs (t, eps) for each window
    time: str = "uniform"  # how t is drawn: uniform, or beta as in pi0
    learning_rate: float = 1e-3  # peak; linear warm-up, then cosine to zero
    warmup: int = 100  # steps
    weight_decay: float = 1e-4
    gradient_norm: float = 1.0
    ema: float = 0.999  # decay of the averaged weights, which are the result
    train_encoder: bool = (
        False  # also what requires a gradient before the features (all of it, or adapters)
    )
    shares: Mapping[str, float] = field(
        default_factory=lambda: {"demo": 0.5, "twin": 0.5}
    )  # how often each source is drawn
    validation: float = 0.0  # share of episodes that are kept from training
    validate_every: int = 100  # steps between looks at them
    patience: int = (
        5  # looks without improvement, while the training loss falls, that are called overfitting
    )

    def __post_init__(self) -> None:
        if self.time not in ("uniform", "beta"):
            raise ValueError(f"time is {self.time!r}: one of uniform, beta")
        if not 0.0 <= self.validation < 1.0:
            raise ValueError(f"validation is {self.validation}, must be at least 0 and below 1")
        for name in ("steps", "batch", "accumulate", "draws", "validate_every", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")


class ImitationData:
    """Windows, drawn by source: what flow-matching losses train on.

    Normally their features are computed once, since the encoder is frozen. With `trained` they are encoded at each
    draw, with gradient; and without it, where all features would take more than FEATURE_MEMORY.
    """

    def __init__(
        self,
        policy: Policy,
        windows: Windows,
        shares: Mapping[str, float],
        time: str = "uniform",
        trained: bool = False,
    ) -> None:
        self._shares, self._time, self._trained = dict(shares), time, trained
        self._policy = policy
        self._kept = not trained and len(windows) * feature_bytes(policy) <= FEATURE_MEMORY
        width, device = policy.chunk * windows.action.shape[-1], policy.device
        self._features = torch.zeros(0, *policy.feature_shape, device=device)  # (N, ...) if kept
        self._windows: Windows | None = None  # if features are not kept
        self.mask = self.chunk = torch.zeros(0, width, device=device)  # (N, D), chunks normalised
        self._source = np.zeros(0, np.int64)
        self.extend(policy, windows)

    def extend(self, policy: Policy, windows: Windows) -> None:
        """Add windows; only these are encoded."""
        if self._kept:
            features = encode(policy, windows.observation, windows.instruction)
            self._features = torch.cat([self._features, features])
        else:
            earlier = [self._windows] if self._windows is not None else []
            self._windows = concatenate([*earlier, windows])
        mask = torch.as_tensor(windows.mask, device=policy.device)[..., None]
        mask = mask.expand(-1, -1, windows.action.shape[-1]).flatten(1).contiguous()
        action = torch.as_tensor(windows.action, device=policy.device)
        chunk = policy.action_normaliser(action).flatten(1) * mask
        self.mask, self.chunk = torch.cat([self.mask, mask]), torch.cat([self.chunk, chunk])
        self._source = np.concatenate([self._source, windows.source])
        self._probability = torch.as_tensor(source_probabilities(self._source, self._shares))

    def __len__(self) -> int:
        return len(self.chunk)

    @property
    def features(self) -> Tensor:
        """Features (N, ...) of all windows; of the first SAMPLE where they are not kept."""
        if self._kept:
            return self._features
        assert self._windows is not None
        first = self._windows.take(np.arange(min(SAMPLE, len(self))))
        return encode(self._policy, first.observation, first.instruction)

    def loss(self, flow: FlowExpert, batch: int, draws: int, generator: torch.Generator) -> Tensor:
        """Mean flow-matching loss of `batch` drawn windows; with several ranks of this rank's share of them.

        Its average over ranks is that of the whole batch: all ranks draw all of it from equal generators.
        """
        rows, points = self.draw(flow, batch, draws, generator)
        return self.losses(flow, rows, points).sum() * (distributed.size() / batch)

    def draw(
        self, flow: FlowExpert, batch: int, draws: int, generator: torch.Generator
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """This rank's share of `batch` windows: their rows (n,), and points t (n, draws, 1), eps (n, draws, D)."""
        rows = torch.multinomial(self._probability, batch, replacement=True, generator=generator)
        t, eps = flow.matching_points(self.mask[rows], draws, generator, self._time)
        return distributed.share(rows), (distributed.share(t), distributed.share(eps))

    def losses(self, flow: FlowExpert, rows: Tensor, points: tuple[Tensor, Tensor]) -> Tensor:
        """Flow-matching loss (n,) of the windows `rows` at given points."""
        features = self._features[rows] if self._kept else self._encoded(rows)
        return flow.matching_loss(features, self.chunk[rows], self.mask[rows], points=points)

    def arrays(self, rows: Tensor) -> dict[str, Any]:
        """What the windows `rows` hold, to be looked at by a person."""
        held: dict[str, Any] = {"rows": rows, "chunk": self.chunk[rows], "mask": self.mask[rows]}
        if self._windows is None:
            return {**held, "features": self._features[rows]}
        return {**held, **self._windows.take(rows.numpy()).observation}

    def _encoded(self, rows: Tensor) -> Tensor:
        assert self._windows is not None
        drawn = self._windows.take(rows.cpu().numpy())
        with torch.set_grad_enabled(self._trained and torch.is_grad_enabled()):
            return self._policy.encode(
                self._policy.to_tensors(drawn.observation), drawn.instruction
            )


class SFT:
    """Trains the flow expert on windows, and with `train_encoder` what comes before it.

    With `validation`, some episodes are kept apart: now and then the averaged weights' loss on them is looked at, always
    on the same windows, times and noise.
    """

    def __init__(self, policy: Policy, config: SFTConfig, windows: Windows, seed: int = 0) -> None:
        """Fits the policy's view of the state to `windows`; its actions' scale is the caller's (fit_actions)."""
        self.policy, self.config, self.step = policy, config, 0
        distributed.broadcast(published(policy).values())
        apart = (
            held_out(windows.episode, config.validation) if windows.episode else np.zeros(0, bool)
        )
        training = windows.take(~apart) if apart.any() else windows
        policy.fit_states(training.state)
        options = (config.shares, config.time, config.train_encoder)
        self.data = ImitationData(policy, training, *options)
        self._generator = torch.Generator().manual_seed(seed)
        self._parameters = [each for each in policy.flow.parameters() if each.requires_grad]
        if config.train_encoder:
            self._parameters += self._encoder_parameters()
        self._optimiser = Optimiser(
            self._parameters,
            config.learning_rate,
            weight_decay=config.weight_decay,
            clip=config.gradient_norm,
            schedule=warm_cosine(config.steps, config.warmup),
        )
        self._average = [parameter.detach().clone() for parameter in self._parameters]
        self.overfitting = Overfitting(config.patience)
        self.validation: ImitationData | None = None
        if apart.any():
            self.validation = ImitationData(policy, windows.take(apart), *options)
            still = torch.Generator().manual_seed(seed + 1)
            self._looked_at = self.validation.draw(policy.flow, SAMPLE, config.draws, still)

    def _encoder_parameters(self) -> list[torch.nn.Parameter]:
        trained = [each for each in self.policy.encoder_parameters() if each.requires_grad]
        if not trained:
            raise ValueError(
                "train_encoder is true, but nothing in the encoder requires a gradient"
            )
        return trained

    @property
    def done(self) -> bool:
        """All gradient steps were made."""
        return self.step >= self.config.steps

    def update(self) -> dict[str, float]:
        """One gradient step; after the last one the policy holds the averaged weights."""
        config, flow = self.config, self.policy.flow
        rows, points = self.data.draw(flow, config.batch, config.draws, self._generator)
        total = 0.0
        for part in range(config.accumulate):
            taken = slice(part, None, config.accumulate)
            losses = self.data.losses(flow, rows[taken], tuple(each[taken] for each in points))
            loss = losses.sum() * (distributed.size() / config.batch)
            total += float(loss.detach())
            if part < config.accumulate - 1:
                self._optimiser.accumulate(loss)
        norm = self._optimiser.step(
            loss, lambda: {**self.data.arrays(rows), "t": points[0], "eps": points[1]}
        )
        self.step += 1
        # A young average follows quickly, so that it never remembers the initial weights.
        decay = min(config.ema, (1.0 + self.step) / (10.0 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self._average, self._parameters, 1.0 - decay)
        metrics = {"flow_loss": total, "gradient_norm": norm, "skipped": self._optimiser.skipped}
        self.overfitting.trained(total)
        if self.validation is not None and (self.step % config.validate_every == 0 or self.done):
            metrics["validation_loss"] = self.validate()
            self.overfitting.look(self.step, metrics["validation_loss"])
        if self.done:
            with torch.no_grad():
                torch._foreach_copy_(self._parameters, self._average)
        return metrics

    @torch.no_grad()
    def validate(self) -> float:
        """The averaged weights' loss on episodes that were kept apart."""
        assert self.validation is not None
        rows, (t, eps) = self._looked_at
        at_once = max(1, self.config.batch // self.config.accumulate)
        total = 0.0
        with self._averaged():
            for part in zip(rows.split(at_once), t.split(at_once), eps.split(at_once), strict=True):
                losses = self.validation.losses(self.policy.flow, part[0], part[1:])
                total += float(losses.sum())
        return distributed.mean([total * distributed.size() / SAMPLE])[0]

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The policy holds the averaged weights while this lasts."""
        own = [parameter.detach().clone() for parameter in self._parameters]
        torch._foreach_copy_(self._parameters, self._average)
        try:
            yield
        finally:
            torch._foreach_copy_(self._parameters, own)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the policy's weights and the data."""
        return {
            "step": self.step,
            "average": self._average,
            "optimiser": self._optimiser.state_dict(),
            "generator": self._generator.get_state(),
            "overfitting": self.overfitting.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.step = state["step"]
        for mine, theirs in zip(self._average, state["average"], strict=True):
            mine.copy_(theirs)
        self._optimiser.load_state_dict(state["optimiser"])
        self._generator.set_state(state["generator"])
        self.overfitting.load_state_dict(state["overfitting"])
