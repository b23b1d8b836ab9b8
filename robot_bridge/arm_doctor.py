"""`twinrl doctor --robot KIND --host IP`: whether this PC can drive that arm. Nothing here moves one.

Of a Franka it speaks the first message of the control interface itself (libfranka's TCP port 1337: header of three
uint32, then versions as uint16), so that it also works without the library, or with one of another version; and
listens to the state that the arm sends a thousand times a second by UDP.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import socket
import struct
import time
from importlib import metadata
from pathlib import Path
from typing import Callable, Dict, List, Tuple

from twinrl.findings import FAILED, OK, WARNING, Finding

REACH_S = 3.0
FCI, CONNECT = 1337, 0
HEADER, VERSIONS = struct.Struct("<III"), struct.Struct("<HH")
PRIORITY = 80  # that real-time control threads ask for
LOST, GAP_S = 0.001, 0.005  # of packets, and between two: more is worth a look
TOO_MANY, TOO_LONG_S = 0.01, 0.02  # the arm stops after twenty lost in a row
# The first libfranka of each version of the robot's server, newest first.
SERVERS = (
    ((0, 18, 0), 10),
    ((0, 15, 0), 9),
    ((0, 14, 1), 8),
    ((0, 13, 3), 7),
    ((0, 10, 0), 6),
    ((0, 9, 0), 5),
    ((0, 8, 0), 4),
    ((0, 7, 0), 3),
)
SYSTEMS = {10: "5.9", 9: "5.7.2", 8: "5.7.0", 7: "5.5", 6: "5.2", 5: "4.2.1", 4: "4.0", 3: "3.0"}
WHEELS = "https://timschneider42.github.io/franky/whl/by-robot-server-version"
LIBRARIES = {
    "franka": ("franky-control", ()),
    "ur": ("ur-rtde", (("RTDE", 30004), ("dashboard", 29999))),
    "xarm": ("xarm-python-sdk", (("control", 502),)),
}
TIMESTAMPS = 35  # SO_TIMESTAMPNS, of Linux: arrival as the kernel saw it, not as Python did


def robot_checks(kind: str, host: str, seconds: float = 10.0) -> Dict[str, Callable[[], Finding]]:
    """Checks by name, in the order in which they help."""
    package, ports = LIBRARIES[kind]
    checks: Dict[str, Callable[[], Finding]] = {"library": lambda: check_library(kind, package)}
    if kind == "franka":
        checks["fci"] = lambda: check_fci(host)
        checks["realtime"] = check_realtime
        checks["priority"] = check_priority
        checks["network"] = lambda: check_network(host, seconds)
    for name, port in ports:
        checks[name] = lambda name=name, port=port: check_port(host, port, name)
    checks["governor"] = check_governor
    return checks


def check_library(kind: str, package: str) -> Finding:
    """The arm's library is installed."""
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return Finding(FAILED, f"{package} is not installed", f"pip install {package}")
    text = f"{package} {version}"
    if kind == "franka":
        found = libfranka()
        text += f" with libfranka {'.'.join(map(str, found))}" if found else ", libfranka unknown"
        if int(version.split(".")[0]) < 2:
            return Finding(FAILED, f"{text}; the driver needs 2.0", f"pip install -U {package}")
    return Finding(OK, text)


def libfranka() -> Tuple[int, ...]:
    """The version that franky was built with, as its wheel says; empty where it does not."""
    try:
        distribution = metadata.distribution("franky-control")
    except metadata.PackageNotFoundError:
        return ()
    names = [distribution.version, *(str(file) for file in distribution.files or ())]
    for name in names:
        found = re.search(r"libfranka[^/]*?\.(?:so\.)?(\d+)\.(\d+)\.(\d+)", name)
        if found:
            return tuple(map(int, found.groups()))
    return ()


def server_of(version: Tuple[int, ...]) -> int:
    """The robot server's version that a libfranka speaks to; 0 where it is not known."""
    return next((server for first, server in SERVERS if version and version >= first), 0)


