"""A run's folder: where everything of a run lies, and what has been done so far."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from twinrl.config import Config, load_config, save_config
from twinrl.core.errors import ConfigError, ResumeError
from twinrl.core.keys import Keys, allowed_publics, create_keys


class RunFolder:
    """Paths and small state files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.keys_folder = path / "keys"
        self.logs = path / "logs"
        self.checkpoints = path / "checkpoints"
        self.report = path / "report.json"
        self.evaluations = path / "evaluations.jsonl"
        self._topology = path / "topology.json"
        self._state = path / "state.json"

    @classmethod
    def create(cls, config: Config) -> RunFolder:
        """A new folder runs/NAME; one that exists is moved aside, never overwritten."""
        path = Path(config.runs).resolve() / config.name
        if path.exists():
            stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
            target = path.with_name(f"{path.name}-{stamp}")
            number = 1
            while target.exists():
                number += 1
                target = path.with_name(f"{path.name}-{stamp}-{number}")
            path.rename(target)
        run = cls(path)
        for folder in (run.path, run.logs, run.checkpoints):
            folder.mkdir(parents=True)
        create_keys(run.keys_folder)
        save_config(config, run.config_file)
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run, by path or by name under runs/; ConfigError lists what there is."""
        for candidate in (Path(path), Path("runs") / path):
            if (candidate / "config.yaml").exists():
                return cls(candidate.resolve())
        known = sorted(p.parent.name for p in Path("runs").glob("*/config.yaml"))
        raise ConfigError(f"no run {str(path)!r}; known: {', '.join(known) or 'none'}")

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    def config(self) -> Config:
        """The resolved configuration the run was started with."""
        return load_config(self.config_file)

    def keys(self, role: str) -> Keys:
        """The run's keys of a role."""
        return Keys.load(self.keys_folder / f"{role}.key")

    def allowed(self, *roles: str) -> dict[str, str]:
        """{public key: role} of who may connect."""
        return {
            public: role for role in roles for public in allowed_publics(self.keys_folder, [role])
        }

    def save_topology(self, topology: dict[str, Any]) -> None:
        """Where each process listens."""
        _write_json(self._topology, topology)

    def topology(self) -> dict[str, Any]:
        """Where each process listens; ConfigError when the run was never started."""
        try:
            return json.loads(self._topology.read_text())
        except FileNotFoundError:
            raise ConfigError(f"run {self.name!r} was never started") from None

    def state(self) -> dict[str, Any]:
        """What has been done: {"done": [stage, ...], ...}."""
        if not self._state.exists():
            return {"done": []}
        try:
            return json.loads(self._state.read_text())
        except ValueError as error:
            raise ResumeError(f"{self._state} is damaged: {error}") from None

    def save_state(self, state: dict[str, Any]) -> None:
        """Replace the state; a crash leaves the old or the new one."""
        _write_json(self._state, state)

    def append_evaluation(self, row: dict[str, Any]) -> None:
        """Add a line to evaluations.jsonl."""
        with self.evaluations.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def evaluation_rows(self) -> list[dict[str, Any]]:
        """All evaluated cells, the last one of each (stage, world, region) counts."""
        if not self.evaluations.exists():
            return []
        return [json.loads(line) for line in self.evaluations.read_text().splitlines() if line]


def _write_json(path: Path, data: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1))
    os.replace(temporary, path)
