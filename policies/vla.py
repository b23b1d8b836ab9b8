"""The small vision-language-action policy: cameras, instruction and proprioception to an action chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from policies.critic import ChunkCritic
from policies.flow import FlowHead
from policies.language import InstructionEncoder
from policies.layers import mlp
from policies.normalise import Normaliser
from policies.vision import CameraEncoder
from twinrl.env import ACTION_DIM, STATE, image_key

GRIPPER = 6  # the action's last number: 0 closed .. 1 open


class VLA(nn.Module):
    """Images + instruction + state -> features -> flow-matching chunk of C actions.

    Shapes: B rows, C = `chunk` actions, D = C * 7, K integration steps, F = `feature_dim`. Inside, chunks are
    normalised; `act` gives physical units and clips to `action_low` .. `action_high` there and nowhere else, so
    that a stored path has the likelihood it was drawn with.

    Features hold a latent code, the auxiliary head's object poses (trained on twin labels, fed forward without
    gradient), the normalised state and the instruction. Object poses are never an input.
    """

    def __init__(
        self,
        *,
        state_dim: int,
        pose_dim: int,
        cameras: Sequence[str] = ("side", "wrist"),
        image_size: int = 64,
        chunk: int = 4,
        integration_steps: int = 10,
        noisy_steps: int = 0,
        width: int = 16,
        keypoints: int = 32,
        latent: int = 128,
        hidden: int = 256,
        critics: int = 5,
        precision: str = "auto",
    ) -> None:
        super().__init__()
        self.cameras = tuple(cameras)
        self.chunk = chunk
        self.latent = latent
        self.pose_dim = pose_dim
        self.integration_steps = integration_steps
        self.vision = nn.ModuleDict(
            {name: CameraEncoder(image_size, width, keypoints, precision) for name in self.cameras}
        )
        self.language = InstructionEncoder()
        words = self.language.embedding.embedding_dim
        seen = sum(camera.dim for camera in self.vision.values())
        self.fuse = nn.Sequential(
            nn.Linear(seen + state_dim + words, latent), nn.LayerNorm(latent), nn.GELU()
        )
        self.pose = mlp(latent, latent, pose_dim, 1)
        self.feature_dim = latent + pose_dim + state_dim + words
        self.flow = FlowHead(self.feature_dim, chunk * ACTION_DIM, hidden, noisy_steps=noisy_steps)
        self.critic = (
            ChunkCritic(self.feature_dim, chunk, ACTION_DIM, critics, hidden) if critics else None
        )
        # Two views of the state: what the encoder met in its scenes, and all of it for the flow head.
        self.scene_normaliser = Normaliser(state_dim)
        self.state_normaliser = Normaliser(state_dim)
        self.pose_normaliser = Normaliser(pose_dim)
        self.action_normaliser = Normaliser(ACTION_DIM)
        self.register_buffer("action_low", torch.full((ACTION_DIM,), -torch.inf))
        self.register_buffer("action_high", torch.full((ACTION_DIM,), torch.inf))
        # How many chunks `act` draws for the critic to choose from; travels with the weights.
        self.register_buffer("candidates", torch.tensor(1))

    @torch.no_grad()
    def fit_scenes(self, states: Tensor, labels: Tensor) -> None:
        """Fit what the encoder sees of the state, and its labels, to labelled scenes (B, S), (B, pose_dim).

        Placed scenes have no past: numbers that never vary there (last actions) would reach the encoder untrained and
        are kept from it.
        """
        self.scene_normaliser.fit_moments(states)
        constant = states.std(0) < 1e-4
        self.scene_normaliser.scale[constant] = torch.inf
        self.pose_normaliser.fit_moments(labels, minimum_scale=1e-3)

    @torch.no_grad()
    def fit_states(self, states: np.ndarray) -> None:
        """Fit the flow head's view of the state to `states` (B, S) of real motion."""
        self.state_normaliser.fit_moments(torch.as_tensor(states), minimum_scale=5e-3)

    @torch.no_grad()
    def fit_begin(self, states: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        """Fit all views of the state to `states` (B, S), and actions to their range `low` .. `high` (7,), which
        may be infinite: without demonstrations no more is known."""
        for normaliser in (self.scene_normaliser, self.state_normaliser):
            normaliser.fit_moments(torch.as_tensor(states), minimum_scale=1e-4)
        bottom, top = (torch.as_tensor(a, dtype=torch.float32) for a in (low, high))
        bounded = torch.isfinite(bottom) & torch.isfinite(top)
        normaliser = self.action_normaliser
        normaliser.centre.copy_(torch.where(bounded, (bottom + top) / 2, 0.0))
        normaliser.scale.copy_(torch.where(bounded, (top - bottom) / 2, 1.0))
        self.action_low.copy_(bottom)
        self.action_high.copy_(top)

    @torch.no_grad()
    def fit_actions(self, actions: np.ndarray) -> None:
        """Fit the action's normalisation and execution limits to `actions` (B, 7), physical units."""
        values = torch.as_tensor(actions, dtype=torch.float32)
        # A dimension that the data hardly use keeps a tenth of its kind's scale: it is not blown up.
        self.action_normaliser.fit_quantiles(values)
        scale = self.action_normaliser.scale
        for kind in (slice(0, 3), slice(3, 6)):
            scale[kind] = torch.maximum(scale[kind], 0.1 * scale[kind].max())
        scale.clamp_(min=1e-4)
        self.action_normaliser.fix([GRIPPER], 0.0, 1.0)
        self.action_low.copy_(values.amin(0))
        self.action_high.copy_(values.amax(0))
        self.action_low[GRIPPER], self.action_high[GRIPPER] = 0.0, 1.0

    def encoder_parameters(self) -> list[nn.Parameter]:
        """Everything before the features; frozen while features are cached."""
        parts = (self.vision, self.language, self.fuse, self.pose)
        return list(chain.from_iterable(part.parameters() for part in parts))

    def encode(self, observation: Mapping[str, Tensor], instruction: str | Sequence[str]) -> Tensor:
        """`observation.images.<camera>` (B, H, W, 3) uint8 and `observation.state` (B, S) -> (B, F)."""
        scene = self.scene_normaliser(observation[STATE]).clamp(-5.0, 5.0)
        state = self.state_normaliser(observation[STATE]).clamp(-5.0, 5.0)
        seen = [self.vision[name](observation[image_key(name)]) for name in self.cameras]
        words = self.language(instruction, len(state))
        latent = self.fuse(torch.cat([*seen, scene, words], dim=-1))
        return torch.cat([latent, self.pose(latent).detach(), state, words], dim=-1)

    def predict_pose(self, features: Tensor) -> Tensor:
        """The auxiliary head on `features` (B, F), with gradient -> normalised labels (B, pose_dim)."""
        return self.pose(features[:, : self.latent])

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
        """Noise-free integration -> normalised chunk (B, C, 7), a function of `features` and `noise` (B, D)."""
        if noise is None:
            noise = torch.randn(len(features), self.flow.dim, generator=generator)
        x = self.flow.integrate(features, noise, steps or self.integration_steps)
        return x.view(-1, self.chunk, ACTION_DIM)

    def sample_path(
        self, features: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """The stochastic policy: raw path (B, K+1, D) and its log-probability (B,)."""
        return self.flow.sample_path(features, self.integration_steps, generator)

    def path_log_prob(self, features: Tensor, path: Tensor) -> Tensor:
        """Log-probability (B,) of a stored raw `path` (B, K+1, D), given its first point."""
        return self.flow.path_log_prob(features, path)

    def value(self, features: Tensor, chunk: Tensor) -> Tensor:
        """Ensemble mean of Q (B,) of whole normalised chunks (B, C, 7)."""
        return self.critic(features, chunk, chunk.new_ones(chunk.shape[:2])).mean(0)

    def choose(
        self, features: Tensor, candidates: int, generator: torch.Generator | None
    ) -> Tensor:
        """One of `candidates` sampled chunks (B, C, 7), normalised: the first, unless all critics prefer another.

        The score of a chunk is the smallest advantage over the first that any critic sees in it. An ensemble that
        disagrees chooses like the policy: picking its largest mean was measured to make a good policy worse.
        """
        batch = len(features)
        tiled = features.repeat_interleave(candidates, dim=0)
        chunks = self.sample(tiled, generator=generator)
        values = self.critic(tiled, chunks, chunks.new_ones(chunks.shape[:2]))
        values = values.view(-1, batch, candidates)  # (E, B, N)
        best = (values - values[:, :, :1]).amin(0).argmax(1)
        return chunks.view(batch, candidates, self.chunk, ACTION_DIM)[torch.arange(batch), best]

    def physical(self, chunk: Tensor) -> Tensor:
        """Normalised (..., 7) -> physical units, clipped to what may be executed."""
        return torch.clamp(self.action_normaliser.inverse(chunk), self.action_low, self.action_high)

    @torch.no_grad()
    def act(
        self,
        observation: Mapping[str, np.ndarray],
        instruction: str | Sequence[str],
        generator: torch.Generator,
        explore: bool,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Observation arrays (N, ...) -> chunk (N, C, 7) float32 in physical units, and info.

        `explore`: draw from the stochastic policy; info holds `path` (N, K+1, D) and `log_prob` (N,) float32.
        Otherwise integrate without noise, choosing among `candidates` chunks where that is above 1.
        """
        tensors = {
            key: torch.from_numpy(np.ascontiguousarray(observation[key]))
            for key in (STATE, *map(image_key, self.cameras))
        }
        features = self.encode(tensors, instruction)
        info = {}
        if explore:
            path, log_prob = self.sample_path(features, generator)
            chunk = path[:, -1].view(-1, self.chunk, ACTION_DIM)
            info = {"path": path.numpy(), "log_prob": log_prob.numpy()}
        elif self.candidates > 1:
            chunk = self.choose(features, int(self.candidates), generator)
        else:
            chunk = self.sample(features, generator=generator)
        return self.physical(chunk).numpy(), info
