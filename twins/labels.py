"""Labelled scenes: what a vision encoder can learn from a twin before anything has moved.

Arm and things are placed, not simulated, so a scene costs little more than its images. The labels are the task's
privileged state. How the thing is held and where it ends is the task's (`Grasp`, `Finish`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from twins import arm, kinematics, randomise, regions, rotation
from twins.backends.mujoco_cpu import MujocoSimulation
from twins.env import TwinEnv
from twins.errands import ERRAND, INSTRUCTION, draw_errand, errand_number, roles
from twins.kinematics import BOX
from twins.observe import state_vector
from twins.snapshot import Snapshot
from twins.tasks.task import Task

APPEARANCE = {"light": 1.0, "camera": 1.0, "colour": 1.0}
COPIES = 64  # scenes placed and rendered at once
# What the hand does, and how often: reach for the thing, hover near it, carry it, be at the goal, roam.
KINDS, SHARES = ("reach", "hover", "carry", "goal", "roam"), (0.3, 0.15, 0.25, 0.1, 0.2)
FINISHED = 0.5  # of the scenes at the goal, how many have the thing lying there, if it is let go
OVER, LOW = 0.3, 0.35  # of the scenes with a carried thing: above its finish, above its start
USED = 0.5  # of the scenes with a tool above its finish, in how many it is used there
USES = 12  # the stroke that a tool made before, in a task that remembers: so many steps, or fewer
GRIP = 0.0005  # m, how far a finger, or a tool in use, presses into what it touches
SLIP, TILT = (
    np.array([0.008, 0.002, 0.004]),
    0.08,
)  # m, rad: how a held thing differs from its grasp


class InstructedScenes(NamedTuple):
    """n labelled scenes, each with what a policy would be told in it."""

    images: dict[str, np.ndarray]  # {camera: (n, H, W, 3) uint8}
    state: np.ndarray  # (n, S) float32, `observation.state`
    labels: np.ndarray  # (n, P) float32, `privileged.state`
    instruction: list[str]  # n


def labelled_scenes(
    env: TwinEnv,
    count: int,
    rng: np.random.Generator,
    appearance: dict[str, float] | str = APPEARANCE,
    looks: np.random.Generator | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Images, state and labels of `instructed_scenes`, for a task that always asks for the same."""
    return instructed_scenes(env, count, rng, appearance, looks)[:3]


def instructed_scenes(
    env: TwinEnv,
    count: int,
    rng: np.random.Generator,
    appearance: dict[str, float] | str = APPEARANCE,
    looks: np.random.Generator | None = None,
) -> InstructedScenes:
    """`count` random scenes of `env`'s task, seen by its cameras; `env` itself is left as it is.

    Of errands those are drawn that `env` draws. `appearance` scales what differs in looks, as in `twins.randomise`. `looks` draws that, `rng` when absent:
    with the same `rng` and other `looks`, the same scenes look different.
    """
    task, copies = env.task, min(COPIES, count)
    world = MujocoSimulation(task, copies, cameras=env.cameras, image_size=env.image_size)
    shape = (count, env.image_size, env.image_size, 3)
    images = {name: np.empty(shape, np.uint8) for name in env.cameras}
    states = np.empty((count, env.state_dim), np.float32)
    labels = np.empty((count, env.privileged_dim), np.float32)
    instructions: list[str] = []
    scales, nominal = randomise.scales(appearance), randomise.nominal_of(env.variant)
    looks = looks or rng
    for start in range(0, count, copies):
        ids = np.arange(min(copies, count - start))
        rows = slice(start, start + len(ids))
        configurations = [
            {
                **regions.draw(rng, task, env.regions[("id", "ood")[rng.integers(2)]]),
                "joints": [0.0] * kinematics.JOINTS,
                "draw": randomise.draw(looks, scales, nominal, task.things),
                **draw_errand(rng, env.errands),
            }
            for _ in ids
        ]
        instructions += [c.get(INSTRUCTION, env.instruction) for c in configurations]
        world.configure(ids, configurations)
        now = _place(world, task, ids, configurations, rng)
        lead = 0.01 * rng.normal(size=(len(ids), 3))
        actions = np.zeros((len(ids), 2, 7))
        actions[:, :, 6] = (now.width > task.grasp.width + 0.01)[:, None]
        states[rows] = state_vector(now, now.tcp + lead, now.tcp_turn, actions)
        labels[rows] = task.privileged(now)
        if env.cameras:
            hidden = task.hidden(now.memory)
            if hidden:
                world.hide(ids, hidden)
            for name, frames in world.images(ids).items():
                images[name][rows] = frames
    return InstructedScenes(images, states, labels, instructions)


