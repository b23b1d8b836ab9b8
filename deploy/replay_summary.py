"""`twinrl replay RUN summary`: sizes and success rates, and the service's own account of itself."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from buffer_service.client import Reader
from dashboard.statistics import wilson
from deploy.replay_episodes import FAILURE, SUCCESS, Episode, ago, size
from twinrl.core.segment import SOURCES

WRITERS = 12  # that are shown


def summarise(reader: Reader, run: Path, found: list[Episode]) -> dict[str, Any]:
    """Figures of the episodes `found` and of the whole service, as plain values."""
    info = reader.info()
    places = [(e.entries[0].source, e.entries[0].task, e.entries[0].region) for e in found]
    order = {source: number for number, source in enumerate(SOURCES)}
    groups = [
        {"source": place[0], "task": place[1], "region": place[2]}
        | _figures([e for e, its in zip(found, places, strict=True) if its == place])
        for place in sorted(set(places), key=lambda place: (order[place[0]], *place[1:]))
    ]
    writers: dict[str, dict[str, Any]] = {
        name: {"sequence": sequence, "segments": 0, "time": None}
        for name, sequence in info["writers"].items()
    }
    for entry in reader.entries():
        writer = writers.setdefault(
            entry.writer, {"sequence": entry.sequence, "segments": 0, "time": None}
        )
        writer["segments"] += 1
        writer["time"] = max(writer["time"] or 0.0, entry.time)
    return {
        "run": run.name,
        "groups": groups,
        "total": _figures(found),
        "bytes_on_disk": _on_disk(run),
        "form": info["form"],
        "flush": info["flush"],
        "promise": info["promise"],
        "capacity": {source: info["capacity"].get(source) for source in SOURCES},
        "stored": {source: _held(reader, source) for source in SOURCES},
        "remover": info["remover"],
        "counters": info["counters"],
        "cursors": info["cursors"],
        "writers": writers,
        "waiting": info["waiting"],
    }


def _figures(found: list[Episode]) -> dict[str, Any]:
    """Sizes, and success among the episodes that ended."""
    outcomes = [episode.outcome for episode in found]
    succeeded = outcomes.count(SUCCESS)
    rate = wilson(succeeded, succeeded + outcomes.count(FAILURE))
    acted = [version for episode in found for version in episode.versions or ()]
    return {
        "episodes": len(found),
        "segments": sum(len(episode.entries) for episode in found),
        "transitions": sum(episode.steps for episode in found),
        "bytes": sum(episode.bytes for episode in found),
        "ended": rate.episodes,
        "success": rate.rate if rate.episodes else None,
        "success_low": rate.low,
        "success_high": rate.high,
        "marked": sum(bool(episode.marked) for episode in found),
        "versions": [min(acted), max(acted)] if acted else None,
    }


def _held(reader: Reader, source: str) -> int:
    return sum(entry.length for entry in reader.entries(source))


def _on_disk(run: Path) -> dict[str, int]:
    """Bytes that the folders take on this host, allocated and not yet used ones included."""
    sizes = {}
    for name in ("replay", "redis"):
        sizes[name] = 0
        for path in (p for part in (run, *run.glob("replay-*")) for p in (part / name).rglob("*")):
            try:
                sizes[name] += path.lstat().st_blocks * 512
            except OSError:  # evicted meanwhile
                continue
    return sizes


def render(told: dict[str, Any]) -> RenderableType:
    """The summary as tables."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("source", "task", "region"):
        table.add_column(name, no_wrap=True)
    for name in ("episodes", "segments", "transitions", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("success [95 %]", no_wrap=True)
    table.add_column("policy", no_wrap=True)
    for group in told["groups"]:
        names = (group["source"], group["task"], group["region"])
        table.add_row(*(Text(name) for name in names), *_cells(group))
    if len(told["groups"]) != 1:
        table.add_row("all", "", "", *_cells(told["total"]), style="bold")
    return Group(Text(told["run"], style="bold"), Text(), table, Text(), _service(told))


def _cells(figures: dict[str, Any]) -> list[str]:
    success = "-"
    if figures["ended"]:
        low, high = 100 * figures["success_low"], 100 * figures["success_high"]
        success = (
            f"{100 * figures['success']:.0f} % [{low:.0f}, {high:.0f}] of {figures['ended']:,}"
        )
    versions = figures["versions"]
    if versions is None:
        policy = "-"
    else:
        policy = str(versions[0]) if versions[0] == versions[1] else f"{versions[0]}-{versions[1]}"
    counts = [f"{figures[key]:,}" for key in ("episodes", "segments", "transitions")]
    return [*counts, size(figures["bytes"]), success, policy]


def _service(told: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, text: str, style: str = "") -> None:
        table.add_row(name, Text(text, style=style))

    row("promise", f"{told['flush']}: {told['promise']}")
    quotas = [
        f"{source} {size(told['stored'][source])} {_limit(told['capacity'][source])}"
        for source in SOURCES
    ]
    if any(told["capacity"].values()):
        quotas.append(f"a full source loses its {_removed(told['remover'])}")
    row("capacity", "; ".join(quotas))
    disk = told["bytes_on_disk"]
    row("on disk", f"{size(disk['replay'])} of segments, {size(disk['redis'])} of Redis")
    counters = told["counters"]
    taken = {source: counters.get(f"inserted/{source}", 0) for source in SOURCES}
    came = ", ".join(f"{count:,} {source}" for source, count in taken.items() if count)
    row("ever taken in", f"{came or 'nothing'} transitions; {counters.get('sampled', 0):,} sampled")
    if told["total"]["marked"]:
        row("marked", f"{told['total']['marked']:,} episodes were closed for a lost writer")
    newest = sorted(told["writers"].items(), key=lambda each: -(each[1]["time"] or 0.0))
    for number, (name, writer) in enumerate(newest[:WRITERS]):
        when = f", {ago(time.time() - writer['time'])} ago" if writer["time"] else ""
        text = (
            f"{name}: number {writer['sequence']:,}, {writer['segments']:,} segments stored{when}"
        )
        row("" if number else "writers", text)
    if len(newest) > WRITERS:
        row("", f"and {len(newest) - WRITERS} more")
    for number, (name, cursor) in enumerate(told["cursors"].items()):
        done = ", ".join(f"{key} {value:,}" for key, value in cursor.items())
        row("" if number else "cursors", f"{name}: {done}")
    for number, reason in enumerate(told["waiting"] or ["nobody"]):
        row("" if number else "waiting", reason, "yellow" if told["waiting"] else "")
    return table


def _limit(capacity: int | None) -> str:
    return f"of {size(capacity)}" if capacity else "without limit"


def _removed(remover: str) -> str:
    return {"oldest": "oldest segments", "lowest_priority": "segments of lowest priority"}.get(
        remover, remover
    )
