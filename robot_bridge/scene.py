"""The person at the robot while no episode runs: places the scene, and can stop the arm on its way home."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from robot_bridge.terminal import KEYS
from twinrl.core.errors import ConfigError, DeadlineError, TwinRLError

LOOK = 0.05  # s between looks at the keys


class Stopped(TwinRLError):
    """The person at the robot pressed the stop key."""


class Person:
    """Asked at a terminal that somebody else opened and closes."""

    def __init__(self, terminal: Any) -> None:
        """`terminal` has `pressed`, as `robot_bridge.terminal.Terminal`; ConfigError for None."""
        if terminal is None:
            raise ConfigError(
                "nobody can be asked to place the scene, there is no terminal: run attach in one, or "
                "--robot-option scene=leave"
            )
        self._terminal = terminal

    def heed(self) -> None:
        """Stopped if the stop key was pressed since the last look; other keys mean nothing here."""
        if "estop" in (KEYS.get(key) for key in self._terminal.pressed()):
            raise Stopped("stopped by the person at the robot: attach again to go on")

    def ask(self, text: str, patience_s: float) -> None:
        """Until c is pressed. DeadlineError where nobody does within `patience_s`, Stopped after the stop key."""
        print(f"{text}\n  c: done    escape: stop    (within {patience_s:g} s)", file=sys.stderr)
        self._terminal.pressed()  # what was typed before the question is no answer
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            said = [KEYS.get(key) for key in self._terminal.pressed()]
            if "estop" in said:
                raise Stopped("stopped by the person at the robot: attach again to go on")
            if "confirm" in said:
                return
            time.sleep(LOOK)
        raise DeadlineError(f"nobody confirmed within {patience_s:g} s: {text}")


def describe(configuration: dict[str, Any] | None, region: str) -> str:
    """What the person is asked for."""
    if not configuration:
        return f"Place the scene as you like, within region {region!r}."
    wanted = json.dumps({k: _rounded(v) for k, v in configuration.items() if k != "region"})
    return f"Place the scene (region {region!r}; m and rad, base frame): {wanted}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value
