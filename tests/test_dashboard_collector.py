"""The collector over real CURVE sockets, and the record that it keeps."""

import json
import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest

from dashboard.collector import Collector, serve
from dashboard.record import Record, Series, split_history
from dashboard.source import FileSource, LiveSource, find_run, open_source
from twinrl.core.errors import ConfigError, DeadlineError, RemoteError, TwinRLError
from twinrl.core.keys import Keys, create_keys
from twinrl.core.metrics import Reporter
from twinrl.core.sockets import free_port, wait_until

ANY = "tcp://127.0.0.1:0"
MESSAGES = 2000


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "demo"
    create_keys(folder / "keys")
    return folder


@pytest.fixture
def collector(run_dir):
    collector = Collector(run_dir, ANY, ANY)
    thread = threading.Thread(target=collector.run)
    thread.start()
    yield collector
    collector.stop()
    thread.join(10)


def reporter(run_dir, address, name="twin-0", role="actor", key="cluster", **options):
    return Reporter(address, Keys.load(run_dir / "keys" / f"{key}.key"), role, name, **options)


def lines(run_dir, name="metrics.jsonl"):
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def test_every_message_is_kept_in_order(run_dir, collector):
    """Value = number of the message: loss, order and repeats would show in the file."""
    one = reporter(run_dir, collector.metrics_address)
    for i in range(MESSAGES):
        one.stats({"value": i})
        if i % 200 == 199:
            time.sleep(0.02)
    one.event("warning", "all sent", count=MESSAGES)
    wait_until(lambda: collector.record.snapshot()["events"], 10, "the last message")
    one.close()
    collector.stop()
    wait_until(lambda: len(lines(run_dir)) == MESSAGES, 10, "the file to be whole")
    assert [line["data"]["value"] for line in lines(run_dir)] == list(range(MESSAGES))
    [event] = lines(run_dir, "events.jsonl")
    assert event["data"] == {"level": "warning", "text": "all sent", "count": MESSAGES}


def test_lines_are_on_disk_within_seconds(run_dir, collector):
    """A reader of the files does not wait for the end of the run."""
    one = reporter(run_dir, collector.metrics_address, stats=lambda: {"x": 1}, period=0.1)
    wait_until(lambda: (run_dir / "metrics.jsonl").stat().st_size, 5, "a flushed line")
    one.close()


def test_a_reporter_never_waits(run_dir):
    """Without a collector, sending far more than the queue holds takes no time and drops the rest."""
    one = reporter(run_dir, f"tcp://127.0.0.1:{free_port()}")
    begin = time.monotonic()
    for i in range(5000):
        one.stats({"value": i})
    assert time.monotonic() - begin < 2.0
    one.close()


def test_strangers_are_not_heard(run_dir, collector, tmp_path):
    """Another run's key and a robot's key are refused."""
    create_keys(tmp_path / "other")
    mine = Keys.load(run_dir / "keys" / "cluster.key")
    other = Keys.load(tmp_path / "other" / "cluster.key")._replace(server=mine.server)
    stranger = Reporter(collector.metrics_address, other, "actor", "stranger")
    robot = reporter(run_dir, collector.metrics_address, name="robot", key="robot")
    known = reporter(run_dir, collector.metrics_address, name="known")
    for each in (stranger, robot, known):
        each.stats({"x": 1})
    wait_until(lambda: collector.record.snapshot()["processes"], 10, "the known process")
    time.sleep(0.3)
    assert [p["name"] for p in collector.record.snapshot()["processes"]] == ["known"]
    for each in (stranger, robot, known):
        each.close()


def test_snapshot_and_history_are_answered(run_dir, collector):
    """A reader gets last values, events since a number, and every series."""
    one = reporter(run_dir, collector.metrics_address)
    for i in range(5):
        one.stats({"env/steps_per_s": 10.0 * i, "actor/stage": "roll out", "bad": float("nan")})
    one.event("error", "it broke", traceback="Traceback: here")
    source = LiveSource(run_dir, collector.query_address)
    snapshot = wait_until(lambda: (s := source.snapshot())["number"] == 6 and s, 10, "all messages")
    [process] = snapshot["processes"]
    assert process["data"] == {"env/steps_per_s": 40.0, "actor/stage": "roll out", "bad": "nan"}
    assert process["status"] == "crashed" and process["pid"] == os.getpid()
    assert snapshot["events"][0]["traceback"] == "Traceback: here"
    assert source.snapshot(since=snapshot["number"])["events"] == []
    series = source.history()
    assert series[("actor", "twin-0", "env/steps_per_s")][:, 1].tolist() == [0, 10, 20, 30, 40]
    one.stats({"env/steps_per_s": 50.0})
    wait_until(
        lambda: source.snapshot()["processes"][0]["status"] == "running", 5, "it to run again"
    )
    source.close()
    one.close()


