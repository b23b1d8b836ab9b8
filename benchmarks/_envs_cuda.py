"""The device's environments: everything stays on it, actions come as tensors and so do observations."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks._envs_play import TASK
from twins import make_env


def measure(count: int, px: int, seconds: float, device: str = "cuda") -> Callable[[], Any]:
    """What steps `count` environments for `seconds` s, with images of `px` pixels (0: none), and gives a row.

    No resets are in it: configurations are drawn on the host.
    """
    import torch
    import warp as wp

    env = make_env(
        TASK,
        count,
        backend="mujoco-warp",
        device=device,
        options={"tensors": True},
        image_size=px or 64,
        render=px > 0,
        max_steps=1_000_000,
        seed=1,
    )
    env.reset(seed=0)
    actions = torch.randn((count, 7), device=device) * 0.01
    actions[:, 6] = 1.0
    for _ in range(3):  # graphs are recorded, kernels loaded
        env.step(actions)

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"

    def run() -> dict[str, Any]:
        wp.synchronize_device(device)
        start, steps = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            for _ in range(2):
                env.step(actions)
            wp.synchronize_device(device)
            steps += 2
        return {"env_per_s": count * steps / (time.perf_counter() - start), "device": name}

    return run
