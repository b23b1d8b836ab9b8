"""Records, segment files and windows, without processes."""

import os

import numpy as np
import pytest

from buffer_service import record
from buffer_service.entry import Entry, describe
from buffer_service.files import MappedFiles, SegmentFiles, path_of
from buffer_service.limiter import RateLimiter
from buffer_service.sampler import Windows, gather, split, window_starts
from buffer_service.testing import segment
from twinrl.core.errors import ConfigError, Rejected, WireError
from twinrl.core.segment import Segment


def stored(first: int = 0, steps: int = 8, id: int = 1, **options) -> tuple[Entry, Segment]:
    header, columns = segment(first, steps, **options)
    whole = Segment({**header, "writer": "w", "sequence": id}, columns)
    return describe(id, whole, 1, 0, 64), whole


def test_record_keeps_every_byte_and_aligns_columns():
    _, original = stored(5)
    buffers, length = record.encode(*original)
    raw = b"".join(buffers)
    assert len(raw) == length and length % 64 == 0
    place = np.zeros(length + 64, np.uint8)
    start = -place.ctypes.data % 64
    place[start : start + length] = np.frombuffer(raw, np.uint8)
    copy = record.decode(place[start : start + length], verify=True)
    assert copy.header == original.header
    for name, column in original.columns.items():
        assert (copy.columns[name] == column).all() and copy.columns[name].dtype == column.dtype
        assert copy.columns[name].ctypes.data % 64 == 0
        assert not copy.columns[name].flags.writeable


@pytest.mark.parametrize("place", [0, 60, -70])
def test_damage_anywhere_is_noticed(place):
    raw = bytearray(b"".join(record.encode(*stored()[1])[0]))
    raw[place] ^= 1
    with pytest.raises(WireError):
        record.decode(bytes(raw), verify=True)


def test_objects_are_not_stored():
    with pytest.raises(WireError, match="dtype object"):
        record.encode({}, {"action": np.array([None])})


def test_files_roll_are_sealed_and_scanned(tmp_path):
    files = SegmentFiles(tmp_path)
    segments = [stored(n, id=n)[1] for n in range(1, 9)]
    places = [files.append(each, 20_000) for each in segments]
    mapped = MappedFiles(tmp_path)
    for each, (file, offset, _) in zip(segments, places, strict=True):
        assert mapped.segment(file, offset).header == each.header
    files.close()
    found = list(SegmentFiles(tmp_path).scan())
    assert [(f.file, f.offset, f.length) for f in found] == places
    assert all(f.sealed for f in found) and len(files.numbers()) > 1


def test_scan_stops_at_a_torn_record(tmp_path):
    files = SegmentFiles(tmp_path)
    places = [files.append(stored(n, id=n)[1]) for n in (1, 2, 3)]
    number, offset, length = places[2]
    with open(path_of(tmp_path, number), "r+b") as file:  # the process died within the third
        file.seek(offset + length - 64)
        file.write(b"\xff" * 64)
    assert [(f.file, f.offset, f.length) for f in SegmentFiles(tmp_path).scan()] == places[:2]
    assert os.path.getsize(path_of(tmp_path, number)) == offset


def test_a_failed_write_leaves_no_trace(tmp_path, monkeypatch):
    files = SegmentFiles(tmp_path)
    first = files.append(stored(1)[1])

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        with pytest.raises(OSError):
            files.append(stored(2)[1])
    second = files.append(stored(2)[1])
    found = [(f.file, f.offset, f.length) for f in SegmentFiles(tmp_path).scan()]
    assert found == [first, second]


