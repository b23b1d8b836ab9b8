"""An arm on a bad network: a real replay service and gateway, a simulated arm in real time, cuts in mid-motion, kills."""

from __future__ import annotations

import signal
import subprocess
import time

import numpy as np
import pytest

from benchmarks import _robot_run as stages
from benchmarks._arm_log import exceeded, rest_ms
from twinrl.core.segment import Schema

pytestmark = pytest.mark.timeout(180)
SIM = Schema(27, 14, ("side", "wrist"), 32, 4)
POINT = Schema(6, 0, ("side",), 16, 4)
STEPS = 50


class Stage(stages.Stage):
    def leave(self, arm):
        assert super().leave(arm) == 0, self.output.read_text()
        assert "Traceback" not in self.output.read_text()

    def check_whole(self, name="arm"):
        """Every segment that was numbered is stored, once, and episodes have no gaps."""
        counts = self.counts(name)
        assert counts.pop("segments") and not any(counts.values()), counts
        return [(h, c) for h, c in self.run.stored() if h["robot"] == name]


@pytest.fixture
def stage(tmp_path):
    made = []

    def make(schema=SIM):
        made.append(Stage(tmp_path, schema, STEPS, lease_s=3.0))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_cut_of_a_second_holds_and_goes_on(stage):
    """In mid-motion: held within the watchdog's time, at rest soon after, and the same episode goes on by itself."""
    s = stage()
    arm = s.attach()
    episode = s.moving()["last"]["episode"]
    when = s.network.tell("cut")
    time.sleep(1.0)
    s.network.tell("heal")
    row = s.run.wait("its return", lambda row: row["last"].get("held_at", 0) > when)
    assert row["last"]["held_at"] - when < 0.4  # 0.25 s, and what a busy machine adds
    s.run.wait("the next episode", lambda row: row["last"]["episode"] != episode)
    s.leave(arm)
    assert rest_ms(s.set_points(), when) < 600.0
    assert exceeded(s.set_points()) == 0
    parts = [(h, c) for h, c in s.check_whole() if h["episode"] == episode]
    assert parts and parts[-1][0]["last"]
    times = np.concatenate([columns["timestamp"] for _, columns in parts])
    assert np.diff(times).max() > 0.5, "the hold is in the episode's own time"


def test_a_long_cut_is_latched_until_somebody_rearms(stage):
    """After 2 s of hold the arm is stopped: the episode is truncated and kept; what comes back does not move it."""
    s = stage()
    arm = s.attach("--operator-option", "rearm_after=3")
    s.moving()
    when = s.network.tell("cut")
    time.sleep(10.0)
    before = s.set_points()
    assert rest_ms(before, when) < 600.0
    s.network.tell("heal")
    s.run.wait("its return", lambda row: row["attached"] and row["last"].get("held_at", 0) > when)
    row = s.run.wait("another episode", lambda row: row["last"].get("step", 0) > 5)
    assert row["last"]["totals"]["stops"] >= 1
    s.leave(arm)
    stored = s.check_whole()
    short = [c for h, c in stored if h["last"] and h["first_step"] + len(c["action"]) < STEPS]
    assert short and all(c["truncated"][-1] and not c["terminated"].any() for c in short)


def test_a_killed_bridge_leaves_the_run_alone(stage):
    """SIGKILL in mid-motion: service and gateway go on, its name is free after the lease, the next attach sends what was
    left."""
    s = stage()
    first = s.attach("--episodes", "50")
    s.run.wait("an episode", lambda row: row["episodes"] >= 1)
    s.moving()
    first.kill()
    killed = time.monotonic()
    first.wait(10)
    assert s.run.row()["attached"] and s.run.stored(), "gateway and service answer"
    s.run.wait("the end of its lease", lambda row: not row["attached"])
    assert 1.5 < time.monotonic() - killed < 5.0  # 3 s since its last heartbeat
    assert s.run.alive
    kept = s.set_points()
    assert kept["time"].max() < killed + 0.1, "nothing moves an arm whose bridge is gone"
    again = s.attach()
    s.run.wait("an episode of the next", lambda row: row["attached"] and row["episodes"] >= 2)
    s.leave(again)
    s.check_whole()


def test_a_killed_run_leaves_the_arm_at_rest(stage):
    """Everything of the cluster killed at once: the arm holds within the watchdog's time."""
    s = stage()
    arm = s.attach()
    s.moving()
    when = s.run.kill()
    time.sleep(1.5)
    rows = s.set_points()
    rest = rest_ms(rows, when)
    assert rest < 600.0 and exceeded(rows) == 0
    still = rows[rows["time"] > when + rest / 1e3 + 0.05]["setpoint"]
    assert len(still) > 30 and np.ptp(still, axis=0).max() < 1e-9, "it stays where it is"
    assert arm.poll() is None
    arm.send_signal(signal.SIGTERM)
    assert arm.wait(30) == 0, s.output.read_text()
    assert "holding: " in s.output.read_text()
    assert list((s.folder / "spool/arm/bench").glob("*.seg")), "the episode is kept"


def test_a_slow_delayed_line_still_trains(stage):
    """50 kB/s for everything, 20 to 40 ms late: episodes come whole, heartbeats live beside the bulk."""
    s = stage()
    arm = s.attach()
    s.moving()
    s.network.tell("rate 50000")
    s.network.tell("delay 0.02 0.02")
    began = s.run.row()["episodes"]
    row = s.run.wait("two more episodes", lambda row: row["episodes"] >= began + 2)
    assert row["attached"]
    s.network.tell("rate 0")
    s.network.tell("delay 0 0")
    s.leave(arm)
    s.check_whole()


def test_attach_and_detach_twenty_times(stage):
    """To a run in which another arm practises: each time an episode, each time gone again, nothing lost, nothing twice;
    once its bridge is killed. The other arm does not notice."""
    s = stage(POINT)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    steady = s.run.attach("--name", "steady", "--robot", "point", "--speed", "4", **quiet)
    deadline = time.monotonic() + 20
    while not s.run.row("steady").get("episodes") and time.monotonic() < deadline:
        time.sleep(0.05)
    began = s.run.row("steady")
    for number in range(20):
        if number == 10:
            killed = s.run.attach("--robot", "point", "--speed", "1", **quiet)
            s.run.wait("motion", lambda row: row["attached"] and row["last"].get("step", 0) > 3)
            killed.kill()
            killed.wait(10)  # the same spool: its name needs no wait
        arm = s.run.attach(
            *("--robot", "point", "--speed", "50", "--once", "--robot-option", "reset_seconds=0.1"),
            port=s.network.port,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        output, _ = arm.communicate(timeout=30)
        assert arm.returncode == 0 and "detached" in output, output
        assert s.run.row()["episodes"] == number + 1
    stored = s.check_whole()
    assert len({header["episode"] for header, _ in stored}) == 20
    assert len({header["writer"] for header, _ in stored}) == 1
    assert all(columns["truncated"][-1] for header, columns in stored if header["last"])
    other = s.run.row("steady")
    assert other["attached"] and other["last"]["totals"]["stops"] == 0
    assert other["episodes"] >= began["episodes"] + 5
    steady.send_signal(signal.SIGTERM)
    assert steady.wait(30) == 0
    s.check_whole("steady")
