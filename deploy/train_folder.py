"""The folder of an offline training: what was asked, checkpoints, figures and events, as in a run's folder."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dashboard.progress import Progress
from twinrl.core.errors import ConfigError

PERIOD = 1.0  # s between lines of metrics.jsonl


class TrainFolder:
    """train.json (the plan), config.yaml of the run whose data are used, checkpoints/, metrics.jsonl, events.jsonl."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._plan = path / "train.json"

    def begin(self, plan: dict[str, Any], checkpoint: str, run: Path) -> bool:
        """Make the folder, or take it up again; False where the training is done already.

        ConfigError where it holds something else, or a training of another plan.
        """
        if self._plan.exists():
            held = json.loads(self._plan.read_text())
            if held != json.loads(json.dumps(plan)):
                changed = sorted(key for key in plan if plan[key] != held.get(key))
                raise ConfigError(
                    f"{self.path} holds a training with other values of {', '.join(changed)}; give another --out"
                )
            return not (self.checkpoints / f"{checkpoint}.pt").exists()
        if self.path.exists() and any(self.path.iterdir()):
            raise ConfigError(f"{self.path} exists and is no training's; give another --out")
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        if plan["start"]:
            shutil.copyfile(plan["start"], self.checkpoints / "start.pt")
        if (run / "config.yaml").exists():  # so that `twinrl eval` knows the task
            shutil.copyfile(run / "config.yaml", self.path / "config.yaml")
        temporary = self._plan.with_suffix(".tmp")
        temporary.write_text(json.dumps(plan, indent=1))
        os.replace(temporary, self._plan)  # last: a folder with a plan is complete
        return True

    def place(self) -> str:
        """Where the folder is, as short as that can be said from here."""
        here = Path.cwd()
        return str(self.path.relative_to(here) if self.path.is_relative_to(here) else self.path)


class TrainReporter:
    """Stands where a job's reporter is: a bar on the terminal, and lines in the folder's files, as a collector's."""

    def __init__(
        self, folder: TrainFolder, plan: Mapping[str, Any], stats: Callable[[], dict[str, Any]]
    ) -> None:
        self._identity = {
            "role": "learner",
            "name": "learner",
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        self._metrics = (folder.path / "metrics.jsonl").open("a")
        self._events = (folder.path / "events.jsonl").open("a")
        self._lock = threading.Lock()
        self._stats, self._steps = stats, plan["steps"]
        self._progress = Progress()
        self._progress.stage(plan["algorithm"], self._steps, "steps")
        self._failed = True
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="train-reporter", daemon=True)
        self._thread.start()

    def event(self, level: str, text: str, **fields: Any) -> None:
        """Write and show an event."""
        self._progress.line(text if level == "info" else f"{level}: {text}")
        self._write(self._events, "event", {"level": level, "text": text, **fields})

    def finish(self, losses: Mapping[str, float], finished: bool, text: str) -> None:
        """Report figures a last time, with the last `losses`, and say how it ended."""
        self._failed = not finished
        self._end()
        self._report(losses)
        self.event("info" if finished else "warning", text)

    def close(self) -> None:
        """Close files and give the terminal back."""
        self._end()
        self._progress.close(failed=self._failed)
        with self._lock:
            self._metrics.close()
            self._events.close()

    def _end(self) -> None:
        self._stop.set()
        self._thread.join(5)

    def _run(self) -> None:
        while not self._stop.wait(PERIOD):
            self._report()

    def _report(self, losses: Mapping[str, float] | None = None) -> None:
        figures = {**self._stats(), **(losses or {})}
        self._write(self._metrics, "stats", figures)
        shown = {
            key.partition("/")[2]: value
            for key, value in figures.items()
            if key.startswith("loss/") and key.endswith("loss")
        }
        self._progress.update(figures["learner/progress"] * self._steps, **shown)

    def _write(self, file: Any, kind: str, data: dict[str, Any]) -> None:
        line = json.dumps({**self._identity, "kind": kind, "time": time.time(), "data": data})
        with self._lock:
            if not file.closed:
                file.write(line + "\n")
                file.flush()
