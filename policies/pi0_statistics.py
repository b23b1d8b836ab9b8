"""Means and deviations of states and actions that lie beside, or in, published pi0 weights.

Three forms: openpi's `assets/**/norm_stats.json`; LeRobot's `policy_preprocessor_step_*_normalizer_processor.safetensors`
(0.4 on); buffers among the weights (LeRobot 0.1 to 0.3).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from policies.normalise import Normaliser

log = logging.getLogger(__name__)

BUFFERS = ("normalize_inputs.buffer_observation_state", "unnormalize_outputs.buffer_action")
KEYS = ("observation.state", "action")
PARTS = ("mean", "std")
MOMENTS = "MEAN_STD"
NORMALIZER = "policy_preprocessor_step_*_normalizer_processor.safetensors"


class Statistics(NamedTuple):
    """Mean and standard deviation (n,) of states and of actions, in physical units."""

    origin: str
    state: tuple[Tensor, Tensor]
    action: tuple[Tensor, Tensor]

    def fit(self, state: Normaliser, action: Normaliser) -> bool:
        """Whether they have as many numbers as these normalisers, and LeRobot's "not known yet", infinity, nowhere."""
        return (
            self.state[0].shape == state.centre.shape
            and self.action[0].shape == action.centre.shape
            and all(bool(each.isfinite().all()) for each in (*self.state, *self.action))
        )


def apply_statistics(state: Normaliser, action: Normaliser, files: list[Path], folder: Path) -> str:
    """Set both normalisers from the one set of statistics that fits them; -> where it was found, "" where none was.

    `files` hold the weights, `folder` what lies beside them. Those of another robot, with other numbers of state or
    action, are left alone; so are two that fit, since nothing says which one is meant. Training fits its own anyway.
    """
    found = list(find_statistics(files, folder))
    fitting = [each for each in found if each.fit(state, action)]
    if len(fitting) != 1:
        if found:
            log.warning(
                "%d of %d statistics (%s) fit %d numbers of state and %d of action: none is used",
                len(fitting),
                len(found),
                ", ".join(each.origin for each in found),
                len(state.centre),
                len(action.centre),
            )
        return ""
    with torch.no_grad():
        for normaliser, (mean, deviation) in zip((state, action), fitting[0][1:], strict=True):
            normaliser.centre.copy_(mean)
            normaliser.scale.copy_(deviation.clamp_min(1e-6))
    return fitting[0].origin


def find_statistics(files: list[Path], folder: Path) -> Iterator[Statistics]:
    """All statistics in and beside the weights."""
    lerobot = (
        sorted(folder.glob(NORMALIZER)) if _by_moments(folder / "policy_preprocessor.json") else []
    )
    for path, names in [(path, BUFFERS) for path in files] + [(path, KEYS) for path in lerobot]:
        with safe_open(path, framework="pt") as file:
            there = set(file.keys())
            if all(f"{name}.{part}" in there for name in names for part in PARTS):
                pairs = [
                    tuple(file.get_tensor(f"{name}.{part}").float() for part in PARTS)
                    for name in names
                ]
                yield Statistics(path.name, *pairs)
    for path in sorted(folder.glob("assets/**/norm_stats.json")):
        stats = json.loads(path.read_text())["norm_stats"]
        pairs = [
            tuple(torch.tensor(stats[name][part], dtype=torch.float32) for part in PARTS)
            for name in ("state", "actions")
        ]
        yield Statistics(str(path.relative_to(folder)), *pairs)


def _by_moments(pipeline: Path) -> bool:
    """Whether LeRobot's description of its pipeline says mean and deviation, not quantiles or extremes."""
    steps = json.loads(pipeline.read_text()).get("steps", []) if pipeline.exists() else []
    maps = [step.get("config", {}).get("norm_map", {}) for step in steps]
    return all(each.get(kind, MOMENTS) == MOMENTS for each in maps for kind in ("STATE", "ACTION"))
