"""What a run showed: report.json's figures from the evaluated cells, and the table that ends a launch."""

from __future__ import annotations

import json
import os
import platform
from typing import Any

from dashboard.statistics import paired_gain, success_rate
from deploy.run_folder import RunFolder

STAGES = ("sft", "stage1", "stage2", "stage3")
GAINS = {"gain_stage2_real": ("stage1", "stage2"), "gain_stage3_real": ("stage2", "stage3")}


def cells_of(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """{(stage, world, region): row}; a cell evaluated again counts once, as evaluated last."""
    return {(row["stage"], row["world"], row["region"]): row for row in rows}


def summarise(stage: str, rows: list[dict[str, Any]]) -> tuple[str, dict[str, float]]:
    """A line for people and figures for the record."""
    words, figures = [], {}
    for (name, world, region), row in cells_of(rows).items():
        if name != stage:
            continue
        rate = success_rate(row["successes"])
        words.append(f"{world} {region.upper()} {rate.rate:.0%} [{rate.low:.0%}, {rate.high:.0%}]")
        key = f"eval/{stage}/{world}/{region}"
        figures |= {key: rate.rate, f"{key}_low": rate.low, f"{key}_high": rate.high}
        figures[f"{key}_n"] = float(row["n"])
        version = row["policy_version"]
    return f"{stage} (policy version {version}, n = {row['n']} each): {', '.join(words)}", figures


def figures_of(rows: list[dict[str, Any]], state: dict[str, Any]) -> dict[str, float]:
    """report.json's figures."""
    cells = cells_of(rows)
    figures: dict[str, float] = {"wall_s": round(state["wall_s"], 1)}
    figures["robot_minutes"] = state.get("robot_minutes", 0.0)
    figures["takeovers"] = state.get("takeovers", 0)
    for key in ("intervention_minutes", "intervention_rate"):  # the rate: of all steps of all arms
        figures[key] = state.get(key, 0.0)
    figures["core_s"] = state.get("core_s", 0.0)
    figures["peak_memory_mb"] = state.get("peak_memory_mb", 0)
    for (stage, world, region), row in cells.items():
        rate = success_rate(row["successes"])
        key = f"{stage}_{world}_{region}"
        figures |= {key: rate.rate, f"{key}_low": rate.low, f"{key}_high": rate.high}
    for key, (before, after) in GAINS.items():
        pair = [
            [s for region in ("id", "ood") for s in cells[stage, "real", region]["successes"]]
            for stage in (before, after)
            if all((stage, "real", region) in cells for region in ("id", "ood"))
        ]
        if len(pair) == 2:
            gain = paired_gain(*pair)
            figures |= {key: gain.gain, f"{key}_low": gain.low, f"{key}_high": gain.high}
    return figures


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpus": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def write_results(run: RunFolder, state: dict[str, Any], command: list[str]) -> str:
    """Write report.json; returns the table of results."""
    rows = run.evaluation_rows()
    figures = figures_of(rows, state)
    report = {
        "machine": machine(),
        "command": " ".join(command),
        "figures": figures,
        "seconds": state.get("seconds", {}),
        "rows": [{k: v for k, v in row.items() if k != "placements"} for row in rows],
    }
    run.report.write_text(json.dumps(report, indent=1))
    return _table(figures, rows)


def _table(figures: dict[str, float], rows: list[dict[str, Any]]) -> str:
    columns = [("twin", "id"), ("twin", "ood"), ("real", "id"), ("real", "ood")]
    head = ["stage", *(f"{world} {region.upper()} %" for world, region in columns)]
    lines = [head]
    for stage in STAGES:
        line = [stage]
        for world, region in columns:
            key = f"{stage}_{world}_{region}"
            line.append(
                f"{100 * figures[key]:.0f} [{100 * figures[f'{key}_low']:.0f}, "
                f"{100 * figures[f'{key}_high']:.0f}]"
                if key in figures
                else "-"
            )
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
    episodes = sorted({row["n"] for row in rows})
    text.append(f"success with 95 % intervals, {', '.join(map(str, episodes))} episodes a cell; ")
    text[-1] += "real = the simulated stand-in arm"
    for key in GAINS:
        if key in figures:
            low, high = figures[f"{key}_low"], figures[f"{key}_high"]
            text.append(
                f"{key}: {100 * figures[key]:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
            )
    text.append(
        f"{figures['wall_s']:.0f} s, at most {figures['peak_memory_mb'] / 1000:.1f} GB of memory; "
        f"{figures['robot_minutes']:.1f} robot minutes, {figures['takeovers']:.0f} takeovers, "
        f"{figures['intervention_minutes']:.1f} minutes and {figures['intervention_rate']:.0%} of the steps by a person"
    )
    return "\n".join(text)
