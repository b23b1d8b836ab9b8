"""Requests and replies over CURVE-encrypted ZeroMQ: one Server, one Client, one thread each.

A request names a method and carries a plain header and arrays; so does its reply. Everything is pulled by the
client (a peer behind a firewall only dials out); what a server must tell a client rides on a reply, and a
handler may answer late by returning a Future (a long poll).

A server believes no peer: whatever comes in is answered, at the worst with an error, and what one peer can
make it keep is bounded by the constants below. `docs/wire.md` describes the bytes.
"""

from __future__ import annotations

import collections
import itertools
import logging
import os
import random
import socket as posix_socket
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, Callable, Dict, NamedTuple, Tuple, Union

import msgpack
import zmq
from zmq.auth.thread import ThreadAuthenticator

from twinrl.core import wire
from twinrl.core.errors import DeadlineError, Rejected, RemoteError, TwinRLError, WireError
from twinrl.core.keys import Keys, secure_client, secure_server

log = logging.getLogger(__name__)
MAX_MESSAGE_BYTES = 512 << 20  # of one frame; a peer that sends a larger one is cut off
# Of a request's first frame. Its msgpack may need 64 times that in memory.
MAX_REQUEST_HEADER_BYTES = 1 << 20
MAX_UNANSWERED = 1024  # requests of one peer that wait for their answers
MAX_UNREAD_BYTES = 256 << 20  # large answers that one peer has not taken yet
INCOMING = 64  # messages of one peer that wait to be served; then its TCP connection has to wait
HANDSHAKE_SECONDS = 10.0  # from a TCP connection to the end of the handshake
OPEN_FILES = 65536  # wanted: each connection takes one
LARGE_FRAME = 64 << 10  # bytes from which ZeroMQ sends from our memory, which it holds until then
MAX_TEXT = 2000  # characters of an error, in an answer and in the log
COMPLAINTS, COMPLAINT_SECONDS = 20, 10.0  # so many lines in the log in so many seconds
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


