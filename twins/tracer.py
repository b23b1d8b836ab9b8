"""Batched images on the CPU, fed with poses that C MuJoCo computed: no window system, no OpenGL, any number of threads.

Worlds are traced in blocks, so that what a block needs stays in the processor's cache and memory does not grow with the
number of worlds. Threads take whole blocks; the pictures do not depend on their number.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mujoco
import numpy as np
import warp as wp

from twins import tracer_kernels as kernels

POSES = ("geom_xpos", "geom_xmat", "cam_xpos", "cam_xmat")
BLOCK = 16  # worlds


class Tracer:
    """Traces worlds of one model that differ in poses, colours and light."""

    def __init__(
        self, model: mujoco.MjModel, cameras: tuple[str, ...], size: int, *, threads: int = 1
    ) -> None:
        """`size` is the images' height and width in pixels; 0 `threads` are as many as there are cores."""
        self.cameras, self.size = cameras, size
        threads = threads or len(os.sched_getaffinity(0))
        ids = [model.camera(name).id for name in cameras]
        scene = _Scene(model)
        views = [_View(model, camera, size) for camera in ids]
        self._blocks = [_Block(model, scene, views, size) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def render(
        self, poses: dict[str, np.ndarray], looks: dict[str, np.ndarray], ids: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Images {camera: (n, size, size, 3) uint8} of the worlds `ids` (n,).

        `poses` holds the fields POSES, (N, ...) as MuJoCo lays them out; `looks` holds `geom_rgba` (N, ngeom, 4),
        `light_diffuse` (N, nlight, 3) and `light_xdir` (N, nlight, 3).
        """
        shape = (len(ids), self.size, self.size, 3)
        images = [np.empty(shape, np.uint8) for _ in self.cameras]
        out = [wp.array(image, dtype=wp.uint8, device="cpu", copy=False) for image in images]
        arrays = poses | looks

        def work(n: int) -> None:
            for start in range(n * BLOCK, len(ids), BLOCK * len(self._blocks)):
                self._blocks[n].trace(arrays, ids[start : start + BLOCK], start, out)

        if self._pool is None:
            work(0)
        else:
            list(self._pool.map(work, range(len(self._blocks))))
        return dict(zip(self.cameras, images, strict=True))

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
            del self._blocks[1:]


class _Scene:
    """What all worlds share."""

    def __init__(self, model: mujoco.MjModel) -> None:
        unknown = {int(kind) for kind in model.geom_type} - set(kernels.KINDS)
        if unknown:
            names = [mujoco.mjtGeom(kind).name for kind in sorted(unknown)]
            raise ValueError(f"the CPU's tracer knows no {names}, only primitive shapes")
        if (model.light_type != int(mujoco.mjtLightType.mjLIGHT_DIRECTIONAL)).any():
            raise ValueError("the CPU's tracer knows directional lights only")
        self.kinds = wp.array(model.geom_type, dtype=wp.int32, device="cpu")
        self.sizes = wp.array(model.geom_size, dtype=wp.vec3, device="cpu")
        self.bounds = wp.array(model.geom_rbound, dtype=wp.float32, device="cpu")
        head = model.vis.headlight
        on = float(bool(head.active))
        self.ambient = wp.vec3(*(on * head.ambient))
        self.headlight = wp.vec3(*(on * head.diffuse))


class _View:
    """A camera's rays, and the cones of its tiles."""

    def __init__(self, model: mujoco.MjModel, camera: int, size: int) -> None:
        self.camera = camera
        half = math.tan(math.radians(float(model.cam_fovy[camera])) / 2)
        steps = ((np.arange(size) + 0.5) / size * 2 - 1) * half
        x, y = np.meshgrid(steps, -steps)
        rays = np.stack([x, y, -np.ones_like(x)], axis=-1)
        rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
        ways, cosines = [], []
        for top in range(0, size, kernels.TILE):
            for left in range(0, size, kernels.TILE):
                tile = rays[top : top + kernels.TILE, left : left + kernels.TILE].reshape(-1, 3)
                way = tile.mean(axis=0)
                way /= np.linalg.norm(way)
                ways.append(way)
                # A little wider than it is, for what rounding takes.
                cosines.append(min(1.0, float((tile @ way).min())) - 1e-5)
        self.tiles = len(ways)
        self.rays = wp.array(rays.reshape(-1, 3), dtype=wp.vec3, device="cpu")
        self.ways = wp.array(np.array(ways), dtype=wp.vec3, device="cpu")
        self.cosines = wp.array(np.array(cosines), dtype=wp.float32, device="cpu")


class _Block:
    """Some worlds' poses and looks in the tracer's form, and its launches, prepared once."""

    def __init__(self, model: mujoco.MjModel, scene: _Scene, views: list[_View], size: int) -> None:
        def worlds(count: int, dtype: Any) -> wp.array:
            return wp.zeros((BLOCK, count), dtype=dtype, device="cpu")

        rows = {
            "geom_xpos": worlds(model.ngeom, wp.vec3),
            "geom_xmat": worlds(model.ngeom, wp.mat33),
            "geom_rgba": worlds(model.ngeom, wp.vec4),
            "cam_xpos": worlds(model.ncam, wp.vec3),
            "cam_xmat": worlds(model.ncam, wp.mat33),
            "light_diffuse": worlds(model.nlight, wp.vec3),
            "light_xdir": worlds(model.nlight, wp.vec3),
        }
        self._rows = {name: array.numpy().reshape(BLOCK, -1) for name, array in rows.items()}
        self._kept = rows
        nothing = wp.zeros((0, size, size, 3), dtype=wp.uint8, device="cpu")
        self._tiles = [view.tiles for view in views]
        self._launches = [
            wp.launch(
                kernels.trace,
                (BLOCK, view.tiles),
                inputs=[
                    *(scene.kinds, scene.sizes, scene.bounds),
                    *rows.values(),
                    *(scene.ambient, scene.headlight),
                    *(view.camera, view.rays, view.ways, view.cosines, size, 0, nothing),
                ],
                device="cpu",
                record_cmd=True,
            )
            for view in views
        ]

    def trace(
        self, arrays: dict[str, np.ndarray], ids: np.ndarray, first: int, out: list[wp.array]
    ) -> None:
        """Draw worlds `ids` into rows `first` and following of the images `out`."""
        for name, rows in self._rows.items():
            rows[: len(ids)] = arrays[name][ids].reshape(len(ids), -1)
        for launch, tiles, image in zip(self._launches, self._tiles, out, strict=True):
            launch.set_dim((len(ids), tiles))
            launch.set_param_by_name("first", first)
            launch.set_param_by_name("image", image)
            launch.launch()
