"""Drivers of real arms against simulated controllers that take the real libraries' calls, and break on demand."""

import argparse
import importlib.util
import math
import re
import socket
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest

from deploy import doctor as deploy_doctor
from robot_bridge import arm_doctor as doctor
from robot_bridge import rig
from robot_bridge.camera_guard import RENDERED, CameraGuard
from robot_bridge.cameras import Camera, Cameras, Mode, make_camera, parse, square
from robot_bridge.driver import BUILT_IN, Frame, Outcome, make_driver
from robot_bridge.drivers import ur as ur_module
from robot_bridge.drivers.arm import within
from robot_bridge.eyes import Eyes
from robot_bridge.gripper import Hand, HandThread
from robot_bridge.limits import Limits
from robot_bridge.motion import exp
from robot_bridge.operator import Moment, make_operator
from robot_bridge.protocol import make_job
from robot_bridge.scene import Person, Stopped, describe
from tests import arm_libraries as libraries
from tests.test_bridge_drivers import REST, Loop
from twinrl.core.errors import ConfigError, DeadlineError, TwinRLError
from twinrl.core.gripper import Gripper, GripperKind
from twinrl.core.segment import Schema
from twinrl.core.sockets import free_port

SIZE = 32
UP = np.array([0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
ROOT = Path(__file__).parent.parent
JOINTS = {"franka": 7, "ur": 6, "xarm": 7, "lerobot": 6}
OPTIONS = {
    "franka": {"host": "10.0.0.2"},
    "ur": {"host": "127.0.0.1"},
    "xarm": {"host": "10.0.0.3", "force_sensor": 1},
    "lerobot": {"robot": "poses", "home": "0.45,0,0.24,0,0,0"},
}
REFLEX = {
    "franka": "reflex: cartesian reflex",
    "ur": "protective stop",
    "xarm": "controller error 31",
    "lerobot": "connection lost: cartesian_reflex",
}


class Someone:
    """Confirms at once, unless told to stop."""

    def __init__(self):
        self.asked, self.stops = [], False

    def heed(self):
        if self.stops:
            raise Stopped("stopped by the person at the robot")

    def ask(self, text, patience_s):
        self.asked.append(text)


class RobotiqServer:
    """The URCap's text protocol on a free port."""

    def __init__(self, bench):
        self.bench, self.position = bench, 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        try:
            peer, _ = self.server.accept()
        except OSError:
            return
        with peer:
            for line in peer.makefile():
                word, name, *value = line.split()
                if word == "SET":
                    if name == "FOR":
                        self.bench.calls.append(("grip", int(value[0])))
                    if name == "POS":
                        self.position = int(value[0])
                        self.bench.commands.append(("move", self.position))
                    peer.sendall(b"ack\n")
                else:
                    moving = 0 if self.bench.gripper_stuck else 3
                    known = {"POS": self.position, "OBJ": moving}
                    peer.sendall(f"{name} {known[name]}\n".encode())


@pytest.fixture
def scenery(monkeypatch):
    found = libraries.Scenery()
    libraries.install(monkeypatch, libraries.cv2(found))
    return found


@pytest.fixture
def make(monkeypatch, scenery):
    """make(kind, **options): a connected driver, and the bench that simulates its controller."""
    made = []

    def build(kind, connected=True, cameras=("side",), **options):
        bench = libraries.Bench(JOINTS[kind])
        libraries.install(monkeypatch, getattr(libraries, kind.replace("franka", "franky"))(bench))
        if kind == "ur":
            monkeypatch.setattr(ur_module.Robotiq, "PORT", RobotiqServer(bench).port)
        driver = make_driver(
            kind,
            **{"cameras": "side=v4l2:/dev/video0", "clear_m": 0.16, **OPTIONS[kind], **options},
        )
        driver.person = Someone()
        made.append(driver)
        if connected:
            connect(driver, cameras)
        return driver, bench

    yield build
    for driver in made:
        driver.disconnect()


def connect(driver, cameras=("side",), speed=1.0, **job):
    schema = Schema(27, 0, tuple(cameras), SIZE, 4)
    driver.connect(make_job(schema, {"run": "r", "task": "t", "instruction": "i", **job}), speed)


def until(true, seconds=3.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


KINDS = pytest.mark.parametrize("kind", ["franka", "ur", "xarm", "lerobot"])


# -- every arm ---------------------------------------------------------------------------------------------------


@KINDS
def test_contract(make, kind):
    """What `test_bridge_drivers` asks of a driver: it has what it says, rests at rest, and goes where it is told."""
    driver, _ = make(kind)
    configuration = driver.reset({"object": [0.51234, 0.1]}, "ood")
    assert configuration == {"object": [0.51234, 0.1], "region": "ood"}
    assert "[0.512, 0.1]" in driver.person.asked[0]
    assert 0.0 < driver.reset_seconds < 30.0 and not driver.simulated and not driver.lockstep
    loop = Loop(driver)
    before = driver.measure()
    np.testing.assert_allclose(before.pose, [0.45, 0, 0.24, 0, 0, 0], atol=6e-3)
    for _ in range(2):
        state = loop.state()
        assert state.dtype == np.float32 and state.shape == (len(driver.dimensions),)
        frame = driver.frames()["side"]
        assert frame.image.shape == (SIZE, SIZE, 3) and frame.image.dtype == np.uint8
        assert frame.image[-1, 0].tolist() == [200, 0, 0]  # red comes first
        assert time.monotonic() - frame.time < 0.2
        verdict, outcome = loop.step(REST)
        assert not verdict.causes and outcome == Outcome()
    np.testing.assert_allclose(driver.measure().pose, before.pose, atol=6e-3)
    if driver.joint_range is not None:
        assert before.joints.shape == driver.joint_range[0].shape
    start = loop.safety.target.copy()
    for k in range(6):
        action = np.array([0.02, -0.01, -0.01, 0.05, 0.02, 0.1, 1.0]) if k < 4 else REST
        verdict, _ = loop.step(action)
        assert not verdict.causes
    until(lambda: np.abs(driver.measure().pose - loop.safety.target).max() < 2e-3)
    after = driver.measure()
    np.testing.assert_allclose(after.pose[:3] - start[:3], [0.08, -0.04, -0.04], atol=3e-3)
    assert before.fault == after.fault == ""


@KINDS
def test_a_reflex_is_told_and_recovered_from(make, kind):
    """It stands, says why, takes no set-points; afterwards it goes on from where it stands."""
    driver, bench = make(kind)
    driver.reset(None, "id")
    place = driver.measure().pose
    bench.fault = "cartesian_reflex"
    until(lambda: driver.measure().fault)
    assert driver.measure().fault.startswith(REFLEX[kind])
    for k in range(20):
        driver.servo(place + 0.005 * k * UP, 1.0)
        time.sleep(0.005)
    assert driver.measure().pose[2] < place[2] + 0.02
    if kind == "lerobot":
        bench.fault = ""  # nothing but the plug-in can clear it
    driver.recover()
    assert driver.measure().fault == ""
    place = driver.measure().pose
    for k in range(40):
        driver.servo(place + 0.002 * k * UP, 1.0)
        time.sleep(0.01)
    assert driver.measure().pose[2] > place[2] + 0.03


@KINDS
def test_a_lost_connection_is_a_fault_and_then_an_error(make, kind):
    """Not an exception out of the control loop's calls; recovering says that it is not there, or finds it again."""
    driver, bench = make(kind)
    driver.reset(None, "id")
    before = driver.measure()
    bench.lost = True
    until(lambda: driver.measure().fault)
    found = driver.measure()
    assert "connection lost" in found.fault
    np.testing.assert_allclose(found.pose, before.pose, atol=0.01)
    driver.servo(found.pose, 1.0)
    with pytest.raises(TwinRLError):
        driver.recover()
    bench.lost = False
    driver.recover()
    until(lambda: driver.measure().fault == "", 6.0)


@KINDS
def test_the_way_home_can_be_stopped_and_has_a_deadline(make, kind):
    """By the person's key, and by the clock; the arm is told to stop each time."""
    driver, bench = make(kind, home_s=0.3)
    driver.person.stops = True
    with pytest.raises(Stopped):
        driver.reset(None, "id")
    driver.person.stops, bench.body.stuck = False, True
    driver.home = (0.75, 0.4, 0.24, 0, 0, 0) if kind == "lerobot" else driver.home
    with pytest.raises(DeadlineError, match=r"the way home took more than 0.3 s"):
        driver.reset(None, "id")
    assert kind == "lerobot" or ("stop",) in bench.calls
    targets = bench.body.targets
    time.sleep(0.1)
    assert bench.body.targets <= targets + 1


@KINDS
def test_what_cannot_be_connected_is_said(make, kind):
    """Unknown options, missing address, speed, poses and cameras that an arm has not."""
    driver, _ = make(kind, connected=False)
    with pytest.raises(ConfigError, match="a real arm knows only 1"):
        connect(driver, speed=5.0)
    with pytest.raises(ConfigError, match="has only cameras"):
        connect(driver, observe="state")
    with pytest.raises(ConfigError, match="the run needs camera 'wrist', configured are side"):
        connect(driver, ("side", "wrist"))
    if kind != "lerobot":  # whose options belong to the plug-in
        with pytest.raises(ConfigError, match=r"unexpected keyword argument 'hots'"):
            make_driver(kind, hots="10.0.0.2")
        with pytest.raises(ConfigError, match="needs --robot-option host"):
            make_driver(kind)
    with pytest.raises(ConfigError, match="option scene is 'wait', not one of ask, leave"):
        make_driver(kind, **{**OPTIONS[kind], "scene": "wait"})


@pytest.mark.parametrize("kind", ["franka", "ur", "xarm", "lerobot"])
def test_a_missing_library_is_named(monkeypatch, scenery, kind):
    """With the line that installs it; nothing is imported before."""
    packages = {"franka": "franky-control", "ur": "ur-rtde", "xarm": "xarm-python-sdk"}
    for name in ("franky", "rtde_control", "xarm", "xarm.wrapper", "lerobot"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    driver = make_driver(kind, scene="leave", **OPTIONS[kind], cameras="side=v4l2:0")
    with pytest.raises(ConfigError, match=rf"pip install {packages.get(kind, 'lerobot')}"):
        connect(driver)
    driver.disconnect()


@KINDS
def test_what_is_wrong_with_cameras_is_said(make, scenery, kind):
    """Frozen, dark, unplugged; what is well again is so, also what was unplugged; without cameras there is no reset."""
    driver, _ = make(kind)
    driver.reset(None, "id")
    eyes = Eyes(driver, 0.01, 0.3)

    def wrong():
        eyes.tick()
        time.sleep(0.005)
        return eyes.wrong

    scenery.frozen = True
    until(lambda: wrong().kind == "frozen", 5.0)
    assert "camera 'side' is frozen" in eyes.wrong.text
    scenery.frozen = False
    until(lambda: not wrong().kind)
    scenery.dark = True
    until(lambda: wrong().kind == "dark")
    scenery.dark = False
    until(lambda: not wrong().kind)
    scenery.unplugged = True
    until(lambda: wrong().kind == "missing")
    assert "/dev/video0 sends no frames any more" in eyes.wrong.text
    assert driver.measure().fault == "", "the arm itself is well"
    with pytest.raises(TwinRLError, match="sends no frames any more"):
        driver.reset(None, "id")
    scenery.unplugged = False
    until(lambda: not wrong().kind, 5.0)
    driver.reset(None, "id")
    assert eyes.counts == {"frozen": 1, "dark": 1, "missing": 1}
    assert "camera 'side' is frozen" in eyes.fault


@pytest.mark.parametrize("kind", ["franka", "ur", "xarm"])
def test_the_gripper_has_a_thread_of_its_own(make, kind):
    """Set-points do not wait for fingers, a wish is one command, and fingers that hang are a fault."""
    driver, bench = make(kind, gripper_s=0.05)
    driver.reset(None, "id")
    del bench.commands[:]
    place = driver.measure().pose
    bench.gripper_s = 0.3
    began = time.monotonic()
    for _ in range(20):
        driver.servo(place, 0.1)
    assert time.monotonic() - began < 0.2
    time.sleep(0.5)
    for _ in range(20):
        driver.servo(place, 0.5)  # between the thresholds: stays closed
    until(lambda: bench.commands)
    time.sleep(0.1)
    assert len(bench.commands) == 1
    if kind == "franka":
        assert bench.commands == [("grasp", 0.0, 20.0)] and driver.measure().width == 0.02
    for _ in range(20):
        driver.servo(place, 0.9)
        time.sleep(0.01)
    until(lambda: len(bench.commands) == 2)


# -- Franka ------------------------------------------------------------------------------------------------------


def test_no_gripper_squeezes_with_more_than_its_limit(make):
    """What options ask for beyond it is refused before anything is reached; what is within it is what the gripper is told."""
    parser = argparse.ArgumentParser()
    rig.add_arguments(parser)

    def attach(kind, limit, **options):
        options = {**OPTIONS[kind], **options}
        words = [w for pair in options.items() for w in ("--robot-option", "{}={}".format(*pair))]
        limits = ["--limit", f"gripper_force_n={limit}"]
        return rig.make_rig(parser.parse_args(["--robot", kind, *words, *limits]))

    with pytest.raises(ConfigError, match=r"would squeeze with 20 N, .* allows 15 N: .*grasp_n"):
        attach("franka", 15)
    assert attach("franka", 15, grasp_n=12).limits.gripper_force_n == 15.0
    with pytest.raises(ConfigError, match=r"would squeeze with 45.3 N, .* allows 30 N: .*grip="):
        attach("ur", 30, grip=30)
    with pytest.raises(ConfigError, match="xArm Gripper's force cannot be set"):
        attach("xarm", 25)
    for kind in (
        "franka",
        "ur",
        "xarm",
        "lerobot",
    ):  # what they do unless told otherwise is allowed
        assert attach(kind, Limits().gripper_force_n).driver.kind == kind
    for kind in ("franka", "ur", "xarm"):
        attach(kind, 1, gripper="none")
    driver, bench = make("franka", grasp_n=12)
    driver.reset(None, "id")
    until(
        lambda: (
            driver.servo(driver.measure().pose, 0.0)
            or bench.commands[-1:] == [("grasp", 0.0, 12.0)]
        )
    )
    _, bench = make("ur", grip=8)
    assert ("grip", 8) in bench.calls


def test_franka_is_told_what_the_options_say(make):
    """Gains for each axis, clips, load and thresholds reach the library."""
    options = {
        **{"stiffness": "800,800,400,30,30,20", "damping": "60,60,40,10,10,8"},
        **{"error_clip_m": 0.02, "load_kg": 0.4, "collision_n": 25, "realtime": "ignore"},
    }
    driver, bench = make("franka", **options)
    driver.reset(None, "id")
    assert ("Robot", "10.0.0.2", 1) in bench.calls
    assert ("collision", 20.0, 25.0) in bench.calls and ("load", 0.4) in bench.calls
    assert ("gains", (800, 800, 400, 30, 30, 20), [60, 60, 40, 10, 10, 8]) in bench.calls
    tracking = next(call[1] for call in bench.calls if call[0] == "tracking")
    assert tracking["translational_error_clip"] == [0.02] * 3
    assert tracking["max_delta_tau"] == 1.0 and "posture_task" in tracking


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"stiffness": "600"}, "option stiffness is '600', must be 2 or 6 comma-separated numbers"),
        ({"stiffness": "0,40"}, "must be above 0"),
        ({"model": "fr2"}, "option model is 'fr2', not one of fr3, fer"),
        ({"home_speed": 2.0}, "option home_speed is 2, must be above 0, and 0.5 at most"),
        ({"home": "1,2,3"}, "option home is '1,2,3', must be 7"),
        ({"cameras": "side"}, "camera 'side' is not of the form NAME=KIND:ADDRESS"),
        ({"cameras": "side=zed:1"}, "kind 'zed' is none of v4l2, realsense, lerobot"),
        ({"camera_size": "big"}, "must be WIDTHxHEIGHT"),
        ({"close_below": 0.9}, "gripper close_below 0.9"),
    ],
)
def test_wrong_options_are_refused_with_what_is_right(options, text):
    """Before anything is connected."""
    with pytest.raises(ConfigError, match=re.escape(text)):
        make_driver("franka", host="10.0.0.2", **options)


