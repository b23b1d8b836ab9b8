"""A job's replay services: the first, those beside it, and one more for a job that runs."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from buffer_service.client import RateLimiter
from deploy.description import make_schema
from twinrl.config import Config
from twinrl.core.errors import ConfigError, RemoteError, TwinRLError
from twinrl.core.keys import Keys
from twinrl.core.sockets import Client, free_port

ASK_SECONDS = 10.0  # for the first service to answer
ADD_SECONDS = 30.0  # for it to look at the new one
ROLE = "replay"


def role_of(number: int) -> str:
    """The name of a service: in the topology, as its folder, its process and its log."""
    return f"{ROLE}-{number}" if number else ROLE


def divided(config: Config, first: dict[str, Any], host: str) -> dict[str, dict[str, Any]]:
    """Settings of every service of a job, by role. first: those of one service that holds everything.

    Capacities and the least size are divided by the number of services: together they keep what one would.
    """
    count = config.replay.shards
    if count == 1:
        return {ROLE: first}
    addresses = [f"{host}:{free_port()}" for _ in range(count - 1)]
    limiter = first["limiter"]
    part = {
        **first,
        "capacity": {source: size // count for source, size in first["capacity"].items()},
        "cache_mb": max(first["cache_mb"] // count, 8),
        "limiter": {**limiter, "min_size": -(-limiter["min_size"] // count)},
    }
    services = {ROLE: {**part, "shards": addresses}}
    folder = Path(first["run_dir"])
    for number, address in enumerate(addresses, 1):
        services[role_of(number)] = beside(part, folder, number, address, config.redis.shard_urls)
    return services


def beside(
    first: dict[str, Any],
    run: Path,
    number: int,
    address: str,
    urls: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Settings of service `number`, which has a folder, and keys in Redis, of its own."""
    settings = {key: value for key, value in first.items() if key != "shards"}
    name = role_of(number)
    return {
        **settings,
        "run_dir": str(run / name),
        "keys": str(run / "keys"),
        "address": address,
        "run": f"{run.name}.{name}",
        "redis_url": urls[number - 1] if number <= len(urls) else first["redis_url"],
        "name": name,
    }


def moved(settings: dict[str, Any], number: int, run: Path) -> dict[str, Any]:
    """The settings of service `number` for a run that lies in `run` now."""
    if not number:
        return {**settings, "run_dir": str(run)}
    return {**settings, "run_dir": str(run / role_of(number)), "keys": str(run / "keys")}


def local_numbers(topology: dict[str, Any]) -> list[int]:
    """The services beside the first that this run starts itself."""
    names = (role.rpartition("-") for role in topology["roles"])
    return sorted(int(n) for role, _, n in names if role == ROLE and n.isdigit())


def add_shard(run: Path, folder: Path | None, address: str, redis_url: str | None) -> int:
    """Serve one more shard of the job in `run` from here, until SIGTERM or Ctrl-C; see `twinrl replay add-shard`.

    run: the run's folder, or on another host one with its topology.json and keys. folder: the service's own; one
    that served before serves the same again. address: where to listen.
    """
    topology_file = run / "topology.json"
    try:
        topology = json.loads(topology_file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{run} has no topology.json: was the run ever started?") from None
    settings = dict(topology["roles"][ROLE])
    first = topology["replay"]
    for name in ("cluster", "server"):
        if not (run / "keys" / f"{name}.key").exists():
            raise ConfigError(f"{run / 'keys'} lacks {name}.key: copy it from the run's folder")
    keys = Keys.load(run / "keys" / "cluster.key")
    host = _host(first)
    client = Client("replay", first, keys, timeout=ASK_SECONDS)
    try:
        known = client.call("shards")[0]["addresses"]
        if folder is None:
            folder = run / role_of(len(known) + 1)
        settings = beside(settings, run, len(known) + 1, address or f"tcp://{host}:*")
        name = folder.resolve().name
        settings |= {"run_dir": str(folder.resolve()), "name": name, "limiter": {}}
        job = topology["roles"].get("gateway", {}).get("job", {})
        settings["run"] = f"{job.get('run', run.name)}.{name}"  # the folder may be a copy's
        if redis_url is not None:
            settings["redis_url"] = redis_url
        _serve(settings, client, topology_file, "shards" in topology)
    finally:
        client.close()
    return 0


def _serve(settings: dict[str, Any], client: Client, topology: Path, looked_for: bool) -> None:
    from buffer_service.service import serve

    stop = threading.Event()
    failures: list[TwinRLError] = []

    def ready(address: str) -> None:
        try:
            answer = client.call("shard_add", {"address": address}, timeout=ADD_SECONDS)[0]
        except TwinRLError as error:
            failures.append(error)
            stop.set()
            return
        number = answer["number"]
        _note(topology, number, {**settings, "address": address}, answer["addresses"])
        print(f"{address} is shard {number} now; its folder is {settings['run_dir']}", flush=True)
        if not looked_for:
            print(
                "the job's members look for no further shards (replay.shards is 1 and replay.growable false): "
                "they take this one in when the run is resumed",
                flush=True,
            )

    made = {"schema": make_schema(settings["schema"]), "limiter": RateLimiter()}
    serve(**{**settings, **made}, ready=ready, stop=stop)
    if failures:
        raise RemoteError(f"the first service does not take this one in: {failures[0]}")


def _note(path: Path, number: int, settings: dict[str, Any], addresses: list[str]) -> None:
    """Write it into the topology file, so that a resumed run knows it, and starts it if its folder is the run's."""
    topology = json.loads(path.read_text())
    topology["shards"] = addresses
    mine = Path(settings["run_dir"]).parent == path.parent
    if mine and Path(settings["run_dir"]).name == role_of(number):
        topology["roles"].setdefault(role_of(number), settings)
    temporary = path.with_suffix(".tmp")
    with contextlib.suppress(PermissionError):
        temporary.write_text(json.dumps(topology, indent=1))
        os.replace(temporary, path)


def _host(first: str) -> str:
    """The address of this machine that the members of the job reach, probably: on the way to the first service."""
    place = urlsplit(first)
    try:
        with socket.create_connection((place.hostname, place.port), timeout=ASK_SECONDS) as probe:
            return probe.getsockname()[0]
    except OSError as error:
        raise TwinRLError(
            f"nobody listens at {first}: a shard is added to a job that runs ({error})"
        ) from None
