"""The systems that are measured side by side: ours in several settings, and the peers.

Each holds its processes from `start` to `close`, idle while others are measured.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from benchmarks.replay_bench.processes import Worker, built, own, peer
from benchmarks.replay_bench.workload import Workload
from buffer_service.embedded_redis import find_binary
from buffer_service.testing import ServiceProcess
from twinrl.core.sockets import free_port, wait_until

Found = dict[str, dict[str, Any]]  # {"write": ..., "sample": ...}, see protocol.repeat


class System(ABC):
    """Something that takes transitions in and gives batches out."""

    def __init__(self, name: str, workload: Workload, data: Path, folder: Path) -> None:
        """`data`: the workload's file; `folder`: an own one for everything that it writes."""
        self.name, self.workload, self.data = name, workload, data
        self.folder = folder / name
        self.folder.mkdir(parents=True, exist_ok=True)

    @abstractmethod
    def start(self) -> None:
        """Start every process and fill it to its capacity."""

    @abstractmethod
    def both(self, seconds: float) -> Found:
        """Write and sample at the same time."""

    @abstractmethod
    def write(self, seconds: float) -> Found:
        """Write alone."""

    @abstractmethod
    def sample(self, seconds: float) -> Found:
        """Sample alone."""

    @abstractmethod
    def close(self) -> None:
        """End every process, remove the folder."""

    def settings(self) -> dict[str, Any]:
        """What all workers are told."""
        return {
            "data": str(self.data),
            "batch": self.workload.batch,
            "capacity": self.workload.capacity,
        }


class _Pair(System):
    """A writer process and a reader process."""

    writer: Worker
    reader: Worker

    def both(self, seconds: float) -> Found:
        self.writer.send("write", seconds=seconds)
        self.reader.send("sample", seconds=seconds)
        return {
            "write": self.writer.receive(60 + seconds),
            "sample": self.reader.receive(60 + seconds),
        }

    def write(self, seconds: float) -> Found:
        return {"write": self.writer.ask("write", 60 + seconds, seconds=seconds)}

    def sample(self, seconds: float) -> Found:
        return {"sample": self.reader.ask("sample", 60 + seconds, seconds=seconds)}

    def _fill(self) -> None:
        self.writer.ask("fill", 120, transitions=self.workload.capacity)
        self.reader.ask("sample", 120, seconds=0.2)

    def close(self) -> None:
        for each in ("writer", "reader"):
            if hasattr(self, each):
                getattr(self, each).close()
        shutil.rmtree(self.folder, ignore_errors=True)


class TwinRL(_Pair):
    """The replay service: its process, its Redis, a writer, a reader."""

    def __init__(
        self,
        name: str,
        workload: Workload,
        data: Path,
        folder: Path,
        codec: str = "",
        **options: Any,
    ) -> None:
        """`options`: those of the service's command line; `codec`: the writer's."""
        super().__init__(name, workload, data, folder)
        self.codec = codec
        size = workload.capacity * (workload.transition_bytes + 64)
        self.options = {"capacity": max(size, 64 << 20), **options}

    def start(self) -> None:
        self.start_service()
        self.writer, self.reader = self.worker("writer"), self.worker("reader")
        self._fill()

    def start_service(self) -> None:
        """The service alone."""
        self.service = ServiceProcess(self.folder / "run", self.workload.schema, **self.options)

    def worker(self, role: str, name: str = "", **settings: Any) -> Worker:
        """A process that is connected to the service."""
        known = {
            **self.settings(),
            "address": self.service.address,
            "key": str(self.folder / "run" / "keys" / "cluster.key"),
            "schema": list(self.workload.schema),
            "codec": self.codec,
        }
        return own(role, name or f"{self.name}-{role}", {**known, **settings}, self.folder)

    def pids(self) -> list[int]:
        """The service's and its Redis'."""
        redis = self.folder / "run" / "redis" / "redis.pid"
        return [self.service.process.pid, int(redis.read_text())]

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.service.stop()
        super().close()


class Reverb(_Pair):
    """dm-reverb. In memory only: nothing is on disk unless somebody asks for a checkpoint."""

    kind = "reverb"

    def start(self) -> None:
        # The fastest of those tried: a sample unpacks every chunk that it touches, as a whole.
        settings = {**self.settings(), "chunk_length": 1 if self.workload.image else 50}
        self.server = peer(self.kind, "server", settings, self.folder)
        settings["address"] = self.server.ask("address")["address"]
        self.writer = peer(self.kind, "writer", settings, self.folder)
        self.reader = peer(self.kind, "reader", settings, self.folder)
        self._fill()

    def close(self) -> None:
        super().close()
        if hasattr(self, "server"):
            self.server.close()


class TorchRL(System):
    """LazyMemmapStorage: files that the page cache holds and nobody syncs; writer and reader share its lock."""

    kind = "torchrl"

    def start(self) -> None:
        settings = {**self.settings(), "folder": str(self.folder / "memmap")}
        self._worker = peer(self.kind, "both", settings, self.folder)
        self.sample(0.2)

    def both(self, seconds: float) -> Found:
        return self._worker.ask("both", 60 + seconds, seconds=seconds)

    def write(self, seconds: float) -> Found:
        return {"write": self._worker.ask("write", 60 + seconds, seconds=seconds)}

    def sample(self, seconds: float) -> Found:
        return {"sample": self._worker.ask("sample", 120 + seconds, seconds=seconds)}

    def close(self) -> None:
        if hasattr(self, "_worker"):
            self._worker.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class RedisPickle(_Pair):
    """Pickled transitions in a Redis without a log: nothing is on disk."""

    kind = "redis_pickle"

    def start(self) -> None:
        socket = self.folder / "redis.sock"
        arguments = ["--port", "0", "--unixsocket", socket, "--save", "", "--appendonly", "no"]
        self._redis = subprocess.Popen(
            [find_binary(), *map(str, arguments)],
            stdout=subprocess.DEVNULL,
            cwd=self.folder,
        )
        wait_until(socket.exists, 20, "Redis to listen")
        settings = {**self.settings(), "socket": str(socket)}
        self.writer = peer(self.kind, "writer", settings, self.folder)
        self.reader = peer(self.kind, "reader", settings, self.folder)
        self._fill()

    def close(self) -> None:
        if hasattr(self, "_redis"):
            self._redis.terminate()
            self._redis.wait(20)
        super().close()


class ZmqPickle(_Pair):
    """Pickles over REQ/REP into the learner's memory: nothing is on disk."""

    kind = "zmq_pickle"

    def start(self) -> None:
        settings = {**self.settings(), "address": f"tcp://127.0.0.1:{free_port()}"}
        self.reader = peer(self.kind, "reader", settings, self.folder)
        self.writer = peer(self.kind, "writer", settings, self.folder)
        self._fill()


PEER_SYSTEMS = (Reverb, TorchRL, RedisPickle, ZmqPickle)


def available() -> list[type]:
    """The peers whose environments are built."""
    return [each for each in PEER_SYSTEMS if built(each.kind)]
