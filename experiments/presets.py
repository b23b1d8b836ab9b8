"""Forms of the default policy, from keypoints and an MLP to transformers: size, speed, and what SFT makes of them.

    python -m experiments.presets [--quick] [--speed] [--forms NAME ...] [--seed N] [--episodes N] [--json FILE]

| form | trunk | expert |
| --- | --- | --- |
| tiny | one layer on the keypoints of all cameras | MLP |
| tiny-trunk | transformer over tokens of keypoints, words and state | MLP on the readout |
| tiny-transformer | the same | transformer that reads the prefix |
| tiny-narrow | the same, half as wide | the same, half as wide |
| tiny-patches | transformer over patches of 8 x 8 pixels | as tiny-transformer |

All get the same labelled scenes, demonstrations of the stand-in arm and re-targeted twin episodes, and are evaluated on the
same resets. One thread; seconds and milliseconds are of a core, the latter the least of several turns, in which the forms take part
one after the other. `--speed` trains nothing. Privileged: pose labels of twins.
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

import torch

from experiments.stages import QUICK, SETTINGS, Stages
from policies.policy import Policy
from policies.presets import resolve
from policies.registry import make_policy
from twinrl.env import STATE, image_key

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
INSTRUCTION = "put the banana into the basket"
ROWS = 128  # of a timed batch
TURNS = 5


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
        self.policy = describe(form, self._described)
        self.core_seconds = {}
        self.settings["pretrain"]["learning_rate"] = RATES.get(form, RATES["tiny-trunk"])
        self.pretrain()
        self.sft("sft", self.demonstrations + self.expansion)
        self.evaluate(form)
        row = {
            "form": form,
            **sizes(self.policy),
            **speeds({form: self.policy})[form],
            **{f"{part}_s": self.core_seconds[part] for part in ("pretrain", "sft")},
            **{cell: float(outcome.mean()) for cell, outcome in self.outcomes[form].items()},
        }
        self.report(row)
        return row


def describe(form: str, described: dict[str, Any]) -> Policy:
    """A fresh policy of the form."""
    return make_policy({**described, **resolve(FORMS[form]), "integration_steps": 2})


def sizes(policy: Policy) -> dict[str, float]:
    """Parameters without the critics, and the critics' own."""
    critic = sum(p.numel() for p in policy.critic.parameters())
    return {
        "parameters": sum(p.numel() for p in policy.parameters()) - critic,
        "critic_parameters": critic,
    }


def speeds(policies: dict[str, Policy]) -> dict[str, dict[str, float]]:
    """Least core-milliseconds of each form: encoding ROWS random observations, an evaluation of the field on a cached
    prefix, an update of pretraining (ROWS scenes) and of SFT (2 ROWS kept features, two draws)."""
    generator = torch.Generator().manual_seed(0)
    least: dict[str, dict[str, float]] = {form: {} for form in policies}
    for _ in range(TURNS):
        for form, policy in policies.items():
            for name, work in _work(policy, generator).items():
                began = time.process_time()
                work()
                spent = 1e3 * (time.process_time() - began)
                least[form][name] = min(spent, least[form].get(name, spent))
    return least


def _work(policy: Policy, generator: torch.Generator) -> dict[str, Callable[[], Any]]:
    size = (ROWS, 64, 64, 3)
    seen = {
        image_key(name): torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        for name in policy.cameras
    }
    seen[STATE] = torch.randn(ROWS, len(policy.state_normaliser.centre), generator=generator)
    with torch.no_grad():
        features = policy.encode(seen, INSTRUCTION).repeat(2, *[1] * len(policy.feature_shape))
        condition = policy.flow.condition(features[:ROWS])
    x, t = torch.randn(2 * ROWS, policy.flow.dim), torch.rand(ROWS, 1, 1)

    def pretrain() -> None:
        policy.predict_pose(policy.encode(seen, INSTRUCTION)).square().mean().backward()

    return {
        "encode_ms": torch.no_grad()(lambda: policy.encode(seen, INSTRUCTION)),
        "field_ms": torch.no_grad()(lambda: policy.flow.field(condition, x[:ROWS, None], t)),
        "pretrain_update_ms": pretrain,
        "sft_update_ms": lambda: (
            policy.flow.matching_loss(features, x, torch.ones_like(x), 2).mean().backward()
        ),
    }


def speed_rows(forms: list[str]) -> list[dict[str, Any]]:
    """Size and speed of untrained policies."""
    described = {"state_dim": 27, "pose_dim": 14, "cameras": ("side", "wrist")}
    policies = {form: describe(form, described) for form in forms}
    found = speeds(policies)
    return [{"form": form, **sizes(policies[form]), **found[form]} for form in forms]


def trained_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Each form trained and evaluated."""
    settings = deepcopy(SETTINGS)
    if arguments.quick:
        arguments.episodes = min(arguments.episodes, 4)
        for section, values in QUICK.items():
            settings[section] |= values
    forms = Forms(settings, arguments.seed, arguments.episodes)
    return [forms.measure(form) for form in arguments.forms]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny data: only shows that it runs")
    parser.add_argument("--speed", action="store_true", help="size and speed alone, untrained")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=100, help="resets in each cell")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = speed_rows(arguments.forms) if arguments.speed else trained_rows(arguments)
    for row in rows:
        print(*(f"{key}={value:.4g}" if key != "form" else value for key, value in row.items()))
    if arguments.json:
        figures = {
            f"{row['form'].replace('-', '_')}_{key.replace('/', '_')}": value
            for row in rows
            for key, value in row.items()
            if key != "form"
        }
        machine = {"processor": platform.processor(), "python": platform.python_version()}
        asked = [a for a in sys.argv[1:] if a not in ("--json", str(arguments.json))]
        command = "python -m experiments.presets " + " ".join(asked)
        arguments.json.write_text(
            json.dumps(
                {"machine": machine, "command": command, "figures": figures, "rows": rows}, indent=1
            )
        )


if __name__ == "__main__":
    main()
