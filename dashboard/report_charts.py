"""The report's figures, drawn with matplotlib and given as self-contained SVG or PNG for the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

INK, MUTED, LINE = "#151a21", "#626d7c", "#e4e7ec"
COLOURS = ("#2f6fe0", "#0b9a80", "#cf7f0c", "#7a4fe0", "#d0457a", "#43972f", "#1583ad", "#7b8694")
REGIONS = {"id": "#0b9a80", "ood": "#cf7f0c"}
FAIL_TO_SUCCESS = LinearSegmentedColormap.from_list(
    "success", ["#d9534f", "#f2c14e", "#e9e7c5", "#5fbf9f", "#0b9a80"]
)
CELLS = 9  # of a heat map, a side
Curve = tuple[Sequence[float], Sequence[float]]


def _figure(width: float, height: float, columns: int = 1, rows: int = 1, **kw: Any) -> Any:
    # Figures without pyplot: nothing global, safe in any thread.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **kw)
    for ax in axes.flat:
        ax.tick_params(colors=MUTED, labelsize=8, length=0)
        ax.grid(color=LINE, linewidth=0.8)
        ax.set_axisbelow(True)
        for name, spine in ax.spines.items():
            spine.set_visible(name == "bottom")
            spine.set_color(LINE)
    return figure, axes


def _image(figure: Figure, text: str, form: str = "svg") -> str:
    buffer = io.BytesIO()
    # A fixed salt and no date: the same figures give the same file.
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "twinrl", "svg.fonttype": "path"}):
        metadata = {"Date": None} if form == "svg" else None
        figure.savefig(buffer, format=form, dpi=150, transparent=True, metadata=metadata)
    data = base64.b64encode(buffer.getvalue()).decode()
    kind = "svg+xml" if form == "svg" else form
    return f'<img alt="{text}" src="data:image/{kind};base64,{data}">'


def learning_curves(panels: Sequence[tuple[str, str, str, dict[str, Curve]]]) -> str:
    """One small plot for each (title, x label, unit of y, {name: (x, y)})."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = _figure(3.6 * columns, 2.5 * rows, columns, rows)
    for ax, (title, label, unit, curves) in zip(axes.flat, panels, strict=False):
        for i, (name, (x, y)) in enumerate(curves.items()):
            colour = REGIONS.get(name.lower(), COLOURS[i % len(COLOURS)])
            x, y = np.asarray(x, float), np.asarray(y, float)
            if len(y) > 60:
                ax.plot(x, y, color=colour, linewidth=0.7, alpha=0.3)
                x, y = _smooth(x, y)
            ax.plot(x, y, color=colour, linewidth=1.6, label=name)
        if unit == "%":
            ax.set_ylim(0, 100)
        ax.set_title(title, loc="left", fontsize=9.5, color=INK, fontweight="bold")
        ax.set_xlabel(label, fontsize=8, color=MUTED)
        if len(curves) > 1 or next(iter(curves)) != title:
            ax.legend(fontsize=7.5, frameon=False, labelcolor=MUTED)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    return _image(figure, "learning curves")


def success_bars(rows: Sequence[tuple[str, dict[str, tuple[float, float, float]]]]) -> str:
    """Success (rate, low, high) after each stage, by "world/region"."""
    places = ["twin/id", "twin/ood", "real/id", "real/ood"]
    titles = ["twin, ID", "twin, OOD", "stand-in, ID", "stand-in, OOD"]
    figure, axes = _figure(10.8, 2.6, 4, sharey=True)
    for ax, place, title in zip(axes.flat, places, titles, strict=True):
        for i, (_, cells) in enumerate(rows):
            if place not in cells:
                continue
            rate, low, high = (100 * v for v in cells[place])
            colour = REGIONS[place.split("/")[1]]
            ax.bar(i, rate, width=0.62, color=colour, alpha=0.28 + 0.72 * (i + 1) / len(rows))
            ax.errorbar(i, rate, [[rate - low], [high - rate]], color=INK, lw=1.1, capsize=3)
            ax.text(i, min(high + 3, 104), f"{rate:.0f}", ha="center", fontsize=8, color=INK)
        ax.set_xticks(range(len(rows)), [name for name, _ in rows])
        ax.set_ylim(0, 112)
        ax.set_yticks([0, 25, 50, 75, 100])
        ax.grid(axis="x", visible=False)
        ax.set_title(title, loc="left", fontsize=9.5, color=INK, fontweight="bold")
    axes.flat[0].set_ylabel("success, %", fontsize=8, color=MUTED)
    return _image(figure, "success after each stage")


def heat_maps(
    grid: Sequence[tuple[str, Sequence[tuple[str, Any, Any, Any] | None]]],
) -> str:
    """Success over placements: one row for each world, in it (title, placements, successes, ID or not)."""
    columns = max(len(row) for _, row in grid)
    every = np.concatenate([c[1] for _, row in grid for c in row if c is not None])
    low, high = every.min(0), every.max(0)
    room = np.maximum((high - low) * 0.04, 1e-3)
    low, high = low - room, high + room
    shape = (high - low)[1] / (high - low)[0]
    height = min(3.2, max(1.8, 2.5 * shape)) + 0.35
    figure, axes = _figure(2.7 * columns + 0.4, height * len(grid), columns, len(grid))
    shown = None
    for line, (world, row) in zip(axes, grid, strict=True):
        for ax, cell in zip(line, row, strict=False):
            ax.grid(visible=False)
            if cell is None:
                ax.set_visible(False)
                continue
            title, places, successes, inside = cell
            shown = _heat(ax, places, successes, inside, low, high)
            ax.tick_params(labelleft=ax is line[0], labelbottom=world == grid[-1][0])
            ax.set_title(f"{title}, {world}", loc="left", fontsize=9, color=INK, fontweight="bold")
        for ax in line[len(row) :]:
            ax.set_visible(False)
    bar = figure.colorbar(shown, ax=axes, shrink=0.6, aspect=26, pad=0.015)
    bar.ax.tick_params(labelsize=8, colors=MUTED, length=0)
    bar.outline.set_visible(False)
    bar.set_ticks([0, 0.5, 1], labels=["0 %", "50 %", "100 %"])
    return _image(figure, "success over placements", "png")


def _heat(ax: Any, places: Any, successes: Any, inside: Any, low: Any, high: Any) -> Any:
    edges = [np.linspace(low[i], high[i], CELLS + 1) for i in range(2)]
    count, *_ = np.histogram2d(places[:, 0], places[:, 1], edges)
    good, *_ = np.histogram2d(places[:, 0], places[:, 1], edges, weights=successes)
    with np.errstate(invalid="ignore"):
        rate = np.where(count > 0, good / count, np.nan)
    shown = ax.pcolormesh(*edges, rate.T, cmap=FAIL_TO_SUCCESS, vmin=0, vmax=1, alpha=0.85)
    for value, marker, size in ((1, "o", 5), (0, "x", 9)):
        chosen = places[successes == value]
        ax.scatter(*chosen.T, s=size, marker=marker, c=INK, linewidths=0.7, alpha=0.45)
    if inside.any():
        (x, y), (right, top) = places[inside].min(0), places[inside].max(0)
        ax.plot([x, right, right, x, x], [y, y, top, top, y], color=INK, lw=1.2, ls="--")
    ax.set_xlim(low[0], high[0])
    ax.set_ylim(low[1], high[1])
    ax.set_aspect("equal")
    return shown


def _smooth(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Running mean over 1/25 of the curve."""
    width = max(3, len(y) // 25)
    kernel = np.ones(width) / width
    return np.convolve(x, kernel, "valid"), np.convolve(y, kernel, "valid")
