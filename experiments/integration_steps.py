"""Which number K of integration steps RL may use: success of one checkpoint at several K, on the same resets, noise off.

    python -m experiments.integration_steps RUN [--checkpoint stage1] [--steps 1,2,4,10] [--episodes 200] [--json FILE]

K = 1 makes acting cheapest and a path's likelihood exact number by number, but one Euler step from noise is close to the mean of what
was demonstrated: where demonstrations differ it blurs them. So it is allowed where it loses at most 2 points to K = 10; the next
larger K that passes is named otherwise. Use it as policy.integration_steps of a job.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

MARGIN = 0.02  # success that a smaller K may lose
REFERENCE = 10
EVALUATION_SEED = 777_000
QUICK_EPISODES = 8


def allowed(success: Mapping[int, np.ndarray], margin: float = MARGIN) -> int:
    """The smallest K of `success` {K: (n,) bool, on the same resets} that loses at most `margin` to the largest K.

    It is the measured loss that decides, on the same resets; how sure that is grows with their number (`loss`).
    """
    lengths = {len(outcomes) for outcomes in success.values()}
    if len(lengths) != 1:
        raise ValueError(f"every K needs the same resets, here are {sorted(lengths)} of them")
    reference = np.mean(success[max(success)])
    return min(k for k in success if reference - np.mean(success[k]) <= margin + 1e-9)


def measure(run: Path, checkpoint: str, steps: list[int], episodes: int) -> dict[int, np.ndarray]:
    """Success (n,) in the run's twin at each K, all regions together."""
    from actors.evaluate import draw_configurations, evaluate
    from deploy.description import describe_job
    from deploy.factories import env_factory
    from learner.checkpoint import load_checkpoint, restore_policy
    from policies.runner import PolicyRunner
    from twinrl.config import load_config

    config = load_config(run / "config.yaml")
    path = run / "checkpoints" / f"{checkpoint}.pt"
    state = load_checkpoint(path)
    success: dict[int, list[np.ndarray]] = {k: [] for k in steps}
    for region in describe_job(config)["regions"]:
        env = env_factory(config)(min(50, episodes), seed=0)
        drawn = draw_configurations(env, region, episodes, EVALUATION_SEED)
        for k in steps:
            runner = PolicyRunner({**state["policy_config"], "integration_steps": k})
            restore_policy(runner.policy, state, path)
            runner.version = state["version"]
            success[k].append(evaluate(env, runner, drawn).success)
            print(f"K = {k:2}, {region}: {100 * success[k][-1].mean():5.1f} %", flush=True)
        env.close()
    return {k: np.concatenate(outcomes) for k, outcomes in success.items()}


def main(argv: list[str] | None = None) -> None:
    """Measure, compare, and say which K is allowed."""
    import torch

    from dashboard.statistics import paired_gain
    from deploy.results import machine

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run's folder, such as runs/demo")
    parser.add_argument("--checkpoint", default="stage1")
    parser.add_argument(
        "--steps", default=f"1,2,4,{REFERENCE}", help="by comma; the largest is the reference"
    )
    parser.add_argument("--episodes", type=int, default=200, help="resets in each region")
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_EPISODES} resets: does it run?"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    steps = sorted({int(k) for k in arguments.steps.split(",")})
    episodes = QUICK_EPISODES if arguments.quick else arguments.episodes
    success = measure(arguments.run, arguments.checkpoint, steps, episodes)
    reference, rows = success[steps[-1]], []
    for k in steps:
        gain = paired_gain(reference, success[k])
        row: dict[str, Any] = {"steps": k, "success": float(success[k].mean())}
        rows.append(row | {"loss": -gain.gain, "low": -gain.high, "high": -gain.low})
        print(
            f"K = {k:2}: {100 * row['success']:5.1f} %, loses {-100 * gain.gain:+.1f} points "
            f"[{-100 * gain.high:+.1f}, {-100 * gain.low:+.1f}] to K = {steps[-1]}"
        )
    smallest = allowed(success)
    print(f"smallest K that loses at most {100 * MARGIN:.0f} points: {smallest}")
    if arguments.json:
        figures = {"smallest_allowed_steps": smallest, "one_step_allowed": int(smallest == 1)}
        figures |= {f"success_at_{row['steps']}": row["success"] for row in rows}
        command = f"python -m experiments.integration_steps {' '.join(argv or sys.argv[1:])}"
        result = {"machine": machine(), "command": command, "figures": figures, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
