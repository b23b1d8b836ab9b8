"""The small vision-language-action policy: cameras, instruction and proprioception to an action chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from policies.experts import MLPExpert
from policies.language import InstructionEncoder
from policies.layers import mlp
from policies.normalise import Normaliser
from policies.policy import Policy
from policies.vision import CameraEncoder
from twinrl.env import ACTION_DIM, STATE, image_key


class VLA(Policy):
    """Keypoints of each camera, hashed words and the state, fused into a latent code.

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
        action_dim: int = ACTION_DIM,
        integration_steps: int = 10,
        noisy_steps: int = 0,
        width: int = 16,
        keypoints: int = 32,
        latent: int = 128,
        hidden: int = 256,
        critics: int = 5,
        precision: str = "auto",
    ) -> None:
        vision = nn.ModuleDict(
            {name: CameraEncoder(image_size, width, keypoints, precision) for name in cameras}
        )
        language = InstructionEncoder()
        words = language.embedding.embedding_dim
        seen = sum(camera.dim for camera in vision.values())
        width = latent + pose_dim + state_dim + words
        super().__init__(
            expert=MLPExpert(width, chunk * action_dim, hidden, noisy_steps=noisy_steps),
            state_dim=state_dim,
            cameras=cameras,
            chunk=chunk,
            action_dim=action_dim,
            integration_steps=integration_steps,
            critics=critics,
            critic_hidden=hidden,
        )
        self.feature_shape = (width,)
        self.latent, self.pose_dim = latent, pose_dim
        self.vision, self.language = vision, language
        self.fuse = nn.Sequential(
            nn.Linear(seen + state_dim + words, latent), nn.LayerNorm(latent), nn.GELU()
        )
        self.pose = mlp(latent, latent, pose_dim, 1)
        # Two views of the state: what the encoder met in its scenes, and all of it for the expert.
        self.scene_normaliser = Normaliser(state_dim)
        self.pose_normaliser = Normaliser(pose_dim)

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
    def fit_begin(self, states: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        """As Policy.fit_begin, for both views of the state."""
        super().fit_begin(states, low, high)
        self.scene_normaliser.fit_moments(torch.as_tensor(states), minimum_scale=1e-4)

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
