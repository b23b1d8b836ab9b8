"""A gamepad, read from the kernel's event device.

No library: pygame wants a video system and reads only in its own event loop, `inputs` is not maintained and loses
unplugging, python-evdev has to be compiled on each robot's PC. The kernel's interface is older than all of them, and
names buttons by place (docs.kernel.org/input/gamepad.html), whatever the maker prints on them.

hold the right trigger to act, release it to hand back
left stick       away, to the person, left, right      right stick   up, down, turn
bumpers          turn                                  cross         tilt
south (A, x)     gripper                               start         success
east (B, o)      failure                               select        discard the episode
north or west    emergency stop (latched)
"""

from __future__ import annotations

import os
from typing import Dict, FrozenSet, List, Tuple

import numpy as np

from robot_bridge.operators import evdev
from robot_bridge.operators.device import Device, Input
from robot_bridge.operators.hand import HandOperator
from twinrl.core.errors import ConfigError

SOUTH = 0x130  # which every gamepad has
BUTTONS = {
    **{SOUTH: "south", 0x131: "east", 0x133: "north", 0x134: "west"},
    **{0x136: "left_bumper", 0x137: "right_bumper", 0x138: "left_trigger", 0x139: "right_trigger"},
    **{0x13A: "select", 0x13B: "start", 0x13C: "mode", 0x13D: "left_stick", 0x13E: "right_stick"},
    **{0x220: "up", 0x221: "down", 0x222: "left", 0x223: "right"},
}
X, Y, Z, RX, RY, RZ, GAS, BRAKE, HAT_X, HAT_Y = 0, 1, 2, 3, 4, 5, 9, 10, 16, 17
PRESS, RELEASE = (
    0.6,
    0.4,
)  # of a trigger's way: apart, so that a finger at rest on it does not flutter
UDEV = (
    'echo \'SUBSYSTEM=="input", ENV{ID_INPUT_JOYSTICK}=="1", TAG+="uaccess", GROUP="plugdev", MODE="0660"\' | '
    "sudo tee /etc/udev/rules.d/70-twinrl-gamepad.rules && sudo udevadm control --reload && "
    "sudo udevadm trigger, with yourself in the group: sudo usermod -aG plugdev $USER"
)
DEFAULTS = {
    **{"south": "gripper", "start": "success", "east": "failure", "select": "discard"},
    **{"north": "estop", "west": "estop"},
}


class Layout:
    """Which axis is which: drivers of the kernel differ in the codes of right stick and triggers."""

    def __init__(self, axes: FrozenSet[int]) -> None:
        pedals = GAS in axes or BRAKE in axes
        self.right = (RX, RY) if RX in axes else (Z, RZ)
        self.triggers: Tuple[int, int] | None = None  # none: they are buttons
        if pedals:
            self.triggers = (BRAKE, GAS)
        elif RX in axes and RZ in axes:
            self.triggers = (Z, RZ)


