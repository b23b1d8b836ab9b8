"""Wipe a stroke of ink off a whiteboard with an eraser.

Ink is counted by cell: a cell is gone once the felt, lying flat on the board, has slid over it far enough. What the
felt has done to each cell is the task's memory, so the expert is a function of the present state and that memory.
"""

from __future__ import annotations

import math

from array_api_compat import array_namespace

from twins import rotation
from twins.shapes import Shape, Thing
from twins.tasks.task import GRIPPER, Array, Box, Finish, Grasp, Memory, Snapshot, constant, down

BOARD = (0.085, 0.13, 0.005)  # m, half extents
ERASER = (0.05, 0.025, 0.02)  # m, half extents of felt, body and handle together
FELT, BODY = 0.006, 0.012  # m, thickness
HANDLE = (0.04, 0.014)  # m, half extents: the body's shoulders take the pressure of the fingertips
ERASER_MASS = 0.08  # kg
SLIPPERY = (0.3, 0.01, 0.0001)  # felt on the board
CELLS, CELL = 20, (0.0104, 0.004)  # how many, and half extents along x and y of the first: m
ARC_RADIUS, ARC = 0.13, 0.6  # m and rad either way: the stroke is a bow, 16 cm long
STROKE = ARC_RADIUS * math.sin(ARC)  # m, half its length from end to end
INK_THICKNESS = 0.0008  # m

ERASER_X, ERASER_Y, ERASER_YAW = (0.36, 0.47), (0.06, 0.25), 0.8  # where it starts: m, m, rad
BOARD_X, BOARD_Y, BOARD_YAW = (0.57, 0.62), (-0.06, 0.06), 0.25
INK_X, INK_Y, INK_YAW = (0.53, 0.66), (-0.12, 0.12), 0.4
CLEAR = 0.065  # m, from the eraser's middle to the board at a reset
MARGIN = 0.004  # m of white around the ink at least

FLAT = 0.0025  # m, how far each corner of the felt may be off the board
RUB = 0.01  # m that the felt slides over a cell before its ink is gone
LEAP = 0.06  # m in one step; who was here before it and is there after it may have hopped
# One cell of twenty may stay: a smear of a pixel that the 64 px cameras do not resolve, and no judge would see. A
# second cell would leave a visible mark.
ENOUGH = 0.95  # of the ink's area

TIPPED = 0.5  # cosine of the tilt beyond which it falls on its side, where a hand from above finds no hold
HELD_WIDTH = (0.018, 0.038)  # m, how far the fingers stand apart with the eraser between them
HELD_REACH = 0.03  # m, between tcp and eraser
GRIP = 0.011  # m, the tcp above the eraser's middle: the fingertips stay clear of the shoulders
HOVER, CARRY = 0.08, 0.05  # m: of the open hand over the eraser, of the eraser over the board
PRESS = 0.004  # m by which the commanded pose leads into the board: some 20 N
SWEEP = 0.02  # m that the commanded pose leads along the stroke at most
OUTSIDE = 0.012  # m beyond the stroke's end where the felt comes down, and where a sweep ends
TOUCH, RUBS = ("eraser", GRIPPER), ("eraser", "board")


def _eraser() -> Thing:
    length, width, height = ERASER
    layers = (
        ("felt", (length, width), FELT, (0.16, 0.16, 0.17), 0.2),
        ("body", (length, width), BODY, (0.1, 0.3, 0.8), 0.5),
        ("handle", HANDLE, 2 * height - FELT - BODY, (0.1, 0.3, 0.8), 0.3),
    )
    shapes, bottom = [], -height
    for name, sides, thickness, rgb, share in layers:
        shapes.append(
            Shape(
                f"eraser_{name}",
                "box",
                (*sides, thickness / 2),
                position=(0.0, 0.0, bottom + thickness / 2),
                mass=share * ERASER_MASS,
                rgb=rgb,
                friction=SLIPPERY if name == "felt" else Shape._field_defaults["friction"],
            )
        )
        bottom += thickness
    return Thing("eraser", tuple(shapes), free=True, height=height, colour_range=0.08)


def _board() -> Thing:
    plate = Shape("board", "box", BOARD, rgb=(0.96, 0.96, 0.97), friction=SLIPPERY)
    return Thing("board", (plate,), free=False, height=BOARD[2], colour_range=0.03)


