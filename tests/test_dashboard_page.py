"""The page in a real browser, against a real server, collector and reporters."""

import asyncio
import base64
import contextlib
import itertools
import json
import math
import random
import re
import shutil
import subprocess
import threading
import time

import aiohttp
import numpy as np
import pytest
import simplejpeg

from dashboard.collector import Collector
from dashboard.server import Dashboard
from twinrl.core.keys import Keys, create_keys
from twinrl.core.metrics import Reporter
from twinrl.core.sockets import Server, wait_until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MINUTES = 26.0
TRACEBACK = """Traceback (most recent call last):
  File "actors/twin.py", line 88, in run
    step = self.env.step(chunk)
mujoco.FatalError: mj_step: nefc exceeds the arena"""
PEOPLE = [("actor", "twin-0"), ("actor", "twin-1"), ("learner", "learner"), ("replay", "replay")]


def figures(role, name, minute):
    """What a process would report `minute` minutes into a run whose stages begin at 0, 6 and 18 minutes."""
    noise = random.Random(f"{role}{name}{minute:.3f}").gauss
    twin = min(1.0, max(0.0, (minute - 6) / 12))
    skill = 1 / (1 + math.exp(-6 * (twin - 0.45)))
    if role == "actor":
        speed = 0 if minute < 6 else 860 if name == "twin-0" else 790
        return {
            "env/steps_per_s": max(0.0, speed + noise(0, 25)) if speed else 0.0,
            "env/episodes": int(max(0, minute - 6) * 220),
            "env/success_id": min(1, 0.62 + 0.33 * skill + noise(0, 0.015)),
            "env/success_ood": min(1, 0.21 + 0.64 * skill + noise(0, 0.02)),
            "policy/version": max(0, int((minute - 6) * 9) - (name == "twin-1")),
            "policy/lag": int(name == "twin-1") + int(noise(0, 1) > 1.2),
            "writer/queued": max(0, int(noise(2, 2))),
            "actor/stage": "roll out",
        }
    if role == "learner":
        data = {
            "learner/stage": "sft" if minute < 6 else "stage2" if minute < 18 else "stage3",
            "learner/progress": min(1, minute / 6 if minute < 6 else (minute - 6) % 12 / 12),
            "learner/updates_per_s": max(0, (31 if minute < 6 else 12) + noise(0, 0.7)),
            "learner/updates": int(minute * 700),
            "learner/batches_per_s": max(0, (31 if minute < 6 else 14) + noise(0, 0.9)),
            "policy/version": max(0, int((minute - 6) * 9)),
        }
        if minute < 6:
            data["loss/flow"] = 0.12 + 0.9 * math.exp(-minute) + noise(0, 0.01)
        elif minute < 18:
            data["loss/policy"] = 0.02 * math.exp(-twin) + noise(0, 0.003)
            data["loss/value"] = 0.3 * math.exp(-2 * twin) + noise(0, 0.01)
            data["loss/kl"] = 0.004 + abs(noise(0, 0.002))
        else:
            data["loss/critic"] = 0.08 + 0.1 * math.exp(-(minute - 18)) + noise(0, 0.006)
            data["loss/actor"] = -0.4 - 0.05 * (minute - 18) + noise(0, 0.02)
        return data
    if role == "replay":
        twin_steps = max(0, minute - 6) * 60 * 1650
        return {
            "replay/segments": int(twin_steps / 40 + 900),
            "replay/transitions/demo": int(38_000 + 20_000 * min(1, minute / 6)),
            "replay/transitions/twin": int(min(twin_steps, 480_000)),
            "replay/transitions/real": int(max(0, minute - 18) * 3500),
            "replay/bytes": int(1.2e8 + min(twin_steps, 480_000) * 1800),
            "replay/inserts_per_s": max(0, (420 if minute < 6 else 1650) + noise(0, 50)),
            "replay/samples_per_s": max(0, 3900 + noise(0, 150)),
            "replay/waiting": "",
        }
    if role == "gateway":
        return {
            "gateway/paused": 0.0,
            "robot/stand-in/state": "running",
            "robot/stand-in/minutes": max(0.0, minute - 18),
            "robot/stand-in/episodes": int(max(0, minute - 18) * 5),
            "robot/stand-in/takeovers": int(max(0, minute - 18) * 1.1),
            "robot/stand-in/success": 0.82,
            "robot/stand-in/intervention_rate": max(0.02, 0.4 * math.exp(-(minute - 18) / 4)),
            "robot/stand-in/intervention_minutes": max(0.0, minute - 18) / 6,
            "robot/stand-in/filter/step_m": 12,
            "robot/stand-in/cameras": "side,wrist",
        }
    stage = "sft" if minute < 6 else "stage2" if minute < 18 else "stage3"
    data = {"run/stage": stage, "run/progress": {"sft": 2, "stage2": 5, "stage3": 8}[stage] / 11}
    rates = {
        6: ("sft", (0.63, 0.2, 0.5, 0.13)),
        6.3: ("stage1", (0.66, 0.52, 0.55, 0.38)),
        18: ("stage2", (0.95, 0.86, 0.8, 0.66)),
    }
    for when, (name_, values) in rates.items():
        for place, rate in zip(("twin/id", "twin/ood", "real/id", "real/ood"), values, strict=True):
            if minute >= when:
                key = f"eval/{name_}/{place}"
                spread = 0.06
                data |= {key: rate, f"{key}_n": 200}
                data |= {f"{key}_low": rate - spread, f"{key}_high": min(1, rate + spread)}
    return data