def _place(
    world: MujocoSimulation,
    task: Task,
    ids: np.ndarray,
    configurations: list[dict[str, Any]],
    rng: np.random.Generator,
) -> Snapshot:
    """Put the arm and the grasped thing of `ids` (n,) somewhere plausible; the state that this makes."""
    count = len(ids)
    things = [roles(task, configuration) for configuration in configurations]
    kinds = rng.choice(len(KINDS), size=count, p=SHARES)
    reach, hover, carry, at_goal, _ = (kinds == k for k in range(len(KINDS)))
    share = rng.uniform(size=count)
    if not task.finish.released:  # a tool is in the hand wherever it is used
        carry, at_goal = carry | at_goal, np.zeros(count, bool)
        over = carry & ((kinds == KINDS.index("goal")) | (share < OVER))
    else:
        over = carry & (share < OVER)
    low = carry & ~over & (share < OVER + LOW)
    start = world.snapshot(ids)
    memory = _used(world, task, ids, rng)
    if ERRAND in memory:
        memory[ERRAND][:] = [errand_number(task, configuration) for configuration in configurations]
    (thing, thing_turn), (goal, goal_turn) = (
        [np.array([values[names[role]][i] for i, names in enumerate(things)]) for values in poses]
        for role, poses in enumerate([(start.position, start.turn)] * 2)
    )
    finished, finished_turn = _finish(task, goal, goal_turn, rng)

    # Somewhere, and then what the kind asks for.
    tip = rng.uniform(*BOX, size=(count, 3)) * [1, 1, 0.7]
    tip[:, 0] = np.clip(tip[:, 0], 0.33, 0.72)
    yaw = rng.uniform(-1, 1, count)
    finger = np.where(rng.uniform(size=count) < 0.8, arm.FINGER_RANGE, task.grasp.width / 2 - GRIP)

    # Low over the thing the hand must be straight above it, or its fingers would be inside.
    gripping, grip_turn = _gripping(task, thing, thing_turn, rng)
    height = rng.uniform(0.0, 0.1, count)
    tip[reach] = (gripping + _aside(rng, 0.006 + 0.4 * height, height))[reach]
    yaw[reach] = (rotation.yaw(grip_turn) + 0.15 * rng.normal(size=count))[reach]
    above = rng.uniform(0.08, 0.22, count)
    tip[hover] = (gripping + _aside(rng, np.full(count, 0.05), above))[hover]
    finger[reach] = arm.FINGER_RANGE
    tip[low] = (gripping + _aside(rng, np.zeros(count), rng.uniform(0.0, 0.1, count)))[low]
    yaw[low] = rotation.yaw(grip_turn)[low]

    lift = rng.uniform(0.0, 0.13, count)
    in_use = over & (rng.uniform(size=count) < USED) & (not task.finish.released)
    lift[in_use] = 0.0
    releasing, release_turn = _gripping(task, finished, finished_turn, rng)
    tip[over] = (releasing + _aside(rng, np.where(in_use, 0.0, 0.002 + 0.2 * lift), lift))[over]
    yaw[over] = (rotation.yaw(release_turn) + lift * rng.normal(size=count))[over]
    leave = rng.uniform(0.02, 0.15, count)
    tip[at_goal] = (releasing + _aside(rng, 0.2 * leave, leave))[at_goal]
    finger[at_goal] = arm.FINGER_RANGE
    finger[carry] = task.grasp.width / 2 - GRIP

    tip[:, 2] = np.maximum(tip[:, 2], BOX[0, 2])
    tilt = np.column_stack([rng.normal(0.0, 0.1, (count, 2)), np.zeros(count)])
    tilt[over] *= (lift / 0.15)[over, None]
    wanted = rotation.about_z(yaw) @ rotation.exp(tilt) @ kinematics.DOWN
    joints = np.tile(kinematics.HOME, (count, 1))
    joints = kinematics.solve(joints, tip, wanted, iterations=12)
    tcp, tool = kinematics.forward(joints)
    held, held_turn = _held(task, tcp, tool, rng)
    grasped = np.array([names[0] for names in things])
    _put(world, ids, grasped, carry, held, held_turn)
    dropped = at_goal & (rng.uniform(size=count) < FINISHED)
    _put(world, ids, grasped, dropped, finished, finished_turn)
    pressed = finished - [0.0, 0.0, GRIP]
    _put(world, ids, grasped, in_use, pressed, finished_turn)
    world.place_arm(ids, joints, finger)
    world.batch.forward(ids)  # contacts too
    return world.snapshot(ids)._replace(memory=memory)


