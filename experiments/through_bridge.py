"""What a trained policy does through the arm's own loop: `twinrl run RUN --robot sim`, beside the twin actors' evaluation.

    python -m experiments.through_bridge runs/RUN [--checkpoint stage2] [--episodes 100] [--json FILE]

Between policy and stand-in stand the control loop, the safety filter and the camera frames' codec, as on an arm. Rows:

launch      the limits that a job gives its own stand-in, a clock that waits: only the loop is new
safe        the safety filter's own limits, narrower than what the policy learned with
real time   the launch limits at speed 1: chunks are asked for while the arm moves, and come late
reality N   the launch limits, on reality N of `--reality-seed`
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dashboard.statistics import wilson
from deploy.results import machine
from twinrl.config import load_config

REGIONS = ("id", "ood")
REALITIES = (1, 2, 3)


def played(run: Path, checkpoint: str, region: str, episodes: int, *words: str) -> dict[str, Any]:
    """What `twinrl run` tells of so many episodes."""
    with tempfile.TemporaryDirectory(prefix="through-bridge-") as folder:
        out = Path(folder) / "result.json"
        command = [
            *(sys.executable, "-m", "twinrl.main", "run", str(run), "--checkpoint", checkpoint),
            *("--robot", "sim", "--region", region, "--episodes", str(episodes), "--seed", "5"),
            *(
                "--spool",
                f"{folder}/spool",
                "--json",
                str(out),
                "--robot-option",
                "rearm_s=1",
                *words,
            ),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 + 30 * episodes)
        if done.returncode:
            raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
        return json.loads(out.read_text())


def evaluated(run: Path, checkpoint: str, region: str) -> dict[str, Any]:
    """What the run's own evaluation found on the stand-in."""
    for line in (run / "evaluations.jsonl").read_text().splitlines():
        each = json.loads(line)
        if (each["stage"], each["world"], each["region"]) == (checkpoint, "real", region):
            rate = wilson(sum(each["successes"]), each["n"])
            return {"rate": rate.rate, "low": rate.low, "high": rate.high, "episodes": each["n"]}
    raise SystemExit(f"{run} has no evaluation of {checkpoint} on the stand-in")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--checkpoint", default="stage2", help="default: %(default)s")
    parser.add_argument(
        "--episodes", type=int, default=100, help="of each cell; fifth in real time"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    arguments = parser.parse_args(argv)
    limits = load_config(arguments.run / "config.yaml", []).stand_in.limits
    wide = [word for key, value in limits.items() for word in ("--limit", f"{key}={value}")]
    plans = {
        "launch": ["--speed", "20", *wide],
        "safe": ["--speed", "20"],
        **{f"reality {n}": ["--speed", "20", *wide, "--reality-seed", str(n)] for n in REALITIES},
        "real time": ["--speed", "1", *wide],
    }
    cells: list[dict[str, Any]] = []

    def add(row: str, region: str, found: dict[str, Any]) -> None:
        cell = {key: found[key] for key in ("rate", "low", "high", "episodes")}
        steps = [each["steps"] for each in found.get("results", ()) if each["success"]]
        cells.append({"row": row, "region": region, **cell, "steps": steps})
        share = "  ".join(f"{100 * cell[key]:.0f}" for key in ("rate", "low", "high"))
        mean = f"  {sum(steps) / len(steps):.0f} steps" if steps else ""
        print(f"{row:12} {region:4} {share}  n = {cell['episodes']}{mean}", flush=True)

    for region in REGIONS:
        add("twin actors", region, evaluated(arguments.run, arguments.checkpoint, region))
    for row, words in plans.items():
        count = max(1, arguments.episodes // 5) if row == "real time" else arguments.episodes
        for region in REGIONS:
            add(row, region, played(arguments.run, arguments.checkpoint, region, count, *words))
    if arguments.json:
        command = f"python -m experiments.through_bridge {shlex.join(argv or sys.argv[1:])}"
        content = {"machine": machine(), "command": command, "cells": cells}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
