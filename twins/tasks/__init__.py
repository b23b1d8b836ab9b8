"""Tasks by name."""

from __future__ import annotations

import difflib

from twins.tasks.pick_and_place import PickAndPlace
from twins.tasks.task import Snapshot, Task

TASKS: dict[str, type] = {PickAndPlace.name: PickAndPlace}

__all__ = ["TASKS", "PickAndPlace", "Snapshot", "Task", "make_task"]


def make_task(name: str) -> Task:
    """The task called `name`."""
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, 1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown task {name!r}, not one of {sorted(TASKS)}{hint}")
    return TASKS[name]()
