"""What a scene's things look like and weigh, in words that every simulator understands.

A task describes its things with these; a backend turns them into bodies of its own (MuJoCo's spec, a URDF file).
Nothing here or in a task imports a simulator.
"""

from __future__ import annotations

from typing import NamedTuple

Vector = tuple[float, float, float]


class Shape(NamedTuple):
    """One primitive of a thing, placed in the thing's frame."""

    name: str  # unique in the scene
    kind: str  # "box", "capsule", "cylinder" or "sphere"
    size: tuple[float, ...]  # m: half extents; radius and half length along z; the same; radius
    position: Vector = (0.0, 0.0, 0.0)  # m
    turn: Vector = (0.0, 0.0, 0.0)  # rotation vector, rad
    mass: float = 0.0  # kg; of a free thing at least one shape has some
    rgb: Vector = (0.5, 0.5, 0.5)
    friction: Vector = (1.0, 0.01, 0.0001)  # sliding, torsional, rolling, as in MuJoCo
    solid: bool = True  # False: it is seen and never touched


class Thing(NamedTuple):
    """A rigid body of a task.

    `free` things move as physics has it; the others stand where a reset puts them, and nothing moves them.
    """

    name: str  # also the key of its pose in a configuration: [x, y, yaw] in m and rad, or [x, y]
    shapes: tuple[Shape, ...]
    free: bool
    height: float = 0.0  # m, of its origin above the table at a reset
    colour_range: float = 0.1  # how far randomisation moves each of its colour channels
