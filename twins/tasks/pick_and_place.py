"""Put the banana into the basket.

The expert is a function of the present state only (no phase is kept), so it can take over from a policy at any
step, and what it does can be cloned. It steers the *commanded* target, which is known without delay, and
waits on the *measured* pose where order matters; that makes it robust to latency.
"""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np

from twins import arm, kinematics, rotation
from twins.tasks.task import Snapshot

RADIUS, TIP_RADIUS = 0.018, 0.015  # m, of the banana at its middle and its ends
OBJECT_MASS = 0.12  # kg
BASKET_HALF, BASKET_HEIGHT, WALL = 0.085, 0.055, 0.004  # m; WALL is half a wall's thickness
OBJECT_X, OBJECT_Y, YAW = (0.38, 0.55), (0.03, 0.25), 0.8  # where it starts: m, m, rad either way
BASKET_X, BASKET_Y = (0.56, 0.66), (-0.2, 0.2)
APART = 0.19  # m, least distance between the centres of object and basket at a reset

GRASP_HEIGHT, HOVER, TRANSPORT = 0.018, 0.09, 0.13  # m
HELD_WIDTH = (0.015, 0.046)  # m, how far the fingers stand apart with the banana between them
HELD_REACH = 0.035  # m, between tcp and object


class PickAndPlace:
    """Reward 1 when the banana rests in the basket and the gripper has let go of it."""

    name = "pick-and-place"
    instruction = "put the banana into the basket"
    max_steps = 64
    rest_height = RADIUS
    privileged_names = (
        *("object_x", "object_y", "object_z", "object_sin_2yaw", "object_cos_2yaw"),
        *("basket_x", "basket_y", "held"),
        *("object_vx", "object_vy", "object_vz"),
        *("object_from_tcp_x", "object_from_tcp_y", "object_from_tcp_z"),
    )

    def add_objects(self, spec: mujoco.MjSpec) -> None:
        """Add banana and basket, and a sensor that counts contacts between gripper and banana."""
        banana = spec.worldbody.add_body(name="object", pos=[0.45, 0, RADIUS])
        banana.add_freejoint()
        drop = TIP_RADIUS - RADIUS  # the thinner ends reach down to the table as well
        pieces = (
            (RADIUS, [-0.02, 0, 0, 0.02, 0, 0]),
            (TIP_RADIUS, [0.02, 0, drop, 0.05, 0.02, drop]),
            (TIP_RADIUS, [-0.02, 0, drop, -0.05, 0.02, drop]),
        )
        for i, (radius, ends) in enumerate(pieces):
            banana.add_geom(
                name=f"object_{i}",
                type=mujoco.mjtGeom.mjGEOM_CAPSULE,
                fromto=ends,
                size=[radius, 0, 0],
                mass=OBJECT_MASS / len(pieces),
                contype=arm.OBJECT,
                conaffinity=arm.TABLE | arm.BASKET,
                friction=[1.0, 0.01, 0.0001],
                solref=arm.CONTACT,
                rgba=[0.97, 0.83, 0.1, 1],
            )
        self._add_basket(spec)
        for finger in ("hand", *arm.FINGERS):
            spec.add_sensor(
                name=f"touch_{finger}",
                type=mujoco.mjtSensor.mjSENS_CONTACT,
                objtype=mujoco.mjtObj.mjOBJ_BODY,
                objname=finger,
                reftype=mujoco.mjtObj.mjOBJ_BODY,
                refname="object",
                intprm=[1 << int(mujoco.mjtConDataField.mjCONDATA_FOUND), 0, 1],
            )

    def _add_basket(self, spec: mujoco.MjSpec) -> None:
        # A mocap body: each simulation has its own basket position, and it costs no degrees of freedom.
        basket = spec.worldbody.add_body(name="basket", mocap=True, pos=[0.62, 0, 0])
        half, height = BASKET_HALF, BASKET_HEIGHT / 2
        boxes = [
            ([half, half, WALL], [0, 0, WALL]),
            ([WALL, half, height], [half, 0, height]),
            ([WALL, half, height], [-half, 0, height]),
            ([half, WALL, height], [0, half, height]),
            ([half, WALL, height], [0, -half, height]),
        ]
        for i, (size, position) in enumerate(boxes):
            basket.add_geom(
                name=f"basket_{i}",
                type=mujoco.mjtGeom.mjGEOM_BOX,
                size=size,
                pos=position,
                contype=arm.BASKET,
                conaffinity=0,
                rgba=[0.16, 0.38, 0.72, 1],
            )

    def draw(self, rng: np.random.Generator, region: str) -> dict[str, Any]:
        """The object in its half of the table (ID: y < 0, OOD: y > 0), the basket behind, well apart."""
        side = {"id": -1.0, "ood": 1.0}.get(region) or rng.choice([-1.0, 1.0])
        x, y = rng.uniform(*OBJECT_X), side * rng.uniform(*OBJECT_Y)
        yaw = rng.uniform(-YAW, YAW)
        while True:
            basket = rng.uniform(*BASKET_X), rng.uniform(*BASKET_Y)
            if np.hypot(basket[0] - x, basket[1] - y) > APART:
                break
        return {
            "object": [float(x), float(y), float(yaw)],
            "basket": [float(basket[0]), float(basket[1])],
        }

    def success(self, now: Snapshot, gripper: np.ndarray) -> np.ndarray:
        """Inside the walls, low, at rest, and neither held nor touched."""
        offset = np.abs(now.object - now.basket)
        inside = offset[:, :2].max(axis=1) < BASKET_HALF - WALL
        low = offset[:, 2] < BASKET_HEIGHT - RADIUS / 2
        slow = (np.linalg.norm(now.velocity[:, :3], axis=1) < 0.05) & (
            np.linalg.norm(now.velocity[:, 3:], axis=1) < 1.0
        )
        free = (gripper > 0.5) & (now.width > HELD_WIDTH[1]) & ~now.touching
        return inside & low & slow & free

    def lost(self, now: Snapshot) -> np.ndarray:
        """The banana has left the table's reachable part."""
        x, y = now.object[:, 0], now.object[:, 1]
        return (x < 0.2) | (x > 0.85) | (np.abs(y) > 0.5)

    def held(self, now: Snapshot) -> np.ndarray:
        """(n,) bool: the banana is between fingers that cannot close further."""
        low, high = HELD_WIDTH
        near = np.linalg.norm(now.object - now.tcp, axis=1) < HELD_REACH
        return near & (now.width > low) & (now.width < high)

    def privileged(self, now: Snapshot) -> np.ndarray:
        """(n, P) as `privileged_names` say; the angle is doubled, as half a turn grasps the same."""
        yaw = 2.0 * now.yaw
        columns = [
            now.object,
            np.stack([np.sin(yaw), np.cos(yaw)], axis=1),
            now.basket[:, :2],
            self.held(now)[:, None],
            now.velocity[:, :3],
            now.object - now.tcp,
        ]
        return np.concatenate(columns, axis=1).astype(np.float32)

    def expert(self, now: Snapshot, target: np.ndarray, target_turn: np.ndarray) -> np.ndarray:
        """(n, 7) actions: approach from above, grasp, carry, let go over the basket."""
        held = self.held(now)
        over = np.abs(now.object - now.basket)[:, :2].max(axis=1) < 0.03
        inside = np.abs(now.object - now.basket)[:, :2].max(axis=1) < BASKET_HALF
        airborne = now.object[:, 2] > BASKET_HEIGHT
        done = inside & ~airborne & ~held

        # Approach: the nearer the hand is to standing square over the banana, the lower it may go.
        yaw = rotation.wrap_half_turn(now.yaw)
        grasp_turn = rotation.about_z(yaw) @ kinematics.DOWN
        off = np.linalg.norm((now.object - now.tcp)[:, :2], axis=1)
        skew = np.linalg.norm(rotation.log(grasp_turn @ now.tcp_turn.swapaxes(1, 2)), axis=1)
        astray = np.maximum(off - 0.01, 0.0) + 0.05 * np.maximum(skew - 0.1, 0.0)
        grasp = now.object.copy()
        grasp[:, 2] = np.maximum(now.object[:, 2], GRASP_HEIGHT) + np.minimum(3.0 * astray, HOVER)
        low = now.tcp[:, 2] - np.maximum(now.object[:, 2], GRASP_HEIGHT)
        close = (off < 0.015) & (skew < 0.15) & (low < 0.012)

        # Carry: sideways only as far as the height allows, so that nothing is dragged or pushed.
        carry = np.column_stack([now.basket[:, :2], np.full(len(off), TRANSPORT)])
        raised = np.clip((now.tcp[:, 2] - 0.04) / 0.06, 0.0, 1.0)[:, None]
        carry[:, :2] = target[:, :2] + raised * (carry - target)[:, :2]
        release = over & airborne & (low > -HELD_REACH) & (now.tcp[:, 2] > BASKET_HEIGHT + 0.03)

        goal = np.where(held[:, None], carry, grasp)
        stay = done | (release & ~held)
        away = np.column_stack([now.basket[:, :2], np.full(len(off), TRANSPORT + 0.03)])
        goal = np.where(stay[:, None], away, goal)
        # A carried banana keeps the yaw at which it was grasped; turning it would gain nothing.
        turn = np.where((held | stay)[:, None, None], target_turn, grasp_turn)
        opening = np.where(stay | release, 1.0, np.where(held | close, 0.0, 1.0))
        spin = rotation.log(turn @ target_turn.swapaxes(1, 2))
        return np.column_stack([goal - target, spin, opening])