def test_a_franka_whose_stop_button_is_pressed(make):
    """It cannot be recovered from here: a person has to release it."""
    driver, bench = make("franka")
    driver.reset(None, "id")
    bench.user_stop = True
    assert "user stop: release the stop button" in driver.measure().fault
    with pytest.raises(TwinRLError, match="release the stop button"):
        driver.recover()
    bench.user_stop = False
    assert driver.measure().fault  # what was running has ended
    driver.recover()
    assert driver.measure().fault == ""
    bench.fault, bench.unrecoverable = "joint_reflex", True
    driver.measure()
    with pytest.raises(TwinRLError, match="look at Desk"):
        driver.recover()


def test_a_franka_that_does_not_answer_has_a_deadline(make, monkeypatch):
    """Its library would wait for a minute."""
    monkeypatch.setattr("robot_bridge.drivers.franka.CONNECT_S", 0.2)
    driver, _ = make("franka", connected=False, host="nowhere")
    with pytest.raises(DeadlineError, match=r"franka nowhere: no answer within 0.2 s"):
        connect(driver)


def test_an_old_franky_is_refused(make, monkeypatch):
    """1.x has no impedance tracking."""
    driver, _ = make("franka", connected=False)
    franky = importlib.import_module("franky")
    monkeypatch.delattr(franky, "CartesianImpedanceTrackingMotion")
    with pytest.raises(ConfigError, match=r"franky-control 2.0 or newer"):
        connect(driver)