def _put(
    world: MujocoSimulation,
    ids: np.ndarray,
    grasped: np.ndarray,
    where: np.ndarray,
    position: np.ndarray,
    turn: np.ndarray,
) -> None:
    """Place each simulation's grasped thing, named by `grasped` (n,), in those of `where` (n,) bool."""
    for name in np.unique(grasped[where]):
        rows = where & (grasped == name)
        world.place(ids[rows], str(name), position[rows], turn[rows])


def _aside(rng: np.random.Generator, spread: np.ndarray, height: np.ndarray) -> np.ndarray:
    """Offsets (n, 3): random to the side by `spread` (n,), and `height` (n,) up, all in m."""
    return np.column_stack([spread[:, None] * rng.normal(size=(len(spread), 2)), height])


def _gripping(
    task: Task, position: np.ndarray, turn: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Where the hand is (n, 3), (n, 3, 3) when it holds the thing there, by one of the yaws that are equal."""
    turns = max(task.grasp.turns, 1)
    extra = 2 * np.pi / turns * rng.integers(turns, size=len(position))
    if task.grasp.turns == 0:
        extra = rng.uniform(-np.pi, np.pi, len(position))
    yaw = rotation.yaw(turn) + task.grasp.yaw + extra
    # Of a yaw and its opposite the arm takes the nearer one, where both are equal.
    if turns % 2 == 0:
        yaw = rotation.wrap_half_turn(yaw)
    offset = (rotation.about_z(yaw - task.grasp.yaw) @ np.array(task.grasp.position)[:, None])[
        ..., 0
    ]
    return position + offset, rotation.about_z(yaw) @ kinematics.DOWN


def _held(
    task: Task, tcp: np.ndarray, tool: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Where the thing is (n, 3), (n, 3, 3) in a hand at `tcp`, which holds it a little off."""
    count = len(tcp)
    turns = max(task.grasp.turns, 1)
    extra = 2 * np.pi / turns * rng.integers(turns, size=count)
    upright = tool @ kinematics.DOWN @ rotation.exp(TILT * rng.normal(size=(count, 3)))
    turn = upright @ rotation.about_z(extra - task.grasp.yaw)
    grip = tcp + (tool @ (SLIP * rng.normal(size=(count, 3)))[..., None])[..., 0]
    return grip - (turn @ np.array(task.grasp.position)[:, None])[..., 0], turn


def _finish(
    task: Task, goal: np.ndarray, goal_turn: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Where the grasped thing (n, 3), (n, 3, 3) could be when the task is done, with its goal (n, 3), (n, 3, 3)."""
    count, turns = len(goal), task.finish.turns
    away = rng.uniform(-1, 1, (count, 2)) * task.finish.spread
    place = np.column_stack([away, np.zeros(count)]) + task.finish.position
    if turns:
        yaw = task.finish.yaw + 2 * np.pi / turns * rng.integers(turns, size=count)
    else:
        yaw = rng.uniform(-np.pi, np.pi, count)
    return goal + (goal_turn @ place[..., None])[..., 0], goal_turn @ rotation.about_z(yaw)


def _used(
    world: MujocoSimulation, task: Task, ids: np.ndarray, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """What the task remembers after the thing made a straight stroke, or part of one, between places of use."""
    count = len(ids)
    memory = {name: np.zeros((count, *m.shape), m.dtype) for name, m in task.memory.items()}
    if task.finish.released:
        return memory
    start = world.snapshot(ids)
    goal = start.position[task.goal], start.turn[task.goal]
    first, turn = _finish(task, *goal, rng)
    last, _ = _finish(task, *goal, rng)
    uses = rng.integers(USES + 1, size=count)
    for k in range(uses.max(initial=0)):
        position = first + k / USES * (last - first) - [0.0, 0.0, GRIP]
        world.place(ids, task.grasped, position, turn)
        world.batch.forward(ids)
        new = task.remember(world.snapshot(ids)._replace(memory=memory))
        for name, value in new.items():
            memory[name][uses > k] = value[uses > k]
    world.place(ids, task.grasped, start.position[task.grasped], start.turn[task.grasped])
    return memory
