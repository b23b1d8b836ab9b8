"""What the report reads from a run's folder, and how it is summed up."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from dashboard.record import METRICS_FILE, as_number, read_lines
from dashboard.statistics import Gain, Rate, paired_gain, success_rate

# In an address, which a report must not hand on: "redis://user:SECRET@host", "...?password=SECRET".
PASSWORD = re.compile(r"(://[^:/@\s]*:)[^@\s]+(?=@)|(password=)[^&\s\"']+")
STAGES = {
    "sft": "SFT",
    "stage1": "Stage 1",
    "stage2": "Stage 2",
    "stage3": "Stage 3",
}
MEANINGS = {
    "sft": "supervised fine-tuning on the demonstrations",
    "stage1": "with exploration-space expansion in the twin",
    "stage2": "online RL in randomised twins",
    "stage3": "RL on the robot with takeovers",
}
WORLDS = {"twin": "twin", "real": "stand-in"}
REGIONS = ("id", "ood")
THROUGHPUT = {
    ("actor", "env/steps_per_s"): "environment steps/s, all actors",
    ("replay", "replay/inserts_per_s"): "transitions/s into replay",
    ("replay", "replay/samples_per_s"): "transitions/s sampled",
    ("learner", "learner/batches_per_s"): "batches/s to the learner",
    ("learner", "learner/updates_per_s"): "learner updates/s",
}
MAX_POINTS = 1500

Cell = dict[str, Any]
Curve = tuple[list[float], list[float]]


class RunData:
    """A run's files. A file that is absent or broken is named in `missing`, never invented."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.missing: list[str] = []
        report = self._json("report.json")
        self.figures: dict[str, Any] = report.get("figures", report)
        about = {key: report[key] for key in ("machine", "command") if key in report}
        self.about = json.loads(_hidden(json.dumps(about)))
        self.cells = self._cells()
        self.curves: dict[tuple[str, str], Curve] = {}
        self.success: dict[str, Curve] = {}
        self.throughput: list[tuple[str, float, float, float]] = []
        self._read_metrics()
        config = self._text("config.yaml")
        self.config = None if config is None else _hidden(config)
        self.video = next(
            (p for n in ("mp4", "webp") if (p := run_dir / f"video.{n}").exists()), None
        )
        if self.video is None:
            self.missing.append("video.mp4 (no video was recorded)")

    def rate(self, stage: str, world: str, region: str) -> Rate | None:
        """Success of one evaluated cell: from its episodes, else from the report's figures."""
        cell = self.cells.get((stage, world, region))
        if cell is not None:
            return success_rate(cell["successes"])
        key = f"{stage}_{world}_{region}"
        value = as_number(self.figures.get(key))
        if value is None:
            return None
        low, high = (as_number(self.figures.get(f"{key}_{end}")) for end in ("low", "high"))
        return Rate(value, value if low is None else low, value if high is None else high, 0)

    def gain(self, before: str, after: str, world: str) -> Gain | None:
        """Paired gain over the resets of both regions that both stages were evaluated on."""
        first, second = [], []
        for region in REGIONS:
            a, b = (self.cells.get((stage, world, region)) for stage in (before, after))
            if a is None or b is None or len(a["successes"]) != len(b["successes"]):
                continue
            first += a["successes"]
            second += b["successes"]
        return paired_gain(first, second) if first else None

    def _json(self, name: str) -> dict[str, Any]:
        try:
            data = json.loads((self.run_dir / name).read_text())
        except FileNotFoundError:
            self.missing.append(f"{name} (the run has not finished, or not here)")
            return {}
        except ValueError as error:
            self.missing.append(f"{name} (broken: {error})")
            return {}
        return data if isinstance(data, dict) else {}

    def _text(self, name: str) -> str | None:
        try:
            return (self.run_dir / name).read_text()
        except FileNotFoundError:
            self.missing.append(name)
            return None

    def _cells(self) -> dict[tuple[str, str, str], Cell]:
        path = self.run_dir / "evaluations.jsonl"
        cells: dict[tuple[str, str, str], Cell] = {}
        if not path.exists():
            self.missing.append("evaluations.jsonl (no evaluation was made)")
            return cells
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                cell = json.loads(line)
                key = (cell["stage"], cell["world"], cell["region"])
                cell["successes"] = [int(bool(value)) for value in cell["successes"]]
            except (ValueError, KeyError, TypeError) as error:
                self.missing.append(f"evaluations.jsonl, line {number} ({error!r})")
                continue
            cells[key] = cell  # a cell that a resumed run evaluated again: the last one counts
        return cells

    def _read_metrics(self) -> None:
        losses: dict[tuple[str, str], tuple[list[float], list[float]]] = defaultdict(
            lambda: ([], [])
        )
        rates: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(
            lambda: defaultdict(list)
        )
        success: dict[str, list[tuple[float, float]]] = defaultdict(list)
        begin = None
        for message in read_lines(self.run_dir / METRICS_FILE):
            begin = message["time"] if begin is None else begin
            minutes = (message["time"] - begin) / 60
            role, name, data = message["role"], message["name"], message["data"]
            updates = as_number(data.get("learner/updates"))
            for key, value in data.items():
                if (value := as_number(value)) is None:
                    continue
                if role == "learner" and key.startswith("loss/"):
                    stage = str(data.get("learner/stage", "learner"))
                    x, y = losses[(stage, key.removeprefix("loss/"))]
                    x.append(minutes if updates is None else updates)
                    y.append(value)
                if (role, key) in THROUGHPUT and value > 0:
                    rates[(role, key)][name].append(value)
                if role == "actor" and key in ("env/success_id", "env/success_ood"):
                    success[key.removeprefix("env/success_")].append((minutes, 100 * value))
        if begin is None:
            self.missing.append(f"{METRICS_FILE} (no process reported)")
        self.curves = {key: _thin(curve) for key, curve in losses.items()}
        self.success = {
            region: _thin(([p[0] for p in points], [p[1] for p in points]))
            for region, points in success.items()
        }
        for key, label in THROUGHPUT.items():
            if key in rates:
                parts = [np.quantile(values, [0.1, 0.5, 0.9]) for values in rates[key].values()]
                low, median, high = np.sum(parts, axis=0)
                self.throughput.append((label, low, median, high))


def _thin(curve: Curve) -> Curve:
    step = -(-len(curve[0]) // MAX_POINTS)
    return curve if step <= 1 else (curve[0][::step], curve[1][::step])


def _hidden(text: str) -> str:
    """`text` without the passwords in its addresses."""
    return PASSWORD.sub(lambda found: f"{found[1] or found[2]}***", text)
