"""The control loop against the clock: plans, late plans, holds, takeovers, faults. A point is the arm."""

import contextlib
import queue
import threading
import time

import numpy as np
import pytest

from robot_bridge.clock import RobotClock
from robot_bridge.control import ControlLoop, Plan
from robot_bridge.drivers.point import PointDriver
from robot_bridge.limits import Limits
from robot_bridge.operator import Operator
from robot_bridge.protocol import make_job
from robot_bridge.recovery import Recovery
from robot_bridge.safety import SafetyFilter
from robot_bridge.watchdog import Patience, Watchdog
from twinrl.core.segment import Schema

SCHEMA = Schema(6, 0, ("side",), 16, 4)
RATE, PERIOD = 100.0, 0.1
FORWARD = np.array([0.0, 0.01, 0.0, 0.0, 0.0, 0.0, 1.0], np.float32)


class Arm(PointDriver):
    """A point that keeps the set-points it gets, with their times, and a fault to set."""

    def __init__(self, **options):
        super().__init__(steps=1000, **options)
        self.log, self.fault, self.recovered = [], "", 0

    def servo(self, pose, gripper):
        self.log.append((time.monotonic(), *pose, gripper))
        super().servo(pose, gripper)

    def measure(self):
        return super().measure()._replace(fault=self.fault)

    def recover(self):
        self.fault, self.recovered = "", self.recovered + 1


class Person(Operator):
    """Acts when told to."""

    def __init__(self):
        super().__init__()
        self.action, self.said = None, []

    def act(self, moment):
        return self.action

    def marks(self):
        said, self.said = self.said, []
        return said


class Stage:
    def __init__(self, speed=1.0, max_steps=0, person=None, **patience):
        self.arm, self.person = Arm(), person or Person()
        job = make_job(SCHEMA, {"run": "r", "task": "t", "instruction": "i"})
        self.arm.connect(job, speed)
        self.arm.reset(None, "id")
        self.safety = SafetyFilter(Limits(), RATE, PERIOD)
        self.watchdog = Watchdog(Patience(**{"latch_s": 1.0, **patience}))
        self.alive = threading.Event()
        self.alive.set()
        self.loop = ControlLoop(
            self.arm, self.safety, self.watchdog, self.person, RobotClock(speed), PERIOD, max_steps
        )
        self._stop = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self):
        while not self._stop.wait(0.02):
            if self.alive.is_set():
                self.watchdog.hear()

    def plan(self, first=0, length=4, action=FORWARD, number=0):
        self.loop.follow(Plan(np.tile(action, (length, 1)), 5, number, {}, first))

    def take(self, count, seconds=3.0):
        deadline = time.monotonic() + seconds
        taken = []
        while len(taken) < count and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                taken.append(self.loop.finished.get(timeout=0.02))
        return taken

    def moved(self, since):
        rows = [row for row in self.arm.log if row[0] > since]
        return float(np.ptp([row[2] for row in rows])) if rows else 0.0

    def close(self):
        self._stop.set()
        self.loop.close()


@pytest.fixture
def stage():
    made = []

    def make(**options):
        made.append(Stage(**options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_plan_is_executed_step_by_step_at_the_arms_rate(stage):
    """Four steps of ten ticks; what comes out is the sum of the actions; set-points come a hundred times a second."""
    s = stage()
    view = s.loop.begin()
    assert view.state[4] == 0
    s.plan()
    done = s.take(4)
    assert [d.index for d in done] == [0, 1, 2, 3]
    assert [int(d.view.state[4]) for d in done] == [1, 2, 3, 4]
    for d in done:
        np.testing.assert_allclose(d.action, FORWARD, atol=1e-6)
        assert not d.refused and not d.intervention and d.plan.version == 5
    np.testing.assert_allclose(np.diff([d.timestamp for d in done]), PERIOD, atol=1e-6)
    s.loop.end()
    assert s.arm.log[-1][2] == pytest.approx(0.04, abs=1e-6)
    assert (
        40 <= len(s.arm.log) <= 40 + 2 * s.safety.settling
    )  # a machine that is late sends none twice
    gaps = np.diff([row[0] for row in s.arm.log])
    assert 0.009 < np.median(gaps) < 0.05


def test_a_late_chunk_is_cut_and_motion_goes_on(stage):
    """Its actions for steps that were executed meanwhile are skipped; nothing is executed twice."""
    s = stage()
    s.loop.begin()
    s.plan(length=4)
    done = s.take(3)
    s.plan(
        first=2, length=4, action=2 * FORWARD, number=1
    )  # for what was seen at step 2, while step 3 runs
    done += s.take(3)
    assert [(d.plan.number, d.index) for d in done] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 2),
        (1, 3),
    ]
    assert s.watchdog.holds == 0


