"""Both forms of the store keep the same promises; what the Redis form promises beyond them."""

import contextlib
import os
import signal
import threading

import pytest

from buffer_service import record
from buffer_service.embedded_redis import EmbeddedRedis
from buffer_service.file_store import FileStore
from buffer_service.redis_store import RedisStore
from buffer_service.testing import SCHEMA, Bench, ServiceProcess, segment
from twinrl.core.errors import ConfigError, ResumeError, TwinRLError
from twinrl.core.segment import Segment
from twinrl.core.sockets import wait_until

pytestmark = pytest.mark.timeout(90)
STEPS = 8
BIG = SCHEMA._replace(image_size=64)  # 221 kB a segment
FORMS = {"files": FileStore, "redis": RedisStore}


@pytest.fixture
def server(tmp_path):
    """A Redis that lives longer than the stores and services of a test."""
    server = EmbeddedRedis(tmp_path / "redis")
    server.start()
    yield server
    server.stop()


@pytest.fixture(params=list(FORMS))
def form(request):
    return request.param


def make(form, folder, server, schema=SCHEMA, **options):
    store = FORMS[form](folder, server.connect(), "run", schema, **options)
    return store, store.recover()


def fill(store, count, *, commit=True, source="twin", writer="w"):
    """Insert segments that follow each other; each says by its values which one it is."""
    for _ in range(count):
        sequence = store.appended.get(writer, -1) + 1
        header, columns = segment(sequence * STEPS, STEPS, source=source, schema=store.schema)
        entry = store.append(Segment({**header, "writer": writer, "sequence": sequence}, columns))
        if commit:
            turn(store, [entry])


def turn(store, entries=()):
    """What the committer does."""
    changed, gone = store.moves(), store.evictions(list(entries))
    store.count(entries)
    store.commit(list(entries), gone, changed)
    store.publish(list(entries), gone, changed)
    store.flush()
    return gone


def held(store) -> list[int]:
    """The sequence numbers of all segments, after a look at every byte."""
    numbers = []
    for entry in list(store.entries.values()):
        found = record.decode(store.raw(entry), verify=True)
        assert found.header["sequence"] == entry.sequence
        assert found.columns["action"][0, 0] == entry.sequence * STEPS
        numbers.append(entry.sequence)
    return numbers


def payloads(server) -> int:
    return sum(1 for _ in server.connect().scan_iter("twinrl:{run}:payload:*", count=1000))


