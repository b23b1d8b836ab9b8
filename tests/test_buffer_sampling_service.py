"""Sampling from a running service: no torn reads, priorities that last, whole episodes, rows over the network."""

import threading
import time

import numpy as np
import pytest

from buffer_service.client import Cursor, Draw, Prefetcher, Reader, Writer
from buffer_service.testing import SCHEMA, segment
from twinrl.core.errors import DeadlineError, Rejected, TwinRLError
from twinrl.core.segment import IMAGE_PREFIX
from twinrl.core.sockets import wait_until

pytestmark = pytest.mark.timeout(90)
STEPS = 8
CHUNK = 4


def write(writer: Writer, first: int, last: int, **options) -> None:
    """Segments whose values say their number: f(number * STEPS + step)."""
    for number in range(first, last):
        writer.write(*segment(number * STEPS, STEPS, **options))


def remote(bench, **options) -> Reader:
    """A reader that sees no files, as on another host."""
    return bench.reader(run_dir=bench.run_dir / "elsewhere", **options)


def assert_whole(batch, cameras=SCHEMA.cameras) -> None:
    """Every row's columns belong together: they all say f(t) of one window, which `action` names."""
    first = batch["action"][:, 0, 0].astype(np.int64)
    offsets, lengths = np.arange(batch["action"].shape[1]), batch["steps"]
    mask = offsets < lengths[:, None]
    steps = first[:, None] + offsets
    assert (batch["step_mask"] == mask).all()
    assert (batch["action"] == (steps * mask)[..., None]).all()
    assert np.allclose(batch["reward"], steps * mask / 10)
    for prefix, at in (("", first), ("next.", first + lengths)):
        assert (batch[prefix + "observation.state"] == at[:, None]).all()
        for camera in cameras:
            images = batch[prefix + IMAGE_PREFIX + camera]
            assert (images == (at % 251)[:, None, None, None]).all()


@pytest.mark.parametrize(
    ("kind", "codec", "store"),
    [
        ("mapped", "raw", "files"),
        ("mapped", "lz4", "files"),
        ("mapped", "raw", "redis"),
        ("segments", "raw", "files"),
        ("rows", "raw", "files"),
        ("rows", "zstd-delta", "redis"),
    ],
)
def test_no_batch_is_torn_while_segments_come_and_go(bench, kind, codec, store):
    """A replay of a few segments, so that most are evicted between being chosen and being read."""
    schema = SCHEMA._replace(image_size=48)
    bench.start(schema=schema, capacity=2 << 20, store=store, cache_mb=8)
    written, stop, failures = [0], threading.Event(), []

    def produce(writer: Writer, offset: int) -> None:
        number = offset
        try:
            while not stop.is_set():
                end = "truncated" if number % 4 == 3 else ""
                episode = f"{offset} {number // 4}"
                options = {"schema": schema, "episode": episode, "end": end}
                writer.write(*segment(number * STEPS, STEPS, **options))
                written[0] += 1
                number += 1
        except TwinRLError as error:
            failures.append(error)

    writers = [
        bench.writer(f"w{n}", schema=schema, codec=codec, queue_bytes=1 << 20) for n in range(2)
    ]
    if kind == "mapped":
        reader = bench.reader()
    else:
        reader = remote(bench, cache_bytes=1 << 16 if kind == "rows" else 1 << 30)
    threads = [
        threading.Thread(target=produce, args=(writer, 100_000 * n))
        for n, writer in enumerate(writers)
    ]
    for thread in threads:
        thread.start()
    try:
        reader.wait(4)
        ids, end, batch, batches, crossings = set(), time.monotonic() + 1.5, None, 0, 0
        while time.monotonic() < end or len(ids) < 60:
            batch = reader.sample(64, chunk=CHUNK, out=batch)
            assert_whole(batch)
            ids.update(batch["segment"].tolist())
            batches += 1
            # Counted over all batches: one batch may find only segments whose next is not there yet.
            crossings += int((batch["step"] + batch["steps"] > STEPS).sum())
            assert time.monotonic() < end + 60
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert batches > 3 and crossings
    assert len(reader.entries()) < written[0], "segments were evicted"


