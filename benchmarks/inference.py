"""A policy in each rollout actor against one for all, on this machine's CPU.

    python -m benchmarks.inference [--quick] [--json FILE] [--rows GROUP,...]

batch   2 actors with 64 environments each ask for actions as fast as they get them (two 64x64 images, the demo's
        policy, exploring), at K = 1, 2, 4 and 10 integration steps: from a policy in their own process on one thread
        (actor), from the inference actor on one thread (shared), and on as many as there are actors (threads). Real
        Ray processes; nothing is simulated between two questions, so that all are as busy as they can be
single  the same with one observation at a time, as arms ask

The ways take turns within a round; a ratio is taken within a round, figures are medians, with the lowest and the highest
beside them. Latency is what the caller sees.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks._others import Others
from benchmarks.replay import machine

Row = dict[str, Any]
ACTORS = 2
THREADS = {"shared": 1, "threads": ACTORS}  # of the inference actor
WHERE = {
    "actor": "a policy in each actor",
    "shared": "a shared policy",
    "threads": "a shared policy on two threads",
}


class Size(NamedTuple):
    """How much is measured."""

    seconds: float = 4.0  # of one turn
    rounds: int = 5
    steps: tuple[int, ...] = (1, 2, 4, 10)  # K
    envs: int = 64  # of each actor
    patience: float = 10.0  # s that a round may wait for a quiet moment


QUICK = Size(0.7, 3, (2, 10), patience=0.0)
TINY = Size(0.1, 1, (2,), 4, 0.0)
GROUPS = ("batch", "single")


class Figure(NamedTuple):
    """A key of the table."""

    key: str
    rows: str
    text: str
    goal: str = ""


FIGURES = [
    *(
        Figure(f"{where}_rows_per_s_k{k}", "batch", f"observations/s, {text}, K = {k}")
        for k in Size().steps
        for where, text in WHERE.items()
    ),
    *(
        Figure(f"{where}_vs_actor_k{k}", "batch", f"{WHERE[where]} against one in each, K = {k}")
        for k in Size().steps
        for where in list(WHERE)[1:]
    ),
    *(
        Figure(f"{where}_p{p}_ms_k2", "batch", f"{p} % of the answers take less, {text}, K = 2, ms")
        for where, text in WHERE.items()
        for p in (50, 99)
    ),
    Figure("shared_occupancy_k2", "batch", "share of its computed rows that were asked for"),
    *(
        Figure(f"single_{where}_p50_ms", "single", f"one observation, {text}, K = 2, median ms")
        for where, text in WHERE.items()
    ),
]


def group_rows(group: str, size: Size) -> list[Row]:
    """All rows of a group: one for each K, way and round."""
    import ray

    from benchmarks._inference_bench import Caller, inference_actor, policy_config

    environments = size.envs if group == "batch" else 1
    callers = [
        ray.remote(Caller).options(num_cpus=0).remote(i, environments) for i in range(ACTORS)
    ]
    rows, others = [], Others()
    for steps in size.steps if group == "batch" else (2,):
        config = policy_config(steps)
        names = {where: f"{where}-{group}-{steps}" for where in THREADS}
        actors = {
            where: inference_actor(config, name, THREADS[where], 256, 0.002)
            for where, name in names.items()
        }
        ray.get([caller.prepare.remote(config, names) for caller in callers], timeout=120)
        for number in range(size.rounds):
            others.wait(size.patience)
            for where in sorted(WHERE, reverse=number % 2):
                if where in actors:
                    ray.get(actors[where].figures.remote(), timeout=30)
                others.start()
                asked = [caller.ask.remote(where, size.seconds) for caller in callers]
                found = ray.get(asked, timeout=60 + 10 * size.seconds)
                row = {"rows": group, "where": where, "steps": steps, "round": number}
                row["others"] = round(others.cores(), 3)
                row |= _summary(found)
                if where in actors:
                    inference = ray.get(actors[where].figures.remote(), timeout=30)
                    row["batch_rows"] = inference["inference/batch_rows"]
                    row["occupancy"] = inference["inference/occupancy"]
                rows.append({k: _short(value) for k, value in row.items()})
                show(rows[-1])
        for actor in actors.values():
            ray.kill(actor)
    for caller in callers:
        ray.kill(caller)
    return rows


def _short(value: Any) -> Any:
    """Four digits of a number: more would be noise."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _summary(found: list[Row]) -> Row:
    times = np.concatenate([each["times"] for each in found]) * 1e3
    row = {"rows_per_s": sum(each["rows"] / each["seconds"] for each in found)}
    return row | {f"p{p}_ms": float(np.percentile(times, p)) for p in (50, 99)}


def show(row: Row) -> None:
    """Print a row."""
    print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)


def figures(rows: list[Row]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Medians over the rounds, and the lowest and highest."""
    values: dict[str, list[float]] = {}
    by_round: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        by_round.setdefault((row["rows"], row["steps"], row["round"]), {})[row["where"]] = row
    for (group, steps, _), ways in by_round.items():
        for where, row in ways.items():
            if group == "single":
                values.setdefault(f"single_{where}_p50_ms", []).append(row["p50_ms"])
                continue
            ratio = row["rows_per_s"] / ways["actor"]["rows_per_s"]
            for key, value in (
                ("rows_per_s", row["rows_per_s"]),
                ("p50_ms", row["p50_ms"]),
                ("p99_ms", row["p99_ms"]),
                ("occupancy", row.get("occupancy")),
                ("vs_actor", None if where == "actor" else ratio),
            ):
                if value is not None:
                    values.setdefault(f"{where}_{key}_k{steps}", []).append(value)
    found = {key: _short(statistics.median(each)) for key, each in values.items()}
    spread = {key: [_short(min(each)), _short(max(each))] for key, each in values.items()}
    return found, spread


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write the JSON file."""
    parser = argparse.ArgumentParser(prog="benchmarks.inference", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="within a minute")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # tests
    parser.add_argument("--json", metavar="FILE", default="")
    parser.add_argument(
        "--rows", default=",".join(GROUPS), help="groups of rows, default: %(default)s"
    )
    options = parser.parse_args(arguments)
    names = [name for name in options.rows.split(",") if name]
    for name in names:
        if name not in GROUPS:
            parser.error(f"no rows {name!r}; there are {', '.join(GROUPS)}")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray

    size = TINY if options.tiny else QUICK if options.quick else Size()
    quick = ["--quick"] if options.quick else []
    report: dict[str, Any] = {
        "machine": machine(),
        "command": shlex.join(["python", "-m", "benchmarks.inference", *quick]),
    }
    ray.init(
        num_cpus=2,
        object_store_memory=200 << 20,
        include_dashboard=False,
        log_to_driver=False,
        namespace="inference-benchmark",
    )
    try:
        rows = [row for name in names for row in group_rows(name, size)]
    finally:
        ray.shutdown()
    report["figures"], report["spread"] = figures(rows)
    report["rows"] = rows
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    for key, value in report["figures"].items():
        low, high = report["spread"][key]
        print(f"  {key:<24}{value:9.4g}  [{low:.4g}, {high:.4g}]")


if __name__ == "__main__":
    main()
