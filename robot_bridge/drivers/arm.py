"""What drivers of real arms have in common: cameras, a gripper, a slow way home, and a person who places the scene.

No reward comes from a real scene: the operator's success and failure keys and the job's `max_steps` end an episode.
"""

from __future__ import annotations

import abc
import math
import threading
import time
from typing import Any, Callable, List, NamedTuple, Tuple

import numpy as np

from robot_bridge.cameras import Cameras, Mode, make_camera, parse
from robot_bridge.driver import Driver, Frame, Outcome
from robot_bridge.gripper import OVERDUE, Hand, HandThread
from robot_bridge.motion import DOWN, exp, log
from robot_bridge.protocol import Job
from robot_bridge.safety import Measured
from robot_bridge.scene import Person, describe
from twinrl.core.errors import ConfigError, DeadlineError, TwinRLError
from twinrl.core.gripper import Gripper, GripperKind

SCENES = ("ask", "leave")
LIFT_SPEED = 0.05  # m/s, straight up before an arm goes home
FRESH_S = 5.0  # within which cameras must show the placed scene
CONNECT_S = 15.0


class Felt(NamedTuple):
    """What an arm's own interface says."""

    matrix: np.ndarray  # (4, 4) tool centre point in the base frame, the tool's z axis out of it
    joints: np.ndarray  # (J,) rad
    force: float  # N at the tool
    fault: str  # why it does not move


