"""dm-reverb as server, writer or reader process: `python worker.py ROLE SETTINGS-AS-JSON`."""

from __future__ import annotations

import json
import os
import sys

os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="-1")
import reverb
from protocol import load, repeat, serve

TABLE = "replay"


def server(capacity: int, batch: int, **_: object) -> None:
    """Uniform sampler, oldest removed first, no limit on the ratio: as little work as Reverb can have."""
    table = reverb.Table(
        TABLE,
        sampler=reverb.selectors.Uniform(),
        remover=reverb.selectors.Fifo(),
        max_size=capacity,
        rate_limiter=reverb.rate_limiters.MinSize(batch),
    )
    running = reverb.Server(tables=[table], port=None)
    serve(address=lambda: {"address": f"localhost:{running.port}"})
    running.stop()


def writer(address: str, data: str, chunk_length: int, **_: object) -> None:
    """Appends steps; an item is two consecutive observations and what lies between them."""
    segments = load(data)
    steps = [
        [
            {name: column[min(t, len(column) - 1)] for name, column in segment.items()}
            for t in range(len(segment["state"]))
        ]
        for segment in segments
    ]
    names = list(steps[0][0])
    seen = [name for name in names if name in ("cam0", "cam1", "state")]
    keep = max(2, chunk_length)
    stream = reverb.Client(address).trajectory_writer(num_keep_alive_refs=keep)
    written = 0

    def insert() -> int:
        nonlocal written
        segment = steps[written % len(steps)]
        for t, step in enumerate(segment):
            stream.append(step)
            if not written and not t:
                for name in names:
                    stream.configure(
                        (name,), num_keep_alive_refs=keep, max_chunk_length=chunk_length
                    )
            if t:
                trajectory = {
                    name: stream.history[name][-2:] if name in seen else stream.history[name][-2:-1]
                    for name in names
                }
                stream.create_item(TABLE, priority=1.0, trajectory=trajectory)
        stream.end_episode(clear_buffers=True)
        written += 1
        return len(segment) - 1

    def fill(transitions: int) -> None:
        for _ in range(0, transitions, len(segments[0]["reward"])):
            insert()
        stream.flush()

    serve(fill=fill, write=lambda seconds: repeat(insert, seconds, stream.flush))


def reader(address: str, data: str, batch: int, **_: object) -> None:
    """Batches from a TrajectoryDataset, as Reverb's documentation has it."""
    import tensorflow as tf

    tf.config.threading.set_inter_op_parallelism_threads(2)
    segment = load(data)[0]
    kinds, shapes = {}, {}
    for name, column in segment.items():
        count = 2 if name in ("cam0", "cam1", "state") else 1
        kinds[name] = tf.as_dtype(column.dtype)
        shapes[name] = tf.TensorShape([count, *column.shape[1:]])
    dataset = reverb.TrajectoryDataset(
        server_address=address,
        table=TABLE,
        dtypes=kinds,
        shapes=shapes,
        max_in_flight_samples_per_worker=2 * batch,
        num_workers_per_iterator=1,
    )
    batches = None

    def draw() -> int:
        nonlocal batches
        if batches is None:
            batches = iter(dataset.batch(batch).prefetch(1))
        drawn = {name: tensor.numpy() for name, tensor in next(batches).data.items()}
        return len(drawn["reward"])

    serve(sample=lambda seconds: repeat(draw, seconds))


if __name__ == "__main__":
    {"server": server, "writer": writer, "reader": reader}[sys.argv[1]](**json.loads(sys.argv[2]))
