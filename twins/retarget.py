"""Expansion without an expert: one demonstration, replayed where things lie differently.

As in MimicGen, a demonstration is cut at grasp and release. The part around the grasp moves with the grasped thing,
the part around the release with the goal, and straight lines join them; where the hand keeps the thing to the end,
all that follows the grasp moves with the goal. A tracker turns the poses into closed-loop actions; the simulation
decides whether the result is a success worth keeping.

Where the thing has to fit, a demonstration's own accuracy would not do: its poses were measured, and the thing is
never held twice in the same way. The simulation knows how it is held now, so the part around the release is moved
until the thing, as it is held, ends exactly in its place; and a tool is kept level where it is used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from twins import kinematics, rotation
from twins.env import TwinEnv, clip_action
from twins.errands import ERRAND, roles
from twins.observe import STATE_NAMES
from twins.snapshot import Snapshot
from twins.tasks.task import Task

NEAR = 0.08  # m around grasp and release within which the demonstrated path is kept
SPACING = 0.004  # m, poses closer than this to the one before are pauses and are left out
REACHED, REACHED_TURN = 0.015, 0.12  # m, rad: near enough to a pose to make for the next
ARRIVED, ARRIVED_TURN = 0.01, 0.12  # m, rad: the arm itself stands where it should
FINE = 0.2  # of these, where the thing has to fit
SMOOTH = (
    3.0  # steps, standard deviation of the window over which noise of a demonstration is averaged
)
STILL = 0.0015  # m per step, fingers that move less have closed or opened
PATIENCE = 8  # steps at most that a pose is waited for
PUSH, PUSHES = (
    2.0,
    20,
)  # a thing that sticks is pushed: so much further than it has to go, for so many steps
STRAIGHT = 0.05  # m above its place, from where on it goes straight down
USED, PRESS = (
    0.012,
    0.004,
)  # m: a tool is in use below this over its lowest; how far it is pressed on
RISE = 0.06  # m, in the end the open hand leaves upwards

_TCP = STATE_NAMES.index("tcp_x")
_TURN = STATE_NAMES.index("tcp_turn_x")
_LEAD = STATE_NAMES.index("lead_x")
_LEAD_TURN = STATE_NAMES.index("lead_turn_x")


class Demonstration(NamedTuple):
    """Commanded poses of one successful episode of T steps, and the configuration it was played in."""

    targets: np.ndarray  # (T, 3) m
    turns: np.ndarray  # (T, 3, 3)
    gripper: np.ndarray  # (T,) commanded opening, 0 .. 1
    configuration: dict[str, Any]

    @classmethod
    def of(
        cls, states: np.ndarray, actions: np.ndarray, configuration: dict[str, Any]
    ) -> Demonstration:
        """From `observation.state` after each step (T, S) and the executed actions (T, 7).

        States tell where the hand was meant to be, but with the noise of a measurement; the actions tell exactly how
        that changed, but a disturbance adds up. So what the states say beyond the actions is averaged over time.
        """
        after, actions = np.asarray(states, float), np.asarray(actions, float)
        targets = after[:, _TCP : _TCP + 3] + after[:, _LEAD : _LEAD + 3]
        turns = rotation.exp(after[:, _TURN : _TURN + 3]) @ kinematics.DOWN
        turns = rotation.exp(after[:, _LEAD_TURN : _LEAD_TURN + 3]) @ turns
        step = np.arange(len(targets))
        weight = np.exp(-0.5 * ((step[:, None] - step) / SMOOTH) ** 2)
        weight /= weight.sum(axis=1, keepdims=True)
        moved = np.cumsum(actions[:, :3], axis=0)
        turned = [np.eye(3)]
        for change in rotation.exp(actions[:, 3:6]):
            turned.append(change @ turned[-1])
        turned = np.array(turned[1:])
        beyond = np.einsum("ts,sij->tij", weight, turned.swapaxes(1, 2) @ turns)
        left, _, right = np.linalg.svd(beyond)
        return cls(
            targets=moved + weight @ (targets - moved),
            turns=turned @ left @ right,
            gripper=actions[:, 6],
            configuration=configuration,
        )


class Plan(NamedTuple):
    """Poses to pass through in order, L of them. At a gate the arm itself must arrive and the fingers rest."""

    targets: np.ndarray  # (L, 3) m
    turns: np.ndarray  # (L, 3, 3)
    gripper: np.ndarray  # (L,)
    gates: np.ndarray  # (L,) bool
    bringing: int  # from here on poses go with the goal
    release: int  # the last one before the thing is let go, or the last
    fit: tuple[np.ndarray, float] | None  # where a thing that has to fit ends: (3,) m, and its yaw
    used: np.ndarray  # (L,) bool, a tool is in use
    level: float  # m, height of its origin then


class Motion(NamedTuple):
    """A turn about the vertical line through `pivot`, which itself goes to `moved`."""

    angle: float  # rad
    pivot: np.ndarray  # (3,) m
    moved: np.ndarray  # (3,) m

    def apply(self, points: np.ndarray, turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions (T, 3) in m and orientations (T, 3, 3), moved."""
        turn = rotation.about_z(self.angle)
        return (points - self.pivot) @ turn.T + self.moved, turn @ turns


