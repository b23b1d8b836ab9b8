"""The way to one worker: made, called, lost, and made again."""

from __future__ import annotations

import contextlib
import difflib
import logging
import time
from typing import Any, NamedTuple

import numpy as np

from twinrl.core.errors import (
    ConfigError,
    ProcessDied,
    Rejected,
    RemoteError,
    TwinRLError,
)
from twins.backends.contract import SimulationLost
from twins.backends.remote_channel import Channel, DialledChannel, PipeChannel
from twins.backends.remote_memory import Pieces, probe
from twins.backends.remote_process import STOP_SECONDS, Folder, WorkerProcess
from twins.worker import CONTRACT
from twins.worker.tree import Packed, unpack

log = logging.getLogger(__name__)
HELLO_SECONDS = 30.0  # of a worker that is there already
LARGE = 16 << 10  # bytes of arguments from which they go through shared memory
MAX_RESTARTS = 5  # within RESTART_WINDOW, then the worker is given up
RESTART_WINDOW = 600.0  # s
BACK_OFF, LONGEST_BACK_OFF = 0.5, 30.0  # s before the second restart, doubled with each


class Worker(NamedTuple):
    """How a worker is reached: `python` starts it on this host, or it waits at `address`."""

    python: str | None = None
    address: str | None = None  # tcp://HOST:PORT or ipc://FILE of one that was started by hand
    keys: str | None = None  # cluster.key of that one
    path: tuple[str, ...] = ()  # more folders that its Python imports from
    environment: dict[str, str] = {}  # noqa: RUF012  more variables, such as LD_LIBRARY_PATH
    start_seconds: float = 600.0  # until its simulator is made
    call_seconds: float = 120.0  # for any call, before it is taken for hung and killed
    silent_seconds: float = 30.0  # without a sign of life from one that was started by hand
    memory_mb: int = 4096  # shared memory at most

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Worker:
        """From the configuration; ConfigError names what is wrong."""
        for key in settings:
            if key not in cls._fields:
                close = difflib.get_close_matches(str(key), cls._fields, 1, cutoff=0.4)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ConfigError(
                    f"unknown setting {key!r} of a worker, not in {list(cls._fields)}{hint}"
                )
        worker = cls(**settings)
        if (worker.python is None) == (worker.address is None):
            raise ConfigError(
                "a worker needs either `python`, to be started on this host, or `address`, where it was started"
            )
        if worker.address is not None and worker.keys is None:
            raise ConfigError(
                f"the worker at {worker.address} needs `keys`, a copy of the file cluster.key in the folder "
                "that it was started with"
            )
        return worker._replace(path=tuple(worker.path))