def cached(folder) -> int:
    """Bytes of segment files; they may go while one looks."""
    total = 0
    for path in folder.glob("*.seg"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def empty(folder):
    """Lose the segment files: another host has none, a cache may be deleted."""
    for path in folder.glob("*.seg"):
        path.unlink()


def test_everything_is_there_after_a_restart(tmp_path, server, form):
    store, _ = make(form, tmp_path / "run", server)
    fill(store, 5)
    store.cursors["ppo"] = {"position": 3}
    store.set_priorities({2: 0.5})
    turn(store)
    again, found = make(form, tmp_path / "run", server)
    assert found == (5, 0, []) and held(again) == [0, 1, 2, 3, 4]
    assert again.entries == store.entries and again.committed == {"w": 4}
    assert again.cursors == store.cursors and again.priorities == {2: 0.5}
    assert again.counters["inserted/twin"] == 5 * STEPS


def test_payload_without_index_is_indexed_when_it_follows(tmp_path, server, form):
    store, _ = make(form, tmp_path / "run", server)
    fill(store, 2)
    fill(store, 2, commit=False)  # the process dies between payload and index
    again, found = make(form, tmp_path / "run", server)
    assert found == (4, 2, []) and held(again) == [0, 1, 2, 3]
    fill(again, 1)
    assert held(make(form, tmp_path / "run", server)[0]) == [0, 1, 2, 3, 4]


def test_lost_payload_is_reported_and_its_numbers_are_not_used_again(tmp_path, server, form):
    store, _ = make(form, tmp_path / "run", server)
    fill(store, 3)
    store.close()
    empty(tmp_path / "run")
    if form == "redis":
        server.connect().delete("twinrl:{run}:payload:2")
    again, found = make(form, tmp_path / "run", server)
    lost = [1] if form == "redis" else [0, 1, 2]
    assert [entry.sequence for entry in found.lost] == lost
    fill(again, 1)
    assert held(again) == [n for n in range(4) if n not in lost]
    assert make(form, tmp_path / "run", server)[1].lost == []


def test_eviction_is_durable(tmp_path, server, form):
    options = {"schema": BIG, "capacity": 1 << 20}
    store, _ = make(form, tmp_path / "run", server, **options)
    fill(store, 3, source="demo", writer="d")
    fill(store, 12)
    left = [entry.sequence for entry in store.entries.values() if entry.source == "twin"]
    assert 1 <= len(left) <= 4 and left == list(range(12))[-len(left) :]
    again, found = make(form, tmp_path / "run", server, **options)
    assert held(again) == [0, 1, 2, *left] and found.reindexed == 0
    if form == "redis":
        assert payloads(server) == 3 + len(left)
        empty(tmp_path / "run")
        assert held(make(form, tmp_path / "run", server, **options)[0]) == [0, 1, 2, *left]


def test_a_redis_that_lost_all_is_told_everything_again(tmp_path, server, form):
    store, _ = make(form, tmp_path / "run", server)
    fill(store, 4)
    server.connect().flushall()
    store.reconnect(server.connect())
    fill(store, 1)
    again, found = make(form, tmp_path / "run", server)
    assert found == (5, 0, []) and held(again) == [0, 1, 2, 3, 4]
    server.connect().flushall()
    again, found = make(form, tmp_path / "run", server)
    assert found == (5, 5, []) and held(again) == [0, 1, 2, 3, 4]


def test_a_redis_that_lost_its_last_second_is_told_it_again(tmp_path, server, form):
    options = {"schema": BIG, "capacity": 1 << 20}
    store, _ = make(form, tmp_path / "run", server, **options)
    fill(store, 6)
    log = max((tmp_path / "redis" / "appendonlydir").glob("*.incr.aof"))
    size = log.stat().st_size
    fill(store, 6)
    kept = held(store)
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: not server.alive(), 10, "the end of Redis")
    os.truncate(log, size + 1000)  # in the midst of a transaction
    store.reconnect(server.start())
    fill(store, 1)
    assert held(store)[:-1] == kept[-len(held(store)) + 1 :]
    again, found = make(form, tmp_path / "run", server, **options)
    assert found.lost == [] and found.reindexed == 0 and held(again) == held(store)
    if form == "redis":
        assert payloads(server) == len(again.entries), "evicted payload does not come back"


def test_another_folder_goes_on_only_where_that_is_wanted(tmp_path, server):
    store, _ = make("redis", tmp_path / "a", server)
    fill(store, 5)
    with pytest.raises(ResumeError, match=r"another run\.name.* or set redis\.adopt"):
        make("redis", tmp_path / "b", server)
    again, found = make("redis", tmp_path / "b", server, adopt=True)
    assert found == (5, 0, []) and {entry.file for entry in again.entries.values()} == {0}
    assert held(again) == [0, 1, 2, 3, 4]
    places = {entry.file for entry in again.moves()}
    assert places and 0 not in places, "what was fetched lies in the cache from now on"
    for options in ({}, {"adopt": True}):
        with pytest.raises(ResumeError, match=r"another run .*/b\)"):
            make("redis", tmp_path / "a", server, **options)
    with pytest.raises(ResumeError, match=r"schema .* run\.name"):
        make("redis", tmp_path / "c", server, schema=BIG, adopt=True)
    with pytest.raises(ResumeError, match=r"set replay\.store to redis"):
        make("files", tmp_path / "b", server)


def test_a_run_of_files_moves_into_redis(tmp_path, server):
    store, _ = make("files", tmp_path / "run", server)
    fill(store, 5)
    again, found = make("redis", tmp_path / "run", server)
    assert found.lost == [] and held(again) == [0, 1, 2, 3, 4] and payloads(server) == 5
    empty(tmp_path / "run")
    assert held(make("redis", tmp_path / "run", server)[0]) == [0, 1, 2, 3, 4]


