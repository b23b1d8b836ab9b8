"""Devices in a person's hand: their real reports through pipes and sockets, and who acts when."""

import fcntl
import io
import os
import pty
import socket
import struct
import time

import numpy as np
import pytest

from robot_bridge.driver import make_driver
from robot_bridge.limits import Limits
from robot_bridge.motion import DOWN, exp
from robot_bridge.operator import Moment, make_operator
from robot_bridge.operators import evdev
from robot_bridge.operators.device import REST, Device, Input, seen_from, shaped, signs
from robot_bridge.operators.gamepad import Gamepad, GamepadOperator
from robot_bridge.operators.keyboard import KeyboardOperator
from robot_bridge.operators.scripted import ScriptedOperator
from robot_bridge.operators.spacemouse import SpaceMouse, SpaceMouseOperator
from robot_bridge.teleop import watch
from robot_bridge.terminal import Terminal
from robot_bridge.watchdog import STOPPED
from tests.test_bridge_control import FORWARD, Stage
from tests.test_bridge_safety import check_path
from twinrl.core.errors import ConfigError

X, Y, Z, RX, RY, RZ, HAT_X, HAT_Y = 0, 1, 2, 3, 4, 5, 16, 17
SOUTH, EAST, NORTH, WEST, LEFT_BUMPER, SELECT, START = 304, 305, 307, 308, 310, 314, 315
STICK, TRIGGER, HAT = (-32768, 32767), (0, 255), (-1, 1)  # as the kernel's xpad driver says them
RANGES = {X: STICK, Y: STICK, RX: STICK, RY: STICK, Z: TRIGGER, RZ: TRIGGER, HAT_X: HAT, HAT_Y: HAT}
POINT = make_driver("point")
PATIENT = {"heartbeat_s": 2.0, "latch_s": 5.0}  # what is tested here is no late thread


def moment(step=0, gripper=1.0, commanded=None, driver=POINT):
    pose = np.zeros(6) if commanded is None else commanded
    return Moment(step, pose[:3], driver, pose, gripper)


def until(holds, seconds=3.0):
    """Whether `holds()` becomes true in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


class Wire:
    """A gamepad's event device: a pipe that carries what the kernel would write."""

    def __init__(self):
        self._out, self._in = os.pipe()

    def events(self, *events):
        packed = [struct.pack("llHHi", 1, 2, *each) for each in events]
        os.write(self._in, b"".join(packed))

    def axis(self, **values):
        codes = {"x": X, "y": Y, "rx": RX, "ry": RY, "lt": Z, "rt": RZ, "hx": HAT_X, "hy": HAT_Y}
        self.events(*((3, codes[name], value) for name, value in values.items()), (0, 0, 0))

    def key(self, code, down):
        self.events((4, 4, 589825), (1, code, int(down)), (0, 0, 0))  # MSC_SCAN comes with each key

    def device(self):
        return evdev.EventDevice(os.dup(self._out), RANGES)

    def unplug(self):
        if self._in >= 0:
            os.close(self._in)
            self._in = -1

    def close(self):
        self.unplug()
        os.close(self._out)


class Pad(Gamepad):
    """A gamepad on a wire, found as long as there is one."""

    def __init__(self, wire):
        super().__init__()
        self.wire = wire

    def open(self):
        if self.wire is None:
            raise ConfigError("no gamepad")
        return self.use(self.wire.device(), frozenset(RANGES))


class Cap(Device):
    """A device without hardware: says what it was given."""

    kind = "cap"

    def __init__(self):
        self.given, self.gone = [], False

    def open(self):
        return Input(REST, frozenset())

    def read(self, seconds):
        if self.gone:
            raise OSError("pulled out")
        if not self.given:
            time.sleep(0.001)
        given, self.given = self.given, []
        return given

    def close(self):
        pass

    def say(self, *axes, down=()):
        self.given.append(Input(np.array([*axes, *REST[len(axes) :]]), frozenset(down)))


def hand_on(cap, **options):
    """Without its silence counting: a test says things once."""
    return SpaceMouseOperator(device=cap, **{"silent_s": 0.0, **options})


@pytest.fixture
def wire():
    made = Wire()
    yield made
    made.close()


