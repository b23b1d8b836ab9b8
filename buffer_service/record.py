"""A record: one segment as bytes that describe themselves, on disk and on the way to other hosts.

    prefix    48 bytes: magic, length of the record, length of the head, time, XXH3-64 of head and of columns
    head      msgpack [header, [[column, dtype, shape, offset, bytes, codec], ...]], offsets from the start of
              the columns; codec "" for raw
    columns   raw arrays or encoded bytes, each aligned to 64 bytes so that mapped views are as good as allocated

A record is known by its header's (writer, sequence); where it lies is the index's business. Its length is a
multiple of 64, so records that follow each other in a file stay aligned.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgpack

from twinrl.core import wire
from twinrl.core.checksum import digest
from twinrl.core.codec import Encoded
from twinrl.core.errors import WireError
from twinrl.core.segment import Segment

ALIGNMENT = 64
MAGIC = b"TWRLREC2"
_PREFIX = struct.Struct("<8sQQdQQ")
PREFIX_BYTES = _PREFIX.size
MAX_HEAD_BYTES = 1 << 20  # its msgpack may need 64 times that in memory


class Prefix(NamedTuple):
    """What a record says about itself before its head is parsed."""

    length: int  # bytes of the whole record, padding included
    head_length: int
    time: float  # s since the epoch, when it was encoded
    head_digest: int
    columns_digest: int


def encode(header: dict[str, Any], columns: wire.Arrays) -> tuple[list[Any], int]:
    """Buffers to be written one after the other, and their total length; columns are not copied."""
    specs, buffers, contents, offset = [], [], [], 0
    for name, column in columns.items():
        (*described, codec), raw = wire.describe(name, column)
        if not isinstance(column, Encoded):
            described, codec = [*described, codec], ""
        specs.append([*described, offset, len(raw), codec])
        if len(raw):
            contents.append(raw)
            buffers += [raw, _padding(len(raw))]
            offset += _aligned(len(raw))
    head = msgpack.packb([header, specs])
    if len(head) > MAX_HEAD_BYTES:
        raise WireError(f"a segment's header takes {len(head)} bytes, allowed {MAX_HEAD_BYTES}")
    start = _aligned(PREFIX_BYTES + len(head))
    prefix = _PREFIX.pack(
        *(MAGIC, start + offset, len(head), time.time(), digest(head), digest(*contents))
    )
    lead = prefix + head + _padding(PREFIX_BYTES + len(head))
    return [lead, *(each for each in buffers if len(each))], start + offset


def prefix(buffer: Any, offset: int = 0) -> Prefix | None:
    """The prefix of the record at `offset`, or None where no whole record lies."""
    if offset < 0 or offset + PREFIX_BYTES > len(buffer):
        return None
    magic, *fields = _PREFIX.unpack_from(buffer, offset)
    found = Prefix(*fields)
    if magic != MAGIC or offset + found.length > len(buffer):
        return None
    if found.length < PREFIX_BYTES + found.head_length or found.length % ALIGNMENT:
        return None
    return found


def intact(buffer: Any, offset: int = 0, columns: bool = True) -> bool:
    """Whether a whole record lies at `offset` and its head, and its `columns` too when asked for, are what was written."""
    found = prefix(buffer, offset)
    if found is None:
        return False
    start = offset + PREFIX_BYTES
    if digest(memoryview(buffer)[start : start + found.head_length]) != found.head_digest:
        return False
    if not columns:
        return True
    try:
        raws = [raw for _, raw in _columns(buffer, offset, found)[1]]
    except WireError:
        return False
    return digest(*raws) == found.columns_digest


def decode(buffer: Any, offset: int = 0, verify: bool = False) -> Segment:
    """The segment of the record at `offset`; its columns are read-only views of `buffer`, or `Encoded` ones.

    With `verify` both checksums are compared: for bytes that came from another host.
    """
    found = prefix(buffer, offset)
    if found is None:
        raise WireError(f"no record at byte {offset}")
    if verify and not intact(buffer, offset):
        raise WireError(f"the record at byte {offset} is damaged: its checksum does not fit")
    header, places = _columns(buffer, offset, found)
    columns = dict(wire.restore(spec, raw) for spec, raw in places)
    return Segment(header, columns)


def header(buffer: Any, offset: int = 0) -> dict[str, Any]:
    """The header of the record at `offset`, without its columns."""
    found = prefix(buffer, offset)
    if found is None:
        raise WireError(f"no record at byte {offset}")
    return _head(buffer, offset, found)[0]


def layout(buffer: Any, offset: int = 0) -> tuple[dict[str, Any], list[list[Any]]]:
    """The header, and [name, dtype, shape, codec, byte in `buffer`, bytes] of each column, without touching them."""
    found = prefix(buffer, offset)
    if found is None:
        raise WireError(f"no record at byte {offset}")
    header, specs = _head(buffer, offset, found)
    base, end = offset + _aligned(PREFIX_BYTES + found.head_length), offset + found.length
    columns = []
    for spec in specs:
        name, dtype, shape, place, nbytes, codec = _checked(spec, base, end)
        columns.append([name, dtype, shape, codec, base + place, nbytes])
    return header, columns


def _columns(
    buffer: Any, offset: int, found: Prefix
) -> tuple[dict[str, Any], list[tuple[list[Any], memoryview]]]:
    header, specs = _head(buffer, offset, found)
    return header, list(_places(buffer, offset, found, specs))


def _places(
    buffer: Any, offset: int, found: Prefix, specs: list
) -> Iterator[tuple[list[Any], memoryview]]:
    """Each column as `wire` describes it, and its bytes."""
    view = memoryview(buffer)
    base, end = offset + _aligned(PREFIX_BYTES + found.head_length), offset + found.length
    for spec in specs:
        *described, place, nbytes, codec = _checked(spec, base, end)
        yield [*described, codec] if codec else described, view[base + place :][:nbytes]


def _checked(spec: Any, base: int, end: int) -> list[Any]:
    """A column's spec, whose bytes lie between `base` and `end`."""
    if not isinstance(spec, list) or len(spec) != 6:
        raise WireError(f"a record's column {spec!r:.200} is not allowed")
    *_, place, nbytes, _ = spec
    if not type(place) is type(nbytes) is int or place < 0 or nbytes < 0:
        raise WireError(f"a record's column {spec!r:.200} is not allowed")
    if base + place + nbytes > end:
        raise WireError(f"a record's column {spec[0]!r:.200} reaches beyond the record")
    return spec


def _head(buffer: Any, offset: int, found: Prefix) -> tuple[dict[str, Any], list]:
    start = offset + PREFIX_BYTES
    if found.head_length > MAX_HEAD_BYTES:
        raise WireError(f"a record's head has {found.head_length} bytes, allowed {MAX_HEAD_BYTES}")
    try:
        header, specs = msgpack.unpackb(
            bytes(memoryview(buffer)[start : start + found.head_length]), strict_map_key=False
        )
    except Exception as error:  # msgpack raises many kinds on broken bytes
        raise WireError(f"a record's head cannot be read: {error}") from None
    if not isinstance(header, dict) or not isinstance(specs, list):
        raise WireError("a record's head is malformed")
    return header, specs


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def _padding(length: int) -> bytes:
    return bytes(_aligned(length) - length)