def _places() -> tuple[tuple[float, float, float], ...]:
    """(x, y, yaw) of each cell in the ink's frame: a bow about the origin, its chord along y."""
    middle = ARC_RADIUS * (1.0 + math.cos(ARC)) / 2
    places = []
    for i in range(CELLS):
        angle = ARC * (2 * i + 1 - CELLS) / CELLS
        x, y = ARC_RADIUS * math.cos(angle) - middle, ARC_RADIUS * math.sin(angle)
        places.append((x, y, angle))
    return tuple(places)


PLACES = _places()
CELL_RADIUS = math.hypot(*CELL)
# A cell counts as covered where all of it is: its middle is this far inside the felt.
COVER = (ERASER[0] - CELL_RADIUS, ERASER[1] - CELL_RADIUS)


def _ink() -> Thing:
    shapes = tuple(
        Shape(
            f"ink_{i}",
            "box",
            (*CELL, INK_THICKNESS / 2),
            position=(x, y, 0.0),
            turn=(0.0, 0.0, yaw),
            rgb=(0.05, 0.06, 0.2),
            solid=False,
        )
        for i, (x, y, yaw) in enumerate(PLACES)
    )
    height = 2 * BOARD[2] + INK_THICKNESS / 2
    return Thing("ink", shapes, free=False, height=height, colour_range=0.05)


