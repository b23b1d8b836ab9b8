"""A published vision encoder (SigLIP, DINOv2, ...) through `transformers`, imported only where one is asked for."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from policies.layers import bfloat16_where

IMAGENET = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # mean, standard deviation of pixels / 255


class PretrainedEncoder(nn.Module):
    """One camera's image to `tokens` tokens: the patches of a vision tower, averaged over squares of the image.

    `model` is a folder, or the name of a model that `transformers` downloads once a host. Whoever builds the policy
    loads it, so actors need it too; weights that arrive later overwrite it. Frozen, it stays as published, and pixels
    are encoded without gradient.
    """

    def __init__(
        self,
        model: str,
        tokens: int = 16,
        *,
        frozen: bool = True,
        precision: str = "auto",
    ) -> None:
        super().__init__()
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(f"camera_tokens of a pretrained encoder are a square, got {tokens}")
        self.side, self.frozen, self.precision = side, frozen, precision
        self.network, mean, std = load_tower(model)
        self.tokens, self.dim = tokens, self.network.config.hidden_size
        self.size, self.patch = self.network.config.image_size, self.network.config.patch_size
        self.grid = self.size // self.patch
        if side > self.grid:
            raise ValueError(
                f"{model} has {self.grid} x {self.grid} patches, fewer than camera_tokens {tokens}"
            )
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        if frozen:
            self.network.requires_grad_(False)

    def train(self, mode: bool = True) -> PretrainedEncoder:
        """As nn.Module.train; a frozen tower stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.network.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """`images` (B, H, W, 3) uint8 of any size -> (B, tokens, dim) float32."""
        half = self.precision == "bfloat16" or (
            self.precision == "auto" and images.device.type != "cpu"
        )
        pixels = images.permute(0, 3, 1, 2).float() / 255.0
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = functional.interpolate(
                pixels, (self.size, self.size), mode="bilinear", antialias=True
            )
        with (
            torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen),
            bfloat16_where(half, pixels),
        ):
            hidden = self.network(pixel_values=(pixels - self.mean) / self.std).last_hidden_state
        # Class and register tokens, where there are any, come before the patches.
        patches = hidden[:, -self.grid * self.grid :].float().transpose(1, 2)
        maps = patches.unflatten(2, (self.grid, self.grid))
        return functional.adaptive_avg_pool2d(maps, self.side).flatten(2).transpose(1, 2)


def load_tower(model: str) -> tuple[Any, tuple[float, ...], tuple[float, ...]]:
    """A vision tower and the mean and standard deviation (3,) of the pixels it was trained on.

    ImportError where `transformers` is missing, ValueError where `model` has no vision tower.
    """
    try:
        import transformers
    except ImportError:
        raise ImportError(
            "a pretrained vision encoder needs transformers: pip install 'twinrl[vla]'"
        ) from None
    config = transformers.AutoConfig.from_pretrained(model)
    # Of a model for images and text only the first half is built.
    whole = hasattr(config, "vision_config")
    kinds = {
        "siglip": transformers.SiglipVisionModel,
        "clip": transformers.CLIPVisionModel,
    }
    if whole and config.model_type not in kinds:
        raise ValueError(
            f"{model} is a {config.model_type}: of models with text, {', '.join(sorted(kinds))} are known"
        )
    kind = kinds[config.model_type] if whole else transformers.AutoModel
    tower = kind.from_pretrained(model, dtype=torch.float32)
    sizes = ("image_size", "patch_size", "hidden_size")
    if tower.main_input_name != "pixel_values" or not all(hasattr(tower.config, k) for k in sizes):
        raise ValueError(f"{model} is a {config.model_type}, not a transformer over image patches")
    mean, std = _pixel_statistics(model)
    return tower, mean, std


def _pixel_statistics(model: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        described, _ = ImageProcessingMixin.get_image_processor_dict(model)
    except OSError:  # a tower without a description of its images
        return IMAGENET
    return tuple(described["image_mean"]), tuple(described["image_std"])
