"""Weights as named NumPy arrays: what is published, checksummed and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from twinrl.weights import checksum

Arrays = dict[str, np.ndarray]


class WeightsError(ValueError):
    """Weights that do not belong to this policy; nothing of them was loaded."""


def published(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that travel: all, but for those that `module.fixed` names.

    Those are the frozen weights that every process has loaded from the same place.
    """
    fixed = getattr(module, "fixed", frozenset())
    return {name: t.detach() for name, t in module.state_dict().items() if name not in fixed}


def to_arrays(module: nn.Module) -> Arrays:
    """Views of all that is published (no copy: they change with training; copy before keeping).

    NumPy has no bfloat16: such a tensor's bits are uint16, which no parameter of ours is otherwise.
    """
    return {name: _bits(tensor.cpu()).numpy() for name, tensor in published(module).items()}


def _bits(tensor: Tensor) -> Tensor:
    """The same memory in a dtype that NumPy has."""
    return tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor


def load_arrays(
    module: nn.Module, arrays: Mapping[str, np.ndarray], expected: int | None = None
) -> None:
    """Load all of `arrays` or nothing; `expected` is the publisher's checksum (twinrl.weights.checksum).

    Raises WeightsError for a missing or surplus name, another shape or dtype, another checksum, or other frozen weights
    than those beside which `arrays` were trained (`module.base`, see Pi0).
    """
    own = {name: _bits(tensor) for name, tensor in published(module).items()}
    _check_belonging(own, arrays)
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


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load what `published` gave, from a checkpoint; the errors are those of load_arrays, and torch's own."""
    _check_belonging(published(module), tensors)
    module.load_state_dict(tensors, strict=False)


def _check_belonging(own: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """WeightsError unless both have the same names and stand beside the same frozen weights."""
    missing, surplus = sorted(own.keys() - others.keys()), sorted(others.keys() - own.keys())
    if missing or surplus:
        raise WeightsError(f"names differ: missing {missing[:5]}, surplus {surplus[:5]}")
    if "base" in own and (there := int(others["base"])) != (here := int(own["base"])):
        raise WeightsError(
            f"they were trained beside other frozen weights (base {there}, here {here}): "
            f"policy.weights names something else there"
        )
