"""The seam between an environment and a task: what a task sees and what it provides.

Arrays are NumPy's on the CPU and torch's on a GPU. A task's functions ask for the namespace,
`xp = array_api_compat.array_namespace(now.tcp)`, and keep to what both have, so that one source decides about
success in every simulator. They never write into what they get.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

from twins.shapes import Thing

Array = Any  # numpy.ndarray or torch.Tensor
GRIPPER, ARM, TABLE = "gripper", "arm", "table"  # parts that a contact pair may name beside things


class Snapshot(NamedTuple):
    """The true state of n simulations. Positions in m in the robot base frame, velocities in m/s and rad/s."""

    tcp: Array  # (n, 3)
    tcp_turn: Array  # (n, 3, 3)
    width: Array  # (n,) distance between the fingertips, 0 .. 0.08 m
    position: dict[str, Array]  # {thing: (n, 3)}, of all things
    turn: dict[str, Array]  # {thing: (n, 3, 3)}, of all things
    velocity: dict[str, Array]  # {thing: (n, 6)} linear, angular; of free things
    contact: dict[tuple[str, str], Array]  # {pair: (n,) bool} of the task's `contacts`
    memory: dict[str, Array]  # {name: (n, ...)}, what the task remembers of the episode


class Memory(NamedTuple):
    """Something a task remembers from step to step; zeros at a reset."""

    shape: tuple[int, ...]
    dtype: str = "float32"


class Task(Protocol):
    """Things, reward, success, reset distribution and instruction of one task."""

    name: str
    instructions: tuple[str, ...]  # the first is the default, the others say the same
    max_steps: int
    things: tuple[Thing, ...]
    contacts: tuple[tuple[str, str], ...]  # pairs of things, or of a thing and GRIPPER, ARM, TABLE
    memory: dict[str, Memory]
    privileged_names: tuple[str, ...]
    randomisation: dict[str, float]  # scale of a change at "full", where it is not 1
    grasped: str  # the thing that the hand takes
    goal: str  # the thing it is taken to

    def draw(self, rng: np.random.Generator, region: str) -> dict[str, Any]:
        """Where things lie at a reset from `region` ("id", "ood"): {thing: [x, y, yaw] or [x, y]}."""

    def remember(self, now: Snapshot) -> dict[str, Array]:
        """What to remember after a step, by name; `now.memory` holds what was remembered before it."""

    def hidden(self, memory: dict[str, Array]) -> dict[str, Array]:
        """{shape name: (n,) bool}: shapes that are gone from sight (a wiped mark)."""

    def success(self, now: Snapshot, gripper: Array) -> Array:
        """(n,) bool; `gripper` (n,) is the last commanded opening, 0 to 1."""

    def lost(self, now: Snapshot) -> Array:
        """(n,) bool: the episode can no longer succeed."""

    def terms(self, now: Snapshot, gripper: Array) -> dict[str, Array]:
        """Dense reward terms by name, each (n,) in [0, 1]; a job that wants them gives them weights."""

    def privileged(self, now: Snapshot) -> Array:
        """(n, P) float32, what a critic or the labels of a pose head may know."""

    def expert(self, now: Snapshot, target: Array, target_turn: Array) -> Array:
        """(n, 7) the expert's actions, unclipped, given the commanded target poses (n, 3) and (n, 3, 3).

        A function of the present state and memory only, so that it takes over from a policy at any step.
        """
