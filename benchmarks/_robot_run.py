"""A run for one arm without Ray: replay service, gateway and a policy, each a process, and an arm on a network that fails.

For benchmarks and tests of the bridge.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._arm_log import set_points
from benchmarks._network import BadLink
from buffer_service.reader import Reader
from robot_bridge import gateway as gateway_module
from robot_bridge.policy_link import PolicyLink
from twinrl.core.errors import DeadlineError, RemoteError
from twinrl.core.keys import Keys, create_keys
from twinrl.core.segment import Schema
from twinrl.core.sockets import free_port

HZ = 10.0
WAVE_S, WAVE_M = 2.0, 0.03  # the policy's motion: a circle in the air


def _policy(address: str, key: str, chunk: int, toggle: int) -> None:
    """Chunks of a slow circle, for ever; the gripper closes or opens every `toggle` steps, 0 never."""
    link = PolicyLink(address, Keys.load(key))
    while True:
        with contextlib.suppress(DeadlineError, RemoteError):
            request = link.take(1.0)
            if request is None:
                continue
            phase = 2 * np.pi * (request.step + np.arange(chunk)) / (WAVE_S * HZ)
            actions = np.zeros((chunk, 7), np.float32)
            pace = WAVE_M * 2 * np.pi / (WAVE_S * HZ)
            actions[:, 0], actions[:, 1] = pace * np.cos(phase), pace * np.sin(phase)
            actions[:, 6] = 1.0
            if toggle:
                actions[:, 6] = (request.step + np.arange(chunk)) // toggle % 2
            link.give(request, actions, {}, 1)


def _serve_replay(folder: str, address: str, schema: Schema) -> None:
    from buffer_service.service import serve

    serve(folder, address, schema)


class RobotRun:
    """Starts everything; `attach` an arm, then look at `rows` and at what the replay service `stored`."""

    def __init__(
        self,
        folder: Path,
        schema: Schema,
        metrics_address: str = "",
        host: str = "127.0.0.1",
        toggle: int = 0,
        **job: Any,
    ) -> None:
        """`host`: where the gateway listens for the arm. `toggle`: steps after which the policy moves the gripper."""
        self.folder, self.schema, self.host = folder, schema, host
        create_keys(folder / "keys")
        self.cluster = Keys.load(folder / "keys/cluster.key")
        ports = [free_port() for _ in range(3)]
        self.port = ports[0]
        hosts = (host, "127.0.0.1", "127.0.0.1")
        outside, self.inside, self.replay = (
            f"tcp://{h}:{p}" for h, p in zip(hosts, ports, strict=True)
        )
        told = {"run": "bench", "task": "pick-and-place", "instruction": "go round", **job}
        context = multiprocessing.get_context("spawn")
        run, key = str(folder), str(folder / "keys/cluster.key")
        self._processes = [
            context.Process(target=target, args=args, daemon=False)
            for target, args in (
                (_serve_replay, (run, self.replay, schema)),
                (
                    gateway_module.serve,
                    (run, outside, self.inside, self.replay, schema, told, metrics_address),
                ),
                (_policy, (self.inside, key, schema.chunk, toggle)),
            )
        ]
        for process in self._processes:
            process.start()
        self.link = PolicyLink(self.inside, self.cluster)
        self._bridges: list[subprocess.Popen] = []

    def attach(
        self, *arguments: str, port: int | None = None, before: tuple[str, ...] = (), **popen: Any
    ) -> subprocess.Popen:
        """`twinrl attach`, over `port` instead of straight to the gateway; `before`: what the command is started with."""
        command = [
            *(*before, sys.executable, "-m", "robot_bridge.attach", "--name", "arm"),
            *("--url", f"tcp://{self.host}:{port or self.port}"),
            *("--key", str(self.folder / "keys/robot.key")),
            *("--spool", str(self.folder / "spool"), "--wait", "60", *arguments),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._bridges.append(subprocess.Popen(command, env=environment, **popen))
        return self._bridges[-1]

    def row(self, name: str = "arm") -> dict[str, Any]:
        """What the gateway knows of an arm."""
        with contextlib.suppress(DeadlineError, RemoteError):
            for row in self.link.robots()[0]:
                if row["name"] == name:
                    return row
        return {}

    @property
    def alive(self) -> bool:
        """Service, gateway and policy run."""
        return all(process.is_alive() for process in self._processes)

    def kill(self) -> float:
        """SIGKILL for all three; when, s on the monotonic clock."""
        when = time.monotonic()
        for process in self._processes:
            process.kill()
        return when

    def wait(self, what: str, there: Any, seconds: float = 60.0, every: float = 0.05) -> Any:
        """Wait until `there(row)`, asked each `every` s; DeadlineError says for `what`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            row = self.row()
            if row and there(row):
                return row
            time.sleep(every)
        raise DeadlineError(f"waited {seconds:g} s for {what}; the arm is {self.row()}")

    def stored(self) -> list[tuple[dict[str, Any], Any]]:
        """Header and columns of every segment that the replay service has."""
        reader = Reader(self.replay, self.cluster, self.folder, schema=self.schema)
        try:
            reader.sync()
            segments = [segment for segment in reader.load(reader.entries()) if segment is not None]
            return [(segment.header, segment.columns) for segment in segments]
        finally:
            reader.close()

    def close(self) -> None:
        """End everything."""
        for bridge in self._bridges:
            if bridge.poll() is None:
                bridge.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    bridge.wait(10)
            if bridge.poll() is None:
                bridge.kill()
                bridge.wait(10)
        self.link.close()
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join(10)


