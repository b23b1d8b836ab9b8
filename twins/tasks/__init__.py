"""Tasks by name. Another package adds one by an entry point in the group `twinrl.tasks`."""

from __future__ import annotations

import difflib
from importlib.metadata import entry_points

from twins.tasks.erase_whiteboard import EraseWhiteboard
from twins.tasks.follow_instruction import FollowInstruction
from twins.tasks.insert_hexagon import InsertHexagonBlock
from twins.tasks.insert_triple_column import InsertTripleColumnBlock
from twins.tasks.pick_and_place import PickAndPlace
from twins.tasks.task import Snapshot, Task

GROUP = "twinrl.tasks"
TASKS: dict[str, type] = {
    task.name: task
    for task in (
        PickAndPlace,
        InsertHexagonBlock,
        InsertTripleColumnBlock,
        EraseWhiteboard,
        FollowInstruction,
    )
}

__all__ = ["TASKS", "Snapshot", "Task", "make_task", "task_names"]


def task_names() -> list[str]:
    """All tasks: the built-in ones, then other packages'."""
    return [*TASKS, *sorted({entry.name for entry in entry_points(group=GROUP)} - set(TASKS))]


def make_task(name: str) -> Task:
    """The task called `name`, built in or another package's."""
    if name in TASKS:
        return TASKS[name]()
    others = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name in others:
        return others[name].load()()
    known = sorted({*TASKS, *others})
    close = difflib.get_close_matches(name, known, 1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown task {name!r}, not one of {known}{hint}")
