"""Requests to a worker and its answers: through the pipe of a process of ours, or over the network."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, Protocol

import numpy as np

from twinrl.core import wire
from twinrl.core.errors import DeadlineError, Rejected, TwinRLError
from twinrl.core.keys import Keys
from twinrl.core.sockets import Client
from twins.backends.contract import SimulationLost
from twins.backends.remote_process import WorkerProcess

LOOK_SECONDS = 0.05  # between looks whether who should answer still lives
PING_SECONDS = 2.0  # between signs of life to a worker that we have not started
GOODBYE_SECONDS = 2.0
Arrays = dict[str, np.ndarray]


class Channel(Protocol):
    """To one worker. What it raises but Rejected says that there will be no more answers."""

    def ask(
        self, method: str, args: dict[str, Any], arrays: Arrays, seconds: float, what: str
    ) -> tuple[dict[str, Any], wire.Arrays]:
        """The answer; SimulationLost when the worker is gone, or did not do `what` within `seconds`."""

    def greeted(self, hello: dict[str, Any]) -> None:
        """The worker has said who it is."""

    def leave(self) -> None:
        """Say goodbye."""

    def close(self, patience: float) -> None:
        """Let go; a process of ours ends at the latest after `patience` seconds."""


class PipeChannel:
    """To a process that we have started."""

    def __init__(self, name: str, process: WorkerProcess) -> None:
        self._name, self._process = name, process

    def ask(
        self, method: str, args: dict[str, Any], arrays: Arrays, seconds: float, what: str
    ) -> tuple[dict[str, Any], wire.Arrays]:
        """See Channel."""
        deadline = time.monotonic() + seconds

        def look() -> None:
            if not self._process.alive:
                raise EOFError
            if time.monotonic() > deadline:
                raise SimulationLost(late(self._name, what, seconds))

        try:
            self._process.pipe.send(wire.pack({"method": method, "args": args}, arrays), look)
            header, found = wire.unpack(self._process.pipe.receive(look))
        except EOFError:
            ended = self._process.how_it_ended()
            raise SimulationLost(f"the {self._name}, asked to {what}, {ended}") from None
        return header["result"], found

    def greeted(self, hello: dict[str, Any]) -> None:
        """Nothing more is wanted."""

    def leave(self) -> None:
        """The worker ends."""
        deadline = time.monotonic() + GOODBYE_SECONDS

        def look() -> None:
            if time.monotonic() > deadline:
                raise EOFError

        with contextlib.suppress(EOFError):
            self._process.pipe.send(wire.pack({"method": "leave", "args": {}}), look)

    def close(self, patience: float) -> None:
        """See Channel."""
        self._process.end(patience)


class DialledChannel:
    """To a worker that was started by hand, and is told every other second that we live."""

    def __init__(self, name: str, address: str, keys: str, silent_seconds: float) -> None:
        self._name, self._address, self._silent = f"{name} at {address}", address, silent_seconds
        self._client = Client(name, address, Keys.load(keys))
        self._token = secrets.token_hex(8)
        self._instance, self._heard = "", time.monotonic()
        self._why = ""  # the worker is not ours any more
        self._stop = threading.Event()

    def ask(
        self, method: str, args: dict[str, Any], arrays: Arrays, seconds: float, what: str
    ) -> tuple[dict[str, Any], wire.Arrays]:
        """See Channel."""
        deadline = time.monotonic() + seconds
        # Imports and compilers may keep a worker from answering while it makes its simulator.
        silence = self._silent if method == "call" else seconds
        future = self._client.submit(method, {"client": self._token, **args}, arrays)
        while True:
            with contextlib.suppress(FutureTimeout):
                return future.result(LOOK_SECONDS)
            now = time.monotonic()
            if not self._why and now - self._heard > silence and self._instance:
                self._why = f"gave no sign of life for {now - self._heard:.0f} s"
            if self._why or now > deadline:
                self._client.forget(future)
                if self._why:
                    raise SimulationLost(f"the {self._name}, asked to {what}, {self._why}")
                raise SimulationLost(late(self._name, what, seconds))

    def greeted(self, hello: dict[str, Any]) -> None:
        """From now on we hear whether it is still the same worker."""
        self._instance, self._heard = hello["instance"], time.monotonic()
        threading.Thread(target=self._ping, name=f"pulse of {self._name}", daemon=True).start()

    def leave(self) -> None:
        """The worker keeps its simulator for the next client."""
        with contextlib.suppress(TwinRLError):
            self._client.call("leave", {"client": self._token}, timeout=GOODBYE_SECONDS)

    def close(self, patience: float) -> None:
        """See Channel."""
        self._stop.set()
        self._client.close()

    def _ping(self) -> None:
        while not self._stop.wait(PING_SECONDS):
            try:
                answer, _ = self._client.call("ping", {"client": self._token}, timeout=PING_SECONDS)
            except DeadlineError:
                continue
            except Rejected as error:
                self._why = f"is not ours any more: {error}"
                return
            except TwinRLError:  # the client is being closed
                return
            if answer["instance"] != self._instance:
                self._why = "was started again"
                return
            self._heard = time.monotonic()


def late(name: str, what: str, seconds: float) -> str:
    """What is said of a worker that did not answer."""
    return (
        f"the {name} did not {what} within {seconds:g} s and is taken for hung; "
        "if it is only slow, raise call_seconds or start_seconds in twins.options.worker"
    )
