"""The web server: stream, Prometheus, commands, cameras and its errors, over real sockets."""

import asyncio
import json
import multiprocessing
import os
import threading
import time
import urllib.request

import aiohttp
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dashboard.collector import Collector
from dashboard.server import Dashboard, command, serve
from twinrl.core.errors import ConfigError
from twinrl.core.keys import Keys, create_keys
from twinrl.core.metrics import Reporter
from twinrl.core.sockets import Server, wait_until

ANY = "tcp://127.0.0.1:0"


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


@pytest.fixture
def report(run_dir, collector):
    """A function that reports as some process and waits until it has arrived."""
    keys, open_ = Keys.load(run_dir / "keys" / "cluster.key"), {}

    def report(role, name, data=None, event=None):
        if (role, name) not in open_:
            open_[role, name] = Reporter(collector.metrics_address, keys, role, name)
        before = collector.record.snapshot()["number"]
        if data is not None:
            open_[role, name].stats(data)
        else:
            open_[role, name].event(**event)
        wait_until(lambda: collector.record.snapshot()["number"] > before, 10, "the report")

    yield report
    for each in open_.values():
        each.close()


def visit(run_dir, query, gateway, talk, host="127.0.0.1"):
    """Run `talk(session, dashboard)` against a dashboard that is up."""

    async def whole():
        dashboard = Dashboard(run_dir, query, gateway)
        await dashboard.start(host, 0)
        jar = aiohttp.CookieJar(unsafe=True)  # keeps the cookies of an address without a name
        root = dashboard.url.split("/?")[0]
        try:
            async with aiohttp.ClientSession(root, cookie_jar=jar) as session:
                return await asyncio.wait_for(talk(session, dashboard), 30)
        finally:
            await dashboard.stop()

    return asyncio.run(whole())


async def next_event(stream):
    """(kind, data) of the next server-sent event."""
    kind = None
    while line := (await stream.readline()).decode():
        if line.startswith("event: "):
            kind = line[7:].strip()
        elif line.startswith("data: "):
            return kind, json.loads(line[6:])
    return None


def test_updates_arrive_over_one_connection(run_dir, collector, report):
    """First everything, then each change within a second or so."""
    report("actor", "twin-0", {"env/steps_per_s": 1.0})

    async def talk(session, dashboard):
        async with session.get("/api/stream") as answer:
            assert answer.content_type == "text/event-stream"
            kind, first = await next_event(answer.content)
            assert kind == "update" and first["run"] == "demo"
            assert first["processes"][0]["data"]["env/steps_per_s"] == 1.0
            await asyncio.to_thread(report, "actor", "twin-0", {"env/steps_per_s": 2.0})
            event = {"level": "warning", "text": "mind"}
            await asyncio.to_thread(report, "actor", "twin-0", event=event)
            begin, seen, texts = time.monotonic(), [], []
            while 2.0 not in seen or "mind" not in texts:
                _, update = await next_event(answer.content)
                seen.append(update["processes"][0]["data"]["env/steps_per_s"])
                texts += [each["text"] for each in update["events"]]
            assert time.monotonic() - begin < 5

    visit(run_dir, collector.query_address, None, talk)


def test_a_collector_that_is_away_is_said_and_comes_back(run_dir):
    """The page's stream stays open through a restart of the collector."""
    first = Collector(run_dir, ANY, ANY)
    address = first.query_address
    thread = threading.Thread(target=first.run)
    thread.start()

    async def talk(session, dashboard):
        async with session.get("/api/stream") as answer:
            assert (await next_event(answer.content))[0] == "update"
            first.stop()
            await asyncio.to_thread(thread.join)
            while True:
                kind, data = await next_event(answer.content)
                if kind == "away":
                    assert "has not answered" in data["text"]
                    break
            second = Collector(run_dir, ANY, address)
            again = threading.Thread(target=second.run)
            again.start()
            while (await next_event(answer.content))[0] != "update":
                pass
            second.stop()
            await asyncio.to_thread(again.join)

    visit(run_dir, address, None, talk)


