"""Stand-ins for the libraries of real arms and cameras, with a simulated controller behind each.

They have exactly the names that `tests/data/arm_signatures.json` records of the real packages, and refuse arguments
that the recorded signatures do not take. Passing with them says that a driver keeps to the documented interface and
reacts to faults, not that it works on an arm.
"""

import functools
import json
import math
import re
import sys
import time
import types
from pathlib import Path

import numpy as np

from robot_bridge.motion import DOWN, exp, log

RECORD = json.loads((Path(__file__).parent / "data" / "arm_signatures.json").read_text())
SIGNATURES = {k: v for entry in RECORD.values() for k, v in entry["signatures"].items()}
# Made by the libraries themselves, never by us; and what a gamepad adds to a teleoperator.
SIGNATURES["franky.BoolFuture"] = [[["goal", False]]]
SIGNATURES["lerobot.Robot"] = SIGNATURES["lerobot.Teleoperator"] = [[["config", False]]]
SIGNATURES["lerobot.Teleoperator.get_teleop_events"] = SIGNATURES[
    "lerobot.GamepadTeleop.get_teleop_events"
]
FOLLOW_S, HOME_S = 0.03, 0.1  # of the simulated controllers


def takes(signature, args, kwargs):
    """Whether a call fits one recorded signature."""
    names = [name for name, _ in signature if not name.startswith("*")]
    more = any(name.startswith("**") for name, _ in signature)
    if len(args) > len(names) and not any(re.match(r"\*\w", name) for name, _ in signature):
        return False
    given = set(names[: len(args)])
    known = {name for name in names if not re.fullmatch(r"arg\d", name)}
    if given & set(kwargs) or not (more or set(kwargs) <= known):
        return False
    given |= set(kwargs)
    return all(default or name in given or name.startswith("*") for name, default in signature)


def check(key, args, kwargs):
    if not any(takes(signature, args, kwargs) for signature in SIGNATURES[key]):
        raise TypeError(f"{key} does not take {args} {kwargs}, recorded is {SIGNATURES[key]}")


def signed(module, base=None):
    """A class with none but recorded names, each call of which is checked."""

    def wrap(call, key, bound):
        @functools.wraps(call)
        def checked(*args, **kwargs):
            check(key, args[1:] if bound else args, kwargs)
            return call(*args, **kwargs)

        return checked

    def decorate(cls):
        prefix = f"{module}.{base or cls.__name__}"
        if "__init__" in vars(cls):
            cls.__init__ = wrap(cls.__init__, prefix, True)
        for name, thing in list(vars(cls).items()):
            if name.startswith("_"):
                continue
            key = f"{prefix}.{name}"
            assert key in SIGNATURES, f"{key} is not recorded"
            if isinstance(thing, staticmethod):
                setattr(cls, name, staticmethod(wrap(thing.__func__, key, False)))
            elif isinstance(thing, types.FunctionType):
                setattr(cls, name, wrap(thing, key, True))
        return cls

    return decorate


class Body:
    """An arm's motion: the tool follows a target, joints go home in a while; both only as time goes on."""

    def __init__(self, joints):
        self.matrix = np.eye(4)
        self.matrix[:3, :3], self.matrix[:3, 3] = DOWN, (0.55, 0.1, 0.15)
        self.home = self.matrix.copy()
        self.home[:3, 3] = (0.45, 0.0, 0.24)
        self.joints = np.full(joints, 0.1)
        self.target = self.goal = None
        self.targets = 0
        self.stuck = False  # on its way home
        self._then = time.monotonic()

    def now(self):
        now = time.monotonic()
        share, self._then = 1 - math.exp((self._then - now) / FOLLOW_S), now
        if self.target is not None:
            turn = log(self.target[:3, :3] @ self.matrix[:3, :3].T)
            self.matrix[:3, :3] = exp(share * turn) @ self.matrix[:3, :3]
            self.matrix[:3, 3] += share * (self.target[:3, 3] - self.matrix[:3, 3])
        if self.goal is not None and not self.stuck:
            until, goal = self.goal
            if now >= until:
                self.joints, self.matrix, self.goal = np.array(goal), self.home.copy(), None
        return self

    def aim(self, matrix):
        self.now()
        self.target, self.targets = np.array(matrix, float), self.targets + 1

    def go(self, joints):
        self.target, self.goal = None, (time.monotonic() + HOME_S, joints)

    def stop(self):
        self.now()
        self.target = self.goal = None


