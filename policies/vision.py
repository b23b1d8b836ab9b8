"""What turns a camera's image into tokens: keypoints, which a CPU can afford, or patches, which scale."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

PRECISIONS = ("auto", "float32", "bfloat16")


def bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (elsewhere it is emulated, slower than float32)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def convolves_in_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether camera encoders compute in bfloat16; "auto" where the device does so in hardware."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}: one of {', '.join(PRECISIONS)}")
    fast = device.type != "cpu" or bfloat16_is_fast()
    return precision == "bfloat16" or (precision == "auto" and fast)


class CameraEncoder(nn.Module):
    """One camera's image to `keypoints` soft-argmax coordinates and strengths.

    Spatial softmax (Finn et al. 2016): each output channel is read as a heat map, whose expected position
    is a feature. It reports where things are with sub-cell precision and has no dense layer to train. Some 60
    microseconds an image (64 x 64, one core).
    """

    def __init__(
        self, image_size: int, width: int = 16, keypoints: int = 32, precision: str = "auto"
    ) -> None:
        super().__init__()
        if image_size % 4:
            raise ValueError(f"image_size must be a multiple of 4, got {image_size}")
        convolves_in_bfloat16(precision, torch.device("cpu"))
        self.image_size, self.precision = image_size, precision
        self.tokens, self.dim = 1, 3 * keypoints
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, 2 * width, 3, 2, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(2 * width, 2 * width, 3, 1, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(2 * width, keypoints, 1),
        ).to(memory_format=torch.channels_last)
        self.temperature = nn.Parameter(torch.ones(keypoints, 1, 1))
        grid = torch.linspace(-1.0, 1.0, image_size // 4)
        self.register_buffer("grid", grid, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """`images` (B, H, W, 3) uint8 -> (B, 3 * keypoints) float32: x, y in [-1, 1], strength in [0, 1]."""
        maps = _convolved(self.layers, images, self.precision)
        # In the order in which softmax runs over it, so that it is copied once and not twice.
        heat = maps.to(torch.float32, memory_format=torch.contiguous_format) * self.temperature
        weights = torch.softmax(heat.flatten(2), dim=-1).view_as(heat)  # (B, P, H/4, W/4)
        column = (weights.sum(2) * self.grid).sum(-1)
        row = (weights.sum(3) * self.grid).sum(-1)
        strength = torch.sigmoid(heat.amax((2, 3)))
        return torch.cat([column, row, strength], dim=-1)


class PatchEncoder(nn.Module):
    """One camera's image to a token for each `patch` x `patch` pixels.

    Convolutions of stride 2 instead of one large one, which small data sets train more easily (Xiao et al. 2021,
    "Early convolutions help transformers see better"), and sines and cosines of each patch's place.
    """

    def __init__(
        self, image_size: int, patch: int = 8, width: int = 32, precision: str = "auto"
    ) -> None:
        super().__init__()
        halvings = round(math.log2(patch))
        if patch < 2 or 2**halvings != patch or image_size % patch:
            raise ValueError(
                f"patch must be a power of 2 that divides image_size {image_size}, got {patch}"
            )
        convolves_in_bfloat16(precision, torch.device("cpu"))
        self.precision = precision
        side = image_size // patch
        channels = [3, *(width * 2**i for i in range(halvings))]
        self.tokens, self.dim = side * side, channels[-1]
        if self.dim % 4:
            raise ValueError(f"a patch has {self.dim} channels, which must be a multiple of 4")
        parts: list[nn.Module] = []
        for before, after in pairwise(channels):
            parts += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(1, after), nn.GELU()]
        self.layers = nn.Sequential(*parts, nn.Conv2d(self.dim, self.dim, 1)).to(
            memory_format=torch.channels_last
        )
        self.register_buffer("place", places(side, self.dim), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """`images` (B, H, W, 3) uint8 -> (B, tokens, dim) float32."""
        maps = _convolved(self.layers, images, self.precision).float()
        return maps.flatten(2).transpose(1, 2) + self.place


def places(side: int, dim: int) -> Tensor:
    """Sines and cosines (side * side, dim) of rows and columns, as of a transformer's positions."""
    frequency = 10_000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    angle = torch.arange(side)[:, None] * frequency  # (side, dim / 4)
    wave = torch.cat([angle.sin(), angle.cos()], dim=-1)
    row, column = wave[:, None].expand(-1, side, -1), wave[None].expand(side, -1, -1)
    return torch.cat([row, column], dim=-1).reshape(side * side, dim)


def _convolved(layers: nn.Module, images: Tensor, precision: str) -> Tensor:
    """`images` (B, H, W, 3) uint8, scaled to [-1, 1], through `layers`."""
    half = convolves_in_bfloat16(precision, images.device)
    # A permuted HWC tensor already lies in channels_last order: no copy.
    pixels = images.permute(0, 3, 1, 2).to(torch.bfloat16 if half else torch.float32)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
        return layers(pixels / 127.5 - 1.0)
