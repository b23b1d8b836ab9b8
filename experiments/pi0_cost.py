"""What pi0 costs: parameters and bytes from its shapes, and on a GPU what acting and a training step take.

    python -m experiments.pi0_cost [--quick] [--device cuda] [--batch N] [--json FILE]

Bytes need no weights: the model is built without memory. With `--device`, random weights of full size act on one
observation of two cameras, and make training steps of `--batch` windows with LoRA, expert and recomputed activations in
bfloat16. `--quick` runs the tiny model on the CPU: does it run?
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from policies.pi0 import Pi0

CAMERAS, STATE_DIM, CHUNK, IMAGE = ("side", "wrist"), 27, 4, 64
REPEATS = 5


def make(sizes: str, device: str) -> Pi0:
    """pi0 as it is trained: LoRA of rank 32, bfloat16, activations recomputed."""
    with torch.device(device):
        policy = Pi0(
            state_dim=STATE_DIM, cameras=CAMERAS, chunk=CHUNK, sizes=sizes, tokenizer="hashed", dtype="bfloat16",
            lora_rank=32 if sizes == "pi0" else 4, recompute=True,
        )  # fmt: skip
    return policy if device == "meta" else policy.to(device)


def shapes() -> dict[str, float]:
    """Parameters and gigabytes of the published sizes."""
    policy = make("pi0", "meta")
    adapted, critic = policy.encoder_parameters(), policy.critic or nn.Module()
    frozen = _count(p for p in policy.trunk.parameters() if not p.requires_grad)
    lora, expert, heads = (
        _count(each) for each in (adapted, policy.flow.parameters(), critic.parameters())
    )
    trained = lora + expert + heads
    return {
        "frozen_millions": frozen / 1e6,
        "lora_millions": lora / 1e6,
        "expert_millions": expert / 1e6,
        "trained_millions": trained / 1e6,
        "frozen_bfloat16_gb": 2 * frozen / 1e9,
        "frozen_float32_gb": 4 * frozen / 1e9,
        "published_gb": 4 * trained / 1e9,
        "whole_gb": (2 * frozen + 4 * trained) / 1e9,
        "trained_with_optimiser_gb": 16
        * trained
        / 1e9,  # weight, gradient and two moments, float32
        "features_mb": 4 * policy.feature_shape[0] / 1e6,
        "prefix_tokens": policy.layout.tokens,
    }


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def measured(sizes: str, device: str, batch: int) -> dict[str, float]:
    """Seconds of acting and of a training step, and the most memory that either took on a GPU."""
    policy = make(sizes, device)
    rng = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)

    def observation(rows: int) -> dict[str, np.ndarray]:
        images = rng.integers(0, 256, (rows, IMAGE, IMAGE, 3), dtype=np.uint8)
        state = rng.normal(size=(rows, STATE_DIM)).astype(np.float32)
        return {"observation.state": state, **{f"observation.images.{c}": images for c in CAMERAS}}

    one, many = observation(1), policy.to_tensors(observation(batch))
    trained = [*policy.encoder_parameters(), *policy.flow.parameters()]
    optimiser = torch.optim.AdamW(trained, 1e-5)
    chunk = torch.randn(batch, policy.flow.dim, device=policy.device)

    def train() -> None:
        optimiser.zero_grad()
        features = policy.encode(many, "put the cube into the basket")
        policy.flow.matching_loss(
            features, chunk, torch.ones_like(chunk), 2, generator
        ).mean().backward()
        optimiser.step()

    acting = _seconds(
        lambda: policy.eval().act(one, "put the cube into the basket", generator, False), policy
    )
    act_memory = _most_memory(policy)
    training = _seconds(lambda: policy.train() and train(), policy)
    return {
        "act_s": acting,
        "act_memory_gb": act_memory,
        "train_step_s": training,
        "train_memory_gb": _most_memory(policy),
        "batch": batch,
    }


def _seconds(work: Callable[[], Any], policy: Pi0) -> float:
    """Median seconds of `work`, which is warmed up."""
    spent = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        work()
        if policy.device.type == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - began)
    return float(np.median(spent[1:]))


def _most_memory(policy: Pi0) -> float:
    """Gigabytes that tensors took at most on the GPU; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if policy.device.type == "cuda" else 0.0


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="measure the tiny model on the CPU")
    parser.add_argument(
        "--device", default="", help="measure the published sizes there, such as cuda"
    )
    parser.add_argument("--batch", type=int, default=8, help="windows of a training step")
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args(argv)
    figures = shapes()
    if arguments.quick:
        torch.set_num_threads(1)
        figures |= measured("tiny", "cpu", arguments.batch)
    elif arguments.device:
        figures |= measured("pi0", arguments.device, arguments.batch)
    for name, value in figures.items():
        print(f"{name:28}{value:12.3f}")
    if arguments.json:
        device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else ""
        result = {
            "machine": {"system": platform.platform(), "gpu": device},
            "command": "python -m experiments.pi0_cost " + " ".join(argv or sys.argv[1:]),
            "figures": figures,
            "rows": [figures],
        }
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
