"""The ring as a user runs it: `twinrl launch` in a process of its own, with real Redis, Ray, sockets and an arm."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parent.parent
TWINRL = [sys.executable, "-m", "twinrl.main"]


class Run:
    """A launched job in `folder`."""

    def __init__(self, folder, *arguments):
        self.path = folder / "runs" / "tiny"
        self.log = folder / "launch.log"
        self.began = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*TWINRL, "launch", *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                start_new_session=True,
                env=dict(os.environ, PYTHONPATH=str(ROOT), COLUMNS="200"),
            )

    def messages(self, kind="metrics"):
        file = self.path / f"{kind}.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:  # the line being written
                continue
        return found

    def series(self, role, key):
        """All values of a figure, in order of time."""
        return [m["data"][key] for m in self.messages() if m["role"] == role and key in m["data"]]

    def last(self, name, key, default=None):
        values = [m for m in self.messages() if m["name"] == name and key in m["data"]]
        return values[-1]["data"][key] if values else default

    def pid(self, name):
        return next(m["pid"] for m in reversed(self.messages()) if m["name"] == name)

    def wait(self, condition, seconds, what):
        deadline = time.monotonic() + seconds
        while True:
            value = condition()
            if value:
                return value
            words = self.log.read_text()[-3000:]
            assert self.process.poll() is None, f"ended while waiting for {what}:\n{words}"
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}:\n{words}"
            time.sleep(0.3)

    def finish(self, seconds):
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s:\n{self.log.read_text()[-3000:]}")
        return code

    def interrupt(self, number=signal.SIGINT):
        began = time.monotonic()
        self.process.send_signal(number)
        code = self.finish(30)
        return code, time.monotonic() - began

    def left_over(self):
        """Processes of the run that are still there."""
        found = []
        for process in psutil.process_iter(["pid", "cmdline", "environ"]):
            environment = process.info["environ"] or {}
            if environment.get("TWINRL_PARENT") == str(self.process.pid) or any(
                str(self.path) in part for part in process.info["cmdline"] or []
            ):
                found.append((process.info["pid"], " ".join(process.info["cmdline"] or [])[:200]))
        return found


@pytest.fixture
def launch(tmp_path):
    """Starts jobs in an empty folder and never leaves one behind."""
    runs = []

    def start(*arguments):
        runs.append(Run(tmp_path, *arguments))
        return runs[-1]

    yield start
    for run in runs:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGINT)
            try:
                run.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(run.process.pid, signal.SIGKILL)


@pytest.mark.timeout(900)
def test_the_ring_in_miniature(launch):
    """Transitions from twin and robot reach the learner, weights come back, versions rise, a report is written."""
    run = launch(str(ROOT / "configs/tiny.yaml"))
    url = run.wait(
        lambda: re.search(r"dashboard: (http://\S+)/\?token", run.log.read_text()),
        60,
        "the address",
    )[1]
    run.wait(lambda: run.last("learner", "learner/updates", 0) > 0, 120, "the learner's updates")
    metrics = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    assert "learner" in metrics
    assert "replay" in metrics
    status = subprocess.run(
        [*TWINRL, "status", str(run.path), "--json"], capture_output=True, text=True, timeout=60
    )
    assert status.returncode == 0, status.stderr
    assert json.loads(status.stdout)
    assert run.finish(240) == 0, run.log.read_text()[-3000:]

    versions = run.series("learner", "policy/version")
    assert versions == sorted(versions)
    assert versions[-1] >= 8
    adopted = [m["data"]["policy/version"] for m in run.messages() if m["name"] == "twin-0"]
    assert max(adopted) > 2  # weights came back
    sources = {
        s: max(run.series("replay", f"replay/transitions/{s}")) for s in ("demo", "twin", "real")
    }
    assert sources["demo"] > 50
    assert sources["twin"] >= 1500
    assert sources["real"] > 20
    assert max(run.series("replay", "replay/samples_per_s")) > 0  # the learner drew batches
    state = json.loads((run.path / "state.json").read_text())
    assert state["summaries"]["stage2"]["transitions"] >= 1500
    assert state["summaries"]["stage3"]["real_transitions"] == sources["real"]
    assert state["summaries"]["stage3"]["updates"] >= state["summaries"]["stage3"]["due"]

    report = json.loads((run.path / "report.json").read_text())
    for stage in ("sft", "stage1", "stage2", "stage3"):
        for cell in ("twin_id", "twin_ood", "real_id", "real_ood"):
            low, rate, high = (
                report["figures"][f"{stage}_{cell}{x}"] for x in ("_low", "", "_high")
            )
            assert 0 <= low <= rate <= high <= 1
    assert report["figures"]["robot_minutes"] >= 0.6
    assert "gain_stage2_real_low" in report["figures"]
    page = (run.path / "report.html").read_text()
    assert "http" not in re.sub(r"http://www\.w3\.org\S*|http://127\S*", "", page)  # self-contained
    assert run.left_over() == []

    evaluation = subprocess.run(
        [*TWINRL, "eval", str(run.path), "--episodes", "4", "--world", "twin", "--region", "id"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert evaluation.returncode == 0, evaluation.stderr
    assert "n = 4" in evaluation.stdout


@pytest.mark.timeout(900)
def test_killed_processes_come_back_and_an_interrupted_run_goes_on(launch):
    """kill -9 of a twin actor and of the replay service in stage 2, Ctrl-C, resume to the end."""
    run = launch(str(ROOT / "configs/tiny.yaml"), "twin_rl.steps=30000", "twins.envs=8")
    run.wait(lambda: run.last("launch", "run/stage") == "stage2", 150, "stage 2")
    run.wait(lambda: run.last("twin-1", "env/steps", 0) > 500, 60, "steps of twin-1")

    victim = run.pid("twin-1")
    os.kill(victim, signal.SIGKILL)
    run.wait(lambda: run.pid("twin-1") != victim, 60, "twin-1 to be brought back")
    run.wait(lambda: run.last("twin-1", "env/steps", 0) > 100, 60, "steps of the new twin-1")
    version = run.last("learner", "policy/version")
    run.wait(lambda: run.last("learner", "policy/version") > version, 60, "a newer version")

    replay = run.pid("replay")
    os.kill(replay, signal.SIGKILL)
    run.wait(lambda: run.pid("replay") != replay, 60, "the replay service to be brought back")
    version = run.last("learner", "policy/version")
    run.wait(lambda: run.last("learner", "policy/version") > version + 1, 90, "newer versions")
    texts = [m["data"]["text"] for m in run.messages("events")]
    assert any("replay was killed by SIGKILL" in text for text in texts)
    assert any("brought back" in text for text in texts)

    code, seconds = run.interrupt()
    assert code == 130
    assert seconds < 10
    assert "twinrl launch --resume tiny" in run.log.read_text()
    assert run.left_over() == []
    before = json.loads((run.path / "state.json").read_text())
    assert "stage1" in before["done"]
    assert "stage2" not in before["done"]

    again = launch("--resume", "tiny")
    again.wait(lambda: again.last("launch", "run/stage") == "stage2", 90, "stage 2 again")
    again.wait(
        lambda: again.last("learner", "learner/progress", 0) > 0.2,
        60,
        "progress from the checkpoint",
    )
    code, seconds = again.interrupt(signal.SIGTERM)
    assert (code, seconds < 10) == (130, True)
    assert again.left_over() == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.yaml"], "no configuration file"),
        (["CONFIG", "twins.env=3"], "did you mean 'twins.envs'"),
        (["CONFIG", "redis.url=redis://127.0.0.1:1"], "127.0.0.1:1"),
        (["--resume", "nothing"], "no run 'nothing'"),
        (["CONFIG", "ray.address=127.0.0.1:1"], "cannot join the Ray cluster"),
    ],
)
def test_errors_are_sentences(launch, arguments, words):
    run = launch(*[str(ROOT / "configs/tiny.yaml") if a == "CONFIG" else a for a in arguments])
    assert run.finish(110) == 1
    text = run.log.read_text()
    assert words in text
    assert "Traceback" not in text.split("last words")[0]
    assert run.left_over() == []


@pytest.mark.timeout(300)
def test_a_taken_port_is_named(launch):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = launch(str(ROOT / "configs/tiny.yaml"), f"gateway.port={port}")
        assert run.finish(110) == 1
    text = run.log.read_text()
    assert str(port) in text
    assert "another run" in text