@pytest.mark.parametrize(
    ("end", "frames", "expected"),
    [
        ("", None, [0, 1, 2, 3, 4]),
        ("truncated", None, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("", [0, 4, 8], [0, 4]),
        ("", [0, 4], [0]),
        ("terminated", [0, 4], [0, 4]),
        ("terminated", [0, 4, 6], [0, 4, 6]),
        ("truncated", [0, 4, 6], [0]),
        ("", [2, 5], []),
    ],
)
def test_where_windows_start(end, frames, expected):
    entry, _ = stored(0, 8, end=end, frames=frames)
    assert list(window_starts(entry, 4)) == expected


def test_windows_carry_the_right_steps_and_masks():
    table, segments = Windows(4, "twin", None, None), {}
    cases = {1: {"end": "terminated"}, 2: {"end": "truncated"}, 3: {"frames": [0, 3, 4, 7, 8]}}
    for id, options in cases.items():
        entry, segments[id] = stored(100 * id, 8, id=id, **options)
        table.add(entry)
    assert len(table) == 8 + 8 + 3
    windows = table.draw(400, np.random.default_rng(0), None)
    batch = gather(windows, [segments[w.entry.id] for w in windows], 4)
    first = 100 * batch["segment"] + batch["step"]
    offsets = np.arange(4)
    lengths = np.where(batch["segment"] == 3, 4, np.minimum(4, 8 - batch["step"]))
    mask = offsets < lengths[:, None]
    assert (batch["steps"] == lengths).all() and (batch["step_mask"] == mask).all()
    steps = first[:, None] + offsets
    assert (batch["action"][..., 3] == steps * mask).all()
    assert np.allclose(batch["reward"], steps * mask / 10)
    assert (batch["intervention"] == ((steps % 3 == 0) & mask)).all()
    assert (batch["observation.state"][:, 0] == first).all()
    assert (batch["next.observation.state"][:, 2] == first + lengths).all()
    assert (batch["observation.images.front"][:, 1, 2, 0] == first % 251).all()
    assert (batch["next.observation.images.wrist"][:, 0, 0, 1] == (first + lengths) % 251).all()
    last = batch["step"] + lengths == 8
    assert (batch["terminated"] == (last & (batch["segment"] == 1))).all()
    assert (batch["truncated"] == (last & (batch["segment"] == 2))).all()
    assert len({(w.entry.id, w.start) for w in windows}) == 19, "every window is drawn some time"


def test_a_terminal_state_without_frame_shows_the_last_one():
    entry, whole = stored(40, 8, end="terminated", frames=[0, 4])
    table = Windows(4, "twin", None, None)
    table.add(entry)
    windows = [w for w in table.draw(50, np.random.default_rng(0), None) if w.start == 4]
    batch = gather(windows, [whole] * len(windows), 4)
    assert (batch["next.observation.images.front"] == 44).all() and batch["terminated"].all()
    assert (batch["next.observation.state"] == 48).all()


def test_a_given_batch_is_filled_in_place():
    entry, whole = stored(0, 8)
    table = Windows(4, "twin", None, None)
    table.add(entry)
    windows = table.draw(3, np.random.default_rng(0), None)
    out = gather(windows, [whole] * 3, 4)
    again = gather(windows[::-1], [whole] * 3, 4, out)
    assert again["action"] is out["action"]
    assert again["step"].tolist() == [w.start for w in windows[::-1]]


def test_newest_and_removed_segments():
    table = Windows(4, "twin", None, None)
    for id in range(1, 6):
        table.add(stored(0, 8, id=id)[0])
    table.remove(5)
    drawn = table.draw(200, np.random.default_rng(0), 2)
    assert {w.entry.id for w in drawn} == {3, 4}


def test_mix_is_kept_and_shares_of_empty_sources_go_to_the_others():
    generator = np.random.default_rng(0)
    mix = {"demo": 0.25, "twin": 0.25, "real": 0.5}
    sizes = {"demo": 5, "twin": 100, "real": 1}
    assert split(8, mix, sizes, generator) == {"demo": 2, "twin": 2, "real": 4}
    totals = dict.fromkeys(mix, 0)
    for _ in range(2000):
        for source, count in split(5, mix, sizes, generator).items():
            totals[source] += count
    assert sum(totals.values()) == 10_000
    assert abs(totals["demo"] - 2500) < 100 and abs(totals["real"] - 5000) < 100
    assert split(6, mix, {**sizes, "real": 0}, generator) == {"demo": 3, "twin": 3}


def test_limiter_refuses_what_can_deadlock_and_says_why():
    with pytest.raises(ConfigError, match=r"can deadlock.*at least 512"):
        RateLimiter(samples_per_insert=4, error=100, largest_batch=1024)
    with pytest.raises(ConfigError, match="must be positive"):
        RateLimiter(samples_per_insert=0)
    limiter = RateLimiter(samples_per_insert=4, error=512, largest_batch=1024)
    with pytest.raises(Rejected, match="could never be sampled"):
        limiter.why_not_sample(1025)


@pytest.mark.parametrize("ratio", [0.3, 1.0, 7.0])
def test_limiter_never_stops_both_sides(ratio):
    """Whatever the order of inserts and samples, one of both may always go on, and the ratio is kept."""
    limiter = RateLimiter(ratio, min_size=50, error=max(40, ratio), largest_batch=64)
    generator = np.random.default_rng(0)
    for _ in range(3000):
        may_insert, may_sample = not limiter.why_not_insert(), not limiter.why_not_sample(64)
        assert may_insert or may_sample
        if may_insert and (not may_sample or generator.random() < 0.5):
            limiter.inserted += 20
        else:
            limiter.sampled += 64
    bound = ratio * 50 + limiter.error + 64 + 20 * ratio
    assert abs(limiter.difference) <= bound
