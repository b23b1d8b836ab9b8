"""`report.html`: what a run did and how well it works, in one file that can be sent to anybody."""

from __future__ import annotations

import base64
import json
import time
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from dashboard import report_charts
from dashboard.figures import clock
from dashboard.record import as_number
from dashboard.report_data import MEANINGS, REGIONS, STAGES, WORLDS, RunData
from dashboard.statistics import Gain, Rate

STYLE_FILE = Path(__file__).parent / "page" / "report.css"
REPORT_FILE = "report.html"
GAINS = (("sft", "stage1"), ("stage1", "stage2"), ("stage2", "stage3"), ("sft", "stage3"))
VIDEO_KINDS = {".mp4": "video/mp4", ".webp": "image/webp"}


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into the run's folder from the files there; parts that are missing are said."""
    run_dir = Path(run_dir)
    data = RunData(run_dir)
    sections = [
        _summary(data),
        _section("Success", _success(data)),
        _section("Gains", _gains(data)),
        _section("Where it succeeds", _heat_maps(data)),
        _section("Learning", _curves(data)),
        _section("Throughput", _throughput(data)),
        _section("Video", _video(data)),
        _section("How it was run", _provenance(data)),
        _section("All figures", _figures(data)),
        _section("Missing from this report", _missing(data)) if data.missing else "",
    ]
    when = time.strftime("%Y-%m-%d %H:%M")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run_dir.name)} · TwinRL report</title>"
        f"<style>{STYLE_FILE.read_text()}</style></head><body><main>"
        f"<header><p>TwinRL report · {when}</p><h1>{escape(run_dir.resolve().name)}</h1></header>"
        f"{''.join(sections)}</main></body></html>"
    )
    path = run_dir / REPORT_FILE
    temporary = run_dir / f"{REPORT_FILE}.new"
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _none(text: str) -> str:
    return f'<p class="none">{text}</p>'


def _summary(data: RunData) -> str:
    wall = as_number(data.figures.get("wall_s"))
    best = data.rate(_last_stage(data), "real", "ood")
    first = data.rate("sft", "real", "ood")
    tiles = [
        ("Wall time", clock(wall) if wall is not None else "–", ""),
        ("Robot minutes", _plain(data.figures.get("robot_minutes")), ""),
        ("Takeovers", _plain(data.figures.get("takeovers")), _commanded(data.figures)),
        (
            "Success OOD, stand-in",
            _percent(best),
            f"from {_percent(first)} after SFT" if first else "",
        ),
    ]
    shown = "".join(
        f"<div><span>{name}</span><b>{value}</b><small>{note}</small></div>"
        for name, value, note in tiles
    )
    return f'<div class="tiles">{shown}</div>'


def _commanded(figures: dict[str, Any]) -> str:
    """How much a person did of what the arms did."""
    minutes = as_number(figures.get("intervention_minutes"))
    share = as_number(figures.get("intervention_rate"))
    if minutes is None or share is None:
        return ""
    return f"{minutes:.1f} min, {share:.0%} of the arms' steps, by a person"


def _last_stage(data: RunData) -> str:
    done = [s for s in STAGES if any(data.rate(s, w, r) for w in WORLDS for r in REGIONS)]
    return done[-1] if done else "sft"


