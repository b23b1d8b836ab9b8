"""As agentlace does it: the learner's process holds the data, actors send pickles to its REP socket.

`python worker.py writer|reader SETTINGS-AS-JSON`; the reader is the learner. An own small script in that style:
one thread takes messages in, another draws, both in one Python process and under one lock.
"""

from __future__ import annotations

import json
import pickle
import sys
import threading

import numpy as np
import zmq
from protocol import load, repeat, serve

SEEN = ("cam0", "cam1", "state")


def reader(address: str, data: str, capacity: int, batch: int, **_: object) -> None:
    """The learner: a ring of arrays, filled by a thread that answers requests."""
    first = load(data)[0]
    ring = {
        name: np.zeros((capacity, *column.shape[1:]), column.dtype)
        for name, column in first.items()
    }
    lock = threading.Lock()
    generator = np.random.default_rng(0)

    def take_in() -> None:
        count = 0
        socket = zmq.Context.instance().socket(zmq.REP)
        socket.bind(address)
        while True:
            steps = pickle.loads(socket.recv())
            with lock:
                for step in steps:
                    for name, value in step.items():
                        ring[name][count % capacity] = value
                    count += 1
            socket.send(b"ok")

    threading.Thread(target=take_in, daemon=True).start()

    def draw() -> int:
        rows = generator.integers(0, capacity - 1, batch)
        with lock:
            now = {name: column[rows] for name, column in ring.items()}
            after = {name: ring[name][rows + 1] for name in SEEN if name in ring}
        return len(now["reward"]) if after else 0

    serve(sample=lambda seconds: repeat(draw, seconds))


def writer(address: str, data: str, **_: object) -> None:
    """An actor: a segment's transitions are one request."""
    segments = load(data)
    steps = [
        [{n: c[t] for n, c in segment.items()} for t in range(len(segment["reward"]))]
        for segment in segments
    ]
    socket = zmq.Context.instance().socket(zmq.REQ)
    socket.connect(address)
    written = 0

    def insert() -> int:
        nonlocal written
        socket.send(pickle.dumps(steps[written % len(steps)], 5))
        socket.recv()
        written += 1
        return len(steps[0])

    def fill(transitions: int) -> None:
        for _ in range(0, transitions, len(steps[0])):
            insert()

    serve(fill=fill, write=lambda seconds: repeat(insert, seconds))


if __name__ == "__main__":
    {"writer": writer, "reader": reader}[sys.argv[1]](**json.loads(sys.argv[2]))
