"""JPEG by libjpeg-turbo, one picture a row. Lossy, so it is used where it is chosen by name only."""

from __future__ import annotations

from typing import Sequence, Tuple

import numpy as np

from twinrl.core.codec_rows import Codec, Rows, Shape, join
from twinrl.core.errors import WireError

_START_OF_SCAN = b"\xff\xda"
_LARGEST = 65_500  # pixels a side, what the format holds


class Jpeg(Codec):
    """Rows (H, W, 3) uint8, colours at full resolution."""

    lossless = False
    package = "simplejpeg"

    def __init__(self, quality: int) -> None:
        self.quality = quality

    def refuses(self, dtype: np.dtype, shape: Shape) -> str:
        """Everything but colour images."""
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
            return f"JPEG holds |u1(n, height, width, 3), not {dtype.str}{shape}"
        if max(shape[1:3]) > _LARGEST:
            return f"JPEG holds at most {_LARGEST} pixels a side, not {shape[1:3]}"
        return ""

    def encode_row(self, image: np.ndarray) -> bytes:
        """One picture (H, W, 3)."""
        return self.load().encode_jpeg(
            image, quality=self.quality, colorspace="RGB", colorsubsampling="444"
        )

    def size(self, picture: bytes) -> Tuple[int, int]:
        """Height and width of an encoded picture."""
        try:
            height, width = self.load().decode_jpeg_header(picture)[:2]
        except ValueError as error:
            raise WireError(f"a row is no JPEG picture: {error}") from None
        return height, width

    def encode(self, array: np.ndarray) -> bytes:
        """The table of pictures and the pictures."""
        return join([self.encode_row(image) for image in array])

    def decode_row(self, data: memoryview, out: np.ndarray) -> None:
        """One picture into `out` (H, W, 3)."""
        # A scan costs time for the whole picture, however few bytes it has: ours have exactly one.
        picture = bytes(data)
        if picture.count(_START_OF_SCAN) != 1:
            raise WireError("a row is no JPEG picture of one scan")
        size = self.size(picture)
        if size != out.shape[:2]:
            raise WireError(f"a picture of {size[0]} x {size[1]} in rows of {out.shape}")
        try:
            self.load().decode_jpeg(picture, colorspace="RGB", buffer=out)
        except ValueError as error:
            raise WireError(f"a row is no JPEG picture: {error}") from None

    def decode_rows(
        self,
        data: np.ndarray,
        dtype: np.dtype,
        shape: Shape,
        indices: Sequence[int],
        out: np.ndarray,
    ) -> None:
        """See Codec."""
        pictures = Rows(data, shape[0])
        for place, row in enumerate(indices):
            self.decode_row(pictures[row], out[place])
