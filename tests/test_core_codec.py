"""Codecs: what went in comes out bit for bit, row by row, and nothing else gets in."""

import sys
import threading
import time

import numpy as np
import pytest

from twinrl.core import codec, wire
from twinrl.core.codec import CODECS, Encoded, encode
from twinrl.core.codec_lossless import GROUP
from twinrl.core.codec_rows import join
from twinrl.core.errors import ConfigError, WireError

LOSSLESS = [name for name, each in CODECS.items() if each.lossless]
LOSSY = [name for name, each in CODECS.items() if not each.lossless]
DTYPES = ["|b1", "|u1", "|i1", "<u2", ">u2", "<i4", "<u8", "<f2", "<f4", ">f8", "|S7"]
SHAPES = [
    (0, 4, 4, 3),
    (1, 16, 16, 3),
    (GROUP, 5, 7, 3),
    (GROUP + 1, 1, 9, 3),
    (2 * GROUP + 3, 17, 2, 1),
    (9, 0, 4, 3),
    (13, 31),
    (7,),
    (3, 2, 2, 2, 2, 2, 2, 2),
]


def values(shape, dtype, seed=0):
    """Any bytes at all, half of them the same as in the row before."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(dtype)
    array = np.frombuffer(
        rng.bytes(int(np.prod(shape)) * dtype.itemsize), np.uint8 if dtype.kind == "b" else dtype
    ).reshape(shape)
    if dtype.kind == "b":
        return (array % 2).astype(bool)
    array = array.copy()
    if array.ndim > 1:
        array[1:, : array.shape[1] // 2] = array[:1, : array.shape[1] // 2]
    return array


def video(frames=20, height=48, width=40, noise=1.0):
    """A bright square that crosses a shaded ground, (frames, height, width, 3) uint8."""
    rng = np.random.default_rng(1)
    ground = np.add.outer(np.arange(height), np.arange(width))[..., None] * [1.0, 1.5, 0.5] + 40
    images = np.repeat(ground[None], frames, axis=0)
    for t in range(frames):
        images[t, 10:20, t : t + 10] = (220, 60, 30)
    return (images + rng.normal(0, noise, images.shape)).round().clip(0, 255).astype(np.uint8)


def same(a, b):
    """Equal to the last bit: NaNs have payloads too."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape_comes_back_bit_for_bit(name, dtype):
    for shape in SHAPES:
        array = values(shape, dtype)
        encoded = encode(array, name)
        assert (encoded.dtype, encoded.shape, encoded.ndim) == (array.dtype, shape, len(shape))
        assert len(encoded) == len(array)
        assert same(encoded.decode(), array), shape
        out = np.empty_like(array)
        assert encoded.decode(out) is out
        assert same(out, array), shape


@pytest.mark.parametrize("name", CODECS)
def test_rows_are_the_rows_of_the_whole(name):
    encoded = encode(video(19), name)
    whole = encoded.decode()
    rng = np.random.default_rng(2)
    draws = [rng.integers(0, len(whole), n) for n in (1, 2, 5, 30)]
    orders = [[], [0], [-1], [GROUP, GROUP - 1], [5, 5, 5], range(len(whole))[::-1], [18, 3, 18, 0]]
    for indices in (*orders, *draws):
        indices = list(indices)
        expected = whole[np.array(indices, int)]
        assert same(encoded.rows(indices), expected), indices
        out = np.zeros_like(expected)
        assert encoded.rows(np.array(indices, int), out) is out
        assert same(out, expected)
        strided = np.zeros((len(indices), 2, *whole.shape[1:]), np.uint8)
        encoded.rows(indices, strided[:, 1])
        assert same(strided[:, 1], expected)
        assert not strided[:, 0].any()