def test_a_tool_mounted_with_another_yaw(make):
    """The pose is ours, the matrix the arm's: turned about the tool's own axis."""
    driver, bench = make("franka", tool_yaw=0.5)
    turn = exp(np.array([0.0, 0.0, 0.5]))
    bench.body.home[:3, :3] = bench.body.home[:3, :3] @ turn
    driver.reset(None, "id")
    np.testing.assert_allclose(driver.measure().pose[3:], 0.0, atol=1e-9)
    np.testing.assert_allclose(bench.body.target[:3, :3], np.diag([1.0, -1, -1]) @ turn, atol=1e-9)


def test_without_a_terminal_nobody_is_asked(make):
    """So it is refused before anything moves, unless told to leave the scene."""
    driver, bench = make("franka", connected=False)
    driver.person = None
    with pytest.raises(ConfigError, match=r"no terminal.*scene=leave"):
        connect(driver)
    driver, bench = make("franka", connected=False, scene="leave")
    driver.person = None
    connect(driver)
    assert driver.reset(None, "ood") == {"region": "ood"}
    assert bench.body.targets


def test_measured_force_is_of_force_alone(make):
    """Torques are not newtons."""
    for kind in ("franka", "ur", "xarm"):
        driver, bench = make(kind)
        bench.force = 12.0
        assert driver.measure().force == pytest.approx(12.0)