def _serve(run_dir, metrics, query):
    serve(run_dir, metrics, query)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_restarted_collector_goes_on_with_the_record(run_dir, how):
    """Reports of before, during and after the collector's death are there; only a kill may lose a second."""
    metrics, query = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    spawn = multiprocessing.get_context("spawn")
    one = reporter(run_dir, metrics)
    source = LiveSource(run_dir, query, timeout=1.0)

    def start():
        process = spawn.Process(target=_serve, args=(run_dir, metrics, query))
        process.start()
        return process

    def known():
        try:
            return {v for _, v in source.history().get(("actor", "twin-0", "value"), [])}
        except (DeadlineError, RemoteError):
            return set()

    process = start()
    for i in range(20):
        one.stats({"value": i})
    wait_until(lambda: len(known()) == 20, 30, "the first reports")
    wait_until(lambda: len(lines(run_dir)) == 20, 5, "them to be on disk")
    os.kill(process.pid, how)
    process.join(10)
    assert process.exitcode == (0 if how == signal.SIGTERM else -how)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "stats", "role": "act')  # what a crash within a write leaves
    time.sleep(0.3)  # the reporter's socket notices
    for i in range(20, 40):
        one.stats({"value": i})
    process = start()
    wait_until(lambda: len(known()) == 40, 30, "the whole record")
    process.terminate()
    process.join(10)
    assert [line["data"]["value"] for line in lines(run_dir)] == list(range(40))
    source.close()
    one.close()


def test_a_taken_port_is_said(run_dir, collector):
    """The error names the address."""
    with pytest.raises(TwinRLError, match=collector.metrics_address):
        Collector(run_dir, collector.metrics_address, ANY)


def test_a_finished_run_is_read_from_its_files(run_dir):
    """Without a collector the folder answers the same questions."""
    collector = Collector(run_dir, ANY, ANY)
    thread = threading.Thread(target=collector.run)
    thread.start()
    one = reporter(run_dir, collector.metrics_address, role="run", name="run")
    one.stats({"run/stage": "sft"})
    one.stats({"run/stage": "done"})
    one.event("info", "finished")
    wait_until(lambda: collector.record.snapshot()["events"], 10, "the last message")
    one.close()
    collector.stop()
    thread.join(10)
    source = open_source(run_dir, timeout=0.3)
    assert isinstance(source, FileSource)
    snapshot = source.snapshot()
    assert snapshot["ended"] and snapshot["finished"]
    assert [stage for _, stage in snapshot["stages"]] == ["sft", "done"]
    assert snapshot["events"][0]["text"] == "finished"


def test_runs_are_found_by_name_or_by_age(tmp_path):
    """An unknown name lists the known ones."""
    with pytest.raises(ConfigError, match="twinrl launch"):
        find_run(None, tmp_path)
    for i, name in enumerate(("old", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("")
        os.utime(tmp_path / name / "metrics.jsonl", (i, i))
    assert find_run(None, tmp_path).name == "new"
    assert find_run("old", tmp_path).name == "old"
    with pytest.raises(ConfigError, match="new, old"):
        find_run("odl", tmp_path)


def test_a_series_keeps_its_past_within_bounds():
    """A long run's first and last points stay, in order, and the newest ones are whole."""
    series = Series(recent=50, coarse=40)
    for i in range(10_000):
        series.append(i, i)
    points = series.points()
    times = [t for t, _ in points]
    assert len(points) <= 91 and times == sorted(times)
    assert times[0] < 600 and times[-50:] == list(range(9950, 10_000))


def test_history_survives_the_wire_form():
    """Empty, short and several series come back as they were."""
    record = Record("demo")
    assert split_history(*record.history()) == {}
    about = {"kind": "stats", "role": "actor", "name": "a"}
    for t in range(3):
        record.add({**about, "time": t, "data": {"x": t, "y": 2 * t, "text": "no number"}})
    series = split_history(*record.history())
    assert set(series) == {("actor", "a", "x"), ("actor", "a", "y")}
    np.testing.assert_array_equal(series[("actor", "a", "y")], [[0, 0], [1, 2], [2, 4]])
