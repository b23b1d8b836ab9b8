"""Encoded columns: the images of a segment as a codec's bytes, decoded where somebody looks at them.

An `Encoded` stands in a segment's columns in place of an array. Writers make them, the service stores their
bytes as they are, and readers decode the rows that they draw. To add a codec: one class (`Codec`) in one file,
one line in `CODECS`.
"""

from __future__ import annotations

import difflib
import math
from typing import Any, Dict, Sequence, Tuple, Union

import numpy as np

from twinrl.core.errors import ConfigError, WireError

MAX_DIMENSIONS = 8
MAX_DECODED_BYTES = 512 << 20  # of one column: what is larger is refused before memory is asked for

Shape = Tuple[int, ...]
Indices = Union[Sequence[int], np.ndarray]


class Codec:
    """How the rows of an array, which lie along its first axis, become bytes and come back."""

    lossless = True

    def encode(self, array: np.ndarray) -> Any:
        """The bytes (bytes-like, or uint8 (n,)) of a C-contiguous `array`; ValueError if it cannot be encoded."""
        raise NotImplementedError("encode(array) -> bytes")

    def decode_rows(
        self, data: np.ndarray, dtype: np.dtype, shape: Shape, indices: np.ndarray, out: np.ndarray
    ) -> None:
        """Write the rows `indices` (n,) intp, each within 0 .. shape[0], to `out` (n, *shape[1:]), C-contiguous.

        `data` is uint8 (n,) and may be hostile: whatever does not fit raises WireError.
        """
        raise NotImplementedError("decode_rows(data, dtype, shape, indices, out)")

    def decode(
        self, data: np.ndarray, dtype: np.dtype, shape: Shape, out: np.ndarray | None = None
    ) -> np.ndarray:
        """All rows, (*shape)."""
        return self.rows(data, dtype, shape, np.arange(shape[0]), out)

    def rows(
        self,
        data: np.ndarray,
        dtype: np.dtype,
        shape: Shape,
        indices: Indices,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """The rows `indices` only, (len(indices), *shape[1:]), in `out` if given; negative ones count from the end."""
        wanted = np.asarray(indices, np.intp).reshape(-1)
        wanted = np.where(wanted < 0, wanted + shape[0], wanted)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < shape[0]):
            raise IndexError(f"rows {list(indices)} of a column with {shape[0]}")
        found = (len(wanted), *shape[1:])
        if out is None:
            out = np.empty(found, dtype)
        elif out.shape != found or out.dtype != dtype:
            raise ValueError(
                f"rows are {dtype.str}{found}, the given array {out.dtype.str}{out.shape}"
            )
        if out.size == 0:
            return out
        if out.flags.c_contiguous:
            self.decode_rows(data, dtype, shape, wanted, out)
        else:
            target = np.empty(found, dtype)
            self.decode_rows(data, dtype, shape, wanted, target)
            out[...] = target
        return out


class Raw(Codec):
    """The bytes as they are."""

    def encode(self, array: np.ndarray) -> Any:
        """A flat view of `array`."""
        return array.reshape(-1).view(np.uint8) if array.size else b""

    def decode_rows(
        self, data: np.ndarray, dtype: np.dtype, shape: Shape, indices: np.ndarray, out: np.ndarray
    ) -> None:
        """Copy rows."""
        if data.size != math.prod(shape) * dtype.itemsize:
            raise WireError(f"{data.size} raw bytes for shape {shape} of {dtype}")
        np.take(data.view(dtype).reshape(shape), indices, axis=0, out=out, mode="clip")


CODECS: Dict[str, Codec] = {
    "raw": Raw(),
}


class Encoded:
    """A column as a codec's bytes. Looks like an array as far as checks go: dtype, shape, ndim, len()."""

    __slots__ = ("codec", "data", "dtype", "shape")

    def __init__(self, codec: str, dtype: Any, shape: Sequence[int], data: Any) -> None:
        """`data` is bytes-like; WireError unless codec, dtype and shape are possible."""
        if not isinstance(codec, str) or codec not in CODECS:
            raise WireError(f"codec {codec!r:.40} is none of {', '.join(CODECS)}")
        self.codec = codec
        self.dtype = np.dtype(dtype)
        self.shape: Shape = tuple(shape)
        if not 1 <= len(self.shape) <= MAX_DIMENSIONS or min(self.shape) < 0:
            raise WireError(f"an encoded column of shape {self.shape}")
        if math.prod(self.shape) * self.dtype.itemsize > MAX_DECODED_BYTES:
            raise WireError(
                f"a column of {self.dtype}{self.shape} has more than {MAX_DECODED_BYTES} bytes decoded"
            )
        self.data = np.frombuffer(data, np.uint8) if len(data) else np.zeros(0, np.uint8)

    @property
    def nbytes(self) -> int:
        """Bytes as encoded."""
        return self.data.size

    @property
    def ndim(self) -> int:
        """Axes of the decoded array."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"Encoded({self.codec!r}, {self.dtype.str}{self.shape} in {self.nbytes} bytes)"

    def decode(self, out: np.ndarray | None = None) -> np.ndarray:
        """The whole array, in `out` if given; WireError if the bytes are damaged."""
        return CODECS[self.codec].decode(self.data, self.dtype, self.shape, out)

    def rows(self, indices: Indices, out: np.ndarray | None = None) -> np.ndarray:
        """The rows `indices` (n, *shape[1:]), in `out` if given, decoding as little else as the codec can."""
        return CODECS[self.codec].rows(self.data, self.dtype, self.shape, indices, out)


def check_codec(name: str) -> str:
    """`name` if it is a codec's; ConfigError with a suggestion if not."""
    if name not in CODECS:
        close = difflib.get_close_matches(str(name), CODECS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"codec {name!r} is none of {', '.join(CODECS)}{hint}")
    return name


def encode(array: np.ndarray, codec: str) -> Encoded:
    """`array` in `codec`; ConfigError if there is no such codec, ValueError if it cannot hold `array`."""
    array = np.ascontiguousarray(array)
    return Encoded(codec, array.dtype, array.shape, CODECS[check_codec(codec)].encode(array))
