"""Messages: what goes in comes out as views, and nothing else gets in."""

import msgpack
import numpy as np
import pytest

from twinrl.core import wire
from twinrl.core.codec import encode
from twinrl.core.errors import WireError


def through(header, arrays=None):
    return wire.unpack([bytes(frame) for frame in wire.pack(header, arrays)])


@pytest.mark.parametrize("dtype", ["u1", "i8", "f4", "f8", "?", "S7"])
def test_arrays_come_back_equal(dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    _, arrays = through({}, {"x": array, "empty": array[:0], "scalar": np.array(3.5)})
    assert arrays["x"].dtype == array.dtype
    np.testing.assert_array_equal(arrays["x"], array)
    assert arrays["empty"].shape == (0, 3, 4)
    assert arrays["scalar"] == 3.5
    assert arrays["scalar"].shape == ()


def test_decoding_makes_read_only_views():
    frames = [bytes(f) for f in wire.pack({}, {"x": np.ones(1000, "f4")})]
    _, arrays = wire.unpack(frames)
    assert np.shares_memory(arrays["x"], np.frombuffer(frames[1], "f4"))
    with pytest.raises(ValueError):
        arrays["x"][0] = 2


def test_a_non_contiguous_array_is_sent_whole():
    array = np.arange(20).reshape(4, 5)[:, ::2]
    np.testing.assert_array_equal(through({}, {"x": array})[1]["x"], array)


def test_numpy_scalars_in_headers_become_plain():
    assert through({"a": np.float32(1.5), "b": np.arange(3)})[0] == {"a": 1.5, "b": [0, 1, 2]}


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda: 0])
def test_only_plain_values_in_headers(value):
    with pytest.raises(WireError):
        wire.pack({"x": value})


@pytest.mark.parametrize("array", [np.array([object()]), np.array(["text"]), np.array([1j])])
def test_object_arrays_are_refused(array):
    with pytest.raises(WireError, match="dtype"):
        wire.pack({}, {"x": array})


def frames_with(spec, payload=b"\0" * 8, version=wire.PROTOCOL):
    return [msgpack.packb([version, {}, [spec]]), payload]


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b"no msgpack \xff"],
        [msgpack.packb("text")],
        frames_with(["x", "<f8", [1]], version=99),
        frames_with(["x", "<f8", [2]]),  # length
        frames_with(["x", "|O", [1]]),  # objects
        frames_with(["x", "<f8", [-1]]),
        frames_with(["x", "nonsense", [1]]),
        frames_with(["x", "<f8", [1 << 62, 8]]),
        frames_with(["x", "<f8"]),
        frames_with(["x", "<f8", [1], "raw", 0]),
        frames_with("x<8"),
        frames_with(["", "<f8", [1]]),
        frames_with(["x" * 201, "<f8", [1]]),
        frames_with([7, "<f8", [1]]),
        frames_with(["x", ["<f8"], [1]]),
        frames_with(["x", "<f8,<f8", []]),
        frames_with(["x", "|V8", [1]]),
        frames_with(["x", "<M8[s]", [1]]),
        frames_with(["x", "<c8", [1]]),
        frames_with(["x", "|i8", [1]]),
        frames_with(["x", "|S99999", [0]]),
        frames_with(["x", "<f8", [1.0]]),
        frames_with(["x", "<f8", [True]]),
        frames_with(["x", "<f8", 1]),
        frames_with(["x", "<f8", [1] * 9]),
        frames_with(["x", "<f8", [0, 1 << 30, 1 << 30, 1 << 30]]),
        frames_with(["x", "<f8", [1], "zip"]),
        frames_with(["x", "<f8", [1], None]),
        frames_with(["x", "<f8", [], "raw"]),
        frames_with(["x", "|u1", [1 << 20, 1 << 20], "zstd"]),
        frames_with(["x", "<f4", [1, 1, 1, 3], "jpeg95"]),
        [msgpack.packb([wire.PROTOCOL, {}, [["x", "|u1", [1]]] * 2]), b"a", b"b"],
        [msgpack.packb([wire.PROTOCOL, {}, [["x", "|u1", [0]]] * 257]), *[b""] * 257],
        [b"\x91" * 100_000],  # nested a hundred thousand deep
        [msgpack.packb([wire.PROTOCOL, {}, []]), b"surplus"],
        [msgpack.packb([wire.PROTOCOL, [], []])],
    ],
)
def test_hostile_bytes_raise_only_wire_errors(frames):
    with pytest.raises(WireError):
        wire.unpack(frames)


def test_a_long_header_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(wire, "MAX_HEADER_BYTES", 100)
    with pytest.raises(WireError, match="allowed 100"):
        through({"x": "y" * 200})


def test_a_long_encoded_column_is_refused(monkeypatch):
    monkeypatch.setattr(wire, "MAX_ENCODED_BYTES", 100)
    images = {"x": encode(np.zeros((2, 8, 8, 3), np.uint8), "raw")}
    with pytest.raises(WireError, match="allowed 100"):
        through({}, images)


def test_a_header_that_msgpack_cannot_hold():
    with pytest.raises(WireError, match="header"):
        wire.pack({"x": 1 << 70})


def test_descriptions_alone_restore_columns():
    """Records use them too: what `describe` gives, `restore` takes."""
    for column in (np.arange(6.0).reshape(2, 3), encode(np.ones((4, 2), "i4"), "zstd")):
        spec, buffer = wire.describe("x", column)
        name, back = wire.restore(spec, bytes(buffer))
        assert (name, back.dtype, back.shape) == ("x", column.dtype, column.shape)
        assert len(spec) == (3 if isinstance(column, np.ndarray) else 4)
        plain = [each if isinstance(each, np.ndarray) else each.decode() for each in (back, column)]
        np.testing.assert_array_equal(*plain)


def test_random_bytes_raise_only_wire_errors():
    rng = np.random.default_rng(0)
    images = encode(np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3), "zstd")
    good = wire.pack({"a": 1}, {"x": np.arange(10), "y": images})
    for _ in range(2000):
        head = bytearray(good[0])
        for i in rng.integers(len(head), size=3):
            head[i] = rng.integers(256)
        try:
            wire.unpack([bytes(head), bytes(good[1]), bytes(good[2])])
        except WireError:
            pass