class _Complaints:
    """A log that no peer can fill: what is too much is counted."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._said = self._muted = 0
        self._since = time.monotonic()

    def __call__(self, level: int, text: str, error: Any = None) -> None:
        now = time.monotonic()
        if now - self._since > COMPLAINT_SECONDS:
            if self._muted:
                seconds = now - self._since
                log.warning("%s: %d more of these in %.0f s", self._name, self._muted, seconds)
            self._said, self._muted, self._since = 0, 0, now
        if self._said >= COMPLAINTS:
            self._muted += 1
            return
        self._said += 1
        line = text.replace("\n", " ")[:MAX_TEXT]  # a peer must not write lines of its own
        log.log(level, "%s %s", self._name, line, exc_info=error)


class _Unread:
    """What was sent to each peer and still lies in our memory."""

    def __init__(self) -> None:
        self._peers: dict[bytes, collections.deque] = {}

    def bytes(self, peer: bytes) -> int:
        """Of this peer; forgets what has left meanwhile."""
        waiting = self._peers.get(peer)
        if waiting is None:
            return 0
        while waiting and waiting[0][0].done:
            waiting.popleft()
        if not waiting:
            del self._peers[peer]
        return sum(size for _, size in waiting)

    def add(self, peer: bytes, frame: zmq.Frame) -> None:
        """`frame` is on its way. It is not kept: its tracker waits for everybody who holds it."""
        self._peers.setdefault(peer, collections.deque()).append((frame.tracker, len(frame)))

    def tidy(self) -> None:
        """Forget peers that took all."""
        for peer in list(self._peers):
            self.bytes(peer)


def _tune(socket: zmq.Socket) -> None:
    socket.linger = 0
    socket.maxmsgsize = MAX_MESSAGE_BYTES
    socket.heartbeat_ivl = 1000  # ms; a dead peer is noticed even when TCP says nothing
    socket.heartbeat_timeout = 10_000
    socket.tcp_keepalive = 1


class Server:
    """Answers requests on `address` for peers whose public key is in `allowed` ({public key: role}).

    Handlers run one after the other in the server's thread, so state that only they touch needs no lock.
    A handler's exception goes to the caller as an error and to the log. `failure` is what ended the thread,
    which only a bug of ours can do.
    """

    failure: Exception | None = None

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
        self._unanswered: collections.Counter = collections.Counter()  # by peer
        self._unread = _Unread()
        self._complain = _Complaints(name)
        _allow_open_files()
        self._context = zmq.Context()
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("twinrl", self)
        self._socket = self._context.socket(zmq.ROUTER)
        _tune(self._socket)
        self._socket.rcvhwm = INCOMING
        self._socket.sndhwm = 2 * MAX_UNANSWERED  # one commit may answer them all
        self._socket.backlog = 1024
        self._socket.handshake_ivl = int(HANDSHAKE_SECONDS * 1000)
        self._socket.router_mandatory = True  # an answer that cannot be sent is counted
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
                self._unread.tidy()
                if self._wake.receiver.fileno() in events or self._wake.receiver in events:
                    self._wake.drain()
                while self._late:
                    self._answer_late(*self._late.popleft())
                if self._socket in events:
                    for _ in range(64):  # then look at late answers again
                        try:
                            self._serve(*self._receive())
                        except zmq.Again:
                            break
        except Exception as error:
            log.exception("%s cannot serve any more", self.name)
            self.failure = error
        finally:
            self._close_sockets()

    def _receive(self) -> tuple[list, int]:
        """A message's first frames and how many there were: one of millions of frames is not kept."""
        frames, count = [], 0
        while True:
            frame = self._socket.recv(zmq.NOBLOCK, copy=False)
            if count < wire.MAX_ARRAYS + 2:
                frames.append(frame)
            count += 1
            if not frame.more:
                return frames, count

    def _serve(self, frames: list, count: int) -> None:
        peer, body = frames[0].bytes, frames[1:]
        number = None
        try:
            if count > len(frames):
                raise WireError(f"{count - 2} arrays, at most {wire.MAX_ARRAYS} are allowed")
            if len(body[0]) > MAX_REQUEST_HEADER_BYTES:
                raise WireError(
                    f"a header of {len(body[0])} bytes, at most {MAX_REQUEST_HEADER_BYTES}"
                )
            header, arrays = wire.unpack(body)
            number = _number(header)
            method, args = header.get("method"), header.get("args", {})
            if not isinstance(args, dict):
                raise WireError(f"a request's args are a map, not {type(args).__name__}")
            if not isinstance(method, str) or method not in self._handlers:
                raise Rejected(f"{self.name} knows no method {str(method)[:100]!r}")
            if self._unanswered[peer] >= MAX_UNANSWERED:
                raise RemoteError(f"{MAX_UNANSWERED} requests of yours wait for their answers")
            role = self._allowed.get(frames[-1].get("User-Id"), "")
            self._counts[method] += 1
            answer = self._handlers[method](Request(peer, role, args, arrays))
        except Exception as error:
            self._answer_error(peer, number, error, body)
            return
        if isinstance(answer, Future):
            self._unanswered[peer] += 1
            answer.add_done_callback(lambda done: self._finish(peer, number, done))
        else:
            self._answer(peer, number, answer)

    def _finish(self, peer: bytes, number: int, done: Future) -> None:
        self._late.append((peer, number, done))
        self._wake()

    def _answer_late(self, peer: bytes, number: int, done: Future) -> None:
        self._unanswered[peer] -= 1
        if not self._unanswered[peer]:
            del self._unanswered[peer]
        if done.cancelled():
            return
        if done.exception() is not None:
            self._answer_error(peer, number, done.exception())
        else:
            self._answer(peer, number, done.result())

    def _answer(self, peer: bytes, number: int | None, answer: Any) -> None:
        result, arrays = answer if isinstance(answer, tuple) else (answer or {}, {})
        try:
            frames = wire.pack({"id": number, "result": result}, arrays)
            large = sum(len(frame) for frame in frames if len(frame) >= LARGE_FRAME)
            unread = self._unread.bytes(peer) if large else 0
            if unread and unread + large > MAX_UNREAD_BYTES:
                raise RemoteError(f"{unread} bytes of answers to you were not taken yet: read on")
        except (
            Exception
        ) as error:  # a result that cannot be packed is the handler's fault, not ours
            self._answer_error(peer, number, error)
            return
        self._send(peer, frames)

    def _answer_error(
        self, peer: bytes, number: int | None, error: Any, asked: list | None = None
    ) -> None:
        expected = isinstance(error, (TwinRLError, KeyError, ValueError))
        self._complain(
            logging.INFO if expected else logging.ERROR,
            f"refuses a request: {type(error).__name__}: {error}",
            None if expected else error,
        )
        self._counts["failed"] += 1
        kind = "rejected" if isinstance(error, (Rejected, WireError)) else "error"
        text = str(error) if isinstance(error, TwinRLError) else f"{type(error).__name__}: {error}"
        text = text[:MAX_TEXT].encode("utf-8", "replace").decode()
        version = wire.PROTOCOL
        if isinstance(error, WireError) and number is None and asked:
            version, number = _sender(asked[0])
        self._send(peer, [msgpack.packb([version, {"id": number, kind: text}, []])])

    def _send(self, peer: bytes, frames: list) -> None:
        for place, frame in enumerate(frames):
            if len(frame) >= LARGE_FRAME:
                frames[place] = zmq.Frame(frame, track=True, copy=False)
                self._unread.add(peer, frames[place])
        try:
            self._socket.send_multipart([peer, *frames], zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:  # the peer left, or does not read
            self._counts["unsent"] += 1
            self._complain(logging.INFO, f"cannot answer a peer: {error}")


def _number(header: dict[str, Any]) -> int:
    number = header.get("id")
    if type(number) is not int or not 0 <= number < 1 << 63:
        raise WireError("a request's id is an integer from 0 to 2**63 - 1")
    return number


def _sender(head: zmq.Frame) -> tuple[int, int | None]:
    """Protocol and number of a request that could not be read: a peer of another version gets an answer it reads."""
    if len(head) <= MAX_REQUEST_HEADER_BYTES:
        try:
            version, header, *_ = msgpack.unpackb(head.bytes, strict_map_key=False)
            if type(version) is int and 0 < version < 256:
                return version, _number(header)
        except Exception:  # not even a header
            pass
    return wire.PROTOCOL, None


def _allow_open_files() -> None:
    """Raise this process's limit of open files as far as it may."""
    try:
        import resource
    except ImportError:  # not a Unix
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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
        if len(frames[0]) > MAX_REQUEST_HEADER_BYTES:
            raise WireError(
                f"the header of {method!r} takes {len(frames[0])} bytes, at most {MAX_REQUEST_HEADER_BYTES}"
            )
        self._pending[future.number] = future
        self._outgoing.append(frames)
        self._wake()
        if self._stop.is_set():  # nobody sends it any more
            self._fail_pending()
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
            self._fail_pending()
            self._socket.close()
            self._context.term()
            self._wake.close()

    def _fail_pending(self, error: TwinRLError | None = None) -> None:
        error = error or RemoteError(f"the client of {self.name} was closed")
        while self._pending:
            try:
                _, future = self._pending.popitem()
            except KeyError:  # another thread was faster
                return
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def _send_outgoing(self) -> None:
        while self._outgoing:
            try:
                self._socket.send_multipart(self._outgoing[0], zmq.NOBLOCK, copy=False)
            except zmq.Again:
                # The peer is away and its queue full: try again at the next wake, deadlines do the rest.
                return
            self._outgoing.popleft()

    def _receive(self, frames: list) -> None:
        try:
            header, arrays = wire.unpack(frames)
            future = self._pending.pop(header.get("id"), None)
        except Exception as error:  # a server of another version, not of this run
            self._fail_pending(Rejected(f"the answer of {self.name}: {error}"))
            return
        if future is None or not future.set_running_or_notify_cancel():
            return
        if "rejected" in header:
            future.set_exception(Rejected(header["rejected"]))
        elif "error" in header:
            future.set_exception(RemoteError(f"{self.name}: {header['error']}"))
        else:
            future.set_result((header.get("result"), arrays))


# Below those that systems give to outgoing connections: one of these could take a port between its choice and its use.
SERVED_PORTS = range(20_000, 32_768)
_given = set()  # ports that this process chose


def free_port() -> int:
    """A TCP port that is free now, another at each call."""
    for _ in range(1000):
        port = random.SystemRandom().choice(SERVED_PORTS)
        if port in _given:
            continue
        with posix_socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port
    raise OSError(f"no free port from {SERVED_PORTS.start} to {SERVED_PORTS.stop - 1}")


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
