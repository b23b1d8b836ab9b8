"""Camera frames on the link: JPEG by default, raw by choice. What is stored is what the policy saw.

A frame is encoded once, on the robot's PC. The live observation and the segment carry the same bytes; the
gateway decodes the former for the policy, and readers of the replay the latter, so both see the same bits.
"""

from __future__ import annotations

from typing import Any, Dict, Sequence

import numpy as np

from twinrl.core.codec import CODECS as COLUMN_CODECS
from twinrl.core.codec import Encoded
from twinrl.core.codec_rows import Rows, join
from twinrl.core.errors import ConfigError, WireError
from twinrl.core.segment import IMAGE_PREFIX
from twinrl.core.wire import Arrays

CODECS = ("jpeg", "raw")
JPEG = "jpeg95"  # what "jpeg" means in a column

Frames = Dict[str, Any]  # camera key: JPEG bytes, or the raw image


def key_of(camera: str) -> str:
    """The observation key of a camera."""
    return IMAGE_PREFIX + camera


def check_codec(codec: str) -> str:
    """`codec` if this PC can produce it; ConfigError says what is missing."""
    if codec not in CODECS:
        raise ConfigError(f"codec {codec!r} is none of {', '.join(CODECS)}")
    if codec == "jpeg":
        try:
            COLUMN_CODECS[JPEG].load()
        except ConfigError:
            raise ConfigError(
                "JPEG needs simplejpeg: pip install simplejpeg, or attach with --codec raw"
            ) from None
    return codec


def encode(observation: dict[str, np.ndarray], codec: str) -> Frames:
    """The frames of one observation as they travel and are kept."""
    images = {key: value for key, value in observation.items() if key.startswith(IMAGE_PREFIX)}
    if codec == "raw":
        return {key: np.array(image, np.uint8) for key, image in images.items()}
    jpeg = COLUMN_CODECS[JPEG]
    return {key: jpeg.encode_row(np.ascontiguousarray(image)) for key, image in images.items()}


def pack(frames: Sequence[Frames], codec: str) -> Arrays:
    """Columns for the wire from the frames of F observations."""
    columns: Arrays = {}
    for key in frames[0]:
        column = [each[key] for each in frames]
        if codec == "raw":
            columns[key] = np.stack(column)
        else:
            size = COLUMN_CODECS[JPEG].size(column[0])
            columns[key] = Encoded(JPEG, "|u1", (len(column), *size, 3), join(column))
    return columns


def check(columns: Arrays, codec: str, image_size: int) -> dict[str, np.ndarray]:
    """What `pack` made, with every image decoded to (F, H, W, 3) uint8; other arrays are passed on.

    WireError unless images are in `codec`, of the job's size, and whole.
    """
    if codec not in CODECS:
        raise WireError(f"frames in codec {codec!r}, not one of {', '.join(CODECS)}")
    plain = {}
    for key, column in columns.items():
        if isinstance(column, Encoded):
            if codec != "jpeg" or column.codec != JPEG or not key.startswith(IMAGE_PREFIX):
                raise WireError(f"{key!r} is in codec {column.codec!r}, should be {codec!r}")
            height, width = column.shape[1:3]
            if (height, width) != (image_size, image_size):
                raise WireError(f"{key!r}: frames of {height} x {width}, job's {image_size}")
            try:
                column = column.decode()
            except WireError as error:
                raise WireError(f"{key!r}: {error}") from None
        elif codec == "jpeg" and key.startswith(IMAGE_PREFIX):
            raise WireError(f"{key!r} is raw, should be in codec 'jpeg'")
        plain[key] = column
    return plain


def split(columns: Arrays) -> Frames:
    """The frames of a single observation out of `pack`'s columns, still encoded."""
    return {
        key: bytes(Rows(column.data, 1)[0]) if isinstance(column, Encoded) else column[0]
        for key, column in columns.items()
        if key.startswith(IMAGE_PREFIX)
    }


def thumbnails(frames: Frames) -> dict[str, np.ndarray]:
    """{camera: JPEG bytes as uint8} of `split`'s frames, for a page; none without an encoder."""
    try:
        check_codec("jpeg")
    except ConfigError:
        return {}
    names: list[str] = sorted(frames)
    encoded = {}
    for key in names:
        frame = frames[key]
        if not isinstance(frame, bytes):
            frame = encode({key: frame}, "jpeg")[key]
        encoded[key[len(IMAGE_PREFIX) :]] = np.frombuffer(frame, np.uint8)
    return encoded
