"""What codecs have in common: rows along the first axis, and a table of where each row's bytes lie."""

from __future__ import annotations

import importlib
import math
from operator import index
from typing import Any, Sequence, Tuple, Union

import numpy as np

from twinrl.core.errors import ConfigError, WireError

Shape = Tuple[int, ...]
Indices = Union[Sequence[int], np.ndarray]


class Codec:
    """How the rows of an array, which lie along its first axis, become bytes and come back."""

    lossless = True
    package = (
        ""  # the module that it needs, and the distribution's name where pip knows it by another
    )
    distribution = ""

    def load(self) -> Any:
        """The library; ConfigError if it is not installed."""
        if not self.package:
            return None
        try:
            return importlib.import_module(self.package)
        except ImportError:
            name = self.distribution or self.package
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
        self,
        data: np.ndarray,
        dtype: np.dtype,
        shape: Shape,
        indices: Sequence[int],
        out: np.ndarray,
    ) -> None:
        """Write the rows `indices` (n), each within 0 .. shape[0], to `out` (n, *shape[1:]), C-contiguous.

        `data` is uint8 (m,) and may be hostile: whatever does not fit raises WireError.
        """
        raise NotImplementedError("decode_rows(data, dtype, shape, indices, out)")

    def decode(
        self, data: np.ndarray, dtype: np.dtype, shape: Shape, out: np.ndarray | None = None
    ) -> np.ndarray:
        """All rows, (*shape)."""
        return self._rows(data, dtype, shape, range(shape[0]), out)

    def rows(
        self,
        data: np.ndarray,
        dtype: np.dtype,
        shape: Shape,
        indices: Indices,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """The rows `indices` only, (len(indices), *shape[1:]), in `out` if given; negative ones count from the end."""
        # Plain integers: mostly there are one or two, and short NumPy calls cost more than they.
        given = indices.tolist() if isinstance(indices, np.ndarray) else map(index, indices)
        count = shape[0]
        wanted = [each + count if each < 0 else each for each in given]
        if wanted and not (min(wanted) >= 0 and max(wanted) < count):
            raise IndexError(f"rows {list(indices)} of a column with {count}")
        return self._rows(data, dtype, shape, wanted, out)

    def _rows(
        self,
        data: np.ndarray,
        dtype: np.dtype,
        shape: Shape,
        wanted: Sequence[int],
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
        self,
        data: np.ndarray,
        dtype: np.dtype,
        shape: Shape,
        indices: Sequence[int],
        out: np.ndarray,
    ) -> None:
        """Copy rows."""
        if data.size != math.prod(shape) * dtype.itemsize:
            raise WireError(f"{data.size} raw bytes for shape {shape} of {dtype}")
        np.take(data.view(dtype).reshape(shape), indices, axis=0, out=out, mode="clip")


def join(rows: Sequence[Any]) -> bytes:
    """The bytes of encoded rows: a little-endian uint32 for each, where it ends; then one after the other."""
    ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
    return b"".join([ends.astype("<u4").tobytes(), *rows])


class Rows:
    """Inverse of `join`: `rows[i]` is a view of a row's bytes. The table is checked where it is used."""

    def __init__(self, data: np.ndarray, count: int) -> None:
        table = 4 * count
        if data.size < table:
            raise WireError(f"{data.size} encoded bytes for {count} rows")
        self._ends = data[:table].view("<u4")
        self._body = memoryview(data)[table:]
        if self._ends[-1] != len(self._body):
            raise WireError(f"{len(self._body)} encoded bytes for rows of {self._ends[-1]}")

    def __getitem__(self, row: int) -> memoryview:
        begin, end = int(self._ends[row - 1]) if row else 0, int(self._ends[row])
        if not begin <= end <= len(self._body):
            raise WireError(f"row {row} lies at {begin} .. {end} of {len(self._body)} bytes")
        return self._body[begin:end]
