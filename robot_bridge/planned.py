"""The planned path: where the policy's newest chunk would lead the tool, for people to look at. Nothing moves by it."""

from __future__ import annotations

import logging
from typing import Any, Dict, List

import numpy as np

from robot_bridge.driver import Driver
from robot_bridge.safety import SafetyFilter

log = logging.getLogger(__name__)
MOST_POINTS, MOST_CAMERAS = 32, 4  # it rides on heartbeats, beside what must not wait
FARTHEST = 1e5  # pixels off an image


class PlannedPath:
    """Keeps what is told of the newest chunk. `told` is replaced as a whole, so any thread may read it."""

    def __init__(self, driver: Driver, safety: SafetyFilter) -> None:
        self._driver, self._safety = driver, safety
        self._failed = False
        self.told: Dict[str, Any] = {}

    def show(self, actions: np.ndarray) -> None:
        """The path of `actions` (n, 7) from the present commanded pose. An arm does not fail for want of a picture."""
        try:
            start = self._safety.target[:3].copy()
            points, causes = self._safety.preview(actions)
            points = _thinned(np.vstack([start, points]))
            if not np.isfinite(points).all():
                raise ValueError("the arm does not know where it is")
            pixels = self._driver.project(points)
        except Exception:
            if not self._failed:
                log.exception("the planned path is not shown")
            self._failed, self.told = True, {}
            return
        cameras = sorted(name for name in pixels if name in self._driver.cameras)
        self.told = {
            "points": np.round(points, 4).tolist(),
            "pixels": {name: _visible(pixels[name]) for name in cameras[:MOST_CAMERAS]},
            "causes": causes,
        }

    def clear(self) -> None:
        """Nothing is planned."""
        self.told = {}


def _thinned(points: np.ndarray) -> np.ndarray:
    """At most MOST_POINTS of `points`, the first and the last among them."""
    if len(points) <= MOST_POINTS:
        return points
    return points[np.linspace(0, len(points) - 1, MOST_POINTS).round().astype(int)]


def _visible(pixels: np.ndarray) -> List[List[float]]:
    """Those of `pixels` (n, 2) that a line can be drawn through."""
    near = np.isfinite(pixels).all(axis=1) & (np.abs(np.nan_to_num(pixels)) < FARTHEST).all(axis=1)
    return np.round(pixels[near], 1).tolist()