class Bench:
    """What a test looks at and breaks; one for each driver."""

    def __init__(self, joints):
        self.body = Body(joints)
        self.fault = ""  # a reflex or protective stop
        self.user_stop = self.lost = self.unrecoverable = False
        self.force = 0.0
        self.width, self.commands, self.gripper_s, self.gripper_stuck = 0.05, [], 0.1, False
        self.calls = []
        self.observations = 0


# -- franky ------------------------------------------------------------------------------------------------------


def franky(bench):
    module = types.ModuleType("franky")

    class Exception_(Exception):  # noqa: N801
        pass

    for name in ("NetworkException", "CommandException", "ControlException"):
        setattr(module, name, type(name, (Exception_,), {}))
    for name in ("IncompatibleVersionException", "RealtimeException"):
        setattr(module, name, type(name, (Exception_,), {}))
    # In the real library this one is no franky.Exception.
    module.InvalidMotionTypeException = type("InvalidMotionTypeException", (Exception,), {})
    module.Exception = Exception_
    module.RealtimeConfig = types.SimpleNamespace(Enforce=0, Ignore=1)

    def reach():
        if bench.lost:
            raise module.NetworkException("libfranka: UDP receive: Timeout")

    @signed("franky")
    class Affine:
        def __init__(self, matrix):
            self._matrix = np.array(matrix, float)
            assert self._matrix.shape == (4, 4)

        @property
        def matrix(self):
            return self._matrix

    @signed("franky")
    class CartesianReference:
        def __init__(self, target):
            self._target = target

    @signed("franky")
    class PostureTask:
        def __init__(self, target, stiffness):
            assert len(target) == 7

    @signed("franky")
    class CartesianImpedanceGains:
        @staticmethod
        def diagonal(stiffness, damping=None):
            assert len(stiffness) == 6
            bench.calls.append(("gains", tuple(stiffness), damping))
            return CartesianImpedanceGains()

    @signed("franky")
    class CartesianImpedanceTrackingMotion:
        def __init__(self, **options):
            bench.calls.append(("tracking", options))
            self._robot, self._reference = None, None

        def set_gains(self, gains):
            assert isinstance(gains, CartesianImpedanceGains)

        def set_reference(self, reference):
            self._reference = reference._target.matrix
            if not np.isfinite(self._reference).all():
                raise ValueError("target must contain only finite values")
            if self._robot is not None and self._robot._motion is self:
                bench.body.aim(self._reference)

    @signed("franky")
    class TorqueStopMotion:
        pass

    @signed("franky")
    class JointMotion:
        def __init__(self, target, relative_dynamics_factor=1.0):
            assert relative_dynamics_factor <= 0.5
            self._goal = target

    @signed("franky")
    class Robot:
        def __init__(self, host, realtime_config=0):
            if host == "nowhere":
                time.sleep(60.0)
            reach()
            bench.calls.append(("Robot", host, realtime_config))
            self._motion, self._error = None, None

        def _look(self):
            reach()
            if (bench.fault or bench.user_stop) and self._motion is not None:
                bench.body.stop()
                self._motion = None
                self._error = (
                    f'libfranka: Move command aborted: motion aborted by reflex! ["{bench.fault}"]'
                )
            if isinstance(self._motion, JointMotion) and bench.body.now().goal is None:
                self._motion = None

        def move(self, motion, asynchronous=False):
            self._look()
            assert asynchronous, "a call that waits for the arm has no deadline"
            if bench.fault or bench.user_stop:
                raise module.CommandException("libfranka: command rejected in the current mode")
            if isinstance(motion, TorqueStopMotion):
                bench.body.stop()
                self._motion = None
                return
            if self._motion is not None:
                raise module.InvalidMotionTypeException("The type of motion cannot change")
            self._motion = motion
            if isinstance(motion, JointMotion):
                bench.body.go(motion._goal)
            else:
                motion._robot = self
                bench.body.aim(motion._reference)

        def join_motion(self, timeout=None):
            assert timeout is not None
            self._look()
            self._raise()
            return self._motion is None

        def poll_motion(self):
            self._look()
            self._raise()
            return self._motion is None

        def _raise(self):
            error, self._error = self._error, None
            if error:
                raise module.ControlException(error)

        def stop(self):
            reach()
            bench.calls.append(("stop",))
            if self._motion is not None:
                self._error = "libfranka: Move command preempted!"
            self._motion = None
            bench.body.stop()

        def recover_from_errors(self):
            reach()
            if bench.unrecoverable:
                return False
            bench.fault = ""
            return True

        def set_collision_behavior(self, torque_thresholds, force_thresholds):
            bench.calls.append(("collision", torque_thresholds, force_thresholds))

        def set_load(self, mass, com, inertia):
            assert self._motion is None and len(com) == 3 and len(inertia) == 9
            bench.calls.append(("load", mass))

        @property
        def is_in_control(self):
            self._look()
            return self._motion is not None

        @property
        def current_pose(self):
            return types.SimpleNamespace(end_effector_pose=Affine(bench.body.now().matrix))

        @property
        def state(self):
            self._look()
            body = bench.body.now()
            mode = "UserStopped" if bench.user_stop else "Reflex" if bench.fault else "Move"
            return types.SimpleNamespace(
                O_T_EE=Affine(body.matrix),
                O_F_ext_hat_K=np.array([bench.force, 0, 0, 9, 9, 9]),
                q=body.joints.copy(),
                robot_mode=types.SimpleNamespace(name=mode),
                current_errors=types.SimpleNamespace(),
                last_motion_errors=types.SimpleNamespace(
                    **{bench.fault: True, "joint_reflex": False} if bench.fault else {}
                ),
            )

    @signed("franky")
    class BoolFuture:
        def __init__(self, goal):
            self._until, self._goal = time.monotonic() + bench.gripper_s, goal

        def wait(self, timeout=None):
            assert timeout is not None
            return time.monotonic() >= self._until and not bench.gripper_stuck

        def get(self):
            bench.width = max(self._goal, 0.02)  # something is between the fingers
            return True

    @signed("franky")
    class Gripper:
        def __init__(self, host):
            reach()

        def grasp_async(self, width, speed, force, epsilon_inner=0.005, epsilon_outer=0.005):
            bench.commands.append(("grasp", width, force))
            return BoolFuture(width)

        def move_async(self, width, speed):
            bench.commands.append(("move", width))
            return BoolFuture(width)

        @property
        def width(self):
            reach()
            return bench.width

        @property
        def max_width(self):
            return 0.08

    for each in (
        *(Affine, CartesianReference, PostureTask, CartesianImpedanceGains, TorqueStopMotion),
        *(CartesianImpedanceTrackingMotion, JointMotion, Robot, Gripper),
    ):
        setattr(module, each.__name__, each)
    return {"franky": module}


