"""Supervised operating-system processes: started, watched, brought back, and never left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from twinrl.core.errors import ProcessDied
from twinrl.parent import PARENT

MAX_RESTARTS = 5  # within RESTART_WINDOW, then it is given up
RESTART_WINDOW = 60.0  # s
STOP_SECONDS = 5.0  # from SIGTERM to SIGKILL


class Process:
    """One supervised command; output goes to a log file. `may_leave`: ending with code 0 is its own decision."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, may_leave: bool = False
    ) -> None:
        self.name, self.command, self.log, self.may_leave = name, list(command), log, may_leave
        self.starts: list[float] = []
        self.start()

    def start(self) -> None:
        """Start (again)."""
        self.starts.append(time.monotonic())
        with self.log.open("ab") as output:
            self.popen = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is the launcher's to hand on, in order
                env=dict(os.environ, **{PARENT: str(os.getpid())}),
            )

    def last_words(self, lines: int = 20) -> str:
        """The end of the log: where a crash shows its traceback."""
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return ""


class Supervisor:
    """Keeps processes alive. `on_event(level, text)` hears of every death."""

    def __init__(self, logs: Path, on_event: Callable[[str, str], None]) -> None:
        self._logs, self._on_event = logs, on_event
        self._processes: dict[str, Process] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.failed: ProcessDied | None = None
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._thread.start()

    def start(self, name: str, role: str, *arguments: str) -> Process:
        """Start `twinrl serve ROLE ...` under supervision."""
        return self.run(name, [sys.executable, "-m", "twinrl.main", "serve", role, *arguments])

    def run(self, name: str, command: Sequence[str], may_leave: bool = False) -> Process:
        """Start any command under supervision."""
        process = Process(name, command, self._logs / f"{name}.log", may_leave)
        with self._lock:
            self._processes[name] = process
        return process

    def stop(self, name: str) -> None:
        """End one process and forget it."""
        with self._lock:
            process = self._processes.pop(name, None)
        if process is not None:
            _end([process])

    def pids(self) -> dict[str, int]:
        """{name: process id} of what runs."""
        with self._lock:
            return {name: p.popen.pid for name, p in self._processes.items()}

    def check(self) -> None:
        """Raise ProcessDied if something could not be brought back."""
        if self.failed is not None:
            raise self.failed

    def close(self) -> None:
        """End everything, the last started first."""
        self._stop.set()
        self._thread.join(2)
        with self._lock:
            processes = list(self._processes.values())[::-1]
            self._processes.clear()
        _end(processes)

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            with self._lock:
                dead = [p for p in self._processes.values() if p.popen.poll() is not None]
            for process in dead:
                self._bury(process)

    def _bury(self, process: Process) -> None:
        code = process.popen.returncode
        how = (
            f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        )
        if process.may_leave and code == 0:
            with self._lock:
                self._processes.pop(process.name, None)
            self._on_event("info", f"{process.name} has left")
            return
        recent = [t for t in process.starts if time.monotonic() - t < RESTART_WINDOW]
        if len(recent) > MAX_RESTARTS:
            with self._lock:
                self._processes.pop(process.name, None)
            self.failed = ProcessDied(
                f"{process.name} {how} and did so {len(recent)} times within {RESTART_WINDOW:g} s; "
                f"its last words ({process.log}):\n{process.last_words()}"
            )
            self._on_event("error", str(self.failed))
            return
        self._on_event(
            "warning", f"{process.name} {how}; starting it again\n{process.last_words(8)}"
        )
        if not self._stop.is_set():
            process.start()


def _end(processes: list[Process]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.popen.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        try:
            process.popen.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.popen.pid, signal.SIGKILL)
            process.popen.wait()
