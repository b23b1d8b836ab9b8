"""The harness's end of the workers: start a process, ask it for something, wait for its answer."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
from pathlib import Path
from typing import Any

from twinrl.core.errors import DeadlineError, TwinRLError

ROOT = Path(__file__).parents[2]
PEERS = ROOT / "benchmarks" / "peers"
START_SECONDS = 120.0


class Worker:
    """A process that answers `{"do": NAME, ...}` with a JSON object, see `benchmarks/peers/protocol.py`."""

    def __init__(self, name: str, command: list[str], folder: Path) -> None:
        """`folder` takes what it writes to stderr, in `NAME.log`."""
        self.name, self._log = name, folder / f"{name}.log"
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("ab"),
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(PEERS), "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        self._buffer = b""
        self._ready = False

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def send(self, do: str, **arguments: Any) -> None:
        """Ask; `receive` has the answer."""
        if not self._ready:
            self.receive(START_SECONDS)
            self._ready = True
        self._in.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        self._in.flush()

    def receive(self, deadline: float = 60.0) -> dict[str, Any]:
        """The next answer. DeadlineError after `deadline` s; TwinRLError with the log's end where it failed."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._out, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(deadline):
                    raise DeadlineError(f"{self.name} said nothing for {deadline:g} s{self.tail()}")
                part = os.read(self._out.fileno(), 1 << 16)
                if not part:
                    raise TwinRLError(f"{self.name} ended{self.tail()}")
                self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise TwinRLError(f"{self.name} failed: {answer['error']}")
        return answer

    def ask(self, do: str, deadline: float = 60.0, **arguments: Any) -> dict[str, Any]:
        """`send` and `receive`."""
        self.send(do, **arguments)
        return self.receive(deadline)

    def tail(self) -> str:
        """The end of its log."""
        with contextlib.suppress(OSError):
            return ":\n" + self._log.read_text(errors="replace")[-2000:]
        return ""

    def close(self) -> None:
        """End it: by the end of its input, or by force."""
        with contextlib.suppress(OSError):
            self._in.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._out.close()


def own(role: str, name: str, settings: dict[str, Any], folder: Path) -> Worker:
    """One of our processes."""
    module = "benchmarks.replay_bench.worker"
    return Worker(name, [sys.executable, "-m", module, role, json.dumps(settings)], folder)


def peer(kind: str, role: str, settings: dict[str, Any], folder: Path) -> Worker:
    """A process of a peer, in the peer's own environment where it has one."""
    own_python = PEERS / kind / "venv" / "bin" / "python"
    python = own_python if needs_environment(kind) else Path(sys.executable)
    command = [str(python), str(PEERS / kind / "worker.py"), role, json.dumps(settings)]
    return Worker(f"{kind}-{role}", command, folder)


def needs_environment(kind: str) -> bool:
    """Whether `make peers` builds something for it."""
    return (PEERS / kind / "requirements.txt").exists()


def built(kind: str) -> bool:
    """Whether its environment is there."""
    return not needs_environment(kind) or (PEERS / kind / "venv" / ".installed").exists()