# -- ur-rtde -----------------------------------------------------------------------------------------------------


def ur(bench):
    running = {"script": True}

    def six(matrix):
        return [*matrix[:3, 3].tolist(), *log(matrix[:3, :3]).tolist()]

    @signed("rtde_control")
    class RTDEControlInterface:
        def __init__(self, host):
            if bench.lost:
                raise RuntimeError("Failed to start control script, before timeout of 5 seconds")

        def servoL(self, pose, speed, acceleration, period, lookahead, gain):  # noqa: N802
            assert period == 0.01 and 0.03 <= lookahead <= 0.2 and 100 <= gain <= 2000
            if running["script"] and not bench.fault:
                matrix = np.eye(4)
                matrix[:3, 3], matrix[:3, :3] = pose[:3], exp(np.array(pose[3:]))
                bench.body.aim(matrix)
            return running["script"]

        def servoStop(self, a=10.0):  # noqa: N802
            bench.body.stop()
            return True

        def moveJ(self, q, speed=1.05, acceleration=1.4, asynchronous=False):  # noqa: N802
            assert asynchronous
            bench.body.go(q)
            return True

        def stopJ(self, a=2.0):  # noqa: N802
            bench.body.stop()
            bench.calls.append(("stop",))

        def stopScript(self):  # noqa: N802
            running["script"] = False

        def disconnect(self):
            pass

        def isConnected(self):  # noqa: N802
            return not bench.lost

        def reconnect(self):
            return not bench.lost

        def setPayload(self, mass, com):  # noqa: N802
            bench.calls.append(("load", mass))
            return True

        def isProgramRunning(self):  # noqa: N802
            return running["script"]

        def reuploadScript(self):  # noqa: N802
            running["script"] = not bench.unrecoverable
            return not bench.unrecoverable

    @signed("rtde_receive")
    class RTDEReceiveInterface:
        def __init__(self, host):
            pass

        def isConnected(self):  # noqa: N802
            return not bench.lost

        def reconnect(self):
            return not bench.lost

        def disconnect(self):
            pass

        def getActualTCPPose(self):  # noqa: N802
            if bench.fault or bench.user_stop:
                bench.body.stop()
                running["script"] = False
            return six(bench.body.now().matrix)

        def getActualQ(self):  # noqa: N802
            return bench.body.now().joints.tolist()

        def getActualTCPForce(self):  # noqa: N802
            return [bench.force, 0, 0, 9, 9, 9]

        def getSafetyStatusBits(self):  # noqa: N802
            return (4 if bench.fault else 1) | (128 if bench.user_stop else 0)

        def getRobotMode(self):  # noqa: N802
            return 7

    @signed("dashboard_client")
    class DashboardClient:
        def __init__(self, host):
            pass

        def connect(self, timeout_ms=2000):
            pass

        def closeSafetyPopup(self):  # noqa: N802
            pass

        def unlockProtectiveStop(self):  # noqa: N802
            bench.fault = ""

        def disconnect(self):
            pass

    found = {}
    for name, each in (
        ("rtde_control", RTDEControlInterface),
        ("rtde_receive", RTDEReceiveInterface),
        ("dashboard_client", DashboardClient),
    ):
        found[name] = types.ModuleType(name)
        setattr(found[name], each.__name__, each)
    return found


