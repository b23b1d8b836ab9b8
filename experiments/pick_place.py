"""Pick-and-place through the whole distributed stack: what each stage brings, against its controls.

    python -m experiments.pick_place --obs state|images [--seeds 5] [--first 0] [--rows NAME ...] [--out FOLDER]
                                     [--quick] [--json FILE] [KEY=VALUE ...]

Every row is a real `twinrl launch`, jobs run one after the other, each in a folder of its own under --out: one that is
finished is not run again, one that was interrupted is resumed. Arms of one seed go on from copies of the same run, so
that they share demonstrations, expansion, SFT and resets. KEY=VALUE settings go to all jobs.

Success is measured with the last checkpoint, noise off, on the same resets in all rows and seeds, disjoint from
training. Intervals are of a cluster bootstrap over seeds and resets, or Wilson's where that is wider; gains are paired by seed and reset. The rows are
in experiments/pick_place_rows.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dashboard.statistics import success_rate
from deploy.results import cells_of, machine
from deploy.run_folder import RunFolder
from experiments.pick_place_rows import PLANS, QUICK, QUICK_ROWS, Job, Row, chosen, needed
from experiments.statistics import Interval, clustered, paired
from twinrl.config import load_config, save_config

OUT = Path("runs/pick-place")
RESULTS = Path("experiments/results")
CELLS = (("twin", "id"), ("twin", "ood"), ("real", "id"), ("real", "ood"))
# What is of a run's processes, and not of what it has learned.
LEFT_OUT = (
    *("topology.json", "report.*", "video.mp4", "logs", "spool", "gateway.json", "collector.json"),
    *("dashboard.json", "weights.json", "metrics.jsonl", "events.jsonl", "lock", "address"),
    *("server", "redis.sock", "redis.log"),
)
# (figure, ours, theirs, world): gains that are claimed, mean of both regions
GAINS = (
    ("ppoflow_vs_stage1", "ppoflow", "stage1", "twin"),
    ("ppoflow_vs_stage1_real", "ppoflow", "stage1", "real"),
    ("ppoflow_vs_self_imitation", "ppoflow", "self_imitation", "twin"),
    ("ppoflow_vs_expert", "ppoflow", "expert", "twin"),
    ("randomisation_real", "ppoflow", "no_randomisation", "real"),
    ("offpolicy_vs_clone", "offpolicy", "clone", "real"),
    ("offpolicy_vs_dagger", "offpolicy", "dagger", "real"),
    ("image_vs_stage1", "image", "image_stage1", "twin"),
    ("image_vs_stage1_real", "image", "image_stage1", "real"),
)


def run_job(job: Job, jobs: dict[str, Job], seed: int, out: Path, extra: list[str]) -> Path:
    """Start, resume or just find one seed's run of `job`; its folder."""
    folder = out / f"{job.name}-{seed}"
    if (folder / "report.json").exists():
        return folder
    own = [*extra, *job.overrides]  # what a job is about cannot be overruled
    if not (folder / "state.json").exists():
        named = [f"name={folder.name}", f"seed={seed}", f"runs={out.resolve()}", *own]
        if job.after is None:
            _launch(job.config, *named)
            return folder
        start = run_job(jobs[job.after], jobs, seed, out, extra)
        fork(start, folder, job, named)
    (folder / "topology.json").unlink(missing_ok=True)  # its ports may be somebody else's by now
    _launch("--resume", str(folder))
    return folder


def fork(start: Path, folder: Path, job: Job, overrides: list[str]) -> None:
    """Make of a copy of the finished run `start` one that has done no more than stage `job.redo`."""
    copy = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(start, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    run = RunFolder(copy)
    run.logs.mkdir()
    save_config(load_config(job.config, overrides), run.config_file)
    state = run.state()
    kept = state["done"][: state["done"].index(job.redo) + 1]
    reached = {name for name in ("sft", "stage1", "stage2", "stage3") if name in kept}
    state["done"] = kept
    for values in (state["versions"], state["summaries"]):
        for name in set(values) - reached:
            del values[name]
    for name in ("failing", *(() if "stage3" in kept else ("robot_minutes", "takeovers"))):
        state.pop(name, None)
    run.save_state(state)
    for path in run.checkpoints.glob("*.pt"):
        if path.stem not in reached | {"pretrained"}:
            path.unlink()
    rows = run.evaluation_rows()
    run.evaluations.unlink()
    for row in rows:
        if row["stage"] in reached:
            run.append_evaluation(row)
    copy.rename(folder)


def _launch(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "twinrl.main", "launch", *arguments], check=True)


