"""Weights as named NumPy arrays: what is published, checksummed and loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

Arrays = dict[str, np.ndarray]


class WeightsError(ValueError):
    """Weights that do not belong to this policy; nothing of them was loaded."""


def to_arrays(module: nn.Module) -> Arrays:
    """Views of all parameters and buffers (no copy: they change with training; copy before keeping)."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in module.state_dict().items()}


def checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """Hex digest over names, dtypes, shapes and bytes, independent of the order of names."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        digest.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def load_arrays(
    module: nn.Module, arrays: Mapping[str, np.ndarray], expected: str | None = None
) -> None:
    """Load all of `arrays` or nothing; `expected` is the publisher's checksum.

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
        if array.dtype != tensor.numpy().dtype:
            raise WeightsError(
                f"{name}: dtype {array.dtype}, this policy has {tensor.numpy().dtype}"
            )
    if expected is not None and checksum(arrays) != expected:
        raise WeightsError(f"checksum {checksum(arrays)}, published {expected}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(torch.from_numpy(np.array(arrays[name])))
