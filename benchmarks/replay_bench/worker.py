"""TwinRL's writer, reader or learner as a process of the benchmark: `python -m benchmarks.replay_bench.worker ROLE SETTINGS`."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from benchmarks.peers.protocol import load, repeat, serve
from benchmarks.replay_bench.workload import CHUNK, ours
from buffer_service.client import Prefetcher, Reader, Writer
from twinrl.core.keys import Keys, secure_client, secure_server
from twinrl.core.segment import Schema


def _schema(fields: list[Any]) -> Schema:
    state, privileged, cameras, *rest = fields
    return Schema(state, privileged, tuple(cameras), *rest)


def _segments(settings: dict[str, Any]) -> list[Any]:
    return [ours(columns, n) for n, columns in enumerate(load(settings["data"]))]


class _Stream:
    """A Writer and the segments that it writes in turn."""

    def __init__(self, settings: dict[str, Any], name: str, ready: list[Any]) -> None:
        self._ready = ready
        self._steps = len(self._ready[0][1]["action"])
        options = {"codec": settings["codec"]} if settings.get("codec") else {}
        self._writer = Writer(
            settings["address"],
            Keys.load(settings["key"]),
            name,
            schema=_schema(settings["schema"]),
            queue_bytes=settings.get("queue_bytes", 128 << 20),
            **options,
        )
        self._written = 0

    def insert(self) -> int:
        self._writer.write(*self._ready[self._written % len(self._ready)])
        self._written += 1
        return self._steps

    def fill(self, transitions: int) -> dict[str, int]:
        """Write so many transitions."""
        for _ in range(0, transitions, self._steps):
            self.insert()
        self._writer.flush()
        return {"acknowledged": self._written * self._steps}

    def write(self, seconds: float) -> dict[str, Any]:
        """Write for `seconds` s; the clock stops when the last segment is acknowledged."""
        found = repeat(self.insert, seconds, self._writer.flush)
        return {**found, "acknowledged": self._written * self._steps}

    def pace(self, seconds: float, rate: float) -> dict[str, Any]:
        """Write `rate` transitions a second, as actors do."""
        start = time.perf_counter()

        def insert() -> int:
            due = start + self._written_now * self._steps / rate
            time.sleep(max(due - time.perf_counter(), 0))
            self._written_now += 1
            return self.insert()

        self._written_now = 0
        return repeat(insert, seconds, self._writer.flush)

    def close(self) -> None:
        self._writer.close()


def writer(**settings: Any) -> None:
    """One stream of segments."""
    stream = _Stream(settings, f"writer-{os.getpid()}", _segments(settings))
    serve(fill=stream.fill, write=stream.write, pace=stream.pace)
    stream.close()


def crowd(count: int, **settings: Any) -> None:
    """`count` writers, a process each, that write at the same time."""
    pipes, ready = [], _segments(settings)
    for _ in range(count):  # forked before any of them has a socket or a thread
        (read, answer), (asked, ask) = os.pipe(), os.pipe()
        if os.fork() == 0:
            os.close(ask)
            for _, other in pipes:
                os.close(other)
            _member({**settings, "queue_bytes": 16 << 20}, ready, asked, answer)
            os._exit(0)
        os.close(asked)
        os.close(answer)
        pipes.append((os.fdopen(read), ask))
    for read, _ in pipes:
        read.readline()  # it is connected

    def write(seconds: float) -> dict[str, Any]:
        for _, ask in pipes:
            os.write(ask, f"{seconds}\n".encode())
        found = [json.loads(read.readline()) for read, _ in pipes]
        return {
            "transitions": sum(each["transitions"] for each in found),
            "seconds": max(each["seconds"] for each in found),
        }

    serve(write=write)
    for _, ask in pipes:
        os.close(ask)
    for _ in pipes:
        os.wait()


def _member(settings: dict[str, Any], ready: list[Any], asked: int, answer: int) -> None:
    stream = _Stream(settings, f"crowd-{os.getpid()}", ready)
    with os.fdopen(answer, "w", buffering=1) as answers, os.fdopen(asked) as requests:
        answers.write("ready\n")
        for line in requests:
            answers.write(json.dumps({**stream.write(float(line)), "times": []}) + "\n")
    stream.close()


def _reader(settings: dict[str, Any]) -> Reader:
    # A folder that holds nothing is "another host": the reader must go through the socket.
    elsewhere = {"run_dir": settings["elsewhere"]} if "elsewhere" in settings else {}
    cache = {"cache_bytes": settings["cache_bytes"]} if "cache_bytes" in settings else {}
    return Reader(settings["address"], Keys.load(settings["key"]), **elsewhere, **cache)


def reader(**settings: Any) -> None:
    """Draws batches, on the service's host into the same arrays."""
    source, size = _reader(settings), settings["batch"]
    again = source.mapped  # what comes through the socket is in memory of its own already
    batch: dict[str, Any] | None = None

    def draw() -> int:
        nonlocal batch
        batch = source.sample(size, chunk=CHUNK, out=batch if again else None)
        return len(batch["steps"])

    def known() -> dict[str, int | bool]:
        """The newest segment in the index, and whether the older ones that were not evicted are all there."""
        source.sync()
        numbers = [entry.sequence for entry in source.entries()]
        whole = numbers == list(range(numbers[0], numbers[-1] + 1))
        return {"newest": numbers[-1], "whole": whole}

    serve(sample=lambda seconds: repeat(draw, seconds), known=known)