def test_the_cache_is_bounded_and_filled_again_by_what_is_read(tmp_path, server, monkeypatch):
    monkeypatch.setattr("buffer_service.redis_store.LOOK_SECONDS", 0.0)
    store, _ = make("redis", tmp_path / "run", server, schema=BIG, cache_bytes=8 << 20)

    for _ in range(3):
        fill(store, 40)
        turn(store)
        assert cached(tmp_path / "run") <= 11 << 20
    cold = [entry for entry in store.entries.values() if not entry.file]
    assert len(cold) > 60 and payloads(server) == 120
    assert held(store) == list(range(120)), "what is not in the cache comes from Redis"
    for _ in range(3):
        turn(store)
    assert cached(tmp_path / "run") <= 11 << 20
    warm = store.entries[119]
    assert warm.file and record.intact(store.raw(warm))
    assert store.stats()["replay/cache_bytes"] <= 11 << 20


def test_damaged_payload_is_a_loss_that_is_reported_and_goes(tmp_path, server, caplog):
    store, _ = make("redis", tmp_path / "run", server)
    fill(store, 4)
    store.close()
    empty(tmp_path / "run")
    store, _ = make("redis", tmp_path / "run", server)
    server.connect().setrange("twinrl:{run}:payload:2", 600, b"damage")
    server.connect().delete("twinrl:{run}:payload:3")
    for id in (2, 3):
        with pytest.raises(FileNotFoundError):
            store.raw(store.entries[id])
    assert [entry.id for entry in turn(store)] == [2, 3]
    assert "checksum" in caplog.text and "missing in Redis" in caplog.text
    assert held(store) == [0, 3] and make("redis", tmp_path / "run", server)[1].lost == []


def test_damaged_cache_files_of_a_dead_machine_are_not_trusted(tmp_path, server):
    store, _ = make("redis", tmp_path / "run", server, schema=BIG)
    fill(store, 3)
    store.close()
    path = next((tmp_path / "run").glob("*.seg"))
    path.chmod(0o644)
    with path.open("r+b") as file:  # a page that never reached the disk
        file.seek(path.stat().st_size // 2)
        file.write(bytes(4096))
    path.chmod(0o444)
    (tmp_path / "run" / "unsynced").write_text("an earlier boot")
    again, found = make("redis", tmp_path / "run", server, schema=BIG)
    assert found == (3, 0, []) and held(again) == [0, 1, 2]


def test_twins_give_way_when_redis_is_full(tmp_path):
    server = EmbeddedRedis(tmp_path / "redis", memory_mb=16)
    server.start()
    try:
        store, _ = make("redis", tmp_path / "run", server, schema=BIG)
        fill(store, 10, source="demo", writer="d")
        fill(store, 150)
        kept = [entry.source for entry in store.entries.values()]
        assert kept.count("demo") == 10 and 20 < kept.count("twin") < 70
        assert server.connect().info("memory")["used_memory"] < 16 << 20
        assert payloads(server) == len(kept) and held(store)[-1] == 149
    finally:
        server.stop()


def test_a_redis_that_cannot_keep_the_promise_is_refused(tmp_path, server):
    with pytest.raises(ConfigError, match=r"replay\.flush is always.*appendfsync always"):
        make("redis", tmp_path / "run", server, flush="always")
    server.connect().config_set("appendfsync", "always")
    store, _ = make("redis", tmp_path / "run", server, flush="always")
    assert store.promise.endswith("and of Redis's machine")
    with pytest.raises(ConfigError, match="at least 8 MiB"):
        make("redis", tmp_path / "run", server, cache_bytes=1)


# The service, over sockets.


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path / "host" / "run")
    yield bench
    bench.close()


def url_of(server: EmbeddedRedis) -> str:
    return f"unix://:{server.password}@{server.socket}"


def write(writer, first, last, **options):
    for number in range(first, last):
        writer.write(*segment(number * STEPS, STEPS, **options))


