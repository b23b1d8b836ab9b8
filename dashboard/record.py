"""The record of a run: last values, bounded history and events, in memory and as lines of JSON in the run's folder."""

from __future__ import annotations

import collections
import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

METRICS_FILE, EVENTS_FILE = "metrics.jsonl", "events.jsonl"
RECENT, COARSE, EVENTS = 300, 600, 500  # points of a series in full, points of its past, events
MAX_SERIES = 20_000  # a process that invents names must not eat the machine
SILENT_S = 6.0  # a process reports once a second; after this long it is silent
FINISHED = ("done", "finished", "complete")

Message = dict[str, Any]
Key = tuple[str, str, str]  # role, name, figure


class Series:
    """One figure over time: the newest points in full, the past thinned to a bounded number, never cut off."""

    def __init__(self, recent: int = RECENT, coarse: int = COARSE) -> None:
        self._recent: collections.deque[tuple[float, float]] = collections.deque()
        self._past: list[tuple[float, float]] = []
        self._limits = (recent, coarse)
        self._stride, self._skipped = 1, 0

    def append(self, when: float, value: float) -> None:
        """Add a point; points come in the order of their times."""
        self._recent.append((when, value))
        if len(self._recent) <= self._limits[0]:
            return
        oldest = self._recent.popleft()
        self._skipped += 1
        if self._skipped < self._stride:
            return
        self._skipped = 0
        self._past.append(oldest)
        if len(self._past) > self._limits[1]:
            self._past = self._past[::2]
            self._stride *= 2

    def points(self) -> list[tuple[float, float]]:
        """All points kept, oldest first."""
        return [*self._past, *self._recent]


class Record:
    """What is known of a run. Thread-safe: one thread adds, others read."""

    def __init__(self, run: str) -> None:
        self.run = run
        self._lock = threading.Lock()
        self._number = 0
        self._started: float | None = None
        self._processes: dict[tuple[str, str], Message] = {}
        self._seen: dict[tuple[str, str], float] = {}  # our clock: other hosts' clocks may differ
        self._crashed: dict[tuple[str, str], float] = {}
        self._series: dict[Key, Series] = {}
        self._events: collections.deque[Message] = collections.deque(maxlen=EVENTS)
        self._stages: list[tuple[float, str]] = []

    @classmethod
    def load(cls, run_dir: Path) -> Record:
        """Read the record of an earlier or a finished run from its folder; an empty record when there is none."""
        record = cls(run_dir.name)
        for message in read_lines(run_dir / METRICS_FILE):
            record.add(message, message.get("time"))
        for message in read_lines(run_dir / EVENTS_FILE):
            record.add(message, message.get("time"))
        return record

    def add(self, message: Message, seen: float | None = None) -> None:
        """Take one message of a Reporter. `seen` is when it arrived, now by default."""
        who = (str(message["role"]), str(message["name"]))
        when, data = float(message["time"]), message["data"]
        seen = time.time() if seen is None else seen
        with self._lock:
            self._number += 1
            self._started = when if self._started is None else min(self._started, when)
            if message["kind"] == "event":
                self._add_event(who, when, message)
            else:
                self._add_stats(who, when, message)
                self._seen[who] = seen
            for key, value in data.items() if message["kind"] == "stats" else ():
                if (number := as_number(value)) is None:
                    continue
                series = self._series.get((*who, key))
                if series is None:
                    if len(self._series) >= MAX_SERIES:
                        continue
                    series = self._series[(*who, key)] = Series()
                series.append(when, number)

    def _add_stats(self, who: tuple[str, str], when: float, message: Message) -> None:
        process = self._processes.setdefault(who, {"role": who[0], "name": who[1], "data": {}})
        process.update(host=message.get("host"), pid=message.get("pid"), time=when)
        # Merged, not replaced: a process may report some figures rarely (an evaluation, once).
        process["data"].update({key: _shown(value) for key, value in message["data"].items()})
        process["stale"] = [key for key in process["data"] if key not in message["data"]]
        stage = message["data"].get("run/stage")
        if isinstance(stage, str) and (not self._stages or self._stages[-1][1] != stage):
            self._stages = [*self._stages, (when, stage)][-200:]
        if when > self._crashed.get(who, math.inf):
            del self._crashed[who]

    def _add_event(self, who: tuple[str, str], when: float, message: Message) -> None:
        fields = {key: _shown(value) for key, value in message["data"].items()}
        place = {key: message.get(key) for key in ("host", "pid")}
        about = {"role": who[0], "name": who[1], "time": when, **place, "number": self._number}
        self._events.append({"level": "info", "text": "", **fields, **about})
        if fields.get("traceback"):
            self._crashed[who] = when

    def snapshot(self, since: int = 0) -> dict[str, Any]:
        """Last values of every process, and the events after message number `since`, as plain types."""
        now = time.time()
        with self._lock:
            stages = [p["data"].get("run/stage") for p in self._processes.values()]
            finished = any(str(stage).lower() in FINISHED for stage in stages)
            processes = [
                {
                    **process,
                    "data": dict(process["data"]),
                    "age": max(0.0, now - self._seen[who]),
                    "status": self._status(who, now, finished),
                }
                for who, process in sorted(self._processes.items())
            ]
            return {
                "run": self.run,
                "time": now,
                "started": self._started,
                "number": self._number,
                "finished": finished,
                "stages": list(self._stages),
                "processes": processes,
                "events": [dict(e) for e in self._events if e["number"] > since],
            }

    def _status(self, who: tuple[str, str], now: float, finished: bool) -> str:
        if who in self._crashed:
            return "crashed"
        if now - self._seen[who] <= SILENT_S:
            return "running"
        return "ended" if finished else "silent"

    def history(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Every series: a header with [role, name, figure, points], and all points one after the other."""
        with self._lock:
            series = [([*key, 0], each.points()) for key, each in self._series.items()]
        for entry, points in series:
            entry[3] = len(points)
        flat = np.array([p for _, points in series for p in points], np.float64).reshape(-1, 2)
        columns = {"times": flat[:, 0].copy(), "values": flat[:, 1].copy()}
        return {"run": self.run, "series": [entry for entry, _ in series]}, columns


def split_history(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[Key, np.ndarray]:
    """The inverse of `Record.history`: {(role, name, figure): (points, 2) times and values}."""
    flat = np.stack([arrays["times"], arrays["values"]], axis=1)
    ends = np.cumsum([entry[3] for entry in header["series"]], dtype=int)
    parts = np.split(flat, ends[:-1]) if len(ends) else []
    return {(e[0], e[1], e[2]): part for e, part in zip(header["series"], parts, strict=True)}


def read_lines(path: Path) -> Iterator[Message]:
    """The messages in a file of JSON lines; lines that a crash left torn are skipped."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                message = json.loads(line)
            except ValueError:
                continue
            if valid(message):
                yield message


def valid(message: Any) -> bool:
    """Whether `message` is one of a Reporter."""
    return (
        isinstance(message, dict)
        and message.get("kind") in ("stats", "event")
        and isinstance(message.get("time"), int | float)
        and isinstance(message.get("data"), dict)
        and all(isinstance(key, str) for key in message["data"])
        and {"role", "name"} <= message.keys()
    )


def as_number(value: Any) -> float | None:
    """`value` as a finite float; None when it is not one."""
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    return None


def _shown(value: Any) -> Any:
    """JSON has no NaN or infinity; as text they stay visible."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
