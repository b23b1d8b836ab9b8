"""Weights for members outside the cluster: rounded to bfloat16, whole or as the difference to what a member has.

Rounded: a float32 array of more than EXACT values is rounded to bf16 (to nearest, ties to even), kept as uint16;
anything else (biases, normalisation statistics, integers) stays as it is. The learner always rounds its own float32
values, so errors do not add up from version to version.

A blob, little endian; a snapshot is a difference to zeros:

    0        4s  b"TWD1"
    4        u32 bytes in the head
    8        head, msgpack: {"version", "checksum", "base", "base_checksum",    base -1: a snapshot
                             "tensors": [[name, form, shape], ...]}            form: "bf16" or a NumPy dtype
    ...      body, one zstd frame: for each of `tensors`, its bytes xor the base's, first byte 0 of every element,
             then byte 1, and so on
    last 8   u64 XXH3-64 of everything before

A difference names only the tensors that changed. `checksum` is that of all (rounded) tensors with their forms, see
twinrl.weights.checksum: what a member has after decoding is compared with it.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgpack
import numpy as np
import zstandard

from twinrl.core.checksum import digest
from twinrl.core.errors import WireError
from twinrl.weights import checksum, compare

MAGIC = b"TWD1"
HEAD = struct.Struct("<4sI")
TAIL = struct.Struct("<Q")
FORMAT = 1  # part of every etag: raised when the layout above changes
BF16 = "bf16"
EXACT = 1024  # float32 arrays of at most so many values are not rounded
LEVEL = 1  # of zstd; higher ones gain some per cent and cost several times as long
LIMIT = 4 << 30  # bytes of a decoded set
KINDS = "biuf"  # of dtypes: bool, integers, floats
FORM = re.compile(r"\|b1|[<|][iuf][1248]")
CLEARLY_SMALL = 8  # a delta of less than 1/8 of the set is taken without looking at the snapshot


class Rounded(NamedTuple):
    """What a member has of a version."""

    version: int
    tensors: dict[str, np.ndarray]  # uint16 where the form is "bf16"
    forms: dict[str, str]
    checksum: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(array.nbytes for array in self.tensors.values())

    def like(self, other: Rounded) -> bool:
        """Whether both hold the same tensors, with other values maybe."""
        return self.forms == other.forms and all(
            array.shape == other.tensors[name].shape for name, array in self.tensors.items()
        )


class WrongBase(WireError):
    """A difference to a set that is not the one at hand: fetch a snapshot."""


def round_weights(version: int, arrays: Mapping[str, np.ndarray]) -> Rounded:
    """The rounded set of a policy's `arrays`."""
    tensors, forms = {}, {}
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        if array.dtype.kind not in KINDS:
            raise WireError(f"weights {name!r} have dtype {array.dtype}: not one of {KINDS}")
        small = array.dtype != np.float32 or array.size <= EXACT
        forms[name] = array.dtype.newbyteorder("<").str if small else BF16
        tensors[name] = np.array(array, forms[name], order="C") if small else to_bf16(array)
    return Rounded(version, tensors, forms, checksum(tensors, forms))


def restore(rounded: Rounded) -> dict[str, np.ndarray]:
    """Arrays as a policy loads them: bf16 as float32, all else as it is."""
    return {
        name: from_bf16(array) if rounded.forms[name] == BF16 else array
        for name, array in rounded.tensors.items()
    }


