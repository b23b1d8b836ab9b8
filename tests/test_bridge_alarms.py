"""What is measured of clocks and images, and what a person is told of it: once for each change."""

import numpy as np
import pytest

from robot_bridge.alarms import Alarms
from robot_bridge.driver import Frame
from robot_bridge.eyes import View
from robot_bridge.leases import Leases, Robot
from robot_bridge.offset import SAMPLES, ClockOffset
from robot_bridge.safety import Measured
from twinrl.core.errors import WireError


class Clocks:
    """Ours and theirs: `ahead` is what their clock is before ours; our Unix clock can be set."""

    def __init__(self, ahead):
        self.now, self.ahead, self.unix = 1000.0, ahead, 1.7e9
        self.offset = ClockOffset(lambda: self.now, lambda: self.now + self.unix)

    def exchange(self, there, back):
        sent = self.now
        self.now += there
        theirs = self.now + self.unix + self.ahead
        self.now += back
        self.offset.hear(sent, self.now, theirs)


def test_the_shortest_way_says_most_of_the_clocks():
    """As NTP does: of many uneven ways the shortest counts, and half of it is what may be wrong."""
    clocks = Clocks(ahead=0.25)
    assert clocks.offset.seconds is None and clocks.offset.header() == {}
    rng = np.random.default_rng(3)
    for _ in range(SAMPLES):
        clocks.exchange(*(0.005 + rng.exponential(0.04, 2)))
        assert abs(clocks.offset.seconds - 0.25) <= clocks.offset.uncertainty + 1e-6
    assert clocks.offset.uncertainty < 0.02
    header = clocks.offset.header()
    assert header["clock_offset_s"] == pytest.approx(0.25, abs=0.02)
    assert header["clock_uncertainty_s"] == clocks.offset.uncertainty


def test_a_clock_that_is_set_is_seen_at_once_and_old_samples_are_forgotten():
    """Ours in the same moment; theirs when no sample of before is left."""
    clocks = Clocks(ahead=0.0)
    clocks.exchange(0.001, 0.001)
    clocks.unix += 10.0
    assert clocks.offset.seconds == pytest.approx(-10.0, abs=1e-5)
    clocks.ahead -= 5.0
    for _ in range(SAMPLES):
        clocks.exchange(0.004, 0.004)
    assert clocks.offset.seconds == pytest.approx(-5.0, abs=1e-5)
    assert clocks.offset.uncertainty == pytest.approx(0.004)


class Told:
    """Alarms on a clock that the test moves."""

    def __init__(self):
        self.now = 0.0
        self.alarms = Alarms(0.03, lambda: self.now)

    def step(self, **ages):
        self.now += 0.1
        image = np.zeros((2, 2, 3), np.uint8)
        measured = Measured(self.now, np.zeros(6), np.zeros(0), 0.0)
        frames = {name: Frame(self.now - age, image) for name, age in ages.items()}
        self.alarms.skew(View(measured, np.zeros(3, np.float32), frames))

    @property
    def texts(self):
        return [(level, text) for _, level, text in self.alarms.state()["alarms"]]


def test_old_images_are_told_of_when_they_last():
    """A moment is nothing; a second is, with camera and value; then once again when it is over."""
    told = Told()
    for _ in range(8):
        told.step(side=0.05, wrist=0.01)
    told.step(side=0.02, wrist=0.01)
    assert told.texts == [] and told.alarms.state()["skew_ms"] == pytest.approx(20.0)
    for _ in range(40):
        told.step(side=0.02, wrist=0.052)
    ((level, text),) = told.texts
    assert level == "warning" and "camera 'wrist' is 52 ms behind the arm" in text
    assert "30 ms (--patience skew_s)" in text
    for _ in range(40):
        told.step(side=0.02, wrist=0.01)
    assert [level for level, _ in told.texts] == ["warning", "info"]
    for _ in range(40):
        told.step(side=-0.2)  # a frame that says it is of the future
    assert "camera 'side' is 200 ms ahead of the arm" in told.texts[-1][1]


def test_a_clock_that_is_off_is_told_of_once():
    """Only as far as it is known for sure; and that it does the arm no harm."""
    told, clocks = Told(), Clocks(ahead=0.05)

    def look(seconds):
        for _ in range(round(seconds / 0.1)):
            told.now += 0.1
            told.alarms.clock(clocks.offset)

    look(5.0)
    clocks.exchange(0.03, 0.03)
    look(5.0)
    assert told.texts == [], "50 ms, give or take 30, may be less than 30"
    clocks.exchange(0.002, 0.002)
    look(60.0)
    ((level, text),) = told.texts
    assert level == "warning" and "+50 ms (give or take 2 ms)" in text and "monotonic" in text
    clocks.unix += 0.05
    look(60.0)
    assert [level for level, _ in told.texts] == ["warning", "info"]


def test_the_gateway_tells_each_alarm_once():
    """They ride on several heartbeats; a new session counts from the beginning; what is none is refused."""
    robot = Leases(1.0).robots.setdefault("arm", Robot("arm"))
    robot.begin("one")
    told = Told()
    told.alarms.tell("first")
    told.alarms.tell("second", "info")
    robot.hear({**told.alarms.state(), "clock_offset_ms": 12.0})
    assert robot.alarms() == [("warning", "first"), ("info", "second")]
    assert robot.alarms() == []
    assert robot.stats()["robot/arm/clock_offset_ms"] == 12.0
    told.alarms.tell("third")
    robot.hear(told.alarms.state())
    assert robot.alarms() == [("warning", "third")]
    assert Robot("arm", robot.saved()).heard == 3, "nor again after a restart of the gateway"
    robot.begin("two")
    robot.hear(told.alarms.state())
    assert len(robot.alarms()) == 3
    assert "robot/arm/clock_offset_ms" not in robot.stats()
    for wrong in (
        "none",
        [[1, "info"]],
        [[1, "loud", "x"]],
        [["1", "info", "x"]],
        [[1, "info", "x"]] * 30,
    ):
        with pytest.raises(WireError):
            robot.hear({"alarms": wrong})
