"""Building blocks of pi0: sizes, Gemma's layers over a cache of earlier tokens, images, time, features as rows.

The modules are those of `transformers`; how they are run is ours, since pi0 shares one attention between two Gemmas,
and since S points of a flow look at one cached prefix (policies/pi0.py).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.checkpoint import checkpoint
from transformers import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig
from transformers.models.gemma.modeling_gemma import GemmaModel, apply_rotary_pos_emb
from transformers.models.paligemma.modeling_paligemma import PaliGemmaModel

# Keys and values (B, kv_heads, tokens, head_dim) of one layer.
Cache = Sequence[tuple[Tensor, Tensor]]

ROPE_THETA = 10_000.0
PERIODS = (4e-3, 4.0)  # of the time embedding: t is in [0, 1]


@dataclass(frozen=True)
class Pi0Sizes:
    """Widths and depths; the defaults are the published model's (PaliGemma 3B and a Gemma of 300 M)."""

    width: int = 2048  # trunk
    mlp: int = 16384
    expert_width: int = 1024
    expert_mlp: int = 4096
    layers: int = 18  # of trunk and expert alike: each layer shares its attention
    heads: int = 8
    kv_heads: int = 1
    head_dim: int = 256
    vocabulary: int = 257152
    vision_width: int = 1152
    vision_mlp: int = 4304
    vision_layers: int = 27
    vision_heads: int = 16
    image: int = 224  # pixels
    patch: int = 14
    padded: int = 32  # states and actions are filled up to so many numbers

    @property
    def image_tokens(self) -> int:
        """Tokens of one image."""
        return (self.image // self.patch) ** 2


SIZES = {
    "pi0": Pi0Sizes(),
    # Learns nothing worth having: it is for tests, and to see a job run before the weights are at hand.
    "tiny": Pi0Sizes(
        width=64, mlp=128, expert_width=48, expert_mlp=96, layers=2, heads=2, head_dim=16, vocabulary=512,
        vision_width=32, vision_mlp=64, vision_layers=2, vision_heads=2, image=56,
    ),
}  # fmt: skip


def make_sizes(sizes: str | Mapping[str, int]) -> Pi0Sizes:
    """A name of SIZES, or numbers that differ from the published model's."""
    if isinstance(sizes, str):
        if sizes not in SIZES:
            raise ValueError(f"no sizes {sizes!r}: one of {sorted(SIZES)}, or a mapping")
        return SIZES[sizes]
    known = {field.name for field in fields(Pi0Sizes)}
    if surplus := sorted(sizes.keys() - known):
        raise ValueError(f"sizes have no {surplus}; they have {sorted(known)}")
    return replace(Pi0Sizes(), **sizes)


def make_trunk(sizes: Pi0Sizes) -> PaliGemmaModel:
    """SigLIP, its projection and Gemma 2B, without the head that predicts words."""
    vision = SiglipVisionConfig(
        hidden_size=sizes.vision_width,
        intermediate_size=sizes.vision_mlp,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_heads,
        image_size=sizes.image,
        patch_size=sizes.patch,
        vision_use_head=False,
    )
    text = _gemma_config(sizes, sizes.width, sizes.mlp, sizes.vocabulary)
    return PaliGemmaModel(
        PaliGemmaConfig(
            vision_config=vision,
            text_config=text,
            projection_dim=sizes.width,
            hidden_size=sizes.width,
            vocab_size=sizes.vocabulary,
            image_token_index=sizes.vocabulary,
        )
    )


def make_expert(sizes: Pi0Sizes) -> GemmaModel:
    """The action expert's Gemma. It reads no words, so that it has no table of them."""
    gemma = GemmaModel(_gemma_config(sizes, sizes.expert_width, sizes.expert_mlp, 1))
    gemma.embed_tokens = None
    return gemma


def _gemma_config(sizes: Pi0Sizes, width: int, mlp: int, vocabulary: int) -> GemmaConfig:
    return GemmaConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        vocab_size=vocabulary,
        hidden_act="gelu_pytorch_tanh",
        # Begin and end of text are the tokenizer's business, and the expert has no words.
        bos_token_id=None,
        eos_token_id=None,
    )


