"""Live progress of `twinrl launch` in the terminal; plain lines where there is no terminal."""

from __future__ import annotations

import threading
import time
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dashboard.figures import clock, compact

PLAIN_EVERY_S = 15.0  # between lines of one stage, where lines stay


class _Stage:
    def __init__(self, name: str, total: float, unit: str) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = 0.0
        self.begin = time.monotonic()
        self.seconds: float | None = None  # how long it took; None while it runs
        self.failed = False
        self.figures: dict[str, Any] = {}

    @property
    def share(self) -> float:
        return min(1.0, self.done / self.total) if self.total else 0.0


class Progress:
    """Stages with bars, their key figures, and the dashboard's address. Thread-safe."""

    def __init__(self, dashboard_url: str | None = None, console: Console | None = None) -> None:
        self._url = dashboard_url
        self._console = console or Console()
        self._lock = threading.Lock()
        self._stages: list[_Stage] = []
        self._begin = time.monotonic()
        self._said = 0.0
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=4
            )
            self._live.start()
        elif dashboard_url:
            self._print(f"dashboard: {dashboard_url}")

    def stage(self, name: str, total: float = 0, unit: str = "") -> None:
        """Begin a stage of `total` units (0: unknown); the one before is done."""
        with self._lock:
            self._finish()
            self._stages.append(_Stage(name, total, unit))
            self._said = time.monotonic()
        if self._live is None:
            self._print(f"{name} ..." if not total else f"{name}: {compact(total)} {unit} ...")

    def update(self, done: float | None = None, **figures: Any) -> None:
        """Set how many units of the stage are done, and figures to show beside its bar."""
        with self._lock:
            if not self._stages:
                raise ValueError("update() before the first stage()")
            stage = self._stages[-1]
            stage.done = stage.done if done is None else float(done)
            stage.figures.update(figures)
            due = time.monotonic() - self._said >= PLAIN_EVERY_S
            if self._live is not None or not due:
                return
            self._said = time.monotonic()
            text = f"{stage.name}: {_counts(stage)}  {_figures(stage)}"
        self._print(text)

    def line(self, text: str) -> None:
        """Print a line that stays, above the bars."""
        self._print(text)

    def close(self, failed: bool = False) -> None:
        """Show the last state and give the terminal back; `failed`: the last stage did not reach its end."""
        with self._lock:
            self._finish(failed)
        if self._live is not None:
            self._live.refresh()
            self._live.stop()
            self._live = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close(failed=error[0] is not None)

    def _finish(self, failed: bool = False) -> None:
        if not self._stages or self._stages[-1].seconds is not None:
            return
        stage = self._stages[-1]
        stage.seconds, stage.failed = time.monotonic() - stage.begin, failed
        if self._live is None:
            tail = f"  {_figures(stage)}" if stage.figures else ""
            took = clock(stage.seconds)
            if failed:
                self._print(f"{stage.name}: stopped at {_counts(stage) or 0} after {took}{tail}")
            else:
                self._print(f"{stage.name}: {_counts(stage) or 'done'} in {took}{tail}")

    def _print(self, text: str) -> None:
        when = "" if self._live else f"[{clock(time.monotonic() - self._begin)}] "
        # Not markup: a traceback may hold brackets. No wrapping: logs are searched by line.
        self._console.print(f"{when}{text}", markup=False, highlight=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        with self._lock:
            table = Table.grid(padding=(0, 2, 0, 0))
            for stage in self._stages:
                running = stage.seconds is None
                bar = ProgressBar(
                    stage.total or None, stage.done, width=28, pulse=running and not stage.total
                )
                seconds = time.monotonic() - stage.begin if running else stage.seconds
                table.add_row(
                    _mark(stage),
                    Text(stage.name, style="bold" if running else ""),
                    bar if stage.total or running else "",
                    Text(_counts(stage), style="" if running else "dim"),
                    Text(clock(seconds or 0.0), style="dim"),
                    Text(_figures(stage), style="" if running else "dim"),
                )
        foot = Text(f"dashboard  {self._url}", style="blue") if self._url else Text()
        return Group(table, foot)


def _mark(stage: _Stage) -> Text:
    if stage.seconds is None:
        return Text("●", style="cyan")
    return Text("✗", style="red") if stage.failed else Text("✓", style="green")


def _counts(stage: _Stage) -> str:
    if not stage.total:
        return f"{compact(stage.done)} {stage.unit}" if stage.done else ""
    return f"{compact(stage.done)}/{compact(stage.total)} {stage.unit}".rstrip()


def _figures(stage: _Stage) -> str:
    shown = (
        f"{name.replace('_', ' ')} {compact(value) if isinstance(value, int | float) else value}"
        for name, value in stage.figures.items()
    )
    return "  ".join(shown)