def to_bf16(array: np.ndarray) -> np.ndarray:
    """float32 (...) -> uint16 (...): to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(array, "<f4").view("<u4")
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    words = rounded.astype("<u2")
    if not np.isfinite(array).all():  # rounding up carries a NaN's mantissa over into infinity
        nan = np.isnan(array)
        words[nan] = (bits[nan] >> np.uint32(16)).astype("<u2") | np.uint16(0x40)
    return words


def from_bf16(words: np.ndarray) -> np.ndarray:
    """uint16 (...) -> float32 (...), exactly."""
    bits = words.astype("<u4")
    bits <<= np.uint32(16)
    return bits.view("<f4")


def encode(new: Rounded, base: Rounded | None = None) -> bytes:
    """`new` as a blob: a snapshot, or the difference to `base`, which must hold the same tensors."""
    if base is not None and not new.like(base):
        raise WrongBase(f"version {new.version} holds other tensors than version {base.version}")
    named, planes = [], []
    for name in sorted(new.tensors):
        changed = new.tensors[name]
        if base is not None:
            changed = _bytes(changed) ^ _bytes(base.tensors[name])
            if not changed.any():
                continue
        named.append([name, new.forms[name], list(new.tensors[name].shape)])
        planes.append(np.ascontiguousarray(_bytes(changed).reshape(-1, _width(new, name)).T))
    head = msgpack.packb(
        {
            "version": new.version,
            "checksum": new.checksum,
            "base": -1 if base is None else base.version,
            "base_checksum": 0 if base is None else base.checksum,
            "tensors": named,
        }
    )
    body = _compress(planes)
    front = HEAD.pack(MAGIC, len(head))
    return b"".join([front, head, body, TAIL.pack(digest(front, head, body))])


def smallest(new: Rounded, base: Rounded | None, snapshot: Any) -> tuple[bytes, int]:
    """(blob, version of its base or -1): the smaller of delta and snapshot; `snapshot()` encodes that."""
    if base is not None and new.like(base):
        delta = encode(new, base)
        if len(delta) * CLEARLY_SMALL < new.nbytes or len(delta) < len(snapshot()):
            return delta, base.version
    return snapshot(), -1


def decode(blob: Any, base: Rounded | None = None, limit: int = LIMIT) -> Rounded:
    """The set that was encoded. WireError when a byte is damaged, WrongBase when `base` is not the blob's."""
    head, body = _open(blob)
    try:
        version, base_version = int(head["version"]), int(head["base"])
        base_checksum = int(head["base_checksum"])
        rows = [_row(row) for row in head["tensors"]]
        expected, published = sum(row[3] for row in rows), int(head["checksum"])
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"malformed head of weights: {type(error).__name__} {error}") from None
    if base_version >= 0:
        _check_base(version, (base_version, base_checksum), base)
    plain = np.frombuffer(_decompress(body, expected, limit, version), np.uint8)
    from_base = base_version >= 0 and base is not None
    tensors = dict(base.tensors) if from_base else {}
    forms = dict(base.forms) if from_base else {}
    start = 0
    for name, form, shape, nbytes in rows:
        dtype = _dtype(form)
        planes = plain[start : start + nbytes].reshape(dtype.itemsize, -1)
        changed = np.array(planes.T, order="C").reshape(-1)
        if from_base:
            if forms.get(name) != form or tensors[name].shape != shape:
                raise WireError(f"version {version} changes {name!r}, which its base does not have")
            changed ^= _bytes(tensors[name])
        tensors[name], forms[name] = changed.view(dtype).reshape(shape), form
        start += nbytes
    compare(version, checksum(tensors, forms), published)
    return Rounded(version, tensors, forms, published)


def _open(blob: Any) -> tuple[dict[str, Any], memoryview]:
    """(head, body) of a blob whose digest is right."""
    view = memoryview(blob)
    if len(view) < HEAD.size + TAIL.size:
        raise WireError(f"{len(view)} bytes are too few for weights")
    magic, length = HEAD.unpack_from(view)
    (expected,) = TAIL.unpack_from(view, len(view) - TAIL.size)
    if magic != MAGIC or digest(view[: -TAIL.size]) != expected:
        raise WireError("encoded weights arrived damaged")
    if length > len(view) - HEAD.size - TAIL.size:
        raise WireError(f"weights announce a head of {length} bytes and have {len(view)}")
    try:
        head = msgpack.unpackb(view[HEAD.size : HEAD.size + length])
    except Exception as error:  # msgpack raises many kinds on hostile bytes
        raise WireError(f"malformed head of weights: {error}") from None
    if not isinstance(head, dict):
        raise WireError("malformed head of weights")
    return head, view[HEAD.size + length : -TAIL.size]


def _check_base(version: int, wanted: tuple[int, int], base: Rounded | None) -> None:
    if base is None or (base.version, base.checksum) != wanted:
        found = "none" if base is None else f"version {base.version} ({base.checksum:016x})"
        raise WrongBase(
            f"weights of version {version} are the difference to version {wanted[0]} "
            f"({wanted[1]:016x}), at hand is {found}"
        )


def _row(row: Any) -> tuple[str, str, tuple[int, ...], int]:
    name, form, shape = row
    shape = tuple(int(n) for n in shape)
    if not isinstance(name, str) or min(shape, default=0) < 0 or len(shape) > 32:
        raise ValueError(f"tensor {row!r}")
    return name, form, shape, math.prod(shape) * _dtype(form).itemsize


def _dtype(form: str) -> np.dtype:
    if form != BF16 and not (isinstance(form, str) and FORM.fullmatch(form)):
        raise ValueError(f"form {form!r}")
    return np.dtype("<u2" if form == BF16 else form)


def _compress(planes: list[np.ndarray]) -> bytes:
    size = sum(plane.nbytes for plane in planes)
    compressor = zstandard.ZstdCompressor(level=LEVEL).compressobj(size=size)
    pieces = [compressor.compress(plane.reshape(-1)) for plane in planes if plane.size]
    return b"".join([*pieces, compressor.flush()])


def _decompress(body: memoryview, expected: int, limit: int, version: int) -> bytes:
    if expected > limit:
        raise WireError(f"weights of version {version} have {expected} bytes, allowed are {limit}")
    try:
        if zstandard.get_frame_parameters(body).content_size != expected:
            raise WireError(f"weights of version {version}: their body has another length")
        return zstandard.ZstdDecompressor().decompress(body, max_output_size=expected)
    except zstandard.ZstdError as error:
        raise WireError(f"weights of version {version} cannot be decompressed: {error}") from None


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _width(rounded: Rounded, name: str) -> int:
    return rounded.tensors[name].itemsize
