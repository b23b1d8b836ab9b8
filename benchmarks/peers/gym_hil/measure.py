"""gym-hil beside ours: its own scene, its own two cameras, a process for each environment.

Answers `open_async`, `run_async` and `close_async` as `benchmarks/_envs_worker.py` does; runs in an environment with
nothing but gym-hil.
"""

from __future__ import annotations

import time
from typing import Any

import gymnasium
import numpy as np
import protocol

TASK = "gym_hil/PandaPickCubeBase-v0"  # images of 128 pixels at 10 Hz, physics at 2 ms


def make() -> Any:
    """One environment, without viewer or input devices."""
    import gym_hil  # noqa: F401  (registers its tasks)

    return gymnasium.make(TASK, image_obs=True)


class Fleet:
    """gym-hil's environments in processes."""

    def __init__(self) -> None:
        self._env: Any = None

    def open_async(self, count: int) -> dict[str, Any]:
        """Start `count` processes."""
        self.close_async()
        self._env = gymnasium.vector.AsyncVectorEnv([make] * count, context="spawn")
        self._env.reset(seed=0)
        return {}

    def run_async(self, seconds: float) -> dict[str, Any]:
        """Environment steps a second under small random actions."""
        env, rng, steps = self._env, np.random.default_rng(0), 0
        start = time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds:
            env.step(rng.normal(0, 0.01, env.action_space.shape).astype(np.float32))
            steps += 1
        return {"per_s": steps * env.num_envs / spent}

    def close_async(self) -> dict[str, Any]:
        """End them."""
        if self._env is not None:
            self._env.close()
            self._env = None
        return {}


if __name__ == "__main__":
    protocol.answers()  # from here on stdout is for answers only
    fleet = Fleet()
    protocol.serve(
        open_async=fleet.open_async, run_async=fleet.run_async, close_async=fleet.close_async
    )
