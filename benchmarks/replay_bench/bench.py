"""What every group of rows gets: how long, how often, which sizes, where; and what is measured in one place only."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._others import Others
from benchmarks.replay_bench.systems import System, available
from benchmarks.replay_bench.workload import SMALL, W, Workload, create

Row = dict[str, Any]
SETTINGS = (
    "files everysec",
    "files always",
    "files never",
    "redis everysec",
    "redis always",
    "redis never",
)


@dataclass
class Bench:
    """The settings of a run."""

    folder: Path  # for everything that is written, on the disk that is measured
    seconds: float = 2.5  # of one phase
    rounds: int = 5
    workload: Workload = W
    small: Workload = SMALL
    stored_bytes: int = 2 << 30  # images in the store that is restarted
    settings: tuple[str, ...] = SETTINGS  # of ours that are measured beside the peers
    restarts: int = 3
    settle: float = 1.5  # s until what was written last is synced
    crowds: tuple[int, ...] = (1, 4, 64)  # writers at the same time
    update: float = 0.15  # s that the learner works on a batch
    patience: float = 30.0  # s that a group may wait for quiet moments
    peers: list[type] = field(default_factory=available)
    _others: Others = field(default_factory=Others)
    _data: dict[Workload, Path] = field(default_factory=dict)

    def data(self, workload: Workload) -> Path:
        """The workload's file."""
        if workload not in self._data:
            path = self.folder / f"segments{len(self._data)}.npz"
            create(path, workload)
            self._data[workload] = path
        return self._data[workload]

    def phase(self, do: Callable[[], Any]) -> tuple[Any, float]:
        """What `do()` gives, and the cores that others used meanwhile; waits for a quiet moment first."""
        if self.patience > 0:
            self.patience = self._others.wait(self.patience)
        self._others.start()
        found = do()
        return found, self._others.cores()


@contextlib.contextmanager
def running(systems: list[System]) -> Iterator[list[System]]:
    """All of them started, in the end all of them closed."""
    try:
        for system in systems:
            system.start()
        yield systems
    finally:
        for system in systems:
            system.close()


def rates(found: dict[str, dict[str, Any]], workload: Workload) -> Row:
    """Transitions and MB a second of what a system's phase found."""
    row: Row = {}
    sizes = {"write": workload.transition_bytes, "sample": workload.sampled_bytes}
    for kind, each in found.items():
        row[f"{kind}_per_s"] = each["transitions"] / each["seconds"]
        row[f"{kind}_MB_s"] = row[f"{kind}_per_s"] * sizes[kind] / 1e6
    return row


class Copying:
    """numpy's copy of a batch's bytes: the rate of plain memory, measured between the phases."""

    def __init__(self, workload: Workload) -> None:
        """Sources as large as the store, so that they come from memory and not from a cache, as a batch does."""
        self._bytes = workload.batch * 2 * workload.image_bytes
        count = max(workload.capacity * workload.image_bytes // self._bytes, 2)
        self._sources = [np.ones(self._bytes, np.uint8) for _ in range(count)]
        self._target = np.zeros(self._bytes, np.uint8)

    def rate(self, seconds: float = 0.5) -> float:
        """MB/s."""
        copies, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            np.copyto(self._target, self._sources[copies % len(self._sources)])
            copies += 1
        return copies * self._bytes / (time.perf_counter() - start) / 1e6


def percentile(times: list[float], share: float) -> float:
    """The `share` (0..1) quantile of `times`."""
    return float(np.quantile(times, share)) if times else float("nan")


def median(values: list[float]) -> float:
    """Of at least one value."""
    return float(statistics.median(values))
