"""Weights as named NumPy arrays: what is published, checksummed and loaded."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from twinrl.weights import checksum

Arrays = dict[str, np.ndarray]


class WeightsError(ValueError):
    """Weights that do not belong to this policy; nothing of them was loaded."""


def to_arrays(module: nn.Module) -> Arrays:
    """Views of all parameters and buffers (no copy: they change with training; copy before keeping)."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in module.state_dict().items()}


def load_arrays(
    module: nn.Module, arrays: Mapping[str, np.ndarray], expected: int | None = None
) -> None:
    """Load all of `arrays` or nothing; `expected` is the publisher's checksum (twinrl.weights.checksum).

    Raises WeightsError for a missing or surplus name, another shape or dtype, or another checksum.
    """
    own = module.state_dict()
    missing, surplus = sorted(own.keys() - arrays.keys()), sorted(arrays.keys() - own.keys())
    if missing or surplus:
        raise WeightsError(f"names differ: missing {missing[:5]}, surplus {surplus[:5]}")
    for name, tensor in own.items():
        array = np.asarray(arrays[name])
        if array.shape != tuple(tensor.shape):
            raise WeightsError(
                f"{name}: shape {array.shape}, this policy has {tuple(tensor.shape)}"
            )
        dtype = torch.empty(0, dtype=tensor.dtype).numpy().dtype
        if array.dtype != dtype:
            raise WeightsError(f"{name}: dtype {array.dtype}, this policy has {dtype}")
    if expected is not None and (found := checksum(arrays)) != expected:
        raise WeightsError(f"their checksum is {found:016x}, published was {expected:016x}")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.device.type == "cpu":
                np.copyto(tensor.numpy(), arrays[name])  # torch takes no read-only views
            else:
                tensor.copy_(torch.from_numpy(np.array(arrays[name])))
