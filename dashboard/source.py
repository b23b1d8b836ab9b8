"""Where the dashboard, `twinrl status` and the report read a run: its collector, or the files it left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from dashboard.collector import ADDRESS_FILE
from dashboard.record import EVENTS_FILE, METRICS_FILE, Key, Record, split_history
from twinrl.core.errors import ConfigError, DeadlineError, RemoteError
from twinrl.core.keys import Keys
from twinrl.core.sockets import Client

History = dict[Key, np.ndarray]


class LiveSource:
    """A run whose collector answers."""

    def __init__(self, run_dir: Path, query_address: str, timeout: float = 3.0) -> None:
        keys = Keys.load(run_dir / "keys" / "cluster.key")
        self.client = Client("the collector", query_address, keys, timeout)

    def snapshot(self, since: int = 0) -> dict[str, Any]:
        """See `Record.snapshot`."""
        return self.client.call("snapshot", {"since": since})[0]

    def history(self) -> History:
        """All series, {(role, name, figure): (points, 2)}."""
        return split_history(*self.client.call("history"))

    def close(self) -> None:
        """Close the connection."""
        self.client.close()


class FileSource:
    """A run that is over: its folder is read once."""

    def __init__(self, run_dir: Path) -> None:
        self._record = Record.load(run_dir)

    def snapshot(self, since: int = 0) -> dict[str, Any]:
        """See `Record.snapshot`."""
        return {**self._record.snapshot(since), "refused": 0, "ended": True}

    def history(self) -> History:
        """All series, {(role, name, figure): (points, 2)}."""
        return split_history(*self._record.history())

    def close(self) -> None:
        """Nothing is open."""


def open_source(
    run_dir: Path, query_address: str | None = None, timeout: float = 2.0
) -> LiveSource | FileSource:
    """The run's collector at `query_address` (by default where its folder says), else the run's files."""
    address = query_address or collector_address(run_dir)
    if address:
        source = LiveSource(run_dir, address, timeout)
        try:
            source.snapshot()
            return source
        except (DeadlineError, RemoteError):
            source.close()
    return FileSource(run_dir)


def collector_address(run_dir: Path) -> str | None:
    """The query address that the run's collector wrote into the folder."""
    try:
        return json.loads((run_dir / ADDRESS_FILE).read_text())["query"]
    except (OSError, ValueError, KeyError):
        return None


def find_run(name: str | None = None, runs: str | Path = "runs") -> Path:
    """The folder of run `name` (a name or a path); without a name the run that reported last."""
    runs = Path(runs)
    if name is not None:
        for folder in (Path(name), runs / name):
            if folder.is_dir():
                return folder
        known = sorted(path.parent.name for path in runs.glob(f"*/{METRICS_FILE}"))
        raise ConfigError(f"no run {name!r} in {runs}/; there are: {', '.join(known) or 'none'}")
    files = [*runs.glob(f"*/{METRICS_FILE}"), *runs.glob(f"*/{EVENTS_FILE}")]
    files += runs.glob(f"*/{ADDRESS_FILE}")
    if not files:
        raise ConfigError(f"no run in {runs}/; `twinrl launch` starts one")
    return max(files, key=lambda path: path.stat().st_mtime).parent
