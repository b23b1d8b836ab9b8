"""Answers one client: a Server's thread takes what comes, the main thread works (many simulators insist on it)."""

from __future__ import annotations

import logging
import os
import queue
import secrets
import sys
import time
import traceback
from concurrent.futures import Future
from typing import Any, Dict, List

import numpy as np

from twinrl.core import wire
from twinrl.core.errors import Rejected
from twinrl.core.keys import Keys
from twinrl.core.sockets import Answer, Request, Server
from twins.worker import CONTRACT
from twins.worker.memory import Pieces
from twins.worker.served import SIMULATION, Served
from twins.worker.tree import Body, Packed, unpack

log = logging.getLogger(__name__)
LEASE_SECONDS = 30.0  # a client that says nothing for so long may be replaced by another one
LOOK_SECONDS = 1.0  # between looks whether the parent still lives
MAX_TRACEBACK = 20_000  # characters, the end of it
# The caller's mistake, or the adapter's: the simulator itself can go on.
MISTAKES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    TypeError,
    ValueError,
)
PIECE = "piece"  # the shared memory that a call lends


class Service:
    """Serves what `target` ("module:factory") makes, once the first client has said with which options."""

    def __init__(
        self,
        target: str,
        address: str,
        keys: Keys,
        allowed: Dict[str, str],
        options: Dict[str, Any] | None = None,
        parent: int | None = None,
    ) -> None:
        """`options` override the client's. `parent`: the process that started this one and whose end is its end."""
        self.target, self._options, self._parent = target, options or {}, parent
        self._instance = secrets.token_hex(8)
        self._work: queue.SimpleQueue = queue.SimpleQueue()
        self._served: Served | None = None
        self._asked: Any = None  # what the object was made from
        self._pieces = Pieces()
        self._client, self._heard, self._busy_since = "", 0.0, 0.0
        self._stop = False
        self.server = Server("worker", address, keys, allowed)
        self.server.bind("hello", self._hello)
        self.server.bind("ping", self._ping)
        self.server.bind("open", lambda request: self._later(request, self._open))
        self.server.bind("call", lambda request: self._later(request, self._call))
        self.server.bind("leave", lambda request: self._later(request, self._leave))

    def run(self) -> None:
        """Work until the parent ends, the client that the parent is says goodbye, or Ctrl-C."""
        self.server.start()
        log.info("serves %s on %s", self.target, self.server.address)
        try:
            while not self._stop and not self._orphaned():
                if self.server.failure is not None:
                    raise self.server.failure
                try:
                    request, do, future = self._work.get(timeout=LOOK_SECONDS)
                except queue.Empty:
                    continue
                self._busy_since = time.monotonic()
                try:
                    answer = do(request)
                except Exception as error:
                    answer = self._failure(error)
                self._busy_since = 0.0
                future.set_result(answer)
        finally:
            if self._served is not None:
                self._served.close()
            self.server.close()

    def _orphaned(self) -> bool:
        return self._parent is not None and os.getppid() != self._parent

    # -- in the server's thread ------------------------------------------------------------------------------

    def _hello(self, request: Request) -> Dict[str, Any]:
        theirs, client = request.args.get("contract"), request.args.get("client")
        if theirs != CONTRACT:
            raise Rejected(f"the worker speaks contract {CONTRACT}, this side {theirs!r}")
        silent = time.monotonic() - self._heard
        if self._client not in ("", client) and silent < LEASE_SECONDS:
            return {
                "taken": f"it serves another client, heard {silent:.0f} s ago; "
                f"end that one, wait {LEASE_SECONDS:g} s, or start a second worker"
            }
        self._client, self._heard = client, time.monotonic()
        secret = request.arrays.get("secret", np.zeros(0, np.uint8)).tobytes()
        return {
            "instance": self._instance,
            "process": os.getpid(),
            "python": ".".join(map(str, sys.version_info[:3])),
            "target": self.target,
            "shared": len(secret) > 0 and self._pieces.probe(request.args.get(PIECE), secret),
        }

    def _ping(self, request: Request) -> Dict[str, Any]:
        self._recognise(request)
        since = self._busy_since
        return {"instance": self._instance, "busy": time.monotonic() - since if since else 0.0}

    def _later(self, request: Request, do: Any) -> Future:
        self._recognise(request)
        future: Future = Future()
        self._work.put((request, do, future))
        return future

    def _recognise(self, request: Request) -> None:
        if request.args.get("client") != self._client:
            raise Rejected(
                "the worker does not serve you: it was restarted, or another client took it"
            )
        self._heard = time.monotonic()

    # -- in the main thread ----------------------------------------------------------------------------------

    def _open(self, request: Request) -> Answer:
        """Make the object, or find that the one that is there is what is wanted."""
        asked = unpack(request.arrays["tree"], np.zeros(0, np.uint8))
        if self._served is not None and asked != self._asked:
            if self._served.kind == SIMULATION:  # many simulators can be made once in a process
                changed = [k for k in asked if asked[k] != self._asked.get(k)]
                made = "; ".join(f"{k}: {self._asked.get(k)!r:.200}" for k in changed)
                raise Rejected(
                    f"the worker holds a simulator made for {made}: "
                    "ask for the same, or start the worker again"
                )
            self._served.close()
            self._served = None
        if self._served is None:
            opening = dict(asked, options=dict(asked["options"], **self._options))
            self._served = Served(self.target, opening.pop("kind"), opening)
            self._asked = asked
        return self._answer(request, [self._served.spec()], None, 0.0)

    def _call(self, request: Request) -> Answer:
        """A list of [method, arguments] or [method, arguments, keywords], one after the other; their results."""
        if self._served is None:
            raise Rejected("nothing was opened yet")
        start = time.monotonic()
        self._pieces.keep(request.args.get("pieces", ()))
        piece = request.args.get(PIECE)
        memory = None if piece is None else self._pieces.get(piece)
        inline = request.arrays.get("body")
        sent = memory if inline is None and memory is not None else inline
        # Copied: the object may keep what it gets, and this memory serves for the answer.
        calls = unpack(
            request.arrays["tree"], np.zeros(0, np.uint8) if sent is None else sent, copy=True
        )
        body = None if memory is None else Body(memory)
        results = [self._served.call(body, *call) for call in calls]
        return self._answer(request, results, body, start)

    def _answer(
        self, request: Request, results: List[Any], body: Body | None, start: float
    ) -> Answer:
        packed = Packed(results, body)
        header = {"worked": time.monotonic() - start, "bytes": packed.nbytes}
        arrays: wire.Arrays = {"tree": np.frombuffer(packed.data, np.uint8)}
        if body is not None and packed.nbytes <= body.memory.size:
            packed.write(body.memory)
        elif packed.nbytes:
            arrays["body"] = packed.body()
        return header, arrays

    def _leave(self, request: Request) -> Dict[str, Any]:
        """The client goes. A worker that it started goes too; another one keeps its simulator for the next."""
        self._client = ""
        self._pieces.keep(())
        self._stop = self._parent is not None
        return {}

    def _failure(self, error: Exception) -> Answer:
        """An exception of the object, in full: an error on the socket would be cut to a line."""
        log.error("%s: %s", type(error).__name__, error, exc_info=error)
        lost = not isinstance(error, MISTAKES)
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        refused = str(error) if isinstance(error, Rejected) else ""
        return {"failure": text[-MAX_TRACEBACK:], "lost": lost, "refused": refused}, {}
