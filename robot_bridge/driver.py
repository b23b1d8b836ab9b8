"""The Driver seam: how the bridge reaches an arm. One file for each arm in `robot_bridge.drivers`."""

from __future__ import annotations

import abc
import difflib
import importlib
from typing import Any, Dict, NamedTuple

import numpy as np

from robot_bridge.protocol import Features, Job
from twinrl.core.errors import ConfigError

Observation = Dict[str, np.ndarray]
BUILT_IN = {
    "sim": "robot_bridge.drivers.sim:SimDriver",
    "point": "robot_bridge.drivers.point:PointDriver",
}
ENTRY_POINTS = "twinrl.robots"


class Outcome(NamedTuple):
    """What the last commanded step led to."""

    reward: float = 0.0
    terminated: bool = False  # the task ended the episode
    truncated: bool = False  # a limit ended it; never both
    success: bool = False


class Driver(abc.ABC):
    """An arm with its cameras. The bridge calls everything from one thread, in this order:

    connect, then for each episode reset and for each control step read, command, judge; disconnect.
    """

    kind = ""
    state_names: tuple[str, ...] = ()  # each dimension of observation.state
    cameras: tuple[str, ...] = ()
    image_size = 0  # pixels, height = width
    reset_seconds = 5.0  # of the robot's time that a reset costs

    @property
    def features(self) -> Features:
        """What an observation consists of, for the comparison with the run."""
        return Features(len(self.state_names), self.cameras, self.image_size)

    @abc.abstractmethod
    def connect(self, job: Job) -> None:
        """Reach the arm; cameras deliver images of the job's size from here on."""

    @abc.abstractmethod
    def disconnect(self) -> None:
        """Leave the arm standing still. Called once, also after a failure."""

    @abc.abstractmethod
    def reset(self, configuration: dict[str, Any] | None, region: str) -> dict[str, Any]:
        """Bring arm and scene to `configuration` (None: draw one from `region`); what it is in the end."""

    @abc.abstractmethod
    def read(self) -> Observation:
        """observation.state (S,) float32 and observation.images.NAME (H, W, 3) uint8, as of now."""

    @abc.abstractmethod
    def command(self, action: np.ndarray) -> np.ndarray:
        """Begin one control step with `action` (7,) float32; what is executed, (7,) float32."""

    @abc.abstractmethod
    def judge(self) -> Outcome:
        """Reward and ending of the step that was commanded last."""

    @abc.abstractmethod
    def tool(self) -> np.ndarray:
        """The measured position of the tool centre point, (3,) m in the base frame."""

    def target(self) -> np.ndarray:
        """The commanded position that the next delta adds to, (3,) m."""
        return self.tool()

    def hold(self) -> None:  # noqa: B027 - an arm that only moves when commanded holds by itself
        """Stand still until the next command; called again and again while it lasts."""

    def expert(self, noise: float) -> np.ndarray:
        """A scripted expert's action (7,) float32, for a scripted operator."""
        raise ConfigError(
            f"robot {self.kind!r} has no scripted expert: use --operator keyboard or none"
        )


def make_driver(kind: str, **options: Any) -> Driver:
    """The driver called `kind`: built in, or the entry point of another package."""
    known: dict[str, Any] = {**_installed(), **BUILT_IN}
    if kind not in known:
        close = difflib.get_close_matches(kind, known, 1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"unknown robot {kind!r}, not one of {', '.join(sorted(known))}{hint}")
    found = known[kind]
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        factory = getattr(importlib.import_module(module), attribute)
    else:
        factory = found.load()
    try:
        return factory(**options)
    except TypeError as error:
        raise ConfigError(f"robot {kind!r}: {error}") from None


def _installed() -> dict[str, Any]:
    from importlib import metadata

    points: Any = metadata.entry_points()
    if hasattr(points, "select"):
        points = points.select(group=ENTRY_POINTS)
    else:  # Python 3.8 and 3.9
        points = points.get(ENTRY_POINTS, ())
    return {point.name: point for point in points}
