"""Segments: the rules of the columns, each of them tripped."""

import numpy as np
import pytest

from twinrl.core import codec
from twinrl.core.errors import SchemaMismatch, WireError
from twinrl.core.segment import Schema, Segment, check, decode, encode

T, S, P, C, SIZE = 8, 5, 3, 4, 6
SCHEMA = Schema(S, P, ("side",), SIZE, C)


def make():
    """A segment of T steps with a frame and a policy chunk at every C-th."""
    header = {
        "source": "twin",
        "task": "pick-and-place",
        "instruction": "put it there",
        "region": "id",
        "configuration": {"object": [0.1, 0.2, 0.3]},
        "episode": "e-1",
        "first_step": 0,
        "last": True,
        "writer": "w",
        "sequence": 0,
    }
    ended = np.arange(T) == T - 1
    columns = {
        "action": np.arange(T * 7, dtype="<f4").reshape(T, 7),
        "reward": ended.astype("<f4"),
        "terminated": ended,
        "truncated": np.zeros(T, bool),
        "success": ended.copy(),
        "intervention": np.zeros(T, bool),
        "policy_version": np.full(T, 3, "<i8"),
        "chunk_id": (np.arange(T) // C).astype("<i4"),
        "timestamp": np.arange(T, dtype="<f8"),
        "observation.state": np.zeros((T + 1, S), "<f4"),
        "privileged.state": np.zeros((T + 1, P), "<f4"),
        "frame_step": np.arange(0, T + 1, C, dtype="<i4"),
        "observation.images.side": np.zeros((3, SIZE, SIZE, 3), "u1"),
        "chunk_step": np.arange(0, T, C, dtype="<i4"),
        "policy.log_prob": np.zeros(2, "<f4"),
    }
    return Segment(header, columns)


def test_round_trip():
    segment = make()
    back = decode([bytes(f) for f in encode(segment)], SCHEMA)
    assert back.header == segment.header
    assert back.columns.keys() == segment.columns.keys()
    for name, column in segment.columns.items():
        np.testing.assert_array_equal(back.columns[name], column)
    assert back.steps == T
    assert back.nbytes == segment.nbytes


IMAGES = "observation.images.side"


@pytest.mark.parametrize("name", codec.CODECS)
def test_images_may_be_encoded(name):
    segment = make()
    raw = segment.columns[IMAGES]
    segment.columns[IMAGES] = codec.encode(raw, name)
    back = decode([bytes(f) for f in encode(segment)], SCHEMA)
    assert back.columns[IMAGES].codec == name
    assert back.nbytes == segment.nbytes
    assert segment.nbytes == make().nbytes - raw.nbytes + segment.columns[IMAGES].nbytes
    plain = back.decoded()
    assert plain.nbytes == make().nbytes
    np.testing.assert_array_equal(plain.columns[IMAGES], segment.columns[IMAGES].decode())
    assert plain.decoded() is plain
    assert back.columns[IMAGES].codec == name


def break_header(**changes):
    def apply(segment):
        segment.header.update(changes)

    return apply


def break_column(name, change):
    def apply(segment):
        segment.columns[name] = change(segment.columns[name])

    return apply


def drop(name):
    return lambda segment: segment.columns.pop(name)


def both_ends(segment):
    segment.columns["truncated"][-1] = True


def early_end(segment):
    segment.columns["terminated"][2] = True


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_header(source="dream"), "dream"),
        (break_header(sequence="1"), "sequence"),
        (break_header(first_step=True), "first_step"),
        (lambda s: s.header.pop("episode"), "episode"),
        (drop("reward"), "reward"),
        (both_ends, "never both"),
        (early_end, "last step"),
        (break_column("action", lambda c: c[:, :6].copy()), "action"),
        (break_column("reward", lambda c: c.astype("f8")), "reward"),
        (break_column("observation.state", lambda c: c[:-1]), "rows"),
        (break_column("observation.images.side", lambda c: c[:-1]), "rows"),
        (break_column("policy.log_prob", lambda c: c[:1]), "rows"),
        (break_column("frame_step", lambda c: c[::-1].copy()), "rise"),
        (break_column("frame_step", lambda c: c + 1), "rise"),
        (break_column("chunk_step", lambda c: c.astype("f4")), "integers"),
        (lambda s: s.columns.update({"surprise": np.zeros(T)}), "surprise"),
        (break_column("reward", lambda c: codec.encode(c, "raw")), "only images"),
        (break_column("frame_step", lambda c: codec.encode(c, "zstd")), "only images"),
        (break_column(IMAGES, lambda c: codec.encode(c[:-1], "zstd")), "rows"),
        (break_column("action", lambda c: np.float32(1).reshape(())), "single value"),
        (
            lambda s: s.columns.update({k: v[:0] for k, v in s.columns.items()}),
            "without steps",
        ),
    ],
)
def test_a_broken_rule_is_named(damage, words):
    segment = make()
    check(segment)
    damage(segment)
    with pytest.raises(WireError, match=words):
        check(segment)


@pytest.mark.parametrize(
    "schema",
    [
        SCHEMA._replace(state_dim=S + 1),
        SCHEMA._replace(privileged_dim=P + 1),
        SCHEMA._replace(image_size=SIZE * 2),
        SCHEMA._replace(cameras=("side", "wrist")),
        SCHEMA._replace(cameras=()),
    ],
)
def test_another_schema_is_a_mismatch(schema):
    encoded = make()
    encoded.columns[IMAGES] = codec.encode(encoded.columns[IMAGES], "zstd")
    for segment in (make(), encoded):
        check(segment, SCHEMA)
        with pytest.raises(SchemaMismatch):
            check(segment, schema)
    assert schema.digest() != SCHEMA.digest()
