"""The bridge's end of the link: one live connection, one for bulk, and a thread that keeps the lease."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from concurrent.futures import Future
from typing import Any, Callable, NamedTuple

import numpy as np

from robot_bridge import frames, parts, recent
from robot_bridge.offset import ClockOffset
from robot_bridge.protocol import NOT_ATTACHED, PROTOCOL, SOFTWARE, Job
from robot_bridge.spool import Spool
from twinrl.core.errors import DeadlineError, Rejected, RemoteError, TwinRLError, WireError
from twinrl.core.keys import Keys
from twinrl.core.sockets import Client
from twinrl.installed import distribution

log = logging.getLogger(__name__)
STATE_S = 0.25  # between two heartbeats that tell how the arm is


class Wishes(NamedTuple):
    """What the cluster wants of this robot at present; every heartbeat's answer replaces it."""

    hold: bool = False
    detach: bool = False
    estop: int = 0  # number of the last emergency stop that was asked for, 0 for none
    paused: bool = False


class Link:
    """Dials the gateway, stays attached through cuts and restarts, and says how things stand."""

    def __init__(
        self, url: str, keys: Keys, name: str, heartbeat_s: float = 0.05, link_s: float = 1.0
    ) -> None:
        self.url, self.name = url, name
        self.session = uuid.uuid4().hex
        self.wishes = Wishes()
        self.offset = ClockOffset()  # of the gateway's clock
        self.fatal: TwinRLError | None = None
        self.reattached = 0
        self._heartbeat_s, self._link_s = heartbeat_s, link_s
        self._state: Callable[[], dict[str, Any]] = dict
        self._attach_args: dict[str, Any] = {}
        self._run = ""
        self._heard = time.monotonic()
        self._rate = 1e6  # bytes/s that the last pieces went at
        self._told = recent.Told()  # frames that need not be sent again
        self.sent_bytes = self.spared_bytes = 0  # of segments
        self._stop = threading.Event()
        self._live = Client("the gateway", url, keys)
        self._bulk = Client(
            "the gateway", url, keys
        )  # a segment never stands before an observation
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def hello(self, wait_s: float) -> Job:
        """What the run is; DeadlineError says what may be wrong when nobody answers."""
        args = {"name": self.name, **self._software()}
        deadline = time.monotonic() + wait_s
        while True:
            try:
                result, _ = self._live.call("hello", args, timeout=min(2.0, wait_s))
                return Job.from_header(result["job"])
            except DeadlineError:
                if time.monotonic() < deadline:
                    continue  # a request that met a dying gateway is never answered
                raise DeadlineError(
                    f"no answer from {self.url} within {wait_s:g} s: is the run up, is the port open, and is "
                    "the key this run's (runs/NAME/keys/robot.key)? A wrong key gets no answer at all"
                ) from None

    def attach(self, wait_s: float, **args: Any) -> dict[str, Any]:
        """Join the run; Rejected carries the line that mends it."""
        self._attach_args = dict(
            args,
            name=self.name,
            session=self.session,
            **self._software(),
            host=f"{socket.gethostname()} (process {os.getpid()})",
        )
        sent = time.monotonic()
        result, _ = self._live.call("attach", self._attach_args, timeout=wait_s)
        self._compare_clocks(sent, result)
        self._run, self._heard = result["job"]["run"], time.monotonic()
        return result

    def keep(self, state: Callable[[], dict[str, Any]], on_answer: Callable[[], None]) -> None:
        """Send heartbeats from now on, some with `state()`; `on_answer()` is called at each answer."""
        self._state, self._on_answer = state, on_answer
        self._thread.start()

    @property
    def connected(self) -> bool:
        """The gateway answered a heartbeat not long ago."""
        return time.monotonic() - self._heard < self._link_s

    @property
    def silent_s(self) -> float:
        """Time since the gateway's last answer."""
        return time.monotonic() - self._heard

    def episode(self, finished: dict[str, Any] | None, timeout: float) -> dict[str, Any]:
        """The next episode's start, or {"wait": reason}."""
        args = {"finished": finished, "timeout": timeout, **self._me()}
        try:
            return self._live.call("episode", args, timeout=timeout + 1.0)[0]
        except DeadlineError as error:
            return {"wait": str(error)}
        except RemoteError as error:
            time.sleep(0.1)
            return {"wait": str(error)}

    def observe(self, args: dict[str, Any], arrays: dict[str, np.ndarray]) -> Future:
        """Ask for a chunk."""
        digests = self._told.keep(frames.split(arrays))
        future = self._live.submit("observe", {**args, **self._me()}, arrays)

        def note(done: Future) -> None:
            if not done.cancelled() and done.exception() is None:
                self._told.answered(digests)

        future.add_done_callback(note)
        return future

    def forget(self, future: Future) -> None:
        """A chunk that nobody waits for any more."""
        self._live.forget(future)

    def segment(
        self, sequence: int, data: bytes, stop: threading.Event | None = None
    ) -> dict[str, Any]:
        """Hand over a segment (`robot_bridge.parts`), without the frames that the gateway still has from questions; the
        answer is the replay service's own acknowledgement. DeadlineError when `stop` is set meanwhile."""
        known = self._told.known()
        thin = recent.thin(data, known) if known else None
        if thin is not None:
            result = self._send(sequence, thin, stop)
            if "missing" not in result:
                self.spared_bytes += len(data) - len(thin)
                return result
            self._told.clear()  # it was started anew
        return self._send(sequence, data, stop)

    def _send(self, sequence: int, data: bytes, stop: threading.Event | None) -> dict[str, Any]:
        """In pieces so small that what is live does not wait for long."""
        offset, total, digest = 0, len(data), recent.digest_of(data)
        while stop is None or not stop.is_set():
            size = parts.piece(self._rate)
            args = {"sequence": sequence, "offset": offset, "total": total, "digest": digest}
            array = np.frombuffer(data, np.uint8, min(size, total - offset), offset)
            began = time.monotonic()
            args.update(self._me())
            result = self._bulk.call("segment", args, {"data": array}, timeout=30.0)[0]
            self.sent_bytes += len(array)
            rate = len(array) / max(time.monotonic() - began, 1e-4)
            self._rate = 0.7 * self._rate + 0.3 * rate
            if "offset" not in result:
                return result
            offset = int(result["offset"])
        raise DeadlineError("the upload was stopped")

    def close(self, finished: dict[str, Any] | None = None) -> None:
        """Detach and hang up."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(2)
        if self._run and self.fatal is None:
            args = {"finished": finished, "state": self._state(), **self._me()}
            try:
                self._live.call("detach", args, timeout=1.0)
            except (DeadlineError, RemoteError) as error:
                log.info("left without the gateway's answer: %s", error)
        self._live.close()
        self._bulk.close()

    def _software(self) -> dict[str, Any]:
        return {"protocol": PROTOCOL, "software": SOFTWARE, "package": distribution()}

    def _me(self) -> dict[str, Any]:
        return {"name": self.name, "session": self.session}

    def _beat(self) -> None:
        told, known = 0.0, ""
        while not self._stop.wait(self._heartbeat_s):
            try:
                args: dict[str, Any] = self._me()
                state, now = self._state(), time.monotonic()
                # All of it is ten times as long as the rest: now and then, and when something has changed.
                if now - told > STATE_S or state["doing"] != known:
                    args, told, known = {"state": state, **args}, now, state["doing"]
                sent = time.monotonic()
                result, _ = self._live.call("heartbeat", args, timeout=self._link_s)
                self._compare_clocks(sent, result)
                self.wishes = Wishes(**{name: result[name] for name in Wishes._fields})
                self._heard = time.monotonic()
                self._on_answer()
            except DeadlineError:
                pass  # `connected` tells
            except Rejected as error:
                if not str(error).startswith(NOT_ATTACHED):
                    self.fatal = error
                    return
                self._attach_again()
            except RemoteError as error:
                log.warning("heartbeat: %s", error)

    def _compare_clocks(self, sent: float, result: dict[str, Any]) -> None:
        if "time" in result:  # a gateway of before does not tell
            self.offset.hear(sent, time.monotonic(), float(result["time"]))

    def _attach_again(self) -> None:
        """The gateway came back or took us for gone: go on where we were."""
        try:
            result, _ = self._live.call("attach", self._attach_args, timeout=2.0)
        except Rejected as error:
            self.fatal = error
            return
        except (DeadlineError, RemoteError):
            return
        if result["job"]["run"] != self._run:
            self.fatal = Rejected(
                f"{self.url} now serves run {result['job']['run']!r}, this robot belongs to {self._run!r}: "
                "start attach again to join the new one"
            )
            return
        self.reattached += 1
        self._heard = time.monotonic()
        log.info("attached again to run %s as %s", self._run, self.name)


class Uploader:
    """Sends what lies in the spool, in order, each until the replay service acknowledges it."""

    def __init__(self, link: Link, spool: Spool) -> None:
        self._link, self._spool = link, spool
        self.sent = self.repeated = self.refused = 0
        self.waits_for = ""  # why the oldest segment is still here
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop sending; what is left stays in the spool."""
        self._stop.set()
        self._thread.join(5)

    def _run(self) -> None:
        pause = 0.1
        while not self._stop.is_set():
            sequence = self._spool.oldest(0.2)
            if sequence is None:
                continue
            done, self.waits_for = self._send(sequence)
            pause = 0.1 if done else min(2.0, pause * 2)
            if not done:
                self._stop.wait(pause)

    def _send(self, sequence: int) -> tuple[bool, str]:
        try:
            self._spool.read(sequence)  # a damaged one is set aside here, not refused over there
            data = self._spool.data(sequence)
            result = self._link.segment(sequence, data, self._stop)
        except Rejected as error:
            if str(error).startswith(NOT_ATTACHED):
                return False, str(error)
            return self._set_aside(sequence, error)
        except (DeadlineError, RemoteError) as error:
            return False, str(error)
        except (WireError, FileNotFoundError) as error:
            return self._set_aside(sequence, error)
        if result.get("acknowledged", -1) < sequence:  # a repeat is answered with the newest number
            return False, f"segment {sequence} was answered with {result}"
        self._spool.remove(sequence)
        self.sent += 1
        self.repeated += bool(result.get("repeated"))
        return True, ""

    def _set_aside(self, sequence: int, error: Exception) -> tuple[bool, str]:
        self.refused += 1
        path = self._spool.set_aside(sequence)
        log.error("segment %d was refused and lies in %s: %s", sequence, path, error)
        return True, ""
