"""Every process reports `stats()` once a second, and events as they happen, to the run's collector.

Reporting never waits: when the collector is away or slow, messages are dropped.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any, Callable, Dict

import zmq

from twinrl.core import wire
from twinrl.core.keys import Keys, secure_client

Stats = Dict[str, Any]


class Reporter:
    """Pushes one process's statistics and events. `stats` is called once a second, in the reporter's thread.

    A message: {"kind": "stats"|"event", "role", "name", "host", "pid", "time", "data": {...}}.
    """

    def __init__(
        self,
        address: str,
        keys: Keys,
        role: str,
        name: str,
        stats: Callable[[], Stats] | None = None,
        period: float = 1.0,
    ) -> None:
        self._identity = {
            "role": role,
            "name": name,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        self._stats, self._period = stats, period
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.sndhwm = 1000
        self._socket.linger = 500  # ms: the last words of a process should arrive
        secure_client(self._socket, keys)
        self._socket.connect(address)
        self._lock = threading.Lock()  # events come from any thread
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self._thread.start()

    def stats(self, data: Stats) -> None:
        """Report statistics now."""
        self._push("stats", data)

    def event(self, level: str, text: str, **fields: Any) -> None:
        """Report an event: level "info", "warning" or "error", a sentence, and plain fields."""
        self._push("event", {"level": level, "text": text, **fields})

    def close(self) -> None:
        """Report a last time and close."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(2)
        with self._lock:
            self._socket.close()
            self._context.term()

    def _run(self) -> None:
        while not self._stop.wait(self._period):
            self._report()
        self._report()

    def _report(self) -> None:
        if self._stats is None:
            return
        try:
            self._push("stats", self._stats())
        except Exception as error:  # a broken stats() must not end the reporting of events
            self._push("event", {"level": "error", "text": f"stats() failed: {error!r}"})

    def _push(self, kind: str, data: Stats) -> None:
        message = dict(self._identity, kind=kind, time=time.time(), data=data)
        with self._lock:
            if self._socket.closed:
                return
            try:
                self._socket.send_multipart(wire.pack(message), zmq.NOBLOCK)
            except zmq.Again:
                pass
