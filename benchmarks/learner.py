"""How fast the learner trains: fed by the replay service against a bare PyTorch loop, and each size of policy.

    python -m benchmarks.learner [--quick] [--full] [--json FILE] [--rows GROUP,...]

fed      updates/s of the demo's policy on one thread, for each algorithm. `replay`: with what the learner's stage gets
         from a replay service in its own process while another process writes to it: SFT on windows that were read
         from it (400 transitions/s come in), PPOFlow on segments as they arrive (1.5 times as fast as they are taken),
         off-policy RL on batches drawn ahead (60 transitions/s come in, as from the demo's arm). `bare`: the same
         with everything in memory and nobody else at work; for SFT a loop written with PyTorch alone, for the others
         the algorithm's own update called on ready batches. An update is one call: a gradient step, or for PPOFlow
         a whole iteration
presets  parameters, updates/s, memory, FLOPs of each preset on one thread of this CPU: SFT's update with everything
         trained, encoder included. `base` only with --full, and there without optimiser, forward and backward alone:
         its gradients and AdamW's state would take 8 GB
cuda     the same on a GPU, where there is one, in bfloat16, with the share of the device's peak that is reached (MFU);
         and a policy of pi0's size with random weights, whose trunk is frozen but for LoRA

Ways take turns within a round; a ratio is taken within a round, figures are medians, with the lowest and the highest
beside them.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._others import Others
from benchmarks.inference import Figure
from benchmarks.replay import machine

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
ALGORITHMS = {"sft": "SFT", "ppoflow": "PPOFlow", "chunk_q": "off-policy RL"}
WAYS = ("replay", "bare")


class Size(NamedTuple):
    """How much is measured."""

    seconds: float = 6.0  # of one turn
    rounds: int = 5
    stored: int = 100  # segments of each source in the replay
    taken: int = 64  # segments of a PPOFlow iteration, of 8 chunks each
    kept: int = 32  # batches in memory
    patience: float = 10.0  # s that a round may wait for a quiet moment
    presets: tuple[tuple[str, int], ...] = (("tiny", 64), ("small", 16))  # name, batch
    model_rounds: int = 3


QUICK = Size(0.7, 3, 40, 16, 16, 0.0, model_rounds=1)
TINY = Size(0.1, 1, 8, 4, 2, 0.0, (("tiny", 4),), 1)
# Random weights; the trunk is frozen but for LoRA, as pi0's default is.
PI0: dict[str, Any] = {"name": "pi0", "dtype": "bfloat16", "tokenizer": "hashed"}
# On a GPU: policy, batch.
ON_CUDA: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("small", {"preset": "small"}, 256),
    ("base", {"preset": "base"}, 64),
    ("pi0", PI0, 16),
)

FIGURES = [
    Figure(
        "updates_vs_bare",
        "fed",
        "updates/s fed by the replay service, against a bare loop with its batches in memory (the least of the three)",
        ">= 0.95",
    ),
    *(
        Figure(f"updates_vs_bare_{key}", "fed", f"the same, {text}")
        for key, text in ALGORITHMS.items()
    ),
    *(
        Figure(
            f"updates_vs_bare_{key}_cpu",
            "fed",
            f"the same in processor time of the training thread, which a busy machine disturbs less, {text}",
        )
        for key, text in ALGORITHMS.items()
    ),
    *(
        Figure(f"{key}_updates_per_s", "fed", f"updates/s of {text}, fed by the replay service")
        for key, text in ALGORITHMS.items()
    ),
    *(
        Figure(f"{preset}_{key}", "presets", f"preset `{preset}`: {text}")
        for preset in ("tiny", "small", "base")
        for key, text in (
            ("parameters", "parameters"),
            ("updates_per_s", "updates/s" if preset != "base" else "forward and backward passes/s"),
            ("samples_per_s", "samples/s"),
            ("memory_MB", "memory while training, MB"),
            ("act_ms", "one observation to a chunk, K = 10, ms"),
        )
    ),
    *(
        Figure(f"cuda_{name}_{key}", "cuda", f"`{name}` on a GPU: {text}")
        for name, _, _ in ON_CUDA
        for key, text in (
            ("samples_per_s", "samples/s"),
            ("mfu", "share of the device's bfloat16 peak"),
            ("memory_MB", "memory while training, MB"),
            ("act_ms", "one observation to a chunk, K = 10, ms"),
        )
    ),
]


def fed(size: Size, full: bool) -> list[Row]:
    """Rows of each algorithm, way and round."""
    import torch

    from benchmarks._learner_turns import Turns

    torch.set_num_threads(1)
    rows, others = [], Others()
    folder = Path(tempfile.mkdtemp(prefix="learner-"))
    turns = Turns(folder, size.stored, size.taken, size.kept)
    try:
        for number in range(size.rounds):
            for algorithm in ALGORITHMS:
                others.wait(size.patience)
                # PPOFlow's pace is that of the bare turn before.
                for way in WAYS[:: -1 if number % 2 == 0 else 1]:
                    others.start()
                    found = turns.turn(algorithm, way == "replay", size.seconds)
                    row = {"rows": "fed", "algorithm": algorithm, "way": way, "round": number}
                    row["others"] = others.cores()
                    rows.append(shortened({**row, **found}))
                    show(rows[-1])
    finally:
        turns.close()
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def presets(size: Size, full: bool) -> list[Row]:
    """Rows of each preset and round, in processes of their own."""
    others, rows = Others(), []
    models: list[tuple[str, int, dict[str, Any]]] = [(*each, {}) for each in size.presets]
    if full:
        models.append(("base", 1, {"optimised": False}))
    for name, batch, more in models:
        for number in range(size.model_rounds):
            others.wait(size.patience)
            others.start()
            asked = {"policy": {"preset": name}, "batch": batch, "seconds": size.seconds, **more}
            found = _model(asked)
            row = {"rows": "presets", "model": name, "round": number, "others": others.cores()}
            rows.append(shortened({**row, **found}))
            show(rows[-1])
    return rows


def cuda(size: Size, full: bool) -> list[Row]:
    """Rows of the larger policies on a GPU; none without one."""
    import torch

    if not torch.cuda.is_available():
        print("no GPU that torch can use: no rows `cuda`")
        return []
    rows = []
    for name, policy, batch in ON_CUDA:
        asked = {"policy": policy, "batch": batch, "seconds": size.seconds, "device": "cuda"}
        for number in range(size.model_rounds):
            row = {"rows": "cuda", "model": name, "round": number}
            rows.append(shortened({**row, **_model(asked)}))
            show(rows[-1])
    return rows


def _model(asked: dict[str, Any]) -> Row:
    command = [sys.executable, "-m", "benchmarks._learner_model", json.dumps(asked)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


GROUPS: dict[str, Callable[[Size, bool], list[Row]]] = {
    "fed": fed,
    "presets": presets,
    "cuda": cuda,
}


def figures(rows: list[Row]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Medians over the rounds, and the lowest and highest."""
    values: dict[str, list[float]] = {}
    turns = {
        (row["algorithm"], row["round"], row["way"]): row for row in rows if row["rows"] == "fed"
    }
    for (algorithm, number, way), row in turns.items():
        if way == "replay":
            bare = turns[algorithm, number, "bare"]
            for key, name in (("s", algorithm), ("cpu_s", f"{algorithm}_cpu")):
                ratio = row[f"updates_per_{key}"] / bare[f"updates_per_{key}"]
                values.setdefault(f"updates_vs_bare_{name}", []).append(ratio)
            values.setdefault(f"{algorithm}_updates_per_s", []).append(row["updates_per_s"])
    known = {figure.key for figure in FIGURES}
    for row in rows:
        if row["rows"] != "fed":
            prefix = "cuda_" if row["rows"] == "cuda" else ""
            for key, value in row.items():
                if f"{prefix}{row['model']}_{key}" in known:
                    values.setdefault(f"{prefix}{row['model']}_{key}", []).append(value)
    found = {key: statistics.median(each) for key, each in values.items()}
    spread = {key: [min(each), max(each)] for key, each in values.items()}
    ratios = [key for key in found if key in {f"updates_vs_bare_{each}" for each in ALGORITHMS}]
    if ratios:
        least = min(ratios, key=lambda key: found[key])
        found = {"updates_vs_bare": found[least], **found}
        spread = {"updates_vs_bare": spread[least], **spread}
    return shortened(found), {k: [short(x) for x in each] for k, each in spread.items()}


def short(value: Any) -> Any:
    """Four digits of a number: more would be noise."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def shortened(row: Row) -> Row:
    """All numbers with four digits."""
    return {key: short(value) for key, value in row.items()}


def show(row: Row) -> None:
    """Print a row."""
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write the JSON file."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.learner",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="within a minute")
    parser.add_argument("--full", action="store_true", help="also the preset `base` (3 GB)")
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
    size = TINY if options.tiny else QUICK if options.quick else Size()
    given = [f"--{name}" for name in ("quick", "full") if getattr(options, name)]
    report: dict[str, Any] = {
        "machine": machine(),
        "command": shlex.join(["python", "-m", "benchmarks.learner", *given]),
    }
    rows = [row for name in names for row in GROUPS[name](size, options.full)]
    report["figures"], report["spread"] = figures(rows)
    report["rows"] = rows
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    for key, value in report["figures"].items():
        low, high = report["spread"][key]
        print(f"  {key:<28}{value:12.4g}  [{low:.4g}, {high:.4g}]")


if __name__ == "__main__":
    main()
