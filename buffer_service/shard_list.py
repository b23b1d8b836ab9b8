"""The list of a replay's services, kept by the first of them: methods `shards` and `shard_add`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any
from urllib.parse import urlsplit

from buffer_service.redis_address import Redis, RedisError
from buffer_service.shards import CONNECT_SECONDS, MAX_SHARDS
from buffer_service.writer import greet
from twinrl.core import arguments
from twinrl.core.errors import DeadlineError, Rejected, RemoteError, TwinRLError
from twinrl.core.keys import Keys
from twinrl.core.segment import Schema
from twinrl.core.sockets import Client, Request, Server

KNOWN_SECONDS = 1.0  # for one that is in the list already to say who it is


class ShardList:
    """Addresses of the services beside this one, in order of their numbers 1, 2, ...; durable in Redis."""

    def __init__(
        self,
        server: Server,
        redis: Callable[[], Redis],
        prefix: str,
        schema: Schema,
        token: str,
        keys: Keys,
        configured: Sequence[str] = (),
    ) -> None:
        """redis() connects. token: this service's own. keys: with which to call on a new one. configured: services
        that belong to the job from its start.
        """
        self._redis, self._key = redis, f"{prefix}shards"
        self._schema, self._token, self._keys = schema, token, keys
        self._adding = threading.Lock()  # held by the thread that looks at a new one
        self._addresses = [each.decode() for each in redis().lrange(self._key, 0, -1)]
        for address in configured:
            if address not in self._addresses:
                self._keep(address)
        server.bind("shards", self.shards)
        server.bind("shard_add", self.shard_add)

    def shards(self, request: Request) -> dict[str, Any]:
        """Addresses of the services beside this one."""
        return {"addresses": self._addresses}

    def shard_add(self, request: Request) -> Future:
        """Take the service at `address` into the list for good, after a look at it; again is no error.

        Answered with its `number` and `addresses`.
        """
        address = arguments.text(request.args, "address", longest=200)
        if not _is_address(address):
            raise Rejected(f"{address!r} is no address: write tcp://HOST:PORT")
        if not self._adding.acquire(blocking=False):
            raise RemoteError("another shard is just being looked at: ask again")
        future: Future = Future()
        threading.Thread(target=self._add, args=(address, future), daemon=True).start()
        return future

    def _add(self, address: str, future: Future) -> None:
        try:
            answer, failure = self._look_and_keep(address), None
        except RedisError as error:
            answer, failure = {}, RemoteError(f"Redis keeps the list of shards: {error}")
        except Exception as error:
            answer, failure = {}, error
        finally:
            self._adding.release()
        if failure is not None:
            future.set_exception(failure)
        else:
            future.set_result(answer)

    def _look_and_keep(self, address: str) -> dict[str, Any]:
        if address not in self._addresses:
            self._look(address)
            self._keep(address)
        return {"number": self._addresses.index(address) + 1, "addresses": self._addresses}

    def _look(self, address: str) -> None:
        """Raises what speaks against it."""
        if len(self._addresses) + 1 >= MAX_SHARDS:
            raise Rejected(f"there are {MAX_SHARDS} shards already")
        try:
            token = self._token_of(address, CONNECT_SECONDS)
        except DeadlineError as error:
            raise Rejected(str(error)) from None
        known = [(0, self._token)]
        for number, other in enumerate(self._addresses, 1):
            with contextlib.suppress(TwinRLError):  # one that is away now cannot be the new one
                known.append((number, self._token_of(other, KNOWN_SECONDS)))
        for number, other in known:
            if token == other:
                raise Rejected(f"the service at {address} is shard {number} already")

    def _token_of(self, address: str, seconds: float) -> str:
        client = Client("replay", address, self._keys, timeout=seconds)
        try:
            return greet(client, {"digest": self._schema.digest()}, seconds)["token"]
        finally:
            client.close()

    def _keep(self, address: str) -> None:
        self._redis().rpush(self._key, address)
        self._addresses = [*self._addresses, address]


def _is_address(text: str) -> bool:
    try:
        place = urlsplit(text)
        return place.scheme == "tcp" and bool(place.hostname and place.port)
    except ValueError:  # no port of this world
        return False
