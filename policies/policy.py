"""What every policy is: an encoder whose features condition a flow over action chunks, and how it acts.

Algorithms, runners and evaluation know this class only. A subclass brings networks: `encode`, and an expert
(policies/flow.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from policies.critic import ChunkCritic
from policies.flow import FlowExpert, gaussian
from policies.normalise import Normaliser, check_method
from policies.one_step import OneStepActor
from twinrl.env import ACTION_DIM, STATE, image_key

TRANSLATION, ROTATION = slice(0, 3), slice(3, 6)  # of an action: m, and a rotation vector in rad
GRIPPER = 6  # the action's last number: 0 closed .. 1 open
GRIPPERS = ("continuous", "binary")
ROTATIONS = ("vector", "none")


class Policy(nn.Module):
    """Images + instruction + state -> features -> flow-matching chunk of C actions.

    Shapes: B rows, C = `chunk` actions of A = `action_dim` numbers, D = C * A, K integration steps. Features are
    (B, *`feature_shape`), opaque to algorithms: they keep, index and concatenate rows of them, and give them back.
    Inside, chunks are normalised; `act` gives physical units and clips to `action_low` .. `action_high` there and
    nowhere else, so that a stored path has the likelihood it was drawn with.
    """

    feature_shape: tuple[int, ...]

    def __init__(
        self,
        *,
        expert: FlowExpert,
        state_dim: int,
        cameras: Sequence[str],
        chunk: int,
        action_dim: int = ACTION_DIM,
        integration_steps: int = 10,
        critics: int = 0,
        critic_hidden: int = 256,
        one_step: bool = False,
        action_normalisation: str = "quantiles",
        state_normalisation: str = "moments",
        gripper: str = "continuous",
        rotation: str = "vector",
    ) -> None:
        """`gripper`: "binary" executes what is predicted at or above 0.5 as open and the rest as closed. `rotation`:
        "none" where an action's numbers 3 to 5 are no rotation vector."""
        super().__init__()
        check_method(action_normalisation)
        check_method(state_normalisation)
        if gripper not in GRIPPERS:
            raise ValueError(f"gripper {gripper!r}: one of {', '.join(GRIPPERS)}")
        if rotation not in ROTATIONS:
            raise ValueError(f"rotation {rotation!r}: one of {', '.join(ROTATIONS)}")
        self.action_normalisation, self.state_normalisation = (
            action_normalisation,
            state_normalisation,
        )
        self.gripper, self.rotation = gripper, rotation
        self.cameras = tuple(cameras)
        self.chunk, self.action_dim = chunk, action_dim
        self.integration_steps = integration_steps
        self.flow = expert
        self.critic = (
            ChunkCritic(expert.summary_dim, chunk, action_dim, critics, critic_hidden)
            if critics
            else None
        )
        self.one_step = (
            OneStepActor(expert.summary_dim, expert.dim, critic_hidden) if one_step else None
        )
        self.state_normaliser = Normaliser(state_dim)
        self.action_normaliser = Normaliser(action_dim)
        self.register_buffer("action_low", torch.full((action_dim,), -torch.inf))
        self.register_buffer("action_high", torch.full((action_dim,), torch.inf))
        # How many chunks `act` draws for the critic to choose from; travels with the weights.
        self.register_buffer("candidates", torch.tensor(1))

    # -- what a subclass brings ----------------------------------------------------------------------------

    def encode(self, observation: Mapping[str, Tensor], instruction: str | Sequence[str]) -> Tensor:
        """`observation.images.<camera>` (B, H, W, 3) uint8, `observation.state` (B, S) -> (B, *feature_shape)."""
        raise NotImplementedError

    def encoder_parameters(self) -> list[nn.Parameter]:
        """Everything before the features; frozen while features are cached."""
        raise NotImplementedError

    # -- the same for all ----------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the policy computes."""
        return self.action_low.device

    def summary(self, features: Tensor) -> Tensor:
        """Features (B, ...) as one vector (B, flow.summary_dim): what critics see."""
        return self.flow.summary(features)

    def to_tensors(self, observation: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """Observation arrays {key: (N, ...)} -> what `encode` takes, on the policy's device."""
        keys = (STATE, *map(image_key, self.cameras))
        return {
            key: torch.from_numpy(np.ascontiguousarray(observation[key])).to(self.device)
            for key in keys
        }

    @torch.no_grad()
    def fit_states(self, states: np.ndarray) -> None:
        """Fit the policy's view of the state to `states` (B, S) of real motion."""
        self.state_normaliser.fit(
            torch.as_tensor(states), self.state_normalisation, minimum_scale=5e-3
        )

    @torch.no_grad()
    def fit_begin(self, states: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        """Fit all views of the state to `states` (B, S), and actions to their range `low` .. `high` (A,), which
        may be infinite: without demonstrations no more is known."""
        self.state_normaliser.fit(
            torch.as_tensor(states), self.state_normalisation, minimum_scale=1e-4
        )
        bottom, top = (torch.as_tensor(a, dtype=torch.float32) for a in (low, high))
        bounded = torch.isfinite(bottom) & torch.isfinite(top)
        normaliser = self.action_normaliser
        normaliser.centre.copy_(torch.where(bounded, (bottom + top) / 2, 0.0))
        normaliser.scale.copy_(torch.where(bounded, (top - bottom) / 2, 1.0))
        self.action_low.copy_(bottom)
        self.action_high.copy_(top)

    @torch.no_grad()
    def fit_actions(self, actions: np.ndarray) -> None:
        """Fit the action's normalisation and execution limits to `actions` (B, A), physical units."""
        values = torch.as_tensor(actions, dtype=torch.float32)
        self.action_normaliser.fit(values, self.action_normalisation)
        # A dimension that the data hardly use keeps a tenth of its kind's scale: it is not blown up.
        scale = self.action_normaliser.scale
        for kind in (TRANSLATION, ROTATION):
            scale[kind] = torch.maximum(scale[kind], 0.1 * scale[kind].max())
        scale.clamp_(min=1e-4)
        self.action_normaliser.fix([GRIPPER], 0.0, 1.0)
        self.action_low.copy_(values.amin(0))
        self.action_high.copy_(values.amax(0))
        self.action_low[GRIPPER], self.action_high[GRIPPER] = 0.0, 1.0

    def velocity(self, features: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Flow velocity (B, D) at normalised chunks `x` (B, D) and times `t` (B, 1)."""
        return self.flow.velocity(features, x, t)

    def sample(
        self,
        features: Tensor,
        noise: Tensor | None = None,
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Noise-free integration -> normalised chunk (B, C, A), a function of `features` and `noise` (B, D)."""
        if noise is None:
            noise = self.flow.start((len(features), self.flow.dim), features, generator)
        x = self.flow.integrate(features, noise, steps or self.integration_steps)
        return x.view(-1, self.chunk, self.action_dim)

    def sample_one_step(
        self,
        features: Tensor,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The one-step actor's normalised chunk (B, C, A), not clipped: a function of `features` and `noise` (B, D)."""
        if noise is None:
            noise = self.flow.start((len(features), self.flow.dim), features, generator)
        return self.one_step(self.summary(features), noise).view(-1, self.chunk, self.action_dim)

    def clip(self, chunk: Tensor) -> Tensor:
        """Normalised (..., A) within what may be executed, still normalised."""
        low, high = map(self.action_normaliser, (self.action_low, self.action_high))
        return torch.clamp(chunk, low, high)

    def sample_path(
        self, features: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """The stochastic policy: raw path (B, K+1, D) and its log-probability (B,)."""
        return self.flow.sample_path(features, self.integration_steps, generator)

    def path_log_prob(self, features: Tensor, path: Tensor) -> Tensor:
        """Log-probability (B,) of a stored raw `path` (B, K+1, D), given its first point."""
        return self.flow.path_log_prob(features, path)

    def value(self, features: Tensor, chunk: Tensor) -> Tensor:
        """Ensemble mean of Q (B,) of whole normalised chunks (B, C, A)."""
        return self.critic(self.summary(features), chunk, chunk.new_ones(chunk.shape[:2])).mean(0)

    def choose(
        self, features: Tensor, candidates: int, generator: torch.Generator | None
    ) -> Tensor:
        """One of `candidates` sampled chunks (B, C, A), normalised: the first, unless all critics prefer another.

        The score of a chunk is the smallest advantage over the first that any critic sees in it. An ensemble that
        disagrees chooses like the policy: picking its largest mean was measured to make a good policy worse.
        """
        batch = len(features)
        tiled = features.repeat_interleave(candidates, dim=0)
        chunks = self.sample(tiled, generator=generator)
        values = self.critic(self.summary(tiled), chunks, chunks.new_ones(chunks.shape[:2]))
        values = values.view(-1, batch, candidates)  # (E, B, N)
        best = (values - values[:, :, :1]).amin(0).argmax(1)
        return chunks.view(batch, candidates, self.chunk, self.action_dim)[
            torch.arange(batch, device=chunks.device), best
        ]

    def physical(self, chunk: Tensor) -> Tensor:
        """Normalised (..., A) -> what is executed: physical units, clipped to what was demonstrated.

        Rotation vectors beyond pi, which the corner of such a box may hold, become the shortest ones that turn alike,
        and a binary gripper is opened or closed.
        """
        action = torch.clamp(
            self.action_normaliser.inverse(chunk), self.action_low, self.action_high
        )
        if self.action_dim <= GRIPPER:
            return action
        if self.rotation == "vector":
            action[..., ROTATION] = shortest(action[..., ROTATION])
        if self.gripper == "binary":
            action[..., GRIPPER] = (action[..., GRIPPER] >= 0.5).to(action.dtype)
        return action

    @torch.no_grad()
    def act(
        self,
        observation: Mapping[str, np.ndarray],
        instruction: str | Sequence[str],
        generator: torch.Generator,
        explore: bool,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Observation arrays (N, ...) -> chunk (N, C, A) float32 in physical units, and info.

        `explore`: draw from the stochastic policy; info holds `path` (N, K+1, D) and `log_prob` (N,) float32.
        Otherwise integrate without noise, choosing among `candidates` chunks where that is above 1.
        Where the one-step actor is active it acts in either case, and exploring adds its own noise; info is empty.
        """
        tensors = self.to_tensors(observation)
        features = self.encode(tensors, instruction)
        info = {}
        if self.one_step is not None and self.one_step.active:
            chunk = self.sample_one_step(features, generator=generator)
            if explore:
                noise = gaussian(tuple(chunk.shape), chunk, generator)
                chunk = chunk + self.one_step.exploration * noise
        elif explore:
            path, log_prob = self.sample_path(features, generator)
            chunk = path[:, -1].view(-1, self.chunk, self.action_dim)
            info = {"path": path.cpu().numpy(), "log_prob": log_prob.cpu().numpy()}
        elif self.candidates > 1:
            chunk = self.choose(features, int(self.candidates), generator)
        else:
            chunk = self.sample(features, generator=generator)
        return self.physical(chunk).cpu().numpy(), info


def shortest(rotation: Tensor) -> Tensor:
    """Rotation vectors (..., 3) in rad -> those of the same rotations that are at most pi long; others unchanged."""
    angle = rotation.norm(dim=-1, keepdim=True)
    turns = torch.round(angle / (2.0 * math.pi))
    return rotation * torch.where(turns > 0, 1.0 - 2.0 * math.pi * turns / angle, 1.0)
