"""What codecs have in common: rows along the first axis, and a table of where each row's bytes lie."""

from __future__ import annotations

import importlib
import math
from typing import Any, List, Sequence, Tuple, Union

import numpy as np

from twinrl.core.errors import ConfigError, WireError

Shape = Tuple[int, ...]
Indices = Union[Sequence[int], np.ndarray]


class Codec:
    """How the rows of an array, which lie along its first axis, become bytes and come back."""

    lossless = True
    library = (
        ""  # the module that it needs, and the distribution's name where pip knows it by another
    )
    distribution = ""

    def load(self) -> Any:
        """The library; ConfigError if it is not installed."""
        if not self.library:
            return None
        try:
            return importlib.import_module(self.library)
        except ImportError:
            name = self.distribution or self.library
            raise ConfigError(
                f"this codec needs {name}: pip install {name}, or choose codec raw"
            ) from None

    def refuses(self, dtype: np.dtype, shape: Shape) -> str:
        """Why arrays of this kind cannot be encoded, "" if they can."""
        return ""

    def encode(self, array: np.ndarray) -> Any:
        """The bytes (bytes-like or uint8 (n,)) of a C-contiguous `array` that has values and is not refused."""
        raise NotImplementedError("encode(array) -> bytes")

    def decode_rows(
        self, data: np.ndarray, dtype: np.dtype, shape: Shape, indices: np.ndarray, out: np.ndarray
    ) -> None:
        """Write the rows `indices` (n,) intp, each within 0 .. shape[0], to `out` (n, *shape[1:]), C-contiguous.

        `data` is uint8 (m,) and may be hostile: whatever does not fit raises WireError.
        """
        raise NotImplementedError("decode_rows(data, dtype, shape, indices, out)")

    def decode(
        self, data: np.ndarray, dtype: np.dtype, shape: Shape, out: np.ndarray | None = None
    ) -> np.ndarray:
        """All rows, (*shape)."""
        return self._rows(data, dtype, shape, np.arange(shape[0]), out)

    def rows(
        self,
        data: np.ndarray,
        dtype: np.dtype,
        shape: Shape,
        indices: Indices,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """The rows `indices` only, (len(indices), *shape[1:]), in `out` if given; negative ones count from the end."""
        wanted = np.array(indices, np.intp).reshape(-1)
        wanted[wanted < 0] += shape[0]
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < shape[0]):
            raise IndexError(f"rows {list(indices)} of a column with {shape[0]}")
        return self._rows(data, dtype, shape, wanted, out)

    def _rows(
        self,
        data: np.ndarray,
        dtype: np.dtype,
        shape: Shape,
        wanted: np.ndarray,
        out: np.ndarray | None,
    ) -> np.ndarray:
        found = (len(wanted), *shape[1:])
        if out is None:
            out = np.empty(found, dtype)
        elif out.shape != found or out.dtype != dtype:
            raise ValueError(f"rows are {dtype.str}{found}, `out` is {out.dtype.str}{out.shape}")
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
        return array.reshape(-1).view(np.uint8)

    def decode_rows(
        self, data: np.ndarray, dtype: np.dtype, shape: Shape, indices: np.ndarray, out: np.ndarray
    ) -> None:
        """Copy rows."""
        if data.size != math.prod(shape) * dtype.itemsize:
            raise WireError(f"{data.size} raw bytes for shape {shape} of {dtype}")
        np.take(data.view(dtype).reshape(shape), indices, axis=0, out=out, mode="clip")


def join(rows: Sequence[Any]) -> bytes:
    """The bytes of encoded rows: the length of each as little-endian uint32, then one after the other."""
    sizes = np.array([len(row) for row in rows], "<u4")
    return b"".join([sizes.tobytes(), *rows])


def places(data: np.ndarray, count: int) -> Tuple[memoryview, List[int]]:
    """Inverse of `join`: the bytes behind the table, and the `count` + 1 places where rows begin and end."""
    table = 4 * count
    if data.size < table:
        raise WireError(f"{data.size} encoded bytes for {count} rows")
    ends = np.zeros(count + 1, np.int64)
    np.cumsum(data[:table].view("<u4"), dtype=np.int64, out=ends[1:])
    if ends[-1] != data.size - table:
        raise WireError(f"{data.size - table} encoded bytes for rows of {ends[-1]}")
    return memoryview(data)[table:], ends.tolist()