# -- xArm --------------------------------------------------------------------------------------------------------


def xarm(bench):
    @signed("xarm.wrapper")
    class XArmAPI:
        def __init__(self, port, is_radian=False):
            assert is_radian
            self._mode, self._state, self._grip, self._from = 0, 0, None, (0.0, 0.0)

        @property
        def connected(self):
            return not bench.lost

        @property
        def axis(self):
            return 7

        @property
        def error_code(self):
            return 2 if bench.user_stop else 31 if bench.fault else 0

        @property
        def state(self):
            return 4 if self.error_code else self._state

        @property
        def ft_ext_force(self):
            return [bench.force, 0, 0, 9, 9, 9]

        def connect(self):
            pass

        def disconnect(self):
            pass

        def motion_enable(self, enable=True):
            return 0

        def set_mode(self, mode=0):
            self._mode = mode
            bench.body.stop()
            return 0

        def set_state(self, state=0):
            self._state = state
            if state == 4:
                bench.body.stop()
                bench.calls.append(("stop",))
            return 0

        def set_tcp_load(self, weight, center_of_gravity):
            bench.calls.append(("load", weight))
            return 0

        def set_ft_sensor_enable(self, on_off):
            return 0

        def get_position_aa(self, is_radian=None):
            assert is_radian
            if bench.lost:
                return -1, []
            matrix = bench.body.now().matrix
            return 0, [*(1000 * matrix[:3, 3]).tolist(), *log(matrix[:3, :3]).tolist()]

        def get_servo_angle(self, is_radian=None):
            assert is_radian
            return 0, bench.body.now().joints.tolist()

        def set_servo_cartesian_aa(self, pose, is_radian=None):
            assert is_radian
            if self.error_code:
                bench.body.stop()
                return 1
            if self._mode != 1 or self._state == 4:
                return 9
            matrix = np.eye(4)
            matrix[:3, 3], matrix[:3, :3] = np.array(pose[:3]) / 1000, exp(np.array(pose[3:]))
            bench.body.aim(matrix)
            return 0

        def set_servo_angle(self, angle=None, speed=None, is_radian=None, wait=False):
            assert is_radian and not wait and self._mode == 0
            bench.body.go(angle)
            return 0

        def clean_error(self):
            bench.fault = ""
            return 0

        def clean_warn(self):
            return 0

        def set_gripper_mode(self, mode):
            return 0

        def set_gripper_enable(self, enable):
            return 0

        def set_gripper_speed(self, speed):
            return 0

        def set_gripper_position(self, pos, wait=False):
            assert not wait
            bench.commands.append(("move", pos))
            self._grip, self._from = (time.monotonic(), pos), (bench.width, 0.0)
            return 0

        def get_gripper_position(self):
            if self._grip is not None and not bench.gripper_stuck:
                share = min(1.0, (time.monotonic() - self._grip[0]) / bench.gripper_s)
                bench.width = self._from[0] + share * (self._grip[1] / 10000 - self._from[0])
            elif self._grip is not None:
                bench.width += 1e-3 * (-1) ** int(time.monotonic() * 1e3)
            return 0, bench.width * 10000

    package, wrapper = types.ModuleType("xarm"), types.ModuleType("xarm.wrapper")
    wrapper.XArmAPI, package.wrapper = XArmAPI, wrapper
    return {"xarm": package, "xarm.wrapper": wrapper}


