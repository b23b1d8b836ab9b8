"""Put the block of three columns into its three sockets.

0.75 mm of clearance on each side, 1.5 mm in all: columns 22 mm thick in square holes of 23.5 mm.
"""

from __future__ import annotations

from twins.shapes import Shape, Thing
from twins.tasks.insertion import SMOOTH, Insertion, regions
from twins.tasks.task import Finish, Grasp

RADIUS, LENGTH, SPACING = 0.011, 0.046, 0.036  # m, of a column, and between two columns' axes
BRIDGE = (0.047, 0.013, 0.012)  # m, half extents of what joins the columns
COLUMN_MASS, BRIDGE_MASS = 0.035, 0.045  # kg
CLEARANCE = 0.00075  # m, on each side
RIM, WALL = 0.03, 0.014  # m, the socket's height and the thickness of its outer walls


def _block() -> Thing:
    # Its origin is where columns and bridge meet.
    bridge = Shape(
        "block_bridge",
        "box",
        BRIDGE,
        position=(0.0, 0.0, BRIDGE[2]),
        mass=BRIDGE_MASS,
        rgb=(0.2, 0.62, 0.25),
        friction=SMOOTH,
    )
    # The middle column is a little shorter, so that the block stands on the outer ones.
    columns = tuple(
        Shape(
            f"block_column_{i}",
            "cylinder",
            (RADIUS, (LENGTH - short) / 2),
            position=((i - 1) * SPACING, 0.0, -(LENGTH - short) / 2),
            mass=COLUMN_MASS,
            rgb=(0.2, 0.62, 0.25),
            friction=SMOOTH,
        )
        for i, short in enumerate((0.0, 0.0005, 0.0))
    )
    return Thing("block", (bridge, *columns), free=True, height=LENGTH, colour_range=0.08)


def _socket() -> Thing:
    hole = RADIUS + CLEARANCE  # half of a hole's width
    between = SPACING / 2 - hole  # half of what is left between two holes
    end = SPACING + hole  # where the outer walls begin
    height = RIM / 2
    boxes = [
        ((end + WALL, WALL / 2, height), (0.0, hole + WALL / 2)),
        ((end + WALL, WALL / 2, height), (0.0, -hole - WALL / 2)),
        ((WALL / 2, hole, height), (end + WALL / 2, 0.0)),
        ((WALL / 2, hole, height), (-end - WALL / 2, 0.0)),
        ((between, hole, height), (SPACING / 2, 0.0)),
        ((between, hole, height), (-SPACING / 2, 0.0)),
    ]
    walls = tuple(
        Shape(
            f"socket_{i}",
            "box",
            size,
            position=(x, y, height),
            rgb=(0.75, 0.8, 0.85),
            friction=SMOOTH,
        )
        for i, (size, (x, y)) in enumerate(boxes)
    )
    floor = Shape(
        "socket_floor",
        "box",
        (end, hole, 0.0005),
        position=(0.0, 0.0, 0.0005),
        rgb=(0.08, 0.08, 0.12),
        solid=False,
    )
    return Thing("socket", (*walls, floor), free=False, colour_range=0.1)


class InsertTripleColumnBlock(Insertion):
    """Reward 1 when the three columns stand in their sockets and the gripper has let go of the block."""

    name = "insert-triple-column-block"
    instructions = (
        "insert the three columns into the sockets",
        "put the block with three columns into its base",
        "plug the triple column block in",
    )
    things = (_block(), _socket())
    grasp = Grasp(width=2 * BRIDGE[1], position=(0.0, 0.0, BRIDGE[2]), turns=2)
    finish = Finish(position=(0.0, 0.0, LENGTH), turns=2, noise=0.2)
    either_way_up, radius, rim = False, BRIDGE[0], RIM
    regions = regions(0.8, 0.6)
