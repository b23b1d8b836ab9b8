"""Robots and cameras of LeRobot, its own and those of packages `lerobot_robot_*` and `lerobot_camera_*`.

LeRobot looks for such packages itself, by the names of what is installed, and each registers its types when it is
imported. Our set-points are Cartesian. So a robot can be driven whose actions and observations hold the tool's pose
(`ee.x ee.y ee.z ee.wx ee.wy ee.wz`: m and a rotation vector, as LeRobot's own processors name them), or one with six
or more joints in degrees whose plug-in has `kinematics` with LeRobot's `forward_kinematics` and `inverse_kinematics`.
Others are refused: a pose that is guessed from joints is worse than none.

Python 3.10 or newer, as LeRobot wants it (0.6: 3.12).
"""

from __future__ import annotations

import importlib
import pkgutil
import threading
import time
from typing import Any, Callable, Dict

import numpy as np

from robot_bridge.cameras import Camera, Mode, load, square
from robot_bridge.driver import Frame
from robot_bridge.drivers.arm import CONNECT_S, LIFT_SPEED, ArmDriver, Felt, within
from robot_bridge.motion import between, exp, log
from twinrl.core.errors import ConfigError, TwinRLError

POSE_NAMES = "ee.x,ee.y,ee.z,ee.wx,ee.wy,ee.wz"
GRIPPERS = ("ee.gripper_pos", "gripper.pos", "gripper")
COMMON = (
    *("cameras", "camera_size", "camera_hz", "home", "home_s"),
    *("clear_m", "scene", "scene_s", "tool_yaw"),
)
SILENT_S = 0.5  # an observation older than this is a fault
READ_MS = 1000.0


