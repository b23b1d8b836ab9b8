"""Encoded columns: the images of a segment as a codec's bytes, decoded where somebody looks at them.

An `Encoded` stands in a segment's columns in place of an array. Writers make them, the service stores their
bytes as they are, and readers decode the rows that they draw. docs/codecs.md has what each codec costs and gives.
"""

from __future__ import annotations

import difflib
import math
from typing import Any, Dict, Sequence

import numpy as np

from twinrl.core.codec_jpeg import Jpeg
from twinrl.core.codec_lossless import Lossless, Lz4, Zstd
from twinrl.core.codec_rows import Codec, Indices, Raw, Shape
from twinrl.core.errors import ConfigError, WireError

MAX_DIMENSIONS = 8
MAX_DECODED_BYTES = 512 << 20  # of one column: what is larger is refused before memory is asked for

CODECS: Dict[str, Codec] = {
    "raw": Raw(),
    "lz4": Lossless(Lz4()),
    "lz4-delta": Lossless(Lz4(), "delta"),
    "zstd": Lossless(Zstd()),
    "zstd-up": Lossless(Zstd(), "up"),
    "zstd-delta": Lossless(Zstd(), "delta"),
    "jpeg95": Jpeg(95),
    "jpeg80": Jpeg(80),
}

# Which where: chosen from benchmarks/results/codecs.json, table and reasons in docs/codecs.md. None is lossy.
SAME_HOST = "raw"  # memory is ten times as fast as the fastest codec
ETHERNET = "zstd-up"  # 1 GbE: doubles the link for noisy frames, and one row costs one row
WIFI = "zstd-up"  # the same; where pictures may change, jpeg95 carries nearly three times as much
STORAGE = "zstd-up"  # half the bytes for noisy frames, a sixteenth for clean ones


class Encoded:
    """A column as a codec's bytes. Looks like an array as far as checks go: dtype, shape, ndim, len()."""

    __slots__ = ("codec", "data", "dtype", "shape")

    def __init__(self, codec: str, dtype: Any, shape: Sequence[int], data: Any) -> None:
        """`data` is bytes-like; WireError unless codec, dtype and shape go together."""
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
        refusal = CODECS[codec].refuses(self.dtype, self.shape)
        if refusal:
            raise WireError(refusal)
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
    """`name` if this computer can use it; ConfigError says what is missing, or what was meant."""
    if name not in CODECS:
        close = difflib.get_close_matches(str(name), CODECS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"codec {name!r} is none of {', '.join(CODECS)}{hint}")
    CODECS[name].load()
    return name


def encode(array: np.ndarray, codec: str) -> Encoded:
    """`array` (n, ...) in `codec`; ConfigError if there is no such codec, WireError if it cannot hold `array`."""
    array = np.ascontiguousarray(array)
    check_codec(codec)
    refusal = CODECS[codec].refuses(array.dtype, array.shape)
    if refusal:
        raise WireError(refusal)
    data = CODECS[codec].encode(array) if array.size else b""
    return Encoded(codec, array.dtype, array.shape, data)
