"""Put the hexagonal prism into the hexagonal hole.

0.75 mm of clearance on each side, 1.5 mm in all: 50 mm across the flats in a hole of 51.5 mm.
"""

from __future__ import annotations

import math

from twins.shapes import Shape, Thing
from twins.tasks.insertion import SMOOTH, Insertion, regions
from twins.tasks.task import Finish, Grasp

FLATS, HEIGHT, MASS = 0.05, 0.064, 0.12  # m between opposite sides, m, kg
CLEARANCE = 0.00075  # m, on each side
RIM, WALL = 0.03, 0.014  # m, the socket's height and the thickness of its walls
SIDE = FLATS / math.sqrt(3.0)  # m, a hexagon's side
# Of the sides' normals; two are the y axis, along which the fingers open.
ANGLES = tuple((i + 0.5) * math.pi / 3 for i in range(6))


def _prism() -> Thing:
    # Three boxes, each between two opposite sides, make exactly a hexagon. One is a little higher than the others,
    # so that the block stands on four contacts instead of twelve.
    boxes = tuple(
        Shape(
            f"block_{i}",
            "box",
            (FLATS / 2, SIDE / 2, HEIGHT / 2 - (0.0005 if i else 0.0)),
            turn=(0.0, 0.0, ANGLES[i]),
            mass=MASS / 3,
            rgb=(0.9, 0.35, 0.08),
            friction=SMOOTH,
        )
        for i in range(3)
    )
    return Thing("block", boxes, free=True, height=HEIGHT / 2, colour_range=0.08)


def _socket() -> Thing:
    inner = FLATS / 2 + CLEARANCE
    length = (inner + WALL) / math.sqrt(
        3.0
    )  # half of the outer side; outside the hole walls overlap
    walls = tuple(
        Shape(
            f"socket_{i}",
            "box",
            (WALL / 2, length, RIM / 2),
            position=(
                (inner + WALL / 2) * math.cos(ANGLES[i]),
                (inner + WALL / 2) * math.sin(ANGLES[i]),
                RIM / 2,
            ),
            turn=(0.0, 0.0, ANGLES[i]),
            rgb=(0.75, 0.8, 0.85),
            friction=SMOOTH,
        )
        for i in range(6)
    )
    floor = Shape(
        "socket_floor",
        "cylinder",
        (inner, 0.0005),
        position=(0.0, 0.0, 0.0005),
        rgb=(0.08, 0.08, 0.12),
        solid=False,
    )
    return Thing("socket", (*walls, floor), free=False, colour_range=0.1)


class InsertHexagonBlock(Insertion):
    """Reward 1 when the hexagonal block stands in its hole and the gripper has let go of it."""

    name = "insert-hexagon-block"
    instructions = (
        "insert the hexagonal block into the hole",
        "put the hexagon into the hexagonal hole",
        "fit the hexagonal prism into its socket",
    )
    things = (_prism(), _socket())
    grasp = Grasp(width=FLATS, position=(0.0, 0.0, 0.015), turns=6)
    finish = Finish(position=(0.0, 0.0, HEIGHT / 2), turns=6, noise=0.2)
    either_way_up, radius, rim = True, SIDE, RIM
    regions = regions(math.pi / 6, math.pi / 6)
