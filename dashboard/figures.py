"""The headline figures of a snapshot: what `twinrl status` and the terminal progress show."""

from __future__ import annotations

import re
from typing import Any

from dashboard.record import as_number

EVALUATION = re.compile(r"^eval/([^/]+)/([^/]+)/([^/_]+)$")
ROBOT = re.compile(r"^robot/([^/]+)/(.+)$")
SOURCE = re.compile(r"^replay/transitions/(.+)$")

Snapshot = dict[str, Any]


def values(snapshot: Snapshot, role: str, figure: str) -> list[float]:
    """The last values of a figure over the processes of `role` that are alive."""
    found = (
        as_number(process["data"].get(figure))
        for process in snapshot["processes"]
        if process["role"] == role and process["status"] in ("running", "ended")
    )
    return [value for value in found if value is not None]


def newest(snapshot: Snapshot, figure: str, *roles: str) -> Any:
    """The value of a figure that was reported last, by the first of `roles` that has one."""
    for role in roles:
        holders = [
            process
            for process in snapshot["processes"]
            if process["role"] == role and figure in process["data"]
        ]
        if holders:
            return max(holders, key=lambda process: process["time"])["data"][figure]
    return None


def headline(snapshot: Snapshot) -> dict[str, Any]:
    """Stage, progress and rates of the whole run; None for what nobody reports."""
    over = snapshot["finished"] or snapshot.get("ended")
    last = max((process["time"] for process in snapshot["processes"]), default=snapshot["time"])
    start = snapshot["started"]
    stage = newest(snapshot, "run/stage", "run")
    progress = newest(snapshot, "run/progress", "run")
    return {
        "run": snapshot["run"],
        "elapsed_s": round((last if over else snapshot["time"]) - start, 1) if start else 0.0,
        "stage": stage or newest(snapshot, "learner/stage", "learner"),
        "progress": (
            newest(snapshot, "learner/progress", "learner") if progress is None else progress
        ),
        "env_steps_per_s": _total(values(snapshot, "actor", "env/steps_per_s")),
        "inserts_per_s": _total(values(snapshot, "replay", "replay/inserts_per_s")),
        "batches_per_s": _total(values(snapshot, "learner", "learner/batches_per_s")),
        "updates_per_s": _total(values(snapshot, "learner", "learner/updates_per_s")),
        "policy_version": max(values(snapshot, "learner", "policy/version"), default=None),
        "policy_lag": max(values(snapshot, "actor", "policy/lag"), default=None),
        "success_id": _mean(values(snapshot, "actor", "env/success_id")),
        "success_ood": _mean(values(snapshot, "actor", "env/success_ood")),
        "intervention_rate": newest(snapshot, "gateway/intervention_rate", "gateway"),
        "intervention_minutes": newest(snapshot, "gateway/intervention_minutes", "gateway"),
        "transitions": replay_size(snapshot),
    }


def replay_size(snapshot: Snapshot) -> dict[str, float]:
    """Stored transitions by source."""
    sizes: dict[str, float] = {}
    for process in snapshot["processes"]:
        for key, value in process["data"].items():
            if (match := SOURCE.match(key)) and as_number(value) is not None:
                sizes[match[1]] = sizes.get(match[1], 0.0) + value
    return sizes


def evaluations(snapshot: Snapshot) -> dict[str, dict[str, dict[str, Any]]]:
    """{stage: {"world/region": {"rate", "low", "high", "n"}}} of the last evaluation of each."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for process in snapshot["processes"]:
        for key, value in process["data"].items():
            if match := EVALUATION.match(key):
                ends = {end: process["data"].get(f"{key}_{end}") for end in ("low", "high", "n")}
                cell = {"rate": value, **ends}
                found.setdefault(match[1], {})[f"{match[2]}/{match[3]}"] = cell
    return found


def robots(snapshot: Snapshot) -> dict[str, dict[str, Any]]:
    """{robot: {"state", "minutes", ...}}; a robot whose process is silent has the state "silent"."""
    found: dict[str, dict[str, Any]] = {}
    for process in snapshot["processes"]:
        for key, value in process["data"].items():
            if match := ROBOT.match(key):
                found.setdefault(match[1], {})[match[2]] = value
        if process["status"] != "running":
            for name in {m[1] for key in process["data"] if (m := ROBOT.match(key))}:
                found[name]["state"] = process["status"]
    return found


def waiting_for(process: dict[str, Any]) -> str:
    """What a process says it waits for; "" when it does not."""
    reasons = (
        value
        for key, value in process["data"].items()
        if key.endswith(("/waiting", "/waiting_for")) and isinstance(value, str)
    )
    return next(filter(None, reasons), "")


def compact(value: Any, unit: str = "") -> str:
    """A number as people read it: 1234567 is 1.23M; "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g}{letter}{unit}"
    return f"{value:,.0f}{unit}" if abs(value) >= 100 else f"{value:.3g}{unit}"


def percent(value: float | None) -> str:
    """A rate as a whole percentage."""
    return "-" if value is None else f"{100 * value:.0f} %"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _total(found: list[float]) -> float | None:
    return sum(found) if found else None


def _mean(found: list[float]) -> float | None:
    return sum(found) / len(found) if found else None
