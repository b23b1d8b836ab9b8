"""What feeds the learner's benchmark: segments of the demo's shapes, and a process that writes them at a pace."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._inference_bench import CAMERAS, PIXELS, POSE_DIM, STATE_DIM, policy_config
from buffer_service.client import Writer
from buffer_service.testing import ServiceProcess
from policies.policy import Policy
from twinrl.core.errors import DeadlineError
from twinrl.core.keys import Keys
from twinrl.core.segment import IMAGE_PREFIX, Schema, Segment
from twinrl.env import ACTION_DIM, PRIVILEGED, STATE

CHUNK = 4
STEPS = 32  # transitions in a segment, 8 chunks
SCHEMA = Schema(STATE_DIM, POSE_DIM, CAMERAS, PIXELS, CHUNK)
INSTRUCTION = "pick up the block"
DIFFERENT = 16  # segments of a kind, written in turn
POLICY = policy_config(2)


def segments(source: str, policy: Policy) -> list[Segment]:
    """`DIFFERENT` episodes of `STEPS` steps: "demo" and "real" with a frame at each step, "twin" at each of `policy`'s
    chunks and with what it would have done there."""
    rng = np.random.default_rng([*source.encode()])
    return [_segment(source, rng, policy) for _ in range(DIFFERENT)]


def _segment(source: str, rng: np.random.Generator, policy: Policy) -> Segment:
    acted = source == "twin"
    frame_step = np.arange(0, STEPS + 1, CHUNK if acted else 1, dtype="<i4")
    columns: dict[str, np.ndarray] = {
        STATE: rng.normal(size=(STEPS + 1, STATE_DIM)).astype("<f4"),
        PRIVILEGED: rng.normal(size=(STEPS + 1, POSE_DIM)).astype("<f4"),
        "action": rng.normal(0, 0.01, (STEPS, ACTION_DIM)).astype("<f4"),
        "reward": np.zeros(STEPS, "<f4"),
        "policy_version": np.full(STEPS, 0 if acted else -1, "<i8"),
        "chunk_id": (np.arange(STEPS) // CHUNK if acted else np.full(STEPS, -1)).astype("<i4"),
        "timestamp": np.arange(STEPS) / 10,
        "frame_step": frame_step,
    }
    for name in ("terminated", "truncated", "success", "intervention"):
        columns[name] = np.zeros(STEPS, bool)
    ended = "terminated" if rng.random() < 0.5 else "truncated"
    columns[ended][-1] = True
    columns["success"][-1] = ended == "terminated"
    columns["reward"][-1] = ended == "terminated"
    for camera in CAMERAS:
        shape = (len(frame_step), PIXELS, PIXELS, 3)
        columns[IMAGE_PREFIX + camera] = rng.integers(0, 256, shape, dtype=np.uint8)
    if source == "demo":
        columns["label_action"] = columns["action"]
    if acted:
        columns["chunk_step"] = frame_step[:-1]
        observation = {key: columns[key][:-1] for key in columns if key.startswith(IMAGE_PREFIX)}
        observation[STATE] = columns[STATE][:-1:CHUNK]
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        _, info = policy.act(observation, INSTRUCTION, generator, explore=True)
        columns |= {f"policy.{key}": value for key, value in info.items()}
    header = {
        "source": source,
        "task": "pick-and-place",
        "instruction": INSTRUCTION,
        "region": "id",
        "configuration": {},
        "episode": "",
        "first_step": 0,
        "last": True,
    }
    return Segment(header, columns)


class Feed:
    """A replay service in a process of its own, and another one that writes to it. `close` ends both."""

    def __init__(self, folder: Path, kinds: dict[str, list[Segment]], capacity: int) -> None:
        """`kinds`: what is written, by source; `capacity`: bytes kept of a source."""
        self.service = ServiceProcess(folder / "run", SCHEMA, capacity=capacity)
        self.run_dir = folder / "run"
        self._pipe, other = multiprocessing.Pipe()
        key = str(folder / "run" / "keys" / "cluster.key")
        arguments = (other, self.service.address, key, kinds)
        self._process = multiprocessing.get_context("spawn").Process(
            target=_write, args=arguments, daemon=True
        )
        self._process.start()

    def begin(self, source: str, rate: float, seconds: float) -> None:
        """Write `rate` transitions a second for `seconds` s, or until `end`."""
        self._pipe.send((source, rate, seconds))

    def end(self) -> int:
        """Stop writing; -> how many transitions were written and acknowledged since `begin`."""
        self._pipe.send(None)
        if not self._pipe.poll(60.0):
            raise DeadlineError("the writing process did not answer within 60 s")
        return self._pipe.recv()

    def fill(self, source: str, count: int) -> None:
        """Write `count` segments of `source`."""
        self.begin(source, float("inf"), count)
        if not self._pipe.poll(120.0):
            raise DeadlineError(f"{count} segments were not written within 120 s")
        self._pipe.recv()

    def close(self) -> None:
        """End both processes."""
        self._pipe.close()  # which the writing process sees
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()
        self.service.stop()


def _write(pipe: Any, address: str, key: str, kinds: dict[str, Sequence[Segment]]) -> None:
    writer = Writer(address, Keys.load(key), "feeder", schema=SCHEMA)
    written = 0

    def write(source: str) -> None:
        nonlocal written
        header, columns = kinds[source][written % DIFFERENT]
        writer.write({**header, "episode": f"{source}-{written}"}, columns)
        written += 1

    try:
        while True:
            source, rate, amount = pipe.recv()
            before, began = written, time.monotonic()
            if rate == float("inf"):
                for _ in range(int(amount)):
                    write(source)
            else:
                while time.monotonic() - began < amount and not pipe.poll():
                    write(source)
                    due = began + (written - before) * STEPS / rate
                    pipe.poll(max(due - time.monotonic(), 0.0))
                pipe.recv()
            writer.flush(60.0)
            pipe.send((written - before) * STEPS)
    except (EOFError, BrokenPipeError):
        writer.close()
