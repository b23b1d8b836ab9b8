"""The default vision-language-action policy: cameras, instruction and proprioception to an action chunk."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from policies.experts import MLPExpert, TransformerExpert
from policies.flow import FlowExpert
from policies.language import InstructionEncoder
from policies.layers import bfloat16_where, mlp
from policies.normalise import Normaliser
from policies.policy import Policy
from policies.tower import PretrainedEncoder
from policies.trunk import LatentTrunk, TransformerTrunk
from policies.vision import PRECISIONS, CameraEncoder, PatchEncoder
from policies.weights import to_arrays
from twinrl.env import ACTION_DIM, STATE, image_key
from twinrl.weights import checksum

CHOICES = {
    "stem": ("keypoints", "patches", "pretrained"),
    "trunk": ("latent", "transformer"),
    "expert": ("mlp", "transformer"),
    "precision": PRECISIONS,
    "compile": ("none", "default", "max-autotune-no-cudagraphs"),
}


@dataclass(frozen=True)
class Architecture:
    """A VLA's networks. Sizes by name are in policies/presets.py."""

    stem: str = "keypoints"  # what makes tokens of an image, one of CHOICES["stem"]
    width: int = 16  # channels of a stem's first convolution
    keypoints: int = 32  # a camera has with stem keypoints
    patch: int = 8  # pixels, with stem patches
    vision_model: str | None = None  # folder or name, with stem pretrained
    vision_frozen: bool = True  # the pretrained encoder stays as it was published
    camera_tokens: int = 4  # tokens of a camera, with stems keypoints and pretrained
    vocabulary: int = 512  # buckets of hashed words
    word_dim: int = 16  # numbers of a word
    words: int = 16  # the longest instruction, with trunk transformer
    trunk: str = "latent"  # one layer to one token, or a transformer
    latent: int = 128  # width of the prefix's tokens
    trunk_layers: int = 2
    expert: str = "mlp"  # on one vector, or a transformer that reads the prefix
    hidden: int = 256  # width of the expert and of critics
    expert_layers: int = 3
    head_dim: int = 32  # of attention
    precision: str = "auto"  # see docs/policies.md
    compile: str = "none"  # torch.compile's mode, of trunk and expert transformers

    def __post_init__(self) -> None:
        for key, allowed in CHOICES.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key} is {getattr(self, key)!r}: one of {', '.join(allowed)}")
        if (self.stem == "pretrained") != (self.vision_model is not None):
            raise ValueError("stem pretrained and vision_model need one another")


class VLA(Policy):
    """Cameras, words and state become a prefix of tokens, on which an expert's flow over chunks is conditioned.

    Features hold the prefix (of which an MLP expert gets the readout alone) and numbers: the auxiliary head's object
    poses (trained on twin labels, fed forward without gradient), the normalised state and the words' mean. Object poses
    are never an input. Without cameras there is nothing to see: features are state and words.
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
        noisy_steps: int = 0,
        start_noise: float = 1.0,
        critics: int = 5,
        **settings: Any,
    ) -> None:
        """`settings`: those of Architecture, and Policy's."""
        known = Architecture.__dataclass_fields__
        net = Architecture(**{key: settings.pop(key) for key in list(settings) if key in known})
        _refuse_unknown(settings, known)
        # What is not seen is not predicted: features are state and words alone.
        pose_dim = pose_dim if cameras else 0
        numbers = pose_dim + state_dim + net.word_dim
        super().__init__(
            expert=make_expert(net, bool(cameras), numbers, chunk, action_dim, noisy_steps),
            state_dim=state_dim,
            cameras=cameras,
            chunk=chunk,
            action_dim=action_dim,
            critics=critics,
            critic_hidden=net.hidden,
            **settings,
        )
        if not start_noise >= 0.0:
            raise ValueError(f"policy.start_noise {start_noise}: a standard deviation, 0 or more")
        self.flow.start_noise = start_noise
        self.architecture = net
        self.latent, self.pose_dim = net.latent, pose_dim
        self.vision = make_stems(net, cameras, image_size)
        self.language = InstructionEncoder(net.word_dim, net.vocabulary)
        self.trunk = make_trunk(net, self.vision, state_dim)
        self.pose = mlp(net.latent, net.latent, pose_dim, 1) if cameras else None
        # Two views of the state: what the encoder met in its scenes, and all of it for the expert.
        self.scene_normaliser = Normaliser(state_dim)
        self.pose_normaliser = Normaliser(pose_dim)
        if isinstance(self.flow, TransformerExpert):
            self.feature_shape = (self.trunk.tokens + self.flow.rows, net.latent)
        else:
            self.feature_shape = (self.flow.summary_dim,)
        # A frozen tower is not published: every process loads it, and `base` tells one from another (policies/weights.py).
        self.fixed = frozenset[str]()
        if net.stem == "pretrained" and net.vision_frozen:
            arrays = to_arrays(self.vision)
            self.fixed = frozenset(f"vision.{name}" for name in arrays)
            self.register_buffer("base", torch.tensor(checksum(arrays) - (1 << 63)))
        if net.compile != "none":
            for module in (self.trunk, self.flow.network):
                if module is not None:
                    module.compile(mode=net.compile)

    @torch.no_grad()
    def fit_scenes(self, states: Tensor, labels: Tensor) -> None:
        """Fit what the encoder sees of the state, and its labels, to labelled scenes (B, S), (B, pose_dim).

        Placed scenes have no past: numbers that never vary there (last actions) would reach the encoder untrained and
        are kept from it.
        """
        self._look()
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
        parts = (self.vision, self.language, self.trunk, self.pose)
        every = chain.from_iterable(part.parameters() for part in parts if part is not None)
        return [parameter for parameter in every if parameter.requires_grad]

    def encode(self, observation: Mapping[str, Tensor], instruction: str | Sequence[str]) -> Tensor:
        """`observation.images.<camera>` (B, H, W, 3) uint8 and `observation.state` (B, S) -> (B, *feature_shape)."""
        state = self.state_normaliser(observation[STATE]).clamp(-5.0, 5.0)
        words = self.language(instruction, len(state))
        numbers = [state, words[2]]
        if self.trunk is None:
            return torch.cat(numbers, dim=-1)
        scene = self.scene_normaliser(observation[STATE]).clamp(-5.0, 5.0)
        half = self.architecture.precision == "bfloat16" or (
            self.architecture.precision == "auto" and state.device.type != "cpu"
        )
        with bfloat16_where(half, state):
            seen = {
                name: camera(observation[image_key(name)]) for name, camera in self.vision.items()
            }
            tokens = self.trunk(seen, scene, words).to(state.dtype)
        if self.pose is not None:
            numbers.insert(0, self.pose(tokens[:, 0]).detach())
        if isinstance(self.flow, TransformerExpert):
            return torch.cat([tokens, self.flow.as_rows(torch.cat(numbers, dim=-1))], dim=1)
        return torch.cat([tokens[:, 0], *numbers], dim=-1)

    def predict_pose(self, features: Tensor) -> Tensor:
        """The auxiliary head on `features` (B, ...), with gradient -> normalised labels (B, pose_dim)."""
        self._look()
        readout = features[:, 0] if features.ndim == 3 else features[:, : self.latent]
        return self.pose(readout)

    def _look(self) -> None:
        if self.pose is None:
            raise ValueError("a policy without cameras has no encoder to train on scenes")


