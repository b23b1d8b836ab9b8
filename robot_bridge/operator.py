"""The Operator seam: who takes over from the policy. One file for each kind in `robot_bridge.operators`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from robot_bridge.driver import Driver
from robot_bridge.motion import DOWN, exp
from robot_bridge.registry import find
from robot_bridge.terminal import Terminal
from robot_bridge.watchdog import Ruling
from twinrl.core.errors import ConfigError

OPERATORS = {
    "none": "robot_bridge.operator:Operator",
    "scripted": "robot_bridge.operators.scripted:ScriptedOperator",
    "keyboard": "robot_bridge.operators.keyboard:KeyboardOperator",
    "spacemouse": "robot_bridge.operators.spacemouse:SpaceMouseOperator",
    "gamepad": "robot_bridge.operators.gamepad:GamepadOperator",
    "lerobot": "robot_bridge.drivers.lerobot_teleop:LeRobotOperator",
}
ENTRY_POINTS = "twinrl.operators"
STOP = "stop"  # a mark, and with a reason after a colon: the arm stops, latched


class Moment(NamedTuple):
    """What an operator sees before each control step."""

    step: int  # control steps since the reset
    tool: np.ndarray  # (3,) m, measured
    driver: Driver
    commanded: np.ndarray  # (6,) the pose that an action adds to
    gripper: float = 1.0  # the commanded opening, 0..1


class Operator:
    """Nobody: the policy acts always. Base of the others.

    `marks` are what a person says beside moving: those of `robot_bridge.terminal`, whoever operates, and `stop`.
    A person whose device is gone must not be mistaken for one who gives back: say `stop` and why.
    """

    def __init__(self) -> None:
        self.terminal: Terminal | None = None  # where a person can press keys

    def begin(self) -> None:
        """An episode starts."""

    def act(self, moment: Moment) -> np.ndarray | None:
        """The person's action (7,) float32, or None to let the policy act. Asked before each control step."""
        return None

    def notice(self, ruling: Ruling) -> None:
        """Whether the arm may move, looked at again and again."""

    def marks(self) -> list[str]:
        """What was said since the last call."""
        return self.terminal.said() if self.terminal is not None else []

    def reading(self) -> str:
        """What the device says at this moment, for a person who checks it; "" where there is none."""
        return ""

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.terminal is not None:
            self.terminal.close()


def action_of(axes: np.ndarray, gripper: float, moment: Moment) -> np.ndarray:
    """The action (7,) float32 of a motion (6,) in the base frame, m and rad, in the frame that the driver wants."""
    move, turn = axes[:3], axes[3:]
    if moment.driver.frame == "tool":
        facing = exp(moment.commanded[3:]) @ DOWN
        move, turn = facing.T @ move, facing.T @ turn
    return np.array([*move, *turn, gripper], np.float32)


def make_operator(kind: str, **options: Any) -> Operator:
    """The operator called `kind`, built in or the entry point of another package. ConfigError with the cure where its
    device or library is missing."""
    factory = find("operator", kind, OPERATORS, ENTRY_POINTS)
    try:
        return factory(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"operator {kind!r}: {error}") from None