def check_port(host: str, port: int, name: str) -> Finding:
    """The controller's port takes connections, and how fast."""
    times: List[float] = []
    for _ in range(10):
        began = time.monotonic()
        try:
            socket.create_connection((host, port), REACH_S).close()
        except OSError as error:
            return Finding(
                FAILED,
                f"{name} at {host}:{port}: {error}",
                "is it on, is the address right, is this PC in its network, is remote control allowed?",
            )
        times.append(time.monotonic() - began)
        time.sleep(0.02)
    worst = 1000 * max(times)
    level = OK if worst < 20 else WARNING
    cure = "" if level == OK else "connect this PC by cable, without a switch that others use"
    text = f"{name} at {host}:{port} answers within {worst:.1f} ms"
    return Finding(level, text, cure)


def greet(host: str, version: int, udp_port: int) -> Tuple[socket.socket, int, int]:
    """Connect to a Franka as library of `version`: the open connection, the answer's status (0: taken) and version.

    OSError says what is in the way. The arm takes one client: nobody may be attached to it.
    """
    peer = socket.create_connection((host, FCI), REACH_S)
    try:
        peer.settimeout(REACH_S)
        size = HEADER.size + VERSIONS.size
        peer.sendall(HEADER.pack(CONNECT, 1, size) + VERSIONS.pack(version, udp_port))
        _, _, size = HEADER.unpack(_exactly(peer, HEADER.size))
        if not HEADER.size + VERSIONS.size <= size <= 1024:
            raise OSError(f"an answer of {size} bytes is none of a Franka's")
        status, own = VERSIONS.unpack_from(_exactly(peer, size - HEADER.size))
    except BaseException:
        peer.close()
        raise
    return peer, status, own


def check_fci(host: str) -> Finding:
    """The control interface answers, in the version that the library speaks."""
    ours = libfranka()
    speaks = server_of(ours)
    newest = SERVERS[0][1]
    try:
        peer, _, robot = greet(host, speaks or newest, 9)
        peer.close()
    except OSError as error:
        return Finding(
            FAILED,
            f"{host}:{FCI} (FCI): {error}",
            "open the brakes and activate FCI in Desk, detach others, connect this PC to the control box "
            "(not the arm) by cable, in its network",
        )
    system = SYSTEMS.get(robot)
    text = f"FCI at {host} has server version {robot}"
    text += f" (system {system} or newer)" if system else ""
    if speaks and speaks != robot:
        known = ".".join(map(str, ours))
        return Finding(
            FAILED,
            f"{text}, libfranka {known} speaks {speaks}",
            f"pip install --force-reinstall franky-control --extra-index-url {WHEELS}/{robot}/",
        )
    return Finding(OK, text if speaks else f"{text}; which one the library speaks is not known")


def check_realtime(root: str = "/") -> Finding:
    """The kernel is a real-time one."""
    mark = Path(root, "sys/kernel/realtime")
    kernel = f"{platform.release()} {platform.version()}"
    try:
        on = mark.read_text().strip() == "1"
    except OSError:
        on = "PREEMPT_RT" in kernel or "PREEMPT RT" in kernel
    if on:
        return Finding(OK, f"real-time kernel {platform.release()}")
    return Finding(
        FAILED,
        f"kernel {platform.release()} is no real-time one (PREEMPT_RT): the arm will stop with communication errors",
        "on Ubuntu: pro enable realtime-kernel, then reboot; to try without: --robot-option realtime=ignore",
    )


def check_priority() -> Finding:
    """This user may give threads real-time priority."""
    _, most = resource.getrlimit(resource.RLIMIT_RTPRIO)
    if os.geteuid() == 0 or most == resource.RLIM_INFINITY or most >= PRIORITY:
        return Finding(OK, "this user may set real-time priorities")
    return Finding(
        FAILED,
        f"this user may set real-time priorities up to {most}, not {PRIORITY}",
        "add '@realtime - rtprio 99' and '@realtime - memlock 102400' to /etc/security/limits.conf, join the "
        "group realtime, log in again",
    )


