"""Put the banana into the basket.

The expert is a function of the present state only (no phase is kept), so it can take over from a policy at any
step, and what it does can be cloned. It steers the *commanded* target, which is known without delay, and
waits on the *measured* pose where order matters; that makes it robust to latency.
"""

from __future__ import annotations

import math

from array_api_compat import array_namespace

from twins import rotation
from twins.shapes import Shape, Thing
from twins.tasks.task import GRIPPER, Array, Box, Finish, Grasp, Memory, Snapshot, down

RADIUS, TIP_RADIUS = 0.018, 0.015  # m, of the banana at its middle and its ends
OBJECT_MASS = 0.12  # kg
BASKET_HALF, BASKET_HEIGHT, WALL = 0.085, 0.055, 0.004  # m; WALL is half a wall's thickness
OBJECT_X, OBJECT_Y, YAW = (0.38, 0.55), (0.03, 0.25), 0.8  # where it starts: m, m, rad either way
BASKET_X, BASKET_Y = (0.56, 0.66), (-0.2, 0.2)
APART = 0.19  # m, least distance between the centres of object and basket at a reset

GRASP_HEIGHT, HOVER, TRANSPORT = 0.018, 0.09, 0.13  # m
HELD_WIDTH = (0.015, 0.046)  # m, how far the fingers stand apart with the banana between them
HELD_REACH = 0.035  # m, between tcp and object
TOUCH = ("object", GRIPPER)


def _banana() -> Thing:
    drop = TIP_RADIUS - RADIUS  # the thinner ends reach down to the table as well
    pieces = (
        (RADIUS, (-0.02, 0.0, 0.0), (0.02, 0.0, 0.0)),
        (TIP_RADIUS, (0.02, 0.0, drop), (0.05, 0.02, drop)),
        (TIP_RADIUS, (-0.02, 0.0, drop), (-0.05, 0.02, drop)),
    )
    shapes = []
    for i, (radius, (x1, y1, z1), (x2, y2, z2)) in enumerate(pieces):
        yaw = math.atan2(y2 - y1, x2 - x1)
        # A capsule lies along its z axis: a quarter turn about the horizontal normal of its direction lays it down.
        normal = (-math.sin(yaw) * math.pi / 2, math.cos(yaw) * math.pi / 2, 0.0)
        shapes.append(
            Shape(
                f"object_{i}",
                "capsule",
                (radius, math.hypot(x2 - x1, y2 - y1) / 2),
                position=((x1 + x2) / 2, (y1 + y2) / 2, (z1 + z2) / 2),
                turn=normal,
                mass=OBJECT_MASS / len(pieces),
                rgb=(0.97, 0.83, 0.1),
            )
        )
    return Thing("object", tuple(shapes), free=True, height=RADIUS, colour_range=0.08)


def _basket() -> Thing:
    half, height = BASKET_HALF, BASKET_HEIGHT / 2
    boxes = (
        ((half, half, WALL), (0.0, 0.0, WALL)),
        ((WALL, half, height), (half, 0.0, height)),
        ((WALL, half, height), (-half, 0.0, height)),
        ((half, WALL, height), (0.0, half, height)),
        ((half, WALL, height), (0.0, -half, height)),
    )
    shapes = tuple(
        Shape(f"basket_{i}", "box", size, position=position, rgb=(0.16, 0.38, 0.72))
        for i, (size, position) in enumerate(boxes)
    )
    return Thing("basket", shapes, free=False, colour_range=0.12)


