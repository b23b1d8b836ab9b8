"""Input devices as the Linux kernel shows them: /dev/input/event*, read without a library.

The interface has been the same since Linux 2.6 (linux/input.h): reports of 24 bytes, and questions by ioctl.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
from pathlib import Path
from typing import Callable, Dict, FrozenSet, Iterator, List, NamedTuple, Set, Tuple

EVENT = struct.Struct("llHHi")  # struct input_event: time in s and us, type, code, value
SYNC, KEY, ABSOLUTE = 0, 1, 3  # types
REPORT, DROPPED = 0, 3  # codes of SYNC
KEYS, ABSOLUTES = 0x300, 0x40  # how many codes there are
FOLDER = Path("/dev/input")


class Snapshot(NamedTuple):
    """How all axes and keys of a device are after a report."""

    axes: Dict[int, int]  # by code, in the device's own numbers
    keys: FrozenSet[int]  # that are down


class EventDevice:
    """An open device: its axes' ranges, and what it reports."""

    def __init__(
        self,
        file: int,
        ranges: Dict[int, Tuple[int, int]],
        ask: Callable[[], Snapshot] | None = None,
    ) -> None:
        """`file`: a descriptor, closed with this. `ask`: for everything's present state, also after a loss."""
        self.ranges = ranges
        self._file, self._ask = file, ask
        self._rest, self._lost = b"", False
        self._take(ask() if ask is not None else Snapshot({}, frozenset()))

    @property
    def snapshot(self) -> Snapshot:
        """As of the last report."""
        return Snapshot(dict(self._axes), frozenset(self._keys))

    def read(self, seconds: float) -> List[Snapshot]:
        """After each report since the last call; waits at most `seconds` for one. OSError: the device has gone."""
        if not select.select([self._file], [], [], seconds)[0]:
            return []
        data = self._rest + os.read(self._file, 64 * EVENT.size)
        if len(data) == len(self._rest):
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        whole = len(data) - len(data) % EVENT.size
        self._rest = data[whole:]
        found = []
        for _, _, kind, code, value in EVENT.iter_unpack(data[:whole]):
            if kind == SYNC and code == DROPPED:
                self._lost = (
                    True  # the kernel's buffer ran over: up to the next report nothing is of use
                )
            elif kind == SYNC and code == REPORT:
                self._recover()
                found.append(self.snapshot)
            elif self._lost:
                continue
            elif kind == KEY:
                (self._keys.add if value else self._keys.discard)(code)
            elif kind == ABSOLUTE:
                self._axes[code] = value
        return found

    def close(self) -> None:
        """Let go of it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _take(self, snapshot: Snapshot) -> None:
        self._axes: Dict[int, int] = dict(snapshot.axes)
        self._keys: Set[int] = set(snapshot.keys)

    def _recover(self) -> None:
        if not self._lost:
            return
        if self._ask is None:
            raise OSError(errno.EIO, "reports were lost")
        self._take(self._ask())
        self._lost = False


class Found(NamedTuple):
    """A device that can be opened."""

    path: str
    name: str
    keys: FrozenSet[int]  # codes that it has
    axes: FrozenSet[int]


def devices(denied: List[str], folder: Path = FOLDER) -> Iterator[Found]:
    """All event devices; the paths of those that this user may not read are added to `denied`."""
    for path in sorted(folder.glob("event*"), key=lambda path: (len(path.name), path.name)):
        try:
            file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except PermissionError:
            denied.append(str(path))
            continue
        except OSError:  # it went in between
            continue
        try:
            name = _ask(file, 0x06, 256).split(b"\0")[0].decode("utf-8", "replace")
            keys = _bits(_ask(file, 0x20 + KEY, KEYS // 8))
            yield Found(str(path), name, keys, _bits(_ask(file, 0x20 + ABSOLUTE, ABSOLUTES // 8)))
        except OSError:
            continue
        finally:
            os.close(file)


def open_device(found: Found) -> EventDevice:
    """Open a device that was found. OSError: it has gone or may not be read."""
    file = os.open(found.path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        ranges = {code: _absolute(file, code)[1:] for code in found.axes}
        return EventDevice(file, ranges, lambda: _state(file, found.axes))
    except OSError:
        os.close(file)
        raise


def _state(file: int, axes: FrozenSet[int]) -> Snapshot:
    now = {code: _absolute(file, code)[0] for code in axes}
    return Snapshot(now, _bits(_ask(file, 0x18, KEYS // 8)))


def _absolute(file: int, code: int) -> Tuple[int, int, int]:
    """Value, minimum and maximum of an axis: the first of struct input_absinfo's six numbers."""
    value, low, high = struct.unpack_from("3i", _ask(file, 0x40 + code, 24))
    return value, low, high


def _ask(file: int, number: int, size: int) -> bytes:
    """Ask the driver: _IOC(_IOC_READ, 'E', number, size) of linux/ioctl.h."""
    return fcntl.ioctl(file, 2 << 30 | size << 16 | ord("E") << 8 | number, bytes(size))


def _bits(data: bytes) -> FrozenSet[int]:
    return frozenset(i for i in range(8 * len(data)) if data[i // 8] >> i % 8 & 1)