class ArmDriver(Driver):
    """A real arm. Subclasses say how it is reached, read, told and brought home; none of that may wait for ever."""

    home: tuple = ()  # joints, rad; empty: to be given, as many numbers as `home_counts` says
    home_counts: tuple = ()
    gripper_s = 0.0  # that a binary gripper takes to open or close
    has_address = True  # it is reached by `host`

    def __init__(
        self,
        host: str = "",
        cameras: str = "",
        camera_size: str = "640x480",
        camera_hz: int = 30,
        home: str = "",
        home_s: float = 30.0,
        clear_m: float = 0.25,
        scene: str = "ask",
        scene_s: float = 600.0,
        tool_yaw: float = 0.0,
        gripper: str = "binary",
        close_below: float = 0.4,
        open_above: float = 0.6,
        gripper_s: float = -1.0,
    ) -> None:
        """`cameras`: see `robot_bridge.cameras.parse`. `home`: joints in rad, comma-separated.

        `clear_m`: height of the tool that it goes straight up to before it goes home. `tool_yaw`: rad about the
        tool's axis from where the fingers open along y to the frame that the arm calls its tool. `gripper_s`: a
        gripper's busy time. `scene`: "ask" a person to place it, within `scene_s`, or "leave" it.
        """
        if self.has_address and not host:
            raise ConfigError(f"robot {self.kind!r} needs --robot-option host=ADDRESS")
        if scene not in SCENES:
            raise ConfigError(f"option scene is {scene!r}, not one of {', '.join(SCENES)}")
        self.host, self.scene, self.scene_s = str(host), scene, float(scene_s)
        self._wanted_cameras = parse(cameras)
        self._mode = Mode(*_size(camera_size), int(camera_hz))
        if home:
            self.home = numbers("home", home, *(self.home_counts or (len(self.home),)))
        self.home_s, self.clear_m = float(home_s), float(clear_m)
        self._tool = DOWN @ exp(np.array([0.0, 0.0, float(tool_yaw)]))
        self._has_gripper = gripper != "none"
        busy = self.gripper_s if gripper_s < 0 else float(gripper_s)
        if gripper == "continuous" and gripper_s < 0:
            busy = 0.1  # as often as its calls end
        kind = GripperKind(
            gripper if self._has_gripper else "binary", float(close_below), float(open_above), busy
        )
        self._gripper = Gripper(kind)
        self.person: Any = None  # made at connect; a program may bring its own
        self.reset_seconds = 0.0  # what the last reset took; it was spent already
        self._cameras: Cameras | None = None
        self._hand: HandThread | None = None
        self._reached = False

    # -- what an arm brings ----------------------------------------------------------------------------------

    @abc.abstractmethod
    def _reach(self) -> None:
        """Connect."""

    @abc.abstractmethod
    def _leave(self) -> None:
        """Disconnect; the arm stands."""

    def _make_hand(self) -> Hand | None:
        """The gripper, connected."""
        return None

    def _grip_n(self) -> Tuple[float, str]:
        """What the gripper squeezes with at most, N, and what to do where that is too much. 0: it is not known."""
        return 0.0, ""

    def _own_cameras(self) -> tuple:
        """Names of cameras that come with the arm, known before it is reached."""
        return ()

    def _own_frames(self) -> dict[str, Frame]:
        """Their newest images, of the job's size."""
        return {}

    def _own_width(self) -> float:
        """Between the fingers of a gripper that is a part of the arm's own interface, m."""
        return 0.0

    @abc.abstractmethod
    def _feel(self) -> Felt:
        """The arm's state now. A lost connection is a fault."""

    @abc.abstractmethod
    def _aim(self, matrix: np.ndarray) -> None:
        """The next set-point, (4, 4) as `Felt.matrix`."""

    @abc.abstractmethod
    def _follow(self) -> None:
        """Take set-points from where it stands, if it does not already."""

    @abc.abstractmethod
    def _rest(self) -> None:
        """Take no set-points any more, and stand."""

    @abc.abstractmethod
    def _go_home(self) -> Callable[[], bool]:
        """Begin to go home slowly; what says whether it is there, and raises where the motion has failed."""

    @abc.abstractmethod
    def _halt(self) -> None:
        """Stop a motion home at once."""

    @abc.abstractmethod
    def _recover(self) -> None:
        """Clear a fault and take set-points again; TwinRLError says what a person must do."""

    # -- the seam --------------------------------------------------------------------------------------------

    def limit_grip(self, force_n: float) -> None:
        """Refuses what the options ask for beyond `force_n`."""
        super().limit_grip(force_n)
        grip, cure = self._grip_n()
        if self._has_gripper and grip > force_n:
            raise ConfigError(
                f"the gripper of robot {self.kind!r} would squeeze with {grip:.3g} N, limit gripper_force_n allows "
                f"{force_n:g} N: {cure}"
            )

    def connect(self, job: Job, speed: float) -> None:
        """Reach arm, gripper and cameras."""
        if speed != 1.0:
            raise ConfigError(f"--speed {speed:g}: a real arm knows only 1")
        if job.observe != "images":
            raise ConfigError(f"the run observes {job.observe!r}, a real arm has only cameras")
        known = (*self._wanted_cameras, *self._own_cameras())
        missing = [name for name in job.schema.cameras if name not in known]
        if missing:
            raise ConfigError(
                f"the run needs camera {missing[0]!r}, configured are {', '.join(known) or 'none'}: "
                "--robot-option cameras=NAME=KIND:ADDRESS,..."
            )
        if self.person is None and (self.scene == "ask" or self.terminal is not None):
            self.person = Person(self.terminal)
        self.cameras, self.image_size = tuple(job.schema.cameras), job.schema.image_size
        self._reached = True
        self._reach()
        hand = self._make_hand() if self._has_gripper else None
        self._hand = HandThread(hand) if hand is not None else None
        wanted = {n: self._wanted_cameras[n] for n in self.cameras if n in self._wanted_cameras}
        devices = {name: make_camera(*device) for name, device in wanted.items()}
        self._cameras = Cameras(devices, self.image_size, self._mode)

    def disconnect(self) -> None:
        """Arm first: it must stand, whatever else fails."""
        hand, cameras = self._hand, self._cameras
        try:
            if self._reached:
                self._leave()
        finally:
            self._hand = self._cameras = None
            for each in (hand, cameras):
                if each is not None:
                    each.close()

    def reset(self, configuration: dict[str, Any] | None, region: str) -> dict[str, Any]:
        """Open, straight up, home by a joint motion; then a person places the scene."""
        began = time.monotonic()
        if self.blind():
            raise TwinRLError(f"{self.blind()}: check its cable")
        if self._look().fault:
            self.recover()
        self._open()
        self._lift()
        self._rest()
        self._until(self._go_home(), self.home_s, "the way home")
        self.reset_seconds = time.monotonic() - began
        if self.scene == "ask":
            self.person.ask(describe(configuration, region), self.scene_s)
        self._follow()
        if self._cameras is not None:
            self._cameras.wait(time.monotonic(), FRESH_S)
        return dict(configuration or {}, region=region)

    def measure(self) -> Measured:
        """The arm's pose and force; its faults and the gripper's."""
        return self._look()

    def servo(self, pose: np.ndarray, gripper: float) -> None:
        """Hand on the pose; the gripper's thread is told what has changed."""
        self._aim(self._matrix(pose))
        if self._hand is not None:
            command = self._gripper(gripper, time.monotonic())
            if command is not None:
                self._hand.ask(command)

    def opening(self) -> float | None:
        """What the fingers were last told."""
        return self._gripper.commanded if self._hand is not None else None

    def frames(self) -> dict[str, Frame]:
        """The newest images."""
        if self._cameras is None:
            return {}
        return {**self._own_frames(), **self._cameras.frames()}

    def blind(self) -> str:
        """A camera that is unplugged."""
        return "" if self._cameras is None else self._cameras.error

    def ended(self, action: np.ndarray) -> Outcome:
        """Nothing: a person says what became of it."""
        return Outcome()

    def recover(self) -> None:
        """Clear what can be cleared."""
        if self._hand is not None:
            self._hand.clear()
        if self._feel().fault:
            within(2 * CONNECT_S, f"recovery of {self.kind}", self._recover)
        self._follow()

    # -- parts of a reset ------------------------------------------------------------------------------------

    def _look(self) -> Measured:
        felt, hand = self._feel(), self._hand
        fault = felt.fault or (hand.fault if hand is not None else "")
        width = hand.width if hand is not None else self._own_width()
        pose = self._pose(felt.matrix)
        return Measured(time.monotonic(), pose, np.asarray(felt.joints), width, felt.force, fault)

    def _open(self) -> None:
        self._gripper.begin(1.0)
        if self._hand is not None:
            self._hand.ask(1.0)
            hand = self._hand
            self._until(lambda: not hand.moving, OVERDUE + 1.0, "opening the gripper")

    def _lift(self) -> None:
        """Straight up at walking pace of the tool, so that nothing is swept off the table on the way home."""
        measured = self._look()
        pose, height = measured.pose.copy(), self.clear_m - measured.pose[2]
        if height <= 0:
            return
        self._follow()
        tick = 1.0 / self.rate_hz
        for _ in range(math.ceil(height / (LIFT_SPEED * tick))):
            pose[2] += LIFT_SPEED * tick
            self._aim(self._matrix(pose))
            time.sleep(tick)
            self._check()

    def _until(self, done: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            self._check()
            if time.monotonic() > deadline:
                self._halt()
                raise DeadlineError(f"{what} took more than {seconds:g} s: the arm was stopped")
            time.sleep(0.02)

    def _check(self) -> None:
        """Stop at once if the person says so, or the arm."""
        try:
            if self.person is not None:
                self.person.heed()
            fault = self._look().fault
            if fault:
                raise TwinRLError(f"during the reset: {fault}")
        except TwinRLError:
            self._halt()
            raise

    # -- poses -----------------------------------------------------------------------------------------------

    def _matrix(self, pose: np.ndarray) -> np.ndarray:
        """The arm's own tool frame (4, 4) at `pose` (6,), see `robot_bridge.motion`."""
        matrix = np.eye(4)
        matrix[:3, :3] = exp(np.asarray(pose[3:], float)) @ self._tool
        matrix[:3, 3] = pose[:3]
        return matrix

    def _pose(self, matrix: np.ndarray) -> np.ndarray:
        """The pose (6,) of the arm's own tool frame (4, 4)."""
        return np.concatenate([matrix[:3, 3], log(matrix[:3, :3] @ self._tool.T)])


def numbers(name: str, text: Any, *counts: int) -> tuple:
    """Floats of "1,2,3"; ConfigError unless there are as many as one of `counts` says."""
    try:
        found = tuple(float(part) for part in str(text).split(","))
    except ValueError:
        found = ()
    if len(found) not in counts or not all(map(math.isfinite, found)):
        wanted = " or ".join(map(str, counts))
        raise ConfigError(f"option {name} is {text!r}, must be {wanted} comma-separated numbers")
    return found


def within(seconds: float, what: str, call: Callable[[], Any]) -> Any:
    """What `call` returns or raises; DeadlineError where a vendor's library does neither within `seconds`."""
    answer: List[Any] = []

    def run() -> None:
        try:
            answer.append((call(), None))
        except BaseException as error:
            answer.append((None, error))

    thread = threading.Thread(target=run, name="deadline", daemon=True)
    thread.start()
    thread.join(seconds)
    if not answer:
        raise DeadlineError(f"{what}: no answer within {seconds:g} s")
    found, error = answer[0]
    if error is not None:
        raise error
    return found


def _size(text: str) -> tuple:
    width, x, height = str(text).partition("x")
    if not (x and width.isdigit() and height.isdigit()):
        raise ConfigError(f"option camera_size is {text!r}, must be WIDTHxHEIGHT in pixels")
    return int(width), int(height)
