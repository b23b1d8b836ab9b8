"""Weights for outside members: rounding, differences, snapshots, and bytes that are not what was sent."""

import numpy as np
import pytest
import torch

from twinrl.core.errors import WireError
from twinrl.weights import checksum
from twinrl.weights_delta import (
    BF16,
    EXACT,
    Rounded,
    WrongBase,
    decode,
    encode,
    from_bf16,
    restore,
    round_weights,
    smallest,
    to_bf16,
)


def arrays(seed=0, values=5000):
    rng = np.random.default_rng(seed)
    return {
        "weight": rng.normal(0, 0.02, (values // 10, 10)).astype(np.float32),
        "turned": rng.normal(0, 0.02, (40, 50)).astype(np.float32).T,
        "bias": rng.normal(0, 0.02, EXACT).astype(np.float32),
        "scale": np.array(1.2345678, np.float32),
        "exact": rng.normal(size=7),
        "half": rng.normal(size=9).astype(np.float16),
        "count": np.array(3, np.int64),
        "flags": np.array([True, False, True]),
        "nothing": np.zeros((0, 4), np.float32),
    }


def same(a: Rounded, b: Rounded):
    assert (a.version, a.checksum, a.forms) == (b.version, b.checksum, b.forms)
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        assert tensor.dtype == b.tensors[name].dtype and tensor.shape == b.tensors[name].shape
        assert tensor.tobytes() == b.tensors[name].tobytes()


def moved(base, step=1e-5, names=("weight",), seed=1):
    rng = np.random.default_rng(seed)
    changed = {n: base[n] + rng.normal(0, step, base[n].shape).astype(np.float32) for n in names}
    return {**base, **changed}


def test_rounding_is_torchs_bit_for_bit():
    """Every exponent, ties both ways, subnormals, infinities, overflow to infinity; NaN stays NaN."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    edges = np.arange(0, 2**16, dtype=np.uint32) << np.uint32(16)
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    bits = np.concatenate([bits, (edges[:, None] | low).ravel()])
    values = bits.view(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16)
    words = to_bf16(values)
    nan = np.isnan(values)
    np.testing.assert_array_equal(
        words[~nan], expected.view(torch.int16).numpy().view(np.uint16)[~nan]
    )
    assert np.isnan(from_bf16(words)[nan]).all()
    np.testing.assert_array_equal(from_bf16(words)[~nan], expected.float().numpy()[~nan])
    np.testing.assert_array_equal(to_bf16(from_bf16(words)), words)


@pytest.mark.parametrize("kind", ["snapshot", "difference", "nothing changed"])
def test_round_trips_are_exact(kind):
    first = round_weights(3, arrays())
    after = moved(arrays(), names=("weight", "turned", "bias"))
    after |= {"count": np.array(4), "flags": np.array([False, False, True])}
    new = round_weights(4, arrays() if kind == "nothing changed" else after)
    base = None if kind == "snapshot" else first
    same(decode(encode(new, base), base), new)
    restored = restore(new)
    for name, array in (arrays() if kind == "nothing changed" else after).items():
        assert restored[name].dtype == array.dtype and restored[name].shape == array.shape
        if new.forms[name] == BF16:
            np.testing.assert_allclose(restored[name], array, rtol=2**-8)
        else:  # biases, statistics and integers are not rounded
            np.testing.assert_array_equal(restored[name], array)
    assert new.forms["weight"] == new.forms["turned"] == BF16 != new.forms["bias"]


def test_only_what_changed_is_sent():
    """LoRA: two small matrices of a large frozen model."""
    rng = np.random.default_rng(0)
    frozen = {f"layer{i}": rng.normal(0, 0.02, (512, 512)).astype(np.float32) for i in range(8)}
    lora = {f"lora{i}": rng.normal(0, 0.02, (512, 4)).astype(np.float32) for i in range(2)}
    base = round_weights(0, {**frozen, **lora})
    new = round_weights(1, {**frozen, **{n: a * 1.5 for n, a in lora.items()}})
    blob, used = smallest(new, base, lambda: encode(new))
    assert used == 0
    assert len(blob) < 2 * 512 * 4 * 2 * 1.1
    same(decode(blob, base), new)
    assert b"layer" not in blob
    assert len(encode(base._replace(version=1), base)) < 200


@pytest.mark.parametrize(("step", "kind"), [(1e-6, "delta"), (1e-5, "delta"), (1e-1, "snapshot")])
def test_the_smaller_of_delta_and_snapshot_is_sent(step, kind):
    before = arrays(values=200_000)
    base, new = round_weights(0, before), round_weights(1, moved(before, step))
    delta, snapshot = encode(new, base), encode(new)
    blob, used = smallest(new, base, lambda: snapshot)
    assert len(blob) == min(len(delta), len(snapshot))
    assert used == (0 if kind == "delta" else -1)
    same(decode(blob, base if used == 0 else None), new)


def test_other_tensors_are_sent_whole():
    base = round_weights(0, arrays())
    for change in (
        {"weight": np.zeros((7, 300), np.float32)},
        {"more": np.zeros(3, np.float32)},
        {"count": np.array(3, np.int32)},
    ):
        new = round_weights(1, {**arrays(), **change})
        assert smallest(new, base, lambda new=new: encode(new))[1] == -1
        with pytest.raises(WrongBase):
            encode(new, base)
    with pytest.raises(WireError, match="complex"):
        round_weights(1, {"a": np.zeros(3, np.complex64)})


def test_another_base_is_refused_by_name():
    first, second = round_weights(1, arrays(1)), round_weights(2, arrays(2))
    new = round_weights(3, moved(arrays(2)))
    blob = encode(new, second)
    for wrong in (None, first, second._replace(version=1), second._replace(checksum=5)):
        with pytest.raises(WrongBase, match="version 3 are the difference to version 2"):
            decode(blob, wrong)
    liar = first._replace(version=second.version, checksum=second.checksum)
    with pytest.raises(WireError, match="version 3 arrived damaged"):
        decode(blob, liar)


@pytest.mark.parametrize("kind", ["snapshot", "difference"])
def test_every_flipped_and_missing_byte_is_noticed(kind):
    before = {"a": np.arange(2000, dtype=np.float32), "b": np.array([1, 2])}
    base = round_weights(0, before)
    new = round_weights(1, {**before, "a": before["a"] * 1.001})
    base = None if kind == "snapshot" else base
    blob = encode(new, base)
    for index in range(len(blob)):
        damaged = bytearray(blob)
        damaged[index] ^= 1 << (index % 8)
        with pytest.raises(WireError):
            decode(damaged, base)
        with pytest.raises(WireError):
            decode(blob[:index], base)
    with pytest.raises(WireError):
        decode(blob + b"x", base)
    same(decode(blob, base), new)


def test_a_hostile_sender_gets_no_further_than_an_error():
    """Blobs with a right digest and a wrong content: sizes, shapes, forms, names, bodies."""
    import msgpack
    import zstandard

    from twinrl.core.checksum import digest

    def make(head, body):
        packed = msgpack.packb(head)
        front = b"TWD1" + len(packed).to_bytes(4, "little") + packed + body
        return front + digest(front).to_bytes(8, "little")

    good = {"version": 1, "checksum": 0, "base": -1, "base_checksum": 0, "tensors": []}
    empty = zstandard.compress(b"")
    bomb = zstandard.compress(bytes(1 << 20))
    rows = [
        [["a", "bf16", [1 << 62]]],
        [["a", "bf16", [-1]]],
        [["a", "O", [1]]],
        [["a", "<f8", [1 << 40, 1 << 40]]],
        [["a", "(2,2)f4", [1]]],
        [["a", ["<f4"], [1]]],
        [[1, "<f4", [1]]],
        [["a", "<f4"]],
        ["a"],
        7,
        [["a", "<f4", "xy"]],
        [["a", "<f4", [1] * 100]],
    ]
    heads = [{**good, "tensors": r} for r in rows]
    heads += [{**good, "version": None}, {**good, "base": "x"}, {}, [], 3, {**good, "checksum": 9}]
    for head in heads:
        for body in (empty, bomb, b"", b"not zstd"):
            with pytest.raises(WireError):
                decode(make(head, body))
    with pytest.raises(WireError, match="allowed are 100"):
        decode(encode(round_weights(0, {"a": np.zeros(200, np.float32)})), limit=100)
    base = round_weights(0, arrays())
    head = {**good, "base": 0, "base_checksum": base.checksum, "tensors": [["other", "<f4", [1]]]}
    with pytest.raises(WireError, match="which its base does not have"):
        decode(make(head, zstandard.compress(bytes(4))), base)


def test_the_example_of_the_documentation():
    """A decoder written from docs/weights.md alone gets the same."""
    import struct

    import msgpack
    import xxhash
    import zstandard

    before = arrays()
    base, new = round_weights(6, before), round_weights(7, moved(before))
    blob = encode(new, base)
    assert blob[:4] == b"TWD1"
    (length,) = struct.unpack_from("<I", blob, 4)
    assert int.from_bytes(blob[-8:], "little") == xxhash.xxh3_64_intdigest(blob[:-8])
    head = msgpack.unpackb(blob[8 : 8 + length])
    assert (head["version"], head["base"]) == (7, 6)
    assert head["base_checksum"] == base.checksum
    [[name, form, shape]] = head["tensors"]
    assert (name, form, shape) == ("weight", "bf16", [500, 10])
    plain = zstandard.decompress(blob[8 + length : -8])
    words = [plain[i] | plain[5000 + i] << 8 for i in range(5000)]
    old = base.tensors["weight"].ravel().tolist()
    now = np.array([a ^ b for a, b in zip(words, old, strict=True)], np.uint16).reshape(500, 10)
    np.testing.assert_array_equal(now, new.tensors["weight"])
    state = xxhash.xxh3_64()
    for name in sorted(new.tensors):
        tensor = new.tensors[name]
        state.update(f"{name}|{new.forms[name]}|{tensor.shape}|".encode())
        if tensor.size:  # one block each: they are smaller than 8 MiB
            state.update(xxhash.xxh3_64_intdigest(tensor.tobytes()).to_bytes(8, "little"))
    assert state.intdigest() == head["checksum"]


def test_restored_weights_have_a_checksum_of_their_own():
    new = round_weights(1, arrays())
    assert checksum(restore(new)) == checksum(restore(decode(encode(new))))