# -- LeRobot -----------------------------------------------------------------------------------------------------


def lerobot(bench):
    """With a robot "poses", one "joints" without kinematics, and a teleoperator "pad", as plug-ins register them."""
    robots: dict = {}
    teleoperators: dict = {}
    names = [f"ee.{axis}" for axis in ("x", "y", "z", "wx", "wy", "wz")]

    class Config:
        choices: dict = {}  # noqa: RUF012

        def __init__(self, **values):
            self.values = values

        @classmethod
        def get_known_choices(cls):
            return cls.choices

    class RobotConfig(Config):
        choices = robots

    class TeleoperatorConfig(Config):
        choices = teleoperators

    @signed("lerobot", "Robot")
    class Robot:
        _gripper = "gripper.pos"

        def __init__(self, config):
            self._config, self._up = config, False
            self._calibrated = config.values.get("calibrated", "1") == "1"

        def __getattr__(self, name):
            if name == "name":
                return type(self).__name__
            if name == "config":
                return self._config
            raise AttributeError(name)

        @property
        def action_features(self):
            return dict.fromkeys([*names, self._gripper], float)

        @property
        def observation_features(self):
            return {**self.action_features, "top": (48, 64, 3)}

        @property
        def is_connected(self):
            return self._up

        @property
        def is_calibrated(self):
            return self._calibrated

        def connect(self, calibrate=True):
            assert not calibrate
            if bench.lost:
                raise ConnectionError("no such device")
            self._up = True

        def disconnect(self):
            self._up = False

        def get_observation(self):
            if bench.lost or bench.fault or bench.user_stop:
                raise ConnectionError(bench.fault or "no such device")
            bench.observations += 1
            matrix = bench.body.now().matrix
            values = [
                *matrix[:3, 3].tolist(),
                *log(matrix[:3, :3]).tolist(),
                100 * bench.width / 0.08,
            ]
            image = np.full((48, 64, 3), 90, np.uint8)
            image[0, :] = bench.observations % 200
            return {**dict(zip([*names, self._gripper], values, strict=True)), "top": image}

        def send_action(self, action):
            assert set(action) == {*names, self._gripper}
            values = [action[name] for name in names]
            matrix = np.eye(4)
            matrix[:3, 3], matrix[:3, :3] = values[:3], exp(np.array(values[3:]))
            bench.body.aim(matrix)
            bench.commands.append(("gripper", action[self._gripper]))
            bench.width = 0.08 * action[self._gripper] / 100
            return action

    class JointRobot(Robot):
        @property
        def action_features(self):
            return {f"joint_{k}.pos": float for k in range(6)}

    @signed("lerobot", "Teleoperator")
    class Pad:
        def __init__(self, config):
            self._up = False
            bench.pad = self

        @property
        def action_features(self):
            return {"names": {"delta_x": 0, "delta_y": 1, "delta_z": 2, "gripper": 3}}

        @property
        def is_connected(self):
            return self._up

        def connect(self):
            self._up = True

        def disconnect(self):
            self._up = False

        def get_action(self):
            return {
                "delta_x": 0.0,
                "delta_y": 0.0,
                "delta_z": 0.0,
                "gripper": 1,
                **bench.pad_action,
            }

        def get_teleop_events(self):
            return bench.pad_events

    class Leader(Pad):
        @property
        def action_features(self):
            return {f"joint_{k}.pos": float for k in range(6)}

    bench.pad_action, bench.pad_events = {}, {}

    def register_third_party_plugins():
        robots.update(poses=RobotConfig, joints=RobotConfig)
        teleoperators.update(pad=TeleoperatorConfig, leader=TeleoperatorConfig)

    def parse(config_class, args):
        made = config_class(**dict(arg[2:].split("=", 1) for arg in args))
        made.kind = "parsed"
        return made

    modules = {
        name: types.ModuleType(name)
        for name in (
            *("lerobot", "lerobot.robots", "lerobot.teleoperators", "lerobot.utils", "draccus"),
            *("lerobot.utils.import_utils",),
        )
    }
    made = {"poses": Robot, "joints": JointRobot, "pad": Pad, "leader": Leader}
    bench.next_type = "poses"
    modules["lerobot.robots"].__path__ = modules["lerobot.teleoperators"].__path__ = []
    modules["lerobot.robots"].RobotConfig = RobotConfig
    modules["lerobot.robots"].make_robot_from_config = lambda config: made[bench.next_type](config)
    modules["lerobot.teleoperators"].TeleoperatorConfig = TeleoperatorConfig
    modules["lerobot.teleoperators"].make_teleoperator_from_config = lambda config: made[
        bench.next_type
    ](config)
    modules[
        "lerobot.utils.import_utils"
    ].register_third_party_plugins = register_third_party_plugins
    modules["draccus"].parse = parse
    return modules


