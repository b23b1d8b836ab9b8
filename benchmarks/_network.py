"""A TCP link that fails as networks do, in a process of its own: what it carries can be cut, delayed and slowed.

python -m benchmarks._network TARGET_PORT       prints the port it listens on, then obeys lines on standard input:
    cut | heal          nothing goes through, connections stay open (a cable that was pulled) | goes on
    break               all connections are closed
    rate BYTES_S        in each direction, 0 for no limit; shared by all connections, as on one line
    delay S JITTER_S    of each piece; order within a connection is kept, as TCP keeps it
"""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import sys
import threading
import time

from benchmarks._slow_link import connections

BUFFER = 32 << 10
PIECE = 4 << 10


class Network:
    """What all connections share."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.delay, self.jitter = 0.0, 0.0
        self._rate, self._lock = 0.0, threading.Lock()
        self._free = [0.0, 0.0]  # when each direction of the line has carried what it was given
        self.sockets: list[socket.socket] = []

    def obey(self, line: str) -> None:
        """A line of standard input."""
        word, *numbers = line.split()
        if word == "cut":
            self.open.clear()
        elif word == "heal":
            self.open.set()
        elif word == "break":
            for end in self.sockets:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            self.sockets.clear()
        elif word == "rate":
            self._rate = float(numbers[0])
        elif word == "delay":
            self.delay, self.jitter = float(numbers[0]), float(numbers[1])

    def carry(self, count: int, direction: int) -> float:
        """When `count` bytes that are sent now will be through."""
        now = time.monotonic()
        if not self._rate:
            return now
        with self._lock:
            self._free[direction] = max(self._free[direction], now) + count / self._rate
            return self._free[direction]

    def forward(self, source: socket.socket, target: socket.socket, direction: int) -> None:
        """Until either end closes."""
        due = 0.0
        with contextlib.suppress(OSError):
            while data := source.recv(PIECE):
                late = self.delay + random.random() * self.jitter
                due = max(due, self.carry(len(data), direction) + late)
                time.sleep(max(0.0, due - time.monotonic()))
                self.open.wait()
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve(self, listener: socket.socket, target_port: int) -> None:
        """Forward every connection, for ever."""
        for near, far in connections(listener, target_port, BUFFER):
            self.sockets += (near, far)
            for direction, pair in enumerate(((near, far), (far, near))):
                args = (*pair, direction)
                threading.Thread(target=self.forward, args=args, daemon=True).start()


class BadLink:
    """The process, for who measures or tests: `port` to connect to."""

    def __init__(self, target_port: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks._network", str(target_port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port = int(self._process.stdout.readline())

    def tell(self, line: str) -> float:
        """See above; when it was done, s on the monotonic clock."""
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait(10)
        self._process.stdin.close()
        self._process.stdout.close()


def main() -> None:
    """Listen, forward and obey."""
    network = Network()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    print(listener.getsockname()[1], flush=True)
    args = (listener, int(sys.argv[1]))
    threading.Thread(target=network.serve, args=args, daemon=True).start()
    for line in sys.stdin:
        network.obey(line)
        print(time.monotonic(), flush=True)


if __name__ == "__main__":
    main()
