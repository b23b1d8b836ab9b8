"""The way to one worker: made, called, lost, and made again."""

from __future__ import annotations

import contextlib
import difflib
import logging
import secrets
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, NamedTuple

import numpy as np

from twinrl.core.errors import (
    ConfigError,
    DeadlineError,
    ProcessDied,
    Rejected,
    RemoteError,
    TwinRLError,
)
from twinrl.core.keys import Keys
from twinrl.core.sockets import Client
from twins.backends.contract import SimulationLost
from twins.backends.remote_memory import Pieces, probe
from twins.backends.remote_process import STOP_SECONDS, Folder, WorkerProcess, wait_for
from twins.worker import CONTRACT
from twins.worker.tree import Packed, unpack

log = logging.getLogger(__name__)
HELLO_SECONDS, GOODBYE_SECONDS = 30.0, 2.0
LOOK_SECONDS = 0.05  # between looks whether the process that should answer still lives
PING_SECONDS = 2.0  # between signs of life to a worker that we have not started
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
        self._token = secrets.token_hex(8)
        self._folder = Folder() if worker.python is not None else None
        self._process: WorkerProcess | None = None
        self._client: Client | None = None
        self._pulse: _Pulse | None = None
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
            self._reach()
            self._greet()
            _result, arrays = self._request(
                "open", {}, self._opened(), self.worker.start_seconds, "make its simulator"
            )
            (self.spec,) = unpack(
                arrays["tree"], arrays.get("body", np.zeros(0, np.uint8)), copy=True
            )
        except BaseException:
            self._say_goodbye()
            self._drop()
            raise
        self.connected = True

    def _reach(self) -> None:
        if self._folder is not None:
            worker = self.worker
            self._process = WorkerProcess(
                worker.python,
                self.target,
                self._folder,
                self._starts,
                worker.path,
                worker.environment,
            )
            wait_for(self._process, worker.start_seconds)
            keys, address = Keys.load(self._folder.keys / "cluster.key"), self._process.address
        else:
            keys, address = Keys.load(self.worker.keys), self.worker.address
        self._client = Client(self._name, address, keys)

    def _greet(self) -> None:
        args: dict[str, Any] = {"contract": CONTRACT, "client": self._token}
        arrays = {}
        piece = probe()
        if piece is not None:
            args["piece"], arrays["secret"] = piece[0].address, piece[1]
        try:
            hello, _ = self._request("hello", args, arrays, HELLO_SECONDS, "say hello")
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
        if self._folder is None:
            self._pulse = _Pulse(self._client, self._token, hello["instance"])

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
            future = self._client.submit(method, {"client": self._token, **args}, arrays)
            # Imports and compilers may keep a worker from answering while it makes its simulator.
            silence = self.worker.silent_seconds if method == "call" else seconds
            result, found = self._wait(future, seconds, silence, what)
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

    def _wait(
        self, future: Future, seconds: float, silence: float, what: str
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        deadline = time.monotonic() + seconds
        while True:
            try:
                return future.result(LOOK_SECONDS)
            except FutureTimeout:
                pass
            if self._process is not None and not self._process.alive:
                with contextlib.suppress(FutureTimeout):  # an answer may have come before its end
                    return future.result(0.0)
                raise SimulationLost(
                    f"the {self._name}, asked to {what}, {self._process.how_it_ended()}"
                )
            if self._pulse is not None and self._pulse.lost(silence):
                raise SimulationLost(
                    f"the {self._name} at {self.worker.address}, asked to {what}, {self._pulse.why}"
                )
            if time.monotonic() > deadline:
                self._client.forget(future)
                raise SimulationLost(
                    f"the {self._name} did not {what} within {seconds:g} s and is taken for hung; "
                    "if it is only slow, raise call_seconds or start_seconds in twins.options.worker"
                )

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
        if self._pulse is not None:
            self._pulse.stop()
            self._pulse = None
        if self._process is not None:
            self._process.end(patience)
            self._process = None
        if self._client is not None:
            self._client.close()
            self._client = None

    def close(self) -> None:
        """Say goodbye. A worker that we have started ends, another one keeps its simulator."""
        self._say_goodbye()
        self._drop(patience=STOP_SECONDS)
        if self._folder is not None:
            self._folder.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # half made, or the interpreter ends
            self.close()

    def _say_goodbye(self) -> None:
        if self._client is None or self.pid is None:
            return
        with contextlib.suppress(TwinRLError, FutureTimeout):
            future = self._client.submit("leave", {"client": self._token})
            if self._process is None:  # else its end is waited for
                future.result(GOODBYE_SECONDS)

    def stats(self) -> dict[str, float]:
        """Restarts, calls, and of the seconds waited for them how many were the border's own."""
        return {
            "worker/restarts": float(max(0, self._starts - 1)),
            "worker/calls": float(self._calls),
            "worker/waited_s": self._waited,
            "worker/border_s": self._waited - self._worked,
            "worker/shared_mb": self._pieces.nbytes / 1e6 if self._pieces is not None else 0.0,
        }


class _Pulse:
    """Tells a worker that was started by hand that we live, and hears whether it does."""

    def __init__(self, client: Client, token: str, instance: str) -> None:
        self._client, self._token, self._instance = client, token, instance
        self._heard = time.monotonic()
        self.why = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse of a worker", daemon=True)
        self._thread.start()

    def lost(self, seconds: float) -> bool:
        """Whether it was silent for `seconds`, or is another one now; `why` says which."""
        silent = time.monotonic() - self._heard
        if not self.why and silent > seconds:
            self.why = f"gave no sign of life for {silent:.0f} s"
        return bool(self.why)

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(PING_SECONDS):
            try:
                answer, _ = self._client.call("ping", {"client": self._token}, timeout=PING_SECONDS)
            except DeadlineError:
                continue
            except Rejected as error:
                self.why = f"is not ours any more: {error}"
                return
            except TwinRLError:  # the client is being closed
                return
            if answer["instance"] != self._instance:
                self.why = "was started again"
                return
            self._heard = time.monotonic()
