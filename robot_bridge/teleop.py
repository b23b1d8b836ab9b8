"""`twinrl teleop`: try the device that a person takes over with, without robot and job."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from typing import Any

import numpy as np

from robot_bridge.driver import make_driver
from robot_bridge.operator import OPERATORS, Moment, Operator, make_operator
from robot_bridge.options import options_of
from robot_bridge.terminal import Terminal
from twinrl.core.errors import ConfigError

STEP = 0.1  # s, of a control step
EXAMPLES = """examples:
  twinrl teleop --operator spacemouse
  twinrl teleop --operator gamepad --operator-option view=180

Prints who would act, axes and buttons, the motion that an arm would be sent (mm and degrees a control step), and what
the buttons say. Nothing moves. Ctrl-C ends it. Unplug the device while you act: it has to say "stop"."""


def watch(operator: Operator, seconds: float, out: Any) -> None:
    """Print what `operator` says, for `seconds`, 0 until interrupted; one line rewritten in a terminal."""
    arm, zero = make_driver("point"), np.zeros(6)
    began, step, shown, gripper = time.monotonic(), 0, "", 1.0
    operator.begin()
    while not 0 < seconds < time.monotonic() - began:
        said = operator.marks()
        action = operator.act(Moment(step, zero[:3], arm, zero, gripper))
        gripper = gripper if action is None else float(action[6])
        line = f"{operator.reading()}  {_text(action)}"
        if said:
            print(f"{_end(out)}said: {', '.join(said)}", file=out, flush=True)
            shown = ""  # it was overwritten
        if line != shown:
            print(f"{_end(out)}{line}", file=out, flush=True, end="" if out.isatty() else "\n")
            shown = line
        step += 1
        time.sleep(max(0.0, began + step * STEP - time.monotonic()))


def _text(action: Any) -> str:
    if action is None:
        return ""
    move, turn = 1000.0 * action[:3], np.rad2deg(action[3:6])
    return f"mm {' '.join(f'{v:+5.1f}' for v in move)}  deg {' '.join(f'{v:+5.1f}' for v in turn)}"


def _end(out: Any) -> str:
    return "\r\033[K" if out.isatty() else ""


def main(argv: list[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="twinrl teleop",
        description="Try the device that a person takes over with.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = [kind for kind in OPERATORS if kind not in ("none", "scripted")]
    parser.add_argument(
        "--operator", required=True, help=f"{', '.join(known)}, or one that a package brings"
    )
    parser.add_argument("--operator-option", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seconds", type=float, default=0.0, help="end after so many, 0 = Ctrl-C")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.operator in ("none", "scripted"):
        raise ConfigError(f"operator {arguments.operator!r} has no device: try {', '.join(known)}")
    operator = make_operator(arguments.operator, **options_of(arguments.operator_option))
    try:
        if Terminal.at_hand():
            operator.terminal = Terminal()
        elif arguments.operator == "keyboard":
            raise ConfigError("--operator keyboard needs a terminal: run teleop in one")
        watch(operator, arguments.seconds, sys.stdout)
    except KeyboardInterrupt:
        return 0
    finally:
        operator.close()
    return 0