def sender(at: str, curve: bool, bytes: int, key: str, **_: Any) -> None:
    """Bare ZeroMQ: answers every request with so many bytes, not copied."""
    socket = _socket(zmq.REP)
    if curve:
        folder = Path(key).parent
        secure_server(socket, Keys.load(folder / "server.key"))
    socket.bind(at)
    parts = [np.ones(bytes // 4, np.uint8) for _ in range(4)]

    def answer() -> None:
        while True:
            socket.recv()
            socket.send_multipart(parts, copy=False)

    threading.Thread(target=answer, daemon=True).start()
    serve()
    os._exit(0)  # that thread waits for ever


def receiver(at: str, curve: bool, key: str, batch: int, **_: Any) -> None:
    """The other end of `sender`: an answer counts as a batch."""
    socket = _socket(zmq.REQ)
    if curve:
        secure_client(socket, Keys.load(key))
    socket.connect(at)

    def fetch() -> int:
        socket.send(b"")
        socket.recv_multipart(copy=False)
        return batch

    fetch()
    serve(sample=lambda seconds: repeat(fetch, seconds))


def _socket(kind: int) -> zmq.Socket:
    socket = zmq.Context.instance().socket(kind)
    socket.linger = 0
    return socket


def copier(bytes: int, batch: int, **_: Any) -> None:
    """What a reader cannot beat: copies a batch's bytes from one array to another, in pieces of a frame."""
    source, target, piece = np.ones(bytes, np.uint8), np.zeros(bytes, np.uint8), 49_152

    def copy() -> int:
        for start in range(0, bytes, piece):
            target[start : start + piece] = source[start : start + piece]
        return batch

    serve(sample=lambda seconds: repeat(copy, seconds))


def learner(**settings: Any) -> None:
    """Draws a batch, works on it, draws the next; says how long it waited for data."""
    import torch

    torch.set_num_threads(1)
    source, size = _reader(settings), settings["batch"]
    left, right = torch.randn(512, 512), torch.randn(512, 512)

    def work(products: int) -> None:
        for _ in range(products):
            torch.mm(left, right)

    def products_in(seconds: float) -> int:
        """How many matrix products take so long while nothing else runs."""
        work(20)
        start = time.perf_counter()
        work(100)
        return max(round(seconds * 100 / (time.perf_counter() - start)), 1)

    def learn(seconds: float, products: int, prefetch: bool) -> dict[str, Any]:
        out: dict[str, Any] = {}
        ahead = Prefetcher(source, size, chunk=CHUNK) if prefetch else None

        def draw() -> None:
            if ahead is None:
                out.update(source.sample(size, chunk=CHUNK, out=out))
            else:
                next(ahead)

        draw()
        waited, updates, start = 0.0, 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            work(products)
            before = time.perf_counter()
            draw()
            waited += time.perf_counter() - before
            updates += 1
        whole = time.perf_counter() - start
        if ahead is not None:
            ahead.close()
        return {
            "waited_s": waited,
            "seconds": whole,
            "updates": updates,
            "update_s": (whole - waited) / updates,
        }

    serve(learn=learn, calibrate=lambda seconds: {"products": products_in(seconds)})


if __name__ == "__main__":
    ROLES = (writer, reader, copier, crowd, learner, sender, receiver)
    {role.__name__: role for role in ROLES}[sys.argv[1]](**json.loads(sys.argv[2]))
