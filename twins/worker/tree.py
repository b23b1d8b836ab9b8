"""Values that hold arrays, as bytes: what a call and its results consist of.

None, bool, numbers, text, bytes, lists and maps travel as msgpack; tuples and arrays as its extension types. An array
leaves [dtype, shape, offset, bytes] there and its own bytes in a body, which may lie in shared memory. Never pickle.
"""

from __future__ import annotations

from typing import Any, List, Tuple

import msgpack
import numpy as np

from twinrl.core.errors import WireError
from twinrl.core.wire import describe, restore

ARRAY, TUPLE = 1, 2  # msgpack's extension types
ALIGN = 64  # bytes: vector instructions like it
MAX_BODY = 480 << 20  # bytes of one message without shared memory


def aligned(nbytes: int) -> int:
    """The next multiple of ALIGN."""
    return -(-nbytes // ALIGN) * ALIGN


class Body:
    """Memory that results may be written into directly, so that nobody copies them."""

    def __init__(self, memory: np.ndarray) -> None:
        """`memory` (bytes,) uint8."""
        self.memory, self.used = memory, 0

    def empty(self, shape: Tuple[int, ...], dtype: Any) -> np.ndarray | None:
        """An array in this memory, or None when there is no room."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        start = aligned(self.used)
        if start + nbytes > self.memory.size:
            return None
        self.used = start + nbytes
        return self.memory[start : self.used].view(dtype).reshape(shape)

    def offset(self, array: np.ndarray) -> int:
        """Where a contiguous array lies in this memory, or -1."""
        if not array.size or not array.flags.c_contiguous:
            return -1
        start = array.ctypes.data - self.memory.ctypes.data
        return start if start >= 0 and start + array.nbytes <= self.memory.size else -1


class Packed:
    """A value as `data`, with its arrays' bytes to be written into a body of at least `nbytes`."""

    def __init__(self, value: Any, body: Body | None = None) -> None:
        """`body`: where arrays of `value` may lie already. WireError when something cannot be sent."""
        self._body = body
        self._arrays: List[Tuple[int, Any]] = []
        self.nbytes = body.used if body else 0
        try:
            self.data = self._pack(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise WireError(f"cannot be sent: {error}") from None

    def write(self, memory: np.ndarray) -> None:
        """Copy the arrays into `memory` (bytes,) uint8, unless they are there."""
        for offset, buffer in self._arrays:
            target = memory[offset : offset + len(buffer)]
            source = np.frombuffer(buffer, np.uint8)
            if target.ctypes.data != source.ctypes.data:
                target[:] = source

    def body(self) -> np.ndarray:
        """The arrays in memory of their own, to be sent with the message."""
        if self.nbytes > MAX_BODY:
            raise WireError(
                f"{self.nbytes} bytes in one message, at most {MAX_BODY} go over a socket: "
                "ask for fewer or smaller images, or work on the worker's own host, with shared memory"
            )
        memory = np.empty(self.nbytes, np.uint8)
        self.write(memory)
        return memory

    def _pack(self, value: Any) -> bytes:
        return msgpack.packb(value, default=self._special, strict_types=True)

    def _special(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return msgpack.ExtType(TUPLE, self._pack(list(value)))
        if isinstance(value, np.ndarray):
            return msgpack.ExtType(ARRAY, msgpack.packb(self._place(value)))
        if isinstance(value, np.generic):
            return value.item()
        for plain in (dict, list, str, float, int):  # subclasses
            if isinstance(value, plain):
                return plain(value)
        raise TypeError(f"{type(value).__name__} {value!r:.80} is no plain value")

    def _place(self, array: np.ndarray) -> List[Any]:
        (_, dtype, shape), buffer = describe("array", array)
        offset = self._body.offset(array) if self._body else -1
        if offset < 0:
            offset = aligned(self.nbytes)
            self.nbytes = offset + len(buffer)
        if len(buffer):
            self._arrays.append((offset, buffer))
        return [dtype, shape, offset, len(buffer)]


def unpack(data: Any, body: np.ndarray, copy: bool = False) -> Any:
    """The value of `Packed.data`. Arrays are read-only views of `body` (bytes,) uint8, or copies."""
    try:
        return _Reader(body, copy).read(data)
    except WireError:
        raise
    except Exception as error:  # msgpack raises many kinds on bytes that are none of ours
        raise WireError(f"no message of a worker: {error}") from None


class _Reader:
    """No closure: one that calls itself would keep `body` until the garbage collector comes by."""

    def __init__(self, body: np.ndarray, copy: bool) -> None:
        self._body, self._copy = body, copy

    def read(self, data: Any) -> Any:
        return msgpack.unpackb(data, ext_hook=self._special, strict_map_key=False)

    def _special(self, code: int, payload: bytes) -> Any:
        if code == TUPLE:
            return tuple(self.read(payload))
        if code != ARRAY:
            raise WireError(f"unknown extension type {code}")
        dtype, shape, offset, nbytes = msgpack.unpackb(payload)
        if not (
            type(offset) is type(nbytes) is int
            and 0 <= offset <= offset + nbytes <= len(self._body)
        ):
            raise WireError(f"an array at {offset!r} of {nbytes!r} bytes is not within the message")
        buffer = memoryview(self._body)[offset : offset + nbytes]
        _, array = restore(["array", dtype, shape], buffer)
        return array.copy() if self._copy else array
