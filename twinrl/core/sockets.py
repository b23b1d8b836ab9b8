"""Requests and replies over CURVE-encrypted ZeroMQ: one Server, one Client, one thread each.

A request names a method and carries a plain header and arrays; so does its reply. Everything is pulled by the
client (a peer behind a firewall only dials out); what a server must tell a client rides on a reply, and a
handler may answer late by returning a Future (a long poll).
"""

from __future__ import annotations

import collections
import itertools
import logging
import os
import socket as posix_socket
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, Callable, Dict, NamedTuple, Tuple, Union

import zmq
from zmq.auth.thread import ThreadAuthenticator

from twinrl.core import wire
from twinrl.core.errors import DeadlineError, Rejected, RemoteError, TwinRLError, WireError
from twinrl.core.keys import Keys, secure_client, secure_server

log = logging.getLogger(__name__)
MAX_MESSAGE_BYTES = 512 << 20
Answer = Tuple[Dict[str, Any], wire.Arrays]


class Request(NamedTuple):
    """What a handler gets."""

    peer: bytes  # the connection, stable until the peer reconnects
    role: str  # the role whose key the peer holds
    args: dict[str, Any]
    arrays: wire.Arrays


Handler = Callable[[Request], Union[Dict[str, Any], Answer, Future, None]]


class _Wake:
    """Lets other threads interrupt a poll."""

    def __init__(self) -> None:
        self.receiver, self._sender = posix_socket.socketpair()
        self.receiver.setblocking(False)
        self._sender.setblocking(False)

    def __call__(self) -> None:
        try:
            self._sender.send(b"x")
        except (BlockingIOError, OSError):
            pass  # full: the poll is already due to wake; closed: nobody polls any more

    def drain(self) -> None:
        try:
            self.receiver.recv(4096)
        except BlockingIOError:
            pass

    def close(self) -> None:
        self.receiver.close()
        self._sender.close()


def _tune(socket: zmq.Socket) -> None:
    socket.linger = 0
    socket.maxmsgsize = MAX_MESSAGE_BYTES
    socket.heartbeat_ivl = 1000  # ms; a dead peer is noticed even when TCP says nothing
    socket.heartbeat_timeout = 10_000
    socket.tcp_keepalive = 1