def outcomes(folder: Path, stage: str) -> dict[tuple[str, str], dict[str, Any]]:
    """{(world, region): row} of a stage that a run has measured."""
    cells = cells_of(RunFolder(folder).evaluation_rows())
    return {(world, region): row for (name, world, region), row in cells.items() if name == stage}


def measured(row: Row, seeds: list[int], out: Path) -> dict[str, Any]:
    """Outcomes (seeds, resets) of a row in each cell, on which resets, and what it cost."""
    folders = [out / f"{row.job}-{seed}" for seed in seeds]
    found = [outcomes(folder, row.stage) for folder in folders]
    reports = [json.loads((folder / "report.json").read_text())["figures"] for folder in folders]
    states = [RunFolder(folder).state() for folder in folders]
    cells = [cell for cell in found[0] if all(cell in each for each in found)]
    return {
        "successes": {c: np.array([each[c]["successes"] for each in found], bool) for c in cells},
        "placements": {c: [each[c]["placements"] for each in found] for c in cells},
        "core_s": [report["core_s"] for report in reports],
        "wall_s": [report["wall_s"] for report in reports],
        "takeovers": [report["takeovers"] for report in reports],
        "twin_steps": [_twin_steps(state, row.stage) for state in states],
    }


def _twin_steps(state: dict[str, Any], stage: str) -> int:
    if stage not in ("stage2", "stage3"):
        return 0
    return int(state["summaries"].get("stage2", {}).get("transitions", 0))


def check_resets(results: dict[str, dict[str, Any]]) -> None:
    """All rows and seeds were measured on the same resets; ValueError names the one that was not."""
    seen: dict[tuple[str, str], tuple[str, Any]] = {}
    for name, result in results.items():
        for cell, of_seeds in result["placements"].items():
            for placements in of_seeds:
                first, expected = seen.setdefault(cell, (name, placements))
                if not np.array_equal(expected, placements):
                    raise ValueError(
                        f"{name} was measured on other resets than {first} in {'/'.join(cell)}: "
                        "were jobs run with another evaluation.seed or evaluation.episodes?"
                    )


def both_regions(result: dict[str, Any], world: str) -> np.ndarray | None:
    """Outcomes (seeds, resets) of a world's ID and OOD resets together; None where it was not measured."""
    parts = [result["successes"].get((world, region)) for region in ("id", "ood")]
    return None if any(part is None for part in parts) else np.concatenate(parts, axis=1)


def key_of(row: str, world: str, region: str) -> str:
    """A figure's name: ROW_id and ROW_ood of the twin, ROW_real_id, ROW_real_1_ood of realities."""
    return f"{row}_{region}" if world == "twin" else f"{row}_{world.replace('-', '_')}_{region}"


def rate(success: np.ndarray) -> Interval:
    """Success of (seeds, resets) with the wider of two intervals: a cluster bootstrap's, and Wilson's, which has a width
    also where all or none succeed."""
    value, low, high = clustered(success)
    single = success_rate(success.ravel())
    return Interval(value, min(low, single.low), max(high, single.high))


