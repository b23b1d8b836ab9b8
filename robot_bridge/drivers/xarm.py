"""A UFACTORY xArm (5, 6, 7, Lite 6, 850), by xarm-python-sdk: servo motion in Cartesian space.

The controller executes the last set-point only, so the arm stands when none come any more.
"""

from __future__ import annotations

import time
from typing import Any, Callable, Tuple

import numpy as np

from robot_bridge.cameras import load
from robot_bridge.drivers.arm import CONNECT_S, ArmDriver, Felt, numbers, within
from robot_bridge.gripper import Hand
from robot_bridge.motion import exp, log
from twinrl.core.errors import ConfigError, TwinRLError

MM = 1000.0
POSITION, SERVO = 0, 1  # modes
STOPPED = 4  # state
NEAR = 0.01  # rad, at home
START_S = 0.3  # within which its gripper begins to move
HOME7 = (0.0, -0.247, 0.0, 0.909, 0.0, 1.156, 0.0)  # tool down


class XArmDriver(ArmDriver):
    """Servo mode to set-points; see `ArmDriver` for the other options. Force is 0 without a force sensor."""

    kind = "xarm"
    home_counts = (5, 6, 7)
    gripper_s = 0.7

    def __init__(
        self,
        home_speed: float = 0.3,
        load_kg: float = -1.0,
        load_com: str = "0,0,0",
        force_sensor: int = 0,
        finger_speed: int = 3000,
        **common: Any,
    ) -> None:
        """`home_speed`: rad/s. `load_kg` below 0: as set on the controller; `load_com` in m. `finger_speed`: r/min.

        `home` has a default for seven joints only.
        """
        super().__init__(**common)
        self._home_speed, self._finger_speed = float(home_speed), int(finger_speed)
        self._load = (float(load_kg), [MM * x for x in numbers("load_com", load_com, 3)])
        self._force_sensor = bool(int(force_sensor))
        self._arm: Any = None
        self._following, self._refused = False, 0
        self._felt = Felt(np.eye(4), np.zeros(0), 0.0, "")

    def _reach(self) -> None:
        wrapper = load("xarm.wrapper", "xarm-python-sdk", "--robot xarm")
        try:
            arm = within(
                CONNECT_S, f"xarm {self.host}", lambda: wrapper.XArmAPI(self.host, is_radian=True)
            )
        except Exception as error:  # the SDK raises plain exceptions
            raise TwinRLError(f"xarm {self.host}: {error}") from None
        if not arm.connected:
            raise TwinRLError(f"xarm {self.host}: not reachable")
        self._arm = arm
        if not self.home and arm.axis == len(HOME7):
            self.home = HOME7
        if len(self.home) != arm.axis:
            raise ConfigError(
                f"this xArm has {arm.axis} joints, home {len(self.home)}: --robot-option home=..."
            )
        self._done("motion_enable", arm.motion_enable(True))
        if self._load[0] >= 0:
            self._done("set_tcp_load", arm.set_tcp_load(*self._load))
        if self._force_sensor:
            self._done("set_ft_sensor_enable", arm.set_ft_sensor_enable(1))

    def _done(self, what: str, code: Any) -> None:
        if code != 0:
            raise TwinRLError(f"xarm {self.host}: {what} answers {code}")

    def _set_mode(self, mode: int) -> None:
        self._done("set_mode", self._arm.set_mode(mode))
        self._done("set_state", self._arm.set_state(0))

    def _leave(self) -> None:
        arm, self._arm = self._arm, None
        if arm is not None:
            arm.set_state(STOPPED)
            arm.disconnect()

    def _grip_n(self) -> Tuple[float, str]:
        return XArmGripper.FORCE_N, "the xArm Gripper's force cannot be set"

    def _make_hand(self) -> Hand:
        return XArmGripper(self._arm, self._finger_speed)

    def _feel(self) -> Felt:
        arm = self._arm
        if not arm.connected:
            self._felt = self._felt._replace(fault="connection lost")
            return self._felt
        code, pose = arm.get_position_aa(is_radian=True)
        if code != 0:
            self._felt = self._felt._replace(fault=self._fault() or f"no pose: code {code}")
            return self._felt
        matrix = np.eye(4)
        matrix[:3, 3], matrix[:3, :3] = np.array(pose[:3]) / MM, exp(np.array(pose[3:], float))
        # Asked for: the controller's own reports come too seldom to see how fast joints turn.
        code, angles = arm.get_servo_angle(is_radian=True)
        joints = np.array(angles[: arm.axis], float) if code == 0 else self._felt.joints
        force = float(np.linalg.norm(arm.ft_ext_force[:3])) if self._force_sensor else 0.0
        self._felt = Felt(matrix, joints, force, self._fault())
        return self._felt

    def _fault(self) -> str:
        arm = self._arm
        if arm.error_code:
            return f"controller error {arm.error_code}"
        if arm.state == STOPPED:
            return "stopped"
        return f"set-points are refused: code {self._refused}" if self._refused else ""

    def _aim(self, matrix: np.ndarray) -> None:
        if self._following:
            pose = [*(MM * matrix[:3, 3]).tolist(), *log(matrix[:3, :3]).tolist()]
            self._refused = self._arm.set_servo_cartesian_aa(pose, is_radian=True)

    def _follow(self) -> None:
        if not self._following:
            self._set_mode(SERVO)
            self._following, self._refused = True, 0

    def _rest(self) -> None:
        if self._following:
            self._following = False
            self._set_mode(POSITION)

    def _go_home(self) -> Callable[[], bool]:
        self._set_mode(POSITION)
        home, arm = list(self.home), self._arm
        code = arm.set_servo_angle(angle=home, speed=self._home_speed, is_radian=True, wait=False)
        self._done("set_servo_angle", code)
        return lambda: bool(np.abs(np.subtract(self._felt.joints, home)).max() < NEAR)

    def _halt(self) -> None:
        self._following = False
        self._arm.set_state(STOPPED)

    def _recover(self) -> None:
        """Cleans errors and enables the motors again; an emergency stop's error comes back until it is released."""
        arm, self._following, self._refused = self._arm, False, 0
        if not arm.connected:
            within(CONNECT_S, f"xarm {self.host}", arm.connect)
            if not arm.connected:
                raise TwinRLError(f"xarm {self.host}: not reachable")
        arm.clean_error()
        arm.clean_warn()
        self._done("motion_enable", arm.motion_enable(True))
        self._set_mode(SERVO)
        if arm.error_code:
            raise TwinRLError(
                f"xarm {self.host} cannot recover: {self._fault()}; see UFACTORY Studio"
            )


