"""`twinrl attach`: join a running job from the robot's PC."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from robot_bridge.bridge import Bridge, Settings
from robot_bridge.driver import make_driver
from robot_bridge.frames import check_codec
from robot_bridge.link import Link
from robot_bridge.operator import OPERATORS, make_operator
from robot_bridge.safety import Limits, SafetyFilter
from robot_bridge.spool import Spool
from twinrl.core.errors import ConfigError, TwinRLError
from twinrl.core.keys import Keys

SPOOL = "~/.twinrl/spool"
EXAMPLES = """examples:
  twinrl attach --robot sim --name arm --url tcp://127.0.0.1:7447 --key runs/demo/keys/robot.key
  twinrl attach --robot sim --name arm --url tcp://cluster:7447 --key robot.key --operator keyboard
  twinrl attach --robot point --name try --url tcp://cluster:7447 --key robot.key --codec raw --once

The address is "gateway" in runs/NAME/topology.json. Ctrl-C leaves; what is not acknowledged stays in the
spool. A stop in this program is not a safety function: have the arm's own stop button at hand."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("--robot", required=True, help="driver: sim, point, or one that a package brings")
    add("--name", required=True, help="the robot's name in the run, free to choose")
    add("--url", required=True, help="the run's gateway, tcp://HOST:PORT")
    add("--key", required=True, help="runs/NAME/keys/robot.key, copied to this PC")
    add("--operator", default="none", choices=list(OPERATORS), help="who may take over")
    add("--takeovers", type=int, metavar="N", help="most takeovers that a scripted operator makes")
    add("--seed", type=int, metavar="N", help="of a simulated robot")
    add(
        "--speed",
        type=float,
        default=1.0,
        metavar="X",
        help="of a simulated robot's clock, 1 = real",
    )
    add("--episodes", type=int, default=0, metavar="N", help="leave after so many, 0 = when told")
    add("--once", action="store_true", help="one episode")
    add("--spool", default=SPOOL, help="folder for what is not acknowledged yet (%(default)s)")
    add("--codec", default="jpeg", choices=("jpeg", "raw"), help="of camera frames (%(default)s)")
    seconds = {"type": float, "metavar": "S"}
    add(
        "--wait", default=15.0, **seconds, help="to wait for the gateway at the start (%(default)s)"
    )
    add(
        "--watchdog",
        default=0.5,
        **seconds,
        help="without a chunk until the arm holds (%(default)s)",
    )
    add("--link-timeout", default=1.0, **seconds, help="of silence that cut the link (%(default)s)")
    add("--give-up", default=10.0, **seconds, help="of holding that end an episode (%(default)s)")
    add(
        "--limit",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the safety filter: step_m, step_rad, lead_m or stale_s",
    )
    add("--robot-option", action="append", default=[], metavar="KEY=VALUE", help="of the driver")
    add(
        "--operator-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the operator",
    )


def attach(arguments: argparse.Namespace) -> None:
    """Run the bridge until it is told to leave."""
    name = arguments.name
    if not name or not all(c.isalnum() or c in "._-" for c in name) or name.startswith("."):
        raise ConfigError(f"--name {name!r}: letters, digits, '.', '_' and '-' only")
    if arguments.robot != "sim" and arguments.speed > 1.0 and arguments.robot != "point":
        raise ConfigError(
            f"--speed {arguments.speed:g}: only a simulated robot runs faster than time"
        )
    check_codec(arguments.codec)
    keys = Keys.load(arguments.key)
    robot_options = _options(arguments.robot_option)
    operator_options = _options(arguments.operator_option)
    if arguments.seed is not None:
        robot_options["seed"] = arguments.seed
    if arguments.takeovers is not None and arguments.operator == "scripted":
        operator_options["at_most"] = arguments.takeovers
    driver = make_driver(arguments.robot, **robot_options)
    limits = _limits(_options(arguments.limit))
    operator = make_operator(arguments.operator, **operator_options)
    spool: Spool | None = None
    connected = False
    link = Link(arguments.url, keys, name, link_s=arguments.link_timeout)
    bridge: Bridge | None = None
    try:
        spool = Spool(Path(arguments.spool).expanduser(), name)
        job = link.hello(arguments.wait)
        connected = True
        driver.connect(job)
        joined = link.attach(
            arguments.wait,
            kind=driver.kind,
            writer=f"{name}-{spool.id}",
            features=[
                driver.features.state_dim,
                list(driver.features.cameras),
                driver.features.image_size,
            ],
            state_names=list(driver.state_names),
            digest=driver.features.digest(),
            operator=arguments.operator,
        )
        spool.open(job.run, joined["numbering"])
        logging.info("attached to run %s as %s: %s", job.run, name, job.instruction)
        settings = Settings(
            speed=arguments.speed,
            codec=arguments.codec,
            watchdog_s=arguments.watchdog,
            give_up_s=arguments.give_up,
            episodes=1 if arguments.once else arguments.episodes,
        )
        bridge = Bridge(link, driver, operator, SafetyFilter(limits), spool, job, settings)
        for number in (signal.SIGINT, signal.SIGTERM):
            # From a thread: within a wait, which a handler interrupts, it could wait for itself.
            signal.signal(number, lambda *_: threading.Thread(target=bridge.stop).start())
        link.keep(bridge.state)
        bridge.run()
        left = int(spool.stats()["spool_segments"])
        kept = (
            f"; {left} segments stay in {spool.folder} and go out at the next attach"
            if left
            else ""
        )
        logging.info("detached%s", kept)
    finally:
        operator.close()
        if bridge is None:
            link.close()
        if connected:
            driver.disconnect()
        if spool is not None:
            spool.close()


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
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        attach(arguments)
    except KeyboardInterrupt:
        return 130
    except TwinRLError as error:
        print(f"twinrl attach: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _options(pairs: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"option {pair!r} is not of the form KEY=VALUE")
        try:
            options[key.replace("-", "_")] = float(text) if "." in text else int(text)
        except ValueError:
            options[key.replace("-", "_")] = text
    return options


def _limits(options: dict[str, Any]) -> Limits:
    numbers = [name for name, value in Limits()._asdict().items() if isinstance(value, float)]
    for key in options:
        if key not in numbers:
            raise ConfigError(f"--limit {key}: not one of {', '.join(numbers)}")
    return Limits(**{key: float(value) for key, value in options.items()})


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
