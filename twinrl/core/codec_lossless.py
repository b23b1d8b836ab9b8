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
from typing import Any, Callable, Sequence

import numpy as np

from twinrl.core.codec_rows import Codec, Rows, Shape, join
from twinrl.core.errors import WireError

GROUP = 4  # rows; part of the format. 8 gain 5 % where images are clean, and make single rows a third dearer
LEVEL = 1  # of zstd: higher ones are slower and no smaller where images are noisy


_BLOCK = 256 << 10  # bytes that filters are undone on at once: they stay in the cache


class Lz4(Codec):
    """LZ4 blocks."""

    package = "lz4.block"
    distribution = "lz4"

    def __init__(self) -> None:
        self._block: Any = None

    def compress(self, row: Any) -> bytes:
        """One row's bytes."""
        return self.load().compress(row, store_size=False)

    def expand(self, data: memoryview, size: int) -> np.ndarray:
        """uint8 (size,), read-only."""
        block = self._block = self._block or self.load()
        try:
            found = block.decompress(data, uncompressed_size=size)
        except (block.LZ4BlockError, ValueError, OverflowError) as error:
            raise WireError(f"a row is no LZ4 block: {error}") from None
        return _sized(found, size)


class Zstd(Codec):
    """Zstandard frames that hold their size."""

    package = "zstandard"

    def __init__(self) -> None:
        self._local = threading.local()  # its contexts serve one thread at a time

    def compress(self, row: Any) -> bytes:
        """One row's bytes."""
        if not hasattr(self._local, "compressor"):
            zstd = self.load()
            # As for rows of 128 KB, however small ours are: noise has none of the short repeats
            # that it would look for else.
            settings = zstd.ZstdCompressionParameters.from_level(LEVEL, source_size=128 << 10)
            self._local.compressor = zstd.ZstdCompressor(compression_params=settings)
        return self._local.compressor.compress(row)

    def expand(self, data: memoryview, size: int) -> np.ndarray:
        """uint8 (size,), read-only."""
        local = self._local
        if not hasattr(local, "decompressor"):
            local.loaded = self.load()
            local.decompressor = local.loaded.ZstdDecompressor()
        try:
            # It believes the frame's own size when it asks for memory: that must be ours first.
            stated = local.loaded.frame_content_size(data)
            if stated != size:
                raise WireError(f"a row states {stated} bytes, should be {size}")
            found = local.decompressor.decompress(data, allow_extra_data=False)
        except local.loaded.ZstdError as error:
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
        self.package, self.distribution = compressor.package, compressor.distribution

    def encode(self, array: np.ndarray) -> bytes:
        """The table of rows and the rows."""
        plain = filtered = _lines(array)
        if self._filter != "none":
            filtered = np.empty_like(plain)
            if self._filter == "delta":
                np.subtract(plain[1:], plain[:-1], out=filtered[1:])
            step = GROUP if self._filter == "delta" else 1
            filtered[::step, 0] = plain[::step, 0]
            np.subtract(plain[::step, 1:], plain[::step, :-1], out=filtered[::step, 1:])
        compress = self._compressor.compress
        return join([compress(memoryview(row).cast("B")) for row in filtered])

    def decode_rows(
        self,
        data: np.ndarray,
        dtype: np.dtype,
        shape: Shape,
        indices: Sequence[int],
        out: np.ndarray,
    ) -> None:
        """See Codec."""
        rows, target = Rows(data, shape[0]), _lines(out)
        expand, lines, size = self._compressor.expand, target.shape[1:], target[0].size

        def difference(row: int) -> np.ndarray:
            return expand(rows[row], size).reshape(lines)

        if self._filter == "delta":
            _follow(difference, indices, target)
        elif self._filter == "none" or len(indices) == 1:
            for image, row in zip(target, indices):
                if self._filter == "none":
                    image[...] = difference(row)
                else:
                    _integrate(difference(row), image)
        else:
            step = max(1, _BLOCK // size)
            block = np.empty((min(step, len(indices)), *lines), np.uint8)
            for start in range(0, len(indices), step):
                some = indices[start : start + step]
                for image, row in zip(block, some):
                    image[...] = difference(row)
                _integrate(block[: len(some)], target[start : start + step])


def _follow(
    difference: Callable[[int], np.ndarray], indices: Sequence[int], target: np.ndarray
) -> None:
    """Undo "delta": sum each group's differences, no further than to the last row that is wanted of it."""
    at, now = -1, target[0]  # the row that `now` holds
    for place in sorted(range(len(indices)), key=indices.__getitem__):
        row, image = indices[place], target[place]
        key = row - row % GROUP
        if at < key:
            at, now = key, _integrate(difference(key), image)
        elif at == row:
            image[...] = now
        # Only rows that are wanted are kept: the others pass through the array of the next one that is.
        while at < row:
            at, now = at + 1, np.add(now, difference(at + 1), out=image)
        now = image


def _lines(array: np.ndarray) -> np.ndarray:
    """A view of the bytes of an array as (rows, lines, bytes of a line); one line where rows are not images."""
    height = array.shape[1] if array.ndim > 2 else 1
    width = math.prod(array.shape[2:] if array.ndim > 2 else array.shape[1:]) * array.dtype.itemsize
    return array.reshape(-1).view(np.uint8).reshape(array.shape[0], height, width)


def _integrate(difference: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Undo "up" in `out` (..., lines, bytes): sums down the lines of `difference`.

    In log2(lines) passes, each a sum over twice as many lines: NumPy's calls cost more than the bytes.
    """
    height = out.shape[-2]
    passes = (height - 1).bit_length()
    if not passes:
        out[...] = difference
        return out
    spare = np.empty_like(out) if passes > 1 else out
    source, step = difference, 1
    for number in range(passes):
        target = out if (passes - number) % 2 else spare  # so that the last pass ends in `out`
        target[..., :step, :] = source[..., :step, :]
        np.add(source[..., step:, :], source[..., :-step, :], out=target[..., step:, :])
        source, step = target, 2 * step
    return out
