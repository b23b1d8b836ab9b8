"""Segment files: records appended by the service, mapped by every reader on the same host.

A file `NNNNNN.seg` holds records of one source, so that eviction of one source empties whole files. It is
made at its full size (sparse) so that a reader maps it once, and cut to its content when it is sealed. A sealed
file is read-only and synced: only files that can still be written may hold torn records after a crash.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from buffer_service import record
from twinrl.core.segment import Segment

FILE_BYTES = 256 << 20
_IOV = 512  # buffers in one writev; the system's limit is 1024


def path_of(folder: Path, number: int) -> Path:
    """Where segment file `number` lies."""
    return folder / f"{number:06d}.seg"


def identity(folder: Path) -> dict[str, str]:
    """Which run the files in `folder` belong to: its token and schema; empty where no run was."""
    path = folder / "identity.json"
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, PermissionError):
        return {}


class Found(NamedTuple):
    """A record met by `SegmentFiles.scan`."""

    id: int
    file: int
    offset: int
    length: int
    sealed: bool  # the file was complete before the last process ended


class _Active:
    """The file that a source's records are appended to."""

    def __init__(self, path: Path, number: int, size: int) -> None:
        self.number, self.size, self.offset, self.dirty = number, size, 0, False
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        os.ftruncate(self.descriptor, size)

    def write(self, buffers: list[Any], length: int) -> int:
        """Write at the end. When it fails (disk full) the end stays where it was."""
        place = self.offset
        while buffers:
            part = buffers[:_IOV]
            count = os.pwritev(self.descriptor, part, place)
            place += count
            while buffers and count >= len(buffers[0]):
                count -= len(buffers.pop(0))
            if count:
                buffers[0] = memoryview(buffers[0])[count:]
        start, self.offset, self.dirty = self.offset, self.offset + length, True
        return start

    def seal(self) -> None:
        """Make everything durable, cut the empty tail, forbid further writing."""
        os.ftruncate(self.descriptor, self.offset)
        os.fsync(self.descriptor)
        os.fchmod(self.descriptor, 0o444)
        os.close(self.descriptor)


class SegmentFiles:
    """The segment files of a run, written by one process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._active: dict[str, _Active] = {}
        self._full: list[_Active] = []  # to be sealed by whoever syncs next
        self._lock = threading.Lock()  # append and sync come from different threads
        self._syncing = threading.Lock()
        self._next = max(self.numbers(), default=0) + 1

    def numbers(self) -> list[int]:
        """Numbers of the files there are, oldest first."""
        return sorted(int(p.stem) for p in self.folder.glob("*.seg") if p.stem.isdigit())

    def append(
        self, id: int, segment: Segment, file_bytes: int = FILE_BYTES
    ) -> tuple[int, int, int]:
        """Write a record to its source's file; returns (file number, offset, length)."""
        buffers, length = record.encode(id, *segment)
        source = segment.header["source"]
        with self._lock:
            active = self._active.get(source)
            if active is not None and active.offset + length > active.size:
                self._full.append(self._active.pop(source))
                active = None
            if active is None:
                path = path_of(self.folder, self._next)
                active = _Active(path, self._next, max(file_bytes, length))
                self._active[source] = active
                self._next += 1
        return active.number, active.write(buffers, length), length

    def is_active(self, number: int) -> bool:
        """Whether records may still be appended to file `number` (or it waits to be sealed)."""
        with self._lock:
            return any(a.number == number for a in [*self._active.values(), *self._full])

    def sync(self) -> None:
        """Make everything written until now durable."""
        with self._syncing:
            with self._lock:
                full, self._full = self._full, []
                dirty = [active for active in self._active.values() if active.dirty]
                for active in dirty:
                    active.dirty = False
            for active in full:
                active.seal()
            for active in dirty:
                # A file that filled up meanwhile waits in _full: only sync closes descriptors.
                os.fdatasync(active.descriptor)

    def delete(self, number: int) -> None:
        """Remove file `number`; readers that map it keep their views."""
        with contextlib.suppress(FileNotFoundError):
            path_of(self.folder, number).unlink()

    def close(self) -> None:
        """Seal every file."""
        with self._lock:
            self._full += self._active.values()
            self._active = {}
        self.sync()

    def scan(self) -> Iterator[Found]:
        """Every whole record of the files of earlier processes, which are sealed on the way.

        The records of a file that was never sealed are checked byte by byte; the walk through a file ends at
        the first record that is torn.
        """
        for number in self.numbers():
            path = path_of(self.folder, number)
            sealed = not stat.S_IMODE(path.stat().st_mode) & 0o200
            offset = 0
            if path.stat().st_size:
                buffer = map_file(path)
                while (found := record.prefix(buffer, offset)) is not None:
                    if not record.intact(buffer, offset, found, columns=not sealed):
                        break
                    yield Found(found.id, number, offset, found.length, sealed)
                    offset += found.length
            if not sealed:
                os.truncate(path, offset)
                path.chmod(0o444)
            if not offset:
                self.delete(number)


class MappedFiles:
    """Read access to segment files on the same host: each file is mapped once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._maps: dict[int, mmap.mmap] = {}

    def segment(self, file: int, offset: int) -> Segment:
        """The decoded segment at `offset`, views of mapped memory. FileNotFoundError when it was evicted."""
        return record.decode(self._map(file), offset)

    def raw(self, file: int, offset: int, length: int) -> memoryview:
        """The bytes of a record."""
        return memoryview(self._map(file))[offset : offset + length]

    def forget(self, keep: set[int]) -> None:
        """Let go of the maps of all files but `keep`; views stay valid."""
        for number in [n for n in self._maps if n not in keep]:
            del self._maps[number]

    def _map(self, file: int) -> mmap.mmap:
        if file not in self._maps:
            self._maps[file] = map_file(path_of(self.folder, file))
        return self._maps[file]


def map_file(path: Path) -> mmap.mmap:
    """Map a whole file for reading."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
