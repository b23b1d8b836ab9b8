"""`twinrl attach`: join a running job from the robot's PC."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from robot_bridge import rig
from robot_bridge.bridge import Bridge
from robot_bridge.link import Link
from robot_bridge.protocol import Features
from robot_bridge.shadow import Shadow
from robot_bridge.spool import Spool
from robot_bridge.unit import NOT_REACHED, service
from twinrl.core.errors import ConfigError, DeadlineError, TwinRLError
from twinrl.core.keys import Keys

EXAMPLES = """examples:
  twinrl attach --robot sim --name arm --url tcp://127.0.0.1:7447 --key runs/demo/keys/robot.key
  twinrl attach --robot sim --name arm --url tcp://cluster:7447 --key robot.key --operator keyboard
  twinrl attach --robot sim --name arm --url tcp://cluster:7447 --key robot.key --shadow
  twinrl attach --robot point --name try --url tcp://cluster:7447 --key robot.key --codec raw --once

The address is "gateway" in runs/NAME/topology.json. Ctrl-C leaves; what is not acknowledged stays in the
spool. A stop in this program is not a safety function: have the arm's own stop button at hand."""


class NotReached(TwinRLError):
    """No gateway answered, so nothing was asked of the arm."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("--name", required=True, help="the robot's name in the run, free to choose")
    add("--url", required=True, help="the run's gateway, tcp://HOST:PORT")
    add("--key", required=True, help="runs/NAME/keys/robot.key, copied to this PC")
    add(
        "--wait",
        default=15.0,
        type=float,
        metavar="S",
        help="to wait for the gateway at the start (%(default)s)",
    )
    rig.add_arguments(parser)
    add(
        "--shadow",
        action="store_true",
        help="the policy is asked and its planned path is shown on the run's page; the arm is not commanded, nothing is "
        "recorded",
    )
    add("--systemd", action="store_true", help="print a service that does this; docs/robot-pc.md")


def attach(arguments: argparse.Namespace) -> None:
    """Run the bridge until it is told to leave."""
    name = arguments.name
    if not name or not all(c.isalnum() or c in "._-" for c in name) or name.startswith("."):
        raise ConfigError(f"--name {name!r}: letters, digits, '.', '_' and '-' only")
    if arguments.shadow:
        _check_shadow(arguments)
    keys = Keys.load(arguments.key)
    arm = rig.make_rig(arguments)
    if arguments.systemd:
        if arguments.operator == "keyboard":
            raise ConfigError("--operator keyboard needs a terminal, a service has none")
        print(service(name, arguments.words), end="")
        return
    rig.listen(arm, arguments)
    spool: Spool | None = None
    connected = False
    link = Link(arguments.url, keys, name)
    bridge: Bridge | Shadow | None = None
    try:
        spool = Spool(Path(arguments.spool).expanduser(), name)
        try:
            job = link.hello(arguments.wait)
        except DeadlineError as error:
            raise NotReached(str(error)) from None
        connected, driver = True, arm.driver
        driver.connect(job, arguments.speed)
        features = Features(len(driver.dimensions), driver.cameras, driver.image_size)
        joined = link.attach(
            arguments.wait,
            kind=driver.kind,
            writer=f"{name}-{spool.id}",
            features=[len(driver.dimensions), list(driver.cameras), driver.image_size],
            dimensions=[list(dimension) for dimension in driver.dimensions],
            digest=features.digest(),
            operator=arguments.operator,
            limits=arm.limits.unusual(),
            shadow=arguments.shadow,
        )
        spool.open(job.run, joined["numbering"])
        logging.info("attached to run %s as %s: %s", job.run, name, job.instruction)
        if arguments.shadow:
            bridge = rig.make_shadow(arm, link, spool, job, arguments)
            logging.info(
                "in shadow: the arm is not commanded, what the policy plans is on the page"
            )
        else:
            bridge = rig.make_bridge(arm, link, spool, job, arguments)
        link.keep(bridge.state, arm.watchdog.hear)
        bridge.run()
        left = int(spool.stats()["spool_segments"])
        kept = (
            f"; {left} segments stay in {spool.folder} and go out at the next attach"
            if left
            else ""
        )
        logging.info("detached%s", kept)
    finally:
        arm.operator.close()
        if bridge is None:
            link.close()
        if connected:
            arm.driver.disconnect()
        if spool is not None:
            spool.close()


def _check_shadow(arguments: argparse.Namespace) -> None:
    """ConfigError for what means nothing where the arm is not commanded."""
    given = {
        "--operator": arguments.operator != "none",
        "--confirm-each-chunk": arguments.confirm_each_chunk,
        "--once": arguments.once,
        "--episodes": bool(arguments.episodes),
    }
    for option, is_given in given.items():
        if is_given:
            raise ConfigError(
                f"{option} with --shadow: in shadow the arm is not commanded and no episode is played; leave one of them out"
            )


def main(argv: list[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="twinrl attach",
        description="Attach this PC's robot to a running job.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    arguments.words = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        attach(arguments)
    except KeyboardInterrupt:
        return 130
    except TwinRLError as error:
        print(f"twinrl attach: {error}", file=sys.stderr, flush=True)
        return NOT_REACHED if isinstance(error, NotReached) else 1
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
