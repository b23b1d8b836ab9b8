"""Forms of the default policy, from keypoints and an MLP to transformers: size, speed, and what SFT makes of them.

    python -m experiments.presets [--quick] [--forms NAME ...] [--seed N] [--episodes N] [--json FILE]

| form | trunk | expert |
| --- | --- | --- |
| tiny | one layer on the keypoints of all cameras | MLP |
| tiny-trunk | transformer over tokens of keypoints, words and state | MLP on the readout |
| tiny-transformer | the same | transformer that reads the prefix |
| tiny-narrow | the same, half as wide | the same, half as wide |
| tiny-patches | transformer over patches of 8 x 8 pixels | as tiny-transformer |

All get the same labelled scenes, demonstrations of the stand-in arm and re-targeted twin episodes, and are evaluated on the
same resets. One thread; seconds are of a core, milliseconds the median of several batches. Privileged: pose labels of twins.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.stages import CELLS, QUICK, SETTINGS, Stages
from learner.dataset import windows
from learner.features import encode
from policies.presets import resolve
from policies.registry import make_policy

TRANSFORMER: dict[str, Any] = {
    "trunk": "transformer",
    "latent": 128,
    "trunk_layers": 2,
    "expert": "transformer",
    "hidden": 128,
    "expert_layers": 2,
}
FORMS: dict[str, dict[str, Any]] = {
    "tiny": {"preset": "tiny"},
    "tiny-trunk": {"preset": "tiny", "trunk": "transformer", "trunk_layers": 2},
    "tiny-transformer": {"preset": "tiny", **TRANSFORMER},
    "tiny-narrow": {"preset": "tiny", **TRANSFORMER, "latent": 64, "hidden": 64},
    "tiny-patches": {"preset": "tiny", **TRANSFORMER, "stem": "patches", "patch": 8, "width": 16},
}
RATES = {"tiny": 4e-3, "tiny-trunk": 2e-3}  # of pretraining; the others' is that of tiny-trunk
ROWS = 128  # of a timed batch
BATCHES = 15


class Forms(Stages):
    """One seed's data, and a policy for each form."""

    def __init__(self, settings: dict[str, dict[str, Any]], seed: int, episodes: int) -> None:
        super().__init__(settings, seed, episodes)
        self._described = {
            "state_dim": len(self.policy.state_normaliser.centre),
            "pose_dim": self.privileged_dim,
            "cameras": self.cameras,
        }
        self.collect_demonstrations()
        self.expand()

    def measure(self, form: str) -> dict[str, Any]:
        """Train and evaluate one form -> its row."""
        torch.manual_seed(self.seed)
        self.policy = make_policy(
            {**self._described, **resolve(FORMS[form]), **self.settings["policy"]}
        )
        self.core_seconds = {}
        self.settings["pretrain"]["learning_rate"] = RATES.get(form, RATES["tiny-trunk"])
        self.pretrain()
        self.sft("sft", self.demonstrations + self.expansion)
        self.evaluate(form)
        critic = sum(p.numel() for p in self.policy.critic.parameters())
        row = {
            "form": form,
            "parameters": sum(p.numel() for p in self.policy.parameters()) - critic,
            "critic_parameters": critic,
            **self._speed(),
            **{f"{part}_s": self.core_seconds[part] for part in ("pretrain", "sft")},
            **{cell: float(outcome.mean()) for cell, outcome in self.outcomes[form].items()},
        }
        self.report(row)
        return row

    @torch.no_grad()
    def _speed(self) -> dict[str, float]:
        """Core-milliseconds of ROWS observations: encoding, the prefix's cache, and one evaluation of the field."""
        policy, data = self.policy, windows(self.demonstrations, self.policy.chunk)
        seen = {key: value[:ROWS] for key, value in data.observation.items()}
        features = encode(policy, seen, self.instruction)
        condition = policy.flow.condition(features)
        x, t = torch.randn(len(features), 1, policy.flow.dim), torch.rand(len(features), 1, 1)
        return {
            "encode_ms": _milliseconds(lambda: encode(policy, seen, self.instruction)),
            "cache_ms": _milliseconds(lambda: policy.flow.condition(features)),
            "field_ms": _milliseconds(lambda: policy.flow.field(condition, x, t)),
        }


def _milliseconds(work: Callable[[], Any]) -> float:
    """Median core-milliseconds of `work`, which is warmed up."""
    work()
    spent = []
    for _ in range(BATCHES):
        began = time.process_time()
        work()
        spent.append(1e3 * (time.process_time() - began))
    return float(np.median(spent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny data: only shows that it runs")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=100, help="resets in each cell")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = deepcopy(SETTINGS)
    if arguments.quick:
        arguments.episodes = min(arguments.episodes, 4)
        for section, values in QUICK.items():
            settings[section] |= values
    forms = Forms(settings, arguments.seed, arguments.episodes)
    rows = [forms.measure(form) for form in arguments.forms]
    print(f"{'form':18}{'params':>9}{'encode ms':>11}{'field ms':>10}{'SFT s':>8}", *CELLS)
    for row in rows:
        print(
            f"{row['form']:18}{row['parameters']:9d}{row['encode_ms']:11.1f}{row['field_ms']:10.2f}{row['sft_s']:8.1f}",
            *(f"{row[f'{variant}/{region}']:.2f}" for variant, region in CELLS),
        )
    if arguments.json:
        figures = {
            f"{row['form'].replace('-', '_')}_{key.replace('/', '_')}": value
            for row in rows
            for key, value in row.items()
            if key != "form"
        }
        machine = {"processor": platform.processor(), "python": platform.python_version()}
        command = "python -m experiments.presets " + " ".join(sys.argv[1:])
        arguments.json.write_text(
            json.dumps(
                {"machine": machine, "command": command, "figures": figures, "rows": rows}, indent=1
            )
        )


if __name__ == "__main__":
    main()