class Link:
    """Calls an object in a worker, which is started anew after its death. For one thread at a time."""

    def __init__(self, worker: Worker, target: str, opening: dict[str, Any]) -> None:
        """`target` is "module:factory"; `opening` what the worker makes the object from. `connect` does it."""
        self.worker, self.target = worker, target
        self.connected = False
        self.spec: dict[str, Any] = {}  # of the object, as the worker has told it
        self.pid: int | None = None  # of the worker
        self._opening = opening
        self._name = f"worker of {target}"
        self._folder = Folder() if worker.python is not None else None
        self._channel: Channel | None = None
        self._pieces: Pieces | None = None
        self._wanted: dict[str, int] = {}  # by last method: bytes of the largest answer so far
        self._starts = 0
        self._deaths: list[float] = []
        self._calls, self._waited, self._worked = 0, 0.0, 0.0

    # -- made ------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Reach the worker, again if it was lost, and wait for its simulator.

        The first time, whatever is wrong is the user's to mend and raised as it is. Later it is tried again, with
        growing pauses, until ProcessDied says that the worker was given up.
        """
        if not self._starts:
            try:
                self._connect()
            except SimulationLost as error:
                raise ProcessDied(str(error)) from None
        while not self.connected:
            self._wait_before_restart()
            try:
                self._connect()
            except (SimulationLost, TwinRLError) as error:
                log.warning("%s: restart failed: %s", self._name, error)
                self._count_death(str(error))

    def _connect(self) -> None:
        self._starts += 1
        try:
            self._channel = self._reach()
            self._greet()
            _result, arrays = self._request(
                "open", {}, self._opened(), self.worker.start_seconds, "make its simulator"
            )
            (self.spec,) = unpack(
                arrays["tree"], arrays.get("body", np.zeros(0, np.uint8)), copy=True
            )
        except BaseException:
            if self._channel is not None and self.pid is not None:
                self._channel.leave()
            self._drop()
            raise
        self.connected = True

    def _reach(self) -> Channel:
        worker = self.worker
        if self._folder is None:
            return DialledChannel(self._name, worker.address, worker.keys, worker.silent_seconds)
        process = WorkerProcess(
            worker.python, self.target, self._folder, worker.path, worker.environment
        )
        return PipeChannel(self._name, process)

    def _greet(self) -> None:
        args: dict[str, Any] = {"contract": CONTRACT}
        arrays = {}
        piece = probe()
        if piece is not None:
            args["piece"], arrays["secret"] = piece[0].address, piece[1]
        try:
            seconds = self.worker.start_seconds if self._folder is not None else HELLO_SECONDS
            hello, _ = self._request("hello", args, arrays, seconds, "say hello")
        except Rejected as error:
            raise Rejected(
                f"the {self._name} is of another version: {error}; run the same TwinRL on both sides"
            ) from None
        except SimulationLost as error:
            hint = "; are address and keys its own?" if self._folder is None else ""
            raise SimulationLost(f"{error}{hint}") from None
        if "taken" in hello:
            raise Rejected(f"the worker at {self.worker.address} is taken: {hello['taken']}")
        if self._folder is None and hello["target"] != self.target:
            raise Rejected(
                f"the worker at {self.worker.address} serves {hello['target']}, not {self.target}: "
                f"start it with --serve {self.target}"
            )
        self.pid = hello["process"]
        self._pieces = Pieces(self.worker.memory_mb << 20) if hello["shared"] else None
        self._channel.greeted(hello)

    def _opened(self) -> dict[str, np.ndarray]:
        packed = Packed(self._opening)
        return {"tree": np.frombuffer(packed.data, np.uint8)}

    def _wait_before_restart(self) -> None:
        recent = [t for t in self._deaths if time.monotonic() - t < RESTART_WINDOW]
        if len(recent) > 1:
            pause = min(BACK_OFF * 2 ** (len(recent) - 2), LONGEST_BACK_OFF)
            time.sleep(max(0.0, recent[-1] + pause - time.monotonic()))

    # -- called ----------------------------------------------------------------------------------------------

    def call(self, calls: list[tuple[Any, ...]], nbytes: int = 0) -> list[Any]:
        """The results of some calls, executed one after the other: one message there and one back.

        A call is (method, arguments) or (method, arguments, keywords). Arrays of results are read-only and may be
        views of shared memory; `nbytes` of them are expected. SimulationLost when the worker died, hung, or its simulator failed; RemoteError, with the worker's
        traceback, when a method refused its arguments.
        """
        if not self.connected:
            raise SimulationLost(f"the {self._name} is gone")
        start = time.monotonic()
        packed = Packed([list(call) for call in calls])
        args: dict[str, Any] = {}
        arrays = {"tree": np.frombuffer(packed.data, np.uint8)}
        last = calls[-1][0]
        wanted = max(nbytes, packed.nbytes, self._wanted.get(last, LARGE))
        lent = self._pieces.borrow(wanted) if self._pieces is not None else None
        if lent is not None:
            args["piece"], args["pieces"] = lent[0].address, self._pieces.numbers()
        if lent is not None and packed.nbytes >= LARGE:
            packed.write(lent[1])
        elif packed.nbytes:
            arrays["body"] = packed.body()
        what = "do " + ", ".join(call[0] for call in calls)
        try:
            result, found = self._request("call", args, arrays, self.worker.call_seconds, what)
        except SimulationLost as error:
            self._count_death(str(error))
            raise
        self._wanted[last] = max(self._wanted.get(last, 0), result["bytes"])
        body = found.get("body", lent[1] if lent is not None else np.zeros(0, np.uint8))
        results = unpack(found["tree"], body)
        self._calls += 1
        self._waited += time.monotonic() - start
        self._worked += result["worked"]
        return results

    def _request(
        self,
        method: str,
        args: dict[str, Any],
        arrays: dict[str, np.ndarray],
        seconds: float,
        what: str,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """An answer; whatever prevents one leaves no worker behind that could still be at work."""
        try:
            result, found = self._channel.ask(method, args, arrays, seconds, what)
        except Rejected as error:
            if method == "call":  # restarted by hand, or taken by another client
                self._drop()
                raise SimulationLost(f"the {self._name} is gone: {error}") from None
            raise
        except BaseException:
            # Also after Ctrl-C: an answer may still come, into memory that would be used again.
            self._drop()
            raise
        failure = result.get("failure")
        if failure is None:
            return result, found
        if result["refused"]:
            raise Rejected(result["refused"])
        if result["lost"] and method == "call":
            self._drop()
            raise SimulationLost(f"the {self._name} could not {what}:\n{failure}")
        raise RemoteError(f"the {self._name} could not {what}:\n{failure}")

    # -- lost ------------------------------------------------------------------------------------------------

    def _count_death(self, why: str) -> None:
        now = time.monotonic()
        self._deaths.append(now)
        recent = [t for t in self._deaths if now - t < RESTART_WINDOW]
        if len(recent) > MAX_RESTARTS:
            raise ProcessDied(
                f"the {self._name} was lost {len(recent)} times within {RESTART_WINDOW:g} s and is given up; "
                f"the last time: {why}"
            )

    def _drop(self, patience: float = 0.0) -> None:
        """Let go of the worker; one that we have started ends at the latest after `patience` seconds."""
        self.connected, self.pid = False, None
        self._pieces = None  # a worker that hangs may still write into the old ones
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close(patience)

    def close(self) -> None:
        """Say goodbye. A worker that we have started ends, another one keeps its simulator."""
        if self._channel is not None and self.pid is not None:
            self._channel.leave()
        self._drop(patience=STOP_SECONDS)
        if self._folder is not None:
            self._folder.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # half made, or the interpreter ends
            self.close()

    def stats(self) -> dict[str, float]:
        """Restarts, calls, and of the seconds waited for them how many were the border's own."""
        return {
            "worker/restarts": float(max(0, self._starts - 1)),
            "worker/calls": float(self._calls),
            "worker/waited_s": self._waited,
            "worker/border_s": self._waited - self._worked,
            "worker/shared_mb": self._pieces.nbytes / 1e6 if self._pieces is not None else 0.0,
        }
