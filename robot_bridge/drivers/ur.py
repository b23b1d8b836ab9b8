"""A Universal Robots arm (CB3, e-Series), by ur-rtde: `servoL` at its own timing and gain. Its gripper: a Robotiq.

`servoL` goes on to the last set-point when none come any more, so the arm stands there.
"""

from __future__ import annotations

import math
import socket
from typing import Any, Callable, Tuple

import numpy as np

from robot_bridge.cameras import load
from robot_bridge.drivers.arm import CONNECT_S, ArmDriver, Felt, numbers, within
from robot_bridge.gripper import Hand
from robot_bridge.motion import exp, log
from twinrl.core.errors import ConfigError, TwinRLError

NEAR = 0.01  # rad, at home
RUNNING = 7  # robot mode
STOPS = {  # bits of the safety status, first what a person can see
    7: "emergency stop: release it, then release the brakes",
    4: "safeguard stop: somebody is in the cell",
    2: "protective stop",
    9: "fault of the safety system: restart the controller",
    8: "violation of the safety system: restart the controller",
}


class URDriver(ArmDriver):
    """`servoL` to set-points; see `ArmDriver` for the other options. The base frame is the controller's."""

    kind = "ur"
    home = (0.0, -1.5708, 1.5708, -1.5708, -1.5708, 0.0)  # tool down, elbow up
    gripper_s = 0.7
    joint_range = np.array([[-2 * math.pi] * 6, [2 * math.pi] * 6])

    def __init__(
        self,
        lookahead: float = 0.1,
        gain: float = 300.0,
        payload_kg: float = -1.0,
        payload_com: str = "0,0,0",
        home_speed: float = 0.3,
        grip: int = 10,
        **common: Any,
    ) -> None:
        """`lookahead` s (0.03 to 0.2) smoothens, `gain` (100 to 2000) stiffens. `payload_kg` below 0: as installed.

        `home_speed`: rad/s of the leading joint. `grip`: the Robotiq's force, 0 to 255: 20 to 235 N of a 2F-85.
        """
        super().__init__(**common)
        if not (0.03 <= lookahead <= 0.2 and 100 <= gain <= 2000):
            raise ConfigError(
                f"lookahead {lookahead:g} must be 0.03 to 0.2 s, gain {gain:g} 100 to 2000"
            )
        if not 0 <= grip <= 255:
            raise ConfigError(f"option grip is {grip}, must be 0 to 255")
        self._lookahead, self._gain, self._grip = float(lookahead), float(gain), int(grip)
        self._payload = (float(payload_kg), list(numbers("payload_com", payload_com, 3)))
        self._home_speed = float(home_speed)
        self._control: Any = None
        self._receive: Any = None
        self._following = False
        self._felt = Felt(np.eye(4), np.zeros(6), 0.0, "")

    def _reach(self) -> None:
        control = load("rtde_control", "ur-rtde", "--robot ur")
        receive = load("rtde_receive", "ur-rtde", "--robot ur")
        self._dashboard = load("dashboard_client", "ur-rtde", "--robot ur")
        try:
            self._receive = self._made(lambda: receive.RTDEReceiveInterface(self.host))
            self._control = self._made(lambda: control.RTDEControlInterface(self.host))
        except RuntimeError as error:
            raise TwinRLError(
                f"ur {self.host}: {error}; is it on, and in remote control?"
            ) from None
        if self._payload[0] >= 0:
            self._control.setPayload(*self._payload)

    def _made(self, make: Callable[[], Any]) -> Any:
        return within(CONNECT_S, f"ur {self.host}", make)

    def _leave(self) -> None:
        control, self._control = self._control, None
        if control is not None:
            control.servoStop()
            control.stopScript()
            control.disconnect()
        if self._receive is not None:
            self._receive.disconnect()

    def _grip_n(self) -> Tuple[float, str]:
        weakest, strongest = Robotiq.FORCE_N
        grip = weakest + (strongest - weakest) * self._grip / 255.0
        return grip, f"--robot-option grip=... gives another force, {weakest:g} N at least"

    def _make_hand(self) -> Hand:
        return Robotiq(self.host, self._grip)

    def _feel(self) -> Felt:
        receive = self._receive
        if not receive.isConnected():
            self._felt = self._felt._replace(fault="connection lost")
            return self._felt
        pose = np.array(receive.getActualTCPPose(), float)
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = exp(pose[3:]), pose[:3]
        force = float(np.linalg.norm(receive.getActualTCPForce()[:3]))
        self._felt = Felt(matrix, np.array(receive.getActualQ(), float), force, self._fault())
        return self._felt

    def _fault(self) -> str:
        bits = self._receive.getSafetyStatusBits()
        for bit, text in STOPS.items():
            if bits >> bit & 1:
                return text
        mode = self._receive.getRobotMode()
        if mode != RUNNING:
            return f"robot mode {mode}, not {RUNNING} (running): power on and release the brakes"
        if self._following and not self._control.isProgramRunning():
            return "the control script does not run"
        return ""

    def _aim(self, matrix: np.ndarray) -> None:
        if self._following:
            pose = [*matrix[:3, 3].tolist(), *log(matrix[:3, :3]).tolist()]
            # Speed and acceleration are not used by this version of the library.
            self._control.servoL(pose, 0.0, 0.0, 1.0 / self.rate_hz, self._lookahead, self._gain)

    def _follow(self) -> None:
        self._following = True

    def _rest(self) -> None:
        if self._following:
            self._following = False
            within(CONNECT_S, "servoStop", self._control.servoStop)

    def _go_home(self) -> Callable[[], bool]:
        home = list(self.home)
        if not self._control.moveJ(home, self._home_speed, 0.5, True):
            raise TwinRLError(f"ur {self.host} does not go home: moveJ was refused")
        return lambda: bool(np.abs(np.subtract(self._felt.joints, home)).max() < NEAR)

    def _halt(self) -> None:
        self._following = False
        self._control.servoStop()
        self._control.stopJ(2.0)

    def _recover(self) -> None:
        """Unlocks a protective stop, and sends the control script again."""
        fault = self._felt.fault
        if fault in STOPS.values() and fault != STOPS[2]:
            raise TwinRLError(f"ur {self.host}: {fault}")
        self._following = False
        try:
            if fault == STOPS[2]:
                client = self._dashboard.DashboardClient(self.host)
                client.connect(2000)
                client.closeSafetyPopup()
                client.unlockProtectiveStop()
                client.disconnect()
            for side in (self._receive, self._control):
                if not side.isConnected() and not side.reconnect():
                    raise TwinRLError(f"ur {self.host}: not reachable")
            done = self._control.reuploadScript()
        except RuntimeError as error:
            raise TwinRLError(f"ur {self.host} cannot recover: {error}") from None
        if not done:
            raise TwinRLError(
                f"ur {self.host} does not take its control script: look at the pendant"
            )


