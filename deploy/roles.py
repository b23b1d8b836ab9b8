"""`twinrl serve ROLE`: one process of a job, told everything by the run's topology file."""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import logging
import math

from deploy.description import make_schema
from deploy.run_folder import RunFolder
from deploy.shards import moved, role_of
from twinrl.core.errors import ConfigError

ROLES = {
    "collector": "dashboard.collector:serve",
    "replay": "buffer_service.service:serve",
    "gateway": "robot_bridge.gateway:serve",
    "dashboard": "dashboard.server:serve",
}


def command(argv: list[str]) -> int:
    """Run a role until SIGTERM."""
    parser = argparse.ArgumentParser(prog="twinrl serve", description="One process of a job.")
    parser.add_argument("role", choices=sorted(ROLES))
    parser.add_argument("--run", required=True, help="the run's folder")
    parser.add_argument("--shard", type=int, default=0, metavar="N", help="of the replay; 0")
    parser.add_argument(
        "--look",
        action="store_true",
        help="replay of a stopped run: nothing ends, nothing is reported",
    )
    arguments = parser.parse_args(argv)
    faulthandler.enable()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    run = RunFolder.open(arguments.run)
    name = role_of(arguments.shard) if arguments.shard else arguments.role
    settings = run.topology()["roles"].get(name)
    if settings is None:
        raise ConfigError(f"run {run.name!r} has no {name}")
    if arguments.look:  # where it is now, should it have been moved or copied since
        settings = moved(settings, arguments.shard, run.path)
        settings.update(address="tcp://127.0.0.1:*", metrics_address="", lease=math.inf)
    if "schema" in settings:
        settings["schema"] = make_schema(settings["schema"])
    if "limiter" in settings:
        from buffer_service.client import RateLimiter

        settings["limiter"] = RateLimiter(**settings["limiter"])
    module, function = ROLES[arguments.role].split(":")
    getattr(importlib.import_module(module), function)(**settings)
    return 0