def test_prometheus_reads_the_figures(run_dir, collector, report):
    """The same figures as on the page, with labels; names inside keys become labels."""
    report("actor", "twin-0", {"env/steps_per_s": 812.5, "env/success_ood": 0.25, "policy/lag": 1})
    report("replay", "replay", {"replay/transitions/twin": 7, "replay/waiting": 'for "x"\n'})
    report("robot", "gateway", {"robot/arm-1/minutes": 3.5, "robot/arm-1/state": "held"})
    report("run", "run", {"eval/stage2/twin/ood": 0.8, "eval/stage2/twin/ood_low": 0.7})

    async def talk(session, dashboard):
        async with session.get("/metrics") as answer:
            assert answer.content_type == "text/plain"
            return await answer.text()

    text = visit(run_dir, collector.query_address, None, talk)
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["run"] == "demo"
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    [(labels, value)] = samples["twinrl_env_steps_per_s"]
    assert value == 812.5 and labels == {"run": "demo", "role": "actor", "name": "twin-0"}
    assert samples["twinrl_env_success"][0][0]["region"] == "ood"
    [(labels, value)] = samples["twinrl_replay_transitions"]
    assert (labels["source"], value) == ("twin", 7)
    assert samples["twinrl_replay_waiting_info"][0][0]["value"] == 'for "x"\n'
    assert samples["twinrl_robot_minutes"][0] == (
        {"run": "demo", "role": "robot", "name": "gateway", "robot": "arm-1"},
        3.5,
    )
    assert samples["twinrl_robot_state_info"][0][0]["value"] == "held"
    place = {"stage": "stage2", "world": "twin", "region": "ood"}
    assert place.items() <= samples["twinrl_eval_success"][0][0].items()
    assert samples["twinrl_eval_success_low"][0][1] == 0.7
    assert [value for _, value in samples["twinrl_up"]] == [1.0] * 4


def test_commands_need_the_token_and_reach_the_gateway(run_dir, collector):
    """Nobody without the token moves a robot; the gateway sees an authenticated member of the cluster."""
    server_keys, keys = (Keys.load(run_dir / "keys" / f"{r}.key") for r in ("server", "cluster"))
    gateway, taken = Server("gateway", ANY, server_keys, {keys.public: "cluster"}), []

    def command(request):
        if request.args["target"] == "ghost":
            raise ConfigError("no robot 'ghost'; attached: arm-1")
        taken.append((request.role, request.args))
        return {"text": "held"}

    jpeg = np.frombuffer(b"\xff\xd8 a picture", np.uint8)
    gateway.bind("command", command)
    gateway.bind("camera", lambda r: ({}, {"jpeg": jpeg} if r.args["camera"] == "side" else {}))
    gateway.start()
    hold = {"action": "hold", "target": "arm-1"}

    async def talk(session, dashboard):
        async def post(body, token=dashboard.token):
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            async with session.post("/api/command", json=body, headers=headers) as answer:
                return answer.status, await answer.json()

        for token in (None, "", "wrong", "wröng"):
            status, answer = await post(hold, token)
            assert status == 403 and "token" in answer["error"]
        assert taken == []
        assert await post(hold) == (200, {"ok": True, "text": "held"})
        assert (await post({"action": "pause"}))[0] == 200
        status, answer = await post({"action": "explode"})
        assert status == 400 and "pause, resume" in answer["error"]
        assert (await post({"action": "hold"}))[0] == 400
        assert (await post(["hold"]))[0] == 400
        status, answer = await post({"action": "hold", "target": "ghost"})
        assert status == 503 and "attached: arm-1" in answer["error"]
        async with session.get("/camera/arm-1/side.jpg") as answer:
            assert answer.content_type == "image/jpeg" and await answer.read() == bytes(jpeg)
        async with session.get("/camera/arm-1/none.jpg") as answer:
            assert answer.status == 404
        async with session.get("/camera/..%2f..%2fkeys/side.jpg") as answer:
            assert answer.status == 404

    visit(run_dir, collector.query_address, gateway.address, talk)
    gateway.close()
    pause = {"action": "pause", "target": None}
    assert taken == [("cluster", hold), ("cluster", pause)]


