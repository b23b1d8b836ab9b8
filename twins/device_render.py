"""Images of many worlds whose poses, colours and lights are already on the device."""

from __future__ import annotations

from typing import Any

import mujoco
import mujoco_warp as mjw
import numpy as np
import warp as wp

from twins.render import Renderer

wp.set_module_options({"enable_backward": False})
BLOCK = {"cpu": 8, "cuda": 512}  # worlds traced by one launch: enough to fill a GPU, little to pad
Array = Any  # torch.Tensor of the device


@wp.kernel
def _gather(
    source: wp.array2d(dtype=wp.float32),
    rows: wp.array(dtype=wp.int32),
    to: wp.array2d(dtype=wp.float32),
):
    i, k = wp.tid()
    to[i, k] = source[rows[i], k]


@wp.kernel
def _unpack(
    packed: wp.array2d(dtype=wp.uint32),
    start: int,
    rows: wp.array(dtype=wp.int32),
    seen: wp.array(dtype=wp.bool),
    image: wp.array3d(dtype=wp.uint8),
):
    """Pixels come as blue, green, red, alpha; images are red, green, blue."""
    i, k = wp.tid()
    row = rows[i]
    if not seen[row]:
        return
    pixel = packed[i, start + k]
    image[row, k, 0] = wp.uint8((pixel >> wp.uint32(16)) & wp.uint32(255))
    image[row, k, 1] = wp.uint8((pixel >> wp.uint32(8)) & wp.uint32(255))
    image[row, k, 2] = wp.uint8(pixel & wp.uint32(255))


class DeviceRenderer(Renderer):
    """`twins.render.Renderer` fed from the device: worlds are gathered into its block, and no pixel leaves."""

    def __init__(
        self,
        model: mujoco.MjModel,
        cameras: tuple[str, ...],
        size: int,
        count: int,
        *,
        device: str,
        block: int | None = None,
    ):
        """`count` worlds there are, `block` of which are traced at once."""
        kind = "cpu" if wp.get_device(device).is_cpu else "cuda"
        block = min(count, block or BLOCK[kind])
        super().__init__(model, cameras, size, block=block, device=device)
        self.count = count
        self._everyone = np.arange(count, dtype=np.int32)

    def trace(
        self,
        worlds: dict[str, wp.array],
        into: dict[str, Array],
        seen: Array,
        ids: np.ndarray | None,
    ) -> None:
        """Write images of the worlds `ids` (n,), or of all, to `into` {camera: (count, size, size, 3) uint8}.

        Of these, `seen` (count,) bool says whose are written.

        `worlds` holds what the tracer reads, each (count, ...), by the name of its field in mujoco-warp.
        """
        ids = self._everyone if ids is None else np.asarray(ids, np.int32)
        if not len(ids):
            return
        # The last block is filled up with its first world, which is then written twice.
        padded = np.concatenate([ids, np.repeat(ids[:1], -len(ids) % self.block)])
        rows = wp.array(padded, dtype=wp.int32, device=self._device)
        images = {
            name: wp.from_torch(into[name].reshape(self.count, -1, 3), dtype=wp.uint8)
            for name in self.cameras
        }
        for start in range(0, len(padded), self.block):
            self._trace_block(worlds, images, wp.from_torch(seen), rows[start : start + self.block])

    def _trace_block(
        self,
        worlds: dict[str, wp.array],
        images: dict[str, wp.array],
        seen: wp.array,
        rows: wp.array,
    ) -> None:
        for name, source in worlds.items():
            holder = self._data if hasattr(self._data, name) else self._model
            source, to = _flat(source), _flat(getattr(holder, name))
            wp.launch(_gather, to.shape, inputs=[source, rows, to])
        mjw.refit_bvh(self._model, self._data, self._context)
        mjw.render(self._model, self._data, self._context)
        pixels = self.size * self.size
        for i, name in enumerate(self.cameras):
            inputs = [self._context.rgb_data, i * pixels, rows, seen, images[name]]
            wp.launch(_unpack, (self.block, pixels), inputs=inputs)


def _flat(array: wp.array) -> wp.array:
    """(n, k) float32 over the memory of an array of vectors or matrices (n, ...)."""
    width = array.strides[0] // 4
    return wp.array(
        ptr=array.ptr, shape=(array.shape[0], width), dtype=wp.float32, device=array.device
    )
