"""Batched images from mujoco-warp's ray tracer, for a GPU: on the CPU `twins.tracer` draws the same several times faster.

No window system, no OpenGL. It runs on warp's CPU device too, for tests. Worlds are traced in blocks of a
fixed size, because a context's buffers and acceleration structure are sized once.
"""

from __future__ import annotations

import mujoco
import numpy as np
import warp as wp

wp.config.quiet = True
wp.config.log_level = getattr(wp, "LOG_ERROR", 40)

import mujoco_warp as mjw  # noqa: E402  (warp prints its banner at import unless told otherwise before)

POSES = ("geom_xpos", "geom_xmat", "cam_xpos", "cam_xmat")
BLOCK = 8  # worlds traced by one launch: a subset is padded up to a multiple of it


class Renderer:
    """Renders worlds of one model that differ in poses, colours and light."""

    def __init__(
        self, model: mujoco.MjModel, cameras: tuple[str, ...], size: int, *, block: int, device: str
    ):
        """`size` is the images' height and width in pixels; `device` is "cpu" or "cuda"."""
        self.cameras, self.size, self.block = cameras, size, block
        self._device = wp.get_device(device)
        data = mujoco.MjData(
            model
        )  # poses follow with each image; without contacts its buffers stay small
        mujoco.mj_kinematics(model, data)
        mujoco.mj_camlight(model, data)
        with wp.ScopedDevice(self._device):
            self._model = mjw.put_model(model)
            self._data = mjw.put_data(model, data, nworld=block, nconmax=1, njmax=1)
            # A leading dimension of worlds is all that it takes to give each world its own look.
            self._model.geom_rgba = self._per_world(model.geom_rgba, wp.vec4)
            self._model.light_diffuse = self._per_world(model.light_diffuse, wp.vec3)
            self._context = mjw.create_render_context(
                model,
                nworld=block,
                cam_res=(size, size),
                cam_active=list(cameras),
                render_rgb=True,
                render_depth=False,
                render_seg=False,
                use_shadows=False,
                use_textures=False,
                enable_specular=False,
                enable_emission=False,
                enable_backface_culling=False,
                enable_per_light_ambient=False,
            )

    def _per_world(self, array: np.ndarray, dtype: type) -> wp.array:
        return wp.array(np.broadcast_to(array, (self.block, *array.shape)), dtype=dtype)

    def _upload(self, array: wp.array, rows: np.ndarray) -> None:
        shape = (*array.shape, *getattr(array.dtype, "_shape_", ()))
        rows = np.ascontiguousarray(rows, np.float32).reshape(shape)
        if self._device.is_cpu:
            array.numpy()[...] = rows
        else:
            array.assign(rows)

    def render(
        self, poses: dict[str, np.ndarray], looks: dict[str, np.ndarray], ids: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Images {camera: (n, size, size, 3) uint8} of the worlds `ids` (n,).

        `poses` holds the fields POSES, (N, ...) as MuJoCo lays them out; `looks` holds `geom_rgba` (N, ngeom, 4),
        `light_diffuse` (N, nlight, 3) and `light_xdir` (N, nlight, 3).
        """
        size, count = self.size, len(ids)
        images = {name: np.empty((count, size, size, 3), np.uint8) for name in self.cameras}
        for start in range(0, count, self.block):
            rows = ids[start : start + self.block]
            used = len(rows)
            if used < self.block:
                rows = np.concatenate([rows, np.repeat(rows[:1], self.block - used)])
            packed = self._trace(poses, looks, rows)[:used]
            for i, name in enumerate(self.cameras):
                images[name][start : start + used] = packed[:, i, :, :, 2::-1]
        return images

    def _trace(
        self, poses: dict[str, np.ndarray], looks: dict[str, np.ndarray], rows: np.ndarray
    ) -> np.ndarray:
        """One block's pixels (block, cameras, size, size, 4) uint8, in the order blue, green, red, alpha."""
        for name in POSES:
            self._upload(getattr(self._data, name), poses[name][rows])
        self._upload(self._data.light_xdir, looks["light_xdir"][rows])
        self._upload(self._model.geom_rgba, looks["geom_rgba"][rows])
        self._upload(self._model.light_diffuse, looks["light_diffuse"][rows])
        with wp.ScopedDevice(self._device):
            mjw.refit_bvh(self._model, self._data, self._context)
            mjw.render(self._model, self._data, self._context)
        packed = self._context.rgb_data.numpy()
        return packed.view(np.uint8).reshape(self.block, len(self.cameras), self.size, self.size, 4)
