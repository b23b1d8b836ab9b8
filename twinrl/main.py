"""The command line. Each command names a "module:function", so a role loads only what it needs."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from pathlib import Path

from twinrl import __version__
from twinrl.core.errors import TwinRLError
from twinrl.installed import OURS, cure, distribution, refuse_both
from twinrl.parent import die_with_parent

COMMANDS = {
    "launch": ("deploy.launch:command", "start a job, or go on with one"),
    "attach": ("robot_bridge.attach:main", "attach a robot to a running job"),
    "robots": ("deploy.robots_command:command", "list a job's robots; hold, release, detach, stop"),
    "run": ("deploy.run_command:command", "let a policy act on an arm, without a learner"),
    "teleop": ("robot_bridge.teleop:main", "try the device that a person takes over with"),
    "dashboard": ("dashboard.server:command", "show the page of a run, also of a finished one"),
    "status": ("dashboard.status:command", "show a run's figures on the terminal"),
    "tasks": ("deploy.tasks_command:command", "list the tasks and the simulators"),
    "play": ("deploy.play_command:command", "show a task: expert, random or a policy, as a video"),
    "eval": ("deploy.evaluation:command", "measure the success of a checkpoint"),
    "train": ("deploy.train_command:command", "train a policy offline on what a run recorded"),
    "replay": (
        "deploy.replay_command:command",
        "list, show, export or delete what the replay holds",
    ),
    "doctor": ("deploy.doctor:command", "check this machine and say how to mend what is missing"),
    "serve": ("deploy.roles:command", None),  # internal: one process of a job
}
EXAMPLES = (
    "launch configs/demo.yaml",
    "launch configs/demo.yaml twin_rl.steps=100000 name=short",
    "attach --robot sim --name arm --url tcp://127.0.0.1:7447 --key runs/demo/keys/robot.key",
    "status demo --watch",
)
# What a command is where the distribution for robot PCs has no more than this of it.
ROBOT_COMMANDS = {"doctor": "robot_bridge.doctor:command"}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code. Deliberate errors are printed without a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    examples = [f"  twinrl {line}" for line in EXAMPLES if _place(line.split()[0])]
    parser = argparse.ArgumentParser(
        prog="twinrl",
        description="Turn a robot's digital twin into a robot that works.",
        epilog="\n".join(["examples:", *examples, "`twinrl COMMAND --help` has more."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"{distribution()} {__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        options = {} if text is None or not _place(name) else {"help": text}
        commands.add_parser(name, add_help=False, **options)
    arguments, rest = parser.parse_known_args(argv[:1])
    if arguments.command is None:
        parser.print_help()
        return 2
    try:
        die_with_parent()
        refuse_both()
        _guard_packages()
        place = _place(arguments.command)
        if not place:
            raise TwinRLError(f"not installed: {cure(COMMANDS[arguments.command][0])}")
        module, function = place.split(":")
        return getattr(importlib.import_module(module), function)(rest + argv[1:]) or 0
    except TwinRLError as error:
        print(f"twinrl {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `twinrl status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _place(command: str) -> str:
    """The "module:function" of a command; empty where it is not installed."""
    for place in (COMMANDS[command][0], ROBOT_COMMANDS.get(command, "")):
        if place and importlib.util.find_spec(place.partition(".")[0]):
            return place
    return ""


def _guard_packages() -> None:
    """Our top-level names are common words: refuse to run with another distribution's `learner`."""
    home = Path(__file__).resolve().parent.parent
    for name in OURS:
        spec = importlib.util.find_spec(name)
        if spec is None:  # a robot PC has the light part only
            continue
        places = [Path(p).resolve().parent for p in spec.submodule_search_locations or ()]
        if home not in places:
            raise TwinRLError(
                f"package {name!r} comes from {places or spec.origin}, not from {home}: another "
                "distribution has the same name. Install TwinRL in a virtual environment of its own."
            )


if __name__ == "__main__":
    sys.exit(main())