def test_a_reader_elsewhere_draws_the_same_batches(bench):
    bench.start()
    writer = bench.writer()
    for number in range(30):
        write(
            writer,
            number,
            number + 1,
            episode=f"{number // 3}",
            end="truncated" * (number % 3 == 2),
        )
    writer.flush()
    readers = [
        bench.reader(seed=5),
        remote(bench, seed=5),
        remote(bench, seed=5, cache_bytes=1 << 10),
        remote(bench, seed=5, cache_bytes=1 << 10, codec="zstd"),
    ]
    for reader in readers:
        reader.wait(30)
    for _ in range(3):
        batches = [reader.sample(50, chunk=6, mix=[Draw(by="fresh")]) for reader in readers]
        assert_whole(batches[0])
        for batch in batches[1:]:
            assert batch.keys() == batches[0].keys()
            assert all((batch[name] == batches[0][name]).all() for name in batch)
    whole, rows, packed = (reader.stats() for reader in readers[1:])
    assert packed["reader/fetched_bytes"] < rows["reader/fetched_bytes"]
    assert whole["reader/cached_bytes"] > 0 and rows["reader/cached_bytes"] == 0
    assert rows["reader/fetched_bytes"] > 0
    out = readers[2].sample(50, chunk=6)
    again = readers[2].sample(50, chunk=6, out=out)
    assert again["action"] is out["action"]
    assert_whole(again)


def test_rows_of_segments_that_are_gone_are_drawn_again(bench):
    bench.start()
    writer = bench.writer()
    write(writer, 0, 10)
    reader = remote(bench, cache_bytes=1)
    reader.wait(10)
    client = bench.client()
    ids = [entry.id for entry in reader.entries()]
    answer, arrays = client.call("rows", {"windows": [[ids[0], 0, 4, 0]], "chunk": 4})
    assert answer["missing"] == [] and arrays["action"].shape == (1, 4, 7)
    client.call("delete", {"ids": ids[:8]})
    answer, arrays = client.call("rows", {"windows": [[ids[0], 0, 4, 0]], "chunk": 4})
    assert answer["missing"] == [ids[0]] and not arrays
    batch = reader.sample(64, chunk=4)
    assert set(batch["segment"].tolist()) == set(ids[8:])
    with pytest.raises(Rejected, match="has no steps"):
        client.call("rows", {"windows": [[ids[8], 7, 4, 0]], "chunk": 4})


def test_priorities_last_over_a_restart_of_the_service(bench):
    service = bench.start()
    writer = bench.writer()
    write(writer, 0, 12, end="truncated")
    writer.flush()
    reader = bench.reader()
    reader.wait(12)
    part = [Draw(by="priority", exponent=1.0, importance=0.5)]
    batch = reader.sample(400, mix=part)
    assert (batch["weight"] == 1).all()
    reader.update_priorities(batch, 1.0 + batch["segment"])
    reader.flush_priorities()
    service.kill()
    service.start()
    again = bench.reader()
    again.wait(12)
    for each in (reader, again):
        drawn = each.sample(20_000, mix=part, deadline=30)
        counts = np.bincount(drawn["segment"])[1:]
        share = counts / counts.sum()
        expected = (2 + np.arange(12)) / (2 + np.arange(12)).sum()
        assert np.abs(share - expected).max() < 0.02
        assert drawn["weight"].max() == 1 and drawn["weight"].min() < 0.5
    with pytest.raises(ValueError, match="finite"):
        reader.update_priorities(batch, np.full(400, np.nan))
    with pytest.raises(ValueError, match="priorities for a batch of 400"):
        reader.update_priorities(batch, np.ones(3))


