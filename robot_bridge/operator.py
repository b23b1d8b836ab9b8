"""Who takes over from the policy: a person at the keyboard, a script, or nobody."""

from __future__ import annotations

import select
import sys
import time
from typing import Any, NamedTuple

import numpy as np

from robot_bridge.driver import Driver
from twinrl.core.errors import ConfigError


class Moment(NamedTuple):
    """What an operator sees before each control step."""

    step: int  # control steps since the reset
    tool: np.ndarray  # (3,) m
    driver: Driver


class Operator:
    """Nobody: the policy acts always. Base of the others.

    `marks` are what a person says beside moving: "stop" (latched), "rearm", "success", "failure", "discard".
    """

    def begin(self) -> None:
        """An episode starts."""

    def act(self, moment: Moment) -> np.ndarray | None:
        """The person's action (7,) float32, or None to let the policy act."""
        return None

    def marks(self) -> list[str]:
        """What was said since the last call."""
        return []

    def close(self) -> None:
        """Leave the terminal as it was."""


class ScriptedOperator(Operator):
    """Takes over with the driver's expert when an episode is slow or the arm is stuck, until the episode ends.

    `slow_after`: control steps without success before the operator steps in. `stuck_after`: steps in which the
    tool moved less than `stuck_m` metres in all. `at_most`: takeovers in one run of the bridge. `noise`: share of
    the step limits by which the expert's hand trembles.
    """

    def __init__(
        self,
        slow_after: int = 40,
        stuck_after: int = 12,
        stuck_m: float = 0.01,
        at_most: int = 30,
        noise: float = 0.0,
    ) -> None:
        self.slow_after, self.stuck_after, self.stuck_m = (
            int(slow_after),
            int(stuck_after),
            float(stuck_m),
        )
        self.at_most, self.noise = int(at_most), float(noise)
        self.takeovers = 0
        self.begin()

    def begin(self) -> None:
        """An episode starts: the policy's turn."""
        self._acting = False
        self._path: list[np.ndarray] = []

    def act(self, moment: Moment) -> np.ndarray | None:
        """The expert's action once it has taken over."""
        self._path.append(np.asarray(moment.tool))
        if not self._acting and self.takeovers < self.at_most and self._is_needed(moment.step):
            self._acting = True
            self.takeovers += 1
        return moment.driver.expert(self.noise) if self._acting else None

    def _is_needed(self, step: int) -> bool:
        if step >= self.slow_after:
            return True
        recent = np.array(self._path[-self.stuck_after - 1 :])
        if len(recent) <= self.stuck_after:
            return False
        return bool(np.linalg.norm(recent - recent[0], axis=1).max() < self.stuck_m)


class KeyboardOperator(Operator):
    """A person at the bridge's terminal.

    space take over / give back; w s forward back; a d left right; r f up down; q e turn; g gripper;
    enter success; backspace failure; x discard the episode; esc stop; u release the stop.
    """

    MOVES: dict[str, Any] = {  # noqa: RUF012
        **{"w": (0, 1), "s": (0, -1), "a": (1, 1), "d": (1, -1), "r": (2, 1), "f": (2, -1)},
        **{"q": (5, 1), "e": (5, -1)},
    }
    MARKS: dict[str, str] = {  # noqa: RUF012
        **{"\n": "success", "\r": "success", "\x7f": "failure", "x": "discard", "\x1b": "stop"},
        **{"u": "rearm"},
    }

    def __init__(self, step_m: float = 0.02, step_rad: float = 0.15, stream: Any = None) -> None:
        import termios
        import tty

        self._stream = stream or sys.stdin
        if not self._stream.isatty():
            raise ConfigError(
                "--operator keyboard needs a terminal: run attach in one, or --operator none"
            )
        self._step_m, self._step_rad = float(step_m), float(step_rad)
        self._before = termios.tcgetattr(self._stream)
        tty.setcbreak(self._stream.fileno())
        self._acting, self._gripper = False, 1.0
        self._pressed: dict[str, float] = {}
        self._said: list[str] = []

    def begin(self) -> None:
        """An episode starts: the policy's turn."""
        self._acting, self._gripper = False, 1.0

    def act(self, moment: Moment) -> np.ndarray | None:
        """The motion of the keys held now."""
        self._look()
        if not self._acting:
            return None
        action = np.zeros(7, np.float32)
        action[6] = self._gripper
        for key, when in self._pressed.items():
            # A terminal repeats a held key every 30 ms or so and never says that it was released.
            if time.monotonic() - when < 0.2:
                axis, sign = self.MOVES[key]
                action[axis] += sign * (self._step_m if axis < 3 else self._step_rad)
        return action

    def marks(self) -> list[str]:
        """What was said since the last call."""
        self._look()
        said, self._said = self._said, []
        return said

    def close(self) -> None:
        """Give the terminal back."""
        import termios

        termios.tcsetattr(self._stream, termios.TCSADRAIN, self._before)

    def _look(self) -> None:
        while select.select([self._stream], [], [], 0)[0]:
            key = self._stream.read(1)
            if not key:
                return
            if key == " ":
                self._acting = not self._acting
            elif key == "g":
                self._gripper = 1.0 - self._gripper
            elif key in self.MOVES:
                self._pressed[key] = time.monotonic()
            elif key in self.MARKS:
                self._said.append(self.MARKS[key])


OPERATORS = {"none": Operator, "scripted": ScriptedOperator, "keyboard": KeyboardOperator}


def make_operator(kind: str, **options: Any) -> Operator:
    """The operator called `kind`."""
    if kind not in OPERATORS:
        raise ConfigError(f"operator {kind!r} is none of {', '.join(OPERATORS)}")
    try:
        return OPERATORS[kind](**options)
    except TypeError as error:
        raise ConfigError(f"operator {kind!r}: {error}") from None
