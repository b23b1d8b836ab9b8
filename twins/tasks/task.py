"""The seam between an environment and a task: what a task sees and what it provides.

Arrays are NumPy's on the CPU and torch's on a GPU. A task's functions ask for the namespace,
`xp = array_api_compat.array_namespace(now.tcp)`, and keep to what both have, so that one source decides about
success in every simulator. They never write into what they get.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol

from array_api_compat import array_namespace, device

from twins.shapes import Thing, Vector
from twins.snapshot import ARM, GRIPPER, TABLE, Array, Snapshot

__all__ = [
    "ARM",
    "GRIPPER",
    "TABLE",
    "Array",
    "Box",
    "Finish",
    "Grasp",
    "Memory",
    "Snapshot",
    "Task",
    "constant",
    "down",
]


def constant(values: Any, like: Array) -> Array:
    """`values`, numbers in nested tuples, as an array of the kind, type and device of `like`; not to be written into.

    It is made once: bringing numbers to a GPU in every step would wait for it in every step.
    """
    return _made(values, array_namespace(like), like.dtype, device(like))


@functools.lru_cache(maxsize=1024)
def _made(values: Any, xp: Any, dtype: Any, place: Any) -> Array:
    return xp.asarray(values, dtype=dtype, device=place)


def down(like: Array) -> Array:
    """(3, 3), the hand's orientation at yaw 0: it points down and the fingers open along y."""
    return constant(((1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, -1.0)), like)


class Box(NamedTuple):
    """Where a thing may lie at a reset: ranges in m, m and rad."""

    x: tuple[float, float]
    y: tuple[float, float]
    yaw: tuple[float, float] = (0.0, 0.0)


class Grasp(NamedTuple):
    """How the hand, pointing down, holds the thing that it takes."""

    width: float  # m, between the fingertips while it is held
    position: Vector = (0.0, 0.0, 0.0)  # m, of the tcp in the thing's frame
    yaw: float = 0.0  # rad, of the hand in the thing's frame; the fingers open along the hand's y
    turns: int = (
        2  # at how many yaws of a full turn it is held just the same (a box: 2, a hexagon: 6)
    )


class Finish(NamedTuple):
    """Where the grasped thing is in the goal's frame when the task is done."""

    position: Vector  # m, of its origin
    spread: tuple[float, float] = (0.0, 0.0)  # m either way along the goal's x and y
    yaw: float = 0.0  # rad, of the thing in the goal's frame
    turns: int = 0  # at how many yaws of a full turn it may be there; 0: at any
    released: bool = True  # False: the hand keeps it (it is a tool)
    noise: float = 1.0  # the share of a job's execution noise under which it is still done


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
    term_names: tuple[str, ...]  # of `terms`
    regions: dict[str, dict[str, Box]]  # {"id": {thing: where}, "ood": ...}; all things in each
    grasped: str  # the thing that the hand takes
    goal: str  # the thing it is taken to
    grasp: Grasp  # these two place labelled scenes (`twins.labels`) and move demonstrations (`twins.retarget`)
    finish: Finish

    def fits(self, placement: dict[str, list[float]]) -> bool:
        """Whether things drawn independently ({thing: [x, y, yaw]}) may lie so together."""

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