def write_past(run_dir, minutes=MINUTES):
    """The files of a collector that has run for `minutes`."""
    begin = time.time() - minutes * 60
    people = [*PEOPLE, ("gateway", "gateway"), ("run", "launch")]
    with (run_dir / "metrics.jsonl").open("w") as file:
        for second in range(0, int(minutes * 60), 4):
            for role, name in people:
                if role == "gateway" and second < 18 * 60:
                    continue
                about = {"kind": "stats", "role": role, "name": name, "host": "node-1", "pid": 4021}
                data = figures(role, name, second / 60)
                file.write(json.dumps({**about, "time": begin + second, "data": data}) + "\n")
    events = [
        (0, "run", "run", {"level": "info", "text": "run started: pick-and-place, 2 twin actors"}),
        (1, "learner", "learner", {"level": "info", "text": "supervised fine-tuning: 1,500 steps"}),
        (361, "run", "run", {"level": "info", "text": "stage 2: online RL in randomised twins"}),
        (
            904,
            "actor",
            "twin-1",
            {
                "level": "error",
                "text": "twin-1 crashed: mujoco.FatalError",
                "traceback": TRACEBACK,
            },
        ),
        (909, "run", "run", {"level": "warning", "text": "twin-1 restarted, 1 of 10 times"}),
        (1081, "run", "run", {"level": "info", "text": "stage 3: the stand-in arm is attached"}),
        (1200, "gateway", "gateway", {"level": "info", "text": "takeover 3 by the operator"}),
    ]
    with (run_dir / "events.jsonl").open("w") as file:
        for second, role, name, data in events:
            about = {"kind": "event", "role": role, "name": name, "host": "node-1", "pid": 4021}
            file.write(json.dumps({**about, "time": begin + second, "data": data}) + "\n")


