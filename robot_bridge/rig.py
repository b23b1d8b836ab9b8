"""An arm and who watches over it, from the command line's options: what `attach` and `run` have in common."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import signal
import threading
from pathlib import Path
from typing import Any, NamedTuple

from robot_bridge.bridge import Bridge, Settings
from robot_bridge.driver import Driver, make_driver
from robot_bridge.frames import check_codec
from robot_bridge.limits import NUMBERS, Limits, make_limits
from robot_bridge.operator import OPERATORS, Operator, make_operator
from robot_bridge.options import options_of
from robot_bridge.protocol import Job
from robot_bridge.safety import SafetyFilter
from robot_bridge.shadow import Shadow
from robot_bridge.spool import Spool
from robot_bridge.terminal import Terminal
from robot_bridge.watchdog import Patience, Watchdog
from twinrl.core.errors import ConfigError

SPOOL = "~/.twinrl/spool"


class Rig(NamedTuple):
    """What moves, who may move it, and what it may do."""

    driver: Driver
    operator: Operator
    limits: Limits
    watchdog: Watchdog


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the arm."""
    parser.set_defaults(alone_s=0.0)
    add = parser.add_argument
    pair: dict[str, Any] = {"action": "append", "default": [], "metavar": "KEY=VALUE"}
    add(
        "--robot",
        required=True,
        help="driver: sim, point, franka, ur, xarm, lerobot, or one that a package brings",
    )
    add("--robot-option", **pair, help="of the driver")
    add(
        "--reality",
        metavar="FILE",
        help="of --robot sim: numbers in which it differs from the usual stand-in, JSON or YAML (docs/robots.md)",
    )
    add(
        "--reality-seed",
        type=int,
        metavar="N",
        help="of --robot sim: reality N, drawn from the randomised range, always the same",
    )
    add(
        "--operator",
        default="none",
        help=f"who may take over: {', '.join(OPERATORS)}, or one that a package brings (%(default)s)",
    )
    add("--operator-option", **pair, help="of the operator")
    add(
        "--estop-keys",
        default="",
        metavar="KEYS",
        help="of the terminal, beside escape, as in b,f9: for a foot pedal",
    )
    add("--takeovers", type=int, metavar="N", help="most takeovers that a scripted operator makes")
    add("--seed", type=int, metavar="N", help="of a simulated robot")
    add(
        "--speed",
        type=float,
        default=1.0,
        metavar="X",
        help="of a simulated robot's clock, 1 = real",
    )
    add(
        "--speed-scale",
        type=float,
        metavar="X",
        help="of the motion: at 0.2 each step takes five times as long (0.2 until a real arm has been "
        "attached with another value, then 1)",
    )
    add(
        "--confirm-each-chunk",
        action="store_true",
        help="the policy's next chunk begins when a person has pressed c",
    )
    add("--episodes", type=int, default=0, metavar="N", help="leave after so many, 0 = when told")
    add("--once", action="store_true", help="one episode")
    add("--codec", default="jpeg", choices=("jpeg", "raw"), help="of camera frames (%(default)s)")
    add("--spool", default=SPOOL, help="folder for what is not acknowledged yet (%(default)s)")
    add(
        "--give-up",
        default=10.0,
        type=float,
        metavar="S",
        help="of holding that end an episode (%(default)s)",
    )
    add(
        "--max-lag",
        type=int,
        default=20,
        metavar="N",
        help="versions that an acting policy may be behind the run's newest (%(default)s)",
    )
    add("--limit", **pair, help=f"of the safety filter: {', '.join(NUMBERS)}")
    add("--limits", metavar="FILE.json", help="all of these, with workspace and keep_out boxes")
    add("--patience", **pair, help=f"of the watchdog, s: {', '.join(Patience._fields)}")


def make_rig(arguments: argparse.Namespace, linked: bool = True) -> Rig:
    """What the options describe, nothing of it connected; ConfigError says what cannot be."""
    check_codec(arguments.codec)
    robot_options = options_of(arguments.robot_option)
    operator_options = options_of(arguments.operator_option)
    if arguments.seed is not None:
        robot_options["seed"] = arguments.seed
    for name in ("reality", "reality_seed"):
        value = getattr(arguments, name)
        if value is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        if arguments.robot != "sim":
            raise ConfigError(f"{flag}: only --robot sim has one, {arguments.robot!r} is as it is")
        if name in robot_options:
            raise ConfigError(f"{flag} and --robot-option {name}: give one of them")
        robot_options[name] = value
    if arguments.operator == "scripted":
        if arguments.takeovers is not None:
            operator_options["at_most"] = arguments.takeovers
        if arguments.seed is not None:
            operator_options.setdefault("seed", arguments.seed)
    driver = make_driver(arguments.robot, **robot_options)
    if arguments.speed > 1.0 and not driver.simulated:
        raise ConfigError(
            f"--speed {arguments.speed:g}: only a simulated robot runs faster than time"
        )
    limits = _limits(arguments)
    driver.limit_grip(limits.gripper_force_n)
    watchdog = Watchdog(_patience(options_of(arguments.patience)), linked=linked)
    return Rig(driver, make_operator(arguments.operator, **operator_options), limits, watchdog)


