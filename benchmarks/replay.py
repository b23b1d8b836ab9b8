"""The replay service against other replays, against memory and against the disk, all in the same run.

    python -m benchmarks.replay [--quick] [--json FILE] [--rows GROUP,...] [--resume]

Systems take turns, round by round, and ratios are taken within a round. Peers run in environments of their own,
which `make peers` builds; without them their rows are left out. With --resume, groups that FILE has already are kept.
docs/benchmarks.md explains every figure.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.replay_bench import at_once, batches, crowd, stored
from benchmarks.replay_bench.bench import Bench, Row
from benchmarks.replay_bench.figures import FIGURES, figures, medians
from benchmarks.replay_bench.systems import PEER_SYSTEMS, available
from benchmarks.replay_bench.workload import SMALL, W

GROUPS: dict[str, Callable[[Bench], list[Row]]] = {
    "at_once": at_once.at_once,
    "small": at_once.small,
    "disk": stored.disk,
    "batch": batches.batch,
    "tcp": batches.tcp,
    "memory": stored.memory,
    "scale": crowd.scale,
    "wait": batches.wait,
}
# For a look, and for the tests: the same rows from smaller stores and shorter phases.
QUICK: dict[str, Any] = {
    "seconds": 0.5,
    "rounds": 3,
    "restarts": 1,
    "patience": 0.5,
    "settings": ("files everysec", "files never"),
    "workload": W._replace(segments=4, capacity=2000),
    "small": SMALL._replace(segments=16, capacity=5000),
    "stored_bytes": 256 << 20,
    "crowds": (1, 4),
}
TINY: dict[str, Any] = {
    "seconds": 0.05,
    "rounds": 1,
    "workload": W._replace(image=16, segments=2, capacity=500, batch=16),
    "small": SMALL._replace(segments=2, capacity=500, batch=16),
    "stored_bytes": 1 << 20,
    "restarts": 1,
    "patience": 0.0,
    "settle": 0.0,
    "crowds": (1, 4),
    "update": 0.02,
    "peers": [],
}


def machine() -> dict[str, Any]:
    """Where this runs, and what else does."""
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "system": platform.platform(),
        "cpu": model,
        "cpus": len(os.sched_getaffinity(0)),
        "memory_GB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }


def measure(names: list[str], settings: dict[str, Any], report: dict[str, Any], file: str) -> None:
    """Run the groups and put their rows into `report`, and that into `file` after each group."""
    for name in names:
        folder = Path(tempfile.mkdtemp(prefix="replay-"))
        bench = Bench(folder, **settings)
        load, start = os.getloadavg()[0], time.monotonic()
        try:
            rows = [rounded(row) for row in GROUPS[name](bench)]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        report["rows"] = [row for row in report["rows"] if row["rows"] != name] + rows
        report["groups"][name] = {
            "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "took_s": round(time.monotonic() - start, 1),
            "load_before": round(load, 2),
            "load_after": round(os.getloadavg()[0], 2),
        }
        report["figures"], report["spread"] = figures(report["rows"])
        if file:
            Path(file).write_text(json.dumps(report, indent=1, sort_keys=False) + "\n")
        show(report, name)


def rounded(row: Row) -> Row:
    """Five digits of every number: more would be noise."""
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}


def show(report: dict[str, Any], name: str) -> None:
    """Print a group: medians of its systems, then its figures."""
    print(f"\n{name}  ({report['groups'][name]['took_s']:g} s)", flush=True)
    for (group, system), numbers in medians(report["rows"]).items():
        if group == name:
            print(f"  {system:<26}" + "  ".join(f"{k} {v:.4g}" for k, v in numbers.items()))
    for figure in FIGURES:
        if figure.rows == name and figure.key in report["figures"]:
            value, (low, high) = report["figures"][figure.key], report["spread"][figure.key]
            verdict = {True: "reached", False: "MISSED", None: ""}[figure.reached(value)]
            print(
                f"  {figure.key:<26}{value:8.3g}  [{low:.3g}, {high:.3g}]  {figure.goal:8} {verdict}"
            )


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write the JSON file."""
    parser = argparse.ArgumentParser(prog="benchmarks.replay", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller and within two minutes")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # tests
    parser.add_argument("--json", metavar="FILE", default="")
    parser.add_argument(
        "--rows", default=",".join(GROUPS), help="groups of rows, default: %(default)s"
    )
    parser.add_argument("--resume", action="store_true", help="keep the groups that FILE has")
    options = parser.parse_args(arguments)
    names = [name for name in options.rows.split(",") if name]
    for name in names:
        if name not in GROUPS:
            parser.error(f"no rows {name!r}; there are {', '.join(GROUPS)}")
    settings = TINY if options.tiny else QUICK if options.quick else {}
    report: dict[str, Any] = {
        "machine": machine(),
        "command": shlex.join(
            ["python", "-m", "benchmarks.replay", *(["--quick"] if options.quick else [])]
        ),
        "figures": {},
        "spread": {},
        "groups": {},
        "rows": [],
    }
    if options.resume and options.json and Path(options.json).exists():
        report |= json.loads(Path(options.json).read_text())
        names = [name for name in names if name not in report["groups"]]
    missing = [kind.kind for kind in PEER_SYSTEMS if kind not in available()]
    if missing:
        print(f"without {', '.join(missing)}: `make peers` builds their environments")
    measure(names, settings, report, options.json)


if __name__ == "__main__":
    main()