def numbers(reader) -> list[int]:
    return [int(each.columns["action"][0, 0]) // STEPS for each in reader.segments()]


@pytest.mark.parametrize("victim", ["service", "redis", "both"])
def test_every_segment_arrives_once_and_in_order_whoever_is_killed(bench, victim):
    service = bench.start(store="redis")
    writer, reader, count, failures = bench.writer(window=8), bench.reader(), 150, []

    def produce() -> None:
        try:
            write(writer, 0, count)
            writer.flush()
        except TwinRLError as error:
            failures.append(error)

    thread = threading.Thread(target=produce)
    thread.start()
    reader.wait(20)
    if victim in ("redis", "both"):
        service.kill_redis()
    if victim in ("service", "both"):
        service.kill()
        service.start()
    thread.join()
    assert not failures
    reader.wait(count)
    assert numbers(reader) == list(range(count)) and "lost" not in service.log()
    assert "survives the death of every process" in reader.info()["promise"]


def test_a_reader_on_the_host_has_cold_segments_brought_back(bench):
    bench.service = ServiceProcess(bench.run_dir, BIG, store="redis", cache_mb=8)
    writer, reader = bench.writer(schema=BIG), bench.reader()
    for number in range(120):
        writer.write(*segment(number * STEPS, STEPS, schema=BIG))
    writer.flush()
    reader.wait(120)
    wait_until(lambda: cached(bench.run_dir / "replay") < 12 << 20, 20, "room")
    assert numbers(reader) == list(range(120))
    for _ in range(5):
        batch = reader.sample(64, chunk=4)
        assert (batch["action"][:, 0, 0] == batch["observation.state"][:, 0]).all()
    assert reader.mapped and reader.stats()["reader/fetched_bytes"] == 0


def test_a_service_on_another_host_takes_over_and_the_first_ends(bench, server, tmp_path):
    """The first one hangs, as behind a cut cable; when it comes back it writes nothing any more."""
    options = {"store": "redis", "redis_url": url_of(server)}
    first = bench.start(**options)
    writer = bench.writer()
    write(writer, 0, 20)
    writer.flush()
    other = tmp_path / "other" / "run"
    with pytest.raises(RuntimeError, match="another replay service serves this run"):
        ServiceProcess(other, **options)
    first.process.send_signal(signal.SIGSTOP)
    second = ServiceProcess(other, adopt=True, **options)
    try:
        bench.service = second
        reader = bench.reader()
        reader.wait(20)
        assert numbers(reader) == list(range(20))
        later = bench.writer()
        assert later.write(*segment(20 * STEPS, STEPS)) == 20
        later.flush()
        first.process.send_signal(signal.SIGCONT)
        assert first.process.wait(20) != 0
        assert "has taken this run over" in first.log()
        reader.wait(21)
        assert numbers(reader) == list(range(21)) and reader.mapped
    finally:
        first.process.stdout.close()


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("refusal", ["NOREPLICAS", "READONLY"])
def test_refused_writes_wait_with_their_reason(bench, server, form, refusal):
    bench.start(store=form, redis_url=url_of(server))
    writer, reader, redis = bench.writer(), bench.reader(), server.connect()
    write(writer, 0, 3)
    writer.flush()
    if refusal == "READONLY":
        redis.replicaof("127.0.0.1", "1")
    else:
        redis.config_set("min-replicas-to-write", 1)
    write(writer, 3, 6)
    wait_until(lambda: refusal.lower() in waits(reader) or "read-only" in waits(reader), 20, "it")
    assert "acknowledgements wait" in waits(reader) and reader.info()["writers"] == {"w": 2}
    if refusal == "READONLY":
        redis.replicaof("NO", "ONE")
    else:
        redis.config_set("min-replicas-to-write", 0)
    writer.flush()
    reader.wait(6)
    assert numbers(reader) == list(range(6)) and not waits(reader)


def waits(reader) -> str:
    return "; ".join(reader.info()["waiting"]).lower()


def test_a_full_redis_waits_until_something_is_deleted(bench, tmp_path):
    server = EmbeddedRedis(tmp_path / "redis", memory_mb=16)
    server.start()
    try:
        bench.service = ServiceProcess(bench.run_dir, BIG, store="redis", redis_url=url_of(server))
        writer, reader = bench.writer(schema=BIG), bench.reader()
        for number in range(100):  # 22 MB of demonstrations, which never give way
            writer.write(*segment(number * STEPS, STEPS, source="demo", schema=BIG))
        wait_until(lambda: "out of memory" in waits(reader), 20, "Redis to be full")
        assert 0 < reader.info()["writers"]["w"] < 80
        client = bench.client()

        def delete_until_all_fits() -> bool:
            client.call("delete", {"ids": list(range(1, 61))}, timeout=20)
            return writer.stats()["writer/queued_segments"] == 0

        wait_until(delete_until_all_fits, 40, "room for the last segment")
        writer.flush()
        wait_until(lambda: numbers(reader)[-1:] == [99], 20, "the last segment")
        found = numbers(reader)
        assert found == list(range(100))[-len(found) :] and not waits(reader)
        bench.close()
    finally:
        with contextlib.suppress(TwinRLError):
            server.stop()
