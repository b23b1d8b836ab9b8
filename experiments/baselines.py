"""Our algorithms from scratch against Stable-Baselines3, at equal environment steps, on gymnasium's tasks.

    python -m experiments.baselines [--quick] [--seeds 10] [--first 0] [--tasks ID,...] [--algorithms ppo,offpolicy]
                                    [--json FILE] [--out FOLDER]

Needs `make peers`. Every run is a process of its own on one thread and on the peer's interpreter, ours and theirs in turn; its result
is a JSON file in --out, and what is there is not run again. What is compared:

    score   (ours - random) / (theirs - random) of final deterministic returns: the interquartile mean over seeds and tasks,
            with a bootstrap interval over the seeds of both sides, task by task
    time    until 95 % of the way from random to the peer's final score is reached, ours over theirs: medians over seeds, the
            geometric mean over tasks; a run that never arrives is censored
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from deploy.results import machine
from experiments.statistics import Interval, bootstrap, censored_median, iqm, time_to

ROOT = Path(__file__).parent.parent
PEER = ROOT / "benchmarks/peers/sb3"
FILE = "experiments/results/baselines_{}.json"
STEPS = {  # environment steps by task: PPO, off-policy
    "Pendulum-v1": {"ppo": 40_000, "offpolicy": 5_000},
    "InvertedPendulum-v5": {"ppo": 40_000, "offpolicy": 8_000},
    "Reacher-v5": {"ppo": 60_000, "offpolicy": 8_000},
}
MODULES = {"ppo": "experiments.baselines_ppo", "offpolicy": "experiments.baselines_off_policy"}
THEIRS = {"ppo": "ppo", "offpolicy": "sac"}
NAMES = {"ppo": ("PPOFlow, K = 1", "SB3 PPO"), "offpolicy": ("our off-policy learner", "SB3 SAC")}
ARRIVED = 0.95  # share of the way from random to the peer's final score
QUICK_STEPS = {"ppo": 4_000, "offpolicy": 300}


class Runs:
    """Results of single runs, in a folder; what is missing is run."""

    def __init__(self, folder: Path, python: Path) -> None:
        self._folder, self._python = folder, python
        folder.mkdir(parents=True, exist_ok=True)

    def result(self, algorithm: str, side: str, task: str, seed: int, steps: int) -> dict[str, Any]:
        """{"returns", "seconds", "curve"} of one run, from the folder or from a process."""
        file = self._folder / f"{algorithm}-{side}-{task}-{steps}-{seed}.json"
        if not file.exists():
            print(f"{algorithm}, {side}, {task}, seed {seed}:", flush=True)
            partial = file.with_suffix(".partial")
            arguments = [task, str(seed), str(steps), str(partial)]
            command = (
                [PEER / "train.py", THEIRS[algorithm], *arguments]
                if side == "sb3"
                else ["-m", "experiments.baselines", "--train", algorithm, *arguments]
            )
            one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
            environment = {**os.environ, **one_thread, "PYTHONPATH": str(ROOT)}
            subprocess.run([self._python, *command], check=True, env=environment, cwd=ROOT)
            partial.rename(file)
        return json.loads(file.read_text())

    def random(self, task: str) -> float:
        """Mean return of random actions, computed once."""
        file = self._folder / f"random-{task}.json"
        if not file.exists():
            code = "import sys, json; from experiments.learning_curve import random_returns as r; "
            code += "print(json.dumps(list(r(sys.argv[1]))))"
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            found = subprocess.run(
                [self._python, "-c", code, task], check=True, env=environment, capture_output=True
            )
            file.write_bytes(found.stdout)
        return float(np.mean(json.loads(file.read_text())))


def score(final: dict[str, dict[str, np.ndarray]], random: dict[str, float]) -> Interval:
    """Normalised score of ours from mean final returns {task: {"ours": (seeds,), "sb3": (seeds,)}}."""
    tasks = list(final)

    def normalised(groups: list[np.ndarray]) -> float:
        values = []
        for task, ours, theirs in zip(tasks, groups[::2], groups[1::2], strict=True):
            values.append((ours - random[task]) / (iqm(theirs) - random[task]))
        return iqm(np.concatenate(values))

    groups = [final[task][side] for task in tasks for side in ("ours", "sb3")]
    return bootstrap(groups, normalised, draws=2000)


def wall(
    rows: dict[str, dict[str, list[dict[str, Any]]]], target: dict[str, float]
) -> tuple[float, bool, dict[str, dict[str, Any]]]:
    """Time of ours over theirs until each task's `target`; whether it is exact, not a bound; and each task's times.

    Where ours never arrive the ratio is a lower bound (not exact). Where the peer's median run does not stay at its own
    final score, its time is a lower bound and the ratio an upper one: to our disadvantage.
    """
    ratios, exact, times = [], True, {}
    for task, sides in rows.items():
        median = {}
        for side, runs in sides.items():
            arrival = [time_to(run["curve"], target[task]) for run in runs]
            median[side] = censored_median(arrival, [run["seconds"] for run in runs])
        exact &= median["ours"].reached
        ratios.append(median["ours"].value / median["sb3"].value)
        times[task] = {side: str(value) for side, value in median.items()}
        times[task]["ratio"] = f"{'' if median['ours'].reached else '>= '}{ratios[-1]:.2f}"
    return float(np.exp(np.mean(np.log(ratios)))), exact, times


def compare(runs: Runs, algorithm: str, tasks: list[str], seeds: range, quick: bool) -> dict:
    """Run what is missing, then the figures and rows of one algorithm."""
    budget = {task: QUICK_STEPS[algorithm] if quick else STEPS[task][algorithm] for task in tasks}
    found: dict[str, dict[str, list[Any]]] = {task: {"ours": [], "sb3": []} for task in tasks}
    for seed in seeds:
        for task in tasks:
            for side in ("ours", "sb3"):
                result = runs.result(algorithm, side, task, seed, budget[task])
                found[task][side].append(result)
    random = {task: runs.random(task) for task in tasks}
    final = {
        task: {side: np.array([np.mean(r["returns"]) for r in found[task][side]]) for side in sides}
        for task, sides in found.items()
    }
    reference = {task: iqm(final[task]["sb3"]) for task in tasks}
    target = {task: random[task] + ARRIVED * (reference[task] - random[task]) for task in tasks}
    total = score(final, random)
    ratio, exact, times = wall(found, target)
    rows = []
    for task in tasks:
        own = score({task: final[task]}, random)
        rows.append(
            {
                "task": task,
                "algorithm": algorithm,
                "steps": budget[task],
                "random": random[task],
                "ours": iqm(final[task]["ours"]),
                "sb3": reference[task],
                "score": own.value,
                "score_low": own.low,
                "score_high": own.high,
                "seconds_to_target": times[task],
                "seconds": {
                    s: float(np.mean([r["seconds"] for r in found[task][s]])) for s in final[task]
                },
                "finals": {side: values.tolist() for side, values in final[task].items()},
            }
        )
    figures = {
        f"{algorithm}_score": total.value,
        f"{algorithm}_score_low": total.low,
        f"{algorithm}_score_high": total.high,
        f"{algorithm}_wall_vs_sb3": ratio,
        f"{algorithm}_wall_is_exact": float(exact),
    }
    show(algorithm, rows, figures, len(seeds))
    return {"figures": figures, "rows": rows}


def show(algorithm: str, rows: list[dict[str, Any]], figures: dict[str, float], seeds: int) -> None:
    """Print the table."""
    ours, theirs = NAMES[algorithm]
    print(f"\n{ours} against {theirs}, {seeds} seeds")
    print(
        f"{'task':22} {'steps':>7} {'random':>9} {'ours':>9} {'sb3':>9}  score [95 %]         s to target: ours, sb3, ratio"
    )
    for row in rows:
        interval = f"{row['score']:.3f} [{row['score_low']:.3f}, {row['score_high']:.3f}]"
        times = row["seconds_to_target"]
        print(
            f"{row['task']:22} {row['steps']:>7} {row['random']:9.1f} {row['ours']:9.1f} {row['sb3']:9.1f}  "
            f"{interval:20} {times['ours']:>8} {times['sb3']:>8} {times['ratio']:>8}"
        )
    for key, value in figures.items():
        print(f"{key:28} {value:.3f}")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="one seed, some thousand steps: does it run?"
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="number of the first seed")
    parser.add_argument("--tasks", default=",".join(STEPS), help="some of them, by comma")
    parser.add_argument("--algorithms", default="ppo,offpolicy", help="some of them, by comma")
    parser.add_argument(
        "--json", type=Path, help=f"default: {FILE.format('NAME')}, nothing with --quick"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/baselines"), help="results of single runs"
    )
    parser.add_argument(
        "--train", nargs=5, metavar="X", help="one run of ours: what each run's process does"
    )
    arguments = parser.parse_args(argv)
    if arguments.train:
        train(*arguments.train)
        return
    python = PEER / "venv/bin/python"
    if not python.exists():
        raise SystemExit(f"{python} is missing: make peers")
    tasks, algorithms = arguments.tasks.split(","), arguments.algorithms.split(",")
    for given, known in ((tasks, STEPS), (algorithms, MODULES)):
        if unknown := set(given) - set(known):
            raise SystemExit(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    seeds = range(arguments.first, arguments.first + (1 if arguments.quick else arguments.seeds))
    runs = Runs(arguments.out, python)
    for algorithm in algorithms:
        result = compare(runs, algorithm, tasks, seeds, arguments.quick)
        target = arguments.json or (None if arguments.quick else Path(FILE.format(algorithm)))
        if target:
            command = f"python -m experiments.baselines {' '.join(argv or sys.argv[1:])}".strip()
            known = (
                json.loads(target.read_text()) if target.exists() else {"figures": {}, "rows": []}
            )
            rows = [row for row in known["rows"] if row["algorithm"] != algorithm] + result["rows"]
            figures = known["figures"] | result["figures"]
            whole = {"machine": machine(), "command": command, "figures": figures, "rows": rows}
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(whole, indent=1))
            print(f"written to {target}")


def train(algorithm: str, task: str, seed: str, steps: str, file: str) -> None:
    """One run of ours in this process."""
    import torch

    torch.set_num_threads(1)
    module = importlib.import_module(MODULES[algorithm])
    Path(file).write_text(json.dumps(module.train(task, int(seed), int(steps))))


if __name__ == "__main__":
    main()
