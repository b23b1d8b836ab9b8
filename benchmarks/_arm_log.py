"""What the simulated arm's own log says of the set-points that reached it: their pace, the limits, when they rest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from robot_bridge.drivers import sim_arm
from robot_bridge.limits import Limits

PERIOD = 1.0 / sim_arm.RATE_HZ  # s between two set-points
BREAK_S = 0.15  # without a set-point: another episode
SLACK = 1 + 1e-6
RATES = (
    (slice(0, 3), ("speed", "acceleration", "jerk")),
    (slice(3, 6), ("turn_speed", "turn_acceleration", "turn_jerk")),
)
STEPS = ((slice(0, 3), "step_m"), (slice(3, 6), "step_rad"))


def set_points(path: Path) -> np.ndarray:
    """The log's rows of set-points, and of recoveries (`sim_arm.LOG`)."""
    rows = sim_arm.read_log(path)
    return rows[rows["kind"] != sim_arm.TICK]


def stretches(log: np.ndarray) -> list[np.ndarray]:
    """The log in parts within which set-points came without a break: an episode each, or what a fault left of it."""
    broken = (np.diff(log["time"]) > BREAK_S) | (log["kind"][1:] == sim_arm.RECOVERED)
    breaks = np.flatnonzero(broken) + 1
    return [part for part in np.split(log, breaks) if len(part) > 10]


def pace_errors(log: np.ndarray) -> np.ndarray:
    """ms by which the time between two set-points differs from the period."""
    parts = [np.abs(np.diff(part["time"]) - PERIOD) * 1e3 for part in stretches(log)]
    return np.concatenate(parts)


def exceeded(log: np.ndarray, limits: Limits | None = None) -> int:
    """Set-points beyond a limit of place, tilt, speed, acceleration or jerk."""
    limits, count = limits or Limits(), 0
    for part in stretches(log):
        path = part["setpoint"]
        depth = _depth(path[:, :3], limits)
        # A tool that begins outside, as after a fault, may come back, and go no deeper until then.
        inside = int(np.argmax(depth <= 0.0)) if (depth <= 0.0).any() else len(depth)
        count += int((depth[:inside] > depth[0]).sum() + (depth[inside:] > 0.0).sum())
        count += int((np.linalg.norm(path[:, 3:], axis=1) > limits.tilt_rad * SLACK).sum())
        for name, rates in _rates(path):
            count += int((rates > getattr(limits, name) * SLACK).sum())
    return count


def reached(log: np.ndarray, limits: Limits | None = None, ticks: int = 10) -> dict[str, float]:
    """The largest share of each limit; of a step's limits by how far `ticks` set-points lead."""
    limits = limits or Limits()
    found: dict[str, float] = {}
    for part in stretches(log):
        path = part["setpoint"]
        for name, rates in _rates(path):
            share = float(rates.max(initial=0.0)) / getattr(limits, name)
            found[name] = max(found.get(name, 0.0), share)
        for axes, name in STEPS:
            way = np.linalg.norm(path[ticks:, axes] - path[:-ticks, axes], axis=1)
            share = float(way.max(initial=0.0)) / getattr(limits, name)
            found[name] = max(found.get(name, 0.0), share)
    return found


def rest_ms(log: np.ndarray, when: float) -> float:
    """ms from `when` until set-points do not change for 0.1 s."""
    after = log[log["time"] >= when]
    moves = _moves(after)
    for k in range(len(moves) - 10):
        if not moves[k : k + 10].any():
            return float(after["time"][k] - when) * 1e3
    return float("inf")


def pause_ms(log: np.ndarray, when: float) -> float:
    """ms from `when` to the first of three set-points that are the same, or to a break: shorter than `rest_ms` may be."""
    after = log[log["time"] >= when]
    moves, gaps = _moves(after), np.diff(after["time"])
    for k in range(len(moves)):
        if gaps[k] > BREAK_S or not moves[k : k + 2].any():
            return float(after["time"][k] - when) * 1e3
    return float("inf")


def moves_at(log: np.ndarray, when: float) -> float:
    """When the first set-point after `when` was sent that differs from the one before it; s, infinite without one."""
    after = log[log["time"] >= when]
    found = np.flatnonzero(_moves(after))
    return float(after["time"][found[0] + 1]) if len(found) else float("inf")


def travelled(log: np.ndarray) -> float:
    """m that the set-points went."""
    ways = [np.diff(part["setpoint"][:, :3], axis=0) for part in stretches(log)]
    return float(sum(np.linalg.norm(way, axis=1).sum() for way in ways))


def _moves(log: np.ndarray) -> np.ndarray:
    return np.linalg.norm(np.diff(log["setpoint"], axis=0), axis=1) > 1e-9


def _rates(path: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    for axes, names in RATES:
        for order, name in enumerate(names, 1):
            rate = np.diff(path[:, axes], n=order, axis=0) / PERIOD**order
            yield name, np.linalg.norm(rate, axis=1)


def _depth(place: np.ndarray, limits: Limits) -> np.ndarray:
    """m by which positions (T, 3) are outside the workspace or in a box that must not be entered; 0 where they may be."""
    low, high = (np.array(corner) for corner in limits.workspace)
    depth = np.maximum(low - place, place - high).max(axis=1)
    for corners in limits.keep_out:
        low, high = (np.array(corner) for corner in corners)
        depth = np.maximum(depth, np.minimum(place - low, high - place).min(axis=1))
    return np.where(depth > 1e-6, depth, 0.0)