# -- LeRobot -----------------------------------------------------------------------------------------------------


def test_lerobot_robots_that_cannot_be_driven(make, monkeypatch):
    """Joints without kinematics, and a type that no package brings."""
    driver, bench = make("lerobot", connected=False, robot="joints")
    bench.next_type = "joints"
    with pytest.raises(ConfigError, match=r"neither poses .* nor kinematics"):
        connect(driver)
    driver, _ = make("lerobot", connected=False, robot="so999")
    with pytest.raises(ConfigError, match=r"no robot 'so999', only joints, poses.*lerobot_robot_"):
        connect(driver)
    driver, _ = make("lerobot", connected=False, calibrated="0")
    with pytest.raises(TwinRLError, match="run lerobot-calibrate first"):
        connect(driver)


def test_lerobot_cameras_of_the_robot(make):
    """A camera that the plug-in has needs no other configuration; the job's size comes out."""
    driver, _ = make("lerobot", cameras=("side", "top"))
    driver.reset(None, "id")
    frames = driver.frames()
    assert frames["top"].image.shape == (SIZE, SIZE, 3) and frames["top"].image[-1, 0, 0] == 90
    assert driver.measure().width == pytest.approx(0.08)


def test_a_lerobot_teleoperator_takes_over_and_marks(make):
    """While the person intervenes its deltas are actions; endings are marks."""
    _, bench = make("lerobot", connected=False)
    bench.next_type = "pad"
    operator = make_operator("lerobot", teleop="pad", step_m=0.02)
    moment = Moment(0, np.zeros(3), None, np.zeros(6))
    bench.pad_events = {"is_intervention": False}
    bench.pad_action = {"delta_x": 1.0}
    assert operator.act(moment) is None
    bench.pad_events = {"is_intervention": True}
    bench.pad_action = {"delta_x": 1.0, "delta_z": -0.5, "gripper": 0}
    np.testing.assert_allclose(operator.act(moment), [0.02, 0, -0.01, 0, 0, 0, 0])
    bench.pad_action = {}
    np.testing.assert_allclose(operator.act(moment), [0, 0, 0, 0, 0, 0, 0])  # it stays closed
    for events, mark in (
        ({"success": True}, ["success"]),
        ({"terminate_episode": True}, ["failure"]),
        ({"terminate_episode": True, "rerecord_episode": True}, ["discard"]),
        ({}, []),
    ):
        bench.pad_events = events
        operator.act(moment)
        assert operator.marks() == mark
    operator.close()
    bench.next_type = "leader"
    with pytest.raises(ConfigError, match=r"joints of a leader arm"):
        make_operator("lerobot", teleop="leader")