def retarget(demonstration: Demonstration, configuration: dict[str, Any], task: Task) -> Plan:
    """The plan that does in `configuration` what the demonstration did in its own."""
    targets, turns, gripper, _ = demonstration
    released = task.finish.released
    grasp, release = _cuts(gripper, released)
    motions = _motions(demonstration, configuration, task, grasp, release)
    taking, bringing = (motion.apply(targets, turns) for motion in motions)
    # Each part is the stretch around grasp or release that never leaves the neighbourhood.
    step = np.arange(len(targets))
    away = np.linalg.norm(targets - targets[grasp], axis=1) > NEAR
    far = np.linalg.norm(targets - targets[release], axis=1) > NEAR
    begun = 1 + max(step[away & (step < grasp)], default=-1)
    lifted = min(step[away & (step > grasp)], default=release)
    lowered = 1 + max(step[far & (step < release)], default=-1) if released else 0
    ended = min(step[far & (step > release)], default=len(step))
    approach = _thinned(targets, step[begun:grasp])
    lift = _thinned(targets, step[grasp + 1 : lifted])
    lower = _thinned(targets, step[max(lifted, lowered) : release])
    fit, lined_up = None, lower[:1]
    if released and task.finish.turns and not any(task.finish.spread):
        fit = (
            motions[1].moved,
            _pose(configuration, task, roles(task, configuration)[1])[1] + task.finish.yaw,
        )
        bringing, straight = _straightened(*bringing, release, lower)
        lower = [t for t in lower if t < min(straight, default=release)] + straight
        lined_up = straight[:1]
    leave = _thinned(targets, step[release + 1 : ended])
    rows = [
        *((taking, t, 1.0, False) for t in approach),
        (taking, grasp, 1.0, True),
        (taking, grasp, 0.0, True),
        *((taking, t, 0.0, False) for t in lift),
        *((bringing, t, 0.0, t in lined_up) for t in lower),
        (bringing, release, 0.0, True),
        *([(bringing, release, 1.0, True)] if released else []),
        *((bringing, t, 1.0, False) for t in leave),
    ]
    if released:
        places, turned = bringing
        last = rows[-1][1]
        up = places.copy(), turned
        up[0][last, 2] += RISE
        rows.append((up, last, 1.0, False))
    begin = len(approach) + 2 + len(lift)
    targets = np.array([places[t] for (places, _), t, _, _ in rows])
    used = np.zeros(len(targets), bool)
    if not released:
        heights = targets[begin:, 2]
        used[begin:] = heights < np.quantile(heights, 0.25) + USED
    return Plan(
        targets,
        np.array([turned[t] for (_, turned), t, _, _ in rows]),
        np.array([opening for _, _, opening, _ in rows]),
        np.array([gate for _, _, _, gate in rows]),
        begin,
        begin + len(lower),
        fit,
        used,
        motions[1].moved[2],
    )


def _straightened(
    places: np.ndarray, turns: np.ndarray, release: int, lower: list[int]
) -> tuple[tuple[np.ndarray, np.ndarray], list[int]]:
    """The poses, those of the steps `lower` that are near the release straight above it, and which those are."""
    places, turns = places.copy(), turns.copy()
    straight: list[int] = []
    for t in lower:
        height = places[t, 2] - places[release, 2]
        if height < STRAIGHT and (not straight or places[t, 2] < places[straight[-1], 2]):
            straight.append(t)
    later = [t for t in lower if straight and t >= straight[0]]
    places[later, :2], turns[later] = places[release, :2], turns[release]
    return (places, turns), straight


def _cuts(gripper: np.ndarray, released: bool) -> tuple[int, int]:
    """Steps of the first closing command and of the first opening one after it, or of the end."""
    closed = np.flatnonzero(gripper < 0.5)
    if not len(closed):
        raise ValueError("the demonstration never grasps, so it cannot be split")
    if not released:
        return int(closed[0]), len(gripper) - 1
    opened = np.flatnonzero(gripper[closed[0] :] > 0.5)
    if not len(opened):
        raise ValueError("the demonstration never grasps and releases, so it cannot be split")
    return int(closed[0]), int(closed[0] + opened[0])


