"""`twinrl eval`: the success of a checkpoint, without a running job."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from actors.evaluate import draw_configurations, evaluate
from dashboard.statistics import success_rate
from deploy import factories
from deploy.description import WORLDS, describe_job
from deploy.run_folder import RunFolder
from twinrl.config import Config
from twinrl.core.errors import ConfigError


def load_runner(run: RunFolder, checkpoint: str, seed: int = 0) -> Any:
    """A PolicyRunner with the weights of `checkpoint` of a run."""
    from learner.checkpoint import load_checkpoint, restore_policy

    path = run.checkpoints / f"{checkpoint}.pt"
    if not path.exists():
        known = sorted(p.stem for p in run.checkpoints.glob("*.pt"))
        raise ConfigError(
            f"no checkpoint {checkpoint!r} in {run.name!r}; known: {', '.join(known)}"
        )
    state = load_checkpoint(path)
    runner = factories.runner_factory(state["policy_config"], seed)()
    restore_policy(runner.policy, state, path)
    runner.version = state["version"]
    return runner


def evaluate_checkpoint(
    config: Config, run: RunFolder, checkpoint: str, episodes: int, world: str, region: str
) -> np.ndarray:
    """(episodes,) bool: success from the run's evaluation resets of a world and region."""
    runner = load_runner(run, checkpoint)
    env = factories.env_factory(config)(
        min(config.twins.envs, episodes), seed=config.evaluation.seed, **WORLDS[world]
    )
    starts = draw_configurations(env, region, episodes, config.evaluation.seed)
    runner.seed(0)
    return evaluate(env, runner, starts).success


def command(argv: list[str]) -> int:
    """The command `twinrl eval`."""
    parser = argparse.ArgumentParser(
        prog="twinrl eval",
        description="Measure the success of a checkpoint of a run, noise off.",
        epilog="examples:\n"
        "  twinrl eval demo\n"
        "  twinrl eval demo --checkpoint stage2 --world real --region ood --episodes 500\n"
        "  twinrl eval demo --json result.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="name or folder of a run")
    parser.add_argument("--checkpoint", default="stage3", help="default: stage3")
    parser.add_argument("--episodes", type=int, default=100, help="in each cell; default: 100")
    parser.add_argument("--world", choices=[*WORLDS, "all"], default="all")
    parser.add_argument("--region", choices=["id", "ood", "all"], default="all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    arguments = parser.parse_args(argv)
    if arguments.episodes < 1:
        raise ConfigError(f"--episodes is {arguments.episodes}, must be at least 1")
    run = RunFolder.open(arguments.run)
    config = run.config()
    job = describe_job(config)
    worlds = list(WORLDS) if arguments.world == "all" else [arguments.world]
    if arguments.world == "all" and not job["stand_in"]:
        worlds = ["twin"]
    regions = job["regions"] if arguments.region == "all" else [arguments.region]
    rows = []
    for world in worlds:
        for region in regions:
            success = evaluate_checkpoint(
                config, run, arguments.checkpoint, arguments.episodes, world, region
            )
            rate = success_rate(success)
            rows.append({"world": world, "region": region, "n": len(success), **rate._asdict()})
            print(
                f"{arguments.checkpoint} {world} {region.upper()}: {rate.rate:.1%} "
                f"[{rate.low:.1%}, {rate.high:.1%}], n = {len(success)}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"command": f"twinrl eval {' '.join(argv)}", "rows": rows})
        )
    return 0
