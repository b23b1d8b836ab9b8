"""Tensors of the simulator as torch tensors and back."""

from __future__ import annotations

import torch

from isaacgym.gymapi import Tensor

NAMES = {
    torch.float32: "float32",
    torch.int32: "int32",
    torch.uint8: "uint8",
    torch.int64: "int64",
    torch.float64: "float64",
}


def wrap_tensor(gym_tensor, offsets=None, counts=None):
    """The simulator's memory as a torch tensor, without a copy."""
    assert isinstance(gym_tensor, Tensor), f"{type(gym_tensor)} is no gymapi.Tensor"
    assert gym_tensor.torch is not None, "no tensor of the simulator"
    return gym_tensor.torch


def unwrap_tensor(torch_tensor):
    """A torch tensor for a call of the simulator, which looks at it when it next simulates."""
    assert isinstance(torch_tensor, torch.Tensor), type(torch_tensor)
    if not torch_tensor.is_contiguous():
        raise Exception("Input tensor must be contiguous")
    return Tensor(torch_tensor, NAMES[torch_tensor.dtype])