def listen(rig: Rig, arguments: argparse.Namespace) -> None:
    """Hear the keys of this terminal, if there is one."""
    if Terminal.at_hand():
        rig.operator.terminal = Terminal(estop=arguments.estop_keys)
    elif arguments.operator == "keyboard":
        raise ConfigError("--operator keyboard needs a terminal: run this in one")
    elif arguments.confirm_each_chunk:
        raise ConfigError("--confirm-each-chunk needs a terminal to press c in")
    rig.driver.terminal = rig.operator.terminal


def make_bridge(
    rig: Rig, link: Any, spool: Spool, job: Job, arguments: argparse.Namespace
) -> Bridge:
    """The bridge of a connected arm; it leaves at SIGINT and SIGTERM."""
    driver, limits = rig.driver, rig.limits
    for limit, value in limits.unusual().items():
        logging.info("limit %s is %s, not %s", limit, value, getattr(Limits(), limit))
    _compare_steps(job, limits)
    scale = _speed_scale(arguments, driver, spool)
    settings, safety = _settings(rig, job, scale, arguments)
    bridge = Bridge(link, driver, rig.operator, safety, rig.watchdog, spool, job, settings)
    _leave_at_signals(bridge)
    return bridge


def make_shadow(
    rig: Rig, link: Any, spool: Spool, job: Job, arguments: argparse.Namespace
) -> Shadow:
    """What stands for the bridge of a connected arm that only shows what the policy plans; nothing goes into the spool."""
    # Whatever is given here says nothing about how fast the arm may go when it does.
    settings, safety = _settings(rig, job, arguments.speed_scale or 1.0, arguments)
    shadow = Shadow(link, rig.driver, rig.operator, safety, rig.watchdog, spool, job, settings)
    _leave_at_signals(shadow)
    return shadow


def _settings(
    rig: Rig, job: Job, scale: float, arguments: argparse.Namespace
) -> tuple[Settings, SafetyFilter]:
    driver = rig.driver
    settings = Settings(
        speed=arguments.speed,
        speed_scale=scale,
        codec=arguments.codec,
        confirm=arguments.confirm_each_chunk,
        max_lag=arguments.max_lag,
        give_up_s=arguments.give_up,
        episodes=1 if arguments.once else arguments.episodes,
        alone_s=arguments.alone_s,
    )
    period = 1.0 / (job.control_hz * scale)
    safety = SafetyFilter(rig.limits, driver.rate_hz, period, driver.joint_range, driver.frame)
    return settings, safety


def _leave_at_signals(bridge: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        # From a thread: within a wait, which a handler interrupts, it could wait for itself.
        signal.signal(number, lambda *_: threading.Thread(target=bridge.stop).start())


def _limits(arguments: argparse.Namespace) -> Limits:
    given: list[dict[str, Any]] = []
    if arguments.limits:
        path = Path(arguments.limits).expanduser()
        try:
            found = json.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"--limits {path}: {error.strerror}") from None
        except ValueError as error:
            raise ConfigError(f"--limits {path} is not JSON: {error}") from None
        if not isinstance(found, dict):
            raise ConfigError(f"--limits {path} holds no mapping of limits")
        given.append(found)
    return make_limits(*given, options_of(arguments.limit))


def _patience(options: dict[str, Any]) -> Patience:
    for key, value in options.items():
        if key not in Patience._fields:
            close = difflib.get_close_matches(key, Patience._fields, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            known = ", ".join(Patience._fields)
            raise ConfigError(f"--patience {key}: not one of {known}{hint}")
        if not isinstance(value, (int, float)) or not value > 0:
            raise ConfigError(f"--patience {key}={value}: must be a number of seconds above 0")
    return Patience(**{key: float(value) for key, value in options.items()})


def _compare_steps(job: Job, limits: Limits) -> None:
    """Say so where the policy may ask for more than this arm is allowed."""
    period = 1.0 / job.control_hz
    allowed = (
        min(limits.step_m, limits.speed * period),
        min(limits.step_rad, limits.turn_speed * period),
    )
    for asked, limit, unit in zip(job.step, allowed, ("m", "rad")):
        if asked > limit + 1e-9:
            logging.warning(
                "the policy may ask for %g %s a step, this arm's limits allow %g: what is longer is shortened",
                asked,
                unit,
                limit,
            )


def _speed_scale(arguments: argparse.Namespace, driver: Driver, spool: Spool) -> float:
    """What is asked for; else 1 for a simulated arm, and for a real one that was attached at another speed before."""
    known = spool.folder / "speed.json"
    scale = arguments.speed_scale
    if scale is not None:
        if not 0.0 < scale <= 1.0:
            raise ConfigError(f"--speed-scale {scale:g}: must be above 0, and 1 at most")
        known.write_text(json.dumps({"speed_scale": scale}))
        return scale
    if driver.simulated or known.exists():
        return json.loads(known.read_text())["speed_scale"] if known.exists() else 1.0
    logging.warning(
        "the first time with this arm its motions take five times as long (--speed-scale 0.2): watch it, then give "
        "--speed-scale 1"
    )
    return 0.2
