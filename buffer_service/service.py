"""The replay service's process: its Redis, its store, its socket, from start to clean end."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import logging
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from buffer_service.embedded_redis import EmbeddedRedis
from buffer_service.file_store import FileStore
from buffer_service.limiter import RateLimiter
from buffer_service.redis_address import Redis, connect, prefix
from buffer_service.redis_lease import LeaseLost, RedisLease
from buffer_service.redis_store import CACHE_BYTES, RedisStore
from buffer_service.replay import LEASE_SECONDS, Service
from buffer_service.shard_list import ShardList
from buffer_service.store import FLUSH_POLICIES, REMOVERS, Recovery
from twinrl.core.errors import TwinRLError
from twinrl.core.keys import Keys, create_keys
from twinrl.core.metrics import Reporter
from twinrl.core.segment import Schema
from twinrl.core.sockets import Server

log = logging.getLogger(__name__)
STORES = {"files": FileStore, "redis": RedisStore}


def serve(
    run_dir: str | Path,
    address: str,
    schema: Schema,
    *,
    redis_url: str = "",
    run: str = "",
    capacity: dict[str, int] | int | None = None,
    flush: str = "everysec",
    remover: str = "oldest",
    lease: float = LEASE_SECONDS,
    store: str = "files",
    redis_access: dict[str, str] | None = None,
    redis_memory_mb: int | None = None,
    cache_mb: int = CACHE_BYTES >> 20,
    adopt: bool = False,
    limiter: RateLimiter | None = None,
    metrics_address: str = "",
    name: str = "replay",
    keys: str | Path = "",
    shards: Sequence[str] = (),
    ready: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Serve the replay of the run in `run_dir` until SIGTERM, SIGINT or `stop`.

    address: where to listen; "tcp://127.0.0.1:*" takes a free port, and the same one after a restart. What was
    taken is written to `run_dir/replay/address` once the service is ready, and printed.
    redis_url: "" starts the run's own Redis in `run_dir/redis`. run: the prefix of its keys in Redis, by default
    the folder's name. capacity: bytes to keep of each source, or of twins. remover: which of a full source's
    segments go, "oldest" or "lowest_priority". lease: s after which a silent writer's episodes are closed.
    store: "files", or "redis" with the payload in Redis too and `cache_mb` of segment files; `adopt`: go on with
    the run that Redis holds although its folder is lost. redis_access: `redis_address.connect`'s options.
    redis_memory_mb: the limit of the run's own Redis. metrics_address: the collector's, for which this service is
    `name`. keys: the folder with the run's keys, by default the one in `run_dir`. shards: addresses of the services
    beside this one, where it is the first of several from the start. ready(address) is called when it serves.
    """
    run_dir = Path(run_dir).resolve()
    folder = run_dir / "replay"
    folder.mkdir(parents=True, exist_ok=True)
    keys = Path(keys or run_dir / "keys")
    create_keys(keys)
    stop = stop or threading.Event()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            # From a thread: within `stop.wait`, which a handler interrupts, `set` could wait for itself.
            signal.signal(number, lambda *_: threading.Thread(target=stop.set).start())
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TwinRLError(f"another replay service is already serving {run_dir}") from None
        run = run or run_dir.name
        embedded = right = None
        lost: list[LeaseLost] = []
        if not redis_url:
            embedded = EmbeddedRedis(run_dir / "redis", flush, redis_memory_mb)

        def redis_again() -> Redis:
            if embedded is None:
                return connect(redis_url, **(redis_access or {}))
            return embedded.connect() if embedded.alive() else embedded.start()

        try:
            if embedded is None:  # which others can reach, too
                right = RedisLease(redis_again(), prefix(run), folder, lost.append).acquire()
            options: dict[str, Any] = {"lease": right}
            if store == "redis":
                options |= {"cache_bytes": cache_mb << 20, "adopt": adopt}
            kept = STORES[store](
                *(folder, redis_again(), run, schema, capacity, flush, remover), **options
            )
            _report(kept.recover())
            log.info("%s", kept.promise)
            server = _listen(address, folder / "address", keys)
            cluster = Keys.load(keys / "cluster.key")

            def redis_now() -> Redis:  # never started by this one
                return redis_again() if embedded is None else embedded.connect()

            ShardList(server, redis_now, prefix(run), schema, kept.token, cluster, shards)
            service = Service(kept, server, schema, limiter, redis_again, lease).start()
            reporter = None
            if metrics_address:
                reporter = Reporter(metrics_address, cluster, "replay", name, service.stats)
            print(f"replay ready at {server.address}", flush=True)
            if ready is not None:
                ready(server.address)
            while not stop.wait(0.5) and service.failure is None and not lost:
                pass
            service.close()
            if reporter is not None:
                reporter.close()
            if service.failure is not None:
                raise service.failure
        finally:
            if right is not None:
                right.release()
            if embedded is not None:
                embedded.stop()


