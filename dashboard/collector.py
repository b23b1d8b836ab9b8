"""The collector: takes every process's statistics and events, writes them down, and answers who asks for them.

It holds nothing that its files do not: kill it and start it again, and the record goes on.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from dashboard.record import EVENTS_FILE, METRICS_FILE, Message, Record, valid
from twinrl.core import wire
from twinrl.core.errors import TwinRLError, WireError
from twinrl.core.keys import Keys, secure_server
from twinrl.core.sockets import Request, Server

log = logging.getLogger(__name__)
FLUSH_S = 1.0
QUEUE = 10_000  # messages; when it is full the senders drop theirs
ADDRESS_FILE = "collector.json"
MEMBERS = ("server", "cluster")  # robots report through the gateway


class Collector:
    """Binds `metrics_address` (reporters push) and `query_address` (`snapshot`, `history`); port 0 picks a free one."""

    def __init__(self, run_dir: Path, metrics_address: str, query_address: str) -> None:
        self.run_dir = Path(run_dir)
        keys = Keys.load(self.run_dir / "keys" / "server.key")
        allowed = {
            Keys.load(self.run_dir / "keys" / f"{role}.key").public: role for role in MEMBERS
        }
        self._allowed = allowed
        for name in (METRICS_FILE, EVENTS_FILE):
            _mend(self.run_dir / name)
        self.record = Record.load(self.run_dir)
        self.refused = 0
        self._stop = threading.Event()
        self._files = {
            "stats": (self.run_dir / METRICS_FILE).open("a"),
            "event": (self.run_dir / EVENTS_FILE).open("a"),
        }
        self._context = zmq.Context()
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("twinrl", self)
        self._socket = self._context.socket(zmq.PULL)
        self._socket.rcvhwm = QUEUE
        self._socket.maxmsgsize = 4 << 20
        self._socket.linger = 0
        secure_server(self._socket, keys)
        try:
            self._socket.bind(metrics_address)
            self._server = Server("collector", query_address, keys, allowed)
        except (zmq.ZMQError, TwinRLError) as error:
            self._close_sockets()
            raise TwinRLError(
                f"the collector cannot listen on {metrics_address}: {error}"
            ) from None
        self.metrics_address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.query_address = self._server.address
        self._server.bind("snapshot", self._answer_snapshot)
        self._server.bind("history", lambda request: self.record.history())
        self._server.start()
        self._publish_addresses()

    def callback(self, domain: str, key: bytes) -> bool:
        """ZeroMQ's authenticator asks whether a peer with public `key` may report."""
        return key.decode() in self._allowed

    def run(self) -> None:
        """Collect until `stop`."""
        flushed = time.monotonic()
        try:
            while not self._stop.is_set():
                if self._socket.poll(200):
                    self._drain()
                if time.monotonic() - flushed >= FLUSH_S:
                    self._flush()
                    flushed = time.monotonic()
            self._drain()  # what had arrived when we were told to stop
        finally:
            self._server.close()
            self._close_sockets()
            for file in self._files.values():
                file.close()

    def stop(self) -> None:
        """Make `run` return; safe in a signal handler and from any thread."""
        self._stop.set()

    def _drain(self) -> None:
        for _ in range(QUEUE):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message, _ = wire.unpack(frames)
                self._take(message)
            except WireError as error:
                self.refused += 1
                log.warning("the collector skips a message: %s", error)

    def _take(self, message: Message) -> None:
        if not valid(message):
            raise WireError(f"no report of a process: {str(message)[:200]}")
        try:
            line = json.dumps(message)
        except (TypeError, ValueError) as error:
            raise WireError(f"report cannot be written as JSON: {error}") from None
        self._files[message["kind"]].write(line + "\n")
        self.record.add(message)

    def _flush(self) -> None:
        for file in self._files.values():
            file.flush()

    def _answer_snapshot(self, request: Request) -> dict[str, Any]:
        snapshot = self.record.snapshot(int(request.args.get("since", 0)))
        return {**snapshot, "refused": self.refused}

    def _publish_addresses(self) -> None:
        """`twinrl status` and a later dashboard find the collector by this file."""
        addresses = {"metrics": self.metrics_address, "query": self.query_address}
        temporary = self.run_dir / f"{ADDRESS_FILE}.new"
        temporary.write_text(json.dumps({**addresses, "pid": os.getpid()}))
        temporary.replace(self.run_dir / ADDRESS_FILE)

    def _close_sockets(self) -> None:
        self._socket.close()
        self._authenticator.stop()
        self._context.term()


def serve(run_dir: str | Path, metrics_address: str, query_address: str) -> None:
    """Run the collector of `run_dir` in this process until SIGTERM or SIGINT."""
    collector = Collector(Path(run_dir), metrics_address, query_address)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: collector.stop())
    collector.run()


def _mend(path: Path) -> None:
    """Cut off a last line that a crash left torn, or the next message would be glued to it and lost too."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        while size:
            start = max(0, size - (1 << 16))
            file.seek(start)
            block = file.read(size - start)
            if (newline := block.rfind(b"\n")) >= 0:
                file.truncate(start + newline + 1)
                return
            size = start
        file.truncate(0)
