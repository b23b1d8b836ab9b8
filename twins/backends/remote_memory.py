"""Shared memory between us and a worker on this host: anonymous pieces, lent for one call at a time.

The results of a call are views of its piece, which is used again when the last of them is gone. A piece has no name,
so nothing can be left behind, and does not count against the size of /dev/shm (64 MB in many a container).
"""

from __future__ import annotations

import itertools
import mmap
import os
import threading
import weakref

import numpy as np

SECRET_BYTES = 32
SPARE = 0.25  # of a piece's size: room for results that grow a little
_numbers = itertools.count(1)


class Piece:
    """One piece of `size` bytes, not all of which the system may have: MemoryError then."""

    def __init__(self, size: int) -> None:
        self.number, self.size = next(_numbers), -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._fd = os.memfd_create("twinrl-worker", os.MFD_CLOEXEC)
        self._closed = weakref.finalize(self, os.close, self._fd)
        try:
            os.posix_fallocate(
                self._fd, 0, self.size
            )  # a map without pages behind it would kill us
            self._memory = mmap.mmap(self._fd, self.size)
        except OSError as error:
            raise MemoryError(f"{self.size} bytes of shared memory: {error.strerror}") from None
        self._root: weakref.ref | None = None

    @property
    def address(self) -> list[int]:
        """How the worker finds it: [number, our process id, descriptor, size]."""
        return [self.number, os.getpid(), self._fd, self.size]

    @property
    def free(self) -> bool:
        """Whether nobody holds a view of it."""
        return self._root is None or self._root() is None

    def borrow(self) -> np.ndarray:
        """(size,) uint8. It is not free again before all views of this array are gone."""
        root = np.frombuffer(self._memory, np.uint8)
        self._root = weakref.ref(root)
        return root


class Pieces:
    """The pieces for one worker, at most `most` bytes together. Where there is no room, sockets carry the arrays."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._pieces: list[Piece] = []
        self._lock = threading.Lock()

    def borrow(self, nbytes: int) -> tuple[Piece, np.ndarray] | None:
        """A free piece of at least `nbytes` and its memory (size,) uint8."""
        with self._lock:
            fitting = [p for p in self._pieces if p.free and p.size >= nbytes]
            piece = min(fitting, key=lambda p: p.size, default=None) or self._make(nbytes)
            return None if piece is None else (piece, piece.borrow())

    def numbers(self) -> list[int]:
        """The pieces that the worker should keep mapped."""
        return [piece.number for piece in self._pieces]

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return sum(piece.size for piece in self._pieces)

    def _make(self, nbytes: int) -> Piece | None:
        # Free ones are all too small: the new one takes their place.
        self._pieces = [piece for piece in self._pieces if not piece.free]
        size = int(nbytes * (1 + SPARE))
        if self.nbytes + size > self._most:
            return None
        try:
            piece = Piece(size)
        except MemoryError:
            return None
        self._pieces.append(piece)
        return piece


def probe() -> tuple[Piece, np.ndarray] | None:
    """A piece that begins with a secret: who can read that sees our memory. None where the system has no such memory."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        piece = Piece(SECRET_BYTES)
    except (MemoryError, OSError):
        return None
    secret = np.frombuffer(os.urandom(SECRET_BYTES), np.uint8)
    piece.borrow()[:SECRET_BYTES] = secret
    return piece, secret
