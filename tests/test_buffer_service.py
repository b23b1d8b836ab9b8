"""The replay service over real sockets and a real Redis: exactly once, in order, whatever is killed."""

import contextlib
import os
import threading

import numpy as np
import pytest

from buffer_service.client import Cursor, Writer
from buffer_service.embedded_redis import EmbeddedRedis
from buffer_service.file_store import FileStore
from buffer_service.files import path_of
from buffer_service.redis_address import connect
from buffer_service.testing import SCHEMA, ServiceProcess, runs, segment
from twinrl.core.errors import ConfigError, DeadlineError, Rejected, ResumeError, TwinRLError
from twinrl.core.keys import Keys, create_keys
from twinrl.core.segment import Segment
from twinrl.core.sockets import Client, wait_until

pytestmark = pytest.mark.timeout(180)
STEPS = 8


def numbers(segments) -> list[int]:
    """Which segments these are, by their values."""
    return [int(each.columns["action"][0, 0]) // STEPS for each in segments]


def write(writer: Writer, first: int, last: int, **options) -> None:
    for number in range(first, last):
        writer.write(*segment(number * STEPS, STEPS, **options))


def insert(client: Client, sequence: int, **args) -> dict:
    header, columns = segment(sequence * STEPS, STEPS)
    header.update(writer="raw", sequence=sequence)
    return client.call("insert", {"header": header, **args}, columns)[0]


def test_what_is_acknowledged_is_read_unchanged(bench):
    bench.start()
    writer, reader = bench.writer(), bench.reader()
    for source, first in (("demo", 0), ("twin", 10), ("real", 20)):
        write(writer, first, first + 10, source=source, end="truncated")
    writer.flush()
    reader.wait(30)
    assert reader.mapped
    assert numbers(reader.segments()) == list(range(30))
    assert numbers(reader.segments(source="real", newest=2)) == [28, 29]
    assert numbers(reader.segments(task="other")) == []
    for number, each in enumerate(reader.segments()):
        header, columns = segment(number * STEPS, STEPS, end="truncated")
        assert each.header["episode"] == header["episode"] and each.header["sequence"] == number
        assert all((each.columns[name] == column).all() for name, column in columns.items())
    batch = reader.sample(64, chunk=4, mix={"demo": 0.25, "twin": 0.25, "real": 0.5})
    assert np.bincount(batch["source"]).tolist() == [16, 16, 32]
    first = batch["action"][:, 0, 0].astype(int)
    assert (first // STEPS // 10 == batch["source"]).all()
    assert (batch["observation.images.front"][:, 0, 0, 0] == first % 251).all()
    sizes = reader.info()["sizes"]
    assert sizes["real/lift/id"]["transitions"] == 10 * STEPS


def test_a_reader_without_the_files_fetches(bench, tmp_path):
    bench.start()
    write(bench.writer(), 0, 40)
    reader = bench.reader(run_dir=tmp_path / "elsewhere", cache_bytes=1 << 16)
    reader.wait(40)
    assert not reader.mapped
    assert numbers(reader.segments()) == list(range(40))
    batch = reader.sample(128, chunk=4)
    assert (batch["action"][:, 0, 0] == batch["observation.state"][:, 0]).all()
    assert reader.stats()["reader/fetched_bytes"] > 0


def test_repeats_are_dropped_also_after_a_restart(bench):
    service = bench.start()
    client = bench.client()
    assert insert(client, 0) == {"acknowledged": 0, "repeated": False, "hold": False}
    assert insert(client, 0)["repeated"]
    insert(client, 1)
    service.kill()
    service.start()
    assert insert(bench.client(), 1) == {"acknowledged": 1, "repeated": True, "hold": False}
    reader = bench.reader()
    reader.wait(2)
    assert numbers(reader.segments()) == [0, 1]


def test_gaps_are_refused_unless_the_writer_has_acknowledgements(bench):
    bench.start()
    client = bench.client()
    insert(client, 0, oldest=0)
    assert insert(client, 2, oldest=1) == {"refused": True, "expected": 1}
    assert insert(client, 7, oldest=7)["acknowledged"] == 7


def test_a_restarted_writer_goes_on_numbering_and_ends_its_predecessor(bench):
    bench.start()
    first = bench.writer()
    write(first, 0, 3)
    first.flush()
    second = bench.writer()
    assert second.write(*segment(3 * STEPS, STEPS)) == 3
    second.flush()
    first.write(*segment(99 * STEPS, STEPS))
    with pytest.raises(Rejected, match="taken over by a newer process"):
        first.flush()
    reader = bench.reader()
    reader.wait(4)
    assert numbers(reader.segments()) == [0, 1, 2, 3]


@pytest.mark.parametrize("victim", ["service", "redis", "both"])
def test_every_segment_arrives_once_and_in_order_whoever_is_killed(bench, victim):
    service = bench.start()
    writers = [bench.writer(f"w{n}", window=8, direct=n == 0) for n in range(2)]
    reader = bench.reader()
    count, failures = 150, []

    def produce(writer: Writer, offset: int) -> None:
        try:
            write(writer, offset, offset + count)
            writer.flush()
        except TwinRLError as error:
            failures.append(error)

    threads = [
        threading.Thread(target=produce, args=(writer, 1000 * n))
        for n, writer in enumerate(writers)
    ]
    for thread in threads:
        thread.start()
    reader.wait(20)
    if victim in ("redis", "both"):
        service.kill_redis()
    if victim in ("service", "both"):
        service.kill()
        service.start()
    for thread in threads:
        thread.join()
    assert not failures
    reader.wait(2 * count)
    found = numbers(reader.segments())
    for n in range(2):
        assert [f for f in found if f // 1000 == n] == list(range(1000 * n, 1000 * n + count))
    assert len(found) == 2 * count
    assert "lost" not in service.log()


def test_a_clean_end_leaves_nothing_to_repair(bench):
    service = bench.start()
    writer = bench.writer()
    write(writer, 0, 5)
    writer.close()
    redis_pid = int((bench.run_dir / "redis" / "redis.pid").read_text())
    assert service.stop() == 0
    assert not runs(redis_pid)
    service.start()
    reader = bench.reader()
    reader.wait(5)
    assert numbers(reader.segments()) == [0, 1, 2, 3, 4]
    assert "no index entry" not in service.log() and "lost" not in service.log()


def test_redis_ends_with_a_killed_service(bench):
    service = bench.start()
    pid = int((bench.run_dir / "redis" / "redis.pid").read_text())
    service.kill()
    wait_until(lambda: not runs(pid), 10, "the end of Redis")


def test_a_second_service_on_the_same_run_is_refused(bench):
    bench.start()
    with pytest.raises(RuntimeError, match="another replay service is already serving"):
        ServiceProcess(bench.run_dir)


def test_another_schema_is_rejected_in_one_line(bench):
    bench.start()
    with pytest.raises(Rejected, match=r"replay holds segments of schema .* run\.name"):
        bench.writer(schema=SCHEMA._replace(image_size=16))
    with pytest.raises(Rejected, match="schema"):
        bench.reader(schema=SCHEMA._replace(chunk=8))
    with pytest.raises(Rejected, match="protocol"):
        bench.client().call("hello", {"protocol": 999})
    header, columns = segment(schema=SCHEMA._replace(image_size=16))
    header.update(writer="raw", sequence=0)
    with pytest.raises(Rejected, match=r"observation\.images\.front"):
        bench.client().call("insert", {"header": header}, columns)


def test_a_wrong_key_is_not_let_in(bench, tmp_path):
    service = bench.start()
    create_keys(tmp_path / "other")
    foreign = Keys.load(tmp_path / "other" / "cluster.key")._replace(server=service.keys().server)
    for keys in (foreign, service.keys("robot")):  # robots come through the gateway
        with pytest.raises(DeadlineError, match="no replay service answered"):
            Writer(service.address, keys, "w", schema=SCHEMA, deadline=1.0)


def test_a_full_queue_blocks_and_says_so(bench):
    service = bench.start()
    writer = bench.writer(queue_bytes=3 * 6000, deadline=0.5)
    service.process.send_signal(19)  # SIGSTOP: neither dead nor answering
    try:
        with pytest.raises(DeadlineError, match=r"room in the queue.*acknowledged nothing"):
            write(writer, 0, 50)
        stats = writer.stats()
        taken = stats["writer/queued_segments"] + stats["writer/acknowledged"]
        assert 1 < taken < 50 and writer.stats()["writer/blocked_s"] >= 0
    finally:
        service.process.send_signal(18)
    writer.flush(15)
    reader = bench.reader()
    reader.wait(taken)
    assert numbers(reader.segments()) == list(range(taken))


def test_the_cursor_gives_each_segment_once_and_in_order(bench):
    service = bench.start()
    writer, reader = bench.writer(), bench.reader()
    write(writer, 0, 6)
    cursor = Cursor(reader, "ppo")
    assert numbers(cursor.take(min_segments=6, max_transitions=4 * STEPS)) == [0, 1, 2, 3]
    cursor.commit()
    assert numbers(cursor.take()) == [4, 5]
    write(writer, 6, 8)
    assert numbers(cursor.take(min_segments=2)) == [6, 7]
    service.kill()  # the last two takes were not committed
    service.start()
    cursor = Cursor(reader, "ppo")
    assert numbers(cursor.take(min_segments=4)) == [4, 5, 6, 7]
    assert cursor.stats()["cursor/taken"] == 8
    with pytest.raises(DeadlineError, match="0 are there"):
        cursor.take(timeout=0.1)
    assert numbers(Cursor(reader, "ppo", position=0).take(min_segments=8)) == list(range(8))


def test_the_cursor_skips_and_counts_what_lags(bench):
    bench.start()
    writer, reader = bench.writer(), bench.reader()
    for number in range(10):
        writer.write(*segment(number * STEPS, STEPS, version=number))
    reader.wait(10)
    cursor = Cursor(reader, "ppo")
    assert numbers(cursor.take(current_version=9, max_lag=3)) == [6, 7, 8, 9]
    assert cursor.counts == {"taken": 4, "skipped": 6, "evicted": 0}
    assert len(list(reader.segments())) == 10, "skipped segments stay for off-policy use"


def test_the_limiter_says_who_waits_and_why(bench):
    limiter = {"samples_per_insert": 1.0, "min_size": 16, "error": 64, "largest_batch": 64}
    bench.start(limiter=limiter)
    writer, reader = bench.writer(window=2), bench.reader(name="learner")
    write(writer, 0, 1)
    with pytest.raises(DeadlineError, match=r"learner waited.*8 more inserted transitions"):
        reader.sample(4, chunk=4, deadline=0.3)
    for number in range(1, 40):  # far more than may be inserted without sampling
        writer.write(*segment(number * STEPS, STEPS))
    wait_until(lambda: "writer w waits" in str(reader.info()["waiting"]), 10, "the writer to wait")
    assert "inserting waits until" in str(reader.info()["waiting"])
    wait_until(lambda: "more transitions are sampled" in str(writer.stats()), 10, "its reason")
    held = reader.info()["sizes"]["twin/lift/id"]["transitions"]
    assert 16 + 64 < held < 40 * STEPS
    while writer.stats()["writer/queued_segments"]:
        with contextlib.suppress(DeadlineError):  # the writer may have sent its last meanwhile
            reader.sample(16, chunk=4, deadline=0.5)
    writer.flush()
    counters = reader.info()["counters"]
    assert abs(counters["inserted/twin"] - counters["sampled"]) <= 16 + 64 + 64 + 3 * STEPS


def test_eviction_takes_the_oldest_twins_only(bench):
    big = SCHEMA._replace(image_size=64)
    service = ServiceProcess(bench.run_dir, big, capacity=1 << 20)
    bench.service = service
    writer, reader = bench.writer(schema=big), bench.reader()
    for number in range(60):
        source = ("demo", "twin", "twin", "real")[number % 4]
        writer.write(*segment(number * STEPS, STEPS, source=source, schema=big))
    writer.flush()
    wait_until(lambda: numbers(reader.segments())[-1:] == [59], 10, "the last segment")
    wait_until(lambda: len(reader.entries("twin")) < 5, 10, "the evictions")
    found = numbers(reader.segments())
    kept = [n for n in range(60) if n % 4 in (0, 3)]
    twins = [n for n in range(60) if n % 4 in (1, 2)]
    assert [n for n in found if n in kept] == kept
    left = [n for n in found if n in twins]
    assert left == twins[-len(left) :] and 1 <= len(left) < 5
    files = {entry.file for entry in reader.entries()}

    def dead_files() -> set[int]:
        return {int(path.stem) for path in (bench.run_dir / "replay").glob("*.seg")} - files

    wait_until(lambda: len(dead_files()) <= 1, 10, "the deletion of files without live segments")
    service.kill()
    service.start()
    reader = bench.reader()
    reader.wait(len(found))
    assert numbers(reader.segments()) == found


def test_two_runs_on_one_redis_are_separate(tmp_path):
    server = EmbeddedRedis(tmp_path / "redis")
    redis = server.start()
    stores = []
    try:
        for run in "ab":
            store = FileStore(tmp_path / run, server.connect(), run, SCHEMA)
            store.recover()
            stores.append(store)
            fill(store, 3 if run == "a" else 1)
        assert [len(store.entries) for store in stores] == [3, 1]
        keys = {key.decode() for key in redis.scan_iter()}
        assert {key.split(":")[1] for key in keys} == {"{a}", "{b}"}
        assert all(key.startswith("twinrl:") for key in keys)
        with pytest.raises(ResumeError, match=r"another run .* run\.name"):
            FileStore(tmp_path / "c", redis, "a", SCHEMA)
        with pytest.raises(ResumeError, match=r"schema .* run\.name"):
            FileStore(tmp_path / "a", redis, "a", SCHEMA._replace(chunk=2))
    finally:
        server.stop()


def fill(store: FileStore, count: int, commit: bool = True) -> None:
    for _ in range(count):
        sequence = store.appended.get("w", -1) + 1
        header, columns = segment(sequence * STEPS, STEPS)
        entry = store.append(Segment({**header, "writer": "w", "sequence": sequence}, columns))
        if commit:
            store.commit([entry], [])
            store.publish([entry], [])


@pytest.fixture
def redis(tmp_path):
    server = EmbeddedRedis(tmp_path / "redis")
    yield server.start()
    server.stop()


def test_payload_without_index_is_indexed_and_lost_bytes_are_reported(tmp_path, redis):
    store = FileStore(tmp_path / "run", redis, "run", SCHEMA)
    store.recover()
    fill(store, 3)
    fill(store, 2, commit=False)  # the process dies between payload and index
    store = FileStore(tmp_path / "run", redis, "run", SCHEMA)
    found = store.recover()
    assert (found.segments, found.reindexed, found.lost) == (5, 2, [])
    assert store.committed == {"w": 4}
    fill(store, 2)
    store.close()
    path = path_of(tmp_path / "run", store.entries[6].file)
    path.unlink()
    store = FileStore(tmp_path / "run", redis_again(tmp_path), "run", SCHEMA)
    found = store.recover()
    assert found.segments == 5 and [(e.writer, e.sequence) for e in found.lost] == [
        ("w", 5),
        ("w", 6),
    ]
    fill(store, 1)
    assert store.entries[max(store.entries)].sequence == 7, "lost numbers are not used again"
    assert len(FileStore(tmp_path / "run", redis, "run", SCHEMA).recover().lost) == 0


def redis_again(tmp_path):
    server = EmbeddedRedis(tmp_path / "redis")
    return server.connect()


def test_everything_is_rebuilt_when_redis_lost_all(tmp_path, redis):
    store = FileStore(tmp_path / "run", redis, "run", SCHEMA, flush="always")
    store.recover()
    fill(store, 4)
    redis.flushall()
    store = FileStore(tmp_path / "run", redis, "run", SCHEMA)
    assert store.recover()[:2] == (4, 4)
    redis.flushall()
    store.reconnect(redis)
    assert FileStore(tmp_path / "run", redis, "run", SCHEMA).recover()[:2] == (4, 0)


def test_embedded_redis_keeps_its_data_and_needs_its_password(tmp_path):
    deep = tmp_path / ("x" * 60) / ("y" * 60)  # too long for a socket's path
    server = EmbeddedRedis(deep)
    client = server.start()
    client.set("key", "value")
    assert len(os.fsencode(server.socket)) <= 107
    assert client.config_get("port")["port"] == "0"
    with pytest.raises(ConfigError, match="refuses the password"):
        connect(f"unix://{server.socket}")
    connect(f"unix://:{server.password}@{server.socket}").close()
    server.stop()
    again = EmbeddedRedis(deep)
    assert again.start().get("key") == b"value"
    again.stop()


def test_the_service_uses_a_given_redis(bench, tmp_path):
    server = EmbeddedRedis(tmp_path / "redis")
    redis = server.start()
    bench.start(redis_url=f"unix://:{server.password}@{server.socket}", run="mine")
    write(bench.writer(), 0, 2)
    bench.reader().wait(2)
    assert redis.hlen("twinrl:{mine}:index") == 2
    assert not (bench.run_dir / "redis").exists()
    bench.service.stop()
    server.stop()


def test_a_wrong_setting_ends_the_start_with_its_reason(bench):
    bench.start()
    bench.service.stop()
    for options, reason in (
        ({"redis_url": "redis://127.0.0.1:1"}, "no Redis answers there"),
        ({"limiter": {"samples_per_insert": 1, "error": 1, "largest_batch": 9}}, "can deadlock"),
        ({"capacity": 5}, "holds no segment"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            ServiceProcess(bench.run_dir, **options)