def _motions(
    demonstration: Demonstration,
    configuration: dict[str, Any],
    task: Task,
    grasp: int,
    release: int,
) -> tuple[Motion, Motion]:
    """How the hand's poses move around the grasp and around the release.

    Of the yaws that do equally well, by the symmetry of the grasp and of the finish, those that keep the hand
    nearest to yaw 0, so that the arm reaches them.
    """
    shown, turns = demonstration.configuration, demonstration.turns
    (thing, yaw), (goal, goal_yaw) = (_pose(shown, task, t) for t in roles(task, shown))
    (new_thing, new_yaw), (new_goal, new_goal_yaw) = (
        _pose(configuration, task, t) for t in roles(task, configuration)
    )
    by, goal_by = new_yaw - yaw, new_goal_yaw - goal_yaw
    hand = rotation.yaw(turns[grasp]), rotation.yaw(turns[release])
    best, least = (0.0, 0.0, 0.0), np.inf
    for extra in _equal(task.grasp.turns):
        for other in _equal(task.finish.turns):
            # Grasped `extra` further round, it is carried and put down that much further round.
            taken = rotation.wrap(by + extra, 2 * np.pi)
            brought = rotation.wrap(goal_by + other + extra, 2 * np.pi)
            if task.finish.turns == 0:  # a thing that may lie any way is not turned on its way
                brought = taken
            bend = max(
                abs(rotation.wrap(angle + motion, 2 * np.pi))
                for angle, motion in zip(hand, (taken, brought), strict=True)
            )
            if bend < least - 1e-9:
                best, least = (taken, brought, goal_by + other), bend
    taken, brought, around = best
    place = np.array(task.finish.position)
    end = goal + rotation.about_z(goal_yaw) @ place
    new_end = new_goal + rotation.about_z(goal_yaw + around) @ place
    return Motion(taken, thing, new_thing), Motion(brought, end, new_end)


def _equal(turns: int) -> np.ndarray:
    """The yaws (rad) of a symmetry."""
    return 2 * np.pi / max(turns, 1) * np.arange(max(turns, 1))


def _pose(configuration: dict[str, Any], task: Task, name: str) -> tuple[np.ndarray, float]:
    """Where a thing starts: (3,) m, and its yaw in rad."""
    x, y, *yaw = configuration[name]
    height = next(thing.height for thing in task.things if thing.name == name)
    return np.array([x, y, height]), float(yaw[0]) if yaw else 0.0


def _thinned(targets: np.ndarray, steps: np.ndarray) -> list[int]:
    """`steps` without those whose target lies within SPACING of the one kept before."""
    kept: list[int] = []
    for t in steps:
        if not kept or np.linalg.norm(targets[t] - targets[kept[-1]]) > SPACING:
            kept.append(int(t))
    return kept


