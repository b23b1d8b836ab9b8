"""Messages: a msgpack header and raw array buffers. Never pickle; decoding makes views, not copies."""

from __future__ import annotations

import math
from typing import Any, Dict, Sequence

import msgpack
import numpy as np

from twinrl.core.errors import WireError

PROTOCOL = 1
ALLOWED_KINDS = "biufS"  # bool, integers, floats, fixed bytes: nothing that could carry an object
MAX_ARRAYS = 256
Arrays = Dict[str, np.ndarray]


def pack(header: dict[str, Any], arrays: Arrays | None = None) -> list[Any]:
    """Encode `header` (plain msgpack types) and named arrays as message frames, arrays without a copy."""
    specs, buffers = [], []
    for name, array in (arrays or {}).items():
        array = np.asarray(array, order="C")
        if array.dtype.kind not in ALLOWED_KINDS:
            raise WireError(
                f"array {name!r} has dtype {array.dtype}; allowed kinds are {ALLOWED_KINDS}"
            )
        specs.append([name, array.dtype.str, list(array.shape)])
        # A flat byte view: ZeroMQ wants contiguous buffers, and zero-size arrays have none.
        buffers.append(memoryview(array.reshape(-1).view(np.uint8)) if array.size else b"")
    try:
        head = msgpack.packb([PROTOCOL, header, specs], default=_plain)
    except TypeError as error:
        raise WireError(f"header cannot be encoded: {error}") from None
    return [head, *buffers]


def unpack(frames: Sequence[Any]) -> tuple[dict[str, Any], Arrays]:
    """Decode frames made by `pack`. Arrays are read-only views of the frames' memory.

    Raises WireError when anything does not fit: version, dtype, shape or length.
    """
    if not frames:
        raise WireError("empty message")
    try:
        version, header, specs = msgpack.unpackb(_bytes(frames[0]), strict_map_key=False)
    except Exception as error:  # msgpack raises many kinds on hostile bytes
        raise WireError(f"header is not a TwinRL message: {error}") from None
    if version != PROTOCOL:
        raise WireError(f"message of protocol {version!r}, this side speaks {PROTOCOL}")
    if not isinstance(header, dict) or not isinstance(specs, list) or len(specs) > MAX_ARRAYS:
        raise WireError("malformed header")
    if len(specs) != len(frames) - 1:
        raise WireError(f"{len(specs)} arrays announced, {len(frames) - 1} received")
    arrays: Arrays = {}
    for spec, frame in zip(specs, frames[1:]):
        arrays.update([_view(spec, frame)])
    return header, arrays


def _view(spec: Any, frame: Any) -> tuple[str, np.ndarray]:
    try:
        name, dtype_name, shape = spec
        dtype = np.dtype(dtype_name)
        shape = tuple(int(n) for n in shape)
    except (TypeError, ValueError) as error:
        raise WireError(f"malformed array description {spec!r}: {error}") from None
    if not isinstance(name, str) or dtype.kind not in ALLOWED_KINDS or min(shape, default=0) < 0:
        raise WireError(f"array description {spec!r} is not allowed")
    buffer = getattr(frame, "buffer", frame)
    expected = math.prod(shape) * dtype.itemsize
    if len(buffer) != expected:
        raise WireError(f"array {name!r}: {len(buffer)} bytes for shape {shape} of {dtype}")
    array = np.frombuffer(buffer, dtype=dtype).reshape(shape)
    array.flags.writeable = False
    return name, array


def _bytes(frame: Any) -> bytes:
    return bytes(getattr(frame, "buffer", frame))


def _plain(value: Any) -> Any:
    """NumPy scalars and small arrays inside headers become plain numbers and lists."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} {value!r} is not a plain value")
