"""A person at the keys of the terminal that the bridge runs in."""

from __future__ import annotations

import time
from typing import Dict, Tuple

import numpy as np

from robot_bridge.operator import STOP, Moment, Operator, action_of

MOVES: Dict[str, Tuple[int, int]] = {  # key: axis and sign
    **{"w": (0, 1), "s": (0, -1), "a": (1, 1), "d": (1, -1), "r": (2, 1), "f": (2, -1)},
    **{"q": (5, 1), "e": (5, -1)},
}
# A terminal repeats a held key every 30 ms or so, the first time after some 300 ms, and never says it was released.
HELD_S = 0.2


class KeyboardOperator(Operator):
    """Beside the keys that everybody has:

    space take over / give back; w s forward back; a d left right; r f up down; q e turn; g gripper

    `step_m`, `step_rad`: of a control step while a key is held, m and rad.
    """

    def __init__(self, step_m: float = 0.02, step_rad: float = 0.1) -> None:
        super().__init__()
        self._step_m, self._step_rad = float(step_m), float(step_rad)
        self._acting, self._gripper = False, 1.0
        self._pressed: dict[str, float] = {}
        self._said: list[str] = []

    def begin(self) -> None:
        """An episode starts: the policy's turn."""
        self._acting = False

    def act(self, moment: Moment) -> np.ndarray | None:
        """The motion of the keys held now."""
        if not self._acting:  # what the fingers hold is what the person begins with
            self._gripper = moment.gripper
        self._look()
        if not self._acting:
            return None
        axes = np.zeros(6)
        for key, when in self._pressed.items():
            if time.monotonic() - when < HELD_S:
                axis, sign = MOVES[key]
                axes[axis] += sign * (self._step_m if axis < 3 else self._step_rad)
        return action_of(axes, self._gripper, moment)

    def marks(self) -> list[str]:
        """What was said since the last call."""
        self._look()
        said, self._said = self._said, []
        if self._acting and self.terminal is not None and self.terminal.ended:
            self._acting = False
            said.append(f"{STOP}:the terminal has gone while a person acted")
        return said

    def reading(self) -> str:
        """The moving keys held now."""
        now = time.monotonic()
        held = [key for key, when in self._pressed.items() if now - when < HELD_S]
        return f"{'acting' if self._acting else 'policy'}  gripper {self._gripper:.0f}  keys {' '.join(held)}"

    def _look(self) -> None:
        if self.terminal is None:
            return
        for key in self.terminal.pressed():
            if key in self.terminal.keys:
                self._said.append(self.terminal.keys[key])
            elif key == " ":
                self._acting = not self._acting
            elif key == "g":
                self._gripper = 0.0 if self._gripper > 0.5 else 1.0
            elif key in MOVES:
                self._pressed[key] = time.monotonic()
