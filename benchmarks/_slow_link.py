"""A TCP link of limited rate, in a process of its own: what it forwards, it forwards no faster than asked.

    python -m benchmarks._slow_link TARGET_PORT MBIT_S      prints the port it listens on

Each direction has a token bucket of 20 ms; socket buffers are small, so that the sender feels the rate.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

BUFFER = 64 << 10
BURST = 0.02  # s
PIECE = 16 << 10


def forward(source: socket.socket, target: socket.socket, rate: float) -> None:
    """Bytes from `source` to `target` at no more than `rate` bytes a second, until either ends."""
    allowed, then = rate * BURST, time.monotonic()
    with contextlib.suppress(OSError):
        while data := source.recv(PIECE):
            now = time.monotonic()
            allowed = min(allowed + (now - then) * rate, rate * BURST) - len(data)
            then = now
            if allowed < 0:
                time.sleep(-allowed / rate)
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def connections(
    listener: socket.socket, target_port: int, buffer: int
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Each connection that comes, and one of its own to the target; `buffer` bytes at each socket. For ever."""
    while True:
        near, _ = listener.accept()
        try:
            far = socket.create_connection(("127.0.0.1", target_port), timeout=5)
        except OSError:
            near.close()
            continue
        far.settimeout(None)
        for end in (near, far):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield near, far


def serve(listener: socket.socket, target_port: int, rate: float) -> None:
    """Forward every connection, for ever."""
    for near, far in connections(listener, target_port, BUFFER):
        for pair in ((near, far), (far, near)):
            threading.Thread(target=forward, args=(*pair, rate), daemon=True).start()


class SlowLink:
    """The process, for who measures or tests: `port` to connect to."""

    def __init__(self, target_port: int, mbit_s: float, port: int = 0) -> None:
        command = [sys.executable, "-m", "benchmarks._slow_link"]
        self._process = subprocess.Popen(
            [*command, str(target_port), str(mbit_s), str(port)], stdout=subprocess.PIPE, text=True
        )
        self.port = int(self._process.stdout.readline())

    def cut(self) -> None:
        """The link is gone, and with it what was under way."""
        self._process.kill()
        self._process.wait(10)
        self._process.stdout.close()


def main() -> None:
    """Listen and forward."""
    target_port, mbit_s, port = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
    listener.bind(("127.0.0.1", port))
    listener.listen()
    print(listener.getsockname()[1], flush=True)
    serve(listener, target_port, mbit_s * 1e6 / 8)


if __name__ == "__main__":
    main()
