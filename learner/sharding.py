"""Fully sharded data parallel (FSDP2) for flow experts whose parameters and optimiser do not fit on one device.

Each rank keeps a part of every parameter, gathers a block when it computes, and reduces its gradients. The Optimiser
leaves sharded parameters' gradients to it, and clips by the norm over all parts.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from learner import distributed
from policies.flow import FlowExpert
from twinrl.core.errors import TwinRLError

# What is called of an expert and of its blocks from outside, other than forward.
METHODS = (
    "matching_loss",
    "integrate",
    "sample_path",
    "path_log_prob",
    "summary",
    "cache",
)


def shard(flow: FlowExpert) -> None:
    """Divide `flow` among all ranks in place: its blocks (entries of ModuleLists), then what remains.

    Before any optimiser is made; all ranks must hold the same parameters.
    """
    if distributed.size() == 1:
        raise TwinRLError("sharding needs several ranks: learner.ranks is 1")
    device = next(flow.parameters()).device.type
    mesh = init_device_mesh(device, (distributed.size(),))
    blocks = [
        block for module in flow.modules() if isinstance(module, nn.ModuleList) for block in module
    ]
    for module in (*blocks, flow):
        fully_shard(module, mesh=mesh)
        for name in METHODS:
            if hasattr(module, name):
                register_fsdp_forward_method(module, name)


def gathered(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a sharded module whole, on the CPU; all ranks must ask."""
    return {
        name: distributed.full(tensor).detach().cpu()
        for name, tensor in module.state_dict().items()
    }