class PickAndPlace:
    """Reward 1 when the banana rests in the basket and the gripper has let go of it."""

    name = "pick-and-place"
    instructions = ("put the banana into the basket", "place the banana in the basket")
    max_steps = 64
    things = (_banana(), _basket())
    grasped, goal = "object", "basket"
    grasp = Grasp(width=0.034)
    finish = Finish(position=(0.0, 0.0, RADIUS + 2 * WALL), spread=(0.03, 0.03))
    contacts = (TOUCH,)
    memory: dict[str, Memory] = {}  # noqa: RUF012
    randomisation: dict[str, float] = {}  # noqa: RUF012
    term_names = ("reach", "grasp", "carry")
    regions = {  # noqa: RUF012
        name: {
            "object": Box(OBJECT_X, side, (-YAW, YAW)),
            "basket": Box(BASKET_X, BASKET_Y),
        }
        for name, side in (("id", (-OBJECT_Y[1], -OBJECT_Y[0])), ("ood", OBJECT_Y))
    }
    privileged_names = (
        *("object_x", "object_y", "object_z", "object_sin_2yaw", "object_cos_2yaw"),
        *("basket_x", "basket_y", "held"),
        *("object_vx", "object_vy", "object_vz"),
        *("object_from_tcp_x", "object_from_tcp_y", "object_from_tcp_z"),
    )

    def fits(self, placement: dict[str, list[float]]) -> bool:
        """Object and basket stand well apart."""
        return math.dist(placement["object"][:2], placement["basket"][:2]) > APART

    def remember(self, now: Snapshot) -> dict[str, Array]:
        """Nothing: the present state says it all."""
        return {}

    def hidden(self, memory: dict[str, Array]) -> dict[str, Array]:
        """Nothing ever disappears."""
        return {}

    def success(self, now: Snapshot, gripper: Array) -> Array:
        """Inside the walls, low, at rest, and neither held nor touched."""
        xp = array_namespace(now.tcp)
        offset = xp.abs(now.position["object"] - now.position["basket"])
        inside = xp.max(offset[:, :2], axis=1) < BASKET_HALF - WALL
        low = offset[:, 2] < BASKET_HEIGHT - RADIUS / 2
        velocity = now.velocity["object"]
        slow = (rotation.norm(velocity[:, :3]) < 0.05) & (rotation.norm(velocity[:, 3:]) < 1.0)
        free = (gripper > 0.5) & (now.width > HELD_WIDTH[1]) & ~now.contact[TOUCH]
        return inside & low & slow & free

    def lost(self, now: Snapshot) -> Array:
        """The banana has left the table's reachable part."""
        xp = array_namespace(now.tcp)
        x, y = now.position["object"][:, 0], now.position["object"][:, 1]
        return (x < 0.2) | (x > 0.85) | (xp.abs(y) > 0.5)

    def terms(self, now: Snapshot, gripper: Array) -> dict[str, Array]:
        """How near the hand is to the object, whether it is held, and how near the object is to the basket."""
        xp = array_namespace(now.tcp)
        banana, basket = now.position["object"], now.position["basket"]
        held = xp.astype(self.held(now), now.tcp.dtype)
        away = rotation.norm((banana - basket)[:, :2])
        return {
            "reach": 1.0 - xp.tanh(5.0 * rotation.norm(banana - now.tcp)),
            "grasp": held,
            "carry": held * (1.0 - xp.tanh(5.0 * away)),
        }

    def held(self, now: Snapshot) -> Array:
        """(n,) bool: the banana is between fingers that cannot close further."""
        low, high = HELD_WIDTH
        near = rotation.norm(now.position["object"] - now.tcp) < HELD_REACH
        return near & (now.width > low) & (now.width < high)

    def privileged(self, now: Snapshot) -> Array:
        """(n, P) as `privileged_names` say; the angle is doubled, as half a turn grasps the same."""
        xp = array_namespace(now.tcp)
        banana = now.position["object"]
        yaw = 2.0 * rotation.yaw(now.turn["object"])
        held = xp.astype(self.held(now), now.tcp.dtype)
        columns = [
            banana,
            xp.stack([xp.sin(yaw), xp.cos(yaw)], axis=1),
            now.position["basket"][:, :2],
            held[:, None],
            now.velocity["object"][:, :3],
            banana - now.tcp,
        ]
        return xp.astype(xp.concat(columns, axis=1), xp.float32)

    def expert(self, now: Snapshot, target: Array, target_turn: Array) -> Array:
        """(n, 7) actions: approach from above, grasp, carry, let go over the basket."""
        xp = array_namespace(now.tcp)
        banana, basket = now.position["object"], now.position["basket"]
        held = self.held(now)
        aside = xp.max(xp.abs(banana - basket)[:, :2], axis=1)
        over, inside = aside < 0.03, aside < BASKET_HALF
        airborne = banana[:, 2] > BASKET_HEIGHT
        done = inside & ~airborne & ~held

        # Approach: the nearer the hand is to standing square over the banana, the lower it may go.
        yaw = rotation.wrap_half_turn(rotation.yaw(now.turn["object"]))
        grasp_turn = rotation.about_z(yaw) @ down(now.tcp)
        off = rotation.norm((banana - now.tcp)[:, :2])
        skew = rotation.norm(rotation.log(grasp_turn @ rotation.transpose(now.tcp_turn)))
        astray = xp.clip(off - 0.01, min=0.0) + 0.05 * xp.clip(skew - 0.1, min=0.0)
        height = xp.clip(banana[:, 2], min=GRASP_HEIGHT)
        raise_by = xp.clip(3.0 * astray, max=HOVER)
        grasp = xp.concat([banana[:, :2], (height + raise_by)[:, None]], axis=1)
        low = now.tcp[:, 2] - height
        close = (off < 0.015) & (skew < 0.15) & (low < 0.012)

        # Carry: sideways only as far as the height allows, so that nothing is dragged or pushed.
        raised = xp.clip((now.tcp[:, 2] - 0.04) / 0.06, min=0.0, max=1.0)[:, None]
        sideways = target[:, :2] + raised * (basket - target)[:, :2]
        level = xp.full_like(off, TRANSPORT)[:, None]
        carry = xp.concat([sideways, level], axis=1)
        release = over & airborne & (low > -HELD_REACH) & (now.tcp[:, 2] > BASKET_HEIGHT + 0.03)

        stay = done | (release & ~held)
        away = xp.concat([basket[:, :2], level + 0.03], axis=1)
        goal = xp.where(held[:, None], carry, grasp)
        goal = xp.where(stay[:, None], away, goal)
        # A carried banana keeps the yaw at which it was grasped; turning it would gain nothing.
        turn = xp.where((held | stay)[:, None, None], target_turn, grasp_turn)
        opening = xp.astype(stay | release | ~(held | close), now.tcp.dtype)
        spin = rotation.log(turn @ rotation.transpose(target_turn))
        return xp.concat([goal - target, spin, opening[:, None]], axis=1)