class Gamepad(Device):
    """One gamepad. `wanted`: a path of /dev/input, or a part of its name; "" takes the first."""

    kind = "gamepad"

    def __init__(self, wanted: str = "") -> None:
        self._wanted = str(wanted)
        self._device: evdev.EventDevice | None = None
        self._pulled: FrozenSet[str] = frozenset()

    def open(self) -> Input:
        """Find it and read how it is held."""
        denied: List[str] = []
        pads = [found for found in evdev.devices(denied) if SOUTH in found.keys and X in found.axes]
        chosen = [pad for pad in pads if self._is_wanted(pad)]
        if not chosen:
            raise ConfigError(self._missing(pads, denied))
        try:
            return self.use(evdev.open_device(chosen[0]), chosen[0].axes)
        except OSError as error:
            raise ConfigError(f"gamepad {chosen[0].path}: {error.strerror}") from None

    def use(self, device: evdev.EventDevice, axes: FrozenSet[int]) -> Input:
        """Take `device`, which has `axes`, for the gamepad."""
        self._device, self._layout, self._pulled = device, Layout(axes), frozenset()
        return self._input(device.snapshot)

    def read(self, seconds: float) -> List[Input]:
        """Each report since the last call."""
        if self._device is None:
            raise OSError("the gamepad is not open")
        return [self._input(snapshot) for snapshot in self._device.read(seconds)]

    def close(self) -> None:
        """Let go of it."""
        device, self._device = self._device, None
        if device is not None:
            device.close()

    def _is_wanted(self, pad: evdev.Found) -> bool:
        if self._wanted.startswith("/"):
            return os.path.realpath(self._wanted) == os.path.realpath(pad.path)
        return self._wanted.lower() in pad.name.lower()

    def _missing(self, pads: List[evdev.Found], denied: List[str]) -> str:
        if pads:
            names = ", ".join(f"{pad.name} ({pad.path})" for pad in pads)
            return f"no gamepad is {self._wanted!r}; there is {names}"
        if denied:
            return f"no gamepad that this user may read ({', '.join(denied)} may not be): {UDEV}"
        return "no gamepad in /dev/input: plug it in, or pair it; `cat /proc/bus/input/devices` lists what there is"

    def _input(self, snapshot: evdev.Snapshot) -> Input:
        down = {BUTTONS[code] for code in snapshot.keys if code in BUTTONS}
        layout = self._layout
        if layout.triggers is not None:
            down -= {
                "left_trigger",
                "right_trigger",
            }  # by their way: makers differ in when they click
            for name, code in zip(("left_trigger", "right_trigger"), layout.triggers):
                way = (self._share(snapshot, code, -1.0) + 1.0) / 2.0
                if way > (RELEASE if name in self._pulled else PRESS):
                    down.add(name)
        self._pulled = frozenset(down)
        cross = [("left" in down) - ("right" in down), ("up" in down) - ("down" in down)]
        side = cross[0] - self._share(snapshot, HAT_X)
        ahead = cross[1] - self._share(snapshot, HAT_Y)
        turn = -self._share(snapshot, layout.right[0])
        turn += ("left_bumper" in down) - ("right_bumper" in down)
        axes = [
            -self._share(snapshot, Y),
            -self._share(snapshot, X),
            -self._share(snapshot, layout.right[1]),
            -side,  # tilting to the left is a negative turn around the way ahead
            ahead,
            turn,
        ]
        return Input(np.clip(np.array(axes, float), -1.0, 1.0), frozenset(down))

    def _share(self, snapshot: evdev.Snapshot, code: int, rest: float = 0.0) -> float:
        """Where an axis is, -1..1 of its range; `rest` where it has not said or does not exist."""
        low, high = self._device.ranges.get(code, (0, 0)) if self._device is not None else (0, 0)
        if code not in snapshot.axes or low >= high:
            return rest
        return 2.0 * (snapshot.axes[code] - low) / (high - low) - 1.0


class GamepadOperator(HandOperator):
    """Acts while a trigger is held.

    `device`: see `Gamepad`. `trigger`: right_trigger, left_trigger, or another button by name. A button's name with
    what it means, as in `north="none"`, changes that. The rest: see `HandOperator`.
    """

    def __init__(
        self,
        device: str | Device = "",
        trigger: str = "right_trigger",
        step_m: float = 0.02,
        step_rad: float = 0.1,
        dead_band: float = 0.12,
        curve: float = 0.5,
        view: int = 0,
        invert: str = "",
        silent_s: float = 0.0,
        **buttons: str,
    ) -> None:
        names = list(BUTTONS.values())
        for name in (trigger, *buttons):
            if name not in names:
                raise ValueError(f"{name!r} is neither an option nor a button: {', '.join(names)}")
        self._trigger = trigger
        meant: Dict[str, str] = {**DEFAULTS, **buttons, trigger: "none"}
        super().__init__(
            device if isinstance(device, Device) else Gamepad(device),
            *(meant, step_m, step_rad, dead_band, curve, view, invert, silent_s),
        )

    def _wants(self, given: Input, now: float) -> bool:
        return self._trigger in given.down
