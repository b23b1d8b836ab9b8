"""A frame crosses the link once: what was sent with a question is named, not sent, in the segment that holds it too.

Both ends remember the frames of the last questions, as they were encoded, by their digest and under the same bounds. The
bridge leaves frames out of a segment that the gateway should still have (`thin`), and says in the segment's message which:

    lacking   {column: [rows, digests]}     rows: rising integers; digests: 16 bytes for each row, one after the other

The gateway puts them back (`whole`), so that what it relays has every bit of what lies in the bridge's spool. It may have
forgotten them, above all after a restart: then it says so, and the bridge sends the segment whole.
"""

from __future__ import annotations

import collections
import hashlib
import threading
from typing import Any, Iterable, List, Sequence

import numpy as np

from robot_bridge import frames, parts
from twinrl.core import wire
from twinrl.core.codec import Encoded
from twinrl.core.codec_rows import Rows, join
from twinrl.core.errors import WireError
from twinrl.core.segment import IMAGE_PREFIX

LACKING = "lacking"
DIGEST = 16  # bytes
MOST, LARGEST = 4096, 32 << 20  # frames of a robot that are remembered, and their bytes


def digest_of(data: Any) -> bytes:
    """The name of a frame, or of a segment's bytes."""
    return hashlib.blake2b(data, digest_size=DIGEST).digest()


class Recent:
    """The frames of a robot's last questions by digest, the oldest forgotten first. Thread-safe."""

    def __init__(self, most: int = MOST, largest: int = LARGEST) -> None:
        self._most, self._largest, self.bytes = most, largest, 0
        self._kept: collections.OrderedDict = collections.OrderedDict()
        self._lock = threading.Lock()

    def keep(self, observed: frames.Frames) -> list[bytes]:
        """Remember the frames of an observation; their digests."""
        flat = [_flat(frame) for frame in observed.values()]
        digests = [digest_of(frame) for frame in flat]
        with self._lock:
            for digest, frame in zip(digests, flat):
                self.bytes += 0 if digest in self._kept else len(frame)
                self._kept[digest] = frame
                self._kept.move_to_end(digest)
            while len(self._kept) > self._most or self.bytes > self._largest:
                self.bytes -= len(self._kept.popitem(last=False)[1])
        return digests

    def find(self, digests: Iterable[bytes]) -> List[bytes | None]:
        """The bytes of each, None for what is forgotten."""
        with self._lock:
            return [self._kept.get(digest) for digest in digests]

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._kept.clear()
            self.bytes = 0


class Told(Recent):
    """The bridge's: frames count only once their question was answered, for then the gateway has taken them."""

    def __init__(self) -> None:
        super().__init__()
        self._answered: collections.deque = collections.deque(maxlen=MOST)

    def answered(self, digests: Sequence[bytes]) -> None:
        """The gateway has seen the frames that `keep` gave these digests for."""
        with self._lock:
            self._answered.extend(digests)

    def known(self) -> frozenset[bytes]:
        """Digests of what the gateway should still have."""
        with self._lock:
            digests = list(self._answered)
        return frozenset(d for d, data in zip(digests, self.find(digests)) if data is not None)

    def clear(self) -> None:
        """The gateway has forgotten something: nothing is taken for granted any more."""
        with self._lock:
            self._answered.clear()
        super().clear()


def thin(data: bytes, known: Any) -> bytes | None:
    """A segment (`robot_bridge.parts`) without the frames whose digest is in `known`; None if it has none of these."""
    header, columns = wire.unpack(parts.split(data, "the segment"))
    lacking = {}
    for name, column in columns.items():
        if not known or not _may_lack(name, column):
            continue
        rows = _rows(column)
        digests = [digest_of(row) for row in rows]
        gone = [i for i, digest in enumerate(digests) if digest in known]
        if gone:
            lacking[name] = [gone, b"".join(digests[i] for i in gone)]
            columns[name] = _like(column, [r for r, d in zip(rows, digests) if d not in known])
    if not lacking:
        return None
    return parts.join(wire.pack({**header, LACKING: lacking}, columns))


def whole(header: dict[str, Any], columns: wire.Arrays, recent: Recent) -> int:
    """Put what `thin` left out back into `columns`; how many frames are forgotten: then nothing was put back.

    WireError where `header` and `columns` do not go together, or make more than a segment may have.
    """
    found, missing, size = {}, 0, 0
    lacking = header.get(LACKING, {})
    if not isinstance(lacking, dict) or len(lacking) > wire.MAX_ARRAYS:
        raise WireError(f"{LACKING!r} of a segment maps columns to rows and digests")
    for name, told in lacking.items():
        places, digests = _told(name, columns.get(name), told)
        put = recent.find(digests[i : i + DIGEST] for i in range(0, len(digests), DIGEST))
        missing += put.count(None)
        found[name] = (places, put)
        size += sum(len(frame) for frame in put if frame is not None)
        if size > parts.LARGEST:  # a few digests may stand for a lot
            raise WireError(f"frames of more than {parts.LARGEST} bytes are lacking in a segment")
    for name, (places, put) in ({} if missing else found).items():
        rows, back = iter(_rows(columns[name])), dict(zip(places, put))
        count = len(columns[name]) + len(places)
        filled = [back[i] if i in back else next(rows) for i in range(count)]
        columns[name] = _like(columns[name], filled)
    return missing


def _may_lack(name: Any, column: Any) -> bool:
    if not isinstance(name, str) or not name.startswith(IMAGE_PREFIX):
        return False
    if isinstance(column, Encoded):
        return column.codec == frames.JPEG
    return isinstance(column, np.ndarray) and column.dtype == np.uint8 and column.ndim == 4


def _told(name: Any, column: Any, told: Any) -> Any:
    """The rows and digests of a column that lacks some, when they are such."""
    if not _may_lack(name, column):
        raise WireError(f"{name!r:.80} is no column of frames that could lack some")
    if not isinstance(told, list) or [type(each) for each in told] != [list, bytes]:
        raise WireError(f"what {name!r} lacks is [rows, digests]")
    places, digests = told
    end = len(column) + len(places)
    if not 0 < len(places) <= MOST or len(digests) != DIGEST * len(places):
        raise WireError(
            f"{name!r} lacks {len(places)} frames, 1 to {MOST} are allowed, with {DIGEST} bytes of digest each, "
            f"not {len(digests)} in all"
        )
    rising = all(type(place) is int for place in places) and sorted(set(places)) == places
    if not rising or not 0 <= places[0] <= places[-1] < end:
        raise WireError(f"the rows that {name!r} lacks do not rise from 0 to {end - 1} at most")
    return places, digests


def _flat(frame: Any) -> bytes:
    """A frame's bytes."""
    return frame if isinstance(frame, bytes) else frame.tobytes()


def _rows(column: Any) -> list[bytes]:
    """The bytes of each row."""
    if not isinstance(column, Encoded):
        return [_flat(row) for row in column]
    if not len(column):
        return []
    rows = Rows(column.data, len(column))
    return [bytes(rows[i]) for i in range(len(column))]


def _like(column: Any, rows: Sequence[bytes]) -> Any:
    """A column of these rows' bytes, else like `column`."""
    shape = (len(rows), *column.shape[1:])
    if isinstance(column, Encoded):
        return Encoded(column.codec, column.dtype, shape, join(rows) if rows else b"")
    data = b"".join(rows)
    if len(data) != int(np.prod(shape)):
        raise WireError(f"{len(data)} bytes of raw frames for {shape}")
    return np.array(bytearray(data), np.uint8).reshape(shape)
