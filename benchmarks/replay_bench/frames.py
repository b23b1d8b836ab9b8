"""Camera frames for benchmarks: rendered-looking, with mild sensor noise, and the same for everybody.

A fixed camera sees a table with moving things; a wrist camera sees the same while it moves itself.
"""

from __future__ import annotations

import numpy as np

NOISE = 2.0  # standard deviation in levels of 0..255, as a small camera has in a lit room
_THINGS = 5


def frames(
    count: int, size: int = 128, *, seed: int = 0, noise: float = NOISE, moving: bool = False
) -> np.ndarray:
    """(count, size, size, 3) uint8, consecutive in time; `moving`: the camera moves too."""
    generator = np.random.default_rng(seed)
    margin = size // 4 if moving else 0
    background = _table(size + 2 * margin)
    place = generator.uniform(0.15, 0.85, (_THINGS, 2)) * size
    speed = generator.uniform(-0.006, 0.006, (_THINGS, 2)) * size
    radius = generator.uniform(0.05, 0.17, _THINGS) * size
    colour = generator.uniform(30, 230, (_THINGS, 3)).astype(np.float32)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    out = np.empty((count, size, size, 3), np.uint8)
    for t in range(count):
        shift = (margin * (1 + np.sin([0.05 * t, 0.033 * t + 1]))).astype(int)
        image = background[shift[0] : shift[0] + size, shift[1] : shift[1] + size].copy()
        for n in range(_THINGS):
            cy, cx = place[n] + speed[n] * t - (shift - margin)
            if n % 2:  # a box, lit from the left
                inside = (abs(x - cx) < radius[n]) & (abs(y - cy) < 0.7 * radius[n])
                light = 0.85 + 0.15 * (x[inside] - cx) / radius[n]
            else:  # a ball
                distance = (x - cx) ** 2 + (y - cy) ** 2
                inside = distance < radius[n] ** 2
                light = 0.3 + 0.7 * np.sqrt(1 - distance[inside] / radius[n] ** 2)
            image[inside] = light[:, None] * colour[n]
        if noise:
            image += noise * generator.standard_normal(image.shape, np.float32)
        out[t] = np.clip(image, 0, 255)
    return out


def _table(size: int) -> np.ndarray:
    """A wall above a chequered table, (size, size, 3) float32."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    image = np.stack([120 + 60 * y, 130 + 40 * x, 160 - 50 * y], -1)
    chequers = ((x * 12).astype(int) + (y * 12).astype(int)) % 2 * 18.0
    return (image + np.where(y > 0.55, chequers, 0)[..., None]).astype(np.float32)