# -- parts -------------------------------------------------------------------------------------------------------


def test_a_binary_gripper_has_hysteresis_and_is_busy():
    """Between the thresholds nothing changes; what is wanted while it is busy counts when it is free."""
    gripper = Gripper(GripperKind("binary", 0.4, 0.6, 0.5))
    assert gripper(0.5, 0.0) is None and gripper(0.39, 0.1) == 0.0
    assert gripper(1.0, 0.3) is None and gripper.busy(0.3)
    assert gripper(0.5, 0.7) is None and gripper.commanded == 0.0
    assert gripper(math.nan, 0.7) is None
    assert gripper(0.61, 0.7) == 1.0 and gripper(5.0, 2.0) is None


def test_a_continuous_gripper_sends_what_is_worth_a_command():
    """Small changes are none, unless they open or close it wholly."""
    gripper = Gripper(GripperKind("continuous", step=0.1), 0.5)
    sent = [gripper(wanted, k) for k, wanted in enumerate((0.55, 0.6, 0.65, 0.95, 1.0, 1.2))]
    assert sent == [None, 0.6, None, 0.95, 1.0, None]


@pytest.mark.parametrize(
    "kind",
    [
        GripperKind("vacuum"),
        GripperKind(close_below=0.7),
        GripperKind(busy_s=99),
        GripperKind(step=-1),
    ],
)
def test_grippers_that_cannot_be(kind):
    """Each with its values."""
    with pytest.raises(ConfigError, match="gripper"):
        Gripper(kind)


class Fingers(Hand):
    def __init__(self):
        self.begun, self.done, self.unread = [], True, False

    def start(self, opening):
        if opening == 0.5:
            raise OSError("no such width")
        self.begun.append(opening)
        self.done = False

    def is_done(self):
        return self.done

    def width(self):
        if self.unread:
            raise OSError("lost packet")
        return 0.04

    def close(self):
        self.closed = True