# -- OpenCV ------------------------------------------------------------------------------------------------------


class Scenery:
    """What the cameras see, by device: a test unplugs, freezes and darkens them."""

    def __init__(self):
        self.unplugged = self.frozen = self.dark = False
        self.number = 0


def cv2(scenery):
    module = types.ModuleType("cv2")
    for name in ("CAP_V4L2", "CAP_PROP_FRAME_WIDTH", "CAP_PROP_FRAME_HEIGHT", "CAP_PROP_FPS"):
        assert f"cv2.{name}" in SIGNATURES
        setattr(module, name, name)
    module.CAP_PROP_BUFFERSIZE = "CAP_PROP_BUFFERSIZE"

    @signed("cv2")
    class VideoCapture:
        def __init__(self, device, backend):
            self._there = device != "/dev/none"

        def isOpened(self):  # noqa: N802
            return self._there

        def set(self, propId, value):
            return True

        def grab(self):
            time.sleep(1 / 60)
            return not scenery.unplugged

        def retrieve(self):
            if not scenery.frozen:
                scenery.number += 1
            image = np.zeros((48, 64, 3), np.uint8)
            image[..., 2] = 1 if scenery.dark else 200  # red, as OpenCV orders it
            image[0, :, 0] = scenery.number % 250
            return True, image

        def release(self):
            pass

    module.VideoCapture = VideoCapture
    return {"cv2": module}


def install(monkeypatch, modules):
    """Let imports find these for one test."""
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