class Server:
    """Answers requests on `address` for peers whose public key is in `allowed` ({public key: role}).

    Handlers run one after the other in the server's thread, so state that only they touch needs no lock.
    A handler's exception goes to the caller as an error and to the log.
    """

    def __init__(
        self, name: str, address: str, keys: Keys, allowed: dict[str, str], extra: str = ""
    ) -> None:
        self.name = name
        self._allowed = dict(allowed)
        self._handlers: dict[str, Handler] = {}
        self._late: collections.deque = collections.deque()
        self._wake = _Wake()
        self._stop = threading.Event()
        self._counts: collections.Counter = collections.Counter()
        self._context = zmq.Context()
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("twinrl", self)
        self._socket = self._context.socket(zmq.ROUTER)
        _tune(self._socket)
        secure_server(self._socket, keys)
        try:
            for each in filter(None, (address, extra)):
                self._socket.bind(each)
            self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
            if extra:
                self.address = address
        except zmq.ZMQError as error:
            self._close_sockets()
            raise TwinRLError(
                f"{name} cannot listen on {address}: {error.strerror}. Is another run using the port?"
            ) from None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def callback(self, domain: str, key: bytes) -> bool:
        """ZeroMQ's authenticator asks whether a peer with public `key` may connect."""
        return key.decode() in self._allowed

    def bind(self, method: str, handler: Handler) -> None:
        """Answer requests for `method` with `handler`."""
        self._handlers[method] = handler

    def start(self) -> Server:
        """Serve in a thread of its own."""
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop serving; requests still waiting for an answer get none."""
        self._stop.set()
        self._wake()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(5)
        elif not self._thread.ident:
            self._close_sockets()

    def stats(self) -> dict[str, float]:
        """Requests answered and failed since the start, by method."""
        return {f"requests/{key}": float(n) for key, n in dict(self._counts).items()}

    def _close_sockets(self) -> None:
        self._socket.close()
        self._authenticator.stop()
        self._context.term()
        self._wake.close()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake.receiver, zmq.POLLIN)
        try:
            while not self._stop.is_set():
                events = dict(poller.poll(1000))
                if self._wake.receiver.fileno() in events or self._wake.receiver in events:
                    self._wake.drain()
                while self._late:
                    self._answer_late(*self._late.popleft())
                if self._socket in events:
                    for _ in range(64):  # then look at late answers again
                        try:
                            self._serve(self._socket.recv_multipart(zmq.NOBLOCK, copy=False))
                        except zmq.Again:
                            break
        finally:
            self._close_sockets()

    def _serve(self, frames: list) -> None:
        peer, body = frames[0].bytes, frames[1:]
        number = None
        try:
            header, arrays = wire.unpack(body)
            number, method = header["id"], header["method"]
            if method not in self._handlers:
                raise Rejected(f"{self.name} knows no method {method!r}")
            role = self._allowed.get(frames[-1].get("User-Id"), "")
            self._counts[method] += 1
            answer = self._handlers[method](Request(peer, role, header.get("args", {}), arrays))
        except Exception as error:
            self._answer_error(peer, number, error)
            return
        if isinstance(answer, Future):
            answer.add_done_callback(lambda done: self._finish(peer, number, done))
        else:
            self._answer(peer, number, answer)

    def _finish(self, peer: bytes, number: int, done: Future) -> None:
        self._late.append((peer, number, done))
        self._wake()

    def _answer_late(self, peer: bytes, number: int, done: Future) -> None:
        if done.cancelled():
            return
        if done.exception() is not None:
            self._answer_error(peer, number, done.exception())
        else:
            self._answer(peer, number, done.result())

    def _answer(self, peer: bytes, number: int | None, answer: Any) -> None:
        result, arrays = answer if isinstance(answer, tuple) else (answer or {}, {})
        self._send(peer, {"id": number, "result": result}, arrays)

    def _answer_error(self, peer: bytes, number: int | None, error: Any) -> None:
        expected = isinstance(error, (TwinRLError, KeyError, ValueError))
        log.log(
            logging.INFO if expected else logging.ERROR,
            "%s refuses a request: %s",
            self.name,
            error,
            exc_info=None if expected else error,
        )
        self._counts["failed"] += 1
        kind = "rejected" if isinstance(error, (Rejected, WireError)) else "error"
        text = str(error) if isinstance(error, TwinRLError) else f"{type(error).__name__}: {error}"
        self._send(peer, {"id": number, kind: text}, {})

    def _send(self, peer: bytes, header: dict[str, Any], arrays: wire.Arrays) -> None:
        try:
            self._socket.send_multipart([peer, *wire.pack(header, arrays)], zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            log.warning("%s cannot answer a peer: %s", self.name, error)


class Client:
    """Requests to one Server. Thread-safe; one thread of its own moves the bytes and reconnects."""

    def __init__(self, name: str, address: str, keys: Keys, timeout: float = 30.0) -> None:
        self.name, self.address, self.timeout = name, address, timeout
        self._numbers = itertools.count(1)
        self._pending: dict[int, Future] = {}
        self._outgoing: collections.deque = collections.deque()
        self._wake = _Wake()
        self._stop = threading.Event()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        _tune(self._socket)
        self._socket.reconnect_ivl, self._socket.reconnect_ivl_max = 100, 2000
        secure_client(self._socket, keys)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            raise TwinRLError(
                f"{address!r} is no address to connect to: {error.strerror}"
            ) from None
        self._thread = threading.Thread(target=self._run, name=f"client of {name}", daemon=True)
        self._thread.start()

    def submit(
        self, method: str, args: dict[str, Any] | None = None, arrays: wire.Arrays | None = None
    ) -> Future:
        """Send a request; the Future gives (result dict, arrays) or raises RemoteError / Rejected.

        The arrays' memory must not change until the answer is there. A request that meets a dying server is
        never answered: whoever waits must have a deadline.
        """
        future: Future = Future()
        future.number = next(self._numbers)
        header = {"id": future.number, "method": method, "args": args or {}}
        frames = wire.pack(header, arrays)
        self._pending[future.number] = future
        self._outgoing.append(frames)
        self._wake()
        return future

    def call(
        self,
        method: str,
        args: dict[str, Any] | None = None,
        arrays: wire.Arrays | None = None,
        timeout: float | None = None,
    ) -> Answer:
        """`submit` and wait at most `timeout` seconds (the client's own by default)."""
        timeout = self.timeout if timeout is None else timeout
        future = self.submit(method, args, arrays)
        try:
            return future.result(timeout)
        except FutureTimeout:
            self.forget(future)
            raise DeadlineError(
                f"no answer from {self.name} at {self.address} to {method!r} within {timeout:g} s"
            ) from None

    def forget(self, future: Future) -> None:
        """Drop a request whose answer nobody waits for any more."""
        self._pending.pop(getattr(future, "number", -1), None)

    def close(self) -> None:
        """Close the connection; requests without an answer fail."""
        self._stop.set()
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(5)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake.receiver, zmq.POLLIN)
        try:
            while not self._stop.is_set():
                poller.poll(1000)
                self._wake.drain()
                self._send_outgoing()
                while True:
                    try:
                        self._receive(self._socket.recv_multipart(zmq.NOBLOCK, copy=False))
                    except zmq.Again:
                        break
        finally:
            for future in list(self._pending.values()):
                if not future.done():
                    future.set_exception(RemoteError(f"the client of {self.name} was closed"))
            self._socket.close()
            self._context.term()
            self._wake.close()

    def _send_outgoing(self) -> None:
        while self._outgoing:
            try:
                self._socket.send_multipart(self._outgoing[0], zmq.NOBLOCK, copy=False)
            except zmq.Again:
                # The peer is away and its queue full: try again at the next wake, deadlines do the rest.
                return
            self._outgoing.popleft()

    def _receive(self, frames: list) -> None:
        header, arrays = wire.unpack(frames)
        future = self._pending.pop(header.get("id"), None)
        if future is None or not future.set_running_or_notify_cancel():
            return
        if "rejected" in header:
            future.set_exception(Rejected(header["rejected"]))
        elif "error" in header:
            future.set_exception(RemoteError(f"{self.name}: {header['error']}"))
        else:
            future.set_result((header["result"], arrays))


def free_port() -> int:
    """A TCP port that is free now."""
    with posix_socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Poll `condition` until it gives something true, and return that; DeadlineError names `what`."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise DeadlineError(f"waited {seconds:g} s in process {os.getpid()} for {what}")
        time.sleep(0.02)
