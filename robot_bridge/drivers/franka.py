"""A Franka arm (FR3, or FER/Panda) with the Franka Hand, by franky (`franky-control` 2.0 or newer).

Chosen over panda-py because its Cartesian impedance controller clips the pose error and the torque's rate in the
1 kHz loop itself, has gains and damping for each axis, and because wheels exist for every robot server version
(2 to 10) under one name; docs/arms.md compares them. The controller runs in a thread of the library's own: between
set-points, and when none come any more, it is a spring and damper to the last one.
"""

from __future__ import annotations

from typing import Any, Callable, Tuple

import numpy as np

from robot_bridge.cameras import load
from robot_bridge.drivers.arm import CONNECT_S, ArmDriver, Felt, numbers, within
from robot_bridge.gripper import Hand
from twinrl.core.errors import ConfigError, TwinRLError

# rad; of the FR3 those of systems before 5.9, which later ones have widened.
RANGES = {
    "fr3": (
        (-2.7437, -1.7837, -2.9007, -3.0421, -2.8065, 0.5445, -3.0159),
        (2.7437, 1.7837, 2.9007, -0.1518, 2.8065, 4.5169, 3.0159),
    ),
    "fer": (
        (-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973),
        (2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973),
    ),
}
REALTIME = {"enforce": "Enforce", "ignore": "Ignore"}
MODES = {
    "UserStopped": "user stop: release the stop button, and activate FCI again",
    "Guiding": "guiding: somebody holds the buttons at the flange",
    "Other": "not ready: open the brakes and activate FCI in Desk",
    "AutomaticErrorRecovery": "it is recovering from an error",
}
STOP_S = 5.0  # within which a torque stop ends; the library's own limit is below
OPEN_M = 0.08  # m between the Hand's fingers at most


