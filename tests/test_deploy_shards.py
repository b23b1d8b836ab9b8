"""A job with several replay services: what is planned, served, added, looked at and resumed."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from buffer_service.client import ShardedReader, ShardedWriter
from buffer_service.shards import split_id
from buffer_service.testing import segment
from deploy import factories, shards
from deploy.description import make_schema
from deploy.launch import Job
from deploy.processes import Supervisor
from deploy.replay_run import open_replay
from deploy.run_folder import RunFolder
from twinrl.config import load_config, make_config
from twinrl.core.errors import ConfigError, TwinRLError
from twinrl.core.sockets import wait_until
from twinrl.main import main

pytestmark = pytest.mark.timeout(180)
ROOT = Path(__file__).parent.parent
STEPS = 8


def plan(tmp_path, *overrides):
    config = load_config(ROOT / "configs" / "tiny.yaml", [f"runs={tmp_path}", *overrides])
    run = RunFolder.create(config)
    job = Job(config, run)
    job.close()
    return config, run, run.topology()


def test_one_service_is_as_it_was(tmp_path):
    _, run, topology = plan(tmp_path, "name=one")
    assert "shards" not in topology and shards.local_numbers(topology) == []
    settings = topology["roles"]["replay"]
    assert {"shards", "keys", "name", "run"}.isdisjoint(settings)
    assert settings["run_dir"] == str(run.path)
    write, read = (
        f(topology, run.keys("cluster"), *rest)
        for f, rest in (
            (factories.writer_factory, [None]),
            (factories.reader_factory, [str(run.path), None]),
        )
    )
    assert (
        write.args[:2] == (topology["replay"], None) == read.args[:2]
    )  # a plain Writer and Reader


def test_capacities_are_divided(tmp_path):
    urls = "redis.shard_urls=[redis://a/0]"
    given = ("replay.shards=3", "replay.twin_capacity_mb=300", "replay.min_size=100", urls)
    _, run, topology = plan(tmp_path, "name=three", *given)
    roles = topology["roles"]
    assert shards.local_numbers(topology) == [1, 2]
    assert topology["shards"] == [roles["replay-1"]["address"], roles["replay-2"]["address"]]
    assert roles["replay"]["shards"] == topology["shards"]
    for number in range(3):
        role = roles[shards.role_of(number)]
        assert role["capacity"] == {"twin": 100 << 20}
        assert role["limiter"]["min_size"] == 34
    assert roles["replay-2"]["run_dir"] == str(run.path / "replay-2")
    assert roles["replay-2"]["run"] == "three.replay-2"
    assert [roles[f"replay-{n}"]["redis_url"] for n in (1, 2)] == ["redis://a/0", ""]
    _, _, topology = plan(tmp_path, "name=growing", "replay.growable=true")
    assert topology["shards"] == []


def test_a_ratio_needs_one_service():
    for more in ({"shards": 2}, {"growable": True}):
        with pytest.raises(ConfigError, match="needs shards 1"):
            make_config({"replay": {"samples_per_insert": 4, **more}})
    make_config({"replay": {"samples_per_insert": 4}})


def twinrl(*words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["replay", *map(str, words)]) == 0
    return out.getvalue()


def serve(run, topology):
    supervisor = Supervisor(run.logs, lambda level, text: print(level, text))
    supervisor.start("replay", "replay", "--run", str(run.path))
    for number in shards.local_numbers(topology):
        name = shards.role_of(number)
        supervisor.start(name, "replay", "--run", str(run.path), "--shard", str(number))
    return supervisor


def write(writer, schema, first, last):
    for episode in range(first, last):
        header, columns = segment(100 * episode, STEPS, schema=schema, end="truncated")
        writer.write(header | {"first_step": 0, "episode": f"e{episode}"}, columns)
    writer.flush(60.0)


def test_a_job_with_shards_grows_is_looked_at_and_resumed(tmp_path):
    _, run, topology = plan(tmp_path, "name=grows", "replay.shards=2")
    schema = make_schema(topology["job"]["schema"])
    keys = run.keys("cluster")
    supervisor = serve(run, topology)
    added = None
    try:
        writer = factories.writer_factory(topology, keys, schema)("w")
        reader = factories.reader_factory(topology, keys, str(run.path), schema)()
        assert isinstance(writer, ShardedWriter) and isinstance(reader, ShardedReader)
        write(writer, schema, 0, 6)
        reader.sync()
        assert {split_id(e.id)[0] for e in reader.entries()} == {0, 1}
        command = [sys.executable, "-m", "twinrl.main", "replay", str(run.path), "add-shard"]
        log = (tmp_path / "added.log").open("w+")
        added = subprocess.Popen(
            command, stdout=log, stderr=log, env=dict(os.environ, PYTHONPATH=str(ROOT))
        )
        wait_until(lambda: reader.stats()["reader/shards"] == 3, 60, "the reader to hear of it")
        wait_until(lambda: writer.stats()["writer/shards"] == 3, 60, "the writer to hear of it")
        wait_until(lambda: writer.stats()["writer/shards_lost"] == 0, 60, "its connection")
        write(writer, schema, 6, 15)
        wait_until(lambda: len(reader.entries()) == 15, 60, "all episodes")
        assert {split_id(e.id)[0] for e in reader.entries()} == {0, 1, 2}
        wait_until(lambda: "is shard 2 now" in (tmp_path / "added.log").read_text(), 30, "its word")
        rows = [json.loads(line) for line in twinrl(run.path, "list", "--json").splitlines()]
        assert len(rows) == 15
        told = json.loads(twinrl(run.path, "summary", "--json"))
        assert told["total"]["episodes"] == 15 and told["waiting"] == []
        writer.close()
        reader.close()
    finally:
        supervisor.close()
        if added is not None:
            added.send_signal(signal.SIGTERM)
            assert added.wait(60) == 0
            log.close()
    topology = run.topology()  # the added one is known to it, and served with the others
    assert shards.local_numbers(topology) == [1, 2] and len(topology["shards"]) == 2
    with open_replay(run.path) as reader:  # of the stopped run
        assert len(reader.entries()) == 15
        assert len(list(reader.segments())) == 15
    supervisor = serve(run, topology)
    try:
        with factories.reader_factory(topology, keys, str(run.path), schema)() as reader:
            wait_until(lambda: len(reader.entries()) == 15, 60, "all services, and their episodes")
    finally:
        supervisor.close()


def test_what_cannot_be_added(tmp_path):
    with pytest.raises(ConfigError, match=r"topology\.json"):
        shards.add_shard(tmp_path, None, "", None)
    assert main(["replay", "nothing", "add-shard"]) == 1
    _, run, _ = plan(tmp_path, "name=small")
    with pytest.raises(TwinRLError, match="nobody listens"):
        shards.add_shard(run.path, None, "", None)
    (run.keys_folder / "server.key").unlink()
    with pytest.raises(ConfigError, match=r"lacks server\.key"):
        shards.add_shard(run.path, None, "", None)
