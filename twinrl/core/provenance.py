"""Where a segment comes from: who wrote it, where, when, and with which code. Every segment's header carries it."""

from __future__ import annotations

import functools
import getpass
import os
import socket
import time
from pathlib import Path
from typing import Any, Dict

from twinrl import __version__

ROOT = Path(__file__).resolve().parent.parent.parent  # of the checkout, if this is one
HEX = frozenset("0123456789abcdef")


def provenance() -> dict[str, Any]:
    """{"host", "pid", "user", "version", "commit", "time"}: texts, but the pid and the time (s since the epoch).

    Plain values that any header can hold. What cannot be found is "", nothing is raised. A user's name is all
    that it says of a person.
    """
    return {**_constant(), "pid": os.getpid(), "time": time.time()}


@functools.lru_cache(maxsize=None)
def _constant() -> Dict[str, str]:
    """What stays as it is while a process lives: its code too, whatever is checked out later."""
    return {
        "host": socket.gethostname(),
        "user": _user(),
        "version": __version__,
        "commit": commit(ROOT),
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except Exception:  # a container's user without a name: KeyError, OSError or ImportError
        return str(os.getuid()) if hasattr(os, "getuid") else ""


def commit(root: Path) -> str:
    """The commit that is checked out in `root`, read from git's files; "" where there is none.

    Git itself isn't run: it may be missing, and a fork from a process with many threads is a risk.
    """
    try:
        folder = root / ".git"
        if folder.is_file():  # a worktree or a submodule: "gitdir: PATH"
            folder = root / folder.read_text().split(":", 1)[1].strip()
        head = (folder / "HEAD").read_text().strip()
        if head.startswith("ref:"):
            head = _reference(folder, head.split(":", 1)[1].strip())
    except (OSError, ValueError, IndexError):
        return ""
    return head if len(head) >= 40 and HEX.issuperset(head) else ""


def _reference(folder: Path, name: str) -> str:
    common = folder / "commondir"  # a worktree's branches lie in the main checkout
    places = [folder] + ([folder / common.read_text().strip()] if common.exists() else [])
    for place in places:
        if (place / name).is_file():
            return (place / name).read_text().strip()
    for place in places:
        packed = place / "packed-refs"
        for line in packed.read_text().splitlines() if packed.exists() else ():
            if line.endswith(f" {name}"):
                return line.split()[0]
    return ""
