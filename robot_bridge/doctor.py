"""`twinrl doctor --robot`: checks a robot's PC, and the way to the run's gateway where that is given."""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Callable, Dict

from robot_bridge.arm_doctor import LIBRARIES, robot_checks
from twinrl.core.errors import ConfigError, TwinRLError
from twinrl.findings import FAILED, OK, WARNING, Finding, examine
from twinrl.installed import distribution

ROOM = 2 << 30  # bytes, what the spool may come to
TICKS, PERIOD, LATE = 100, 0.01, 0.005  # s: a tick of the control loop, and how late one may be


def check_python() -> Finding:
    """Python, and which of the distributions this is."""
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding(OK, f"Python {version} at {sys.executable}, {distribution()}")


def check_encryption() -> Finding:
    """The sockets can encrypt."""
    import zmq

    if not zmq.has("curve"):
        cure = "pip install --force-reinstall --only-binary :all: pyzmq"
        return Finding(FAILED, f"pyzmq {zmq.__version__} was built without CURVE", cure)
    return Finding(OK, f"pyzmq {zmq.__version__} with CURVE")


def check_jpeg() -> Finding:
    """Frames can be sent as JPEG."""
    from robot_bridge.frames import check_codec

    try:
        check_codec("jpeg")
    except ConfigError as error:
        return Finding(WARNING, str(error), "pip install simplejpeg, or attach with --codec raw")
    return Finding(OK, "camera frames can be sent as JPEG")


def check_timing() -> Finding:
    """How late this PC's ticks are while nothing else of ours runs."""
    late = []
    due = time.monotonic()
    for _ in range(TICKS):
        due += PERIOD
        time.sleep(max(0.0, due - time.monotonic()))
        late.append(time.monotonic() - due)
        due = max(due, time.monotonic())
    text = f"ticks of {PERIOD * 1e3:g} ms are up to {max(late) * 1e3:.1f} ms late"
    if max(late) > LATE:
        return Finding(WARNING, text, "end what takes the CPU; see docs/robot-pc.md")
    return Finding(OK, text)


def check_spool(folder: Path) -> Finding:
    """There is room for what is not acknowledged yet."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        return Finding(FAILED, f"{folder} cannot be written", "attach with another --spool")
    free = shutil.disk_usage(folder).free
    text = f"{folder}: {free >> 20} MB free"
    if free < ROOM:
        return Finding(WARNING, text, f"the spool may come to {ROOM >> 20} MB: make room")
    return Finding(OK, text)


def check_gateway(url: str, key: str) -> Finding:
    """The run's gateway lets this robot in."""
    from robot_bridge.link import Link
    from twinrl.core.keys import Keys

    link = None
    try:
        link = Link(url, Keys.load(key), "doctor")
        began = time.monotonic()
        job = link.hello(5.0)
        took = time.monotonic() - began
    except TwinRLError as error:
        return Finding(FAILED, str(error))
    finally:
        if link is not None:
            link.close()
    return Finding(OK, f"run {job.run} at {url} answers after {took * 1e3:.0f} ms")


CHECKS: Dict[str, Callable[[], Finding]] = {
    "python": check_python,
    "encryption": check_encryption,
    "jpeg": check_jpeg,
    "timing": check_timing,
}


def command(argv: list[str]) -> int:
    """The command `twinrl doctor --robot`; exit code 1 when a check failed."""
    from robot_bridge.rig import SPOOL

    parser = argparse.ArgumentParser(
        prog="twinrl doctor --robot",
        description="Check this robot's PC and say how to mend what is missing.",
        epilog="examples:\n  twinrl doctor --robot --url tcp://cluster:7447 --key robot.key\n"
        "  twinrl doctor --robot franka --host 172.16.0.2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--robot",
        nargs="?",
        const="",
        choices=["", *LIBRARIES],
        metavar="KIND",
        help=f"of which arm this PC is to drive, with --host: {', '.join(LIBRARIES)}",
    )
    add("--host", help="the arm's address")
    add("--seconds", type=float, default=10.0, metavar="S", help="to listen to it (%(default)s)")
    add("--url", help="also ask the run's gateway, tcp://HOST:PORT")
    add("--key", help="runs/NAME/keys/robot.key, copied to this PC")
    add("--spool", default=SPOOL, help="of twinrl attach (%(default)s)")
    add("--json", action="store_true", help="for machines")
    arguments = parser.parse_args(argv)
    if bool(arguments.url) != bool(arguments.key):
        parser.error("--url and --key go together")
    checks = dict(CHECKS)
    checks["spool"] = functools.partial(check_spool, Path(arguments.spool).expanduser())
    if bool(arguments.robot) != bool(arguments.host):
        parser.error("--robot KIND and --host go together")
    if arguments.robot:
        checks.update(robot_checks(arguments.robot, arguments.host, arguments.seconds))
    if arguments.url:
        checks["gateway"] = functools.partial(check_gateway, arguments.url, arguments.key)
    return examine(checks, arguments.json, f"pip install --force-reinstall {distribution()}")
