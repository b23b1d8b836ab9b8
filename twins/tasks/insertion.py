"""What the two insertions share: a block stands on the table and goes into a socket that stands elsewhere.

A socket's hole is open down to the table, so an inserted block stands on the table as a free one does, and what
tells them apart is where. The expert is a function of the present state only: it computes where the hand must be
for the block, as it is held now, to hang over the hole, upright and turned to fit; it lowers while that is so, and
what stands on the rim instead is lifted a little and tried again.
"""

from __future__ import annotations

import math
from typing import Any

from array_api_compat import array_namespace

from twins import rotation
from twins.shapes import Thing
from twins.tasks.task import GRIPPER, Array, Box, Finish, Grasp, Memory, Snapshot, down

TOUCH = ("block", GRIPPER)
BLOCK_X, BLOCK_Y = (0.38, 0.52), (0.03, 0.22)  # m, where the block starts; y on either side
SOCKET_X, SOCKET_Y = (0.5, 0.62), (-0.2, 0.2)  # m
APART = 0.16  # m, least distance between the centres of block and socket at a reset
# The friction of smooth plastic; the fingers' rubber and the table have more, and the larger of two counts.
SMOOTH = (0.4, 0.01, 0.0001)

# Inserted: how far from straight in the middle and from standing on the table. A block that stands on the rim is
# ten times too high, and one beside the socket is fifty times too far away.
ASIDE, ABOVE, LEAN = 0.0025, 0.0025, 0.03  # m, m, sine of the angle

HOVER, CLEAR = 0.06, 0.022  # m, of the hand over the block, and of the block's foot over the rim
ALIGNED = 0.0025  # m, off straight over the hole: what the foot may touch the rim with
LEVER = 0.025  # m: a radian off counts as much as this
# The arm pushes with some 10 N for each millimetre that the target lies below; the fingers, at 13 to 25 N on a side,
# slip with little friction from that much on.
PRESS = 0.0025  # m, how far below rim and table the block is wanted
PACE = 0.006  # m a step, while lowering in the hole
NEAR = 0.008  # m, beside the hole, where it may be moved on the rim
LYING = 0.6  # cosine of the angle from which a block lies rather than leans
MAX_TILT = 0.5  # rad, of a hand that can still put a block into the hole; tilted more it stands the block up
STANDING_X, STANDING_Y = (0.4, 0.48), 0.2  # m, where it does so
STEEP = 0.4  # rad off upright, from which a block falls upright when it is let go
LOOSE = 0.013  # m, that the fingers may stand wider than they should, for a skewed grasp
# Between tcp and the grasped place, in m: held at all; and held well enough, across the block and along it.
GRASP_REACH, FIRM, SLID = 0.035, 0.012, 0.015