def test_beyond_this_machine_reading_needs_the_token(run_dir, collector):
    """On an open interface nothing is shown to strangers; the address with the token opens it all."""

    async def talk(session, dashboard):
        paths = ("/", "/metrics", "/api/snapshot", "/camera/arm/side.jpg", "/page/app.js")
        for path in paths:
            async with session.get(path) as answer:
                assert answer.status == 403, path
        async with session.get("/metrics", params={"token": dashboard.token}) as answer:
            assert answer.status == 200
        async with session.get("/", params={"token": dashboard.token}) as answer:
            assert answer.status == 200
        for path in ("/", "/metrics", "/api/snapshot", "/page/app.js"):  # the cookie now
            async with session.get(path) as answer:
                assert answer.status == 200, path
        async with session.post("/api/command", json={"action": "pause"}) as answer:
            assert answer.status == 403, "the cookie alone must not command"

    visit(run_dir, collector.query_address, None, talk, host="0.0.0.0")


def test_serve_ends_cleanly(run_dir, collector):
    """The process says its address in the run's folder and ends with 0 when told to."""
    arguments = (run_dir, "127.0.0.1", 0, collector.query_address, None)
    process = multiprocessing.get_context("spawn").Process(target=serve, args=arguments)
    process.start()
    file = run_dir / "dashboard.json"
    url = json.loads(wait_until(lambda: file.exists() and file.read_text(), 30, "the address"))[
        "url"
    ]
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert b"TwinRL" in answer.read()
    process.terminate()
    process.join(10)
    assert process.exitcode == 0


def _command(runs):
    command(["demo", "--runs", str(runs), "--port", "0"])


def test_the_command_shows_a_live_run(run_dir, collector, report):
    """`twinrl dashboard demo` finds the collector by the run's folder."""
    report("learner", "learner", {"loss/flow": 0.5})
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=_command, args=(run_dir.parent,))
    process.start()
    file = run_dir / "dashboard.json"
    url = json.loads(wait_until(lambda: file.exists() and file.read_text(), 30, "the address"))[
        "url"
    ]
    with urllib.request.urlopen(url.replace("/?", "/api/snapshot?"), timeout=10) as answer:
        snapshot = json.load(answer)
    assert "ended" not in snapshot and snapshot["processes"][0]["role"] == "learner"
    process.terminate()
    process.join(10)
    assert process.exitcode == 0


def test_a_gateway_that_is_absent_is_said(run_dir, collector):
    """A command that cannot be delivered is an error, not a silence."""

    async def talk(session, dashboard):
        headers = {"Authorization": f"Bearer {dashboard.token}"}
        body = {"action": "pause"}
        async with session.post("/api/command", json=body, headers=headers) as answer:
            assert answer.status == 503 and "without a gateway" in (await answer.json())["error"]

    visit(run_dir, collector.query_address, None, talk)


def test_a_taken_port_is_named_with_its_remedy(run_dir, collector):
    """The error names the port and both settings."""

    async def talk(session, dashboard):
        port = int(dashboard.url.split(":")[2].split("/")[0])
        second = Dashboard(run_dir, collector.query_address, None)
        with pytest.raises(ConfigError, match=rf"port {port} .*--port or dashboard\.port="):
            await second.start("127.0.0.1", port)

    visit(run_dir, collector.query_address, None, talk)


def test_the_page_its_parts_and_a_finished_run(run_dir, collector, report):
    """A dashboard without a collector shows the files; the token stays private and stays the same."""
    report("learner", "learner", {"loss/flow": 0.5})
    collector.stop()
    wait_until(lambda: (run_dir / "metrics.jsonl").stat().st_size, 5, "the flush")

    async def talk(session, dashboard):
        for path in ("/", "/page/app.js", "/page/style.css", "/favicon.ico"):
            async with session.get(path) as answer:
                assert answer.status == 200
                assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
        async with session.get("/api/history") as answer:
            [[role, name, figure, points]] = (await answer.json())["series"]
            assert (role, name, figure) == ("learner", "learner", "loss/flow")
            assert points[0][1] == 0.5
        async with session.get("/api/snapshot") as answer:
            assert (await answer.json())["ended"]
        return dashboard.token

    tokens = {visit(run_dir, None, None, talk) for _ in range(2)}
    assert len(tokens) == 1
    for path in (run_dir / "keys" / "dashboard.token", run_dir / "dashboard.json"):
        assert os.stat(path).st_mode & 0o077 == 0