@pytest.mark.parametrize("name", CODECS)
def test_rows_that_are_not_there_and_arrays_that_do_not_fit(name):
    encoded = encode(video(5), name)
    for indices in ([5], [-6], [0, 99]):
        with pytest.raises(IndexError):
            encoded.rows(indices)
    for out in (np.empty((2, 48, 40, 3), np.uint8), np.empty((1, 48, 40, 3), np.float32)):
        with pytest.raises(ValueError, match="out"):
            encoded.rows([1], out)


@pytest.mark.parametrize(("name", "bound"), [("jpeg95", 38.0), ("jpeg80", 31.0)])
def test_jpeg_stays_close(name, bound):
    images = video()
    encoded = encode(images, name)
    error = np.mean((encoded.decode().astype(float) - images) ** 2)
    assert 10 * np.log10(255**2 / error) > bound
    assert encoded.nbytes < images.nbytes / 3


def test_lossy_codecs_are_called_by_their_names():
    assert LOSSY == ["jpeg95", "jpeg80"]


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((2, 8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((1, 1, 70_000, 3), np.uint8),
    ],
)
def test_jpeg_refuses_what_is_no_picture(name, array):
    with pytest.raises(WireError, match="JPEG"):
        encode(array, name)
    with pytest.raises(WireError, match="JPEG"):
        Encoded(name, array.dtype, array.shape, b"")


def test_filters_earn_their_place():
    """On smooth images each is smaller than the same compressor without it, noisy ones included."""
    for noise in (0.0, 2.0):
        images = video(48, 128, 128, noise)
        size = {name: encode(images, name).nbytes for name in LOSSLESS}
        assert size["zstd-up"] < size["zstd"]
        assert size["zstd-delta"] < size["zstd"]
        assert size["zstd-up"] < 0.6 * size["raw"]


@pytest.mark.parametrize("name", CODECS)
def test_an_array_in_any_memory_order(name):
    images = video(6).transpose(0, 2, 1, 3)[::2, ::-1]
    encoded = encode(images, name)
    assert encoded.shape == images.shape
    if CODECS[name].lossless:
        assert same(encoded.decode(), np.ascontiguousarray(images))


@pytest.mark.parametrize("name", CODECS)
def test_threads_share_codecs(name):
    columns = [encode(video(12, noise=n), name) for n in range(4)]
    expected = [column.decode() for column in columns]
    wrong = []

    def work(n):
        for k in range(30):
            row = (n + k) % 12
            if not same(columns[n].rows([row])[0], expected[n][row]):
                wrong.append((n, row))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_an_unknown_codec_is_named_with_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'zstd-up'"):
        encode(video(1), "zstd-upp")
    with pytest.raises(WireError, match="none of raw"):
        Encoded("zip", "|u1", (1, 2), b"xx")
    with pytest.raises(WireError, match="none of raw"):
        Encoded(["raw"], "|u1", (1, 2), b"xx")


@pytest.mark.parametrize(
    ("name", "module", "advice"),
    [
        ("lz4-delta", "lz4.block", "pip install lz4"),
        ("zstd", "zstandard", "pip install zstandard"),
        ("jpeg95", "simplejpeg", "pip install simplejpeg"),
    ],
)
def test_a_missing_library_is_named(monkeypatch, name, module, advice):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=advice):
        codec.check_codec(name)
    assert codec.check_codec("raw") == "raw"