class XArmGripper(Hand):
    """The xArm Gripper: positions 0 (closed) to 850, 0.1 mm each."""

    WIDEST = 850
    FORCE_N = 30.0  # by its data sheet; the SDK sets its speed only

    def __init__(self, arm: Any, speed: int) -> None:
        self._arm = arm
        for what, code in (
            ("set_gripper_mode", arm.set_gripper_mode(0)),
            ("set_gripper_enable", arm.set_gripper_enable(True)),
            ("set_gripper_speed", arm.set_gripper_speed(speed)),
        ):
            if code != 0:
                raise TwinRLError(
                    f"xArm Gripper: {what} answers {code}; without one: --robot-option gripper=none"
                )
        self._last, self._goal, self._began = self._position(), None, 0.0

    def start(self, opening: float) -> None:
        """Without waiting for the end."""
        self._goal, self._began = self.WIDEST * opening, time.monotonic()
        code = self._arm.set_gripper_position(self._goal, wait=False)
        if code != 0:
            raise TwinRLError(f"set_gripper_position answers {code}")

    def is_done(self) -> bool:
        """There, or no longer moving: it holds something."""
        before, self._last = self._last, self._position()
        return (
            self._goal is None or abs(self._last - self._goal) < 10 or abs(self._last - before) < 1
        )

    def width(self) -> float:
        """From the position."""
        return self._position() / 10.0 / MM

    def close(self) -> None:
        """The arm's connection is the arm's."""

    def _position(self) -> float:
        code, position = self._arm.get_gripper_position()
        if code != 0 or position is None:
            raise TwinRLError(f"get_gripper_position answers {code}")
        return float(position)
