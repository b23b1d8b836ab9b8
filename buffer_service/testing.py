"""For tests and benchmarks: segments whose values say where they belong, and a service that can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from buffer_service.client import Reader, Writer
from twinrl.core.errors import TwinRLError
from twinrl.core.keys import Keys
from twinrl.core.segment import IMAGE_PREFIX, Schema
from twinrl.core.sockets import Client, wait_until

SCHEMA = Schema(state_dim=3, privileged_dim=2, cameras=("front", "wrist"), image_size=8, chunk=4)


def segment(
    first: int = 0,
    steps: int = 8,
    *,
    source: str = "twin",
    end: str = "",
    frames: list[int] | None = None,
    schema: Schema = SCHEMA,
    version: int = 0,
    **header: Any,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and columns of a segment whose every value at step t is f(first + t).

    end: "terminated", "truncated" or "" (the episode goes on). frames: steps with a frame, all by default.
    """
    frames = list(range(steps + 1)) if frames is None else frames
    t = first + np.arange(steps + 1)
    image = (schema.image_size, schema.image_size, 3)
    rows = np.array([(first + f) % 251 for f in frames], np.uint8).reshape(-1, 1, 1, 1)
    columns: dict[str, np.ndarray] = {
        "observation.state": np.repeat(t[:, None], schema.state_dim, 1).astype("<f4"),
        "action": np.repeat(t[:-1, None], 7, 1).astype("<f4"),
        "reward": t[:-1].astype("<f4") / 10,
        "terminated": np.zeros(steps, bool),
        "truncated": np.zeros(steps, bool),
        "success": np.zeros(steps, bool),
        "intervention": t[:-1] % 3 == 0,
        "policy_version": np.full(steps, version, "<i8"),
        "chunk_id": np.arange(steps, dtype="<i4") // schema.chunk,
        "timestamp": t[:-1] / 10,
        "frame_step": np.array(frames, "<i4"),
    }
    for camera in schema.cameras:
        columns[IMAGE_PREFIX + camera] = np.broadcast_to(rows, (len(frames), *image)).copy()
    if end:
        columns[end][-1] = True
    return {
        "source": source,
        "task": "lift",
        "instruction": "lift the cube",
        "region": "id",
        "configuration": {"x": 0.1},
        "episode": f"episode of {first}",
        "first_step": first,
        "last": bool(end),
        **header,
    }, columns


class ServiceProcess:
    """The replay service as a process of its own."""

    def __init__(self, run_dir: Path, schema: Schema = SCHEMA, **options: Any) -> None:
        """`options`: those of the service's command line, e.g. capacity=1 << 20."""
        self.run_dir = run_dir
        fields = json.dumps(list(schema))
        self._command = [sys.executable, "-m", "buffer_service.service", "--schema", fields]
        self._command += ["--run-dir", str(run_dir)]
        for key, value in options.items():
            text = value if isinstance(value, str) else json.dumps(value)
            self._command += [f"--{key.replace('_', '-')}", text]
        self.start()

    def start(self) -> None:
        """Start it (again) and wait until it is ready."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            self._command,
            stdout=subprocess.PIPE,
            stderr=(self.run_dir / "service.log").open("ab"),
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()  # ends when the process does
        if not line.startswith("replay ready at "):
            self.process.wait(10)
            raise RuntimeError(f"the service did not start:\n{self.log()}")
        self.address = line.split()[-1]

    def keys(self, role: str = "cluster") -> Keys:
        """The key of a role in this run."""
        return Keys.load(self.run_dir / "keys" / f"{role}.key")

    def log(self) -> str:
        """What it wrote to its log."""
        return (self.run_dir / "service.log").read_text()

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()
        self.process.wait(10)

    def kill_redis(self) -> None:
        """End its Redis as a power cut would."""
        pid = int((self.run_dir / "redis" / "redis.pid").read_text())
        with contextlib.suppress(ProcessLookupError):  # dead already, and not yet started again
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not runs(pid), 5, "the end of Redis")

    def stop(self) -> int:
        """End it in order; returns the exit status."""
        self.process.terminate()
        return self.process.wait(30)


class Bench:
    """A service with its writers and readers, all closed at the end."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.closing: list[Any] = []

    def start(self, **options: Any) -> ServiceProcess:
        """Start the service; `options` as for `ServiceProcess`."""
        self.service = ServiceProcess(self.run_dir, **options)
        return self.service

    def writer(self, name: str = "w", **options: Any) -> Writer:
        """A writer, closed at the end whatever it still holds."""
        options = {"schema": SCHEMA, "deadline": 15.0} | options
        writer = Writer(self.service.address, self.service.keys(), name, **options)
        self.closing.append(lambda: writer.close(0.0) if not writer._stop else None)
        return writer

    def reader(self, **options: Any) -> Reader:
        """A reader, closed at the end."""
        reader = Reader(self.service.address, self.service.keys(), **{"deadline": 15.0, **options})
        self.closing.append(reader.close)
        return reader

    def client(self) -> Client:
        """A bare connection, closed at the end."""
        client = Client("replay", self.service.address, self.service.keys(), timeout=10)
        self.closing.append(client.close)
        return client

    def close(self) -> None:
        """Close all and stop the service if it still runs."""
        for close in self.closing[::-1]:
            with contextlib.suppress(TwinRLError):  # a test leaves things unacknowledged on purpose
                close()
        if self.service.process.poll() is None:
            self.service.stop()
        if self.service.process.stdout is not None:
            self.service.process.stdout.close()


def runs(pid: int) -> bool:
    """Whether a process with this number runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before the open, or before the read
        return False