@pytest.mark.parametrize("name", CODECS)
def test_random_damage_raises_only_wire_errors(name):
    """1,000 mutations of bytes, lengths, dtype and shape: a WireError, or an array of the stated shape."""
    rng = np.random.default_rng(3)
    good = encode(video(GROUP + 3, 16, 12), name)
    start = time.monotonic()
    refused = 0
    for n in range(1000):
        data = good.data.copy()
        kind = n % 5
        if kind == 0:
            data[rng.integers(data.size, size=rng.integers(1, 20))] ^= np.uint8(
                1 << rng.integers(8)
            )
        elif kind == 1:
            data = data[: rng.integers(data.size)]
        elif kind == 2:
            data[: 4 * len(good)].view("<u4")[rng.integers(len(good))] = rng.integers(1 << 32)
        elif kind == 3:
            data = np.frombuffer(rng.bytes(int(rng.integers(4000))), np.uint8)
        shape, dtype = good.shape, good.dtype
        if kind == 4:
            shape = tuple(int(x) for x in rng.integers(0, 1 << rng.integers(1, 33), 4))
            dtype = rng.choice(["|u1", "<f4", "<u8"])
        try:
            column = Encoded(name, dtype, shape, data.tobytes())
            found = column.decode() if n % 2 or not len(column) else column.rows([-1])
            assert found.shape[1:] == shape[1:]
        except WireError:
            refused += 1
    assert refused > 400
    assert time.monotonic() - start < 50


def test_a_bomb_is_refused_before_memory_is_asked_for():
    import zstandard

    with pytest.raises(WireError, match="more than"):
        Encoded("zstd", "|u1", (1 << 20, 1 << 20, 3), b"")
    # A column that is allowed, but a row that says it is larger than a row is.
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(64 << 20))
    assert len(bomb) < 1 << 14
    with pytest.raises(WireError, match="states 67108864 bytes"):
        Encoded("zstd", "|u1", (1, 64, 64, 3), join([bomb])).decode()
    # Its size in the frame's header says 2 ** 60: the four-byte magic, a descriptor of eight size bytes.
    huge = b"\x28\xb5\x2f\xfd\xe0" + (1 << 60).to_bytes(8, "little") + b"\x01\x00\x00"
    with pytest.raises(WireError, match=str(1 << 60)):
        Encoded("zstd", "|u1", (1, 64, 64, 3), join([huge])).decode()
    unstated = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(12288))
    with pytest.raises(WireError, match="states -1"):
        Encoded("zstd", "|u1", (1, 64, 64, 3), join([unstated])).decode()


@pytest.mark.parametrize("name", ["lz4", "zstd"])
def test_a_row_of_another_size_is_refused(name):
    images = video(3, 16, 16)
    for shape in ((3, 16, 8, 3), (3, 16, 32, 3)):
        with pytest.raises(WireError):
            Encoded(name, "|u1", shape, encode(images, name).data).decode()


def test_bytes_behind_the_last_row_are_refused():
    for name in CODECS:
        good = encode(video(3, 16, 16), name)
        with pytest.raises(WireError):
            Encoded(name, "|u1", good.shape, good.data.tobytes() + b"x").decode()


def test_a_picture_of_many_scans_is_refused():
    """Each costs a pass over the whole picture, for a few bytes."""
    (picture,) = (bytes(x) for x in [encode(video(1, 16, 16), "jpeg95").data[4:]])
    scan = picture.index(b"\xff\xda")
    repeated = picture[:-2] + picture[scan:-2] * 3 + picture[-2:]
    with pytest.raises(WireError, match="one scan"):
        Encoded("jpeg95", "|u1", (1, 16, 16, 3), join([repeated])).decode()


def test_damage_in_one_row_leaves_the_others():
    good = encode(video(4, 16, 16), "zstd-up")
    data = good.data.copy()
    data[-3:] ^= 255
    damaged = Encoded("zstd-up", "|u1", good.shape, data)
    assert same(damaged.rows([0, 2]), good.rows([0, 2]))


@pytest.mark.parametrize("name", CODECS)
def test_through_a_message(name):
    encoded = encode(video(5), name)
    frames = [bytes(frame) for frame in wire.pack({}, {"observation.images.side": encoded})]
    _, arrays = wire.unpack(frames)
    back = arrays["observation.images.side"]
    assert (back.codec, back.dtype, back.shape) == (name, encoded.dtype, encoded.shape)
    assert np.shares_memory(back.data, np.frombuffer(frames[1], np.uint8))
    assert not back.data.flags.writeable
    assert same(back.decode(), encoded.decode())
