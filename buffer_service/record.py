"""A record: one segment as bytes that describe themselves, on disk and on the way to other hosts.

    prefix    48 bytes: magic, id, length of the whole record, length and CRC-32 of the head, CRC-32 of the columns
    head      msgpack [header, [[column, dtype, shape, offset], ...]], offsets from the start of the columns
    columns   raw arrays, each aligned to 64 bytes so that mapped views are as good as allocated ones

A record's length is a multiple of 64, so records that follow each other in a file stay aligned.
"""

from __future__ import annotations

import math
import struct
import zlib
from typing import Any, NamedTuple

import msgpack
import numpy as np

from twinrl.core import wire
from twinrl.core.errors import WireError
from twinrl.core.segment import Segment

ALIGNMENT = 64
MAGIC = b"TWRLREC1"
_PREFIX = struct.Struct("<8sQQIII12x")
PREFIX_BYTES = _PREFIX.size


class Prefix(NamedTuple):
    """What a record says about itself before its head is parsed."""

    id: int
    length: int  # bytes of the whole record, padding included
    head_length: int
    head_crc: int
    columns_crc: int


def encode(id: int, header: dict[str, Any], columns: wire.Arrays) -> tuple[list[Any], int]:
    """Buffers to be written one after the other, and their total length; columns are not copied."""
    specs, buffers, offset, crc = [], [], 0, 0
    for name, column in columns.items():
        column = np.ascontiguousarray(column)
        if column.dtype.kind not in wire.ALLOWED_KINDS:
            raise WireError(f"column {name!r} has dtype {column.dtype}, which cannot be stored")
        specs.append([name, column.dtype.str, list(column.shape), offset])
        if column.size:
            raw = memoryview(column.reshape(-1).view(np.uint8))
            crc = zlib.crc32(raw, crc)
            buffers += [raw, _padding(column.nbytes)]
            offset += _aligned(column.nbytes)
    head = msgpack.packb([header, specs])
    start = _aligned(PREFIX_BYTES + len(head))
    prefix = _PREFIX.pack(MAGIC, id, start + offset, len(head), zlib.crc32(head), crc)
    lead = prefix + head + _padding(PREFIX_BYTES + len(head))
    return [lead, *(each for each in buffers if len(each))], start + offset


def prefix(buffer: Any, offset: int = 0) -> Prefix | None:
    """The prefix of the record at `offset`, or None where no whole record lies."""
    if offset + PREFIX_BYTES > len(buffer):
        return None
    magic, *fields = _PREFIX.unpack_from(buffer, offset)
    found = Prefix(*fields)
    if magic != MAGIC or offset + found.length > len(buffer):
        return None
    if found.length < PREFIX_BYTES + found.head_length:
        return None
    return found


def holds(buffer: Any, id: int) -> bool:
    """Whether `buffer` starts with the intact record `id`."""
    found = prefix(buffer)
    return found is not None and found.id == id and intact(buffer, 0, found, columns=True)


def intact(buffer: Any, offset: int, found: Prefix, columns: bool) -> bool:
    """Whether the head, and the `columns` too when asked for, are the bytes that were written."""
    view = memoryview(buffer)
    start = offset + PREFIX_BYTES
    if zlib.crc32(view[start : start + found.head_length]) != found.head_crc:
        return False
    if not columns:
        return True
    try:
        segment = decode(buffer, offset)
    except WireError:
        return False
    crc = 0
    for column in segment.columns.values():
        if column.size:
            crc = zlib.crc32(memoryview(column.reshape(-1).view(np.uint8)), crc)
    return crc == found.columns_crc


def decode(buffer: Any, offset: int = 0, verify: bool = False) -> Segment:
    """The segment of the record at `offset`; its columns are read-only views of `buffer`.

    With `verify` both checksums are compared: for bytes that came from another host.
    """
    found = prefix(buffer, offset)
    if found is None:
        raise WireError(f"no record at byte {offset}")
    if verify and not intact(buffer, offset, found, columns=True):
        raise WireError(f"record {found.id} is damaged: its checksum does not fit")
    start = offset + PREFIX_BYTES
    header, specs = _head(bytes(memoryview(buffer)[start : start + found.head_length]))
    base = offset + _aligned(PREFIX_BYTES + found.head_length)
    columns = {}
    for name, dtype_name, shape, place in specs:
        dtype, count = np.dtype(dtype_name), math.prod(shape)
        if dtype.kind not in wire.ALLOWED_KINDS or count < 0 or place < 0:
            raise WireError(f"record {found.id}: column {name!r} is not allowed")
        if base + place + count * dtype.itemsize > offset + found.length:
            raise WireError(f"record {found.id}: column {name!r} reaches beyond the record")
        column = np.frombuffer(buffer, dtype, count, base + place).reshape(shape)
        column.flags.writeable = False
        columns[name] = column
    return Segment(header, columns)


def _head(raw: bytes) -> tuple[dict[str, Any], list]:
    try:
        header, specs = msgpack.unpackb(raw, strict_map_key=False)
    except Exception as error:  # msgpack raises many kinds on broken bytes
        raise WireError(f"a record's head cannot be read: {error}") from None
    return header, specs


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def _padding(length: int) -> bytes:
    return bytes(_aligned(length) - length)
