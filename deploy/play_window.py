"""A live window on a task: MuJoCo's own viewer, which turns and zooms with the mouse."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from twinrl.core.errors import ConfigError, TwinRLError

CLOSE_SECONDS = 5.0  # that the viewer may take to close


def show(
    make: Callable[[], Any],
    actor: Callable[[Any], Callable[..., Any]],
    starts: list[dict[str, Any] | None],
    arguments: argparse.Namespace,
    say: Callable[[str], None],
) -> int:
    """Play in real time until the episodes are over or the window is closed; light and colours are nominal."""
    if arguments.backend != "mujoco":
        raise ConfigError(f"--window shows the simulator mujoco, not {arguments.backend!r}")
    if sys.platform.startswith("linux") and not (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    ):
        raise ConfigError(
            "--window needs a display, and DISPLAY is not set; without it a video is written"
        )
    import mujoco
    from mujoco.viewer import launch_passive

    env = make()
    act = actor(env)
    simulation = env.simulation
    model, data = simulation.model, mujoco.MjData(simulation.model)
    before = set(threading.enumerate())
    try:
        viewer = launch_passive(model, data, show_left_ui=False, show_right_ui=False)
    except RuntimeError as error:
        raise TwinRLError(f"MuJoCo's viewer does not start: {error}") from None
    drawing = set(threading.enumerate()) - before
    with contextlib.ExitStack() as stack:
        # The viewer draws in a daemon thread: Python must not end under it.
        stack.callback(lambda: [thread.join(CLOSE_SECONDS) for thread in drawing])
        stack.enter_context(viewer)
        viewer.cam.lookat, viewer.cam.distance = (0.45, 0.0, 0.15), 1.6  # m
        viewer.cam.azimuth, viewer.cam.elevation = 150.0, -30.0  # degrees
        for number, start in enumerate(starts):
            options: dict[str, Any] = {} if start is None else {"configurations": [start]}
            observation, _ = env.reset(
                seed=arguments.seed if number == 0 else None, options=options
            )
            _copy(env, model, data)
            begin, step = time.monotonic(), 0
            while viewer.is_running() and not env.done[0]:
                action = act(observation)
                if action is None:
                    break
                result = env.step_chunk(action)
                observation, step = result.observation, step + 1
                with viewer.lock():
                    _copy(env, model, data)
                viewer.sync()
                due = begin + step / (env.control_hz * arguments.speed)
                time.sleep(max(0.0, due - time.monotonic()))
            word = "success" if env.done[0] and result.success.any() else "no success"
            say(f"episode {number + 1}: {word} after {step} steps")
            if not viewer.is_running():
                break
    env.close()
    return 0


def _copy(env: Any, model: Any, data: Any) -> None:
    """The first simulation's state into what the viewer shows."""
    import mujoco

    from twins import rotation

    now = env.snapshot()
    data.qpos[:] = env.simulation.qpos[0]
    for thing in env.task.things:
        if not thing.free:
            at = int(model.body(thing.name).mocapid[0])
            data.mocap_pos[at] = now.position[thing.name][0]
            data.mocap_quat[at] = rotation.quaternion(rotation.log(now.turn[thing.name][0]))
    for name, gone in env.task.hidden(now.memory).items():
        model.geom(name).rgba[3] = 0.0 if gone[0] else 1.0
    mujoco.mj_kinematics(model, data)
    mujoco.mj_camlight(model, data)
