"""Lossless codecs: a compressor behind a filter that turns smooth images, or still ones, into small differences.

Filters work on bytes with wrap-around, so every dtype comes back bit for bit:

    none    the row as it is
    up      each line of a row minus the line above it; every row stands alone
    delta   each row minus the row before it, in groups of GROUP rows whose first is filtered "up" instead

Each row is compressed by itself, so one row of "up" costs one row, and one of "delta" at most GROUP.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np

from twinrl.core.codec_rows import Codec, Shape, join, places
from twinrl.core.errors import WireError

GROUP = 8  # rows; part of the format. Longer groups gain little and make single rows dearer
LEVEL = 1  # of zstd: higher ones are slower and no smaller where images are noisy


class Lz4(Codec):
    """LZ4 blocks."""

    library = "lz4.block"
    distribution = "lz4"

    def compress(self, row: Any) -> bytes:
        """One row's bytes."""
        return self.load().compress(row, store_size=False)

    def expand(self, data: memoryview, size: int) -> np.ndarray:
        """uint8 (size,), read-only."""
        block = self.load()
        try:
            found = block.decompress(data, uncompressed_size=size)
        except (block.LZ4BlockError, ValueError, OverflowError) as error:
            raise WireError(f"a row is no LZ4 block: {error}") from None
        return _sized(found, size)


class Zstd(Codec):
    """Zstandard frames that hold their size."""

    library = "zstandard"

    def __init__(self) -> None:
        self._local = threading.local()  # its contexts serve one thread at a time

    def compress(self, row: Any) -> bytes:
        """One row's bytes."""
        if not hasattr(self._local, "compressor"):
            self._local.compressor = self.load().ZstdCompressor(level=LEVEL)
        return self._local.compressor.compress(row)

    def expand(self, data: memoryview, size: int) -> np.ndarray:
        """uint8 (size,), read-only."""
        zstd = self.load()
        if not hasattr(self._local, "decompressor"):
            self._local.decompressor = zstd.ZstdDecompressor()
        try:
            # It believes the frame's own size when it asks for memory: that must be ours first.
            stated = zstd.frame_content_size(data)
            if stated != size:
                raise WireError(f"a row states {stated} bytes, should be {size}")
            found = self._local.decompressor.decompress(data, allow_extra_data=False)
        except zstd.ZstdError as error:
            raise WireError(f"a row is no Zstandard frame: {error}") from None
        return _sized(found, size)


def _sized(found: bytes, size: int) -> np.ndarray:
    if len(found) != size:
        raise WireError(f"a row has {len(found)} bytes, should be {size}")
    return np.frombuffer(found, np.uint8)


class Lossless(Codec):
    """Rows through a filter into a compressor."""

    def __init__(self, compressor: Any, filter: str = "none") -> None:
        self._compressor, self._filter = compressor, filter
        self.library, self.distribution = compressor.library, compressor.distribution

    def encode(self, array: np.ndarray) -> bytes:
        """The table of rows and the rows."""
        plain = _lines(array)
        filtered = plain
        if self._filter != "none":
            filtered = plain.copy()
            if self._filter == "delta":
                np.subtract(plain[1:], plain[:-1], out=filtered[1:])
                filtered[::GROUP] = plain[::GROUP]
            step = GROUP if self._filter == "delta" else 1
            np.subtract(plain[::step, 1:], plain[::step, :-1], out=filtered[::step, 1:])
        compress = self._compressor.compress
        return join([compress(memoryview(row).cast("B")) for row in filtered])

    def decode_rows(
        self, data: np.ndarray, dtype: np.dtype, shape: Shape, indices: np.ndarray, out: np.ndarray
    ) -> None:
        """See Codec."""
        body, ends = places(data, shape[0])
        target = _lines(out)
        expand, size, lines = self._compressor.expand, target[0].size, target.shape[1:]

        def difference(row: int) -> np.ndarray:
            return expand(body[ends[row] : ends[row + 1]], size).reshape(lines)

        if self._filter == "delta":
            self._chains(difference, indices.tolist(), target)
            return
        for place, row in enumerate(indices.tolist()):
            if self._filter == "up":
                _integrate(difference(row), target[place])
            else:
                target[place] = difference(row)

    def _chains(self, difference: Any, indices: Any, target: np.ndarray) -> None:
        """Follow each group's differences no further than to the last row that is wanted of it."""
        at, now = -1, None  # the row that `now` holds
        for place in sorted(range(len(indices)), key=indices.__getitem__):
            row, image = indices[place], target[place]
            key = row - row % GROUP
            if now is None or at < key:
                at, now = key, _integrate(difference(key), image)
            elif at == row:
                image[...] = now
            # Only rows that are wanted are kept: the others pass through the array of the next one that is.
            while at < row:
                at += 1
                now = np.add(now, difference(at), out=image)
            now = image


def _lines(array: np.ndarray) -> np.ndarray:
    """A view of the bytes of an array as (rows, lines, bytes of a line); one line where rows are not images."""
    height = array.shape[1] if array.ndim > 2 else 1
    width = math.prod(array.shape[2:] if array.ndim > 2 else array.shape[1:]) * array.dtype.itemsize
    return array.reshape(-1).view(np.uint8).reshape(array.shape[0], height, width)


def _integrate(difference: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Undo "up": sums down the lines, in log2(lines) passes because short NumPy calls cost more than bytes."""
    source, height, step = difference, len(difference), 1
    if height == 1:
        out[...] = difference
        return out
    passes = (height - 1).bit_length()
    spare = np.empty_like(out) if passes > 1 else out
    for number in range(passes):
        target = out if (passes - number) % 2 else spare  # so that the last pass ends in `out`
        target[:step] = source[:step]
        np.add(source[step:], source[:-step], out=target[step:])
        source, step = target, 2 * step
    return out
