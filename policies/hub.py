"""Published files: a folder here, or a name on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class NotFetchedError(ValueError):
    """A name that is no path here and could not be fetched."""


def local_path(name: str, patterns: Sequence[str]) -> Path:
    """`name` as a path where there is one, else the folder into which the hub's files of that name were fetched.

    `patterns` say which files are wanted. What was fetched once is found again without a network.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # of many kinds: no such name, no network, not allowed
        raise NotFetchedError(
            f"{name!r} is no file or folder here, and as a name on the Hugging Face hub it cannot be fetched: "
            f"{reason(error)}"
        ) from None


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
