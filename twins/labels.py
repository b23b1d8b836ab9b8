"""Labelled scenes: what a vision encoder can learn from a twin before anything has moved.

Arms and objects are placed, not simulated, so a scene costs little more than its images. The labels are the task's
privileged state.
"""

from __future__ import annotations

import numpy as np

from twins import arm, kinematics, randomise, regions, rotation
from twins.backends.mujoco_cpu import MujocoSimulation
from twins.env import TwinEnv, state_vector
from twins.kinematics import BOX
from twins.tasks import pick_and_place as task

APPEARANCE = {"light": 1.0, "camera": 1.0, "colour": 1.0}
COPIES = 64  # scenes placed and rendered at once
# What the hand does, and how often: reach for the object, hover near it, carry it, stand over the basket, roam.
KINDS, SHARES = ("reach", "hover", "carry", "basket", "roam"), (0.3, 0.15, 0.25, 0.1, 0.2)
IN_BASKET = 0.5  # of the scenes over the basket, how many have the object lying in it
HELD = 0.017  # m, each finger's opening around the object


def labelled_scenes(
    env: TwinEnv,
    count: int,
    rng: np.random.Generator,
    appearance: dict[str, float] | str = APPEARANCE,
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """`count` random scenes of `env`'s task, seen by its cameras; `env` itself is left as it is.

    Returns images {camera: (n, H, W, 3) uint8}, `observation.state` (n, S) and `privileged.state` (n, P), both
    float32. `appearance` scales what differs in looks, as in `twins.randomise`.
    """
    copies = min(COPIES, count)
    world = MujocoSimulation(env.task, copies, cameras=env.cameras, image_size=env.image_size)
    shape = (count, env.image_size, env.image_size, 3)
    images = {name: np.empty(shape, np.uint8) for name in env.cameras}
    states = np.empty((count, env.state_dim), np.float32)
    labels = np.empty((count, env.privileged_dim), np.float32)
    scales, nominal = randomise.scales(appearance), randomise.VARIANTS[env.variant]
    for start in range(0, count, copies):
        ids = np.arange(min(copies, count - start))
        rows = slice(start, start + len(ids))
        _place(world, ids, rng, scales, nominal)
        now = world.snapshot(ids)
        lead = 0.01 * rng.normal(size=(len(ids), 3))
        actions = np.zeros((len(ids), 2, 7))
        actions[:, :, 6] = (now.width > 2 * HELD + 0.01)[:, None]
        states[rows] = state_vector(now, now.tcp + lead, now.tcp_turn, actions)
        labels[rows] = env.task.privileged(now)
        if env.cameras:
            for name, frames in world.images(ids).items():
                images[name][rows] = frames
    return images, states, labels


def _place(
    world: MujocoSimulation, ids: np.ndarray, rng: np.random.Generator, scales: dict, nominal: dict
) -> None:
    """Put arm, object and basket of `ids` (n,) somewhere plausible, with looks of their own."""
    count = len(ids)
    kinds = rng.choice(len(KINDS), size=count, p=SHARES)
    reach, hover, carry, basket, _ = (kinds == k for k in range(len(KINDS)))
    configurations = [
        {
            **regions.draw(rng, world.task, world.task.regions[("id", "ood")[rng.integers(2)]]),
            "joints": [0.0] * kinematics.JOINTS,
            "draw": randomise.draw(rng, scales, nominal, world.task.things),
        }
        for _ in ids
    ]
    world.configure(ids, configurations)
    now = world.snapshot(ids)
    lying, bin_ = now.position["object"], now.position["basket"]
    yaw = np.array([c["object"][2] for c in configurations])
    goal = rng.uniform(*BOX, size=(count, 3)) * [1, 1, 0.7]
    goal[:, 0] = np.clip(goal[:, 0], 0.33, 0.72)
    turn = rng.normal(0.0, 0.1, size=(count, 3))
    turn[:, 2] = np.where(reach, yaw + rng.normal(0.0, 0.15, count), rng.uniform(-1, 1, count))
    finger = np.where(rng.uniform(size=count) < 0.8, arm.FINGER_RANGE, HELD)

    # Low over the object the hand must be straight above it, or its fingers would be inside.
    height = rng.uniform(0.0, 0.1, count)
    spread = 0.006 + 0.4 * height
    near = lying + np.column_stack([spread[:, None] * rng.normal(size=(count, 2)), height])
    goal[reach] = near[reach]
    finger[reach] = arm.FINGER_RANGE
    above = lying + np.column_stack(
        [0.05 * rng.normal(size=(count, 2)), rng.uniform(0.08, 0.22, count)]
    )
    goal[hover] = above[hover]
    over = bin_ + np.column_stack(
        [0.03 * rng.normal(size=(count, 2)), rng.uniform(0.1, 0.17, count)]
    )
    half = carry & (rng.uniform(size=count) < 0.3)
    goal[basket | half] = over[basket | half]
    low = carry & ~half & (rng.uniform(size=count) < 0.5)
    goal[low, :2], goal[low, 2] = lying[low, :2], rng.uniform(0.018, 0.12, low.sum())
    finger[carry] = HELD
    finger[basket] = arm.FINGER_RANGE

    goal[:, 2] = np.maximum(goal[:, 2], task.GRASP_HEIGHT)
    joints = np.tile(kinematics.HOME, (count, 1))
    wanted = rotation.about_z(turn[:, 2]) @ rotation.exp(turn * [1, 1, 0]) @ kinematics.DOWN
    joints = kinematics.solve(joints, goal, wanted, iterations=12)
    tcp, tool = kinematics.forward(joints)
    dropped = basket & (rng.uniform(size=count) < IN_BASKET)
    inside = bin_ + np.column_stack(
        [0.02 * rng.normal(size=(count, 2)), np.full(count, task.RADIUS + 2 * task.WALL)]
    )
    slip = np.array([0.008, 0.002, 0.004]) * rng.normal(size=(count, 3))
    gripped = tcp + (tool @ slip[..., None])[..., 0]
    aligned = tool @ kinematics.DOWN @ rotation.exp(0.08 * rng.normal(size=(count, 3)))
    world.place(ids[carry], "object", gripped[carry], aligned[carry])
    tumbled = rotation.about_z(rng.uniform(-1.5, 1.5, count))
    world.place(ids[dropped], "object", inside[dropped], tumbled[dropped])
    world.place_arm(ids, joints, finger)
    world.refresh(ids)