class Insertion:
    """The base of an insertion; a task of it gives things, names and the sizes below."""

    grasped, goal = "block", "socket"
    max_steps = 100
    contacts = (TOUCH,)
    memory: dict[str, Memory] = {}  # noqa: RUF012
    # The full disturbance moves the hand by 3 mm and a degree in every step; with less than a millimetre of clearance
    # that would measure luck. Half of it is still twice the clearance. Everything else keeps its full range.
    randomisation = {"action_noise": 0.5}  # noqa: RUF012
    term_names = ("reach", "grasp", "align", "insert")
    privileged_names = (
        *("block_x", "block_y", "block_z", "block_up_x", "block_up_y"),
        *("block_sin_yaw", "block_cos_yaw"),  # of the angle times the symmetry, as all of these
        *("socket_x", "socket_y", "socket_sin_yaw", "socket_cos_yaw"),
        *("from_socket_x", "from_socket_y", "from_socket_sin_yaw", "from_socket_cos_yaw"),
        *("held", "block_vx", "block_vy", "block_vz"),
        *("block_from_tcp_x", "block_from_tcp_y", "block_from_tcp_z"),
    )

    things: tuple[Thing, ...]
    grasp: Grasp
    finish: Finish  # its height is that of the block's origin over its foot, wherever it stands
    either_way_up: bool  # a block that is the same upside down
    radius: float  # m, from the block's middle to its farthest side
    rim: float  # m, height of the socket

    def fits(self, placement: dict[str, list[float]]) -> bool:
        """Block and socket stand well apart."""
        return math.dist(placement["block"][:2], placement["socket"][:2]) > APART

    def remember(self, now: Snapshot) -> dict[str, Array]:
        """Nothing: the present state says it all."""
        return {}

    def hidden(self, memory: dict[str, Array]) -> dict[str, Array]:
        """Nothing ever disappears."""
        return {}

    def success(self, now: Snapshot, gripper: Array) -> Array:
        """In the hole down to the table, upright, at rest, and neither held nor touched."""
        velocity = now.velocity["block"]
        slow = (rotation.norm(velocity[:, :3]) < 0.02) & (rotation.norm(velocity[:, 3:]) < 0.5)
        free = (gripper > 0.5) & (now.width > self.grasp.width + LOOSE) & ~now.contact[TOUCH]
        return self.inserted(now) & slow & free

    def inserted(self, now: Snapshot) -> Array:
        """(n,) bool: the block stands in the hole. Only its own angles let it get there."""
        xp = array_namespace(now.tcp)
        offset = now.position["block"] - now.position["socket"]
        deep = xp.abs(offset[:, 2] - self.finish.position[2]) < ABOVE
        upright = rotation.norm(self.upright(now)[:, :2, 2]) < LEAN
        return (rotation.norm(offset[:, :2]) < ASIDE) & deep & upright

    def lost(self, now: Snapshot) -> Array:
        """The block has left the table's reachable part."""
        xp = array_namespace(now.tcp)
        x, y = now.position["block"][:, 0], now.position["block"][:, 1]
        return (x < 0.2) | (x > 0.85) | (xp.abs(y) > 0.5)

    def terms(self, now: Snapshot, gripper: Array) -> dict[str, Array]:
        """How near the hand is to the block, whether it is held, how well it is aligned, and how deep it is in."""
        xp = array_namespace(now.tcp)
        held = xp.astype(self.held(now), now.tcp.dtype)
        offset = now.position["block"] - now.position["socket"]
        aligned = 1.0 - xp.tanh(5.0 * self.astray(now))
        inside = xp.astype(rotation.norm(offset[:, :2]) < ASIDE, now.tcp.dtype)
        depth = xp.clip(1.0 - (offset[:, 2] - self.finish.position[2]) / self.rim, min=0.0, max=1.0)
        inserted = inside * depth
        return {
            "reach": 1.0 - xp.tanh(5.0 * rotation.norm(self.grasp_point(now) - now.tcp)),
            "grasp": held,
            "align": xp.maximum(held * aligned, inserted),
            "insert": inserted,
        }

    def upright(self, now: Snapshot) -> Array:
        """(n, 3, 3) the block's orientation; one that fits either way up is seen as standing on its lower end.

        Of one that lies flat the end towards the robot counts as the upper one: in raising it the hand comes to
        point towards the robot, or sideways, which the wrist can do, and away from it it can't.
        """
        turn = now.turn["block"]
        if not self.either_way_up:
            return turn
        xp = array_namespace(turn)
        up = turn[:, :, 2]
        inward = -xp.sum(up[:, :2] * now.position["block"][:, :2], axis=1)
        over = xp.where(xp.abs(up[:, 2]) < 0.3, inward, up[:, 2]) < 0.0
        return xp.where(over[:, None, None], turn @ down(turn), turn)

    def away(self, now: Snapshot) -> Array:
        """(n,) the angle in rad by which the block must turn to fit, the nearest of those that do."""
        missing = rotation.yaw(now.turn["socket"]) - rotation.yaw(self.upright(now))
        return rotation.wrap(missing, 2.0 * math.pi / self.finish.turns)

    def astray(self, now: Snapshot) -> Array:
        """(n,) m, how far the block is from straight over the hole, angles included."""
        xp = array_namespace(now.tcp)
        aside = rotation.norm((now.position["block"] - now.position["socket"])[:, :2])
        lean = rotation.norm(self.upright(now)[:, :2, 2])
        return aside + LEVER * (xp.abs(self.away(now)) + lean)

    def grasp_point(self, now: Snapshot) -> Array:
        """(n, 3) m, where the hand takes the block."""
        return now.position["block"] + self.grasp.position[2] * self.upright(now)[:, :, 2]

    def held(self, now: Snapshot) -> Array:
        """(n,) bool: the block is between fingers that cannot close further."""
        low, high = self.grasp.width - LOOSE, self.grasp.width + LOOSE
        near = rotation.norm(self.grasp_point(now) - now.tcp) < GRASP_REACH
        return near & (now.width > low) & (now.width < high) & now.contact[TOUCH]

    def privileged(self, now: Snapshot) -> Array:
        """(n, P) as `privileged_names` say; angles are multiplied so that what fits the same reads the same."""
        xp = array_namespace(now.tcp)
        block, socket, turn = now.position["block"], now.position["socket"], self.upright(now)
        into = rotation.transpose(now.turn["socket"])

        def angle(yaw: Array) -> Array:
            return xp.stack(
                [xp.sin(self.finish.turns * yaw), xp.cos(self.finish.turns * yaw)], axis=1
            )

        columns: list[Any] = [
            block,
            turn[:, :2, 2],
            angle(rotation.yaw(turn)),
            socket[:, :2],
            angle(rotation.yaw(now.turn["socket"])),
            rotation.apply(into, block - socket)[:, :2],
            angle(-self.away(now)),
            xp.astype(self.held(now), now.tcp.dtype)[:, None],
            now.velocity["block"][:, :3],
            block - now.tcp,
        ]
        return xp.astype(xp.concat(columns, axis=1), xp.float32)

    def expert(self, now: Snapshot, target: Array, target_turn: Array) -> Array:
        """(n, 7) actions: grasp from above, carry, align over the hole, lower, let go."""
        xp = array_namespace(now.tcp)
        inserted = self.inserted(now)
        reach, reach_turn, close = self._approach(now, target)
        carry, carry_turn, tilted = self._insert(now, target)
        raised, raised_turn, stands = self._stand_up(now, target)
        held = self.held(now) & ~self._slipped(now) & ~(tilted & stands)

        def choose(which: Array, one: Array, other: Array) -> Array:
            return xp.where(xp.reshape(which, (-1,) + (1,) * (one.ndim - 1)), one, other)

        goal = choose(held, choose(tilted, raised, carry), reach)
        turn = choose(held, choose(tilted, raised_turn, carry_turn), reach_turn)
        # An inserted block is let go; only when the fingers have opened does the hand rise.
        opened = now.width > self.grasp.width + LOOSE
        up = xp.where(opened, now.tcp[:, 2] + HOVER, target[:, 2])
        leave = xp.concat([target[:, :2], up[:, None]], axis=1)
        goal = choose(inserted, leave, goal)
        turn = choose(inserted, target_turn, turn)
        opening = xp.astype(inserted | (tilted & stands) | ~(held | close), now.tcp.dtype)
        spin = rotation.log(turn @ rotation.transpose(target_turn))
        return xp.concat([goal - target, spin, opening[:, None]], axis=1)

    def _slipped(self, now: Snapshot) -> Array:
        """(n,) bool: the hand has slid away over the block, and stands where it may let go to grasp it again."""
        xp = array_namespace(now.tcp)
        up = self.upright(now)[:, :, 2]
        off = now.tcp - self.grasp_point(now)
        along = xp.sum(off * up, axis=1)[:, None]
        slid = (xp.abs(along[:, 0]) > SLID) | (rotation.norm(off - along * up) > FIRM)
        foot = now.position["block"][:, 2] - self.finish.position[2] * up[:, 2]
        settled = (up[:, 2] > 0.9) & (foot < 0.004) | (
            (foot < self.rim - 0.004) & (self.astray(now) < 0.003)
        )
        return slid & settled

    def _approach(self, now: Snapshot, target: Array) -> tuple[Array, Array, Array]:
        """Where the hand goes to grasp the block (n, 3), (n, 3, 3), and whether it is there (n,)."""
        xp = array_namespace(now.tcp)
        point = self.grasp_point(now)
        facing = rotation.yaw(now.tcp_turn)
        turn = self.upright(now)
        yaw = facing + rotation.wrap(rotation.yaw(turn) - facing, 2.0 * math.pi / self.grasp.turns)
        # One that lies is taken across, so that raising the hand's outer side raises it.
        along = xp.atan2(turn[:, 1, 2], turn[:, 0, 2])
        along = facing + rotation.wrap_half_turn(along - facing)
        yaw = xp.where(turn[:, 2, 2] < LYING, along, yaw)
        turn = rotation.about_z(yaw) @ down(now.tcp)
        off = rotation.norm((point - now.tcp)[:, :2])
        skew = rotation.norm(rotation.log(turn @ rotation.transpose(now.tcp_turn)))
        # The nearer the hand is to standing square over the block, the lower it may go; from below it rises first.
        astray = xp.clip(off - 0.006, min=0.0) + 0.05 * xp.clip(skew - 0.06, min=0.0)
        low = now.tcp[:, 2] - point[:, 2]
        raised = xp.clip((low - 0.25 * HOVER) / (0.5 * HOVER), min=0.0, max=1.0)
        free = xp.where(off < 0.015, xp.ones_like(raised), raised)[:, None]
        sideways = target[:, :2] + free * (point - target)[:, :2]
        height = point[:, 2] + xp.clip(4.0 * astray, max=HOVER)
        close = (off < 0.008) & (skew < 0.1) & (xp.abs(low) < 0.008)
        return xp.concat([sideways, height[:, None]], axis=1), turn, close

    def _insert(self, now: Snapshot, target: Array) -> tuple[Array, Array, Array]:
        """Where the hand goes (n, 3), (n, 3, 3) to bring the block that it holds into the hole.

        Also whether the hand would be tilted too far there (n,).
        """
        xp = array_namespace(now.tcp)
        block, socket, turn = now.position["block"], now.position["socket"], self.upright(now)
        lean = rotation.norm(turn[:, :2, 2])
        foot = (
            block[:, 2] - self.finish.position[2] * turn[:, 2, 2] - self.radius * lean
        )  # its lowest point
        aside = rotation.norm((block - socket)[:, :2])
        astray = self.astray(now)
        inside = (foot < self.rim - 0.0005) & (astray < 0.003)

        # How the block has to turn, and where the hand is then as seen from the block.
        fitting = rotation.about_z(rotation.yaw(turn) + self.away(now))
        change = fitting @ rotation.transpose(turn)
        from_block = rotation.apply(change, now.tcp - block)
        over = socket + from_block

        # Sideways only when it has cleared the rim, or in small corrections on it. The nearer it comes to fitting,
        # the lower; then it rests on the rim with light pressure and finds the hole as it is moved.
        cleared = xp.clip((foot - self.rim - 0.002) / 0.01, min=0.0, max=1.0)
        free = xp.where(aside < NEAR, xp.ones_like(cleared), cleared)[:, None]
        sideways = target[:, :2] + free * (over - target)[:, :2]
        hover = xp.clip(2.0 * (astray - ALIGNED), min=-PRESS, max=CLEAR)
        hover = self.rim + hover + self.finish.position[2] + from_block[:, 2]
        deep = self.finish.position[2] - PRESS + from_block[:, 2]
        height = xp.where(inside, xp.maximum(deep, now.tcp[:, 2] - PACE), hover)
        hand = change @ now.tcp_turn
        tilted = hand[:, 2, 2] > -math.cos(MAX_TILT)
        return xp.concat([sideways, height[:, None]], axis=1), hand, tilted

    def _stand_up(self, now: Snapshot, target: Array) -> tuple[Array, Array, Array]:
        """Where the hand goes (n, 3), (n, 3, 3) to stand a block up that it holds askew, and whether that is done.

        The hand cannot lie down as far as the block has to come up; the block falls into place from STEEP on.
        """
        xp = array_namespace(now.tcp)
        block, up = now.position["block"], self.upright(now)[:, :, 2]
        across = xp.stack([up[:, 1], -up[:, 0], xp.zeros_like(up[:, 0])], axis=1)
        across = across / xp.clip(rotation.norm(across), min=rotation.SMALL)[:, None]
        lean = xp.acos(xp.clip(up[:, 2], min=-1.0, max=1.0))
        missing = xp.clip(lean - STEEP, min=0.0)
        change = rotation.exp(across * missing[:, None])
        from_block = rotation.apply(change, now.tcp - block)
        ready = missing < 0.15
        lift = self.finish.position[2] * xp.cos(lean) + self.radius * xp.sin(lean)
        height = lift + xp.where(ready, xp.full_like(lift, -PRESS), xp.full_like(lift, 0.015))
        # Meanwhile it comes to where the arm reaches a tilted pose: a target out of reach would creep away.
        x = xp.clip(target[:, 0], min=STANDING_X[0], max=STANDING_X[1])
        y = xp.clip(target[:, 1], min=-STANDING_Y, max=STANDING_Y)
        goal = xp.stack([x, y, height + from_block[:, 2]], axis=1)
        stands = ready & (block[:, 2] - lift < 0.003)
        return goal, change @ now.tcp_turn, stands


def regions(block_yaw: float, socket_yaw: float) -> dict[str, dict[str, Box]]:
    """The block in the half of the table at the robot's right (ID) or left (OOD), the socket anywhere before it."""
    (near, far), yaw = BLOCK_Y, (-block_yaw, block_yaw)
    socket = Box(SOCKET_X, SOCKET_Y, (-socket_yaw, socket_yaw))
    return {
        "id": {"block": Box(BLOCK_X, (-far, -near), yaw), "socket": socket},
        "ood": {"block": Box(BLOCK_X, (near, far), yaw), "socket": socket},
    }