def test_of_commands_that_wait_the_newest_is_carried_out(monkeypatch):
    """And one that never ends is a fault, as fingers that cannot be read; a lost packet is not."""
    fingers = Fingers()
    thread = HandThread(fingers)
    thread.ask(0.0)
    until(lambda: fingers.begun == [0.0])
    for opening in (1.0, 0.2, 0.9):
        thread.ask(opening)
    assert thread.moving
    fingers.done = True
    until(lambda: fingers.begun == [0.0, 0.9])
    fingers.done = fingers.unread = True
    until(lambda: not thread.moving)
    time.sleep(0.1)
    fingers.unread = False
    assert thread.fault == ""
    thread.ask(0.5)
    until(lambda: thread.fault == "the gripper: no such width")
    thread.clear()
    monkeypatch.setattr("robot_bridge.gripper.OVERDUE", 0.1)
    thread.ask(0.1)
    until(lambda: "no end of a command after 0.1 s" in thread.fault)
    thread.close()
    assert fingers.closed


def test_guard():
    """Missing, late, frozen, dark: in words, and not before it lasts."""
    guard = CameraGuard(("a", "b"))
    noise = np.random.default_rng(0).integers(50, 200, (40, 8, 8, 3), np.uint8)

    def see(k, image, **other):
        frames = {"a": Frame(k / 30, image), "b": Frame(k / 30, noise[k]), **other}
        return guard(frames, k / 30).text

    assert see(0, noise[0]) == ""
    assert guard({"b": Frame(0.0, noise[0])}, 0.0) == (
        "missing",
        "camera 'a' has no frame",
    )
    late = guard({"a": Frame(0.0, noise[0]), "b": Frame(0.5, noise[1])}, 0.5)
    assert late == ("late", "camera 'a' is late: its newest frame is 0.5 s old")
    guard.begin()
    for _ in range(40):  # the same frame looked at again and again is not frozen
        assert see(1, noise[1]) == ""
    found = [see(k, noise[1]) for k in range(2, 20)]
    assert found[:13] == [""] * 13 and "is frozen: 15 frames" in found[13]
    assert see(20, noise[20]) == ""
    found = [see(k, noise[k] // 64) for k in range(21, 30)]
    assert found[:4] == [""] * 4 and "camera 'a' is dark: mean 1" in found[4]
    assert see(30, noise[30]) == ""


def test_a_picture_without_noise_is_never_frozen():
    """What is rendered of a still scene is always alike; dark and late it is all the same."""
    guard = CameraGuard(("a",), RENDERED)
    image = np.full((8, 8, 3), 90, np.uint8)
    found = [guard({"a": Frame(k / 30, image)}, k / 30) for k in range(200)]
    assert {each.kind for each in found} == {""}
    assert guard({"a": Frame(6.8, image)}, 7.5).kind == "late"


def test_with_a_clock_that_stands_still_frames_count_from_when_they_are_seen():
    """Their own times say when they were rendered, on another clock."""
    guard = CameraGuard(("a",), RENDERED, lockstep=True)
    image = np.full((8, 8, 3), 90, np.uint8)
    found = [guard({"a": Frame(5e5, image)}, 0.1 * k).kind for k in range(6)]
    assert found == ["", "", "", "late", "late", "late"] or found == [
        "",
        "",
        "",
        "",
        "late",
        "late",
    ]
    assert guard({"a": Frame(5e5 + 1e-3, image)}, 0.7).kind == ""


class Painted(Camera):
    def open(self, mode):
        self.number = 0

    def read(self):
        time.sleep(0.01)
        self.number += 1
        if self.address == "short" and self.number > 3:
            raise TwinRLError("cable")
        return Frame(time.monotonic(), np.full((30, 50, 3), self.number, np.uint8))

    def close(self):
        self.closed = True


def test_cameras_film_until_they_are_closed(monkeypatch):
    """Newest frames, of the job's size; one that fails is named, one that cannot be opened as well."""
    both = {"a": Painted("long"), "b": Painted("short")}
    cameras = Cameras(both, 10, Mode())
    assert cameras.frames()["a"].image.shape == (10, 10, 3)
    until(lambda: cameras.error)
    assert cameras.error == "camera 'b': cable"
    with pytest.raises(TwinRLError, match="camera 'b': cable"):
        cameras.wait(time.monotonic(), 1.0)
    cameras.close()
    assert both["a"].closed and both["b"].closed


def test_a_camera_that_is_not_there(scenery):
    """An error in words, and nothing that looks like a frame."""
    with pytest.raises(TwinRLError, match=r"camera 'side': /dev/none cannot be opened"):
        Cameras({"side": make_camera("v4l2", "/dev/none")}, SIZE, Mode())


def test_a_realsense_tells_when_it_exposed(monkeypatch):
    """Its own time where its clock is this PC's. (Its library's signatures are not recorded.)"""
    names = types.SimpleNamespace
    started = []

    class Color:
        domain, age = "system", 0.05

        def get_frame_timestamp_domain(self):
            return self.domain

        def get_timestamp(self):
            return 1000.0 * (time.time() - self.age)

        def get_data(self):
            return np.full((48, 64, 3), 7, np.uint8)

    class Pipeline:
        def start(self, config):
            if config.serial == "0":
                raise RuntimeError("No device connected")
            started.append(config.serial)

        def wait_for_frames(self, timeout_ms):
            return names(get_color_frame=Color)

        def stop(self):
            started.clear()

    class Config:
        def enable_device(self, serial):
            self.serial = serial

        def enable_stream(self, *what):
            assert what == ("color", 640, 480, "rgb8", 30)

    module = types.ModuleType("pyrealsense2")
    module.pipeline, module.config = Pipeline, Config
    module.stream, module.format = names(color="color"), names(rgb8="rgb8")
    module.timestamp_domain = names(system_time="system", global_time="global")
    libraries.install(monkeypatch, {"pyrealsense2": module})
    camera = make_camera("realsense", "230422")
    camera.open(Mode())
    assert started == ["230422"]
    assert time.monotonic() - camera.read().time == pytest.approx(0.05, abs=0.02)
    Color.domain = "hardware"
    assert time.monotonic() - camera.read().time < 0.02
    camera.close()
    assert not started
    with pytest.raises(TwinRLError, match=r"camera 'wrist': RealSense 0: No device connected"):
        Cameras({"wrist": make_camera("realsense", "0")}, SIZE, Mode())


def test_frames_are_the_middle_square_averaged():
    """Whatever the sizes; a mean is kept."""
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, 10:50] = 100
    image[:20, 10:30] = 200
    small = square(image, 4)
    assert small.shape == (4, 4, 3) and small[0, 0, 0] == 200 and small[3, 3, 0] == 100
    noise = np.random.default_rng(1).integers(0, 255, (47, 63, 3), np.uint8)
    assert square(noise, 32).mean() == pytest.approx(noise[:, 8:55].mean(), abs=2.0)
    assert square(noise, 64).shape == (64, 64, 3) and np.array_equal(
        square(noise, 47), noise[:, 8:55]
    )


def test_addresses_of_cameras():
    """Several, with colons and equals signs in what belongs to the device."""
    assert parse("side=v4l2:/dev/video0, wrist=lerobot:zmq;port=5=6") == {
        "side": ("v4l2", "/dev/video0"),
        "wrist": ("lerobot", "zmq;port=5=6"),
    }
    assert parse("") == {}


class Keys:
    def __init__(self, *keys):
        self.keys = [*keys]

    def pressed(self):
        return [self.keys.pop(0)] if self.keys else []


def test_a_person_is_asked_within_a_deadline(capsys):
    """c confirms, escape stops, nobody is an error; what was typed before does not count."""
    Person(Keys("c", "x", "c")).ask("Place the cube.", 1.0)
    assert "Place the cube." in capsys.readouterr().err
    with pytest.raises(Stopped):
        Person(Keys("c", "\x1b")).ask("Place the cube.", 1.0)
    with pytest.raises(DeadlineError, match=r"nobody confirmed within 0.2 s: Place the cube\."):
        Person(Keys("c")).ask("Place the cube.", 0.2)
    with pytest.raises(Stopped):
        Person(Keys("\x1b")).heed()
    assert describe(None, "id") == "Place the scene as you like, within region 'id'."
    with pytest.raises(ConfigError, match=r"no terminal"):
        Person(None)


def test_a_library_that_never_returns():
    """Its result, its exception, or a deadline."""
    assert within(1.0, "it", lambda: 3) == 3
    with pytest.raises(OSError, match="no"):
        within(1.0, "it", lambda: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(DeadlineError, match=r"it: no answer within 0.05 s"):
        within(0.05, "it", lambda: time.sleep(1.0))


# -- signatures --------------------------------------------------------------------------------------------------


def test_every_kind_is_registered():
    """And is made without its library."""
    for kind in JOINTS:
        assert make_driver(kind, **OPTIONS[kind]).kind == kind
        assert kind in BUILT_IN


def test_the_record_is_of_what_the_drivers_use():
    """`scripts/arm_signatures.py` asks for what was recorded, no more and no less; calls that do not fit are refused."""
    spec = importlib.util.spec_from_file_location("record", ROOT / "scripts" / "arm_signatures.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for distribution, modules in script.USED.items():
        wanted = {f"{module}.{name}" for module, names in modules.items() for name in names}
        assert wanted == set(libraries.RECORD[distribution]["signatures"]), distribution
        assert re.match(r"\d+\.\d+", libraries.RECORD[distribution]["version"])
    signature = [["pose", False], ["speed", True]]
    assert libraries.takes(signature, (1,), {"speed": 2}) and libraries.takes(signature, (1, 2), {})
    for args, kwargs in (((), {}), ((1, 2, 3), {}), ((1,), {"pose": 1}), ((1,), {"sped": 1})):
        assert not libraries.takes(signature, args, kwargs)
    with pytest.raises(TypeError, match=r"franky.Robot.set_load does not take"):
        libraries.check("franky.Robot.set_load", (1.0,), {})


# -- doctor ------------------------------------------------------------------------------------------------------


class Fci:
    """A Franka's control interface on a free port: answers versions, then sends numbered state packets."""

    def __init__(self, monkeypatch, version=10, skip=(), packets=300):
        self.version, self.skip, self.packets = version, set(skip), packets
        self.server = socket.create_server(("127.0.0.1", 0))
        monkeypatch.setattr(doctor, "FCI", self.server.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                peer, _ = self.server.accept()
            except OSError:
                return
            with peer:
                command, number, size = doctor.HEADER.unpack(peer.recv(doctor.HEADER.size))
                assert (command, size) == (0, 16)
                version, port = doctor.VERSIONS.unpack(peer.recv(4))
                status = int(version != self.version)
                answer = doctor.VERSIONS.pack(status, self.version) + b"\0" * 4
                peer.sendall(doctor.HEADER.pack(0, number, 12 + len(answer)) + answer)
                if status == 0 and port > 1024:
                    self._send(port)

    def _send(self, port):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as state:
            for k in range(self.packets):
                if k not in self.skip:
                    state.sendto(k.to_bytes(8, "little") + b"\0" * 100, ("127.0.0.1", port))
                time.sleep(0.001)


def test_doctor_reads_a_frankas_version(monkeypatch):
    """And compares it with the library's, which it need not have."""
    Fci(monkeypatch, version=7)
    monkeypatch.setattr(doctor, "libfranka", lambda: ())
    found = doctor.check_fci("127.0.0.1")
    assert found.level == "ok" and "server version 7 (system 5.5 or newer)" in found.text
    monkeypatch.setattr(doctor, "libfranka", lambda: (0, 21, 2))
    found = doctor.check_fci("127.0.0.1")
    assert found.level == "failed" and "libfranka 0.21.2 speaks 10" in found.text
    assert found.cure.endswith("by-robot-server-version/7/")
    monkeypatch.setattr(doctor, "libfranka", lambda: (0, 13, 3))
    assert doctor.check_fci("127.0.0.1").level == "ok"
    wheels = (
        (0, 7, 1),
        (0, 8, 0),
        (0, 9, 2),
        (0, 12, 1),
        (0, 13, 3),
        (0, 14, 2),
        (0, 17, 0),
        (0, 21, 2),
    )
    assert [doctor.server_of(version) for version in wheels] == [3, 4, 5, 6, 7, 8, 9, 10]
    assert doctor.server_of(()) == 0


def test_doctor_counts_packets(monkeypatch):
    """Those that did not come, by number; nothing for a second is a finding, too."""
    Fci(monkeypatch, version=9, skip=range(20, 50))
    found = doctor.check_network("127.0.0.1", 0.25)
    assert found.level == "failed" and re.search(r"[1-9]\d?\.\d\d % lost", found.text), found.text
    Fci(monkeypatch, packets=1)
    found = doctor.check_network("127.0.0.1", 0.1)
    assert (
        found.level == "failed"
        and "1 state packets came" in found.text
        and "firewall" in found.cure
    )


def test_doctor_without_an_arm(monkeypatch, capsys):
    """Each finding says what to do, and the command fails."""
    monkeypatch.setattr(doctor, "FCI", free_port())
    assert (
        deploy_doctor.command(["--robot", "franka", "--host", "127.0.0.1", "--seconds", "0.1"]) == 1
    )
    said = capsys.readouterr().out
    assert "activate FCI in Desk" in said and "no state from 127.0.0.1" in said
    assert said.count("->") >= said.count("FAIL")
    monkeypatch.setitem(doctor.LIBRARIES, "ur", ("ur-rtde", (("RTDE", free_port()),)))
    assert deploy_doctor.command(["--robot", "ur", "--host", "127.0.0.1"]) == 1
    assert "RTDE at 127.0.0.1" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        deploy_doctor.command(["--robot", "franka"])
    assert "--robot KIND and --host go together" in capsys.readouterr().err


def test_doctor_knows_a_real_time_kernel(tmp_path, monkeypatch):
    """By the kernel's own mark; governors from theirs."""
    system = tmp_path / "sys"
    governor = system / "devices/system/cpu/cpu0/cpufreq/scaling_governor"
    governor.parent.mkdir(parents=True)
    (system / "kernel").mkdir()
    for mark, governing, levels in (
        ("1", "performance", ["ok", "ok"]),
        ("0", "powersave", ["failed", "warning"]),
    ):
        (system / "kernel/realtime").write_text(mark + "\n")
        governor.write_text(governing + "\n")
        found = [doctor.check_realtime(str(tmp_path)), doctor.check_governor(str(tmp_path))]
        assert [finding.level for finding in found] == levels
        assert all(finding.cure for finding in found if finding.level != "ok")
    monkeypatch.setattr(doctor.platform, "version", lambda: "#1 SMP PREEMPT_RT")
    assert doctor.check_realtime("/nowhere").level == "ok"
    assert doctor.check_governor("/nowhere").level == "warning"