def _success(data: RunData) -> str:
    stages = [s for s in STAGES if any(data.rate(s, w, r) for w in WORLDS for r in REGIONS)]
    if not stages:
        return _none("No evaluation: success is unknown.")
    head = "".join(f"<th>{WORLDS[w]} {r.upper()}</th>" for w in WORLDS for r in REGIONS)
    rows, bars = [], []
    for stage in stages:
        cells, bar = [], {}
        for world in WORLDS:
            for region in REGIONS:
                rate = data.rate(stage, world, region)
                cells.append(_rate_cell(rate))
                if rate:
                    bar[f"{world}/{region}"] = rate[:3]
        name = f"<b>{STAGES[stage]}</b><small>{MEANINGS[stage]}</small>"
        rows.append(f"<tr><th>{name}</th>{''.join(cells)}</tr>")
        bars.append((STAGES[stage], bar))
    note = (
        "<p class='note'>Share of episodes that succeed, with Wilson's 95 % interval, over the same resets "
        "after every stage. ID: placements that the demonstrations cover; OOD: those they do not. "
        "The stand-in is a simulated arm whose physics, latency, camera and light differ from the twin.</p>"
    )
    return (
        f"{report_charts.success_bars(bars)}"
        f'<div class="wide"><table class="success"><tr><th></th>{head}</tr>{"".join(rows)}</table></div>{note}'
    )


def _rate_cell(rate: Rate | None) -> str:
    if rate is None:
        return '<td class="none">not evaluated</td>'
    episodes = f" of {rate.episodes}" if rate.episodes else ""
    return (
        f"<td><b>{100 * rate.rate:.1f} %</b>"
        f"<small>[{100 * rate.low:.1f}, {100 * rate.high:.1f}]{episodes}</small></td>"
    )


def _gains(data: RunData) -> str:
    rows = []
    for before, after in GAINS:
        for world in WORLDS:
            gain = data.gain(before, after, world)
            if gain is not None:
                rows.append(_gain_row(f"{STAGES[before]} → {STAGES[after]}", WORLDS[world], gain))
    # The run's own figures, as it reported them: other worlds may have other resets.
    reported = [key for key in data.figures if key.startswith("gain_") and _is_value(key)]
    own = "".join(
        f"<tr><th>{escape(key)}</th><td>{_with_interval(data.figures, key)}</td></tr>"
        for key in reported
    )
    if not rows and not own:
        return _none("No two stages were evaluated over the same resets.")
    table = (
        '<div class="wide"><table><tr><th>from → to</th><th>world</th><th>gain</th><th>95 % interval</th>'
        f"<th>resets</th><th>McNemar's p</th></tr>{''.join(rows)}</table></div>"
        if rows
        else ""
    )
    note = "<p class='note'>Percentage points over the same resets, ID and OOD together; the interval is a paired bootstrap.</p>"
    mine = f"<h3>As the run reported</h3><table>{own}</table>" if own else ""
    return table + note + mine


def _gain_row(name: str, world: str, gain: Gain) -> str:
    tone = "up" if gain.low > 0 else "down" if gain.high < 0 else ""
    p = f"{gain.p:.3f}" if gain.p >= 0.001 else f"{gain.p:.0e}"
    return (
        f'<tr><th>{name}</th><td>{world}</td><td class="{tone}"><b>{100 * gain.gain:+.1f}</b></td>'
        f"<td>[{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]</td><td>{gain.episodes}</td><td>{p}</td></tr>"
    )


def _heat_maps(data: RunData) -> str:
    grid = []
    for world in WORLDS:
        row: list[Any] = []
        for stage in STAGES:
            places, successes, inside = [], [], []
            for region in REGIONS:
                cell = data.cells.get((stage, world, region)) or {}
                found = cell.get("placements") or []
                if found and len(found) == len(cell["successes"]):
                    places += [point[:2] for point in found]
                    successes += cell["successes"]
                    inside += [region == "id"] * len(found)
            if places:
                columns = np.array(places, float), np.array(successes), np.array(inside)
                row.append((STAGES[stage], *columns))
        if row:
            grid.append((WORLDS[world], row))
    if not grid:
        return _none("No placements were recorded with the evaluations.")
    note = (
        "<p class='note'>Success by the object's place on the table, in metres: colour is the mean of a cell, "
        "dots are successes, crosses failures; the dashed frame holds the ID placements.</p>"
    )
    return report_charts.heat_maps(grid) + note