def check_governor(root: str = "/") -> Finding:
    """CPUs do not slow down while they wait."""
    files = sorted(Path(root, "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor"))
    found: Dict[str, int] = {}
    for file in files:
        try:
            name = file.read_text().strip()
        except OSError:
            continue
        found[name] = found.get(name, 0) + 1
    if not found:
        return Finding(
            WARNING,
            "the CPUs' governor cannot be read",
            "switch power saving off in the firmware, and do not drive an arm from a virtual machine",
        )
    text = ", ".join(f"{name} ({count} CPUs)" for name, count in sorted(found.items()))
    if set(found) == {"performance"}:
        return Finding(OK, f"governor {text}")
    return Finding(WARNING, f"governor {text}", "sudo cpupower frequency-set -g performance")


def check_network(host: str, seconds: float) -> Finding:
    """Of the state packets that a Franka sends, how many come, and how evenly."""
    try:
        numbers, times = listen(host, seconds)
    except OSError as error:
        return Finding(FAILED, f"no state from {host}: {error}", "see fci")
    if len(numbers) < 2:
        return Finding(
            FAILED,
            f"{host} answers, but {len(numbers)} state packets came in {seconds:g} s",
            "let UDP from the control box through this PC's firewall",
        )
    due = max(numbers) - min(numbers) + 1
    lost = 1.0 - len(set(numbers)) / due
    gap = max(b - a for a, b in zip(times, times[1:]))
    text = (
        f"{len(numbers)} state packets in {times[-1] - times[0]:.1f} s, {100 * lost:.2f} % lost, "
        f"longest gap {1000 * gap:.1f} ms"
    )
    if lost > TOO_MANY or gap > TOO_LONG_S:
        level = FAILED
    elif lost > LOST or gap > GAP_S:
        level = WARNING
    else:
        return Finding(OK, text)
    return Finding(
        level,
        text,
        "connect control box and PC directly by cable, to a port that nothing else uses",
    )


def listen(host: str, seconds: float) -> Tuple[List[int], List[float]]:
    """Numbers and arrivals (s) of a Franka's state packets, for `seconds` from the first one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as state:
        state.bind(("", 0))
        state.settimeout(1.0)
        try:
            state.setsockopt(socket.SOL_SOCKET, TIMESTAMPS, 1)
        except OSError:  # no Linux: Python's own clock is not as even
            pass
        port = state.getsockname()[1]
        peer, status, robot = greet(host, server_of(libfranka()) or SERVERS[0][1], port)
        if status != 0:  # of another version: for listening, any will do
            peer.close()
            peer, status, robot = greet(host, robot, port)
        with peer:
            if status != 0:
                raise OSError(f"refused with status {status}, server version {robot}")
            return _packets(state, seconds)


def _packets(state: socket.socket, seconds: float) -> Tuple[List[int], List[float]]:
    numbers: List[int] = []
    times: List[float] = []
    deadline = time.monotonic() + seconds + 1.0
    while time.monotonic() < deadline and (not times or times[-1] - times[0] < seconds):
        try:
            data, marks, _, _ = state.recvmsg(4096, 64)
        except socket.timeout:
            continue
        if len(data) < 8:
            continue
        when = time.time()
        for _, kind, value in marks:
            if kind == TIMESTAMPS and len(value) >= 16:
                whole, nano = struct.unpack_from("qq", value)
                when = whole + 1e-9 * nano
        numbers.append(struct.unpack_from("<Q", data)[0])
        times.append(when)
    return numbers, times


def _exactly(peer: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = peer.recv(size - len(data))
        if not part:
            raise OSError("it hung up: is somebody else connected?")
        data += part
    return data