class LeRobotDriver(ArmDriver):
    """One LeRobot robot; see `ArmDriver` for the common options. What is not ours goes to the robot's configuration."""

    kind = "lerobot"
    home_counts = (6,)
    has_address = False

    def __init__(
        self,
        robot: str = "",
        rate_hz: float = 30.0,
        pose_names: str = POSE_NAMES,
        gripper_open: float = 100.0,
        gripper_closed: float = 0.0,
        gripper_m: float = 0.08,
        **config: Any,
    ) -> None:
        """`robot`: its type's name. `home`: a pose, six numbers; without, it stays where it was lifted to.

        `pose_names`: of a robot that calls its pose otherwise, and means the same six numbers. `gripper_open` and
        `gripper_closed` in the robot's unit; `gripper_m` is open in m. `robot_cameras`: the configuration's own
        cameras, as LeRobot's command line takes them.
        """
        common = {name: config.pop(name) for name in COMMON if name in config}
        super().__init__(gripper="none", **common)
        if not robot:
            raise ConfigError("robot 'lerobot' needs --robot-option robot=TYPE")
        self._type, self._config, self.rate_hz = robot, dict(config), float(rate_hz)
        if "robot_cameras" in self._config:
            self._config["cameras"] = self._config.pop("robot_cameras")
        self._names = tuple(str(pose_names).split(","))
        if len(self._names) != 6:
            raise ConfigError(f"option pose_names is {pose_names!r}, must be six names")
        self._fingers = (float(gripper_closed), float(gripper_open), float(gripper_m))
        self._robot: Any = None
        self._closing = threading.Event()
        self._error = ""
        self._seen: tuple[float, Dict[str, Any]] = (0.0, {})
        self._action: Dict[str, float] | None = None
        self._opening = 1.0
        self._thread: threading.Thread | None = None

    def _make(self) -> Any:
        """The robot, not connected yet; its features are known from here on."""
        if self._robot is None:
            made = make_device("robots", "Robot", self._type, self._config)
            self._kinematics, self._joint_names = _drivable(made, self._names)
            self._gripper_name = next((n for n in GRIPPERS if n in made.action_features), "")
            self._robot = made
        return self._robot

    def _own_cameras(self) -> tuple:
        features = self._make().observation_features
        return tuple(
            n for n, shape in features.items() if isinstance(shape, tuple) and len(shape) == 3
        )

    def _reach(self) -> None:
        robot = self._make()
        try:
            # Calibration asks a person and moves the arm: it is done beforehand, with LeRobot's own command.
            within(CONNECT_S, f"lerobot {self._type}", lambda: robot.connect(calibrate=False))
            if not robot.is_calibrated:
                raise TwinRLError("is not calibrated: run lerobot-calibrate first")
            self._see(robot.get_observation())
        except TwinRLError:
            raise
        except Exception as error:  # whatever a plug-in raises
            raise TwinRLError(f"lerobot {self._type}: {error}") from None
        self._thread = threading.Thread(target=self._exchange, name="lerobot", daemon=True)
        self._thread.start()

    def _leave(self) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join(2.0)
        if self._robot is not None and self._robot.is_connected:
            self._robot.disconnect()

    def _exchange(self) -> None:
        """A thread of its own: plug-ins read buses and cameras in these calls."""
        while not self._closing.is_set():
            began = time.monotonic()
            try:
                action, self._action = self._action, None
                if action is not None:
                    self._robot.send_action(action)
                self._see(self._robot.get_observation())
                self._error = ""
            except Exception as error:  # told with the next measurement
                self._error = str(error) or type(error).__name__
            self._closing.wait(max(0.0, 1.0 / self.rate_hz - (time.monotonic() - began)))

    def _see(self, observation: Dict[str, Any]) -> None:
        self._seen = (time.monotonic(), observation)

    def _own_frames(self) -> Dict[str, Frame]:
        when, seen = self._seen
        own = [name for name in self.cameras if name in seen and name not in self._wanted_cameras]
        return {n: Frame(when, square(np.asarray(seen[n], np.uint8), self.image_size)) for n in own}

    def _own_width(self) -> float:
        closed, open_, metres = self._fingers
        value = self._seen[1].get(self._gripper_name)
        return 0.0 if value is None else metres * (float(value) - closed) / (open_ - closed)

    def _feel(self) -> Felt:
        when, seen = self._seen
        silent = time.monotonic() - when
        fault = f"connection lost: {self._error}" if self._error else ""
        if silent > SILENT_S:
            fault = fault or f"no observation for {silent:.1f} s"
        if self._kinematics is None:
            pose = np.array([seen[name] for name in self._names], float)
            matrix, joints = np.eye(4), np.zeros(0)
            matrix[:3, :3], matrix[:3, 3] = exp(pose[3:]), pose[:3]
        else:
            degrees = self._degrees()
            matrix = np.array(self._kinematics.forward_kinematics(degrees), float)
            joints = np.deg2rad(degrees)
        return Felt(matrix, joints, 0.0, fault)

    def _degrees(self) -> np.ndarray:
        return np.array([self._seen[1][name] for name in self._joint_names], float)

    def servo(self, pose: np.ndarray, gripper: float) -> None:
        """Pose and gripper are one action there; the thread sends the newest."""
        self._opening = float(gripper)
        super().servo(pose, gripper)

    def _aim(self, matrix: np.ndarray) -> None:
        if self._kinematics is None:
            values = (*matrix[:3, 3].tolist(), *log(matrix[:3, :3]).tolist())
            action = dict(zip(self._names, values))
        else:
            found = self._kinematics.inverse_kinematics(
                self._degrees(), matrix, orientation_weight=1.0
            )
            action = dict(zip(self._joint_names, map(float, found)))
        if self._gripper_name:
            closed, open_, _ = self._fingers
            action[self._gripper_name] = closed + self._opening * (open_ - closed)
        self._action = action

    def _follow(self) -> None:
        """It always does."""

    def _rest(self) -> None:
        self._action = None

    def _go_home(self) -> Callable[[], bool]:
        """By set-points: LeRobot has no motion of its own."""
        if not self.home:
            return lambda: True
        self._opening = 1.0
        start, goal = self._look().pose, np.array(self.home, float)
        length = max(
            float(np.linalg.norm(goal[:3] - start[:3])), 0.2 * float(np.abs(goal - start)[3:].max())
        )
        began, seconds = time.monotonic(), max(length / LIFT_SPEED, 0.1)

        def is_there() -> bool:
            share = (time.monotonic() - began) / seconds
            self._aim(self._matrix(between(start, goal, share)))
            return share > 1.0

        return is_there

    def _halt(self) -> None:
        self._action = None

    def _recover(self) -> None:
        """The exchange goes on by itself where the robot answers again."""
        deadline = time.monotonic() + 2.0
        while self._feel().fault:
            if time.monotonic() > deadline:
                raise TwinRLError(f"lerobot {self._type}: {self._feel().fault}")
            time.sleep(0.05)


