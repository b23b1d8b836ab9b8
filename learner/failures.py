"""What is kept of a training that ended in numbers that are none: the last batch, and how large the parameters were."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from learner.optimiser import NonFiniteLossError


def save_failure(folder: Path, stage: str, policy: nn.Module, error: NonFiniteLossError) -> Path:
    """Write `folder`/STAGE-TIME/ with batch.npz (the arrays) and norms.json {parameter: {"norm", "gradient"}}; its path.

    Parameters that are not the policy's, as those of a critic of an algorithm's own, are numbered.
    """
    path = folder / f"{stage}-{time.strftime('%Y%m%d-%H%M%S')}"
    path.mkdir(parents=True, exist_ok=True)
    arrays = {
        name: torch.as_tensor(value).detach().cpu().float().numpy()
        if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16
        else np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value)
        for name, value in error.batch.items()
    }
    np.savez(path / "batch.npz", **arrays)
    names = {id(parameter): name for name, parameter in policy.named_parameters()}
    norms = {
        names.get(id(parameter), f"parameter {index}"): {
            "norm": float(parameter.detach().norm()),
            "gradient": None if parameter.grad is None else float(parameter.grad.norm()),
        }
        for index, parameter in enumerate(error.parameters)
    }
    (path / "norms.json").write_text(json.dumps(norms, indent=1))
    return path
