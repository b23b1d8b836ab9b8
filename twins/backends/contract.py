"""What a simulator provides so that `TwinEnv` can play a task in it.

The environment owns everything that is not physics or images: configurations, the commanded pose and inverse
kinematics, latency, noise, observation, reward, success, time limit, recovery. So a backend is thin, and the same
task code decides in every simulator.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

from twins.snapshot import Snapshot


class Capabilities(NamedTuple):
    """What a simulator can do; tests and docs say what follows from a False."""

    repeatable: bool  # a configuration and the same actions give the same states, bit for bit
    physics_draw: bool  # friction, mass and servo strength differ between simulations
    looks_draw: bool  # colours, light and camera poses differ between simulations
    contact_pairs: bool  # contacts by pair; otherwise only with the gripper, the rest from poses


class SimulationLost(RuntimeError):
    """The simulator's process died or its state was lost; every episode in it is void. The next reset revives it."""


class Simulation(Protocol):
    """N copies of a task's scene. `ids` (n,) int says which are meant; arrays are NumPy's."""

    count: int
    cameras: tuple[str, ...]
    image_size: int  # pixels, height and width
    capabilities: Capabilities

    def configure(self, ids: np.ndarray, configurations: list[dict[str, Any]]) -> None:
        """Put simulations `ids` into the states of their configurations, with their draws' parameters and looks.

        A configuration holds `joints` (7,) rad off HOME, a pose for each thing, and `draw` (`twins.randomise`).
        """

    def step(self, ids: np.ndarray, path: np.ndarray, gripper: np.ndarray) -> None:
        """One control step of `ids` along joint set-points (n, K, 7) rad, each for a K-th of it, to gripper openings (n,), 0 to 1.

        A simulation that diverges must not disturb the others; its snapshot shows it (not finite, or absurd).
        """

    def snapshot(self, ids: np.ndarray) -> Snapshot:
        """The true state of simulations `ids`, `memory` empty."""

    def joints(self, ids: np.ndarray) -> np.ndarray:
        """(n, 7) measured joint angles, rad."""

    def hide(self, ids: np.ndarray, hidden: dict[str, np.ndarray]) -> None:
        """{shape name: (n,) bool}: shapes of `ids` that images no longer show, or show again."""

    def images(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Images {camera: (n, H, W, 3) uint8} of the present state of simulations `ids`."""

    def close(self) -> None:
        """Free what is held."""
