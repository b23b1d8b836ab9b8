"""A convolutional encoder that a CPU runs in some 60 microseconds an image (64 x 64, one core)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (elsewhere it is emulated, slower than float32)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class CameraEncoder(nn.Module):
    """One camera's image to `keypoints` soft-argmax coordinates and strengths.

    Spatial softmax (Finn et al. 2016): each output channel is read as a heat map, whose expected position
    is a feature. It reports where things are with sub-cell precision and has no dense layer to train.
    """

    def __init__(
        self, image_size: int, width: int = 16, keypoints: int = 32, precision: str = "auto"
    ) -> None:
        super().__init__()
        if image_size % 4:
            raise ValueError(f"image_size must be a multiple of 4, got {image_size}")
        if precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision {precision!r}: one of auto, float32, bfloat16")
        self.image_size = image_size
        self.dim = 3 * keypoints
        self.half = precision == "bfloat16" or (precision == "auto" and bfloat16_is_fast())
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(2 * width, keypoints, 1),
        ).to(memory_format=torch.channels_last)
        self.temperature = nn.Parameter(torch.ones(keypoints, 1, 1))
        grid = torch.linspace(-1.0, 1.0, image_size // 4)
        self.register_buffer("grid", grid, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """`images` (B, H, W, 3) uint8 -> (B, 3 * keypoints) float32: x, y in [-1, 1], strength in [0, 1]."""
        # A permuted HWC tensor already lies in channels_last order: no copy.
        x = (
            images.permute(0, 3, 1, 2).to(torch.bfloat16 if self.half else torch.float32) / 127.5
            - 1.0
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            heat = self.layers(x)
        heat = heat.float() * self.temperature  # (B, P, H/4, W/4)
        weights = torch.softmax(heat.flatten(2), dim=-1).view_as(heat)
        column = (weights.sum(2) * self.grid).sum(-1)
        row = (weights.sum(3) * self.grid).sum(-1)
        strength = torch.sigmoid(heat.amax((2, 3)))
        return torch.cat([column, row, strength], dim=-1)
