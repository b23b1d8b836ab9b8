"""What a worker answers: hello, open, call. `serve` answers through a pipe, `twins.worker.listener` to who dials in."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import time
import traceback
from typing import Any, Dict, List, Tuple

import numpy as np

from twinrl.core import wire
from twinrl.core.errors import Rejected
from twins.worker import CONTRACT
from twins.worker.memory import Pieces
from twins.worker.pipe import Pipe
from twins.worker.served import SIMULATION, Served
from twins.worker.tree import Body, Packed, unpack

log = logging.getLogger(__name__)
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
NOTHING = np.zeros(0, np.uint8)
Answer = Tuple[Dict[str, Any], wire.Arrays]


class Service:
    """Holds what `target` ("module:factory") makes, once a client has said with which options."""

    def __init__(self, target: str, options: dict[str, Any] | None = None) -> None:
        """`options` override the client's."""
        self.target, self._options = target, options or {}
        self.instance = secrets.token_hex(8)
        self._served: Served | None = None
        self._asked: Any = None  # what the object was made from
        self._pieces = Pieces()

    def answer(self, method: str, args: dict[str, Any], arrays: wire.Arrays) -> Answer:
        """The answer to a request. An exception becomes one, in full: an error on a socket would be cut to a line."""
        try:
            return {"hello": self.hello, "open": self._open, "call": self._call}[method](
                args, arrays
            )
        except Exception as error:
            log.error("%s: %s", type(error).__name__, error, exc_info=error)
            text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
            refused = str(error) if isinstance(error, Rejected) else ""
            lost = not isinstance(error, MISTAKES)
            return {"failure": text[-MAX_TRACEBACK:], "lost": lost, "refused": refused}, {}

    def hello(self, args: dict[str, Any], arrays: wire.Arrays) -> Answer:
        """Who we are, and whether we see the other side's memory."""
        if args.get("contract") != CONTRACT:
            raise Rejected(
                f"the worker speaks contract {CONTRACT}, this side {args.get('contract')!r}"
            )
        secret = arrays.get("secret", NOTHING).tobytes()
        told = {
            "instance": self.instance,
            "process": os.getpid(),
            "python": ".".join(map(str, sys.version_info[:3])),
            "target": self.target,
            "shared": len(secret) > 0 and self._pieces.probe(args.get(PIECE), secret),
        }
        return told, {}

    def _open(self, args: dict[str, Any], arrays: wire.Arrays) -> Answer:
        """Make the object, or find that the one that is there is what is wanted."""
        asked = unpack(arrays["tree"], NOTHING)
        if self._served is not None and asked != self._asked:
            if self._served.kind == SIMULATION:  # many simulators can be made once in a process
                changed = [k for k in asked if asked[k] != self._asked.get(k)]
                made = "; ".join(f"{k}: {self._asked.get(k)!r:.200}" for k in changed)
                raise Rejected(
                    f"the worker holds a simulator made for {made}: "
                    "ask for the same, or start the worker again"
                )
            self.close()
        if self._served is None:
            opening = dict(asked, options=dict(asked["options"], **self._options))
            self._served = Served(self.target, opening.pop("kind"), opening)
            self._asked = asked
        return _packed([self._served.spec()], None, time.monotonic())

    def _call(self, args: dict[str, Any], arrays: wire.Arrays) -> Answer:
        """A list of [method, arguments] or [method, arguments, keywords], one after the other; their results."""
        if self._served is None:
            raise Rejected("nothing was opened yet")
        start = time.monotonic()
        self._pieces.keep(args.get("pieces", ()))
        piece = args.get(PIECE)
        memory = None if piece is None else self._pieces.get(piece)
        sent = arrays.get("body", NOTHING if memory is None else memory)
        # Copied: the object may keep what it gets, and this memory serves for the answer.
        calls = unpack(arrays["tree"], sent, copy=True)
        body = None if memory is None else Body(memory)
        results = [self._served.call(body, *call) for call in calls]
        return _packed(results, body, start)

    def release(self) -> None:
        """The client goes; its memory goes with it."""
        self._pieces.keep(())

    def close(self) -> None:
        """Close the object."""
        served, self._served = self._served, None
        if served is not None:
            served.close()


def _packed(results: List[Any], body: Body | None, start: float) -> Answer:
    packed = Packed(results, body)
    header = {"worked": time.monotonic() - start, "bytes": packed.nbytes}
    arrays: wire.Arrays = {"tree": np.frombuffer(packed.data, np.uint8)}
    if body is not None and packed.nbytes <= body.memory.size:
        packed.write(body.memory)
    elif packed.nbytes:
        arrays["body"] = packed.body()
    return header, arrays


def serve(service: Service, pipe: Pipe, parent: int) -> None:
    """Answer the process that has started this one, until it says leave or ends."""

    def look() -> None:
        if os.getppid() != parent:
            raise EOFError("the parent has ended")

    try:
        while True:
            header, arrays = wire.unpack(pipe.receive(look))
            if header["method"] == "leave":
                return
            answer = service.answer(header["method"], header["args"], arrays)
            pipe.send(wire.pack({"result": answer[0]}, answer[1]), look)
    except EOFError as error:
        log.info("ends: %s", error)
    finally:
        service.close()
