"""Checkpoints: everything that resuming needs in one file, replaced as a whole, refused when incomplete."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from policies.weights import to_arrays
from twinrl.core.errors import ResumeError
from twinrl.weights import checksum

FORMAT = 2
KEYS = ("format", "stage", "version", "policy_config", "policy", "policy_hash", "algorithm", "rng")


def save_checkpoint(
    path: Path,
    *,
    stage: str,
    version: int,
    policy: torch.nn.Module,
    policy_config: dict[str, Any],
    algorithm: dict[str, Any] | None = None,
) -> None:
    """Write atomically and durably: a crash leaves the old file or the new one."""
    state = {
        "format": FORMAT,
        "stage": stage,
        "version": version,
        "policy_config": policy_config,
        "policy": policy.state_dict(),
        "policy_hash": f"{checksum(to_arrays(policy)):016x}",
        "algorithm": algorithm or {},
        "rng": torch.get_rng_state(),
    }
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read and check a checkpoint; ResumeError rather than a policy restored in part."""
    if not path.exists():
        raise ResumeError(f"no checkpoint {path}")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds on damaged files
        raise ResumeError(f"{path} cannot be read: {error}") from None
    missing = [key for key in KEYS if key not in state]
    if missing or state["format"] != FORMAT:
        raise ResumeError(f"{path} is no complete checkpoint: it lacks {missing or 'this format'}")
    return state


def restore_policy(policy: torch.nn.Module, state: dict[str, Any], path: Path) -> None:
    """Load a checkpoint's policy whole, and prove it by its hash."""
    try:
        policy.load_state_dict(state["policy"], strict=True)
    except RuntimeError as error:
        raise ResumeError(f"{path} holds another policy: {error}") from None
    if f"{checksum(to_arrays(policy)):016x}" != state["policy_hash"]:
        raise ResumeError(f"{path}: the restored policy's hash differs from the saved one")
