"""`twinrl robots`: the arms of a running job, and what a person at the cluster may ask of them."""

from __future__ import annotations

import argparse

from deploy.run_folder import RunFolder
from robot_bridge.policy_link import PolicyLink
from twinrl.core.errors import ConfigError

ACTIONS = {
    "hold": "stand still until released",
    "release": "end a hold (never a stop)",
    "detach": "leave after the present episode",
    "estop": "a latched stop, which only a person at the robot releases",
}

# "by a person": the share of the last episodes' steps that a person commanded.
HEAD = (
    *("name", "kind", "state", "episodes", "success"),
    *("takeovers", "by a person", "minutes", "why"),
)


def command(argv: list[str]) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="twinrl robots",
        description="List the robots of a running job, or ask something of one.",
        epilog="actions:\n"
        + "\n".join(f"  {name:9}{text}" for name, text in ACTIONS.items())
        + "\n\nexamples:\n  twinrl robots demo\n  twinrl robots demo hold bench-1\n  twinrl robots demo pause"
        "\n\nA software stop is not a safety function: the robot's own stop button is.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="name or folder of a run")
    parser.add_argument("action", nargs="?", choices=[*ACTIONS, "pause", "resume"])
    parser.add_argument("robot", nargs="?", help="its name, for all but pause and resume")
    arguments = parser.parse_args(argv)
    if arguments.action in ACTIONS and not arguments.robot:
        raise ConfigError(f"{arguments.action} of which robot? Give its name")
    run = RunFolder.open(arguments.run)
    link = PolicyLink(run.topology()["gateway_internal"], run.keys("cluster"), timeout=5.0)
    try:
        if arguments.action in ("pause", "resume"):
            getattr(link, arguments.action)()
        elif arguments.action:
            link.command(arguments.robot, arguments.action)
        rows = link.robots()[0]
    finally:
        link.close()
    if not rows:
        print(f"no robot has been attached to {run.name}")
        return 0
    lines = [HEAD]
    for row in rows:
        success, helped = (
            "" if row[key] is None else f"{row[key]:.0%}"
            for key in ("success", "intervention_rate")
        )
        numbers = (
            f"{row['episodes']:.0f}",
            success,
            f"{row['takeovers']:.0f}",
            helped,
            f"{row['minutes']:.1f}",
        )
        state = f"{row['state']} (shadow)" if row["shadow"] and row["attached"] else row["state"]
        lines.append((row["name"], row["kind"], state, *numbers, row["reason"]))
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    for line in lines:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )
    return 0
