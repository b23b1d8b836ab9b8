"""Data parallel training: several processes, ranks, run the same stage and share each batch.

The rules that keep ranks together: all of them start from rank 0's parameters, draw the same rows of a batch from
generators with the same seed, train on their own `share` of these, and average gradients (learner/optimiser.py). What
a rank decides by a clock or by a person's wish is decided by rank 0 and told to the others (`agree`). Only rank 0
publishes, saves and reports. In a process that joined nobody every function here is that of a single rank.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as torch_distributed

from twinrl.core.errors import TwinRLError

TIMEOUT = (
    600.0  # s that a rank waits for the others: an evaluation or a checkpoint of rank 0 lies within
)
JOIN_SECONDS = 180.0  # that the ranks have to find one another
BUCKET = 1 << 24  # numbers in one reduction: 64 MB of float32


def size() -> int:
    """How many ranks there are."""
    return torch_distributed.get_world_size() if _joined() else 1


def rank() -> int:
    """This process's number, 0 .. size - 1."""
    return torch_distributed.get_rank() if _joined() else 0


@contextlib.contextmanager
def joined(
    address: str, rank: int, size: int, device: str = "cpu", timeout: float = TIMEOUT
) -> Iterator[None]:
    """Be rank `rank` of `size` while this lasts; rank 0 listens at `address` (tcp://host:port), env:// is torchrun's.

    gloo where `device` is the CPU, NCCL on GPUs. A rank that dies ends the others with an error, at once where its
    connections break, and after `timeout` seconds otherwise.
    """
    if size == 1:
        yield
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # where NCCL and `agree` work
    try:
        # The others have less time to come than a rank has for its work.
        meeting = torch_distributed.rendezvous(
            address, rank, size, timeout=timedelta(seconds=min(timeout, JOIN_SECONDS))
        )
        store, rank, size = next(iter(meeting))
        torch_distributed.init_process_group(
            "nccl" if device.startswith("cuda") else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
    except (RuntimeError, ValueError) as error:
        raise TwinRLError(
            f"rank {rank} of {size} could not join the others at {address}: {error}"
        ) from None
    try:
        yield
    except RuntimeError as error:
        if _is_lost_peer(error):
            raise TwinRLError(
                f"rank {rank} of {size} lost another rank: {str(error).splitlines()[0]}"
            ) from error
        raise
    finally:
        torch_distributed.destroy_process_group()


def environment() -> tuple[str, int, int] | None:
    """("env://", rank, size) where torchrun, or whoever does as it does, has set the environment; None without."""
    if "WORLD_SIZE" not in os.environ:
        return None
    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise TwinRLError(f"WORLD_SIZE is set, but not {', '.join(missing)}: start with torchrun")
    return "env://", int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def share(rows: Any) -> Any:
    """This rank's part of `rows` (a tensor, array or list, the same on all ranks): every size-th."""
    return rows[rank() :: size()]


def agree(value: Any) -> Any:
    """Rank 0's `value` (anything that pickles) on every rank."""
    if not _joined():
        return value
    box = [value]
    torch_distributed.broadcast_object_list(box, src=0)
    return box[0]


def mean(values: Sequence[float]) -> list[float]:
    """Each of `values`, averaged over ranks."""
    if not _joined():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=_device())
    torch_distributed.all_reduce(total)
    return (total / size()).tolist()


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite `tensors` with rank 0's."""
    if not _joined():
        return
    for tensor in tensors:
        if is_sharded(tensor):
            continue  # each rank has a part of its own
        torch_distributed.broadcast(tensor.data, src=0)


@torch.no_grad()
def average_gradients(parameters: Sequence[Tensor], loss: float) -> float:
    """Replace the gradients of `parameters` by their mean over ranks, and return the mean loss.

    A parameter that has a gradient on some ranks only counts as zero on the others. Where a rank's loss is not finite,
    the mean is not, so that all ranks skip the same updates. Sharded parameters are averaged by FSDP already.
    """
    if not _joined():
        return loss
    whole = [p for p in parameters if not is_sharded(p)]
    header = torch.tensor(
        [loss, *(float(p.grad is not None) for p in whole)], dtype=torch.float32, device=_device()
    )
    torch_distributed.all_reduce(header)
    present = [p for p, ranks in zip(whole, header[1:].tolist(), strict=True) if ranks]
    for parameter in present:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([parameter.grad for parameter in present]):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        torch_distributed.all_reduce(flat)
        flat /= size()
        parts = flat.split([gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
    return float(header[0]) / size()


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a part of `tensor` only (a DTensor of FSDP)."""
    return hasattr(tensor, "full_tensor")


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor whole, gathered from all ranks (all must ask); others as they are."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def _joined() -> bool:
    return torch_distributed.is_available() and torch_distributed.is_initialized()


def _device() -> torch.device:
    """Where collectives of this group work."""
    on_gpu = torch_distributed.get_backend() == "nccl"
    return torch.device("cuda" if on_gpu else "cpu")


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one dtype together, at most BUCKET numbers or one tensor at once."""
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        bucket: list[Tensor] = []
        for gradient in (g for g in gradients if g.dtype == dtype):
            if bucket and sum(g.numel() for g in bucket) + gradient.numel() > BUCKET:
                yield bucket
                bucket = []
            bucket.append(gradient)
        if bucket:
            yield bucket


def _is_lost_peer(error: RuntimeError) -> bool:
    words = (
        "Connection closed",
        "Connection reset",
        "Timed out",
        "timed out",
        "NCCL",
        "Broken pipe",
    )
    return any(word in str(error) for word in words)
