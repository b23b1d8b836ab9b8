"""Checkpoints: everything that resuming needs in one file, replaced as a whole, refused when incomplete or damaged.

Training stops only for a copy in memory; a thread hashes, writes and syncs it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policies.weights import WeightsError, load_tensors, published
from twinrl.core.checksum import digest_of
from twinrl.core.errors import DeadlineError, ResumeError, TwinRLError

FORMAT = 3
KEYS = ("format", "stage", "version", "policy_config", "policy", "policy_hash", "algorithm", "rng")


def snapshot(
    *,
    stage: str,
    version: int,
    policy: torch.nn.Module,
    policy_config: dict[str, Any],
    algorithm: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A checkpoint's content, copied to the CPU: nothing in it changes with further training."""
    return _copied(
        {
            "format": FORMAT,
            "stage": stage,
            "version": version,
            "policy_config": policy_config,
            "policy": published(policy),
            "algorithm": algorithm or {},
            "rng": torch.get_rng_state(),
        }
    )


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write atomically and durably, with a hash of everything: a crash leaves the old file or the new one."""
    state = {**state, "policy_hash": content_hash(state["policy"])}
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save({**state, "hash": content_hash(state)}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)  # the new name, too, is to survive a power cut
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_checkpoint(path: Path, **content: Any) -> None:
    """Write a checkpoint of what `snapshot` takes and return when it is on disk."""
    write_checkpoint(path, snapshot(**content))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read and check a checkpoint; ResumeError rather than a policy restored in part."""
    if not path.exists():
        raise ResumeError(f"no checkpoint {path}")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds on damaged files
        raise ResumeError(f"{path} cannot be read: {error}") from None
    if not isinstance(state, dict):
        raise ResumeError(f"{path} is no checkpoint: it holds a {type(state).__name__}")
    if state.get("format") != FORMAT:
        raise ResumeError(
            f"{path} has the checkpoint format {state.get('format')!r}; this version reads {FORMAT}"
        )
    missing = [key for key in (*KEYS, "hash") if key not in state]
    if missing:
        raise ResumeError(f"{path} is no complete checkpoint: it lacks {', '.join(missing)}")
    wanted = state.pop("hash")
    if content_hash(state) != wanted:
        raise ResumeError(
            f"{path} is damaged: its content does not have the hash it was saved with"
        )
    return state


def restore_policy(policy: torch.nn.Module, state: dict[str, Any], path: Path) -> None:
    """Load a checkpoint's policy whole, and prove it by its hash."""
    try:
        load_tensors(policy, state["policy"])
    except (RuntimeError, WeightsError) as error:
        raise ResumeError(f"{path} holds another policy: {error}") from None
    if content_hash(published(policy)) != state["policy_hash"]:
        raise ResumeError(f"{path}: the restored policy's hash differs from the saved one")


def content_hash(state: Any) -> str:
    """XXH3-64 over all tensors, arrays and values of nested dicts and lists, with their places and kinds."""
    return f"{digest_of(_pieces(state, '')):016x}"


class CheckpointWriter:
    """Writes checkpoints in a thread of its own, one after the other.

    A file that is asked for again before its writing began is written once, with the newer content. An error is
    raised by the next `save` or `flush`.
    """

    def __init__(self) -> None:
        self._pending: dict[Path, dict[str, Any]] = {}
        self._busy = False
        self._error: tuple[Path, Exception] | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def save(self, path: Path, state: dict[str, Any]) -> None:
        """Take `state` (a `snapshot`, nobody else's any more) and write it to `path` in the background."""
        with self._changed:
            self._complain()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
                self._thread.start()
            self._pending[path] = state
            self._changed.notify_all()

    def flush(self, timeout: float = 600.0) -> None:
        """Return when everything is on disk, or raise why it could not be."""
        ended = time.monotonic() + timeout
        with self._changed:
            while (self._pending or self._busy) and self._error is None:
                if not self._changed.wait(max(0.0, ended - time.monotonic())) and (
                    time.monotonic() >= ended
                ):
                    raise DeadlineError(f"checkpoints were not written within {timeout:g} s")
            self._complain()

    def close(self) -> None:
        """Write what is left, and end."""
        try:
            self.flush()
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()

    def _complain(self) -> None:
        if self._error is not None:
            (path, error), self._error = self._error, None
            raise TwinRLError(f"checkpoint {path} was not written: {error}") from error

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._pending:
                    if self._closed:
                        return
                    self._changed.wait()
                path = next(iter(self._pending))
                state = self._pending.pop(path)
                self._busy = True
            error = None
            try:
                write_checkpoint(path, state)
            except Exception as problem:  # told to whoever saves or waits next
                error = (path, problem)
            with self._changed:
                self._busy = False
                self._error = self._error or error
                self._changed.notify_all()


def _copied(value: Any) -> Any:
    """Nested dicts, lists and tuples with copies of their tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, Mapping):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_copied, value))
    return value


def _pieces(value: Any, place: str) -> Any:
    """What the hash covers, as bytes: the same before saving and after loading."""
    if isinstance(value, Mapping):
        yield f"{place}{{{len(value)}}}".encode()
        for key, each in value.items():
            yield from _pieces(each, f"{place}/{key!r}")
    elif isinstance(value, (list, tuple)):
        yield f"{place}[{len(value)}]".encode()
        for index, each in enumerate(value):
            yield from _pieces(each, f"{place}/{index}")
    elif isinstance(value, (Tensor, np.ndarray)):
        tensor = torch.as_tensor(value).detach().cpu().contiguous()
        yield f"{place}|{tensor.dtype}|{tuple(tensor.shape)}|".encode()
        yield tensor.reshape(-1).view(torch.uint8).numpy()
    else:
        yield f"{place}={value!r}".encode()
