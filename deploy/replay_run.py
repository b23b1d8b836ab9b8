"""The replay of a run, for a command that only looks: of a running job, or out of the folder of a stopped one."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from buffer_service.client import Reader, ShardedReader
from dashboard.source import LiveSource, open_source
from deploy.shards import local_numbers, role_of
from twinrl.core import wire
from twinrl.core.errors import ConfigError, TwinRLError
from twinrl.core.keys import Keys
from twinrl.parent import PARENT

START_SECONDS = 120.0  # a large index is read in that time, also on a slow disk


def find_run(name: str, runs: str | Path = "runs") -> Path:
    """The folder of a run, by path or by name under `runs`; ConfigError lists those with a replay."""
    for folder in (Path(name), Path(runs) / name):
        if (folder / "replay").is_dir() and (folder / "keys").is_dir():
            return folder.resolve()
    known = sorted(path.parent.name for path in Path(runs).glob("*/replay") if path.is_dir())
    raise ConfigError(
        f"no run {name!r} with a replay; in {runs}/ there are: {', '.join(known) or 'none'}"
    )


@contextlib.contextmanager
def open_replay(run: Path, deadline: float = 30.0) -> Iterator[Reader | ShardedReader]:
    """A reader of the run's replay whose index is complete.

    Where neither the replay service nor the job's collector answers, the run is stopped: its service is started
    from the run's own settings for as long as this lasts, which is said on stderr.
    """
    with contextlib.ExitStack() as stack:
        address = _address(run)
        others = topology(run).get("shards") or []
        if not _listens(address) and not _is_running(run):
            _say(f"{run.name} is not running: serving its replay from {run} for this command")
            address = stack.enter_context(_temporary_service(run))
            for number in local_numbers(topology(run)):
                others[number - 1] = stack.enter_context(_temporary_service(run, number))
        keys = Keys.load(run / "keys" / "cluster.key")
        options: dict[str, Any] = {"name": "twinrl replay", "deadline": deadline}
        options["cache_bytes"] = 256 << 20
        reader: Reader | ShardedReader = (
            ShardedReader([address, *others], keys, run, **options)
            if others
            else Reader(address, keys, run, **options)
        )
        stack.enter_context(reader)
        _compare(reader, run, address)
        reader.sync()
        yield reader


def _compare(reader: Reader | ShardedReader, run: Path, address: str) -> None:
    """Refuse the service of another folder: a copied run has the address and the keys of its original."""
    hello = reader.call("hello", {"protocol": wire.PROTOCOL}, reader.deadline)
    folder = Path(hello["folder"])
    if hello["host"] == socket.gethostname() and folder.exists() and folder != run / "replay":
        raise TwinRLError(
            f"the service at {address} serves {folder}, not {run}: that is a copy, which can be looked at "
            "while the original is not running"
        )


def topology(run: Path) -> dict[str, Any]:
    """The run's topology file; {} where it was never launched."""
    try:
        return json.loads((run / "topology.json").read_text())
    except FileNotFoundError:
        return {}


def _address(run: Path) -> str:
    """Where the run's service listens, or did."""
    note = run / "replay" / "address"
    address = topology(run).get("replay") or (note.read_text().strip() if note.exists() else "")
    if not address:
        raise ConfigError(f"{run} says nowhere where its replay listens: was it ever started?")
    return address


def _listens(address: str) -> bool:
    """Whether somebody accepts connections there; who it is, the keys tell."""
    place = urlsplit(address)
    if place.scheme != "tcp":
        return True
    try:
        socket.create_connection((place.hostname, place.port), timeout=2.0).close()
    except OSError:
        return False
    return True


def _is_running(run: Path) -> bool:
    """Whether the job's collector answers: then its service is only away for a moment, and is not ours to start."""
    source = open_source(run, timeout=1.0)
    source.close()
    return isinstance(source, LiveSource)


@contextlib.contextmanager
def _temporary_service(run: Path, shard: int = 0) -> Iterator[str]:
    """A replay service of the run as a child; gives its address. It takes the run's lock, so there is never a second."""
    if role_of(shard) not in topology(run).get("roles", {}):
        raise ConfigError(
            f"{run.name!r} does not run, and its topology.json doesn't say how to start its replay"
        )
    command = [sys.executable, "-m", "twinrl.main", "serve", "replay", "--run", str(run), "--look"]
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(
            [*command, "--shard", str(shard)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, PARENT: str(os.getpid())},
        )
        assert child.stdout is not None
        try:
            ended = time.monotonic() + START_SECONDS
            while not select.select([child.stdout], [], [], 0.5)[0]:
                if time.monotonic() >= ended:
                    raise TwinRLError(f"the replay of {run} is not ready after {START_SECONDS:g} s")
            line = child.stdout.readline()  # empty when the child ended
            if not line.startswith("replay ready at "):
                log.seek(0)
                words = log.read().strip().splitlines()[-8:]
                raise TwinRLError(
                    f"the replay of {run} cannot be served:\n" + "\n".join(words or ["(no words)"])
                )
            yield line.split()[-1]
        finally:
            child.terminate()
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            child.stdout.close()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
