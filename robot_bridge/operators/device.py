"""The Device seam: what a person's hand is on. Below it one file for each; what it says is an `Input`."""

from __future__ import annotations

import abc
from typing import FrozenSet, List, NamedTuple

import numpy as np

AXES = ("x", "y", "z", "roll", "pitch", "yaw")
VIEWS = (0, 90, 180, 270)
REST = np.zeros(6)


class Input(NamedTuple):
    """What a device says at one moment, as whoever holds it sees it."""

    axes: np.ndarray  # (6,) -1..1: away from the person, to the left, up, and turns around these
    down: FrozenSet[str]  # names of the buttons that are held


class Device(abc.ABC):
    """A device in a person's hand. Used by one thread at a time."""

    kind = ""

    @abc.abstractmethod
    def open(self) -> Input:
        """Reach it; how it is held now. ConfigError with the cure where there is none, also later, when it is
        looked for again."""

    @abc.abstractmethod
    def read(self, seconds: float) -> List[Input]:
        """What it has said since the last call, oldest first; waits at most `seconds` for the first.

        OSError: it has gone.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of it. May be called twice."""


def shaped(axes: np.ndarray, dead_band: float, curve: float) -> np.ndarray:
    """Axes (6,) -1..1 without what is below `dead_band`; `curve` 0 is straight, 1 cubic: fine near the middle."""
    size = np.clip((np.abs(axes) - dead_band) / (1.0 - dead_band), 0.0, 1.0)
    return np.sign(axes) * ((1.0 - curve) * size + curve * size**3)


def signs(inverted: str) -> np.ndarray:
    """(6,) of 1, and -1 for the axes named in `inverted`, as in "x,yaw"."""
    found = np.ones(6)
    for name in filter(None, str(inverted).split(",")):
        if name not in AXES:
            raise ValueError(f"invert names {name!r}, not one of {', '.join(AXES)}")
        found[AXES.index(name)] = -1.0
    return found


def seen_from(axes: np.ndarray, view: int) -> np.ndarray:
    """Axes (6,) as a person says them, in the robot's base frame.

    `view`: where the person looks, degrees from the base's x counter-clockwise as seen from above. 0 stands behind
    the robot, 180 faces it.
    """
    if view not in VIEWS:
        raise ValueError(f"view is {view!r}, not one of {', '.join(map(str, VIEWS))}")
    quarters = VIEWS.index(view)
    turned = np.array(axes, float).reshape(2, 3)
    for _ in range(quarters):
        turned[:, 0], turned[:, 1] = -turned[:, 1], turned[:, 0].copy()
    return turned.reshape(6)