def make_stems(net: Architecture, cameras: Sequence[str], image_size: int) -> nn.ModuleDict:
    """The encoder of each camera: images (B, H, W, 3) uint8 -> (B, dim), or (B, tokens, dim)."""

    def make() -> nn.Module:
        if net.stem == "keypoints":
            return CameraEncoder(image_size, net.width, net.keypoints, net.precision)
        if net.stem == "patches":
            return PatchEncoder(image_size, net.patch, net.width, net.precision)
        return PretrainedEncoder(
            net.vision_model, net.camera_tokens, frozen=net.vision_frozen, precision=net.precision
        )

    if net.stem == "pretrained" and net.vision_frozen and cameras:
        return nn.ModuleDict(dict.fromkeys(cameras, make()))  # one for all
    return nn.ModuleDict({name: make() for name in cameras})


def make_trunk(net: Architecture, vision: nn.ModuleDict, state_dim: int) -> nn.Module | None:
    """What fuses cameras, words and the state; None where an MLP expert gets state and words as they are."""
    if net.expert == "mlp" and not vision:
        return None
    if net.trunk == "latent":
        return LatentTrunk(vision, state_dim, net.word_dim, net.latent)
    return TransformerTrunk(
        vision,
        state_dim,
        net.word_dim,
        net.latent,
        layers=net.trunk_layers if vision else 0,
        head_dim=net.head_dim,
        vector_tokens=net.camera_tokens,
        longest=net.words,
    )


def make_expert(
    net: Architecture, sees: bool, numbers: int, chunk: int, action_dim: int, noisy_steps: int
) -> FlowExpert:
    """The velocity field on `numbers` numbers and, if the policy `sees`, on what the trunk made of cameras."""
    if net.expert == "mlp":
        return MLPExpert(
            numbers + net.latent * sees,
            chunk * action_dim,
            net.hidden,
            net.expert_layers,
            noisy_steps=noisy_steps,
        )
    return TransformerExpert(
        net.latent,
        numbers,
        chunk,
        action_dim,
        net.hidden,
        net.expert_layers,
        net.head_dim,
        noisy_steps,
        half=net.precision == "bfloat16",
    )


def _refuse_unknown(settings: Mapping[str, Any], known: Iterable[str]) -> None:
    """ValueError for settings that neither the networks nor Policy know, with the nearest that exist."""
    own = [key for key in inspect.signature(VLA).parameters if key != "settings"]
    names = {*known, *own, *inspect.signature(Policy).parameters} - {"expert", "critic_hidden"}
    for key in settings.keys() - names:
        nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(sorted(names))}"
        raise ValueError(f"policy has no setting {key!r}; {hint}")
