"""`twinrl tasks`: what there is to learn, and the simulators to learn it in."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from rich.table import Table
from rich.text import Text

from deploy.replay_command import say
from twinrl.core.errors import ConfigError


def command(argv: list[str]) -> int:
    """The command `twinrl tasks`."""
    parser = argparse.ArgumentParser(
        prog="twinrl tasks",
        description="List the tasks, or tell all about one; and the simulators that can play them.",
        epilog="examples:\n"
        "  twinrl tasks\n"
        "  twinrl tasks insert-hexagon-block\n"
        "  twinrl tasks --simulators\n"
        "  twinrl tasks --json | jq -r '.[].name'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "task", nargs="?", metavar="TASK", help="one of them; default: all, a line each"
    )
    parser.add_argument("--simulators", action="store_true", help="list the simulators instead")
    parser.add_argument("--json", action="store_true", help="for programs, with everything")
    arguments = parser.parse_args(argv)
    if arguments.task and arguments.simulators:
        raise ConfigError("name a task or ask for --simulators, not both")
    if arguments.simulators:
        rows = simulators()
        print(json.dumps(rows)) if arguments.json else say(_simulator_table(rows))
        return 0
    from twins.tasks import task_names

    names = [arguments.task] if arguments.task else task_names()
    rows = [describe_task(name) for name in names]
    if arguments.json:
        print(json.dumps(rows[0] if arguments.task else rows))
    elif arguments.task:
        say(_task_table(rows[0]))
    else:
        say(
            _list_table(rows),
            Text("`twinrl tasks TASK` tells more, `twinrl play TASK` shows one", style="dim"),
        )
    return 0


def describe_task(name: str) -> dict[str, Any]:
    """Everything about a task that is data; ConfigError where there is none of that name."""
    from twins.errands import errands_of
    from twins.scene import CONTROL_HZ
    from twins.tasks import TASKS, make_task

    try:
        task = make_task(name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    described = (type(task).__doc__ or "").strip().splitlines()
    return {
        "name": name,
        "built_in": name in TASKS,
        "success": described[0] if described else "",
        "instructions": list(task.instructions),
        "errands": {errand.name: errand._asdict() for errand in errands_of(task)},
        "max_steps": task.max_steps,
        "seconds": task.max_steps / CONTROL_HZ,
        "things": {thing.name: "free" if thing.free else "fixed" for thing in task.things},
        "grasped": task.grasped,
        "goal": task.goal,
        "regions": {
            region: {thing: box._asdict() for thing, box in boxes.items()}
            for region, boxes in task.regions.items()
        },
        "terms": list(task.term_names),
        "privileged": list(task.privileged_names),
        "remembers": list(task.memory),
        "randomisation": dict(task.randomisation),
    }


def _list_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for column in ("task", "instruction", "limit", "things", "regions", "dense terms"):
        table.add_column(
            column, justify="right" if column == "limit" else "left", no_wrap=column == "task"
        )
    for row in rows:
        table.add_row(
            Text(row["name"]),
            Text(row["instructions"][0]),
            Text(f"{row['seconds']:g} s"),
            Text(", ".join(row["things"])),
            Text(", ".join(row["regions"])),
            Text(", ".join(row["terms"])),
        )
    return table


def _task_table(row: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")

    def add(name: str, text: str) -> None:
        table.add_row(name, Text(text))

    add("task", row["name"] + ("" if row["built_in"] else ", of another package"))
    add("success", row["success"])
    for i, instruction in enumerate(row["instructions"]):
        add("" if i else "instruction", instruction)
    for i, (name, errand) in enumerate(row["errands"].items()):
        told, tested = len(errand["instructions"]), len(errand["held_out"])
        text = f'{name}: "{errand["instructions"][0]}", {told} wordings and {tested} held out'
        add("" if i else "errands", text)
    add("time limit", f"{row['max_steps']} steps, {row['seconds']:g} s")
    things = (f"{name} ({kind})" for name, kind in row["things"].items())
    takes = f"the hand takes the {row['grasped']} to the {row['goal']}"
    add("things", f"{', '.join(things)}; {'what is asked for' if row['errands'] else takes}")
    for region, boxes in row["regions"].items():
        for i, (thing, box) in enumerate(boxes.items()):
            add("" if i else f"region {region}", f"{thing}: {_span(box)}")
    add("dense terms", ", ".join(row["terms"]) or "none")
    add("remembers", ", ".join(row["remembers"]) or "nothing: the present state says it all")
    less = ", ".join(
        f"{name} at {scale:g} of its range" for name, scale in row["randomisation"].items()
    )
    add("randomisation", less or "everything over its full range")
    add("privileged", ", ".join(row["privileged"]))
    return table


def _span(box: dict[str, Any]) -> str:
    turn = tuple(math.degrees(angle) for angle in box["yaw"])
    yaw = f", yaw {turn[0]:.0f} to {turn[1]:.0f} degrees" if turn != (0.0, 0.0) else ""
    return "x {:g} to {:g} m, y {:g} to {:g} m{}".format(*box["x"], *box["y"], yaw)


def simulators() -> list[dict[str, Any]]:
    """Every backend: what it plays and what it can do; `needs` says what is missing here."""
    from twins.backends import backend_names, find_backend

    rows = []
    for name in backend_names():
        row: dict[str, Any] = {"name": name, "needs": None, "capabilities": None}
        try:
            found = find_backend(name)
            row["our_tasks"] = found.is_simulation
            capabilities = getattr(found.load(), "capabilities", None)
            if capabilities is not None:
                row["capabilities"] = capabilities._asdict()
        except ImportError as error:
            row["needs"] = str(error)
        rows.append(row)
    return rows


def _simulator_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for column in ("simulator", "plays", "can"):
        table.add_column(column, no_wrap=column == "simulator")
    for row in rows:
        can = ", ".join(
            name.replace("_", " ") for name, value in (row["capabilities"] or {}).items() if value
        )
        plays = "our tasks" if row.get("our_tasks") else "tasks of its own"
        table.add_row(
            Text(row["name"]), Text(plays), Text(row["needs"] or can or "depends on what it runs")
        )
    return table