def test_trajectories_are_whole_episodes_only(bench):
    bench.start()
    writer, reader = bench.writer(), bench.reader()

    def episode(name, numbers, first_step=0, end="truncated", **options):
        for number in numbers:
            header, columns = segment(
                number * STEPS, STEPS, episode=name, end=end * (number == numbers[-1]), **options
            )
            header["first_step"] = first_step + (number - numbers[0]) * STEPS
            writer.write(header, columns)

    episode("whole", [0, 1, 2])
    episode("without its beginning", [10, 11], first_step=8)
    episode("goes on", [20, 21], end="")
    episode("of demonstrations", [30], source="demo", end="terminated")
    writer.flush()
    reader.wait(8)
    found = [[int(s.columns["action"][0, 0]) // STEPS for s in t] for t in reader.trajectories()]
    assert found == [[0, 1, 2], [30]]
    (only,) = reader.trajectories(source="demo")
    assert only[0].header["episode"] == "of demonstrations"
    assert list(reader.trajectories(success=True)) == []
    assert len(list(reader.trajectories(success=False))) == 2


def test_an_episode_closed_for_a_dead_writer_is_read_as_truncated(bench):
    bench.start(lease=1.0)
    writer, reader = bench.writer(), bench.reader()
    write(writer, 0, 1, episode="cut short")
    writer.flush()
    cursor = Cursor(reader, "ppo")
    assert len(cursor.take()) == 1
    writer.close()
    (entry,) = wait_until(
        lambda: [e for e in reader.entries() if e.marked == "lease"], 30, "the lease to end"
    )
    (whole,) = reader.load([entry])
    assert whole.columns["truncated"].tolist() == [False] * 7 + [True] and whole.header["last"]
    batch = reader.sample(100, chunk=4)
    assert (batch["truncated"] == (batch["step"] + batch["steps"] == STEPS)).all()
    assert batch["truncated"].any()
    with pytest.raises(DeadlineError, match="0 are there"):  # changed, but not new
        cursor.take(timeout=0.2)
    assert len(next(reader.trajectories(), [])) == 1


def test_the_cursor_takes_nothing_twice_though_the_service_numbers_anew(bench):
    bench.start()
    writer, reader = bench.writer(), bench.reader()
    write(writer, 0, 5)
    cursor = Cursor(reader, "ppo")
    assert len(cursor.take(min_segments=5)) == 5
    with (
        reader._changed
    ):  # as after a crash that lost index entries: the same segments, higher numbers
        entry = reader.entries()[-1]
        reader._index.put(entry._replace(id=entry.id + 100))
    with pytest.raises(DeadlineError, match="0 are there"):
        cursor.take(timeout=0.1)
    cursor.position = 0
    assert len(cursor.take(min_segments=5)) >= 5


def test_batches_are_made_ahead_and_stay_good_until_the_next_is_asked_for(bench):
    bench.start()
    write(bench.writer(), 0, 40)
    reader = bench.reader()
    reader.wait(40)
    with Prefetcher(reader, 32, depth=2, chunk=4, seed=3) as batches:
        arrays = set()
        for _, batch in zip(range(20), batches, strict=False):
            assert_whole(batch)
            before = batch["action"].copy()
            wait_until(lambda: batches.stats()["prefetch/ready"] == 2, 10, "two batches ahead")
            assert (batch["action"] == before).all()
            arrays.add(id(batch["action"]))
        assert len(arrays) <= 4, "the same few arrays over and over"
        stats = batches.stats()
        assert stats["prefetch/batches"] == 20 and 0 <= stats["prefetch/data_wait"] <= 1
        assert stats["prefetch/wait_s"] > 0
    assert not any(thread.is_alive() for thread in batches._threads)
    with pytest.raises(TwinRLError, match="closed"):
        for _ in range(5):
            next(batches)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_prefetches_the_same(bench, threads):
    bench.start()
    write(bench.writer(), 0, 20)
    reader = bench.reader() if threads == 1 else remote(bench, cache_bytes=1)
    reader.wait(20)
    drawn = []
    for _ in range(2):
        with Prefetcher(reader, 16, depth=3, seed=7, threads=threads) as batches:
            drawn.append([next(batches)["action"].copy() for _ in range(5)])
    assert all((a == b).all() for a, b in zip(*drawn, strict=True))


def test_what_goes_wrong_in_the_prefetcher_reaches_its_consumer(bench):
    bench.start()
    reader = bench.reader()
    with Prefetcher(reader, 8, deadline=1.5) as batches:
        with pytest.raises(DeadlineError, match="a window of 4 steps from any source"):
            next(batches)
        write(bench.writer(), 0, 5)  # an empty replay was no reason to give up
        assert_whole(wait_until(lambda: _next(batches), 20, "a batch"))
    with (
        Prefetcher(reader, 8, mix={"moon": 1.0}) as batches,
        pytest.raises(ValueError, match="moon"),
    ):
        next(batches)
    with pytest.raises(ValueError, match="depth=0"):
        Prefetcher(reader, 8, depth=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        reader.sample(0)


def _next(batches):
    try:
        return next(batches)
    except DeadlineError:
        return None


def test_sampling_goes_on_through_a_restart_of_the_service(bench):
    """What is mapped needs no service; what comes after the restart is found."""
    service = bench.start()
    writer = bench.writer()
    write(writer, 0, 10)
    writer.flush()
    reader = bench.reader()
    reader.wait(10)
    reader.sample(4)
    service.kill()
    for _ in range(20):
        assert_whole(reader.sample(32, chunk=4))
    service.start()
    write(writer, 10, 20)
    writer.flush()
    reader.wait(20)
    batch = reader.sample(2000, chunk=4)
    assert_whole(batch)
    assert len(set(batch["segment"].tolist())) == 20
