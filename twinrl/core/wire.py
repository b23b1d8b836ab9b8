"""Messages: a msgpack header and raw array buffers. Never pickle; decoding makes views, not copies.

A message is [PROTOCOL, header, specs] in msgpack, then a buffer for each spec: [name, dtype, shape] of an array,
or [name, dtype, shape, codec] of an encoded column, whose buffer is the codec's bytes.
"""

from __future__ import annotations

import functools
import re
from typing import Any, Dict, List, Sequence, Tuple, Union

import msgpack
import numpy as np

from twinrl.core.codec import MAX_DECODED_BYTES, MAX_DIMENSIONS, Encoded
from twinrl.core.errors import WireError

PROTOCOL = 2
# bool, integers, floats, fixed bytes: nothing that could carry an object
ALLOWED_KINDS = "biufS"
_DTYPE = re.compile(r"\|(b1|[iu]1|S[1-9][0-9]{0,3})|[<>]([iu][248]|f[248])")
_dtype = functools.lru_cache(maxsize=256)(np.dtype)
MAX_ARRAYS = 256
MAX_NAME = 200  # characters of an array's name
MAX_ROWS = 1 << 31  # along any axis
MAX_HEADER_BYTES = 64 << 20
MAX_ENCODED_BYTES = 512 << 20  # of one encoded column: what one message may hold
Column = Union[np.ndarray, Encoded]
Arrays = Dict[str, Column]


def describe(name: str, column: Column) -> Tuple[List[Any], Any]:
    """The spec of a column, and its bytes as a flat buffer without a copy (of a contiguous array)."""
    if isinstance(column, Encoded):
        spec = [name, column.dtype.str, list(column.shape), column.codec]
        return spec, memoryview(column.data) if column.nbytes else b""
    array = np.asarray(column, order="C")
    if not _DTYPE.fullmatch(array.dtype.str):
        raise WireError(
            f"array {name!r} has dtype {array.dtype}; allowed kinds are {ALLOWED_KINDS}"
        )
    # A flat byte view: ZeroMQ wants contiguous buffers, and zero-size arrays have none.
    buffer = memoryview(array.reshape(-1).view(np.uint8)) if array.size else b""
    return [name, array.dtype.str, list(array.shape)], buffer


def restore(spec: Any, buffer: Any) -> Tuple[str, Column]:
    """The name and column of a spec and its buffer, a read-only view; WireError when they do not fit."""
    if not isinstance(spec, (list, tuple)) or len(spec) not in (3, 4):
        raise WireError(f"malformed array description {spec!r:.200}")
    name, dtype_name, shape = spec[:3]
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        raise WireError(f"{name!r:.200} is no array's name of at most {MAX_NAME} characters")
    if not isinstance(dtype_name, str) or not _DTYPE.fullmatch(dtype_name):
        raise WireError(f"array {name!r} has dtype {dtype_name!r:.40}, which is not allowed")
    if not isinstance(shape, (list, tuple)) or len(shape) > MAX_DIMENSIONS:
        raise WireError(f"array {name!r} has shape {shape!r:.200}")
    dtype = _dtype(dtype_name)
    expected = extent = dtype.itemsize
    for n in shape:
        if type(n) is not int or not 0 <= n < MAX_ROWS:
            raise WireError(f"array {name!r} has shape {shape!r:.200}")
        expected *= n
        extent *= n or 1  # axes beside an empty one count too: NumPy refuses (0, 2**40, 2**40)
    if extent > max(len(buffer), MAX_DECODED_BYTES):
        raise WireError(f"array {name!r} of shape {shape!r:.200} is too large")
    if len(spec) == 4:
        if len(buffer) > MAX_ENCODED_BYTES:
            raise WireError(f"array {name!r} has {len(buffer)} bytes, allowed {MAX_ENCODED_BYTES}")
        try:
            encoded = Encoded(spec[3], dtype, shape, buffer)
        except WireError as error:
            raise WireError(f"array {name!r}: {error}") from None
        encoded.data.flags.writeable = False
        return name, encoded
    if len(buffer) != expected:
        raise WireError(f"array {name!r}: {len(buffer)} bytes for shape {tuple(shape)} of {dtype}")
    array = np.frombuffer(buffer, dtype=dtype).reshape(shape)
    array.flags.writeable = False
    return name, array


def pack(header: dict[str, Any], arrays: Arrays | None = None) -> list[Any]:
    """Encode `header` (plain msgpack types) and named arrays as message frames, arrays without a copy."""
    specs, buffers = [], []
    for name, array in (arrays or {}).items():
        spec, buffer = describe(name, array)
        specs.append(spec)
        buffers.append(buffer)
    try:
        head = msgpack.packb([PROTOCOL, header, specs], default=_plain)
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"header cannot be encoded: {error}") from None
    return [head, *buffers]


def unpack(frames: Sequence[Any]) -> tuple[dict[str, Any], Arrays]:
    """Decode frames made by `pack`. Arrays are read-only views of the frames' memory.

    Raises WireError when anything does not fit: version, dtype, shape or length.
    """
    if not frames:
        raise WireError("empty message")
    head = getattr(frames[0], "buffer", frames[0])
    if len(head) > MAX_HEADER_BYTES:
        raise WireError(f"a header of {len(head)} bytes, allowed {MAX_HEADER_BYTES}")
    try:
        version, header, specs = msgpack.unpackb(bytes(head), strict_map_key=False)
    except Exception as error:  # msgpack raises many kinds on hostile bytes
        raise WireError(f"header is not a TwinRL message: {error}") from None
    if version != PROTOCOL:
        raise WireError(f"message of protocol {version!r:.40}, this side speaks {PROTOCOL}")
    if not isinstance(header, dict) or not isinstance(specs, list):
        raise WireError("malformed header")
    if len(specs) > MAX_ARRAYS:
        raise WireError(f"{len(specs)} arrays, allowed {MAX_ARRAYS}")
    if len(specs) != len(frames) - 1:
        raise WireError(f"{len(specs)} arrays announced, {len(frames) - 1} received")
    arrays: Arrays = {}
    for spec, frame in zip(specs, frames[1:]):
        name, array = restore(spec, getattr(frame, "buffer", frame))
        if name in arrays:
            raise WireError(f"two arrays are called {name!r}")
        arrays[name] = array
    return header, arrays


def _plain(value: Any) -> Any:
    """NumPy scalars and small arrays inside headers become plain numbers and lists."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} {value!r} is not a plain value")
