"""A 3Dconnexion SpaceMouse, through the package pyspacemouse, which knows the reports of some 15 models.

Moving the cap acts, letting it go hands back. Its axes are away from the person, to the left and up, and turns
around these; the left button opens and closes the gripper, the right one says success.

pyspacemouse 2.1 or newer: from there on its rotations belong to its axes (AxisConvention.ROS). It reaches the device
through easyhid and the system's libhidapi-hidraw. Its `read` takes one report, never waits, and returns the same
state when there was none: the time in it tells. An unplugged device is an easyhid.HIDException.
"""

from __future__ import annotations

import time
from typing import Any, Dict, List

import numpy as np

from robot_bridge.operators.device import AXES, Device, Input
from robot_bridge.operators.device import REST as MIDDLE
from robot_bridge.operators.hand import HandOperator
from twinrl.core.errors import ConfigError

PAUSE = 0.004  # s between looks; the device sends every 8 ms or less often
AT_ONCE = 64  # reports
PIP = "pip install 'pyspacemouse>=2.1,<3'"
APT = "sudo apt-get install libhidapi-hidraw0"
UDEV = (
    'echo \'KERNEL=="hidraw*", KERNELS=="*:256F:*|*:046D:C62*", GROUP="plugdev", MODE="0660", TAG+="uaccess"\' | '
    "sudo tee /etc/udev/rules.d/70-twinrl-spacemouse.rules && sudo udevadm control --reload && "
    "sudo udevadm trigger, with yourself in the group: sudo usermod -aG plugdev $USER"
)
LEFT, RIGHT = ("left", "menu"), ("right", "fit")  # as small and as large models call them


class SpaceMouse(Device):
    """One SpaceMouse. `wanted`: a path /dev/hidraw*, or a model as pyspacemouse calls it; "" takes the first."""

    kind = "spacemouse"

    def __init__(self, wanted: str = "", number: int = 0) -> None:
        """`number`: which one of several of the same model."""
        self._wanted, self._number = str(wanted), int(number)
        self._mouse: Any = None
        self._told = 0.0  # the time in the state that came last

    def open(self) -> Input:
        """Find it. It says nothing until it is moved, so it is taken to be at rest."""
        library = _library()
        options: Dict[str, Any] = {"axis_convention": library.AxisConvention.ROS}
        try:
            if self._wanted.startswith("/"):
                mouse = library.open_by_path(self._wanted, **options)
            else:
                name = self._wanted or None
                mouse = library.open(device=name, device_index=self._number, **options)
        except Exception as error:  # of several kinds, none of its own
            raise ConfigError(_cure(str(error))) from None
        self.use(mouse)
        return Input(MIDDLE, frozenset())

    def use(self, mouse: Any) -> None:
        """Take an open pyspacemouse.SpaceMouseDevice."""
        self._mouse, self._told = mouse, -1.0

    def read(self, seconds: float) -> List[Input]:
        """Each report since the last call."""
        deadline = time.monotonic() + seconds
        found: List[Input] = []
        while len(found) < AT_ONCE:
            if self._mouse is None:
                raise OSError("the spacemouse is not open")
            try:
                state = self._mouse.read()
            except Exception as error:  # easyhid's own kind, or hidapi's
                raise OSError(str(error)) from None
            if state.t != self._told:
                self._told = state.t
                found.append(self._input(state))
            elif found or time.monotonic() >= deadline:
                break
            else:
                time.sleep(PAUSE)
        return found

    def close(self) -> None:
        """Let go of it."""
        mouse, self._mouse = self._mouse, None
        if mouse is not None:
            mouse.close()

    def _input(self, state: Any) -> Input:
        axes = np.array([getattr(state, name) for name in AXES], float)
        names = (self._mouse.get_button_name(i) for i, down in enumerate(state.buttons) if down)
        return Input(np.clip(axes, -1.0, 1.0), frozenset(name.lower() for name in names))


class SpaceMouseOperator(HandOperator):
    """Acts while the cap is away from the middle, and `rest_s` longer.

    `device`, `number`: see `SpaceMouse`. `left`, `right`: what the two buttons mean; a larger model's menu and fit
    mean the same, its esc is an emergency stop. The rest: see `HandOperator`.
    """

    def __init__(
        self,
        device: str | Device = "",
        number: int = 0,
        left: str = "gripper",
        right: str = "success",
        rest_s: float = 0.5,
        step_m: float = 0.02,
        step_rad: float = 0.1,
        dead_band: float = 0.15,
        curve: float = 0.5,
        view: int = 0,
        invert: str = "",
        silent_s: float = 0.5,
    ) -> None:
        if not rest_s > 0.0:
            raise ValueError(f"rest_s is {rest_s}: must be above 0 s")
        self._rest_s, self._moved = float(rest_s), -float(rest_s)
        meant = {**dict.fromkeys(LEFT, left), **dict.fromkeys(RIGHT, right), "esc": "estop"}
        self._grips = {name for name, meaning in meant.items() if meaning == "gripper"}
        self._band = float(dead_band)
        super().__init__(
            device if isinstance(device, Device) else SpaceMouse(device, number),
            *(meant, step_m, step_rad, dead_band, curve, view, invert, silent_s),
        )

    def _wants(self, given: Input, now: float) -> bool:
        if np.abs(given.axes).max() > self._band or self._grips & given.down:
            self._moved = now
        return now - self._moved < self._rest_s


def _library() -> Any:
    try:
        import pyspacemouse
    except ImportError:
        raise ConfigError(f"a spacemouse needs the package pyspacemouse: {PIP} && {APT}") from None
    except OSError as error:  # easyhid loads hidapi when it is imported
        raise ConfigError(f"a spacemouse needs hidapi ({error}): {APT}") from None
    if not hasattr(pyspacemouse, "AxisConvention"):
        version = getattr(pyspacemouse, "__version__", "an old version")
        raise ConfigError(f"pyspacemouse is {version}, 2.1 or newer is needed: {PIP}")
    return pyspacemouse


def _cure(reason: str) -> str:
    """What to do about what pyspacemouse says."""
    if "HID API" in reason:
        return f"a spacemouse needs hidapi: {APT}"
    if "Failed to open" in reason:
        return f"the spacemouse is there, and this user may not read it: {UDEV}"
    return f"no spacemouse: {reason} Plug it in, wake it; `pyspacemouse --list-hid` lists what there is"