class FrankaDriver(ArmDriver):
    """Cartesian impedance to set-points; see `ArmDriver` for the other options."""

    kind = "franka"
    home = (
        0.0,
        -0.1671,
        0.0,
        -2.5074,
        0.0,
        2.3403,
        0.7854,
    )  # the twins' start: tcp at (0.45, 0, 0.24)
    gripper_s = 0.8

    def __init__(
        self,
        stiffness: str = "1200,80",
        damping: str = "",
        error_clip_m: float = 0.025,
        error_clip_rad: float = 0.25,
        posture: float = 5.0,
        torque_step: float = 1.0,
        load_kg: float = 0.0,
        load_com: str = "0,0,0",
        load_inertia: str = "0,0,0,0,0,0,0,0,0",
        collision_nm: float = 20.0,
        collision_n: float = 30.0,
        home_speed: float = 0.1,
        model: str = "fr3",
        realtime: str = "enforce",
        grasp_n: float = 20.0,
        finger_speed: float = 0.1,
        **common: Any,
    ) -> None:
        """`stiffness`: N/m and Nm/rad, two numbers or one for each axis; `damping` six, critical without.

        The spring pulls with `stiffness` times the clipped error at most: 30 N by default. `posture`: Nm/rad towards
        the home joints in the null space. `torque_step`: Nm a joint's torque may change by in a millisecond. `load_*`:
        what the gripper holds always, beyond what Desk knows: mass, centre of mass (m, from the flange), inertia.
        `collision_*`: thresholds of the arm's own reflex. `home_speed`: share of the arm's fastest.
        """
        super().__init__(**common)
        gains = numbers("stiffness", stiffness, 2, 6)
        self._stiffness = (gains[0],) * 3 + (gains[1],) * 3 if len(gains) == 2 else gains
        self._damping = numbers("damping", damping, 6) if damping else None
        self._clip = (float(error_clip_m), float(error_clip_rad))
        self._posture, self._torque_step = float(posture), float(torque_step)
        self._load = (
            float(load_kg),
            numbers("load_com", load_com, 3),
            numbers("load_inertia", load_inertia, 9),
        )
        self._collision = (float(collision_nm), float(collision_n))
        for name, value, known in (("model", model, RANGES), ("realtime", realtime, REALTIME)):
            if value not in known:
                raise ConfigError(f"option {name} is {value!r}, not one of {', '.join(known)}")
        if not 0.0 < home_speed <= 0.5:
            raise ConfigError(
                f"option home_speed is {home_speed:g}, must be above 0, and 0.5 at most"
            )
        if min(*self._stiffness, *self._clip, *self._collision, grasp_n) <= 0:
            raise ConfigError("stiffness, error_clip_*, collision_* and grasp_n must be above 0")
        self._home_speed, self._realtime = float(home_speed), REALTIME[realtime]
        self._grasp_n, self._finger_speed = float(grasp_n), float(finger_speed)
        self.joint_range = np.array(RANGES[model])
        self._robot: Any = None
        self._motion: Any = None  # that takes set-points
        self._felt = Felt(np.eye(4), np.zeros(7), 0.0, "")
        self._ended = ""  # why the controller has ended by itself
        self._lost = False

    def _reach(self) -> None:
        self._franky = load("franky", "franky-control", "--robot franka")
        if not hasattr(self._franky, "CartesianImpedanceTrackingMotion"):
            raise ConfigError(
                "--robot franka needs franky-control 2.0 or newer: pip install -U franky-control"
            )
        self._open_robot()
        state = self._robot.state
        if state.robot_mode.name in MODES:
            raise TwinRLError(f"franka {self.host}: {MODES[state.robot_mode.name]}")
        # The arm refuses these while it moves.
        self._robot.set_collision_behavior(*self._collision)
        if self._load[0] > 0:
            self._robot.set_load(self._load[0], list(self._load[1]), list(self._load[2]))

    def _open_robot(self) -> None:
        franky = self._franky
        realtime = getattr(franky.RealtimeConfig, self._realtime)
        try:
            self._robot = within(
                CONNECT_S,
                f"franka {self.host}",
                lambda: franky.Robot(self.host, realtime_config=realtime),
            )
        except franky.IncompatibleVersionException as error:
            raise TwinRLError(
                f"franka {self.host}: {error}. Install the wheel for this robot's server version, see "
                "docs/arms.md"
            ) from None
        except franky.RealtimeException as error:
            raise TwinRLError(
                f"franka {self.host}: {error}. Boot a real-time kernel (twinrl doctor --robot franka), or try "
                "without: --robot-option realtime=ignore"
            ) from None
        except franky.Exception as error:
            raise TwinRLError(f"franka {self.host}: {error}") from None

    def _leave(self) -> None:
        robot, self._robot = self._robot, None
        if robot is None:
            return
        try:
            self._stop_torque(robot)
        except Exception:  # an arm out of control or out of reach stands already
            pass

    def _grip_n(self) -> Tuple[float, str]:
        return self._grasp_n, "--robot-option grasp_n=... gives another force"

    def _make_hand(self) -> Hand:
        return FrankaHand(
            self._franky, self.host, self._gripper.kind.kind, self._finger_speed, self._grasp_n
        )

    def _feel(self) -> Felt:
        if self._lost:  # asking again would wait for a time-out in every tick
            return self._felt
        try:
            state = self._robot.state
            fault = self._fault(state)
        except self._franky.Exception as error:
            self._lost = True
            self._felt = self._felt._replace(fault=f"connection lost: {error}")
            return self._felt
        force = float(np.linalg.norm(np.asarray(state.O_F_ext_hat_K)[:3]))
        matrix = np.array(state.O_T_EE.matrix, float).reshape(4, 4)
        self._felt = Felt(matrix, np.array(state.q, float), force, fault)
        return self._felt

    def _fault(self, state: Any) -> str:
        """Why the arm does not take set-points although it should."""
        mode = state.robot_mode.name
        if mode in MODES:
            return MODES[mode]
        if mode == "Reflex":
            named = errors_of(state.current_errors) or errors_of(state.last_motion_errors)
            return f"reflex: {', '.join(named) or 'the arm does not say why'}"
        if self._motion is None or self._robot.is_in_control:
            return ""
        if not self._ended:
            self._ended = "control has ended"
            try:
                self._robot.poll_motion()
            except self._franky.Exception as error:  # what ended it: told once, and by this call
                self._ended = f"control has ended: {error}"
        return self._ended

    def _aim(self, matrix: np.ndarray) -> None:
        if self._motion is not None:
            target = self._franky.Affine(matrix)
            self._motion.set_reference(self._franky.CartesianReference(target=target))

    def _follow(self) -> None:
        franky, robot = self._franky, self._robot
        if self._motion is not None and robot.is_in_control:
            return
        options = {}
        if self._posture > 0:
            options["posture_task"] = franky.PostureTask(list(self.home), self._posture)
        # A motion cannot be used twice.
        motion = franky.CartesianImpedanceTrackingMotion(
            translational_stiffness=min(self._stiffness[:3]),
            rotational_stiffness=min(self._stiffness[3:]),
            translational_error_clip=[self._clip[0]] * 3,
            rotational_error_clip=[self._clip[1]] * 3,
            max_delta_tau=self._torque_step,
            **options,
        )
        damping = None if self._damping is None else list(self._damping)
        motion.set_gains(franky.CartesianImpedanceGains.diagonal(list(self._stiffness), damping))
        try:
            motion.set_reference(
                franky.CartesianReference(target=robot.current_pose.end_effector_pose)
            )
            robot.move(motion, asynchronous=True)
        except (franky.Exception, franky.InvalidMotionTypeException) as error:
            raise TwinRLError(f"franka {self.host} does not take set-points: {error}") from None
        self._motion, self._ended = motion, ""

    def _rest(self) -> None:
        try:
            self._stop_torque(self._robot)
        except self._franky.Exception as error:
            raise TwinRLError(f"franka {self.host} did not stop: {error}") from None

    def _stop_torque(self, robot: Any) -> None:
        """Let the torques fade and the arm come to rest."""
        motion, self._motion = self._motion, None
        if motion is None or not robot.is_in_control:
            return
        robot.move(self._franky.TorqueStopMotion(), asynchronous=True)
        if not robot.join_motion(timeout=STOP_S):
            robot.stop()

    def _go_home(self) -> Callable[[], bool]:
        franky, robot = self._franky, self._robot
        motion = franky.JointMotion(list(self.home), relative_dynamics_factor=self._home_speed)
        try:
            robot.move(motion, asynchronous=True)
        except (franky.Exception, franky.InvalidMotionTypeException) as error:
            raise TwinRLError(f"franka {self.host} does not go home: {error}") from None

        def is_there() -> bool:
            try:
                # Not `poll_motion`: in 2.0.0 that is true when the motion is over, against its documentation.
                return bool(robot.join_motion(timeout=0.0))
            except franky.Exception as error:
                raise TwinRLError(f"franka {self.host} on its way home: {error}") from None

        return is_there

    def _halt(self) -> None:
        self._motion = None
        try:
            self._robot.stop()
            self._robot.join_motion(
                timeout=STOP_S
            )  # what the stop makes it raise is not of the next motion
        except (
            self._franky.Exception
        ):  # also where it stands already, or out of reach stops by itself
            pass

    def _recover(self) -> None:
        """The library's automatic error recovery; reconnects first where the connection was lost."""
        franky = self._franky
        fault = self._felt.fault
        if fault in MODES.values() and not fault.startswith("it is"):
            raise TwinRLError(f"franka {self.host}: {fault}")
        if self._lost:
            self._open_robot()
        self._motion, self._ended, self._lost = None, "", False
        try:
            done = self._robot.recover_from_errors()
        except franky.Exception as error:
            raise TwinRLError(f"franka {self.host} cannot recover: {error}") from None
        if not done:
            raise TwinRLError(f"franka {self.host} cannot recover by itself: look at Desk")