def _curves(data: RunData) -> str:
    panels = []
    if data.success:
        curves = {region.upper(): curve for region, curve in sorted(data.success.items())}
        panels.append(("Success while training, %", "minutes", "%", curves))
    for (stage, name), curve in data.curves.items():
        panels.append((f"{stage}: {name}", "learner updates", "", {f"{stage}: {name}": curve}))
    if not panels:
        return _none("No learning curves: no process reported any.")
    return report_charts.learning_curves(panels)


def _throughput(data: RunData) -> str:
    if not data.throughput:
        return _none("No throughput was reported.")
    rows = "".join(
        f"<tr><th>{label}</th><td><b>{_plain(median)}</b></td><td>{_plain(low)}</td><td>{_plain(high)}</td></tr>"
        for label, low, median, high in data.throughput
    )
    head = "<tr><th></th><th>median</th><th>10 %</th><th>90 %</th></tr>"
    note = "<p class='note'>Over the seconds in which there was any; quantiles of each process, summed.</p>"
    return f'<div class="wide"><table>{head}{rows}</table></div>{note}'


def _video(data: RunData) -> str:
    if data.video is None:
        return _none("No video was recorded.")
    encoded = base64.b64encode(data.video.read_bytes()).decode()
    source = f"data:{VIDEO_KINDS[data.video.suffix]};base64,{encoded}"
    if data.video.suffix == ".webp":
        return f'<img class="film" alt="the policy at work" src="{source}">'
    return f'<video class="film" controls muted loop autoplay playsinline src="{source}"></video>'


def _provenance(data: RunData) -> str:
    parts = []
    if command := data.about.get("command"):
        text = command if isinstance(command, str) else " ".join(map(str, command))
        parts.append(f"<h3>Command</h3><pre>{escape(text)}</pre>")
    else:
        parts.append(_none("The command is not in report.json."))
    if machine := data.about.get("machine"):
        text = machine if isinstance(machine, str) else json.dumps(machine, indent=1)
        parts.append(f"<h3>Machine</h3><pre>{escape(text)}</pre>")
    else:
        parts.append(_none("The machine is not in report.json."))
    if data.config:
        parts.append(
            f"<details><summary>Configuration</summary><pre>{escape(data.config)}</pre></details>"
        )
    else:
        parts.append(_none("No config.yaml in the run's folder."))
    versions = sorted(
        {(STAGES.get(k[0], k[0]), c.get("policy_version")) for k, c in data.cells.items()}, key=str
    )
    if versions:
        text = ", ".join(f"{stage}: {version}" for stage, version in versions)
        parts.append(f"<p class='note'>Policy versions evaluated: {escape(text)}.</p>")
    return "".join(parts)


def _figures(data: RunData) -> str:
    keys = [key for key in data.figures if _is_value(key)]
    if not keys:
        return _none("report.json holds no figures.")
    rows = "".join(
        f"<tr><th>{escape(key)}</th><td>{_with_interval(data.figures, key)}</td></tr>"
        for key in keys
    )
    return f"<details open><summary>{len(keys)} figures of report.json</summary><table class='small'>{rows}</table></details>"


def _missing(data: RunData) -> str:
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in data.missing)}</ul>"


def _is_value(key: str) -> bool:
    return not key.endswith(("_low", "_high"))


def _with_interval(figures: dict[str, Any], key: str) -> str:
    text = _plain(figures[key])
    if f"{key}_low" in figures and f"{key}_high" in figures:
        text += f" [{_plain(figures[f'{key}_low'])}, {_plain(figures[f'{key}_high'])}]"
    return text


def _plain(value: Any) -> str:
    if (number := as_number(value)) is None:
        return escape(str(value)) if value is not None else "–"
    if number == int(number) and abs(number) < 1e15:
        return f"{int(number):,}"
    return f"{number:,.1f}" if abs(number) >= 100 else f"{number:.4g}"


def _percent(rate: Rate | None) -> str:
    return "–" if rate is None else f"{100 * rate.rate:.0f} %"
