"""A segment as one run of bytes, in a file of the spool and in pieces over a slow link."""

from __future__ import annotations

import struct
from typing import Any, Sequence

from twinrl.core.errors import WireError

_COUNT, _LENGTH = struct.Struct("<I"), struct.Struct("<Q")
LARGEST = 256 << 20  # bytes of a segment that comes in pieces
SMALLEST_PIECE, LARGEST_PIECE = 4 << 10, 256 << 10
PIECE_S = 0.05  # s that a piece should take: what is live waits no longer behind it


def join(frames: Sequence[Any]) -> bytes:
    """The bytes of a message's frames, with their number and lengths before them."""
    lengths = b"".join(_LENGTH.pack(len(frame)) for frame in frames)
    return b"".join([_COUNT.pack(len(frames)), lengths, *(bytes(frame) for frame in frames)])


def split(data: bytes, what: str) -> list[memoryview]:
    """The frames that `join` made one; WireError calls it `what` if it is damaged."""
    view = memoryview(data)
    try:
        (count,) = _COUNT.unpack_from(view)
        if count > len(view) // _LENGTH.size:
            raise struct.error(f"{count} frames in {len(view)} bytes")
        lengths = [
            _LENGTH.unpack_from(view, _COUNT.size + _LENGTH.size * i)[0] for i in range(count)
        ]
    except struct.error as error:
        raise WireError(f"{what} is damaged: {error}") from None
    position, frames = _COUNT.size + _LENGTH.size * count, []
    for length in lengths:
        frames.append(view[position : position + length])
        position += length
    if position != len(view):
        raise WireError(f"{what} is damaged: {len(view)} bytes, should be {position}")
    return frames


def piece(rate: float) -> int:
    """Bytes of the next piece over a link that carries `rate` bytes/s."""
    return int(min(max(rate * PIECE_S, SMALLEST_PIECE), LARGEST_PIECE))


class Assembly:
    """One robot's segment that is coming in pieces; another one, or the same in other bytes, begins anew."""

    def __init__(self) -> None:
        self._what: Any = None  # sequence number, bytes and digest
        self._data = bytearray()

    def add(self, sequence: int, offset: int, total: int, digest: Any, data: bytes) -> int:
        """Take a piece; the offset that is wanted next: `total` when the segment is whole.

        `digest` names all the bytes: a segment may come with other frames left out when it is sent again.
        """
        if not 0 < total <= LARGEST:
            raise WireError(f"a segment of {total} bytes in pieces, allowed {LARGEST}")
        if not isinstance(digest, bytes) or len(digest) != 16:
            raise WireError(f"a segment's digest is 16 bytes, not {digest!r:.60}")
        if self._what != (sequence, total, digest):
            self._what, self._data = (sequence, total, digest), bytearray()
        if offset == len(self._data):
            if offset + len(data) > total:
                raise WireError(f"a piece to byte {offset + len(data)} of a segment of {total}")
            self._data += data
        return len(self._data)

    def take(self) -> bytes:
        """The whole segment, which is forgotten here."""
        data = bytes(self._data)
        self._what, self._data = None, bytearray()
        return data
