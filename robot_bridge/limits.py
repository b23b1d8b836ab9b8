"""What a command may ask of an arm: the safety filter's limits, from defaults, a file and the command line."""

from __future__ import annotations

import difflib
import math
from typing import Any, Iterable, Mapping, NamedTuple, Tuple

from twinrl.core.errors import ConfigError

Box = Tuple[Tuple[float, float, float], Tuple[float, float, float]]  # low and high corner, m
TABLE: Box = ((-2.0, -2.0, -2.0), (2.0, 2.0, 0.0))  # and all that is under it
UNITS = {"_m": "m", "_rad": "rad", "_s": "s", "_n": "N"}


class Limits(NamedTuple):
    """Positions in m in the robot's base frame, of the tool centre point. A filter keeps all of them at once."""

    step_m: float = 0.03  # longest translation in one control step
    step_rad: float = 0.15  # longest rotation in one control step
    speed: float = 0.25  # m/s
    acceleration: float = 10.0  # m/s^2
    jerk: float = 500.0  # m/s^3
    turn_speed: float = 1.5  # rad/s
    turn_acceleration: float = 60.0  # rad/s^2
    turn_jerk: float = 3000.0  # rad/s^3
    tilt_rad: float = 2.0  # farthest rotation from the tool pointing straight down
    lead_m: float = 0.1  # how far the commanded position may lead the measured one
    joint_margin_rad: float = 0.1  # from the end of a joint's range
    joint_speed: float = 2.0  # rad/s, measured
    force_n: float = 15.0  # at the tool; above it the arm backs off
    backoff_m: float = 0.02  # how far it goes back along its own path
    gripper_force_n: float = 30.0  # what a gripper may squeeze with, where its driver knows
    stale_s: float = 0.25  # a command older than this is refused
    workspace: Box = ((0.22, -0.45, 0.005), (0.81, 0.45, 0.55))
    keep_out: Tuple[Box, ...] = (TABLE,)  # the tool must not enter

    def checked(self) -> Limits:
        """Itself; ConfigError says which limit leaves no motion, or none that can be kept."""
        for name in NUMBERS:
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"limit {name} is {value!r}, must be a number above 0")
        if self.tilt_rad > 2.8:
            raise ConfigError(
                f"limit tilt_rad is {self.tilt_rad:g}: beyond 2.8 rad an orientation has no one way back"
            )
        for name, box in (("workspace", self.workspace), *(("keep_out", b) for b in self.keep_out)):
            _check_box(name, box)
        low, high = self.workspace
        for box in self.keep_out:
            if all(o <= i for o, i in zip(box[0], low)) and all(
                o >= i for o, i in zip(box[1], high)
            ):
                raise ConfigError(
                    f"keep_out {box} leaves nothing of the workspace {self.workspace}"
                )
        return self

    def unusual(self) -> dict[str, Any]:
        """Those that differ from the defaults: what a person should be told of."""
        usual = Limits()._asdict()
        return {name: value for name, value in self._asdict().items() if value != usual[name]}


NUMBERS = tuple(name for name, value in Limits()._asdict().items() if isinstance(value, float))


def make_limits(*settings: Mapping[str, Any]) -> Limits:
    """Limits from mappings, of which later ones overrule; ConfigError names an unknown one and the nearest.

    A workspace is six numbers, low and high corner; keep_out a list of such boxes.
    """
    found: dict[str, Any] = {}
    for mapping in settings:
        for name, value in mapping.items():
            if name not in Limits._fields:
                close = difflib.get_close_matches(name, Limits._fields, 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                known = ", ".join(Limits._fields)
                raise ConfigError(f"no limit is called {name!r}, only {known}{hint}")
            found[name] = _value(name, value)
    return Limits(**found).checked()


def _value(name: str, value: Any) -> Any:
    try:
        if name == "workspace":
            return _box(value)
        if name == "keep_out":
            return tuple(_box(box) for box in value)
        return float(value)
    except (TypeError, ValueError):
        shape = {"workspace": "six numbers", "keep_out": "a list of six numbers each"}
        text = shape.get(name, "a number")
        raise ConfigError(f"limit {name} is {value!r}, must be {text}") from None


def _box(value: Any) -> Box:
    numbers = [float(n) for n in _flat(value)]
    if len(numbers) != 6:
        raise ValueError(value)
    return (numbers[0], numbers[1], numbers[2]), (numbers[3], numbers[4], numbers[5])


def _flat(value: Any) -> Iterable[Any]:
    for item in value:
        if isinstance(item, (list, tuple)):
            yield from item
        else:
            yield item


def _check_box(name: str, box: Box) -> None:
    if not all(math.isfinite(n) for corner in box for n in corner):
        raise ConfigError(f"{name} {box} has corners that are no numbers")
    if not all(low < high for low, high in zip(*box)):
        raise ConfigError(f"{name} {box} has no inside: its first corner is the low one")