@pytest.fixture
def held():
    """Operators and stages that are closed after the test."""
    made = []
    yield lambda each: made.append(each) or each
    for each in reversed(made):
        each.close()


# -- maths -------------------------------------------------------------------------------------------------------


def test_axes_are_shaped_from_the_dead_band_on():
    """Nothing below it, no jump at it, all at the end; cubic is finer near the middle; odd."""
    axes = np.array([0.1, 0.2, 0.6, 1.0, -0.6, -1.0])
    straight, cubic = shaped(axes, 0.2, 0.0), shaped(axes, 0.2, 1.0)
    np.testing.assert_allclose(straight, [0, 0, 0.5, 1, -0.5, -1])
    np.testing.assert_allclose(cubic, [0, 0, 0.125, 1, -0.125, -1])
    np.testing.assert_array_equal(signs("x,yaw"), [-1, 1, 1, 1, 1, -1])
    with pytest.raises(ValueError, match="'w', not one of x, y, z"):
        signs("w")


def test_the_view_turns_the_plane():
    """Away from the person is where the person looks; up stays up; turns go along; four quarters are none."""
    away, left, tilt = np.eye(6)[0], np.eye(6)[1], np.eye(6)[3]
    for view, angle in ((0, 0.0), (90, np.pi / 2), (180, np.pi), (270, -np.pi / 2)):
        ahead = [np.cos(angle), np.sin(angle), 0, 0, 0, 0]
        np.testing.assert_allclose(seen_from(away, view), ahead, atol=1e-12)
        np.testing.assert_allclose(seen_from(left, view)[:2], [-ahead[1], ahead[0]], atol=1e-12)
        np.testing.assert_allclose(seen_from(tilt, view)[3:], ahead[:3], atol=1e-12)
        np.testing.assert_array_equal(seen_from(np.eye(6)[2], view), np.eye(6)[2])
    with pytest.raises(ValueError, match="45, not one of 0, 90, 180, 270"):
        seen_from(away, 45)


