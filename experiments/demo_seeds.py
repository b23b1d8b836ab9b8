"""Five seeds of the demo, one after the other, and their medians.

`python -m experiments.demo_seeds [--seeds 5] [--json FILE] [KEY=VALUE ...]`; a seed that has a report is not run
again, an interrupted one is resumed. `--quick` runs two seeds of the ring in miniature.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from deploy.results import machine

FILE = Path("experiments/results/demo_seeds.json")


def run_seed(config: str, seed: int, name: str, overrides: list[str]) -> dict[str, float]:
    """The figures of one seed; starts, resumes or just reads its run."""
    folder = Path("runs") / name
    report = folder / "report.json"
    if not report.exists():
        arguments = (
            ["--resume", name]
            if (folder / "state.json").exists()
            else [config, f"name={name}", f"seed={seed}", "dashboard.port=0", *overrides]
        )
        subprocess.run([sys.executable, "-m", "twinrl.main", "launch", *arguments], check=True)
    return json.loads(report.read_text())["figures"]


def main() -> None:
    """Run the seeds and print the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="number of the first seed")
    parser.add_argument("--quick", action="store_true", help="two seeds of the ring in miniature")
    parser.add_argument("--json", type=Path, help=f"default: {FILE}, nothing with --quick")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    config, prefix = (
        ("configs/tiny.yaml", "quick") if arguments.quick else ("configs/demo.yaml", "demo")
    )
    seeds = range(arguments.first, arguments.first + (2 if arguments.quick else arguments.seeds))
    rows = []
    for seed in seeds:
        figures = run_seed(config, seed, f"{prefix}-seed{seed}", arguments.overrides)
        rows.append({"seed": seed, **figures})
        print(json.dumps(rows[-1]), flush=True)
    keys = [key for key in rows[0] if key != "seed" and all(key in row for row in rows)]
    figures = {key: statistics.median(row[key] for row in rows) for key in keys}
    spread = {key: [min(row[key] for row in rows), max(row[key] for row in rows)] for key in keys}
    for key in keys:
        low, high = spread[key]
        print(f"{key:28} median {figures[key]:8.3f}   {low:8.3f} .. {high:8.3f}")
    target = arguments.json or (None if arguments.quick else FILE)
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
        command = f"python -m experiments.demo_seeds {' '.join(sys.argv[1:])}".strip()
        result = {"machine": machine(), "command": command, "figures": figures}
        target.write_text(json.dumps({**result, "spread": spread, "rows": rows}, indent=1))
        print(f"written to {target}")


if __name__ == "__main__":
    main()
