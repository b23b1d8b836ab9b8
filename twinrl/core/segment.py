"""A segment: up to T consecutive transitions of one episode as columns, each observation stored once.

Columns lie on one of four axes of a segment with T steps:

    step         T rows      action, reward, terminated, truncated, success, intervention, ...
    observation  T + 1       observation.state, privileged.state
    frame        F           observation.images.*, one row for each t in `frame_step`
    chunk        M           policy.*, one row for each policy chunk, which starts at t in `chunk_step`

A twin renders at chunk boundaries only, so F may be smaller than T + 1; a robot has F = T + 1. Image columns
may be `Encoded`; all others are arrays.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple, Sequence

import numpy as np

from twinrl.core import wire
from twinrl.core.codec import Encoded
from twinrl.core.errors import SchemaMismatch, WireError

SOURCES = ("demo", "twin", "real")
IMAGE_PREFIX = "observation.images."
MAX_TEXT = 1000  # characters of a header's text
STEP_COLUMNS = {
    "action": ("<f4", (7,)),  # executed: delta position m, delta rotation vector rad, gripper 0..1
    "reward": ("<f4", ()),
    "terminated": ("|b1", ()),
    "truncated": ("|b1", ()),
    "success": ("|b1", ()),
    "intervention": ("|b1", ()),  # `action` is the person's
    "policy_version": ("<i8", ()),  # the acting policy's version, -1 where no policy acted
    "chunk_id": ("<i4", ()),  # which policy chunk of the episode the step belongs to, -1 for none
    "timestamp": ("<f8", ()),  # s, the environment's own clock within the episode
}
OPTIONAL_STEP_COLUMNS = {
    "label_action": ("<f4", (7,)),  # the clean action behind a noisily executed one
    "policy_action": (
        "<f4",
        (7,),
    ),  # what the policy wanted where a person or the filter overruled it
    "skew": ("<f4", ()),  # s from the oldest image to the arm's own measurement, of the step's end
}
HEADER_FIELDS = {
    "source": str,  # one of SOURCES
    "task": str,
    "instruction": str,
    "region": str,  # "id" or "ood"
    "configuration": dict,
    "episode": str,  # unique in the run
    "first_step": int,  # index in the episode of this segment's first step
    "last": bool,  # the episode ends with this segment
    "writer": str,
    "sequence": int,  # the writer's running number: (writer, sequence) names the segment for ever
}


class Segment(NamedTuple):
    """Header and columns; `columns` hold read-only views when the segment was decoded."""

    header: dict[str, Any]
    columns: wire.Arrays

    @property
    def steps(self) -> int:
        """T, the number of transitions."""
        return len(self.columns["action"])

    @property
    def nbytes(self) -> int:
        """Bytes of all columns, images as they are encoded."""
        return sum(column.nbytes for column in self.columns.values())

    def decoded(self) -> Segment:
        """The same with every column an array; itself where none is encoded."""
        if not any(isinstance(column, Encoded) for column in self.columns.values()):
            return self
        columns = {
            name: column.decode() if isinstance(column, Encoded) else column
            for name, column in self.columns.items()
        }
        return Segment(self.header, columns)


class Schema(NamedTuple):
    """What varies between jobs in a segment's columns. Its hash is part of every handshake."""

    state_dim: int
    privileged_dim: int  # of twins; 0 where there is none
    cameras: tuple  # names
    image_size: int  # pixels, height = width
    chunk: int  # C, control steps in a policy chunk

    def digest(self) -> str:
        """A short hash that two sides compare before they exchange segments."""
        text = repr((wire.PROTOCOL, tuple(self), sorted(STEP_COLUMNS.items())))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def encode(segment: Segment) -> list[Any]:
    """Message frames of a segment; columns are not copied."""
    return wire.pack(segment.header, segment.columns)


def decode(frames: Sequence[Any], schema: Schema | None = None) -> Segment:
    """Segment from frames, checked; columns are views of the frames' memory."""
    segment = Segment(*wire.unpack(frames))
    check(segment, schema)
    return segment


