"""A line between two network namespaces that loses, doubles and reorders packets, as `tc netem` does, in user space.

Needs root and /dev/net/tun; no module of the kernel beside that, which not every kernel has. What runs in this process's
namespace has the address HERE, what is started with `Line.enter` before its command the address THERE. Everything between
them is carried as packets, each of which may be lost, come twice, or come later than those behind it: TCP has to mend it.

python -m benchmarks._packets        prints a line when it is up, then obeys lines on standard input:
    loss P | double P       share of the packets, in each direction
    delay S JITTER_S        of each packet by itself: jitter beyond the time between two packets reorders them
    cut | heal              nothing goes through | goes on
    count                   answers with counts of packets: carried, lost, doubled, reordered
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections import Counter

HERE, THERE = "10.98.0.1", "10.98.0.2"
PACKET = 1500  # bytes
_TUNSETIFF, _TUN, _BARE = 0x400454CA, 0x0001, 0x1000
_NEW_NETWORK = 0x40000000


def new_network() -> None:
    """Let this thread, and what it starts, have a network namespace of its own; OSError where that is not allowed."""
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_NETWORK):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def tunnel(own: str, other: str) -> int:
    """A device in this namespace, as a file that gives and takes its packets."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", b"line", _TUN | _BARE))
    subprocess.run(["ip", "addr", "add", own, "peer", other, "dev", "line"], check=True)
    subprocess.run(["ip", "link", "set", "line", "mtu", str(PACKET), "up"], check=True)
    return fd


def why_not() -> str:
    """Why there can be no such line here, "" where there can."""
    code = "import benchmarks._packets as p; p.new_network(); p.tunnel(p.HERE, p.THERE)"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False
        )
    except OSError as error:
        return str(error)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["?"])[-1]


class Carrier:
    """Moves packets between two files."""

    def __init__(self, ends: tuple[int, int], seed: int = 0) -> None:
        self._ends, self._rng = ends, random.Random(seed)
        self._loss = self._double = self._delay = self._jitter = 0.0
        self._open = True
        self._due: list[tuple[float, int, int, bytes]] = []  # when, number, to which end, packet
        self._number, self._last = 0, [0, 0]
        self.counts: Counter = Counter(carried=0, lost=0, doubled=0, reordered=0)

    def obey(self, line: str) -> None:
        """A line of standard input."""
        word, *numbers = line.split()
        if word in ("cut", "heal"):
            self._open = word == "heal"
        elif word == "loss":
            self._loss = float(numbers[0])
        elif word == "double":
            self._double = float(numbers[0])
        elif word == "delay":
            self._delay, self._jitter = float(numbers[0]), float(numbers[1])

    def take(self, end: int) -> None:
        """Packets that came in at an end."""
        for _ in range(64):
            try:
                packet = os.read(self._ends[end], 65536)
            except BlockingIOError:
                return
            if not self._open or self._rng.random() < self._loss:
                self.counts["lost"] += 1
                continue
            copies = 1 + (self._rng.random() < self._double)
            self.counts["doubled"] += copies - 1
            for _ in range(copies):
                self._number += 1
                due = time.monotonic() + self._delay + self._rng.random() * self._jitter
                heapq.heappush(self._due, (due, self._number, 1 - end, packet))

    def give(self) -> float:
        """What is due goes out; s until something else is."""
        while self._due and self._due[0][0] <= time.monotonic():
            _, number, end, packet = heapq.heappop(self._due)
            self.counts["carried"] += 1
            self.counts["reordered"] += number < self._last[end]
            self._last[end] = max(self._last[end], number)
            try:
                os.write(self._ends[end], packet)
            except BlockingIOError:
                self.counts["lost"] += 1
        return min(1.0, max(0.0, self._due[0][0] - time.monotonic())) if self._due else 1.0


class Line:
    """The process, for who measures or tests; made in a namespace of `new_network`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks._packets"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if not self._process.stdout.readline():
            raise OSError(f"the line did not come up: {self._process.wait(10)}")
        self.enter = ["nsenter", "-t", str(self._process.pid), "-n"]

    def tell(self, line: str) -> float:
        """See above; when it was done, s on the monotonic clock."""
        return self._ask(line)["time"]

    def counts(self) -> dict[str, int]:
        """Packets so far: carried, lost, doubled, reordered."""
        return self._ask("count")["counts"]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait(10)
        self._process.stdin.close()
        self._process.stdout.close()

    def _ask(self, line: str) -> dict:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def main() -> None:
    """Carry and obey until standard input ends."""
    near = tunnel(HERE, THERE)
    new_network()  # this process goes over; the first device stays where it was made
    carrier = Carrier((near, tunnel(THERE, HERE)))
    print("up", flush=True)
    ends = carrier._ends
    wait = 1.0
    while True:
        ready, _, _ = select.select([*ends, sys.stdin], [], [], wait)
        for end in (0, 1):
            if ends[end] in ready:
                carrier.take(end)
        if sys.stdin in ready:
            line = sys.stdin.readline()
            if not line:
                return
            carrier.obey(line)
            answer = {"time": time.monotonic(), "counts": carrier.counts}
            print(json.dumps(answer), flush=True)
        wait = carrier.give()


if __name__ == "__main__":
    main()