@contextmanager
def parameters_on_meta(wanted: bool) -> Iterator[None]:
    """Modules built inside have parameters without memory or values, which a checkpoint replaces; buffers are real.

    Drawing three billion random numbers to throw them away takes minutes and 13 GB.
    """

    thread = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        # torch knows one hook for all threads; modules that others build are none of ours.
        if threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta) if wanted else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def run_layers(
    gemma: GemmaModel,
    hidden: Tensor,
    positions: Tensor,
    visible: Tensor,
    past: Cache = (),
    recompute: bool = False,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Gemma on `hidden` (B, N, W), N tokens at `positions` (B, N), after M earlier tokens whose keys and values are
    `past`.

    `visible` (B, N or 1, M + N) bool says which tokens each of the N looks at; every row of it needs one.
    `recompute` saves memory: activations inside a layer are computed again for its gradient.
    -> the normalised output (B, N, W), and the keys and values of the N tokens.
    """
    rotation = rotary(positions, gemma.layers[0].self_attn.head_dim)
    recompute = recompute and torch.is_grad_enabled()
    own = []
    for index, layer in enumerate(gemma.layers):
        earlier = past[index] if past else None
        if recompute:
            hidden, key, value = checkpoint(
                _layer, layer, hidden, rotation, visible, earlier, use_reentrant=False
            )
        else:
            hidden, key, value = _layer(layer, hidden, rotation, visible, earlier)
        own.append((key, value))
    return gemma.norm(hidden), own


def _layer(
    layer: nn.Module,
    hidden: Tensor,
    rotation: tuple[Tensor, Tensor],
    visible: Tensor,
    past: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer -> hidden (B, N, W), and its keys and values (B, kv_heads, N, head_dim)."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    heads = (*hidden.shape[:2], -1, attention.head_dim)
    query, key, value = (
        project(normed).view(heads).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    # Angles in float32 whatever the layers compute in: a prefix has hundreds of positions.
    query, key = (turned.to(value.dtype) for turned in apply_rotary_pos_emb(query, key, *rotation))
    keys, values = key, value
    if past is not None:
        keys = torch.cat([past[0].to(key.dtype), key], dim=2)
        values = torch.cat([past[1].to(value.dtype), value], dim=2)
    groups = attention.num_key_value_groups
    mixed = nn.functional.scaled_dot_product_attention(
        query,
        _shared(keys, groups),
        _shared(values, groups),
        attn_mask=visible[:, None],
        scale=attention.scaling,
    )
    hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), key, value


def _shared(heads: Tensor, groups: int) -> Tensor:
    """(B, kv_heads, M, D) -> (B, kv_heads * groups, M, D): several queries' heads share one of keys or values."""
    return heads[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)


def rotary(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, N, head_dim) float32 of rotary position embeddings at `positions` (B, N)."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device) / head_dim
    angles = positions[..., None].float() / ROPE_THETA**exponent
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def time_embedding(t: Tensor, width: int) -> Tensor:
    """Sines, then cosines (..., width) float32 of times `t` (...) in [0, 1] at periods from 0.004 to 4."""
    shortest, longest = PERIODS
    fraction = torch.linspace(0, 1, width // 2, dtype=torch.float64, device=t.device)
    angles = t[..., None].double() * 2 * math.pi / (shortest * (longest / shortest) ** fraction)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def resize_with_pad(images: Tensor, size: int) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, size, size) float32 in [-1, 1]: as large as fits, black bars on both sides.

    Bilinear, with antialiasing where an image shrinks, as in the pipeline that pi0 was trained with.
    """
    pixels = images.permute(0, 3, 1, 2).float() / 255
    height, width = pixels.shape[-2:]
    ratio = max(height, width) / size
    fitted = (max(1, int(height / ratio)), max(1, int(width / ratio)))
    if fitted != (height, width):
        pixels = nn.functional.interpolate(
            pixels, fitted, mode="bilinear", align_corners=False, antialias=True
        )
    top, left = (size - fitted[0]) // 2, (size - fitted[1]) // 2
    bars = (left, size - fitted[1] - left, top, size - fitted[0] - top)
    return nn.functional.pad(pixels.clamp(0, 1), bars) * 2 - 1


@dataclass(frozen=True)
class PrefixLayout:
    """How what the trunk says of an observation lies in one row of features.

    One after the other: keys and values (layers, 2, kv_heads, tokens, head_dim); the mean of the last hidden states
    (width); the normalised state (padded); which tokens are valid, 0 or 1 (tokens).
    """

    layers: int
    kv_heads: int
    tokens: int
    head_dim: int
    width: int
    padded: int

    @property
    def parts(self) -> tuple[int, int, int, int]:
        """Numbers of each part."""
        cache = self.layers * 2 * self.kv_heads * self.tokens * self.head_dim
        return cache, self.width, self.padded, self.tokens

    def pack(self, cache: Cache, mean: Tensor, state: Tensor, valid: Tensor) -> Tensor:
        """Keys and values of each layer, (B, width), (B, padded), (B, tokens) -> features (B, F) float32."""
        both = torch.stack([torch.stack(pair, dim=1) for pair in cache], dim=1)
        return torch.cat([part.flatten(1).float() for part in (both, mean, state, valid)], dim=1)

    def unpack(
        self, features: Tensor
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor, Tensor]:
        """What `pack` took, as views."""
        both, mean, state, valid = features.split(self.parts, dim=1)
        shape = (self.layers, 2, self.kv_heads, self.tokens, self.head_dim)
        both = both.unflatten(1, shape)
        return [(pair[:, 0], pair[:, 1]) for pair in both.unbind(1)], mean, state, valid > 0.5


def fill_up(values: Tensor, size: int, what: str) -> Tensor:
    """(..., n) -> (..., size), zeros behind."""
    if values.shape[-1] > size:
        raise ValueError(f"{values.shape[-1]} numbers of {what}; pi0 takes at most {size}")
    return nn.functional.pad(values, (0, size - values.shape[-1]))


def autocast(dtype: torch.dtype, device: torch.device) -> Any:
    """Layers compute in `dtype` inside; weights keep theirs."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
