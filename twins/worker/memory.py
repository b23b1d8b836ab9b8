"""Shared memory as the worker sees it: pieces that the other side made and lends for one call each.

They have no name in any file system: the other side holds open descriptors, which this process opens through
/proc. So nothing is left behind, however either side ends, and memory goes when both have let go of it.
"""

from __future__ import annotations

import mmap
import os
from typing import Any, Dict, Iterable

import numpy as np

from twinrl.core.errors import WireError


class Pieces:
    """The pieces that are mapped, by number."""

    def __init__(self) -> None:
        self._maps: Dict[int, np.ndarray] = {}

    def probe(self, piece: Any, secret: bytes) -> bool:
        """Whether the other side's memory can be seen here: same host, same user, same process namespace."""
        try:
            _number, _, _, _ = piece
            return self.get(piece)[: len(secret)].tobytes() == secret
        except (OSError, TypeError, ValueError):
            return False
        finally:
            self.keep(())

    def get(self, piece: Any) -> np.ndarray:
        """(size,) uint8, writable. `piece` is [number, process id, descriptor, size]."""
        number, process, descriptor, size = piece
        if not all(type(n) is int and n >= 0 for n in piece):
            raise WireError(f"{piece!r:.100} is no piece of shared memory")
        found = self._maps.get(number)
        if found is None:
            file = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
            try:
                if os.fstat(file).st_size != size:
                    raise WireError(f"shared memory of {os.fstat(file).st_size} bytes, not {size}")
                found = self._maps[number] = np.frombuffer(mmap.mmap(file, size), np.uint8)
            finally:
                os.close(file)
        return found

    def keep(self, numbers: Iterable[int]) -> None:
        """Let go of all pieces but these."""
        alive = set(numbers)
        self._maps = {number: found for number, found in self._maps.items() if number in alive}