def summarise(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Figures of all rows: success in each cell with its interval, and paired gains."""
    figures: dict[str, float] = {}

    def put(key: str, interval: Interval) -> None:
        figures[key], figures[f"{key}_low"], figures[f"{key}_high"] = interval

    for name, result in results.items():
        for (world, region), success in result["successes"].items():
            put(key_of(name, world, region), rate(success))
        real = [s for (world, _), s in result["successes"].items() if world != "twin"]
        if real:  # all realities, ID and OOD
            put(f"{name}_real", rate(np.concatenate(real, axis=1)))
        figures[f"{name}_core_s"] = float(np.median(result["core_s"]))
    for key, ours, theirs, world in GAINS:
        if ours in results and theirs in results:
            pair = [both_regions(results[name], world) for name in (ours, theirs)]
            if pair[0] is not None and pair[1] is not None:
                put(key, paired(*pair))
    return figures


def table(rows: list[Row], results: dict[str, dict[str, Any]], figures: dict[str, float]) -> str:
    """Success in % with 95 % intervals, what it cost, and what was privileged."""
    head = ["", *(f"{world} {region.upper()}" for world, region in CELLS)]
    lines = [[*head, "all real", "twin steps", "core-s", "privileged"]]
    for row in rows:
        result = results[row.name]
        keys = (*(key_of(row.name, *cell) for cell in CELLS), f"{row.name}_real")
        line = [row.text, *(_percent(figures, key) for key in keys)]
        steps = int(np.median(result["twin_steps"]))
        line += [f"{steps:,}", f"{np.median(result['core_s']):.0f}", row.privileged]
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    some = results[rows[0].name]["successes"]
    seeds, resets = next(iter(some.values())).shape
    text.append(
        f"success in % [95 %], {seeds} seeds, the same {resets} resets a cell in every row and seed; real = the "
        "simulated stand-in arm; all real = it and other realities, ID and OOD, all inside the randomised range; "
        "core-s of the whole run"
    )
    for key, *_ in GAINS:
        if key in figures:
            low, high = figures[f"{key}_low"], figures[f"{key}_high"]
            text.append(
                f"{key}: {100 * figures[key]:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
            )
    return "\n".join(text)


def _percent(figures: dict[str, float], key: str) -> str:
    if key not in figures:
        return "-"
    value, low, high = (100 * figures[f"{key}{end}"] for end in ("", "_low", "_high"))
    return f"{value:.0f} [{low:.0f}, {high:.0f}]"


def plot(rows: list[Row], figures: dict[str, float], path: Path) -> None:
    """A PNG of success by row and region with intervals: the twin's ID and OOD, and the stand-in's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.45 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, world in zip(axes, ("twin", "real"), strict=True):
        for offset, (region, colour) in zip(
            (-0.15, 0.15), (("id", "tab:blue"), ("ood", "tab:orange")), strict=True
        ):
            for i, row in enumerate(rows):
                key = key_of(row.name, world, region)
                if key in figures:
                    value = figures[key]
                    reach = [[value - figures[f"{key}_low"]], [figures[f"{key}_high"] - value]]
                    label = region.upper() if i == 0 else None
                    axis.errorbar(
                        value, i + offset, xerr=reach, fmt="o", ms=4, color=colour, label=label
                    )
        axis.set(xlim=(-0.02, 1.02), xlabel="success", title=world)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(rows)), [row.text for row in rows], fontsize=8)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--obs", choices=sorted(PLANS), required=True)
    parser.add_argument("--seeds", type=int, help="how many; default: 5, of images 3")
    parser.add_argument("--first", type=int, default=0, help="number of the first seed")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--out", type=Path, help=f"folder of the runs; default: {OUT}-OBS")
    parser.add_argument("--quick", action="store_true", help="tiny: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of all jobs")
    arguments = parser.parse_intermixed_args(argv)
    all_jobs, all_rows = PLANS[arguments.obs]
    names = arguments.rows or (
        list(QUICK_ROWS) if arguments.quick and arguments.obs == "state" else None
    )
    try:
        rows = chosen(all_rows, names)
    except ValueError as error:
        parser.error(str(error))
    count = arguments.seeds or (1 if arguments.quick else {"state": 5, "images": 3}[arguments.obs])
    seeds = list(range(arguments.first, arguments.first + count))
    out = arguments.out or OUT.with_name(
        f"{OUT.name}-{arguments.obs}{'-quick' if arguments.quick else ''}"
    )
    out.mkdir(parents=True, exist_ok=True)
    extra = [*(QUICK if arguments.quick else ()), "dashboard.port=0", *arguments.overrides]
    by_name = {job.name: job for job in all_jobs}
    for seed in seeds:
        for job in needed(all_jobs, rows):
            run_job(job, by_name, seed, out, extra)
    results = {row.name: measured(row, seeds, out) for row in rows}
    check_resets(results)
    figures = summarise(results)
    print(table(rows, results, figures))
    if arguments.json:
        command = f"python -m experiments.pick_place {' '.join(argv or sys.argv[1:])}"
        written = [
            {
                **row._asdict(),
                **{
                    f"{w}_{r}": s.astype(int).tolist()
                    for (w, r), s in results[row.name]["successes"].items()
                },
                **{
                    key: results[row.name][key]
                    for key in ("core_s", "wall_s", "takeovers", "twin_steps")
                },
            }
            for row in rows
        ]
        content = {"machine": machine(), "command": command, "figures": figures, "rows": written}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(content))
        plot(rows, figures, arguments.json.with_suffix(".png"))
        print(f"written to {arguments.json}, drawn in {arguments.json.with_suffix('.png')}")


if __name__ == "__main__":
    main()
