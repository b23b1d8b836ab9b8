"""TorchRL's LazyMemmapStorage: a sampling process and the writer process that it forks.

`python worker.py both SETTINGS-AS-JSON`. Each observation is stored once; the next one is the next row. (TorchRL's
usual layout keeps it again under "next", which halves the rate of inserts.)
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from typing import Any

import torch
from protocol import answers, load, repeat, serve
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, ReplayBuffer


def both(data: str, capacity: int, batch: int, folder: str, **_: object) -> None:
    """Answers for reader and writer."""
    answers()  # before TorchRL prints
    torch.set_num_threads(1)
    segments = []
    for segment in load(data):
        steps = len(segment["reward"])
        tensors = {name: torch.from_numpy(column[:steps]) for name, column in segment.items()}
        segments.append(TensorDict(tensors, [steps]))
    buffer = ReplayBuffer(
        storage=LazyMemmapStorage(capacity, scratch_dir=folder), batch_size=batch, shared=True
    )
    written = 0

    def insert() -> int:
        nonlocal written
        segment = segments[written % len(segments)]
        buffer.extend(segment)
        written += 1
        return len(segment)

    def draw() -> int:
        now, where = buffer.sample(return_info=True)
        index = torch.as_tensor(where["index"])
        after = buffer[(index + 1) % capacity]
        return len(now) if len(after) == len(now) else 0

    for _ in range(0, capacity, len(segments[0])):
        insert()
    ours, its = multiprocessing.Pipe()

    def write_when_asked(requests: Any) -> None:
        while seconds := requests.recv():
            requests.send(repeat(insert, seconds))

    child = multiprocessing.get_context("fork").Process(
        target=write_when_asked, args=(its,), daemon=True
    )
    child.start()

    def write(seconds: float) -> dict[str, Any]:
        ours.send(seconds)
        return ours.recv()

    def write_and_sample(seconds: float) -> dict[str, Any]:
        ours.send(seconds)
        sampled = repeat(draw, seconds)
        return {"write": ours.recv(), "sample": sampled}

    serve(
        fill=lambda transitions: None,  # it is full already
        write=write,
        sample=lambda seconds: repeat(draw, seconds),
        both=write_and_sample,
    )
    ours.send(0)
    child.join(5)


if __name__ == "__main__":
    both(**json.loads(sys.argv[2]))
