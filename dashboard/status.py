"""`twinrl status`: a run in the terminal, once, watched, or as JSON."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dashboard.figures import (
    clock,
    compact,
    evaluations,
    headline,
    newest,
    percent,
    robots,
    waiting_for,
)
from dashboard.source import find_run, open_source
from twinrl.core.errors import DeadlineError, RemoteError

COLOURS = {"running": "green", "silent": "yellow", "crashed": "red", "ended": "dim"}
LEVELS = {"info": "dim", "warning": "yellow", "error": "red"}
EVENTS = 6
WORLDS = {"twin": "twin", "real": "stand-in"}


def status(
    run: str | None = None,
    runs: str | Path = "runs",
    watch: bool = False,
    as_json: bool = False,
    interval: float = 1.0,
    console: Console | None = None,
) -> int:
    """Show run `run` (the newest by default). With `watch` until Ctrl-C. Gives the exit status."""
    run_dir = find_run(run, runs)
    console = console or Console()
    source = open_source(run_dir)
    try:
        if as_json:
            print(json.dumps(as_figures(source.snapshot()), indent=1, allow_nan=False, default=str))
            return 0
        if not watch:
            console.print(render(source.snapshot()))
            return 0
        with Live(render(source.snapshot()), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                try:
                    live.update(render(source.snapshot()), refresh=True)
                except (DeadlineError, RemoteError) as error:
                    live.update(Text(f"{run_dir.name}: {error}", style="yellow"), refresh=True)
    except KeyboardInterrupt:
        return 0
    finally:
        source.close()


def command(argv: list[str]) -> int:
    """The command `twinrl status`."""
    parser = argparse.ArgumentParser(
        prog="twinrl status",
        description="Show a run's figures on the terminal, also of a finished run.",
        epilog="examples:\n  twinrl status\n  twinrl status demo --watch\n  twinrl status demo --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", nargs="?", help="name or folder; the newest run by default")
    parser.add_argument("--runs", default="runs", help="folder of runs (%(default)s)")
    parser.add_argument("--watch", action="store_true", help="go on until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="for programs")
    arguments = parser.parse_args(argv)
    return status(arguments.run, arguments.runs, arguments.watch, arguments.json)


def as_figures(snapshot: dict[str, Any]) -> dict[str, Any]:
    """Everything that `status` shows, for programs."""
    return {
        **headline(snapshot),
        "live": not snapshot.get("ended", False),
        "replay_promise": newest(snapshot, "replay/promise", "replay"),
        "processes": snapshot["processes"],
        "evaluations": evaluations(snapshot),
        "robots": robots(snapshot),
        "events": snapshot["events"][-EVENTS:],
    }


def render(snapshot: dict[str, Any]) -> RenderableType:
    """The snapshot as tables."""
    parts: list[RenderableType] = [_head(snapshot), Text(), _processes(snapshot)]
    if cells := evaluations(snapshot):
        parts += [Text(), _evaluations(cells)]
    if found := robots(snapshot):
        parts += [Text(), _robots(found)]
    if snapshot["events"]:
        parts += [Text(), _events(snapshot["events"][-EVENTS:])]
    return Group(*parts)


def _head(snapshot: dict[str, Any]) -> RenderableType:
    figures = headline(snapshot)
    ended = " (not running)" if snapshot.get("ended") else ""
    title = Text.assemble(
        (figures["run"], "bold"), ended, "   ", (str(figures["stage"] or "starting"), "cyan")
    )
    if figures["progress"] is not None:
        title.append(f"  {percent(figures['progress'])}")
    title.append(f"   {clock(figures['elapsed_s'])}", style="dim")
    table = Table.grid(padding=(0, 3))
    rows = [
        ("environment steps/s", compact(figures["env_steps_per_s"])),
        ("transitions/s in", compact(figures["inserts_per_s"])),
        ("batches/s out", compact(figures["batches_per_s"])),
        ("updates/s", compact(figures["updates_per_s"])),
        ("policy version", compact(figures["policy_version"])),
        ("policy lag", compact(figures["policy_lag"])),
        ("success ID", percent(figures["success_id"])),
        ("success OOD", percent(figures["success_ood"])),
        ("steps by a person", percent(figures["intervention_rate"])),
        ("minutes by a person", compact(figures["intervention_minutes"])),
    ]
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        table.add_row(
            *(
                Text(text, style="dim" if i % 2 == 0 else "bold")
                for i, text in enumerate(first + second)
            )
        )
    sizes = ", ".join(f"{compact(n)} {name}" for name, n in sorted(figures["transitions"].items()))
    table.add_row(Text("replay", style="dim"), Text(sizes or "-"))
    parts: list[RenderableType] = [table]
    if promise := newest(snapshot, "replay/promise", "replay"):
        parts.append(Text(f"replay: {promise}", style="dim"))
    bar = ProgressBar(100, 100 * (figures["progress"] or 0.0), width=64)
    return Group(title, Padding(bar, 0), *parts)  # a bar alone ends without a new line


def _processes(snapshot: dict[str, Any]) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("process", "state", "host", "pid", "last report", "waits for"):
        table.add_column(name)
    for process in snapshot["processes"]:
        name = process["name"] if process["name"] != process["role"] else ""
        waits = waiting_for(process)
        table.add_row(
            f"{process['role']} {name}".strip(),
            Text(process["status"], style=COLOURS[process["status"]]),
            str(process["host"]),
            str(process["pid"]),
            f"{process['age']:.0f} s ago",
            waits,
        )
    return table


def _evaluations(cells: dict[str, dict[str, dict[str, Any]]]) -> Table:
    places = [(w, r) for w in ("twin", "real") for r in ("id", "ood")]
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("success after")
    for world, region in places:
        table.add_column(f"{WORLDS[world]} {region.upper()}")
    for stage, row in cells.items():
        table.add_row(stage, *(_cell(row.get(f"{w}/{r}")) for w, r in places))
    return table


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    if cell["low"] is None or cell["high"] is None:
        return percent(cell["rate"])
    return f"{percent(cell['rate'])} [{100 * cell['low']:.0f}, {100 * cell['high']:.0f}]"


def _robots(found: dict[str, dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for name in (
        *("robot", "state", "minutes", "episodes", "takeovers"),
        *("by a person", "minutes by a person", "success"),
    ):
        table.add_column(name)
    for name, robot in found.items():
        counts = (compact(robot.get(key)) for key in ("minutes", "episodes", "takeovers"))
        helped = percent(robot.get("intervention_rate"))
        minutes = compact(robot.get("intervention_minutes"))
        success = percent(robot.get("success"))
        table.add_row(name, str(robot.get("state", "-")), *counts, helped, minutes, success)
    return table


def _events(events: list[dict[str, Any]]) -> RenderableType:
    lines: list[RenderableType] = []
    for event in events:
        style = LEVELS.get(event["level"], "")
        when = time.strftime("%H:%M:%S", time.localtime(event["time"]))
        lines.append(Text(f"{when}  {event['role']} {event['name']}: {event['text']}", style=style))
        if event.get("traceback"):
            lines.append(Text(str(event["traceback"]).rstrip(), style="red"))
    return Group(*lines)