def test_a_person_moves_in_the_base_frame_whatever_the_driver_wants(held):
    """With a driver whose actions are in the tool's frame the tool goes the same way."""

    class Tool(type(POINT)):
        frame = "tool"

    cap = Cap()
    operator = held(hand_on(cap))
    cap.say(1.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    assert until(lambda: operator.act(moment()) is not None)
    pose = np.array([0.4, 0.0, 0.2, 0.3, -0.2, 1.0])
    base = operator.act(moment(commanded=pose))
    tool = operator.act(moment(commanded=pose, driver=Tool()))
    facing = exp(pose[3:]) @ DOWN
    np.testing.assert_allclose(facing @ tool[:3], base[:3], atol=1e-7)
    np.testing.assert_allclose(facing @ tool[3:6], base[3:6], atol=1e-7)
    np.testing.assert_allclose(base[:6], [0.02, 0, 0, 0, 0, 0.1], atol=1e-7)


# -- gamepad -----------------------------------------------------------------------------------------------------


def test_events_are_read_as_the_kernel_writes_them(wire):
    """Only whole reports count; halves of one are put together; lost ones without a way to ask are an error."""
    device = wire.device()
    assert device.read(0.0) == []
    wire.events((3, X, -32768), (1, SOUTH, 1))
    assert device.read(0.1) == []
    wire.events((0, 0, 0), (1, SOUTH, 0), (0, 0, 0))
    first, second = device.read(0.1)
    assert first.axes[X] == -32768 and first.keys == {SOUTH} and second.keys == frozenset()
    half = struct.pack("llHHi", 1, 2, 3, Y, 77) + struct.pack("llHHi", 1, 2, 0, 0, 0)
    os.write(wire._in, half[:30])
    assert device.read(0.1) == []
    os.write(wire._in, half[30:])
    assert device.read(0.1)[0].axes[Y] == 77
    wire.events((0, 3, 0), (1, EAST, 1), (0, 0, 0))
    with pytest.raises(OSError, match="lost"):
        device.read(0.1)
    device.close()


def test_after_lost_events_the_device_is_asked(wire):
    """What came between the loss and the next report is of no use."""
    now = evdev.Snapshot({X: 5}, frozenset())
    device = evdev.EventDevice(os.dup(wire._out), RANGES, lambda: now)
    wire.events((0, 3, 0), (1, EAST, 1), (0, 0, 0))
    assert device.read(0.1) == [now]
    wire.unplug()
    with pytest.raises(OSError, match="No such device"):
        device.read(0.1)
    device.close()


def test_a_folder_without_event_devices_gives_none(tmp_path):
    """What cannot be asked is no device."""
    (tmp_path / "event0").write_bytes(b"no device")
    denied = []
    assert list(evdev.devices(denied, tmp_path)) == [] and denied == []


def test_the_machines_own_devices_can_be_asked():
    """Names and capabilities by ioctl; ranges have two ends. A machine without input devices has none, and says so quietly."""
    denied = []
    every = list(evdev.devices(denied))
    assert len(every) + len(denied) <= len(list(evdev.FOLDER.glob("event*")))
    for found in every:
        device = evdev.open_device(found)
        assert found.name and set(device.ranges) == set(found.axes)
        assert set(device.snapshot.axes) == set(found.axes)
        device.close()


def test_sticks_and_buttons_say_where_to(wire):
    """Pushed away, to the left, up and turned left is positive; both triggers by their way, with some play."""
    pad = Pad(wire)
    assert not pad.open().axes.any()
    wire.axis(x=-32768, y=-32768, rx=-32768, ry=-32768, hx=-1, hy=-1)
    (pushed,) = pad.read(0.1)
    np.testing.assert_allclose(pushed.axes, [1, 1, 1, -1, 1, 1], atol=1e-4)
    wire.axis(x=0, y=0, rx=0, ry=0, hx=0, hy=0)
    wire.key(LEFT_BUMPER, True)
    assert pad.read(0.1)[-1].axes[5] == pytest.approx(1.0, abs=1e-4)
    pulled = []
    for way in (100, 140, 160, 120, 110, 90):
        wire.axis(rt=way)
        pulled.append("right_trigger" in pad.read(0.1)[-1].down)
    assert pulled == [False, False, True, True, True, False]
    pad.close()


def test_a_held_trigger_acts_and_its_release_hands_back(wire, held):
    """The stick alone does nothing; motion is scaled to a step; the gripper begins as it is and turns at each press."""
    operator = held(GamepadOperator(device=Pad(wire), view=180, curve=0.0, dead_band=0.0))
    wire.axis(y=-32768)
    time.sleep(0.1)
    assert operator.act(moment()) is None
    wire.axis(rt=255)
    assert until(lambda: operator.act(moment(gripper=0.3)) is not None)
    action = operator.act(moment(gripper=0.3))
    np.testing.assert_allclose(action[:6], [-0.02, 0, 0, 0, 0, 0], atol=1e-5)
    assert action.dtype == np.float32 and action[6] == pytest.approx(0.3)
    grips = []
    for _ in range(2):
        wire.key(SOUTH, True)
        assert until(lambda: "south" in operator.reading())
        for way in (250, 240, 230):  # held down while other things are said is one press
            wire.axis(rt=way, x=way)
            assert until(lambda way=way: operator._input.axes[1] < -way / 33000)
            grips.append(operator.act(moment(gripper=0.3))[6])
        wire.key(SOUTH, False)
        assert until(lambda: "south" not in operator.reading())
    assert grips == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    wire.axis(rt=0)
    assert until(lambda: operator.act(moment()) is None)


def test_buttons_are_marks_once(wire, held):
    """Each press one; north and west are both an emergency stop; a button's meaning can be changed."""
    operator = held(GamepadOperator(device=Pad(wire), mode="confirm", west="none"))
    for code in (START, EAST, SELECT, NORTH, WEST, 316):
        wire.key(code, True)
        wire.key(code, False)
    said = []
    assert until(lambda: said.extend(operator.marks()) or "confirm" in said)
    assert said == ["success", "failure", "discard", "estop", "confirm"]
    with pytest.raises(ConfigError, match="'nort' is neither an option nor a button"):
        make_operator("gamepad", nort="none")
    with pytest.raises(ConfigError, match="means 'jump', not one of gripper, success"):
        make_operator("gamepad", north="jump")


def test_a_trigger_that_is_held_when_the_gamepad_appears_does_not_count(held):
    """It has to be released once: nobody said that they want to act."""
    first, second = Wire(), Wire()
    pad = Pad(first)
    operator = held(GamepadOperator(device=pad))
    pad.wire = second
    second.axis(rt=255)
    opened = pad.open

    def open_held():
        opened()
        return pad.read(0.1)[-1]

    pad.open = open_held
    first.unplug()
    assert until(lambda: "gone" in operator.reading())
    assert until(lambda: "right_trigger" in operator.reading())
    assert operator.act(moment()) is None
    second.axis(rt=0)
    assert until(lambda: "right_trigger" not in operator.reading())
    second.axis(rt=255)
    assert until(lambda: operator.act(moment()) is not None)
    first.close()
    second.close()


def test_unplugged_while_the_policy_acts_is_no_stop(wire, held):
    """It is looked for again; the policy goes on."""
    pad = Pad(wire)
    operator = held(GamepadOperator(device=pad))
    pad.wire = None
    wire.unplug()
    assert until(lambda: "gone" in operator.reading())
    assert operator.act(moment()) is None and operator.marks() == []


def test_a_missing_gamepad_names_the_cure(tmp_path):
    """At the start, not in the first takeover."""
    if evdev.FOLDER.is_dir():
        pytest.skip("this machine has input devices")
    with pytest.raises(ConfigError, match="no gamepad in /dev/input"):
        make_operator("gamepad")
    message = Gamepad("pro")._missing([], ["/dev/input/event7"])
    assert "event7" in message and "udev" in message
    pads = [evdev.Found("/dev/input/event3", "Wireless Controller", frozenset(), frozenset())]
    assert "no gamepad is 'pro'; there is Wireless Controller" in Gamepad("pro")._missing(pads, [])


# -- spacemouse --------------------------------------------------------------------------------------------------


class Hid:
    """The device below pyspacemouse: hands over one report at a time, as hidapi does, from a socket."""

    def __init__(self, end):
        self._end = end
        self._end.setblocking(False)

    def read(self, size):
        from easyhid import HIDException

        try:
            report = self._end.recv(size)
        except BlockingIOError:
            return bytearray()
        if not report:
            raise HIDException("Failed to read from HID device: -1")
        return bytearray(report.ljust(size, b"\0"))

    def close(self):
        self._end.close()


def hid_mouse(model="SpaceMouseCompact"):
    """A SpaceMouse through the real package, and the end that its reports are written to."""
    library = pytest.importorskip("pyspacemouse")
    spec = library.get_device_specs()[model]
    spec = library.apply_axis_convention(spec, library.AxisConvention.ROS)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    class Found(SpaceMouse):
        def open(self):
            self.use(library.SpaceMouseDevice(spec, Hid(near)))
            return Input(REST, frozenset())

    return Found(), far


def report(number, *values):
    return struct.pack(f"<B{len(values)}h", number, *values)


def test_reports_of_a_spacemouse_are_read():
    """Its own x is to the right, y to the person, z down; in the robot's frame that is -y, -x, -z, turns alike."""
    mouse, far = hid_mouse()
    mouse.open()
    far.send(report(1, 0, -350, 0))  # pushed away
    far.send(report(2, 0, 0, -175))  # turned left, half
    far.send(bytes([3, 0b01]))
    far.send(bytes([3, 0b10]))
    away, turned, left, right = mouse.read(0.5)
    np.testing.assert_allclose(away.axes, [1, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(turned.axes, [1, 0, 0, 0, 0, 0.5])
    assert left.down == {"left"} and right.down == {"right"}
    far.send(report(1, 350, 0, -70))
    np.testing.assert_allclose(mouse.read(0.5)[-1].axes, [0, -1, 0.2, 0, 0, 0.5])
    assert mouse.read(0.0) == []
    far.close()
    with pytest.raises(OSError, match="Failed to read"):
        mouse.read(0.1)
    mouse.close()


def test_a_wireless_model_sends_all_axes_at_once():
    """Twelve bytes in report 1."""
    mouse, far = hid_mouse("SpaceMouseWireless")
    mouse.open()
    far.send(report(1, 0, 0, -350, 0, 0, 350))
    np.testing.assert_allclose(mouse.read(0.5)[-1].axes, [0, 0, 1, 0, 0, -1])
    far.close()
    mouse.close()


def test_a_spacemouse_that_is_pulled_out_stops_the_arm(held):
    """From the bytes to the mark."""
    mouse, far = hid_mouse()
    operator = held(SpaceMouseOperator(device=mouse))
    far.send(report(1, 0, -350, 0))
    assert until(lambda: operator.act(moment()) is not None)
    far.close()
    said = []
    assert until(lambda: said.extend(operator.marks()) or said)
    assert said == [
        "stop:the spacemouse has gone while a person acted: Failed to read from HID device: -1"
    ]


def test_a_lost_device_holds_the_arm_until_its_stop_is_said(held):
    """In between the person still acts, standing: it must not look like handing back."""
    cap = Cap()
    operator = held(hand_on(cap))
    cap.say(1.0)
    assert until(lambda: operator.act(moment()) is not None)
    cap.gone = True
    assert until(lambda: "gone" in operator.reading())
    np.testing.assert_array_equal(operator.act(moment(gripper=0.0)), [0, 0, 0, 0, 0, 0, 1])
    assert operator.marks() == ["stop:the cap has gone while a person acted: pulled out"]
    assert operator.act(moment()) is None
    cap.gone = False
    assert until(lambda: "gone" not in operator.reading())
    cap.say(1.0)
    assert until(lambda: operator.act(moment()) is not None), "it is found again"


def test_a_missing_library_or_device_names_the_cure():
    """What to type, at the start."""
    with pytest.raises(ConfigError, match=r"pip install|apt-get install|Plug it in"):
        make_operator("spacemouse")


def test_beyond_the_dead_band_acts_and_rest_hands_back(held):
    """Below it nothing; a hand at rest keeps the arm for `rest_s`, standing."""
    cap = Cap()
    operator = held(hand_on(cap, dead_band=0.2, rest_s=0.3, curve=0.0))
    cap.say(0.19)
    time.sleep(0.05)
    assert operator.act(moment()) is None
    cap.say(0.6)
    assert until(lambda: operator.act(moment()) is not None)
    assert operator.act(moment())[0] == pytest.approx(0.01)
    cap.say(0.0)
    let_go = time.monotonic()
    assert until(lambda: not operator.act(moment())[:6].any())
    assert until(lambda: operator.act(moment()) is None)
    assert time.monotonic() - let_go > 0.25


def test_the_left_button_takes_over_and_turns_the_gripper(held):
    """It begins with the gripper as it is; the other button says what it was told to say."""
    cap = Cap()
    operator = held(hand_on(cap, right="failure"))
    cap.say(down=("left",))
    assert until(lambda: operator.act(moment(gripper=0.0)) is not None)
    assert operator.act(moment(gripper=0.0))[6] == 1.0
    cap.say()
    cap.say(down=("right",))
    assert until(lambda: "right" in operator.reading())
    assert operator.marks() == ["failure"] and operator.marks() == []


def test_a_person_does_not_drop_what_the_policy_holds(held):
    """Taking over by moving leaves the gripper closed."""
    cap = Cap()
    operator = held(hand_on(cap))
    cap.say(1.0)
    assert until(lambda: operator.act(moment(gripper=0.0)) is not None)
    assert operator.act(moment(gripper=0.0))[6] == 0.0


def test_a_deflected_device_that_falls_silent_counts_as_gone(held):
    """A wireless one out of reach would go on saying what it said last."""
    cap = Cap()
    operator = held(hand_on(cap, silent_s=0.2))
    cap.say(1.0)
    said = []
    assert until(lambda: operator.act(moment()) is not None)
    assert until(lambda: said.extend(operator.marks()) or said)
    assert "silent for" in said[0] and said[0].startswith("stop:")


# -- in the control loop -----------------------------------------------------------------------------------------


def test_a_takeover_in_the_control_loop(held):
    """The old chunk's rest is dropped; steps carry the flag, what was executed and what the policy wanted; after
    handing back the set-points go on within speed, acceleration and jerk."""
    cap = Cap()
    operator = held(hand_on(cap, rest_s=0.15, curve=0.0, dead_band=0.0))
    s = held(Stage(person=operator, **PATIENT))
    s.loop.begin()
    s.plan(length=30)
    done = s.take(3)
    assert not any(d.intervention for d in done)
    cap.say(0.0, 0.0, 1.0)
    done = s.take(5)
    acted = [d for d in done if d.intervention]
    assert len(acted) >= 3 and s.loop.takeovers == 1
    for d in acted:
        np.testing.assert_allclose(d.action, [0, 0, 0.02, 0, 0, 0, 1], atol=1e-6)
        np.testing.assert_allclose(d.policy_action, FORWARD, atol=1e-6)
        assert d.plan is None and d.index == -1
    cap.say(0.0)
    assert until(lambda: not s.loop.acting)
    assert s.loop.planned == 0, "the rest of what was planned before the takeover is not executed"
    s.take(100, seconds=0.05)
    s.plan(first=s.loop.steps, length=6, action=2 * FORWARD, number=1)
    after = s.take(4)
    assert after and all(not d.intervention and d.plan.number == 1 for d in after)
    s.loop.end()
    check_path([row[1:7] for row in s.arm.log], Limits())
    assert s.arm.log[-1][3] - s.arm.log[0][3] > 0.05 and s.moved(0) > 0.05


def test_letting_go_in_full_motion_is_smooth(held, wire):
    """The trigger is released with the stick at its end, and the policy wants to go the other way at once."""
    operator = held(GamepadOperator(device=Pad(wire)))
    s = held(Stage(person=operator, **PATIENT))
    s.loop.begin()
    wire.axis(rt=255, x=-32768)
    assert until(lambda: "right_trigger" in operator.reading())
    s.plan(length=40)
    assert all(d.intervention and d.action[1] > 0.019 for d in s.take(4))
    wire.axis(rt=0)
    assert until(lambda: not s.loop.acting)
    s.plan(first=s.loop.steps, length=8, action=-3 * FORWARD, number=1)
    after = [d for d in s.take(6) if not d.intervention]
    assert len(after) >= 4 and all(d.plan.number == 1 for d in after)
    s.loop.end()
    check_path([row[1:7] for row in s.arm.log], Limits())
    assert s.moved(0) > 0.05


def test_unplugged_in_the_hand_the_arm_stops_and_stays(held, wire):
    """Not one step of the policy after it, although its plan goes on; a person at the robot has to rearm."""
    pad = Pad(wire)
    operator = held(GamepadOperator(device=pad))
    s = held(Stage(person=operator, **PATIENT))
    s.loop.begin()
    wire.axis(rt=255, y=-32768)
    assert until(lambda: operator.reading().count("right_trigger"))
    s.plan(length=40)
    assert all(d.intervention for d in s.take(2))
    pad.wire = None
    wire.unplug()
    assert until(lambda: s.loop.ruling.state == STOPPED, 1.0)
    assert "gamepad has gone while a person acted" in s.loop.ruling.reason
    s.plan(first=s.loop.steps, length=40)
    assert all(d.intervention for d in s.take(100, seconds=0.3))
    assert s.moved(time.monotonic() - 0.05) < 1e-9
    s.loop.end()
    check_path([row[1:7] for row in s.arm.log], Limits())


# -- script and keys ---------------------------------------------------------------------------------------------


def test_a_scripted_operator_is_wrong_as_often_as_asked():
    """The same takeovers by the same seed; wrong steps have the right length and lead away; then it is right."""

    def takeovers(seed, count=60):
        operator = ScriptedOperator(
            slow_after=0, at_most=10**6, mistakes=0.3, mistake_steps=2, seed=seed
        )
        first = []
        for _ in range(count):
            operator.begin()
            first.append([operator.act(moment(t)) for t in range(3)])
        return np.array(first), operator.mistaken

    steps, mistaken = takeovers(3)
    right = POINT.expert(0.0, np.zeros(6))
    wrong = np.abs(steps - right).max(axis=2) > 1e-6
    assert wrong[:, 0].sum() == mistaken and 8 < mistaken < 28
    np.testing.assert_array_equal(wrong[:, 0], wrong[:, 1])
    assert not wrong[:, 2].any()
    led = steps[wrong][:, :3]
    np.testing.assert_allclose(np.linalg.norm(led, axis=1), np.linalg.norm(right[:3]), rtol=1e-5)
    assert (led @ right[:3] <= 1e-9).all()
    np.testing.assert_array_equal(takeovers(3)[0], steps)
    assert not np.array_equal(takeovers(4)[0], steps)
    with pytest.raises(ConfigError, match=r"mistakes is 1\.5"):
        make_operator("scripted", mistakes=1.5)


def test_a_delayed_operator_comes_late_and_acts_upon_what_it_saw():
    """With two steps of delay, in the third step it does what the first asked for."""
    operator = ScriptedOperator(slow_after=0, delay=2)
    places = [np.array([0.01 * t, 0, 0, 0, 0, 0]) for t in range(5)]
    acted = [operator.act(moment(t, commanded=place)) for t, place in enumerate(places)]
    assert acted[:2] == [None, None]
    for t in (2, 3, 4):
        np.testing.assert_array_equal(acted[t], POINT.expert(0.0, places[t - 2]))


@pytest.fixture
def terminal():
    """A terminal, and the end that a person types at."""
    person, own = pty.openpty()
    stream = os.fdopen(own, "rb", buffering=0, closefd=False)
    made = Terminal(stream, estop="b,f9")
    yield made, person
    made.close()
    os.close(own)
    os.close(person)


def test_keys_are_not_held_back_and_arrows_are_no_stop(terminal):
    """Several at once come at once; an arrow's escape is not the escape key; further keys stop too."""
    made, person = terminal
    os.write(person, b"qx\x1b")
    assert until(lambda: fcntl.ioctl(made._file, 0x541B, bytes(4)) != bytes(4))
    assert made.pressed() == ["q", "x", "\x1b"]
    os.write(person, b"\x1b[A\x1b[20~bU")
    time.sleep(0.05)
    assert made.said() == ["estop", "estop", "release"]
    with pytest.raises(ConfigError, match="'pedal' is neither one character nor one of f1"):
        Terminal(made._stream, estop="pedal")


def test_a_person_at_the_keys(terminal):
    """Space takes over with the gripper as it is; a held key moves; a mark is a mark; space gives back."""
    made, person = terminal
    operator = KeyboardOperator()
    operator.terminal = made
    assert operator.act(moment(gripper=0.0)) is None
    os.write(person, b" w")
    assert until(lambda: operator.act(moment(gripper=0.0)) is not None)
    assert operator.act(moment(gripper=0.0))[6] == 0.0
    os.write(person, b"g\n")
    assert until(lambda: operator.marks() == ["success"])
    assert operator.act(moment(gripper=0.0))[6] == 1.0
    # Again and again, as a held key comes.
    assert until(lambda: os.write(person, b"w") and operator.act(moment())[0] > 0.019)
    os.write(person, b" ")
    assert until(lambda: operator.act(moment()) is None)


def test_a_terminal_that_closes_in_use_stops_the_arm():
    """Whoever acted did not hand back."""
    person, own = pty.openpty()
    operator = KeyboardOperator()
    operator.terminal = Terminal(os.fdopen(own, "rb", buffering=0))
    os.write(person, b" ")
    assert until(lambda: operator.act(moment()) is not None)
    os.close(person)
    assert until(lambda: operator.terminal.ended or operator.act(moment()) is None)
    assert operator.act(moment()) is not None, "until the stop is said"
    assert operator.marks() == ["stop:the terminal has gone while a person acted"]
    assert operator.act(moment()) is None and operator.marks() == []
    operator.close()


def test_the_check_prints_what_a_device_says(held):
    """Who acts, axes and the motion; without arm and job."""
    cap, out = Cap(), io.StringIO()
    operator = held(hand_on(cap))
    cap.say(1.0, down=("right",))
    watch(operator, 1.0, out)
    assert "said: success" in out.getvalue()
    assert "acting  gripper 1  x +1.00" in out.getvalue() and "mm +20.0  +0.0" in out.getvalue()


def test_unknown_operators_name_the_nearest():
    """And options that do not exist."""
    with pytest.raises(ConfigError, match="did you mean 'gamepad'"):
        make_operator("gampad")
    with pytest.raises(ConfigError, match="legs"):
        make_operator("keyboard", legs=2)
