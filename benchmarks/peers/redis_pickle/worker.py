"""Pickled transitions in a plain Redis, one key each: `python worker.py writer|reader SETTINGS-AS-JSON`."""

from __future__ import annotations

import json
import pickle
import sys

import numpy as np
import redis
from protocol import load, repeat, serve

SEEN = ("cam0", "cam1", "state")


def writer(socket: str, data: str, capacity: int, **_: object) -> None:
    """SETs of one segment's transitions in one pipeline; the oldest are overwritten."""
    client = redis.Redis(unix_socket_path=socket)
    segments = load(data)
    written = 0

    def insert() -> int:
        nonlocal written
        segment = segments[written // len(segments[0]["reward"]) % len(segments)]
        steps = len(segment["reward"])
        with client.pipeline(transaction=False) as pipeline:
            for t in range(steps):
                value = {name: column[t] for name, column in segment.items()}
                pipeline.set((written + t) % capacity, pickle.dumps(value, 5))
            pipeline.execute()
        written += steps
        return steps

    def fill(transitions: int) -> None:
        while written < transitions:
            insert()

    serve(fill=fill, write=lambda seconds: repeat(insert, seconds))


def reader(socket: str, capacity: int, batch: int, **_: object) -> None:
    """One MGET of the transitions and their successors, unpickled and stacked."""
    client = redis.Redis(unix_socket_path=socket)
    generator = np.random.default_rng(0)

    def draw() -> int:
        keys = generator.integers(0, capacity - 1, batch)
        values = client.mget([*keys.tolist(), *(keys + 1).tolist()])
        steps = [pickle.loads(value) for value in values]
        now = {name: np.stack([step[name] for step in steps[:batch]]) for name in steps[0]}
        after = {
            name: np.stack([step[name] for step in steps[batch:]])
            for name in SEEN
            if name in steps[0]
        }
        return len(now["reward"]) if after else 0

    serve(sample=lambda seconds: repeat(draw, seconds))


if __name__ == "__main__":
    {"writer": writer, "reader": reader}[sys.argv[1]](**json.loads(sys.argv[2]))