class Tracker:
    """Follows one plan in each environment of a `TwinEnv`; call `actions` once per control step."""

    def __init__(self, env: TwinEnv, demonstrations: list[Demonstration], seed: int = 0):
        if not demonstrations:
            raise ValueError("demonstrations is empty, at least one is needed")
        self._env, self._demonstrations = env, demonstrations
        self._rng = np.random.default_rng(seed)
        self._configurations: list[dict[str, Any]] = []
        self._plans: list[Plan | None] = [None] * env.num_envs
        self._fitted: list[Plan | None] = [None] * env.num_envs  # to how the thing is held
        self._at = np.zeros(env.num_envs, int)
        self._waited = np.zeros(env.num_envs, int)
        self._width = np.zeros(env.num_envs)

    def begin(self, mask: np.ndarray | None = None) -> None:
        """Plan the present episodes, of the environments in `mask` (N,) or of all."""
        self._configurations = configurations = self._env.configurations()
        for i in range(self._env.num_envs) if mask is None else np.flatnonzero(mask):
            wanted = configurations[i].get(ERRAND)
            # Of another errand where nobody has shown this one: things of one task are held alike.
            shown = [d for d in self._demonstrations if d.configuration.get(ERRAND) == wanted]
            shown = shown or self._demonstrations
            demonstration = shown[self._rng.integers(len(shown))]
            plan = retarget(demonstration, configurations[i], self._env.task)
            self._plans[i] = self._fitted[i] = plan
            self._at[i] = self._waited[i] = 0

    def actions(self, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """The clean actions to learn from and the disturbed ones to execute, both (N, 7) float32."""
        env = self._env
        now = env.snapshot()
        target, turn = env.targets()
        still = np.abs(now.width - self._width) < STILL
        self._width = now.width
        clean = np.zeros((env.num_envs, 7))
        for i, original in enumerate(self._plans):
            if original is None:
                continue
            if original.fit is not None and original.bringing <= self._at[i] <= original.release:
                pushed = PUSH if self._at[i] == original.release else 0.0
                thing = roles(env.task, self._configurations[i])[0]
                self._fitted[i] = _fitted(original, env.task, thing, now, i, pushed)
            elif original.used[self._at[i]]:
                thing = roles(env.task, self._configurations[i])[0]
                self._fitted[i] = _levelled(original, thing, now, i)
            plan = self._fitted[i]
            self._advance(i, plan, target[i], turn[i], now, bool(still[i]))
            k = self._at[i]
            clean[i, :3] = plan.targets[k] - target[i]
            clean[i, 3:6] = rotation.log(plan.turns[k] @ turn[i].T)
            clean[i, 6] = plan.gripper[k]
        clean = clip_action(clean)
        return clean.astype(np.float32), env.disturb(clean, noise).astype(np.float32)

    def _advance(
        self, i: int, plan: Plan, target: np.ndarray, turn: np.ndarray, now: Snapshot, still: bool
    ) -> None:
        """Go on to the first pose of environment i's plan that is not done with."""
        while self._at[i] < len(plan.gates) - 1:
            k = self._at[i]
            scale = FINE if plan.fit is not None and k >= plan.bringing else 1.0
            if not _close(plan, k, target, turn, scale * REACHED, scale * REACHED_TURN):
                return
            if plan.gates[k]:
                self._waited[i] += 1
                near, near_turn = scale * ARRIVED, scale * ARRIVED_TURN
                arrived = _close(plan, k, now.tcp[i], now.tcp_turn[i], near, near_turn)
                # A gripper command has to be waited for: a delayed one leaves the fingers still at first.
                moves = k > 0 and plan.gripper[k] != plan.gripper[k - 1]
                rested = arrived and still and self._waited[i] > (4 if moves else 0)
                sticks = plan.fit is not None and k == plan.release
                if not rested and self._waited[i] < (PUSHES if sticks else PATIENCE):
                    return
            self._at[i] += 1
            self._waited[i] = 0
        if plan.used.any() and _close(plan, self._at[i], target, turn, REACHED, REACHED_TURN):
            self._at[i] = np.argmax(plan.used)  # what a tool has left over it goes over again


def _fitted(plan: Plan, task: Task, name: str, now: Snapshot, i: int, pushed: float) -> Plan:
    """The plan, its part around the release moved so that the thing, as environment i's hand holds it, will fit."""
    assert plan.fit is not None
    place, yaw = plan.fit
    thing, thing_turn = now.position[name][i], now.turn[name][i]
    # The thing upright at each yaw that fits, and the hand with it; the hand that has to turn least is taken.
    fitting = rotation.about_z(yaw + _equal(task.finish.turns)) @ thing_turn.T
    hands = fitting @ now.tcp_turn[i]
    twists = hands @ plan.turns[plan.release].T
    least = np.argmin(rotation.norm(rotation.log(twists)))
    shift = place + fitting[least] @ (now.tcp[i] - thing) - plan.targets[plan.release]
    shift = shift + pushed * (place - thing)
    targets, turns = plan.targets.copy(), plan.turns.copy()
    targets[plan.bringing :] += shift
    turns[plan.bringing :] = twists[least] @ turns[plan.bringing :]
    return plan._replace(targets=targets, turns=turns)


def _levelled(plan: Plan, name: str, now: Snapshot, i: int) -> Plan:
    """The plan, the tool as environment i's hand holds it level where it is used, and pressed on."""
    thing, thing_turn = now.position[name][i], now.turn[name][i]
    upright = rotation.about_z(rotation.yaw(thing_turn)) @ thing_turn.T
    hand = upright @ now.tcp_turn[i]
    targets, turns = plan.targets.copy(), plan.turns.copy()
    targets[plan.used, 2] = plan.level - PRESS + (upright @ (now.tcp[i] - thing))[2]
    onward = rotation.yaw(turns[plan.used]) - rotation.yaw(hand)
    turns[plan.used] = rotation.about_z(onward) @ hand
    return plan._replace(targets=targets, turns=turns)


def _close(
    plan: Plan, k: int, position: np.ndarray, turn: np.ndarray, distance: float, angle: float
) -> bool:
    """Whether a pose lies within `distance` (m) and `angle` (rad) of the plan's k-th."""
    far = np.linalg.norm(plan.targets[k] - position) > distance
    return not far and np.linalg.norm(rotation.log(plan.turns[k] @ turn.T)) <= angle