def _listen(address: str, note: Path, keys: Path) -> Server:
    allowed = {Keys.load(keys / f"{role}.key").public: role for role in ("cluster", "server")}
    own = Keys.load(keys / "server.key")
    server = None
    if address.endswith(":*") and note.exists():  # clients look for us where we were
        with contextlib.suppress(TwinRLError):
            server = Server("replay", note.read_text(), own, allowed)
    server = server or Server("replay", address, own, allowed)
    temporary = note.with_suffix(".tmp")
    temporary.write_text(server.address)
    temporary.replace(note)
    return server


def _report(recovery: Recovery) -> None:
    if recovery.segments or recovery.lost:
        log.info("replay starts with %d segments", recovery.segments)
    if recovery.reindexed:
        log.info("indexed %d segments that had no index entry yet", recovery.reindexed)
    for entry in recovery.lost:
        log.error(
            "lost: segment %d (%s, writer %s number %d, %d steps) is in the index, its bytes are gone",
            *(entry.id, entry.source, entry.writer, entry.sequence, entry.steps),
        )


def main(arguments: list[str] | None = None) -> None:
    """Command line of the service; `deploy` calls `serve` instead."""
    parser = argparse.ArgumentParser(prog="buffer_service.service", description=__doc__)
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--schema", required=True, help="the Schema's fields as a JSON list")
    parser.add_argument("--address", default="tcp://127.0.0.1:*")
    parser.add_argument("--redis-url", default="", help="default: a Redis of the run's own")
    parser.add_argument("--run", default="", help="prefix of the keys in Redis")
    parser.add_argument(
        "--capacity",
        type=json.loads,
        help='bytes of twin segments to keep, or {"twin": N, "real": M}',
    )
    parser.add_argument("--remover", default="oldest", choices=REMOVERS)
    parser.add_argument("--lease", type=float, default=LEASE_SECONDS, metavar="SECONDS")
    parser.add_argument("--flush", default="everysec", choices=FLUSH_POLICIES)
    parser.add_argument("--store", default="files", choices=sorted(STORES))
    parser.add_argument("--redis-access", type=json.loads, help='e.g. {"tls_ca": FILE}')
    parser.add_argument("--redis-memory-mb", type=int, help="limit of the run's own Redis")
    parser.add_argument("--cache-mb", type=int, default=CACHE_BYTES >> 20)
    parser.add_argument("--adopt", type=json.loads, default=False)
    parser.add_argument("--limiter", default="{}", help="the RateLimiter's arguments as JSON")
    parser.add_argument("--metrics-address", default="")
    parser.add_argument("--name", default="replay", help="for the collector")
    parser.add_argument("--keys", default="", help="folder with the run's keys")
    parser.add_argument("--shards", type=json.loads, default=(), help="JSON list of addresses")
    options = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    state, privileged, cameras, *rest = json.loads(options.pop("schema"))
    options["schema"] = Schema(state, privileged, tuple(cameras), *rest)
    options["limiter"] = RateLimiter(**json.loads(options["limiter"]))
    serve(options.pop("run_dir"), options.pop("address"), options.pop("schema"), **options)


if __name__ == "__main__":
    main()
