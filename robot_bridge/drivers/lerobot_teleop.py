"""LeRobot's teleoperators, its own and those of packages `lerobot_teleoperator_*`, as an operator.

Those that give steps of the tool (`delta_x delta_y delta_z`, by choice `delta_wx delta_wy delta_wz` and `gripper`),
such as its gamepad. A leader arm gives joints of another arm: refused. Whether the person acts, and what the episode
was worth, comes from `get_teleop_events`, where the device has that; without, who moves it, acts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from robot_bridge.drivers.lerobot import make_device
from robot_bridge.operator import Moment, Operator
from twinrl.core.errors import ConfigError, TwinRLError

MOVES = ("delta_x", "delta_y", "delta_z")
TURNS = ("delta_wx", "delta_wy", "delta_wz")
CLOSE, STAY, OPEN = 0, 1, 2  # LeRobot's gripper actions
QUIET = 5  # control steps without motion after which a device without events has been let go of


class LeRobotOperator(Operator):
    """A person at a LeRobot teleoperator; the terminal's keys count as well."""

    def __init__(
        self, teleop: str = "", step_m: float = 0.02, step_rad: float = 0.1, **config: Any
    ) -> None:
        """`teleop`: its type's name. A delta of 1 is `step_m`, of a turn `step_rad`, in one control step."""
        super().__init__()
        if not teleop:
            raise ConfigError("operator 'lerobot' needs --operator-option teleop=TYPE")
        self._step_m, self._step_rad = float(step_m), float(step_rad)
        self._device = make_device("teleoperators", "Teleoperator", teleop, config)
        features = self._device.action_features
        names = features.get("names", features)
        if not all(name in names for name in MOVES):
            raise ConfigError(
                f"teleoperator {teleop!r} gives {', '.join(map(str, names))}, not {', '.join(MOVES)}: joints of "
                "a leader arm mean nothing to this one"
            )
        try:
            self._device.connect()
        except Exception as error:  # whatever a plug-in raises
            raise TwinRLError(f"teleoperator {teleop!r}: {error}") from None
        self._said: list[str] = []
        self.begin()

    def begin(self) -> None:
        """An episode starts: the policy's turn, fingers open."""
        self._gripper, self._quiet = 1.0, QUIET

    def act(self, moment: Moment) -> np.ndarray | None:
        """The device's action while the person intervenes."""
        try:
            given = self._device.get_action()
            events = self._events()
        except Exception as error:
            raise TwinRLError(f"the teleoperator has failed: {error}") from None
        action = np.zeros(7, np.float32)
        for names, first, step in ((MOVES, 0, self._step_m), (TURNS, 3, self._step_rad)):
            for k, name in enumerate(names):
                action[first + k] = step * float(given.get(name, 0.0))
        fingers = int(given.get("gripper", STAY))
        self._quiet = 0 if action.any() or fingers != STAY else self._quiet + 1
        if not events.get("is_intervention", self._quiet < QUIET):
            return None
        if fingers != STAY:
            self._gripper = 1.0 if fingers == OPEN else 0.0
        action[6] = self._gripper
        return action

    def marks(self) -> list[str]:
        """What was said at the device and at the keys."""
        said, self._said = self._said, []
        return said + super().marks()

    def close(self) -> None:
        """Let go of the device."""
        if self._device.is_connected:
            self._device.disconnect()
        super().close()

    def _events(self) -> dict[str, bool]:
        """By name, without LeRobot's own enumeration; endings are kept as marks."""
        ask = getattr(self._device, "get_teleop_events", None)
        if ask is None:
            return {}
        events = {str(getattr(key, "value", key)): bool(value) for key, value in ask().items()}
        if events.get("success"):
            self._said.append("success")
        elif events.get("rerecord_episode"):  # which also says that the episode ends
            self._said.append("discard")
        elif events.get("terminate_episode"):
            self._said.append("failure")
        return events
