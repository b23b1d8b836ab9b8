"""A process of its own for what needs one: memory, several processes at once, and AsyncVectorEnv.

python -m benchmarks._envs_worker      answers requests, see `benchmarks/peers/protocol.py`
"""

from __future__ import annotations

import gc
import time
from typing import Any

import gymnasium
import numpy as np
import protocol  # beside the peers' workers; `replay_bench.processes.Worker` puts it on the path

from twinrl.env import image_key
from twins import arm, kinematics, scene
from twins.control import Controller, ToolPoses
from twins.kernels import STATE_DIM
from twins.scene import CAMERAS
from twins.tasks import make_task


class Rollout:
    """One of our environments, played by random actions."""

    def __init__(self) -> None:
        self._env: Any = None

    def open(self, count: int, **options: Any) -> dict[str, Any]:
        """Make and start it."""
        from benchmarks import _envs_play

        self._env, self._rng = _envs_play.make(count, **options), np.random.default_rng(0)
        self._env.reset(seed=0)
        self._step(0)
        return {}

    def _step(self, k: int) -> None:
        from benchmarks import _envs_play

        count = self._env.num_envs
        actions = self._rng.normal(0, 0.01, (count, 7)).astype(np.float32)
        _, _, terminated, truncated, _ = self._env.step(actions)
        ended = _envs_play.due(k, terminated, truncated)
        if ended.any():
            self._env.reset(options={"reset_mask": ended})

    def run(self, seconds: float) -> dict[str, Any]:
        """Environment steps a second."""
        start, steps = time.perf_counter(), 0
        while (spent := time.perf_counter() - start) < seconds:
            self._step(steps)
            steps += 1
        return {"per_s": steps * self._env.num_envs / spent}

    def memory(self) -> dict[str, Any]:
        """KiB that this process holds, after every environment has been through two episodes."""
        import psutil

        for _ in range(2):
            self._env.reset()
            for k in range(3):
                self._step(k)
        gc.collect()
        return {"kib": psutil.Process().memory_info().rss / 1024}


class SingleEnv(gymnasium.Env):
    """One MuJoCo simulation of the same scene with the same control law and `mujoco.Renderer`.

    As one would write it for AsyncVectorEnv. It spares itself rewards, success, and every randomisation.
    """

    def __init__(self, image_size: int, samples: int) -> None:
        import mujoco

        self.prepare()
        self._model.vis.quality.offsamples = samples
        self._renderer = mujoco.Renderer(self._model, image_size, image_size)
        box, pixels = gymnasium.spaces.Box, (image_size, image_size, 3)
        spaces = {image_key(name): box(0, 255, pixels, np.uint8) for name in CAMERAS}
        spaces["observation.state"] = box(-np.inf, np.inf, (STATE_DIM,), np.float32)
        self.observation_space = gymnasium.spaces.Dict(spaces)
        self.action_space = box(-1, 1, (7,), np.float32)

    def prepare(self) -> None:
        """Scene and control law, without images."""
        import mujoco

        self._mujoco, task = mujoco, make_task("pick-and-place")
        self._model = scene.build_scene(task).compile()
        self._data = mujoco.MjData(self._model)
        self._steps, self._limit = 0, task.max_steps
        self._controller, self._tool, self._ids = Controller(1), ToolPoses(1), np.zeros(1, int)

    def start(self, qpos: np.ndarray) -> None:
        """Begin an episode in a state."""
        data, self._steps = self._data, 0
        self._mujoco.mj_resetData(self._model, data)
        data.qpos[:], data.ctrl[:] = qpos, qpos[: len(data.ctrl)]
        self._mujoco.mj_forward(self._model, data)
        self._controller.begin(self._ids, data.qpos[None, :7], np.zeros(1, int))

    def advance(self, action: np.ndarray) -> None:
        """One control step."""
        data = self._data
        _, path, opening = self._controller.command(self._ids, action[None], data.qpos[None, :7])
        data.ctrl[7:9] = opening[0] * arm.FINGER_RANGE
        for point, count in zip(path[0], scene.parts(len(path[0])), strict=True):
            data.ctrl[:7] = point
            self._mujoco.mj_step(self._model, data, count)
        self._steps += 1

    def state(self) -> np.ndarray:
        """(S,) `observation.state`."""
        qpos = self._data.qpos[None]
        width = qpos[:, 7:9].sum(axis=1)
        return self._controller.observe(self._ids, *self._tool(qpos[:, :7]), width)[0].copy()

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        """Home, with the thing somewhere else."""
        super().reset(seed=seed)
        qpos = self._model.qpos0.copy()
        qpos[:7], qpos[7:9] = kinematics.HOME, arm.FINGER_RANGE
        qpos[9:11] += self.np_random.uniform(-0.1, 0.1, 2)
        self.start(qpos)
        return self._observe(), {}

    def step(self, action: np.ndarray) -> Any:
        """As gymnasium has it."""
        self.advance(action)
        return self._observe(), 0.0, False, self._steps >= self._limit, {}

    def _observe(self) -> dict[str, np.ndarray]:
        seen = {"observation.state": self.state()}
        for name in CAMERAS:
            self._renderer.update_scene(self._data, camera=name)
            seen[image_key(name)] = self._renderer.render()
        return seen


class AsyncVector:
    """`gymnasium.vector.AsyncVectorEnv` of them, a process each."""

    def __init__(self) -> None:
        self._env: Any = None

    def open_async(self, count: int, image_size: int, samples: int) -> dict[str, Any]:
        """Start `count` processes."""
        from functools import partial

        self.close_async()
        make = partial(SingleEnv, image_size, samples)
        self._env = gymnasium.vector.AsyncVectorEnv([make] * count, context="spawn")
        self._env.reset(seed=0)
        return {}

    def run_async(self, seconds: float) -> dict[str, Any]:
        """Environment steps a second."""
        return rate(self._env, seconds)

    def close_async(self) -> dict[str, Any]:
        """End them."""
        if self._env is not None:
            self._env.close()
            self._env = None
        return {}


def rate(env: Any, seconds: float) -> dict[str, Any]:
    """Environment steps a second of a vector environment under small random actions."""
    rng, steps = np.random.default_rng(0), 0
    start = time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        env.step(rng.normal(0, 0.01, env.action_space.shape).astype(np.float32))
        steps += 1
    return {"per_s": steps * env.num_envs / spent}


def main() -> None:
    """Answer requests until stdin ends."""
    protocol.answers()  # from here on stdout is for answers only
    rollout, peer = Rollout(), AsyncVector()
    protocol.serve(
        open=rollout.open,
        run=rollout.run,
        memory=rollout.memory,
        open_async=peer.open_async,
        run_async=peer.run_async,
        close_async=peer.close_async,
    )


if __name__ == "__main__":
    main()
