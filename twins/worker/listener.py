"""A worker that was started by hand: clients dial in, one at a time.

A Server's thread takes what comes and answers signs of life, the main thread works (many simulators insist on it).
"""

from __future__ import annotations

import logging
import queue
import time
from concurrent.futures import Future
from typing import Any

from twinrl.core.errors import Rejected
from twinrl.core.keys import Keys
from twinrl.core.sockets import Answer, Request, Server
from twins.worker.service import Service

log = logging.getLogger(__name__)
LEASE_SECONDS = 30.0  # a client that says nothing for so long may be replaced by another one
LOOK_SECONDS = 1.0  # between looks whether the server still works


class Listener:
    """Serves `service` on `address` to who holds a key in `allowed` ({public key: role})."""

    def __init__(self, service: Service, address: str, keys: Keys, allowed: dict[str, str]) -> None:
        self._service = service
        self._work: queue.SimpleQueue = queue.SimpleQueue()
        self._client, self._heard = "", 0.0
        self.server = Server("worker", address, keys, allowed)
        self.server.bind("hello", self._hello)
        self.server.bind("ping", self._ping)
        self.server.bind("leave", self._leave)
        for method in ("open", "call"):
            self.server.bind(method, lambda request, m=method: self._later(m, request))

    def run(self) -> None:
        """Work until Ctrl-C."""
        self.server.start()
        log.info("serves %s on %s", self._service.target, self.server.address)
        try:
            while True:
                if self.server.failure is not None:
                    raise self.server.failure
                try:
                    method, request, future = self._work.get(timeout=LOOK_SECONDS)
                except queue.Empty:
                    continue
                future.set_result(self._service.answer(method, request.args, request.arrays))
        finally:
            self._service.close()
            self.server.close()

    def _hello(self, request: Request) -> Answer:
        told = self._service.hello(request.args, request.arrays)
        client = request.args.get("client")
        silent = time.monotonic() - self._heard
        if self._client not in ("", client) and silent < LEASE_SECONDS:
            taken = (
                f"it serves another client, heard {silent:.0f} s ago; "
                f"end that one, wait {LEASE_SECONDS:g} s, or start a second worker"
            )
            return {"taken": taken}, {}
        self._client, self._heard = client, time.monotonic()
        return told

    def _ping(self, request: Request) -> dict[str, Any]:
        self._recognise(request)
        return {"instance": self._service.instance}

    def _leave(self, request: Request) -> dict[str, Any]:
        """The simulator stays for the next client."""
        self._recognise(request)
        self._client = ""
        self._service.release()
        return {}

    def _later(self, method: str, request: Request) -> Future:
        self._recognise(request)
        future: Future = Future()
        self._work.put((method, request, future))
        return future

    def _recognise(self, request: Request) -> None:
        if request.args.get("client") != self._client:
            raise Rejected(
                "the worker does not serve you: it was restarted, or another client took it"
            )
        self._heard = time.monotonic()
