"""What a process border takes of an environment's throughput: the same simulator here, and in a worker.

Both environments play the same actions in turn, chunk by chunk with both cameras, on one thread each, and must reach
the same states and pictures bit for bit. `python -m benchmarks.envs --rows border` measures it.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import psutil

from benchmarks._others import Others
from twinrl.env import ACTION_DIM, Env
from twins import make_env

Row = dict[str, Any]
CHUNK = 4  # control steps to a picture, as in a job
MOTION = 0.01  # m and rad, standard deviation of an action
PATIENCE = 20.0  # s that a round may wait for a quiet moment


def measure(quick: bool) -> dict[str, Any]:
    """{"rows": ...}: `process_border` is the share of throughput lost at 512 environments with images of 64 pixels.

    `cpu` is the share of processor time that went to the border, which a busy machine disturbs less. With few
    environments the same milliseconds weigh more: `border` is their share there.
    """
    rounds, chunks = (3, 1) if quick else (5, 3)
    rows = compare(512, rounds, chunks, quick, "process_border")
    return {"rows": rows + compare(16, rounds, 16 * chunks, quick, "border")}


def compare(count: int, rounds: int, chunks: int, quick: bool, key: str) -> list[Row]:
    """One row for each round of `count` environments."""
    settings = {"num_envs": count, "image_size": 64, "seed": 1, "max_steps": 100_000}
    inside, outside = make_env(**settings), make_env(**settings, python=sys.executable)
    others, worker = Others(), psutil.Process(outside.simulation.pid)
    rng = np.random.default_rng(0)
    for env in (inside, outside):
        env.reset()
        env.step_chunk(np.zeros((count, CHUNK, ACTION_DIM), np.float32))
    rows: list[Row] = []
    for number in range(rounds):
        if not quick:
            others.wait(PATIENCE)
        others.start()
        before, worked = outside.simulation.stats(), _cpu_seconds(worker)
        seconds, used = {inside: 0.0, outside: 0.0}, {inside: 0.0, outside: 0.0}
        for turn in range(chunks):
            actions = rng.normal(0, MOTION, (count, CHUNK, ACTION_DIM)).astype(np.float32)
            for env in (inside, outside) if (number + turn) % 2 else (outside, inside):
                start, busy = time.perf_counter(), time.process_time()
                env.step_chunk(actions)
                seconds[env] += time.perf_counter() - start
                used[env] += time.process_time() - busy
        after = outside.simulation.stats()
        used[outside] += _cpu_seconds(worker) - worked
        calls = after["worker/calls"] - before["worker/calls"]
        steps = count * CHUNK * chunks
        rows.append(
            {
                "envs": count,
                "px": 64,
                "round": number,
                "inside_steps_per_s": steps / seconds[inside],
                "outside_steps_per_s": steps / seconds[outside],
                "call_ms": 1e3 * (after["worker/border_s"] - before["worker/border_s"]) / calls,
                key: 1.0 - seconds[inside] / seconds[outside],
                "cpu": 1.0 - used[inside] / used[outside],
                "others": round(others.cores(), 3),
            }
        )
    _must_agree(inside, outside)
    for env in (inside, outside):
        env.close()
    return rows


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _must_agree(inside: Env, outside: Env) -> None:
    nothing = np.zeros((inside.num_envs, 1, ACTION_DIM), np.float32)
    here, there = (env.step_chunk(nothing).observation for env in (inside, outside))
    for key, array in here.items():
        if not np.array_equal(array, there[key]):
            raise AssertionError(f"{key} differs between the two sides of the border")