class Robotiq(Hand):
    """A Robotiq gripper by its URCap's text protocol on the controller."""

    PORT, OPEN_M = 63352, 0.085
    FORCE_N = (20.0, 235.0)  # of a 2F-85 at 0 and at 255; others squeeze less

    def __init__(self, host: str, force: int) -> None:
        try:
            self._socket = socket.create_connection((host, self.PORT), 3.0)
        except OSError as error:
            raise TwinRLError(
                f"Robotiq at {host}:{self.PORT}: {error}; without one: --robot-option gripper=none"
            ) from None
        self._socket.settimeout(1.0)
        for setting, value in (("ACT", 1), ("GTO", 1), ("SPE", 255), ("FOR", force)):
            self._say(f"SET {setting} {value}")

    def start(self, opening: float) -> None:
        """0 is open there, 255 closed."""
        self._say(f"SET POS {round(255 * (1.0 - opening))}")

    def is_done(self) -> bool:
        """At the position, or stopped by what it holds."""
        return self._get("OBJ") != 0

    def width(self) -> float:
        """From the position, as if it were linear."""
        return self.OPEN_M * (1.0 - self._get("POS") / 255.0)

    def close(self) -> None:
        """It keeps holding."""
        self._socket.close()

    def _get(self, name: str) -> int:
        answer = self._say(f"GET {name}").split()
        if len(answer) != 2 or answer[0] != name:
            raise TwinRLError(f"Robotiq answers {' '.join(answer)!r} to GET {name}")
        return int(answer[1])

    def _say(self, line: str) -> str:
        self._socket.sendall(line.encode() + b"\n")
        return self._socket.recv(256).decode(errors="replace").strip()
