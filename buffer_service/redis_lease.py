"""The right to serve a run, held in its Redis: of two services on two hosts only one may write.

A lock on the run's folder keeps two services of one host apart; two hosts share only Redis. There the key `lease`
names the holder and expires by Redis's own clock unless it is renewed every second. Holding it is not enough to
write: a process that was stopped for a while, or a clock that jumped, would let two believe that they hold it. So
the key `owner`, which only a change of hands writes, is watched by every transaction (`guard`), and Redis itself
refuses one that begins before a change of hands and ends after it. An expired lease that nobody else took is taken
again without a word.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis

from buffer_service.redis_address import Redis, RedisError
from twinrl.core.errors import TwinRLError

log = logging.getLogger(__name__)
LEASE_SECONDS = 10.0
RENEW_SECONDS = 1.0


class LeaseLost(TwinRLError):
    """Another service has taken this run over; nothing may be written any more."""


class RedisLease:
    """The right to serve the run whose keys begin with `prefix`; kept by a thread of its own."""

    def __init__(
        self,
        redis: Redis,
        prefix: str,
        folder: Path,
        lost: Callable[[LeaseLost], None] = lambda error: None,
        seconds: float = LEASE_SECONDS,
    ) -> None:
        """`folder`: the run's, locked by this process. `lost(error)` is called once, by the lease's thread."""
        self._redis, self._seconds, self._lost = redis, seconds, lost
        self._lease, self._owner = f"{prefix}lease", f"{prefix}owner"
        self._me = {
            "token": secrets.token_hex(8),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "folder": str(folder),
            "place": _place(folder),
        }
        self._value = json.dumps(self._me).encode()
        self._beats = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def acquire(self) -> RedisLease:
        """Take the lease; TwinRLError names a living holder, after about a second. A dead one's is waited for.

        A predecessor in the same folder of the same machine is dead: the folder's lock is ours. Elsewhere one is
        dead when its lease expired, or when it renewed nothing for that long by this machine's steady clock.
        """
        since, first = time.monotonic(), self._redis.get(self._lease)
        while not self._take(force=time.monotonic() - since > self._seconds):
            now = self._redis.get(self._lease)
            holder = _read(now)
            if now is not None and now != first:
                raise TwinRLError(
                    f"another replay service serves this run on {holder.get('host')} "
                    f"(process {holder.get('pid')}, {holder.get('folder')}): end it first, "
                    "or start this run under another run.name"
                )
            log.debug("waiting for the lease of %s to expire", holder.get("host"))
            self._stop.wait(0.2)
        self._thread.start()
        return self

    def guard(self, pipeline: Any) -> None:
        """Begin a transaction in `pipeline` that Redis refuses (WatchError) once another has taken over."""
        pipeline.watch(self._owner)
        owner = pipeline.get(self._owner)
        self._check(owner)
        pipeline.multi()
        if owner is None:  # Redis has lost its data
            pipeline.set(self._owner, self._value)

    def release(self) -> None:
        """Give it back, so that a successor need not wait."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(self._seconds)
        with contextlib.suppress(RedisError), self._redis.pipeline(transaction=True) as pipeline:
            pipeline.watch(self._lease)
            if self._is_mine(pipeline.get(self._lease)):
                pipeline.multi()
                pipeline.delete(self._lease)
                pipeline.execute()

    def _keep(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            try:
                self._renew()
            except LeaseLost as error:
                log.error("%s", error)
                self._lost(error)
                return
            except RedisError as error:
                # Nothing can be written now, so nothing can go wrong: guard looks at the owner again later.
                log.debug("the lease waits: %s", error)

    def _renew(self) -> None:
        with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.watch(self._lease, self._owner)
            holder, owner = pipeline.get(self._lease), pipeline.get(self._owner)
            self._check(owner)
            self._check(holder)
            pipeline.multi()
            self._write(pipeline, owner)
            with contextlib.suppress(redis.WatchError):  # seen again in a second
                pipeline.execute()

    def _take(self, force: bool) -> bool:
        """Take a lease that is free or that of a predecessor here; with `force` any that did not change."""
        with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.watch(self._lease, self._owner)
            holder, owner = _read(pipeline.get(self._lease)), pipeline.get(self._owner)
            if holder and holder.get("place") != self._me["place"] and not force:
                return False
            pipeline.multi()
            self._write(pipeline, owner)
            try:
                pipeline.execute()
            except redis.WatchError:  # somebody was faster
                return False
        return True

    def _write(self, pipeline: Any, owner: bytes | None) -> None:
        self._beats += 1
        lease = json.dumps({**self._me, "beat": self._beats})
        pipeline.set(self._lease, lease, px=int(self._seconds * 1000))
        if owner != self._value:  # written by a change of hands only: transactions watch it
            pipeline.set(self._owner, self._value)

    def _is_mine(self, value: bytes | None) -> bool:
        return _read(value).get("token") == self._me["token"]

    def _check(self, value: bytes | None) -> None:
        if value is not None and not self._is_mine(value):
            raise self._error(value)

    def _error(self, value: bytes) -> LeaseLost:
        by = _read(value)
        return LeaseLost(
            f"the replay service on {by.get('host')} (process {by.get('pid')}, {by.get('folder')}) has "
            "taken this run over: this one must not write any more and ends"
        )


def _read(value: bytes | None) -> dict[str, Any]:
    with contextlib.suppress(ValueError, TypeError):
        return dict(json.loads(value or b"{}"))
    return {}


def _place(folder: Path) -> str:
    """This folder on this machine since it was booted; a copy, or a container's own, is another place."""
    found = folder.stat()
    boot = Path("/proc/sys/kernel/random/boot_id")
    text = boot.read_text().strip() if boot.exists() else socket.gethostname()
    return f"{text}:{found.st_dev}:{found.st_ino}"
