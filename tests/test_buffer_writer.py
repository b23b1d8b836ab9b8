"""How segments come in and go: both ways of writing, full queues, quotas, removers, leases, deletion."""

import contextlib
import time

import numpy as np
import pytest

from buffer_service.entry import CUT, LEASE, OPEN
from buffer_service.files import path_of
from buffer_service.testing import segment
from twinrl.core.errors import ConfigError, DeadlineError, Rejected
from twinrl.core.sockets import wait_until

pytestmark = pytest.mark.timeout(180)
STEPS = 8


def write(writer, first: int, last: int, **options) -> None:
    for number in range(first, last):
        writer.write(*segment(number * STEPS, STEPS, **options))


def numbers(segments) -> list[int]:
    """Which segments these are, by their values."""
    return [int(each.columns["action"][0, 0]) // STEPS for each in segments]


def ids(reader, **which) -> list[int]:
    return [entry.id for entry in reader.entries(**which)]


@pytest.mark.parametrize("codec", ["raw", "zstd-delta", "jpeg95"])
@pytest.mark.parametrize("direct", [True, False])
def test_both_ways_store_the_same(bench, direct, codec):
    bench.start()
    writer, reader = bench.writer(direct=direct, codec=codec), bench.reader()
    assert writer.direct == direct == writer.stats()["writer/direct"]
    write(writer, 0, 20, end="truncated")
    writer.flush()
    reader.wait(20)
    assert numbers(reader.segments()) == list(range(20))
    for number, each in enumerate(reader.segments()):
        _, columns = segment(number * STEPS, STEPS, end="truncated")
        for name, column in columns.items():
            apart = np.abs(each.columns[name].astype(float) - column)
            assert apart.max() <= (2 if codec.startswith("jpeg") else 0)
        made = each.header["provenance"]
        assert made["pid"] > 0 and abs(made["time"] - time.time()) < 60
    # Over the socket a source has one file, on the direct way each writer has its own.
    assert bench.service.run_dir.joinpath("replay").glob("*.seg")


def test_ways_mix_and_order_is_kept_across_a_restart(bench):
    service = bench.start()
    reader = bench.reader()
    for turn in range(3):
        writer = bench.writer(direct=turn != 1)
        write(writer, 10 * turn, 10 * turn + 10)
        writer.close()
        if turn == 1:
            service.kill()
            service.start()
    reader.sync()
    assert numbers(reader.segments()) == list(range(30))


def test_a_file_of_a_service_that_is_no_more_takes_nothing(bench):
    """The writer's file was sealed by the restart: what it put there since is put into a new one."""
    service = bench.start()
    writer = bench.writer(window=4)
    write(writer, 0, 3)
    writer.flush()
    (sealed,) = bench.run_dir.joinpath("replay").glob("*.seg")
    service.kill()
    write(writer, 3, 10)
    time.sleep(0.3)  # some of them get into the old file
    service.start()
    writer.flush()
    reader = bench.reader()
    reader.wait(10)
    assert numbers(reader.segments()) == list(range(10))
    assert "lost" not in service.log() and not sealed.stat().st_mode & 0o200


def test_what_is_no_record_is_refused(bench):
    bench.start()
    client = bench.client()
    session = {"writer": "raw", "session": "s"}
    client.call("hello", {"protocol": 2, **session})
    file = client.call("allocate", {**session, "source": "twin", "bytes": 1000})[0]["file"]
    place = {"file": file, "offset": 0, "length": 640, "sequence": 0, "oldest": 0, "source": "twin"}
    with pytest.raises(Rejected, match="no record of 640 bytes"):
        client.call("insert_file", {**session, **place})
    answer, _ = client.call("insert_file", {**session, **place, "offset": 64})
    assert answer == {"refused": True, "expected": 0, "anew": True}
    other = {"writer": "other", "session": "t"}
    answer, _ = client.call("insert_file", {**other, **place})
    assert answer["anew"]


def test_drop_oldest_drops_twins_only_and_counts_them(bench):
    bench.start(limiter={"samples_per_insert": 1.0, "error": 40.0})
    one = sum(column.nbytes for column in segment(0, STEPS)[1].values())
    writer = bench.writer(when_full="drop_oldest", queue_bytes=6 * one, window=1, deadline=1.0)
    count = iter(range(0, 10_000, 10))

    def held() -> bool:
        first = next(count)
        write(writer, first, first + 10)
        return "inserting waits" in writer.stats()["writer/waiting_for"]

    wait_until(held, 20, "the limiter to hold inserts: the queue fills")
    assert writer.stats()["writer/dropped"] > 0
    with pytest.raises(DeadlineError, match=r"room in the queue.*inserting waits"):
        write(writer, 20_000, 20_020, source="real")  # never dropped: the queue stays full of them
    reader = bench.reader(deadline=30.0)
    writer.deadline = 30.0

    def drained() -> bool:
        with contextlib.suppress(
            DeadlineError
        ):  # the last may be in by now, and nothing more to come
            reader.sample(16, chunk=4, deadline=0.5)
        return not writer.stats()["writer/queued_segments"]

    wait_until(drained, 30, "the writer's queue")
    reader.sync()
    found = numbers(reader.segments())
    assert found == sorted(found) and len(found) == len(set(found))
    real = [number for number in found if number >= 20_000]
    assert real == list(range(20_000, 20_000 + len(real))) and len(real) >= 5
    assert [entry.sequence for entry in reader.entries()] == list(range(len(found)))


def test_quotas_never_push_out_another_source(bench):
    size = 1 << 20
    service = bench.start(capacity={"twin": size, "real": size})
    writer, reader = bench.writer(), bench.reader()
    write(writer, 0, 20, source="demo")
    write(writer, 20, 40, source="real")
    write(writer, 1000, 2500, source="twin")
    writer.flush()
    reader.sync()
    assert numbers(reader.segments(source="demo")) == list(range(20))
    assert numbers(reader.segments(source="real")) == list(range(20, 40))
    twins = numbers(reader.segments(source="twin"))
    assert 0 < len(twins) < 1500 and twins == list(range(2500 - len(twins), 2500))
    write(writer, 40, 600, source="real")
    writer.flush()
    service.kill()
    service.start()
    again = bench.reader()
    again.sync()
    assert len(ids(again, source="real")) < 560 and len(ids(again, source="demo")) == 20
    assert numbers(again.segments(source="twin")) == twins  # eviction is durable


def test_the_lowest_priority_goes_and_its_bytes_come_back(bench):
    service = bench.start(capacity=4 << 20, remover="lowest_priority")
    writer, reader = bench.writer(), bench.reader()
    client = bench.client()
    write(writer, 0, 500)
    writer.flush()
    reader.sync()
    kept = ids(reader)[::5]
    dull = [id for id in ids(reader) if id not in kept]
    for part in (kept, dull):
        value = 9.0 if part is kept else 0.5
        client.call("priorities", {"ids": part, "values": [value] * len(part)})
    write(writer, 1000, 1700)
    writer.flush()
    reader.sync()
    left = ids(reader)
    assert set(kept) <= set(left) and len(set(dull) & set(left)) < len(dull) // 2
    folder = bench.run_dir / "replay"
    # What is kept lay strewn over all files; they were rewritten, and hold little else now.
    on_disk = sum(path.stat().st_size for path in folder.glob("*.seg"))
    assert on_disk < 3 * (4 << 20)
    service.kill()
    service.start()
    again = bench.reader()
    again.sync()
    assert ids(again) == left
    for each in again.segments():
        first = each.columns["action"][0, 0]
        assert (
            each.columns["observation.images.front"][:, 0, 0, 0] == (first + np.arange(9)) % 251
        ).all()
    read = client.call("priorities_read", {"after": 0})[0]
    assert {9.0} == {v for id, v in zip(read["ids"], read["values"], strict=True) if id in kept}


def test_what_is_deleted_stays_deleted(bench):
    service = bench.start()
    writer, reader = bench.writer(), bench.reader()
    write(writer, 0, 10, source="real")
    writer.flush()
    reader.sync()
    gone = ids(reader)[2:5]
    client = bench.client()
    assert client.call("delete", {"ids": [*gone, 999]})[0] == {"deleted": 3}
    wait_until(lambda: len(ids(reader)) == 7, 10, "the reader to hear of it")
    service.kill()
    service.start()
    again = bench.reader()
    again.sync()
    assert numbers(again.segments()) == [0, 1, 5, 6, 7, 8, 9]


def test_a_dead_writers_episode_is_closed_and_a_living_ones_is_not(bench):
    service = bench.start(lease=5.0)
    dead, living, reader = bench.writer("dead"), bench.writer("living"), bench.reader()
    for writer, name in ((dead, "a"), (living, "b")):
        writer.write(*segment(0, STEPS, episode=name))
        writer.write(*segment(STEPS, STEPS, episode=name, first_step=STEPS))
        writer.flush()
    with dead._changed:  # as after kill -9: not another word
        dead._stop = True
        dead._changed.notify_all()
    dead._client.close()

    def entries(writer: str) -> list:
        return [entry for entry in reader.entries() if entry.writer == writer]

    wait_until(lambda: len(entries("dead")) == 2 and entries("dead")[1].marked, 40, "the mark")
    first, second = entries("dead")
    assert (first.end, first.marked) == (OPEN, "") and (second.end, second.marked) == (CUT, LEASE)
    assert all(entry.end == OPEN for entry in entries("living"))
    assert "episode a is closed as truncated after 16 steps" in service.log()
    service.kill()
    service.start()
    again = bench.reader()
    again.sync()
    assert [e.marked for e in again.entries() if e.writer == "dead"] == ["", LEASE]
    write(living, 2, 4)  # the living one goes on, lease or no lease
    living.flush()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"when_full": "wait"}, "when_full is 'wait'"),
        ({"codec": "zip"}, "codec 'zip'"),
    ],
)
def test_wrong_settings_are_named(bench, options, match):
    bench.start()
    with pytest.raises(ConfigError, match=match):
        bench.writer(**options)


def test_a_full_disk_loses_nothing(bench, monkeypatch):
    bench.start()
    writer = bench.writer(deadline=30.0)
    write(writer, 0, 2)
    writer.flush()
    files, full = writer._files, [True]
    put = files.put

    def no_room(*args):
        if full[0]:
            raise OSError(28, "No space left on device")
        return put(*args)

    monkeypatch.setattr(files, "put", no_room)
    write(writer, 2, 6)
    with pytest.raises(DeadlineError, match="No space left on device"):
        writer.flush(0.5)
    full[0] = False
    writer.flush()
    reader = bench.reader()
    reader.wait(6)
    assert numbers(reader.segments()) == list(range(6))
    assert path_of(bench.run_dir / "replay", 1).exists()
