"""Records, segment files and the limiter, without processes."""

import os

import numpy as np
import pytest

from buffer_service import record
from buffer_service.entry import Entry, describe
from buffer_service.files import MappedFiles, SegmentFiles, path_of
from buffer_service.limiter import RateLimiter
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
