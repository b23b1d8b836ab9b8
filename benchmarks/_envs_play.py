"""The same episodes twice: through the environment, and as bare physics and bare ray tracing of the same states."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import mujoco
import numpy as np

from twins import make_env, scene

TASK = "pick-and-place"
EPISODE = 40  # control steps, about what the expert needs
POSITION_STAGE = int(mujoco.mjtStage.mjSTAGE_POS)
BLOCK = 16  # worlds that mujoco-warp traces at once


class Recording(NamedTuple):
    """What the scripted expert did in N environments over T steps."""

    actions: np.ndarray  # (T, N, 7)
    controls: (
        np.ndarray
    )  # (T, K, N, servos), what reached the physics in each part of a control step
    start: np.ndarray  # (N, state) the physics' state at the beginning
    resets: list[tuple[np.ndarray, np.ndarray]]  # after each step: ids (n,) and their new states
    final: np.ndarray  # (N, state)


class Clock:
    """Adds up the time spent in `with` blocks: on the clock on the wall, and on this process's processors."""

    seconds = processor = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start[0]
        self.processor += time.process_time() - self._start[1]


def make(count: int, **options: Any) -> Any:
    """An environment of `count` copies of the benchmark's task."""
    return make_env(TASK, count, seed=1, **options)


def due(k: int, terminated: np.ndarray, truncated: np.ndarray) -> np.ndarray:
    """(N,) bool: which episodes end after step `k`. Beside those that are over, a few in every step, as in a long run."""
    return terminated | truncated | (np.arange(len(terminated)) % EPISODE == k % EPISODE)


def record(env: Any, steps: int) -> Recording:
    """Let the expert play `steps` steps."""
    env.reset(seed=1)
    simulation = env.simulation
    start = simulation.batch.state.copy()
    actions, controls, resets = [], [], []
    parts: list[np.ndarray] = []
    step = simulation.batch.step

    def watched(*args: Any, **options: Any) -> Any:
        parts.append(simulation.ctrl.copy())
        return step(*args, **options)

    simulation.batch.step = watched
    for k in range(steps):
        parts.clear()
        actions.append(env.expert(noise=0.05))
        _, _, terminated, truncated, _ = env.step(actions[-1])
        controls.append(np.array(parts))
        ended = due(k, terminated, truncated)
        if ended.any():
            env.reset(options={"reset_mask": ended})
        resets.append((np.flatnonzero(ended), simulation.batch.state[ended].copy()))
    simulation.batch.step = step
    final = simulation.batch.state.copy()
    return Recording(np.array(actions), np.array(controls), start, resets, final)


def play(env: Any, recording: Recording) -> Clock:
    """What the environment takes for it: steps, observations, rewards, ends, and resets with new draws."""
    env.reset(seed=1)
    clock = Clock()
    with clock:
        for k, action in enumerate(recording.actions):
            _, _, terminated, truncated, _ = env.step(action)
            ended = due(k, terminated, truncated)
            if ended.any():
                env.reset(options={"reset_mask": ended})
    assert (env.simulation.batch.state == recording.final).all(), "the episodes were not repeated"
    return clock


class Bare:
    """Bare physics of a recording, and a tracer called directly."""

    def __init__(self, env: Any, threads: int, tracer: Callable[..., Any] | None = None) -> None:
        from mujoco.batch import Batch

        simulation = env.simulation
        self._batch = Batch(simulation.model, env.num_envs, threads)
        self._controls = self._batch.bind("ctrl")
        self._tracer = tracer(simulation.model, self._batch, env) if tracer else None

    def play(self, recording: Recording) -> Clock:
        """What its physics take, and its images if there is a tracer."""
        batch, tracer = self._batch, self._tracer
        batch.state[:] = recording.start
        clock = Clock()
        for controls, (ended, states) in zip(recording.controls, recording.resets, strict=True):
            with clock:
                for part, count in zip(controls, scene.parts(len(controls)), strict=True):
                    self._controls[:] = part
                    batch.step(nstep=count)
            if tracer is not None:
                tracer.look()
                with clock:
                    tracer.trace(batch.nsim)
            if not len(ended):
                continue
            with clock:
                batch.state[ended] = states
            if tracer is not None:
                tracer.look()
                with clock:
                    tracer.trace(len(ended))
        assert (batch.state == recording.final).all(), "the physics are not the recorded ones"
        return clock


class OwnTracer:
    """`twins.tracer`, called directly; poses are computed outside the clock."""

    def __init__(self, model: Any, batch: Any, env: Any) -> None:
        from twins.tracer import POSES, Tracer

        self._batch, self._poses = batch, {name: batch.bind(name) for name in POSES}
        looks = ("geom_rgba", "light_diffuse", "light_dir")
        repeated = [np.repeat(getattr(model, name)[None], env.num_envs, 0) for name in looks]
        self._looks = dict(zip(("geom_rgba", "light_diffuse", "light_xdir"), repeated, strict=True))
        self._tracer = Tracer(model, env.cameras, env.image_size)

    def look(self) -> None:
        """Compute the poses of the present states."""
        self._batch.forward(stage=POSITION_STAGE)

    def trace(self, count: int) -> None:
        """Trace the first `count` worlds."""
        self._tracer.render(self._poses, self._looks, np.arange(count))


class MujocoWarp:
    """mujoco-warp's tracer, called directly; poses are computed and put in place outside the clock."""

    POSES = ("geom_xpos", "geom_xmat", "cam_xpos", "cam_xmat")

    def __init__(self, model: Any, batch: Any, env: Any) -> None:
        import mujoco_warp as mjw

        self._mjw, self._batch = mjw, batch
        self._poses = {name: batch.bind(name) for name in self.POSES}
        self._count, self._block = env.num_envs, min(env.num_envs, BLOCK)
        data = mujoco.MjData(model)
        mujoco.mj_kinematics(model, data)  # without contacts the buffers stay small
        mujoco.mj_camlight(model, data)
        self._model = mjw.put_model(model)
        self._data = [
            mjw.put_data(model, data, nworld=self._block, nconmax=1, njmax=1)
            for _ in range(0, self._count, self._block)
        ]
        self._context = mjw.create_render_context(
            model,
            nworld=self._block,
            cam_res=(env.image_size, env.image_size),
            cam_active=list(env.cameras),
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

    def look(self) -> None:
        """Put the present poses into the tracer's arrays."""
        self._batch.forward(stage=POSITION_STAGE)
        for n, data in enumerate(self._data):
            rows = np.arange(n * self._block, (n + 1) * self._block) % self._count
            for name, poses in self._poses.items():
                target = getattr(data, name).numpy()
                target[...] = poses[rows].reshape(target.shape)

    def trace(self, count: int) -> None:
        """Trace the first `count` worlds."""
        for data in self._data[: -(-count // self._block)]:
            self._mjw.refit_bvh(self._model, data, self._context)
            self._mjw.render(self._model, data, self._context)
