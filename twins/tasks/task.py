"""The seam between an environment and a task: what a task sees and what it provides."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import mujoco
import numpy as np


class Snapshot(NamedTuple):
    """The true state of n simulations. Positions in m in the robot base frame, velocities in m/s and rad/s."""

    tcp: np.ndarray  # (n, 3)
    tcp_turn: np.ndarray  # (n, 3, 3)
    width: np.ndarray  # (n,) distance between the fingertips, 0 .. 0.08 m
    object: np.ndarray  # (n, 3)
    object_turn: np.ndarray  # (n, 3, 3)
    velocity: np.ndarray  # (n, 6) of the object: linear, angular
    basket: np.ndarray  # (n, 3) centre of its floor
    touching: np.ndarray  # (n,) bool, the gripper touches the object

    @property
    def yaw(self) -> np.ndarray:
        """(n,) the direction of the object's long axis over the table, rad."""
        return np.arctan2(self.object_turn[:, 1, 0], self.object_turn[:, 0, 0])


class Task(Protocol):
    """Reward, success, reset distribution and instruction of one task."""

    name: str
    instruction: str
    max_steps: int
    rest_height: float  # m, of the object's centre when it lies on the table
    privileged_names: tuple[str, ...]

    def add_objects(self, spec: mujoco.MjSpec) -> None:
        """Add the task's bodies: one free body "object" (the last joint) and one mocap body "basket"."""

    def draw(self, rng: np.random.Generator, region: str) -> dict[str, Any]:
        """Where things lie at a reset from `region`: {"object": [x, y, yaw], "basket": [x, y]}."""

    def success(self, now: Snapshot, gripper: np.ndarray) -> np.ndarray:
        """(n,) bool; `gripper` (n,) is the last commanded opening, 0 to 1."""

    def lost(self, now: Snapshot) -> np.ndarray:
        """(n,) bool: the episode can no longer succeed."""

    def privileged(self, now: Snapshot) -> np.ndarray:
        """(n, P) float32, what a critic or the labels of a pose head may know."""

    def expert(self, now: Snapshot, target: np.ndarray, target_turn: np.ndarray) -> np.ndarray:
        """(n, 7) the expert's actions, unclipped, given the commanded target poses (n, 3) and (n, 3, 3)."""
