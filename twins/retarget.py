"""Expansion without an expert: one demonstration, replayed where things lie differently.

As in MimicGen, a demonstration is cut at grasp and release. The part around the grasp moves with the object, the
part around the release with the basket, and straight lines join them. A tracker turns the poses into closed-loop
actions; the simulation decides whether the result is a success worth keeping.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from twins import kinematics, rotation
from twins.env import STATE_NAMES, TwinEnv, clip_action
from twins.snapshot import Snapshot

NEAR = 0.08  # m around grasp and release within which the demonstrated path is kept
SPACING = 0.004  # m, poses closer than this to the one before are pauses and are left out
REACHED, REACHED_TURN = 0.015, 0.12  # m, rad: near enough to a pose to make for the next
ARRIVED, ARRIVED_TURN = 0.01, 0.12  # m, rad: the arm itself stands where it should
STILL = 0.0015  # m per step, fingers that move less have closed or opened
PATIENCE = 8  # steps at most that a pose is waited for

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
        """From `observation.state` after each step (T, S) and the executed actions (T, 7)."""
        after = np.asarray(states, float)
        turns = rotation.exp(after[:, _TURN : _TURN + 3]) @ kinematics.DOWN
        return cls(
            targets=after[:, _TCP : _TCP + 3] + after[:, _LEAD : _LEAD + 3],
            turns=rotation.exp(after[:, _LEAD_TURN : _LEAD_TURN + 3]) @ turns,
            gripper=np.asarray(actions, float)[:, 6],
            configuration=configuration,
        )


class Plan(NamedTuple):
    """Poses to pass through in order, L of them. At a gate the arm itself must arrive and the fingers rest."""

    targets: np.ndarray  # (L, 3) m
    turns: np.ndarray  # (L, 3, 3)
    gripper: np.ndarray  # (L,)
    gates: np.ndarray  # (L,) bool


def retarget(demonstration: Demonstration, configuration: dict[str, Any]) -> Plan:
    """The plan that does in `configuration` what the demonstration did in its own."""
    targets, turns, gripper, shown = demonstration
    grasp, release = _cuts(gripper)
    turn = rotation.about_z(configuration["object"][2] - shown["object"][2])
    pivot = np.array([*shown["object"][:2], 0.0])
    moved = np.array([*configuration["object"][:2], 0.0])
    with_object = (targets - pivot) @ turn.T + moved
    shift = np.subtract(configuration["basket"][:2], shown["basket"][:2])
    with_basket = targets + np.array([*shift, 0.0])
    # The hand's yaw goes with the object all the way: a carried object is not turned on its way.
    turns = turn @ turns

    def near(path: np.ndarray, at: int) -> np.ndarray:
        return np.linalg.norm(path - path[at], axis=1) < NEAR

    step = np.arange(len(targets))
    approach = _thinned(targets, step[(step < grasp) & near(targets, grasp)])
    lift = _thinned(targets, step[(step > grasp) & (step < release) & near(targets, grasp)])
    lower = _thinned(targets, step[(step > grasp) & (step < release) & near(targets, release)])
    lower = [t for t in lower if t > max(lift, default=grasp)]
    leave = _thinned(targets, step[(step > release) & near(targets, release)])
    rows = [
        *((with_object[t], t, 1.0, False) for t in approach),
        (with_object[grasp], grasp, 1.0, True),
        (with_object[grasp], grasp, 0.0, True),
        *((with_object[t], t, 0.0, False) for t in lift),
        *((with_basket[t], t, 0.0, False) for t in lower),
        (with_basket[release], release, 0.0, True),
        (with_basket[release], release, 1.0, True),
        *((with_basket[t], t, 1.0, False) for t in leave),
    ]
    places, times, opening, gates = zip(*rows, strict=True)
    return Plan(np.array(places), turns[list(times)], np.array(opening), np.array(gates))


def _cuts(gripper: np.ndarray) -> tuple[int, int]:
    """Steps of the first closing command and of the first opening one after it."""
    closed = np.flatnonzero(gripper < 0.5)
    opened = np.flatnonzero(gripper[closed[0] :] > 0.5) if len(closed) else closed
    if not len(opened):
        raise ValueError("the demonstration never grasps and releases, so it cannot be split")
    return int(closed[0]), int(closed[0] + opened[0])


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
        self._plans: list[Plan | None] = [None] * env.num_envs
        self._at = np.zeros(env.num_envs, int)
        self._waited = np.zeros(env.num_envs, int)
        self._width = np.zeros(env.num_envs)

    def begin(self, mask: np.ndarray | None = None) -> None:
        """Plan the present episodes, of the environments in `mask` (N,) or of all."""
        configurations = self._env.configurations()
        for i in range(self._env.num_envs) if mask is None else np.flatnonzero(mask):
            demonstration = self._demonstrations[self._rng.integers(len(self._demonstrations))]
            self._plans[i] = retarget(demonstration, configurations[i])
            self._at[i] = self._waited[i] = 0

    def actions(self, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """The clean actions to learn from and the disturbed ones to execute, both (N, 7) float32."""
        env = self._env
        now = env.snapshot()
        target, turn = env.targets()
        still = np.abs(now.width - self._width) < STILL
        self._width = now.width
        clean = np.zeros((env.num_envs, 7))
        for i, plan in enumerate(self._plans):
            if plan is None:
                continue
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
            if not _close(plan, k, target, turn, REACHED, REACHED_TURN):
                return
            if plan.gates[k]:
                self._waited[i] += 1
                arrived = _close(plan, k, now.tcp[i], now.tcp_turn[i], ARRIVED, ARRIVED_TURN)
                # A gripper command has to be waited for: a delayed one leaves the fingers still at first.
                moves = k > 0 and plan.gripper[k] != plan.gripper[k - 1]
                rested = arrived and still and self._waited[i] > (4 if moves else 0)
                if not rested and self._waited[i] < PATIENCE:
                    return
            self._at[i] += 1
            self._waited[i] = 0


def _close(
    plan: Plan, k: int, position: np.ndarray, turn: np.ndarray, distance: float, angle: float
) -> bool:
    """Whether a pose lies within `distance` (m) and `angle` (rad) of the plan's k-th."""
    far = np.linalg.norm(plan.targets[k] - position) > distance
    return not far and np.linalg.norm(rotation.log(plan.turns[k] @ turn.T)) <= angle