class EraseWhiteboard:
    """Reward 1 when the ink has been wiped off the board."""

    name = "erase-whiteboard"
    instructions = (
        "erase the whiteboard",
        "wipe the ink off the whiteboard with the eraser",
        "pick up the eraser and clean the whiteboard",
    )
    max_steps = 120
    things = (_eraser(), _board(), _ink())
    grasped, goal = "eraser", "ink"
    grasp = Grasp(width=2 * HANDLE[1], position=(0.0, 0.0, GRIP))
    finish = Finish(
        position=(0.0, 0.0, ERASER[2]), spread=(0.01, 0.08), yaw=0.0, turns=2, released=False
    )
    contacts = (TOUCH, RUBS)
    memory = {  # noqa: RUF012
        "slid": Memory((CELLS,)),  # m that the felt has slid over each cell
        "under": Memory((CELLS, 2)),  # m, where each cell was in the eraser's frame
        "pressed": Memory((), "bool"),  # whether the felt lay on the board
    }
    randomisation: dict[str, float] = {}  # noqa: RUF012
    term_names = ("reach", "grasp", "approach", "wiped")
    regions = {  # noqa: RUF012
        name: {
            "eraser": Box(ERASER_X, side, (-ERASER_YAW, ERASER_YAW)),
            "board": Box(BOARD_X, BOARD_Y, (-BOARD_YAW, BOARD_YAW)),
            "ink": Box(INK_X, INK_Y, (-INK_YAW, INK_YAW)),
        }
        for name, side in (("id", (-ERASER_Y[1], -ERASER_Y[0])), ("ood", ERASER_Y))
    }
    privileged_names = (
        *("eraser_x", "eraser_y", "eraser_z", "eraser_sin_2yaw", "eraser_cos_2yaw"),
        *("board_x", "board_y", "board_sin_yaw", "board_cos_yaw"),
        *("ink_x", "ink_y", "ink_sin_yaw", "ink_cos_yaw"),
        *("held", "pressed", "wiped"),
        *("eraser_vx", "eraser_vy", "eraser_vz"),
        *("eraser_from_tcp_x", "eraser_from_tcp_y", "eraser_from_tcp_z"),
        *("mark_from_eraser_x", "mark_from_eraser_y"),  # the nearest cell that still has ink
    )

    def fits(self, placement: dict[str, list[float]]) -> bool:
        """The ink is on the board, and the eraser lies beside it."""
        x, y, yaw = placement["ink"]
        sin, cos = math.sin(yaw), math.cos(yaw)
        for u, v, _ in (PLACES[0], PLACES[CELLS // 2], PLACES[-1]):
            across, along = _beyond(
                placement["board"], x + cos * u - sin * v, y + sin * u + cos * v
            )
            if max(across, along) > -CELL_RADIUS - MARGIN:
                return False
        across, along = _beyond(placement["board"], *placement["eraser"][:2])
        return math.hypot(max(across, 0.0), max(along, 0.0)) > CLEAR

    def remember(self, now: Snapshot) -> dict[str, Array]:
        """How far the felt has slid over each cell, and where it is now."""
        xp = array_namespace(now.tcp)
        before, under = now.memory["under"], self._under(now)
        pressed = self.pressed(now)
        travel = rotation.norm(under - before)
        rubbed = (now.memory["pressed"] & pressed)[:, None] & (travel < LEAP)
        slid = xp.where(rubbed, travel * _covered(before, under), xp.zeros_like(travel))
        return {
            "slid": now.memory["slid"] + xp.astype(slid, xp.float32),
            "under": under,
            "pressed": pressed,
        }

    def hidden(self, memory: dict[str, Array]) -> dict[str, Array]:
        """The cells whose ink is gone."""
        wiped = self.wiped(memory)
        return {f"ink_{i}": wiped[:, i] for i in range(CELLS)}

    def success(self, now: Snapshot, gripper: Array) -> Array:
        """Enough of the ink is gone; only the felt on the board takes any."""
        return self._fraction(now) >= ENOUGH - 1e-6

    def lost(self, now: Snapshot) -> Array:
        """The eraser has left the table's reachable part, or has tipped over."""
        xp = array_namespace(now.tcp)
        x, y = now.position["eraser"][:, 0], now.position["eraser"][:, 1]
        tipped = now.turn["eraser"][:, 2, 2] < TIPPED
        return (x < 0.2) | (x > 0.85) | (xp.abs(y) > 0.5) | tipped

    def terms(self, now: Snapshot, gripper: Array) -> dict[str, Array]:
        """How near the hand is to the eraser, whether it holds it, how near that is to a mark, and what is wiped."""
        xp = array_namespace(now.tcp)
        held = xp.astype(self.held(now), now.tcp.dtype)
        offset = now.position["eraser"] - now.tcp
        away = rotation.norm(self._nearest(now))
        return {
            "reach": 1.0 - xp.tanh(5.0 * rotation.norm(offset)),
            "grasp": held,
            "approach": held * (1.0 - xp.tanh(5.0 * away)),
            "wiped": self._fraction(now),
        }

    def held(self, now: Snapshot) -> Array:
        """(n,) bool: the eraser is between fingers that cannot close further."""
        low, high = HELD_WIDTH
        near = rotation.norm(now.position["eraser"] - now.tcp) < HELD_REACH
        return near & now.contact[TOUCH] & (now.width > low) & (now.width < high)

    def pressed(self, now: Snapshot) -> Array:
        """(n,) bool: the felt touches the board and lies flat on it."""
        xp = array_namespace(now.tcp)
        length, width, height = ERASER
        signs = ((1, 1), (1, -1), (-1, 1), (-1, -1))
        corners = constant(tuple((length * a, width * b, -height) for a, b in signs), now.tcp)
        # (n, 4) heights of the felt's corners over the board
        heights = now.turn["eraser"][:, 2, :] @ corners.T + self._clearance(now)[:, None] + height
        return now.contact[RUBS] & (xp.max(xp.abs(heights), axis=1) < FLAT)

    def wiped(self, memory: dict[str, Array]) -> Array:
        """(n, CELLS) bool: whose ink is gone."""
        return memory["slid"] >= RUB

    def _fraction(self, now: Snapshot) -> Array:
        """(n,) the part of the ink's area that is gone; all cells are of one size."""
        xp = array_namespace(now.tcp)
        return xp.mean(xp.astype(self.wiped(now.memory), now.tcp.dtype), axis=1)

    def _clearance(self, now: Snapshot) -> Array:
        """(n,) m, the height of the eraser's underside over the board, if it were level."""
        return now.position["eraser"][:, 2] - ERASER[2] - now.position["board"][:, 2] - BOARD[2]

    def _cells(self, now: Snapshot) -> Array:
        """(n, CELLS, 3) m, where the cells are."""
        places = constant(tuple((x, y, 0.0) for x, y, _ in PLACES), now.tcp)
        turned = places @ rotation.transpose(now.turn["ink"])
        return turned + now.position["ink"][:, None, :]

    def _under(self, now: Snapshot) -> Array:
        """(n, CELLS, 2) m float32, where the cells are in the eraser's frame."""
        xp = array_namespace(now.tcp)
        offset = self._cells(now) - now.position["eraser"][:, None, :]
        return xp.astype((offset @ now.turn["eraser"])[:, :, :2], xp.float32)

    def _nearest(self, now: Snapshot) -> Array:
        """(n, 2) m, from the eraser to the nearest cell that still has ink, in the base frame; 0 where none has."""
        xp = array_namespace(now.tcp)
        offset = (self._cells(now) - now.position["eraser"][:, None, :])[:, :, :2]
        gone = self.wiped(now.memory)
        far = xp.full_like(offset[:, :, 0], 10.0)
        away = xp.where(gone, far, rotation.norm(offset))
        first = away == xp.min(away, axis=1)[:, None]
        chosen = xp.astype(first & ~gone, offset.dtype)
        total = xp.clip(xp.sum(chosen, axis=1), min=1.0)
        return xp.sum(offset * chosen[:, :, None], axis=1) / total[:, None]

    def privileged(self, now: Snapshot) -> Array:
        """(n, P) as `privileged_names` say; the eraser's angle is doubled, as half a turn grasps the same."""
        xp = array_namespace(now.tcp)
        eraser, kind = now.position["eraser"], now.tcp.dtype
        twice = 2.0 * rotation.yaw(now.turn["eraser"])
        board, ink = rotation.yaw(now.turn["board"]), rotation.yaw(now.turn["ink"])
        flags = xp.astype(self.held(now), kind), xp.astype(self.pressed(now), kind)
        columns = [
            eraser,
            xp.stack([xp.sin(twice), xp.cos(twice)], axis=1),
            now.position["board"][:, :2],
            xp.stack([xp.sin(board), xp.cos(board)], axis=1),
            now.position["ink"][:, :2],
            xp.stack([xp.sin(ink), xp.cos(ink)], axis=1),
            xp.stack([*flags, self._fraction(now)], axis=1),
            now.velocity["eraser"][:, :3],
            eraser - now.tcp,
            self._nearest(now),
        ]
        return xp.astype(xp.concat(columns, axis=1), xp.float32)

    def expert(self, now: Snapshot, target: Array, target_turn: Array) -> Array:
        """(n, 7) actions: grasp the eraser from above, bring it down at an end of the stroke, sweep along it."""
        xp = array_namespace(now.tcp)
        held = self.held(now)
        grasp, grasp_turn, close = self._to_grasp(now)
        wipe, wipe_turn = self._to_wipe(now)
        goal = xp.where(held[:, None], wipe, grasp)
        turn = xp.where(held[:, None, None], wipe_turn, grasp_turn)
        opening = xp.astype(~(held | close), now.tcp.dtype)
        spin = rotation.log(turn @ rotation.transpose(target_turn))
        return xp.concat([goal - target, spin, opening[:, None]], axis=1)

    def _to_grasp(self, now: Snapshot) -> tuple[Array, Array, Array]:
        """Where the hand goes (n, 3), how it turns (n, 3, 3), and whether it may close (n,)."""
        xp = array_namespace(now.tcp)
        eraser = now.position["eraser"]
        yaw = rotation.wrap_half_turn(rotation.yaw(now.turn["eraser"]))
        turn = rotation.about_z(yaw) @ down(now.tcp)
        off = rotation.norm((eraser - now.tcp)[:, :2])
        skew = rotation.norm(rotation.log(turn @ rotation.transpose(now.tcp_turn)))
        # The nearer the hand is to standing square over the eraser, the lower it may go.
        astray = xp.clip(off - 0.008, min=0.0) + 0.05 * xp.clip(skew - 0.1, min=0.0)
        raise_by = xp.clip(3.0 * astray, max=HOVER)
        height = eraser[:, 2] + GRIP
        goal = xp.concat([eraser[:, :2], (height + raise_by)[:, None]], axis=1)
        upright = now.turn["eraser"][:, 2, 2] > 0.9
        close = upright & (off < 0.015) & (skew < 0.15) & (now.tcp[:, 2] - height < 0.008)
        return goal, turn, close

    def _to_wipe(self, now: Snapshot) -> tuple[Array, Array]:
        """Where the hand that holds the eraser goes (n, 3) and how it turns (n, 3, 3).

        The eraser lies across the stroke, so that one sweep along the stroke's chord takes all of it.
        """
        xp = array_namespace(now.tcp)
        ink_yaw = rotation.yaw(now.turn["ink"])
        skew = rotation.wrap_half_turn(ink_yaw - rotation.yaw(now.turn["eraser"]))
        turn = rotation.about_z(rotation.yaw(now.tcp_turn) + skew) @ down(now.tcp)

        # In the ink's frame, y runs along the stroke.
        eraser = now.position["eraser"]
        frame = rotation.about_z(ink_yaw)
        here = rotation.apply(rotation.transpose(frame), eraser - now.position["ink"])
        across, along = here[:, 0], here[:, 1]
        gone = self.wiped(now.memory)
        stroke = constant(tuple(y for _, y, _ in PLACES), now.tcp)
        stroke = stroke + xp.zeros_like(xp.astype(gone, now.tcp.dtype))
        low = xp.min(xp.where(gone, xp.full_like(stroke, 1.0), stroke), axis=1)
        high = xp.max(xp.where(gone, xp.full_like(stroke, -1.0), stroke), axis=1)
        lower_end = xp.abs(along - low) <= xp.abs(along - high)

        # Down on the board it sweeps: first what is left at the nearer end, then all the way to the other.
        clearance = self._clearance(now)
        over = (xp.abs(across) < 0.025) & (xp.abs(along) < STROKE + 0.03) & (xp.abs(skew) < 0.25)
        down_there = over & (xp.abs(clearance) < 0.006)
        near_done = xp.where(lower_end, along <= low + 0.01, along >= high - 0.01)
        upwards = lower_end == near_done
        sweep = xp.where(upwards, high + OUTSIDE, low - OUTSIDE)
        landing = xp.where(lower_end, low - OUTSIDE, high + OUTSIDE)
        pace = xp.clip(sweep - along, min=-SWEEP, max=SWEEP)
        onward = xp.where(down_there, pace, landing - along)

        # Elsewhere it is carried there: sideways only as far as the height allows, lower only where it is near.
        astray = xp.hypot(across, along - landing) + 0.1 * xp.abs(skew)
        level = xp.clip(2.0 * (astray - 0.01), min=-PRESS, max=CARRY)
        level = xp.where(down_there, xp.full_like(level, -PRESS), level)
        raised = xp.clip((clearance - 0.002) / 0.02, min=0.0, max=1.0)
        share = xp.where(down_there | (astray < 0.02), xp.ones_like(raised), raised)
        moves = xp.stack([-across, onward, xp.zeros_like(along)], axis=1)
        sideways = rotation.apply(frame, moves * share[:, None])
        lift = xp.stack([xp.zeros_like(along), xp.zeros_like(along), level - clearance], axis=1)
        return now.tcp + sideways + lift, turn


def _beyond(board: list[float], x: float, y: float) -> tuple[float, float]:
    """How far (x, y) is outside `board` [x, y, yaw] along the board's axes, m; negative inside."""
    sin, cos = math.sin(board[2]), math.cos(board[2])
    dx, dy = x - board[0], y - board[1]
    return abs(cos * dx + sin * dy) - BOARD[0], abs(cos * dy - sin * dx) - BOARD[1]


def _covered(start: Array, end: Array) -> Array:
    """(n, CELLS) the part of straight ways (n, CELLS, 2) in the eraser's frame on which the felt covers a cell."""
    xp = array_namespace(start)
    entry, leave = xp.zeros_like(start[:, :, 0]), xp.ones_like(start[:, :, 0])
    for axis, reach in enumerate(COVER):
        first, way = start[:, :, axis], end[:, :, axis] - start[:, :, axis]
        # A way along an edge never crosses it: a hair's breadth in its place keeps the division finite.
        way = xp.where(xp.abs(way) < 1e-9, xp.full_like(way, 1e-9), way)
        one, other = (-reach - first) / way, (reach - first) / way
        entry = xp.maximum(entry, xp.minimum(one, other))
        leave = xp.minimum(leave, xp.maximum(one, other))
    return xp.clip(leave - entry, min=0.0)