def test_without_a_chunk_it_holds_and_then_stops(stage):
    """100 ms after the plan's end it holds; after the latch's time a person has to rearm."""
    s = stage()
    s.loop.begin()
    s.plan(length=2)
    s.take(2)
    time.sleep(0.3)
    assert s.loop.ruling.state == "holding" and "no chunk" in s.loop.ruling.reason
    held = time.monotonic()
    s.plan(first=1, length=20)
    time.sleep(0.3)
    assert s.loop.ruling.state == "holding", "what the plan begins with was seen before the hold"
    assert s.moved(held) < 1e-9
    time.sleep(0.8)
    assert s.loop.ruling.state == "stopped"
    s.person.said = ["rearm"]
    time.sleep(0.05)
    assert s.loop.ruling.state in ("moving", "holding")


def test_a_plan_after_a_hold_goes_on(stage):
    """The hold re-arms itself when a plan is there again."""
    s = stage()
    s.loop.begin()
    s.plan(length=1)
    s.take(1)
    time.sleep(0.25)
    assert s.loop.ruling.state == "holding"
    s.plan(first=1, length=3)
    assert len(s.take(3)) == 3


def test_silence_cuts_the_step_and_records_what_was_executed(stage):
    """In mid-motion: at rest within 300 ms of the last sign of life, and the action is what the arm was led to."""
    s = stage()
    s.loop.begin()
    s.plan(length=40, action=2 * FORWARD)
    s.take(3)
    s.alive.clear()
    cut = time.monotonic()
    while s.loop.ruling.may_move and time.monotonic() < cut + 2:
        time.sleep(0.002)
    assert time.monotonic() - cut < 0.3
    time.sleep(0.15)
    assert s.moved(time.monotonic() - 0.05) < 1e-9
    done = s.take(50, seconds=0.1)
    assert done[-1].refused and "holding" in done[-1].causes
    total = sum(float(d.action[1]) for d in done) + 3 * 0.02
    s.loop.end()
    assert s.arm.log[-1][2] == pytest.approx(total, abs=1e-5)


def test_a_person_takes_over_and_gives_back(stage):
    """From the next step on; the policy's wish is kept beside it; on handing back the old chunk is dropped."""
    s = stage()
    s.loop.begin()
    s.plan(length=30)
    s.take(2)
    s.person.action = np.array([0.0, 0, 0.005, 0, 0, 0, 0.0], np.float32)
    done = s.take(4)
    acting = [d for d in done if d.intervention]
    assert len(acting) >= 2 and s.loop.takeovers == 1
    np.testing.assert_allclose(acting[0].action, s.person.action, atol=1e-6)
    np.testing.assert_allclose(acting[0].policy_action, FORWARD, atol=1e-6)
    assert acting[0].plan is None and acting[0].index == -1
    s.person.action = None
    time.sleep(0.25)
    assert s.loop.planned == 0 and not s.loop.acting


def test_stop_keys_are_obeyed_in_the_next_tick(stage):
    """An emergency stop needs a release and then a rearming."""
    s = stage()
    s.loop.begin()
    s.plan(length=40)
    s.take(1)
    s.person.said = ["estop"]
    time.sleep(0.2)
    assert s.loop.ruling.state == "estop"
    assert s.moved(time.monotonic() - 0.05) < 1e-9
    s.person.said = ["rearm"]
    time.sleep(0.05)
    assert s.loop.ruling.state == "estop"
    s.person.said = ["release", "rearm"]
    time.sleep(0.05)
    assert s.loop.ruling.state != "estop"


def test_a_fault_ends_motion_and_the_arm_retreats(stage):
    """The step is cut; recovered, the arm goes up slowly."""
    s = stage()
    s.loop.begin()
    s.plan(length=40)
    s.take(2)
    s.arm.fault = "reflex"
    time.sleep(0.1)
    assert s.loop.fault == "reflex" and "reflex" in s.loop.ruling.reason
    s.loop.end()
    s.arm.recover()
    before = s.arm.measure().pose[2]
    began = time.monotonic()
    Recovery(s.arm, s.safety, s.watchdog, RobotClock()).retreat()
    assert s.arm.measure().pose[2] - before == pytest.approx(0.05, abs=1e-6)
    assert time.monotonic() - began > 0.9


def test_an_episode_ends_at_its_limit(stage):
    """The last step is truncated, and no other one begins."""
    s = stage(max_steps=5)
    s.loop.begin()
    s.plan(length=20)
    done = s.take(8, seconds=1.0)
    assert len(done) == 5 and done[-1].outcome.truncated and not done[-2].outcome.truncated


def test_a_simulated_clock_waits_for_the_policy(stage):
    """Faster than time nothing is late: the arm's clock stands still, and the same steps come out."""
    s = stage(speed=20.0)
    s.loop.begin()
    for number in range(3):
        time.sleep(0.3)
        s.plan(first=4 * number, number=number)
        done = s.take(4)
        assert [d.index for d in done] == [0, 1, 2, 3]
    assert s.watchdog.holds == 0
    assert s.loop.look().state[4] == 12


def test_what_fails_in_the_loop_is_told(stage):
    """An arm that raises ends the episode with its own error."""
    s = stage()
    s.loop.begin()
    s.arm.servo = lambda *_: (_ for _ in ()).throw(OSError("cable"))
    s.plan()
    time.sleep(0.2)
    s.loop.end()
    assert isinstance(s.loop.failed, OSError)
