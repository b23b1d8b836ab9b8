"""How often the scripted experts succeed, and how often re-targeted demonstrations do.

    python -m experiments.experts [--episodes 200] [--tasks NAME,...] [--seed 1000] [--quick] [--json FILE]

Each expert plays every region without randomisation, with its task's full randomisation, and on the stand-in arm. Then
20 of its ID demonstrations on the stand-in are re-targeted to the OOD region of the twin, with the tracking noise of a job.
Intervals are Wilson's, 95 %.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dashboard.statistics import wilson
from deploy.results import machine
from twins import make_env
from twins.retarget import Demonstration, Tracker
from twins.tasks import TASKS

FILE = Path("experiments/results/experts.json")
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {"randomisation": "full"},
    "standin": {"variant": "standin"},
}
DEMONSTRATIONS, NOISE = 20, 0.2


def play(env: Any, act: Callable[[], np.ndarray]) -> tuple[np.ndarray, list[Any]]:
    """Play the episodes that have begun to their ends; how long successes took (N,), 0 for failures, and the steps."""
    history = []
    while not env.done.all():
        history.append(env.step_chunk(act()[:, None]))
    success = np.concatenate([step.success for step in history], axis=1)
    took = np.where(success.any(axis=1), success.argmax(axis=1) + 1, 0)
    return took, history


def row_of(took: np.ndarray, **what: Any) -> dict[str, Any]:
    """A row: successes with their interval, and the median length of a success."""
    rate = wilson(int((took > 0).sum()), len(took))
    median = float(np.median(took[took > 0])) if rate.rate else None
    return {
        **what,
        "episodes": len(took),
        "successes": int((took > 0).sum()),
        "rate": rate.rate,
        "low": rate.low,
        "high": rate.high,
        "median_steps": median,
    }


def experts(task: str, episodes: int, seed: int) -> list[dict[str, Any]]:
    """The expert in each setting and region."""
    rows = []
    for setting, options in SETTINGS.items():
        for region in ("id", "ood"):
            env = make_env(task, episodes, render=False, **options)
            env.reset(seed=seed, options={"region": region})
            took, _ = play(env, env.expert)
            rows.append(row_of(took, task=task, what="expert", setting=setting, region=region))
            env.close()
    return rows


def retargeted(task: str, episodes: int, seed: int) -> dict[str, Any]:
    """ID demonstrations on the stand-in, re-targeted to the OOD region of the twin."""
    shown = make_env(task, DEMONSTRATIONS, render=False, variant="standin")
    shown.reset(seed=seed, options={"region": "id"})
    took, history = play(shown, shown.expert)
    states, actions, mask = (
        np.concatenate([getattr(step, name) for step in history], axis=1)
        for name in ("states", "action", "mask")
    )
    demonstrations = [
        Demonstration.of(states[i, mask[i]], actions[i, mask[i]], shown.configurations()[i])
        for i in np.flatnonzero(took)
    ]
    shown.close()
    env = make_env(task, episodes, render=False)
    env.reset(seed=seed + 1, options={"region": "ood"})
    tracker = Tracker(env, demonstrations)
    tracker.begin()
    took, _ = play(env, lambda: tracker.actions(NOISE)[1])
    env.close()
    return row_of(took, task=task, what="retargeted", setting="none", region="ood")


def main() -> None:
    """Play, print a line for each cell, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--tasks", default=",".join(TASKS), help="some of them, by comma")
    parser.add_argument("--seed", type=int, default=1000, help="not one that a task was made with")
    parser.add_argument("--quick", action="store_true", help="8 episodes in each cell")
    parser.add_argument("--json", type=Path, help=f"default: {FILE}, nothing with --quick")
    arguments = parser.parse_args()
    episodes = 8 if arguments.quick else arguments.episodes
    rows: list[dict[str, Any]] = []
    for task in arguments.tasks.split(","):
        began = time.perf_counter()
        found = [
            *experts(task, episodes, arguments.seed),
            retargeted(task, episodes, arguments.seed),
        ]
        for row in found:
            print(
                f"{task:28} {row['what']:10} {row['setting']:8} {row['region']:4} "
                f"{row['successes']:4} of {row['episodes']}  {100 * row['rate']:5.1f} % "
                f"[{100 * row['low']:.1f}, {100 * row['high']:.1f}]  median {row['median_steps']} steps",
                flush=True,
            )
        rows += found
        print(f"{task}: {time.perf_counter() - began:.0f} s", flush=True)
    target = arguments.json or (None if arguments.quick else FILE)
    if target:
        command = f"python -m experiments.experts {' '.join(sys.argv[1:])}".strip()
        figures = {
            f"{row['what']}_{row['task']}_{row['setting']}_{row['region']}": row["rate"]
            for row in rows
        }
        result = {"machine": machine(), "command": command, "figures": figures, "rows": rows}
        target.write_text(json.dumps(result, indent=1))
        print(f"written to {target}")


if __name__ == "__main__":
    main()
