"""The process of a worker on this host: started in a foreign Python, heard, and ended."""

from __future__ import annotations

import collections
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path

import twinrl
import twins
from twinrl.core.errors import ConfigError
from twinrl.parent import PARENT
from twins.worker.pipe import Pipe

log = logging.getLogger(__name__)
PREFIX = "twinrl-worker-"
LAST_LINES, LONGEST_LINE = 60, 2000  # of its output that are kept; bytes
NEW = 60.0  # s: a younger folder may not have its lock yet
START_SECONDS = 60.0  # for the system to make a process
STOP_SECONDS = 5.0  # from asking to SIGKILL
# Of our own environment: another Python must find its own packages.
OURS = ("PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")


class Folder:
    """A private folder: an import path that holds `twinrl` and `twins` alone."""

    def __init__(self) -> None:
        _remove_abandoned()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        owner = os.open(self.path / "owner", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(owner, fcntl.LOCK_EX)  # until this process ends, however it ends
        self.close = weakref.finalize(self, _close_folder, self.path, owner)
        self.modules.mkdir()
        for package in (twinrl, twins):
            folder = Path(package.__file__).resolve().parent
            (self.modules / folder.name).symlink_to(folder, target_is_directory=True)

    @property
    def modules(self) -> Path:
        """What the worker's Python may import of ours."""
        return self.path / "modules"


def _close_folder(path: Path, owner: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(owner)


def _remove_abandoned() -> None:
    """Remove the folders of this user's processes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime < NEW:
                continue
            owner = os.open(folder / "owner", os.O_RDWR)
            try:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(owner)


def find_python(python: str) -> str:
    """The interpreter that `python` names, as a path; ConfigError when there is none."""
    found = shutil.which(os.path.expanduser(python))
    if found is None:
        raise ConfigError(
            f"twins.python is {python!r}, which is no program that can be run; "
            "give the path of the simulator's Python, such as /opt/simulator/bin/python"
        )
    return os.path.abspath(found)


class WorkerProcess:
    """One process that runs `twins.worker`; never started again, another one takes its place."""

    def __init__(
        self,
        python: str,
        target: str,
        folder: Folder,
        path: Iterable[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`path`: more folders to import from; `environment`: more variables."""
        ours, self._theirs = socket.socketpair()
        self.pipe = Pipe(ours)
        self._command = [find_python(python), "-m", "twins.worker", "--serve", target]
        self._command += ["--pipe", str(self._theirs.fileno()), "--directory", os.getcwd()]
        self._modules = folder.modules
        variables = {k: v for k, v in os.environ.items() if k not in OURS}
        variables["PYTHONPATH"] = os.pathsep.join(
            [str(folder.modules), *(os.path.abspath(p) for p in path)]
        )
        self._variables = variables | {"PYTHONUNBUFFERED": "1"} | dict(environment or {})
        self._lines: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        self._popen: subprocess.Popen | None = None
        self._trouble: Exception | None = None
        started = threading.Event()
        # On Linux a process is told of its parent's end when the thread that started it ends: this one stays.
        self._thread = threading.Thread(
            target=self._run, args=(started,), name=f"worker {target}", daemon=True
        )
        self._thread.start()
        if not started.wait(START_SECONDS) or self._trouble is not None:
            why = self._trouble or f"the system took more than {START_SECONDS:g} s"
            raise ConfigError(f"{self._command[0]} cannot be started: {why}")

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._popen.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._popen.poll() is None

    def how_it_ended(self) -> str:
        """One line about its end, and its last words."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # its socket goes a moment before it
            self._popen.wait(STOP_SECONDS)
        self._thread.join(0.5)  # what it wrote at the end is still being read
        code = self._popen.poll()
        if code is None:
            how = "still runs"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = f"ended with code {code}"
        words = "\n".join(self._lines)
        return f"{how}; its last words:\n{words}" if words else f"{how} without a word"

    def end(self, patience: float = STOP_SECONDS) -> None:
        """Wait `patience` seconds for its end, then kill it with all that it has started."""
        try:
            self._popen.wait(patience)
        except subprocess.TimeoutExpired:
            if patience:
                log.warning("worker %d did not end within %g s and is killed", self.pid, patience)
        # Also when it has ended: a simulator may have left children in its process group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait(STOP_SECONDS)
        self.pipe.close()

    def _run(self, started: threading.Event) -> None:
        try:
            self._popen = subprocess.Popen(
                self._command,
                cwd=self._modules,  # what `python -m` imports from first
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours to hand on, in order
                env=self._variables | {PARENT: str(os.getpid())},
                pass_fds=(self._theirs.fileno(),),
            )
        except OSError as error:
            self._trouble = error
            return
        finally:
            self._theirs.close()  # or its end would not end the connection
            started.set()
        with self._popen.stdout as output:
            for line in iter(lambda: output.readline(LONGEST_LINE), b""):
                text = line.decode(errors="replace").rstrip()
                self._lines.append(text)
                log.debug("worker %d: %s", self._popen.pid, text)
        self._popen.wait()