class FrankaHand(Hand):
    """The Franka Hand: a grasp holds with its force, a move does not."""

    def __init__(self, franky: Any, host: str, kind: str, speed: float, grasp_n: float) -> None:
        self._franky, self._binary = franky, kind == "binary"
        self._speed, self._grasp_n = speed, grasp_n
        self._done: Any = None
        try:
            self._gripper = within(CONNECT_S, f"gripper {host}", lambda: franky.Gripper(host))
            self._open_m = float(self._gripper.max_width) or OPEN_M
        except franky.Exception as error:
            raise TwinRLError(
                f"gripper {host}: {error}; without one: --robot-option gripper=none"
            ) from None

    def start(self, opening: float) -> None:
        """A binary gripper closes by a grasp of whatever is between its fingers."""
        if self._binary and opening == 0.0:
            self._done = self._gripper.grasp_async(
                0.0,
                self._speed,
                self._grasp_n,
                epsilon_inner=self._open_m,
                epsilon_outer=self._open_m,
            )
        else:
            self._done = self._gripper.move_async(self._open_m * opening, self._speed)

    def is_done(self) -> bool:
        """Also where the fingers met something: the gripper calls that a failed command."""
        if self._done is None:
            return True
        if not self._done.wait(0.0):
            return False
        done, self._done = self._done, None
        try:
            done.get()
        except self._franky.CommandException:
            pass
        return True

    def width(self) -> float:
        """From the gripper's own state."""
        return float(self._gripper.width)

    def close(self) -> None:
        """A grasp goes on: what is held is not dropped."""
        self._gripper = None


def errors_of(errors: Any) -> list[str]:
    """The names of what is set in a libfranka error state, as words."""
    names = [name for name in dir(errors) if not name.startswith("_")]
    return [name.replace("_", " ") for name in names if getattr(errors, name) is True]