def picture():
    """A camera picture."""
    rows, columns = np.mgrid[:180, :320]
    image = np.stack([60 + rows // 3, 70 + rows // 3, 84 + columns // 12], -1).astype(np.uint8)
    image[110:] = (150, 126, 98)
    image[118:140, 90:116], image[120:136, 210:226] = (196, 62, 54), (66, 120, 196)
    image[20:128, 150:166] = (214, 218, 224)
    return np.frombuffer(simplejpeg.encode_jpeg(image), np.uint8)


class LiveRun:
    """A collector, a gateway's stand-in, the dashboard's server, and reporters that go on for ever."""

    def __init__(self, run_dir, minutes=MINUTES):
        create_keys(run_dir / "keys")
        if minutes:
            write_past(run_dir, minutes)
        self.begin = time.time() - minutes * 60
        self.collector = Collector(run_dir, "tcp://127.0.0.1:0", "tcp://127.0.0.1:0")
        self.collecting = threading.Thread(target=self.collector.run)
        self.collecting.start()
        server_keys, self.keys = (
            Keys.load(run_dir / "keys" / f"{role}.key") for role in ("server", "cluster")
        )
        self.commands = []
        allowed = {self.keys.public: "cluster"}
        self.gateway = Server("gateway", "tcp://127.0.0.1:0", server_keys, allowed)
        self.gateway.bind("camera", lambda request: ({"time": time.time()}, {"jpeg": picture()}))
        self.gateway.bind("command", self._command)
        row = {"attached": True, "state": "running", "hold": False, "shadow": False, "last": {}}
        self.gateway.bind("robot", lambda request: {"robot": row})
        self.gateway.start()
        self.loop = asyncio.new_event_loop()
        self.serving = threading.Thread(target=self.loop.run_forever)
        self.serving.start()
        self.dashboard = Dashboard(run_dir, self.collector.query_address, self.gateway.address)
        self.within(self.dashboard.start("127.0.0.1", 0))
        people = [*PEOPLE, ("gateway", "gateway"), ("run", "launch")]
        self.reporters = [
            Reporter(
                self.collector.metrics_address, self.keys, r, n, lambda r=r, n=n: self._now(r, n)
            )
            for r, n in people
        ]

    def _now(self, role, name):
        return figures(role, name, (time.time() - self.begin) / 60)

    def _command(self, request):
        self.commands.append((request.role, request.args["action"], request.args["target"]))
        return {"text": f"{request.args['action']} accepted"}

    def within(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def close(self):
        for reporter in self.reporters:
            reporter.close()
        self.within(self.dashboard.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.serving.join()
        self.loop.close()
        self.gateway.close()
        self.collector.stop()
        self.collecting.join()


@pytest.fixture
def live(tmp_path):
    run_dir = tmp_path / "pick-and-place"
    run_dir.mkdir()
    run = LiveRun(run_dir)
    yield run
    run.close()


class Browser:
    """Headless Chromium, spoken to over its debugging protocol."""

    def __init__(self, folder, loop, width=1440, height=900, dark=False, mobile=False):
        self._loop, self._ids = loop, itertools.count(1)
        self._metrics = {"width": width, "height": height, "mobile": mobile, "deviceScaleFactor": 1}
        self._scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]
        command += ["--no-first-run", "--disable-background-networking", "--disable-sync"]
        command += ["--disable-component-update", f"--user-data-dir={folder}"]
        command += ["--remote-debugging-port=0", "about:blank"]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        port_file = folder / "DevToolsActivePort"
        wait_until(lambda: port_file.exists() and port_file.read_text(), 30, "chromium to start")
        self._port = int(port_file.read_text().split()[0])
        self._within(self._open())

    def _within(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    async def _open(self):
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{self._port}/json") as answer:
            pages = await answer.json()
        address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
        self._socket = await self._session.ws_connect(address, max_msg_size=0)
        await self._ask("Emulation.setDeviceMetricsOverride", **self._metrics)
        await self._ask("Emulation.setEmulatedMedia", features=self._scheme)

    async def _ask(self, method, **params):
        number = next(self._ids)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        async for message in self._socket:
            answer = json.loads(message.data)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, url):
        self._within(self._ask("Page.navigate", url=url))

    def evaluate(self, expression):
        asked = self._ask("Runtime.evaluate", expression=expression, returnByValue=True)
        return self._within(asked)["result"].get("value")

    def screenshot(self, file):
        shot = self._within(self._ask("Page.captureScreenshot", format="png"))
        file.write_bytes(base64.b64decode(shot["data"]))

    async def _close(self):
        with contextlib.suppress(Exception):
            await self._socket.send_json({"id": 0, "method": "Browser.close"})
        await self._session.close()

    def close(self):
        self._within(self._close())
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no chromium: apt-get install chromium")


@pytest.fixture
def browser(live, tmp_path):
    browser = Browser(tmp_path / "profile", live.loop)
    yield browser
    browser.close()


def figure(browser, name):
    return browser.evaluate(f"document.getElementById('figure-{name}')?.textContent")


@needs_chromium
def test_the_page_shows_live_figures_without_a_reload(live, browser):
    """One load; then the stream alone moves what is shown."""
    browser.open(live.dashboard.url)
    wait_until(lambda: figure(browser, "steps"), 20, "figures on the page")
    browser.evaluate("window.loads = 1")  # gone if the page reloaded
    first = browser.evaluate("document.getElementById('elapsed').textContent")
    updates = int(browser.evaluate("document.body.dataset.updates"))
    live.begin -= 120  # the feed jumps ahead by 18 versions
    version = int(figure(browser, "version"))
    wait_until(lambda: int(figure(browser, "version")) >= version + 15, 10, "a newer version")
    assert int(browser.evaluate("document.body.dataset.updates")) > updates
    assert browser.evaluate("document.getElementById('elapsed').textContent") != first
    assert browser.evaluate("window.loads") == 1
    assert 1400 < float(figure(browser, "steps")) < 1900
    text = browser.evaluate("document.body.innerText")
    for expected in ("pick-and-place", "live", "stand-in", "nefc exceeds the arena", "stage3"):
        assert expected in text, expected
    assert live.dashboard.token not in browser.evaluate("location.href")


@needs_chromium
def test_a_button_holds_the_robot(live, browser):
    """The click arrives at the gateway, from a member with the cluster's key."""
    browser.open(live.dashboard.url)
    ready = "document.querySelector('.hold') !== null"
    wait_until(lambda: browser.evaluate(ready), 20, "the robot's card")
    browser.evaluate("document.querySelector('.hold').click()")
    wait_until(lambda: live.commands, 10, "the command")
    assert live.commands == [("cluster", "hold", "stand-in")]
    shown = "document.querySelector('.view img').naturalWidth"
    assert wait_until(lambda: browser.evaluate(shown), 10, "the camera's picture") == 320


@needs_chromium
@pytest.mark.parametrize("width", [1440, 390])
def test_the_page_fits_and_draws(live, tmp_path, width):
    """No sideways scrolling on a desk or a phone, and every chart has drawn its lines."""
    browser = Browser(tmp_path / "profile", live.loop, width=width, mobile=width < 800)
    try:
        browser.open(live.dashboard.url)
        wait_until(lambda: figure(browser, "steps"), 20, "figures on the page")
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        blank = """[...document.querySelectorAll('.chart:not(.spark) canvas')].filter((c) => c.width === 0
            || !c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((v) => v)).length"""
        wait_until(lambda: browser.evaluate(blank) == 0, 10, "every chart to be drawn")
    finally:
        browser.close()


def test_the_page_fetches_nothing_from_elsewhere():
    """It works on a robot's network without the internet."""
    from dashboard.server import PAGE

    for file in PAGE.iterdir():
        links = re.findall(r"https?://[^\s\"')]+", file.read_text())
        assert set(links) <= {"http://www.w3.org/2000/svg"}, file