def check(segment: Segment, schema: Schema | None = None) -> None:
    """Raise WireError unless the header is complete and every column fits its axis, dtype and the schema."""
    header, columns = segment
    for name, kind in HEADER_FIELDS.items():
        if name not in header:
            raise WireError(f"segment header lacks {name!r}")
        if not isinstance(header[name], kind) or (kind is int and isinstance(header[name], bool)):
            raise WireError(
                f"segment header's {name!r} is {header[name]!r:.80}, should be {kind.__name__}"
            )
        if kind is int and not 0 <= header[name] < 1 << 63:
            raise WireError(
                f"segment header's {name!r} is {header[name]}, should be 0 .. 2**63 - 1"
            )
        if kind is str and len(header[name]) > MAX_TEXT:
            raise WireError(
                f"segment header's {name!r} has {len(header[name])} characters, allowed {MAX_TEXT}"
            )
    for name in ("writer", "episode"):
        if not header[name]:
            raise WireError(f"segment header's {name!r} is empty")
    if header["source"] not in SOURCES:
        raise WireError(f"source {header['source']!r} is none of {', '.join(SOURCES)}")
    for name, column in columns.items():
        if column.ndim == 0:
            raise WireError(f"{name!r} is a single value, columns have rows")
        if isinstance(column, Encoded) and not name.startswith(IMAGE_PREFIX):
            raise WireError(f"{name!r} is encoded ({column.codec}), only images may be")
    for name in STEP_COLUMNS:
        if name not in columns:
            raise WireError(f"segment lacks column {name!r}")
    steps = len(columns["action"])
    if steps == 0:
        raise WireError("segment without steps")
    frame_step = columns.get("frame_step", np.zeros(0, np.int32))
    chunk_step = columns.get("chunk_step", np.zeros(0, np.int32))
    for index, limit in ((frame_step, steps + 1), (chunk_step, steps)):
        if index.ndim != 1 or index.dtype.kind != "i":
            raise WireError("frame_step and chunk_step are one-dimensional integers")
        if len(index) and (index[0] < 0 or index[-1] >= limit or (np.diff(index) <= 0).any()):
            raise WireError("frame_step and chunk_step must rise within the segment")
    lengths = {"observation": steps + 1, "frame": len(frame_step), "chunk": len(chunk_step)}
    for name, column in columns.items():
        if name in STEP_COLUMNS or name in OPTIONAL_STEP_COLUMNS:
            dtype, shape = STEP_COLUMNS.get(name) or OPTIONAL_STEP_COLUMNS[name]
            _expect(name, column, dtype, (steps, *shape))
        elif name in ("frame_step", "chunk_step"):
            continue
        else:
            axis = _axis(name)
            if len(column) != lengths[axis]:
                raise WireError(f"{name!r} has {len(column)} rows, {axis} axis {lengths[axis]}")
    if (columns["terminated"] & columns["truncated"]).any():
        raise WireError("a step is terminated or truncated, never both")
    ends = columns["terminated"] | columns["truncated"]
    if ends[:-1].any():
        raise WireError("an episode ends only at a segment's last step")
    if schema is not None:
        _check_schema(columns, schema)


def _axis(name: str) -> str:
    if name.startswith(IMAGE_PREFIX):
        return "frame"
    if name in ("observation.state", "privileged.state"):
        return "observation"
    if name.startswith("policy."):
        return "chunk"
    raise WireError(f"unknown column {name!r}")


def _expect(name: str, column: wire.Column, dtype: str, shape: tuple) -> None:
    if column.dtype.str != dtype or column.shape != shape:
        raise WireError(f"{name!r} is {column.dtype.str}{column.shape}, should be {dtype}{shape}")


def _check_schema(columns: wire.Arrays, schema: Schema) -> None:
    expected = {"observation.state": ("<f4", (schema.state_dim,))}
    for camera in schema.cameras:
        expected[IMAGE_PREFIX + camera] = ("|u1", (schema.image_size, schema.image_size, 3))
    for name, (dtype, shape) in expected.items():
        column = columns.get(name)
        if column is None:
            raise SchemaMismatch(f"segment lacks {name!r}, which the job's schema asks for")
        if column.dtype.str != dtype or column.shape[1:] != shape:
            raise SchemaMismatch(
                f"{name!r} has rows {column.dtype.str}{column.shape[1:]}, job's {dtype}{shape}"
            )
    for name in columns:
        if name.startswith(IMAGE_PREFIX) and name not in expected:
            raise SchemaMismatch(f"camera column {name!r} is not in the job's schema")
    privileged = columns.get("privileged.state")
    if privileged is not None and privileged.shape[1:] != (schema.privileged_dim,):
        raise SchemaMismatch(
            f"privileged.state has {privileged.shape[1:]}, job's ({schema.privileged_dim},)"
        )