class LeRobotCamera(Camera):
    """A LeRobot camera: address is TYPE;KEY=VALUE;... of its configuration."""

    _device: Any = None

    def open(self, mode: Mode) -> None:
        """Size and rate are the mode's unless the address says otherwise."""
        kind, *pairs = self.address.split(";")
        config: Dict[str, Any] = dict(zip(("width", "height", "fps"), mode))
        config.update(pair.partition("=")[::2] for pair in pairs)
        self._device = make_device("cameras", "Camera", kind, config)
        try:
            self._device.connect()
        except Exception as error:  # whatever a plug-in raises
            raise TwinRLError(f"lerobot camera {kind}: {error}") from None

    def read(self) -> Frame:
        """LeRobot keeps no time of its own: that of the arrival."""
        try:
            image = self._device.async_read(timeout_ms=READ_MS)
        except Exception as error:
            raise TwinRLError(f"lerobot camera {self.address}: {error}") from None
        return Frame(time.monotonic(), np.asarray(image, np.uint8))

    def close(self) -> None:
        """Disconnect."""
        if self._device is not None and self._device.is_connected:
            self._device.disconnect()


def make_device(folder: str, noun: str, kind: str, config: Dict[str, Any]) -> Any:
    """A robot, camera or teleoperator of type `kind`, not connected; ConfigError names the types that there are.

    `folder` and `noun`: LeRobot's package ("robots") and the name of its base class ("Robot").
    """
    what = f"LeRobot {noun.lower()} {kind!r}"
    package = load(f"lerobot.{folder}", "lerobot", what)
    plugins = load("lerobot.utils.import_utils", "lerobot", what)
    plugins.register_third_party_plugins()
    base = getattr(package, f"{noun}Config")
    _import_own(package, base, kind)
    known = base.get_known_choices()
    if kind not in known:
        raise ConfigError(
            f"LeRobot knows no {noun.lower()} {kind!r}, only {', '.join(sorted(known)) or 'none'}; is its package "
            f"installed, and called lerobot_{noun.lower()}_*?"
        )
    draccus = importlib.import_module("draccus")
    arguments = [f"--{name}={value}" for name, value in config.items()]
    try:
        made = draccus.parse(config_class=known[kind], args=arguments)
    except SystemExit:  # its parser has printed why
        raise ConfigError(f"LeRobot {noun.lower()} {kind!r} does not take {arguments}") from None
    except Exception as error:
        raise ConfigError(f"LeRobot {noun.lower()} {kind!r}: {error}") from None
    try:
        if folder == "cameras":
            return package.make_cameras_from_configs({"camera": made})["camera"]
        return getattr(package, f"make_{noun.lower()}_from_config")(made)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"LeRobot {noun.lower()} {kind!r}: {error}") from None


def _import_own(package: Any, base: Any, kind: str) -> None:
    """LeRobot's own types register themselves when imported, which its programs do by name."""
    for module in pkgutil.iter_modules(package.__path__):
        if kind in base.get_known_choices():
            return
        if module.ispkg:
            try:
                importlib.import_module(f"{package.__name__}.{module.name}")
            except Exception:  # what another type lacks is not missing here
                continue


def _drivable(robot: Any, names: tuple) -> tuple:
    """(None, ()) for a robot with poses, (kinematics, joint names) for one with joints; ConfigError for others."""
    actions, seen = robot.action_features, robot.observation_features
    if all(name in actions and name in seen for name in names):
        return None, ()
    kinematics = getattr(robot, "kinematics", None)
    what = f"robot {robot.name!r} has actions {', '.join(map(str, actions))}"
    if not all(hasattr(kinematics, f"{way}_kinematics") for way in ("forward", "inverse")):
        raise ConfigError(
            f"{what}: neither poses ({', '.join(names)}, also in observations) nor kinematics of its plug-in, "
            "so Cartesian set-points cannot reach it"
        )
    joints = [name for name in actions if name.endswith(".pos") and name not in GRIPPERS]
    if len(joints) < 6:
        raise ConfigError(
            f"{what}: {len(joints)} joints cannot hold position and orientation, 6 can"
        )
    if not getattr(robot.config, "use_degrees", True):
        raise ConfigError(f"{what} not in degrees: --robot-option use_degrees=true")
    return kinematics, tuple(joints)
