"""The robots' cards in a real browser, and the same on the command line: a real gateway, a real bridge, a real collector."""

import asyncio
import io
import json
import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from benchmarks._robot_run import RobotRun
from dashboard import prometheus
from dashboard.collector import Collector
from dashboard.server import Dashboard
from dashboard.status import status
from deploy import robots_command
from robot_bridge import protocol
from robot_bridge.gateway import Gateway
from robot_bridge.leases import RECENT, Robot, rate_of
from tests.test_bridge_link import HOME, JOB, SCHEMA, Stage, finish
from tests.test_dashboard_page import Browser, needs_chromium
from twinrl.config import Config, save_config
from twinrl.core.errors import ConfigError, RemoteError
from twinrl.core.keys import create_keys
from twinrl.core.segment import Schema
from twinrl.core.sockets import wait_until

pytestmark = pytest.mark.timeout(120)
ANY = "tcp://127.0.0.1:0"
SCREENSHOT = os.environ.get("TWINRL_SCREENSHOT")  # a file, to look at the page


class Watch:
    """The collector and the page of a run whose gateway is at `gateway`."""

    def __init__(self, folder):
        self.folder = folder
        self.collector = Collector(folder, ANY, ANY)
        self._collecting = threading.Thread(target=self.collector.run)
        self._collecting.start()
        self.loop = asyncio.new_event_loop()
        self._serving = threading.Thread(target=self.loop.run_forever)
        self._serving.start()
        self.dashboard = None

    def open(self, gateway):
        self.dashboard = Dashboard(self.folder, self.collector.query_address, gateway)
        self._within(self.dashboard.start("127.0.0.1", 0))

    def _within(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def close(self):
        if self.dashboard is not None:
            self._within(self.dashboard.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._serving.join()
        self.loop.close()
        self.collector.stop()
        self._collecting.join()


class WatchedStage(Stage):
    """A run with its collector and its page."""

    def open_gateway(self, **job):
        self.watch = Watch(self.folder)
        made = protocol.make_job(SCHEMA, {**JOB, **job})
        addresses = (self.url, self.internal, self.replay_address)
        metrics = self.watch.collector.metrics_address
        self.gateway = Gateway(self.folder, *addresses, made, metrics)
        self.gateway.start()
        self.watch.open(self.internal)

    def close(self):
        super().close()
        self.watch.close()


@pytest.fixture
def stage(tmp_path):
    folder = tmp_path / "trial"
    folder.mkdir()
    stage = WatchedStage(folder)
    yield stage
    stage.close()


class Page:
    """What a person sees of the robot `name`, and clicks."""

    def __init__(self, browser, url, name="arm"):
        self.browser, self.card = browser, f"document.querySelector('[data-robot={name}]')"
        browser.open(url)
        wait_until(lambda: browser.evaluate(f"{self.card} !== null"), 20, "the robot's card")
        browser.evaluate("window.confirm = () => true")

    def text(self):
        return self.browser.evaluate(f"{self.card}.innerText") or ""

    def count(self, selector):
        return self.browser.evaluate(f"{self.card}.querySelectorAll('{selector}').length")

    def shows(self, *words):
        wait_until(lambda: all(w in self.text() for w in words), 15, f"{words} in {self.text()}")

    def click(self, action, run=False):
        where = (
            f"document.querySelector('[data-action={action}]')"
            if run
            else f"{self.card}.querySelector('[data-command={action}]')"
        )
        wait_until(
            lambda: self.browser.evaluate(f"{where}.checkVisibility() && !{where}.disabled"),
            10,
            f"button {action}",
        )
        self.browser.evaluate(f"{where}.click()")


@pytest.fixture
def browser(stage, tmp_path):
    browser = Browser(tmp_path / "profile", stage.watch.loop)
    yield browser
    browser.close()


@needs_chromium
def test_every_button_reaches_the_arm(stage, browser):
    """Hold, release, pause, resume, stop and detach, as the arm obeys them; what the filter did is told with its cause."""
    stage.act(action=(0.05, 0.0, 0.0))
    arm = stage.attach("--speed", "2", "--robot-option", "steps=400", "--codec", "jpeg")
    stage.wait_for("running")
    page = Page(browser, stage.watch.dashboard.url)
    page.shows("running", "A software stop is not a safety function", "hardware stop button")
    page.click("hold")
    stage.wait_for("holding")
    page.shows("holding", "held from the cluster", "Release")
    page.click("release")
    stage.wait_for("running")
    page.shows("Hold")
    page.click("pause", run=True)
    stage.wait_for("holding")
    page.shows("holding", "the run is paused")
    page.click("resume", run=True)
    stage.wait_for("running")
    # 0.05 m a step is shortened, and shown as it is executed, beside the picture: a point has no calibrated camera.
    page.shows("shortened by the safety filter: step_m", "Safety filter: step_m")
    assert page.count(".views svg") == 2 and page.count(".overlay svg") == 0
    events = "document.getElementById('event-list').innerText"
    wait_until(
        lambda: "safety filter of robot arm intervened: step_m" in browser.evaluate(events),
        10,
        "the filter's event",
    )
    page.click("estop")
    stage.wait_for("stopped")
    page.shows("stopped", "emergency stop")
    assert page.count(".views svg") == 0, "what was planned before the stop is not executed"
    page.click("detach")
    assert "detached" in finish(arm)
    page.shows("gone")


@needs_chromium
def test_a_chunk_that_waits_for_a_person_is_shown(stage, browser):
    """With --confirm-each-chunk nothing moves before c is pressed at the robot, and the path is there to be looked at."""
    stage.act(action=(0.01, 0.0, 0.0))
    master, slave = pty.openpty()
    command = [
        *(sys.executable, "-m", "robot_bridge.attach", "--robot", "point", "--name", "arm"),
        *("--url", stage.url, "--key", str(stage.folder / "keys/robot.key"), "--wait", "8"),
        *("--spool", str(stage.folder / "spool"), "--robot-option", "reset_seconds=0.1"),
        "--confirm-each-chunk",
    ]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    arm = subprocess.Popen(command, cwd=HOME, stdin=slave, **output)
    stage.bridges.append(arm)
    os.close(slave)
    row = stage.wait_for("holding")
    assert row["last"]["step"] == 0
    page = Page(browser, stage.watch.dashboard.url)
    page.shows("the next chunk waits for a person: press c", "from above", "from the side")
    first = stage.row()["last"]["path"]["points"]
    np.testing.assert_allclose(np.ptp([p[0] for p in first]), 0.04, atol=1e-4)
    os.write(master, b"c")
    wait_until(lambda: stage.row()["last"]["step"] == 4, 10, "the chunk to be executed")
    wait_until(
        lambda: stage.row()["last"]["path"].get("points", [first[0]])[0] != first[0],
        10,
        "the path of the next",
    )
    arm.terminate()
    finish(arm)
    os.close(master)


@needs_chromium
def test_a_shadow_is_plain_to_see(tmp_path):
    """The card says that the arm is not commanded; the path lies over the picture of the camera that is chosen."""
    create_keys(tmp_path / "keys")
    watch = Watch(tmp_path)
    schema = Schema(27, 14, ("side", "wrist"), 64, 8)
    run = RobotRun(tmp_path, schema, watch.collector.metrics_address, chunk=8)
    browser = None
    try:
        watch.open(run.inside)
        run.attach("--robot", "sim", "--shadow")
        run.wait("a path", lambda row: row["last"].get("path"))
        browser = Browser(tmp_path / "profile", watch.loop)
        page = Page(browser, watch.dashboard.url)
        page.shows("shadow", "the arm is not commanded")
        for camera in ("side", "wrist"):
            buttons = f"[...{page.card}.querySelectorAll('.segments button')]"
            browser.evaluate(f"{buttons}.find((b) => b.textContent === '{camera}').click()")
            over = f"{page.card}.querySelector('.overlay .over')"
            drawn = f"{over}?.getAttribute('points').split(' ').length === 9"
            wait_until(lambda drawn=drawn: browser.evaluate(drawn), 10, f"a path in {camera}")
            assert page.count(".views svg") == 0
        events = browser.evaluate("document.getElementById('event-list').innerText")
        assert "in shadow: it is not commanded" in events
        if SCREENSHOT:
            browser.evaluate(f"{buttons}[0].click()")
            time.sleep(1.5)
            browser.screenshot(Path(SCREENSHOT))
    finally:
        if browser is not None:
            browser.close()
        run.close()
        watch.close()


def test_the_rate_is_of_the_last_episodes():
    """The share of steps that a person commanded, over so many episodes and no more; a discarded one has none."""
    arm, other = Robot("arm"), Robot("other")
    assert arm.stats().get("robot/arm/intervention_rate") is None and rate_of([arm, other]) is None
    for _ in range(30):
        arm.count_interventions({"steps": 10, "interventions": 10})
    assert arm.describe()["intervention_rate"] == 1.0
    for _ in range(RECENT - 5):
        arm.count_interventions({"steps": 10, "interventions": 0})
    assert arm.describe()["intervention_rate"] == 0.25 and len(arm.recent) == RECENT
    assert Robot("arm", arm.saved()).stats()["robot/arm/intervention_rate"] == 0.25
    other.count_interventions({"steps": 200, "interventions": 200})  # long episodes weigh more
    assert rate_of([arm, other]) == pytest.approx((50 + 200) / 400)


def test_every_intervention_of_the_filter_is_told_once():
    """Summed up between two events; a new session counts anew."""
    robot = Robot("arm")
    robot.begin("first")
    robot.hear({"totals": {"filter/step_m": 2, "filter/workspace": 0}})
    assert robot.untold() == {"step_m": 2} and robot.untold() == {}
    robot.hear({"totals": {"filter/step_m": 5, "filter/workspace": 1}})
    assert robot.untold() == {"step_m": 3, "workspace": 1}
    robot.begin("second")
    robot.hear({"totals": {"filter/step_m": 1}})
    assert robot.untold() == {"step_m": 1}
    assert robot.stats()["robot/arm/filter/step_m"] == 6


def test_interventions_are_measured(stage):
    """A person's steps of all steps, and the minutes of it: of the robot, of the run, in Prometheus, on the terminal."""
    stage.act()
    words = ["--operator", "scripted", "--takeovers", "1", "--operator-option", "stuck_after=5"]
    finish(stage.attach("--speed", "50", "--episodes", "2", *words))
    segments = stage.replay.segments
    steps = sum(s.steps for s in segments)
    commanded = int(sum(s.columns["intervention"].sum() for s in segments))
    assert 0 < commanded < steps
    row = stage.row()
    assert (row["steps"], row["interventions"]) == (steps, commanded)
    assert row["intervention_rate"] == pytest.approx(commanded / steps)
    assert row["intervention_minutes"] == pytest.approx(commanded * 0.1 / 60, rel=0.3)
    assert [r["interventions"] for r in stage.link.results()] == [commanded, 0]
    record = stage.watch.collector.record

    def reported():
        data = {k: v for p in record.snapshot()["processes"] for k, v in p["data"].items()}
        return data if "gateway/intervention_rate" in data else None

    data = wait_until(reported, 10, "the figures")
    assert data["gateway/intervention_rate"] == data["robot/arm/intervention_rate"]
    text = prometheus.exposition(record.snapshot()).decode()
    samples = {s.name: s for f in text_string_to_metric_families(text) for s in f.samples}
    assert samples["twinrl_robot_intervention_rate"].labels["robot"] == "arm"
    assert samples["twinrl_robot_intervention_rate"].value == pytest.approx(commanded / steps)
    assert samples["twinrl_gateway_intervention_minutes"].value == row["intervention_minutes"]
    console = Console(file=io.StringIO(), width=140)
    assert status(str(stage.folder), console=console) == 0
    said = console.file.getvalue()
    assert f"{100 * commanded / steps:.0f} %" in said and "steps by a person" in said


@needs_chromium
def test_the_trend_of_interventions_is_a_chart(stage, browser):
    """On the card as a number, and over time below."""
    stage.act()
    words = ["--operator", "scripted", "--takeovers", "1", "--operator-option", "stuck_after=5"]
    finish(stage.attach("--speed", "50", "--episodes", "1", *words))
    share = stage.row()["intervention_rate"]
    page = Page(browser, stage.watch.dashboard.url)
    page.shows("By a person", f"{100 * share:.0f} %", "Minutes by a person")
    chart = "document.querySelector('#chart-interventions canvas')"
    drawn = f"{chart}.width > 0 && {chart}.getContext('2d').getImageData(0, 0, {chart}.width, {chart}.height).data.some((v) => v)"
    wait_until(lambda: browser.evaluate(drawn), 10, "the chart")
    legend = browser.evaluate("document.querySelector('#chart-interventions').innerText")
    assert "arm" in legend and f"{100 * share:.0f} %" in legend


@pytest.fixture
def folder(stage):
    """The run's folder, as `twinrl launch` leaves one."""
    save_config(Config(name="trial"), stage.folder / "config.yaml")
    told = {"gateway_internal": stage.internal, "gateway": stage.url}
    (stage.folder / "topology.json").write_text(json.dumps(told))
    return str(stage.folder)


def test_the_command_line_does_the_same(stage, folder, capsys):
    """`twinrl robots RUN ACTION ROBOT`, and pause and resume of the run: the arm obeys; the list says why it stands."""

    def robots(*words):
        assert robots_command.command([folder, *words]) == 0
        return capsys.readouterr().out

    assert "no robot has been attached to trial" in robots()
    stage.act()
    arm = stage.attach("--speed", "5", "--robot-option", "steps=400", "--codec", "raw")
    stage.wait_for("running")
    head, line = robots().splitlines()
    assert head.split()[:3] == ["name", "kind", "state"] and line.split()[:2] == ["arm", "point"]
    robots("hold", "arm")
    stage.wait_for("holding")
    assert "held from the cluster" in robots()
    robots("release", "arm")
    stage.wait_for("running")
    robots("pause")
    stage.wait_for("holding")
    assert "the run is paused" in robots()
    robots("resume")
    stage.wait_for("running")
    robots("estop", "arm")
    stage.wait_for("stopped")
    robots("release", "arm")  # never a stop
    time.sleep(0.3)
    assert "emergency stop" in robots()
    robots("detach", "arm")
    assert "detached" in finish(arm)
    assert robots().splitlines()[1].split()[2] == "gone"
    with pytest.raises(ConfigError, match="hold of which robot"):
        robots("hold")
    with pytest.raises(RemoteError, match="no robot 'amr'; known: arm"):
        robots("hold", "amr")
    with pytest.raises(SystemExit):
        robots("dance", "arm")
    assert "invalid choice: 'dance'" in capsys.readouterr().err
