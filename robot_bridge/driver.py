"""The Driver seam: how the bridge reaches an arm. One file for each arm in `robot_bridge.drivers`."""

from __future__ import annotations

import abc
import math
from typing import Any, Dict, NamedTuple

import numpy as np

from robot_bridge.camera_guard import USUAL, Tolerance
from robot_bridge.motion import exp, log
from robot_bridge.protocol import Job
from robot_bridge.registry import find
from robot_bridge.safety import Measured
from twinrl.core.errors import ConfigError
from twinrl.core.spec import Dimension, arm_dimensions

BUILT_IN = {
    "sim": "robot_bridge.drivers.sim:SimDriver",
    "point": "robot_bridge.drivers.point:PointDriver",
    "franka": "robot_bridge.drivers.franka:FrankaDriver",
    "ur": "robot_bridge.drivers.ur:URDriver",
    "xarm": "robot_bridge.drivers.xarm:XArmDriver",
    "lerobot": "robot_bridge.drivers.lerobot:LeRobotDriver",
}
ENTRY_POINTS = "twinrl.robots"


class Frame(NamedTuple):
    """What one camera saw."""

    time: float  # s, this PC's monotonic clock, of the exposure as well as it is known
    image: np.ndarray  # (H, W, 3) uint8


class Outcome(NamedTuple):
    """What the last control step led to."""

    reward: float = 0.0
    terminated: bool = False  # the task ended the episode
    truncated: bool = False  # a limit ended it; never both
    success: bool = False


class Commanded(NamedTuple):
    """What the arm was asked for: part of what a policy must know, since it moves later than it is told."""

    pose: np.ndarray  # (6,) the commanded pose that the next action adds to
    newest: np.ndarray  # (7,) the last executed action
    earlier: np.ndarray  # (7,) the one before


class Driver(abc.ABC):
    """An arm with its cameras.

    `measure` and `servo` are called from the control loop's thread, `rate_hz` times a second, and must be back in a
    fraction of that; so are `frames`, some thirty times a second, and `state`, `ended` and `expert`, once a control step. The rest is called from the
    bridge's thread while no episode runs. A driver whose arm wants
    set-points faster than `rate_hz` interpolates in a thread of its own. Set-points that come are within the safety
    filter's limits; where none come any more, the arm must stand.
    """

    kind = ""
    rate_hz = 100.0  # set-points a second
    frame = "base"  # of an action's deltas: base or tool
    dimensions: tuple[Dimension, ...] = arm_dimensions()  # of observation.state
    joint_range: np.ndarray | None = None  # (2, J) rad, low and high ends
    cameras: tuple[str, ...] = ()
    image_size = 0  # pixels, height = width
    tolerance: Tolerance | None = USUAL  # of what its cameras do; None: its images are no pictures
    reset_seconds = 5.0  # of the robot's time that a reset costs, where its clock is simulated
    simulated = False  # nothing can be hurt
    terminal: Any = None  # of this PC, where a person can be asked; given before `connect`
    grip_limit_n = math.inf  # N
    rearm_s = 0.0  # simulated: after a stop of so long it may move again by itself; 0: never
    lockstep = False  # simulated: its clock stands still between one `servo` and the next, which returns a tick later

    def limit_grip(self, force_n: float) -> None:
        """No gripper here may squeeze with more, N: said before `connect`. ConfigError where the options ask for more."""
        self.grip_limit_n = float(force_n)

    @abc.abstractmethod
    def connect(self, job: Job, speed: float) -> None:
        """Reach the arm; cameras deliver images of the job's size from here on. `speed` is the clock's, 1 = time."""

    @abc.abstractmethod
    def disconnect(self) -> None:
        """Leave the arm standing still. Called once, also after a failure."""

    @abc.abstractmethod
    def reset(self, configuration: dict[str, Any] | None, region: str) -> dict[str, Any]:
        """Bring arm and scene to `configuration` (None: draw one from `region`); what it is in the end."""

    @abc.abstractmethod
    def measure(self) -> Measured:
        """What the arm says of itself, as of now; a `fault` where it refuses to move."""

    @abc.abstractmethod
    def servo(self, pose: np.ndarray, gripper: float) -> None:
        """The next set-point: pose (6,) of the tool centre point, and the gripper's opening (0..1)."""

    def opening(self) -> float | None:
        """What the fingers were last told (0..1), where that is not what is wanted: they are busy, or open or closed only."""
        return None

    def frames(self) -> Dict[str, Frame]:
        """The newest image of each camera."""
        return {}

    def blind(self) -> str:
        """Which camera is known to have failed, and why, where frames alone do not say so; "" for none."""
        return ""

    def state(self, measured: Measured, commanded: Commanded) -> np.ndarray:
        """`observation.state` (S,) float32, as `dimensions` describes it."""
        return state_vector(measured, commanded)

    @abc.abstractmethod
    def ended(self, action: np.ndarray) -> Outcome:
        """A control step has ended, of which `action` (7,) is what was executed: its reward and ending."""

    def project(self, points: np.ndarray) -> Dict[str, np.ndarray]:
        """Where `points` (n, 3), m in the base frame, lie in the newest images: {camera: (n, 2)}, pixels to the right and
        down from the upper left corner, NaN behind the camera. Of cameras whose calibration is known. Called from any thread.
        """
        return {}

    def recover(self) -> None:
        """After a `fault`: make the arm take set-points again. TwinRLError says what a person must do."""
        raise ConfigError(f"robot {self.kind!r} cannot recover by itself")

    def expert(self, noise: float, commanded: np.ndarray) -> np.ndarray:
        """A scripted expert's action (7,) float32 from the commanded pose (6,), for a scripted operator."""
        raise ConfigError(
            f"robot {self.kind!r} has no scripted expert: use --operator keyboard or none"
        )


def state_vector(measured: Measured, commanded: Commanded) -> np.ndarray:
    """The arm's part of `observation.state` (27,) float32, in the order of `twinrl.core.spec.ARM`."""
    facing = exp(measured.pose[3:])
    ahead = commanded.pose[:3] - measured.pose[:3]
    lead = log(exp(commanded.pose[3:]) @ facing.T)
    parts = (measured.pose, [measured.width], ahead, lead, commanded.newest, commanded.earlier)
    return np.concatenate(parts).astype(np.float32)


def make_driver(kind: str, **options: Any) -> Driver:
    """The driver called `kind`: built in, or the entry point of another package."""
    factory = find("robot", kind, BUILT_IN, ENTRY_POINTS)
    try:
        return factory(**options)
    except TypeError as error:
        raise ConfigError(f"robot {kind!r}: {error}") from None