class Stage:
    """A run, a network that can fail, and over it the stand-in in real time, whose own log is `log`."""

    def __init__(self, folder: Path, schema: Schema, max_steps: int = 50, **job: Any) -> None:
        self.folder, self.max_steps = folder, max_steps
        self.run = RobotRun(folder, schema, max_steps=max_steps, chunk=schema.chunk, **job)
        self.network = BadLink(self.run.port)
        self.log = folder / "arm.log"
        self.output = folder / "attach.log"

    def attach(self, *more: str, options: tuple[str, ...] = (), **popen: Any) -> subprocess.Popen:
        """`twinrl attach --robot sim`, with driver's `options`; what it prints goes to `output`."""
        options = (f"log={self.log}", "reset_seconds=0.2", *options)
        parts = [part for option in options for part in ("--robot-option", option)]
        with self.output.open("ab") as output:
            return self.run.attach(
                *("--robot", "sim", "--operator", "scripted", "--takeovers", "0", *parts, *more),
                port=self.network.port,
                **{"stdin": subprocess.DEVNULL, "stdout": output, **popen},
                stderr=subprocess.STDOUT,
            )

    def moving(self, after: str = "") -> dict[str, Any]:
        """The gateway's row, in the middle of an episode that is not `after`: 2.5 s and more of it are left."""

        def there(row: dict[str, Any]) -> bool:
            last = row["last"]
            fresh = row["attached"] and last.get("episode") != after
            return fresh and 5 < last.get("step", 0) < self.max_steps - 25

        return self.run.wait("motion", there)

    def told(self, text: str, seconds: float = 20.0) -> float:
        """When `text` came in what attach prints; s on the monotonic clock."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if text in self.output.read_text():
                return time.monotonic()
            time.sleep(0.002)
        raise DeadlineError(f"attach did not say {text!r}: {self.output.read_text()}")

    def leave(self, arm: subprocess.Popen) -> int:
        """Detach; the exit status."""
        arm.send_signal(signal.SIGTERM)
        return arm.wait(30)

    def set_points(self) -> np.ndarray:
        """The arm's log."""
        return set_points(self.log)

    def counts(self, name: str = "arm") -> dict[str, int]:
        """Segments of an arm that has left: stored, and lost, repeated and still waiting of those that it numbered."""
        spool = self.folder / "spool" / name / "bench"
        stored = [(h, c) for h, c in self.run.stored() if h["robot"] == name]
        numbered = int(json.loads((spool / "numbers.json").read_text())["sequence"])
        lost, repeated = lost_and_repeated(stored, numbered)
        waiting = len(list(spool.glob("*.seg")))
        return {"segments": len(stored), "lost": lost, "repeated": repeated, "waiting": waiting}

    def close(self) -> None:
        """End everything."""
        self.network.close()
        self.run.close()


def lost_and_repeated(stored: list[tuple[dict[str, Any], Any]], sent: int) -> tuple[int, int]:
    """Segments of one writer that are missing of `sent`, and that are there twice; gaps in episodes count as lost."""
    numbers = [header["sequence"] for header, _ in stored]
    repeated = len(numbers) - len(set(numbers))
    lost = len(set(range(sent)) - set(numbers))
    episodes: dict[str, list[tuple[int, int, bool]]] = {}
    for header, columns in sorted(stored, key=lambda pair: pair[0]["sequence"]):
        part = (header["first_step"], len(columns["action"]), header["last"])
        episodes.setdefault(header["episode"], []).append(part)
    for parts in episodes.values():
        step = 0
        for first, count, _ in parts:
            lost += first != step
            step = first + count
        lost += not parts[-1][2]
    return lost, repeated


__all__ = ["RobotRun", "Stage", "lost_and_repeated"]
