"""Camera frames on the link: JPEG by default, raw by choice. What is stored is what the policy saw.

A frame is encoded once, on the robot's PC. The live observation and the segment carry the same bytes and the
gateway decodes both, so the policy's frame and the stored one are equal bit for bit.
"""

from __future__ import annotations

from typing import Any, Dict, Sequence

import numpy as np

from twinrl.core.errors import ConfigError, WireError
from twinrl.core.segment import IMAGE_PREFIX

CODECS = ("jpeg", "raw")
QUALITY = 95
_BYTES, _SIZES = "bytes/", "sizes/"

Frames = Dict[str, Any]  # camera key: JPEG bytes, or the raw image


def check_codec(codec: str) -> str:
    """`codec` if this PC can produce it; ConfigError says what is missing."""
    if codec not in CODECS:
        raise ConfigError(f"codec {codec!r} is none of {', '.join(CODECS)}")
    if codec == "jpeg":
        try:
            import simplejpeg  # noqa: F401
        except ImportError:
            raise ConfigError(
                "JPEG needs simplejpeg: pip install simplejpeg, or attach with --codec raw"
            ) from None
    return codec


def encode(observation: dict[str, np.ndarray], codec: str) -> Frames:
    """The frames of one observation as they travel and are kept."""
    images = {key: value for key, value in observation.items() if key.startswith(IMAGE_PREFIX)}
    if codec == "raw":
        return {key: np.array(image, np.uint8) for key, image in images.items()}
    import simplejpeg

    return {
        key: simplejpeg.encode_jpeg(
            np.ascontiguousarray(image), quality=QUALITY, colorspace="RGB", colorsubsampling="444"
        )
        for key, image in images.items()
    }


def pack(frames: Sequence[Frames], codec: str) -> dict[str, np.ndarray]:
    """Arrays for the wire from the frames of F observations."""
    arrays: dict[str, np.ndarray] = {}
    for key in frames[0]:
        column = [each[key] for each in frames]
        if codec == "raw":
            arrays[key] = np.stack(column)
        else:
            arrays[_BYTES + key] = np.frombuffer(b"".join(column), np.uint8)
            arrays[_SIZES + key] = np.array([len(each) for each in column], "<i4")
    return arrays


def unpack(arrays: dict[str, np.ndarray], codec: str, image_size: int) -> dict[str, np.ndarray]:
    """Inverse of `pack`: {camera key: (F, H, W, 3) uint8}; other arrays are passed on. Checks every length."""
    if codec == "raw":
        return dict(arrays)
    if codec != "jpeg":
        raise WireError(f"frames in codec {codec!r}, not one of {', '.join(CODECS)}")
    plain = {k: v for k, v in arrays.items() if not k.startswith((_BYTES, _SIZES))}
    for key in [k[len(_BYTES) :] for k in arrays if k.startswith(_BYTES)]:
        data, sizes = arrays[_BYTES + key], arrays.get(_SIZES + key)
        if sizes is None or sizes.ndim != 1 or sizes.dtype.kind != "i" or data.dtype != np.uint8:
            raise WireError(f"{key!r}: JPEG frames without their sizes")
        if (sizes < 1).any() or int(sizes.sum()) != data.size or data.ndim != 1:
            raise WireError(f"{key!r}: {data.size} bytes for frames of {int(sizes.sum())}")
        ends = np.cumsum(sizes)
        plain[key] = np.stack(
            [_decode(data[end - size : end], key, image_size) for size, end in zip(sizes, ends)]
        )
    return plain


def split(packed: dict[str, np.ndarray], codec: str) -> Frames:
    """The frames of a single observation out of `pack`'s arrays, still encoded."""
    if codec == "raw":
        return {k: v[0] for k, v in packed.items() if k.startswith(IMAGE_PREFIX)}
    return {k[len(_BYTES) :]: v.tobytes() for k, v in packed.items() if k.startswith(_BYTES)}


def thumbnails(frames: Frames) -> dict[str, np.ndarray]:
    """{camera: JPEG bytes as uint8} of `split`'s frames, for a page; none without an encoder."""
    try:
        import simplejpeg  # noqa: F401
    except ImportError:
        return {}
    names: list[str] = sorted(frames)
    encoded = {}
    for key in names:
        frame = frames[key]
        if not isinstance(frame, bytes):
            frame = encode({key: frame}, "jpeg")[key]
        encoded[key[len(IMAGE_PREFIX) :]] = np.frombuffer(frame, np.uint8)
    return encoded


def _decode(data: np.ndarray, key: str, image_size: int) -> np.ndarray:
    import simplejpeg

    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        if (height, width) != (image_size, image_size):
            raise WireError(f"{key!r}: a frame of {height} x {width}, job's {image_size}")
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError as error:
        raise error if isinstance(error, WireError) else WireError(f"{key!r}: {error}") from None
