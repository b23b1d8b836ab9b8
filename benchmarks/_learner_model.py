"""One policy's size and speed in a process of its own, so that its memory can be told from others'.

    python -m benchmarks._learner_model '{"policy": {"preset": "tiny"}, "batch": 32, "seconds": 2}'

An update is SFT's with everything trained, encoder included: encoding, flow matching, gradients, AdamW.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._inference_bench import observe, policy_config
from benchmarks._learner_data import INSTRUCTION
from learner.optimiser import Optimiser
from policies.policy import Policy
from policies.registry import make_policy

# Dense bfloat16 FLOP/s without sparsity, from the makers' data sheets, by what torch calls the device.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def peak(device: str) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU by its name; None where it is not known."""
    return next((value for name, value in PEAKS.items() if name in device), None)


def measure(
    policy: dict[str, Any], batch: int, seconds: float, device: str = "cpu", optimised: bool = True
) -> dict[str, Any]:
    """Parameters, updates/s, memory, FLOPs. Without `optimised` gradients are dropped as they come, and no step is made:
    a model that this machine has no room to train."""
    _load_libraries()
    before = psutil.Process().memory_info().rss
    torch.manual_seed(0)
    model: Policy = make_policy(policy_config(10, critics=0, **policy)).to(device)
    everything = [*model.flow.parameters(), *model.encoder_parameters()]
    parameters = [parameter for parameter in everything if parameter.requires_grad]
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch": batch,
    }
    step, loss = _update(model, parameters, batch, device, optimised)
    step()
    _wait(device)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds or not count:
        step()
        _wait(device)
        count += 1
    found["updates_per_s"] = count / (time.perf_counter() - began)
    found["samples_per_s"] = batch * found["updates_per_s"]
    found |= _memory(device, before)
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    found["gflop"] = counter.get_total_flops() / 1e9
    found["gflop_per_s"] = found["gflop"] * found["updates_per_s"]
    if found.get("device") and peak(found["device"]):
        found["mfu"] = found["gflop_per_s"] * 1e9 / peak(found["device"])
    found["act_ms"] = _act(model, device)
    return found


def _load_libraries() -> None:
    """Have what torch loads with the first operations in memory already: it is no model's."""
    layer = torch.nn.Conv2d(3, 4, 3)
    Optimiser(layer.parameters(), 1e-4).step(layer(torch.zeros(1, 3, 8, 8)).sum())


def _memory(device: str, before: int) -> dict[str, Any]:
    """The most that was in use, MB, on the CPU beyond `before` bytes; the GPU's name."""
    if device == "cpu":
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        return {"memory_MB": peak_bytes / 1e6}
    name = torch.cuda.get_device_name()
    return {"memory_MB": torch.cuda.max_memory_allocated() / 1e6, "device": name}


def _update(
    model: Policy, parameters: list[torch.nn.Parameter], batch: int, device: str, optimised: bool
) -> tuple[Callable[[], Any], Callable[[], Tensor]]:
    """One update, and the loss alone, on a batch that is on the device already."""
    tensors = model.to_tensors(observe(batch))
    chunk = torch.randn(batch, model.flow.dim, device=device)
    mask = torch.ones_like(chunk)

    def loss() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            features = model.encode(tensors, INSTRUCTION)
            return model.flow.matching_loss(features, chunk, mask).mean()

    if optimised:
        optimiser = Optimiser(parameters, 1e-4, clip=1.0)
        return lambda: optimiser.step(loss()), loss
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", None))
    return lambda: loss().backward(), loss


def _act(model: Policy, device: str) -> float:
    """Median milliseconds of a chunk for one observation, K = 10."""
    times, one, generator = [], observe(1), torch.Generator()
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
        for _ in range(5):
            began = time.perf_counter()
            model.act(one, INSTRUCTION, generator, explore=False)
            times.append(time.perf_counter() - began)
    return sorted(times)[2] * 1e3


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
