"""Whether the environment on a GPU is the one on the CPU: success of the scripted expert, first observations, slip.

    python -m benchmarks.envs_gpu_agreement [--device cuda] [--episodes 200] [--task NAME ...] [--json FILE]

Both backends play the same configurations (every randomisation, all regions). Success comes with Wilson's interval at
95 %, and with the number of configurations that ended differently: contacts are chaotic, so single episodes may differ
where the share of successes must not. `--device cpu` runs the same code on warp's CPU device.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.replay import machine
from twinrl.env import IMAGE_PREFIX, STATE
from twins import make_env
from twins.tasks import TASKS

Row = dict[str, Any]
BATCH = 1024  # environments at once on a GPU
HOLD = 20  # control steps, 2 s
Z = 1.96  # of an interval at 95 %


def wilson(successes: int, episodes: int) -> tuple[float, float]:
    """The interval of a share at 95 %."""
    share, square = successes / episodes, Z**2 / episodes
    centre = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * math.sqrt(share * (1 - share) / episodes + square / 4 / episodes)
    return max(0.0, centre - half), min(1.0, centre + half)


def play(env: Any, configurations: list[dict[str, Any]]) -> tuple[np.ndarray, int, float]:
    """Success (n,) of the expert in the configurations, void episodes, seconds."""
    success, void, start = np.zeros(len(configurations), bool), 0, time.perf_counter()
    for first in range(0, len(configurations), env.num_envs):
        part = configurations[first : first + env.num_envs]
        mask = np.arange(env.num_envs) < len(part)
        given = part + [None] * (env.num_envs - len(part))
        env.reset(options={"configurations": given, "reset_mask": mask})
        for _ in range(env.max_steps):
            result = env.step_chunk(env.expert()[:, None])
            success[first : first + len(part)] |= result.success.any(axis=1)[mask]
            void += int(result.invalid[mask].sum())
            if env.done[mask].all():
                break
    return success, void, time.perf_counter() - start


def first_observations(ours: Any, theirs: Any, configurations: list[dict[str, Any]]) -> Row:
    """How far first observations of the same configurations are from each other."""
    one, two = (env.reset(options={"configurations": configurations})[0] for env in (ours, theirs))
    row = {"state_max": float(np.abs(one[STATE] - two[STATE]).max())}
    for key in one:
        if key.startswith(IMAGE_PREFIX):
            apart = np.abs(one[key].astype(int) - two[key].astype(int))
            camera = key.removeprefix(IMAGE_PREFIX)
            row[f"{camera}_mean"], row[f"{camera}_max"] = float(apart.mean()), int(apart.max())
    return row


def slip(env: Any) -> float | None:
    """The most that a grasped thing moves in the hand, mm, in 2 s of holding; None where nothing was grasped."""
    env.reset(seed=2)
    held = np.zeros(env.num_envs, bool)
    for _ in range(env.max_steps - HOLD - 5):
        now = env.snapshot()
        held |= (now.position[env.task.grasped][:, 2] > 0.08) & env.task.held(now)
        if held.all():
            break
        actions = env.expert()
        actions[held] = 0.0
        env.step_chunk(actions[:, None])

    def in_hand() -> np.ndarray:
        now = env.snapshot()
        away = now.position[env.task.grasped] - now.tcp
        return np.einsum("nij,ni->nj", now.tcp_turn, away)

    still = np.zeros((env.num_envs, 1, 7), np.float32)
    for _ in range(5):
        env.step_chunk(still)
    before = in_hand()
    for _ in range(HOLD):
        env.step_chunk(still)
    going = held & ~env.done
    moved = np.linalg.norm(in_hand() - before, axis=1)
    return float(1000 * moved[going].max()) if going.any() else None


def compare(task: str, device: str, episodes: int) -> Row:
    """Everything about one task."""
    settings: Row = {"randomisation": "full", "region": "all", "seed": 7}
    count = min(episodes, BATCH if device != "cpu" else 16)
    ours = make_env(task, count, backend="mujoco-warp", device=device, render=False, **settings)
    theirs = make_env(task, min(episodes, 64), render=False, **settings)
    rng = np.random.default_rng(7)
    configurations = [theirs.draw("all", rng) for _ in range(episodes)]
    row: Row = {"task": task, "device": device, "episodes": episodes}
    outcome = {}
    for name, env in (("mujoco_warp", ours), ("mujoco", theirs)):
        success, void, seconds = play(env, configurations)
        low, high = wilson(int(success.sum()), episodes)
        outcome[name] = success
        row |= {f"{name}_success": float(success.mean()), f"{name}_interval": [low, high]}
        row |= {f"{name}_void": void, f"{name}_s": seconds}
    row["ended_differently"] = int((outcome["mujoco_warp"] != outcome["mujoco"]).sum())
    row["usage"] = ours.simulation.usage_waiting()._asdict()
    ours.close(), theirs.close()
    few = min(8, episodes)
    settings["image_size"] = 64
    ours = make_env(task, few, backend="mujoco-warp", device=device, **settings)
    theirs = make_env(task, few, **settings)
    row |= first_observations(ours, theirs, configurations[:few])
    ours.close(), theirs.close()
    if task == "pick-and-place":
        env = make_env(task, 4, backend="mujoco-warp", device=device, render=False)
        row["slip_mm"] = slip(env)
        env.close()
    return row


def main(arguments: list[str] | None = None) -> None:
    """Compare, print, write the JSON file."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.envs_gpu_agreement",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... or cpu")
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--task", action="append", choices=sorted(TASKS), help="default: all")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(arguments)
    command = ["python", "-m", "benchmarks.envs_gpu_agreement"]
    command += sys.argv[1:] if arguments is None else arguments
    report: Row = {"machine": machine(), "command": shlex.join(command), "rows": []}
    for task in options.task or sorted(TASKS):
        report["rows"].append(compare(task, options.device, options.episodes))
        print(json.dumps(report["rows"][-1]), flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
