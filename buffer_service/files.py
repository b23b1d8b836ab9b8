"""Segment files: records appended by the service or by a writer on the same host, mapped by every reader there.

A file `NNNNNN.seg` holds records of one source and one appender, so that eviction of one source empties whole
files. It is made at its full size so that it is mapped once, and cut to its content when it is sealed. A
sealed file is read-only and synced: only files that can still be written may hold torn records after a crash.
The service gives every file its number and counts only what was adopted into it; whatever else a writer puts
there is cut off.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import stat
import threading
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from buffer_service import record
from twinrl.core.errors import Rejected
from twinrl.core.segment import Segment

FILE_BYTES = 64 << 20  # reserved whole, so the tail of a file being written costs disk
MAX_RESERVED_BYTES = (
    64 << 30
)  # allocated and not filled yet; writers that come and go must not fill a disk
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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


def write_at(descriptor: int, buffers: list[Any], place: int) -> None:
    """Write all `buffers`, one after the other, from byte `place` on."""
    while buffers:
        part = buffers[:_IOV]
        count = os.pwritev(descriptor, part, place)
        place += count
        while buffers and count >= len(buffers[0]):
            count -= len(buffers.pop(0))
        if count:
            buffers[0] = memoryview(buffers[0])[count:]


class Found(NamedTuple):
    """A record met by `SegmentFiles.scan`."""

    file: int
    offset: int
    length: int
    time: float  # s since the epoch, when it was encoded
    sealed: bool  # the file was complete before the last process ended


class _Active:
    """A file that records are appended to."""

    def __init__(self, path: Path, number: int, size: int, durable: bool) -> None:
        self.number, self.size, self.end, self.dirty = number, size, 0, False
        self.path, self._durable = path, durable
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            if durable:  # reserved: twice as fast to fill on a disk
                os.posix_fallocate(self.descriptor, 0, size)
            else:  # in memory file systems that would touch every page twice
                os.ftruncate(self.descriptor, size)
        except OSError:
            os.close(self.descriptor)
            path.unlink()
            raise

    def write(self, buffers: list[Any], length: int) -> int:
        """Write at the end. When it fails (disk full) the end stays where it was."""
        write_at(self.descriptor, buffers, self.end)
        return self.advance(length)

    def advance(self, length: int) -> int:
        """Count `length` more bytes as content; returns where they start."""
        start, self.end, self.dirty = self.end, self.end + length, True
        return start

    def seal(self) -> None:
        """Cut the empty tail, make everything durable, forbid further writing. Without content the file goes."""
        os.ftruncate(self.descriptor, self.end)
        if not self.end:
            self.path.unlink(missing_ok=True)
        elif self._durable:
            os.fsync(self.descriptor)
        os.fchmod(self.descriptor, 0o444)
        os.close(self.descriptor)


class SegmentFiles:
    """The segment files of a run, managed by one process.

    Without `durable` nothing is ever synced, and what is found after the machine died is doubted.
    """

    def __init__(self, folder: Path, durable: bool = True) -> None:
        self.folder, self._durable = folder, durable
        folder.mkdir(parents=True, exist_ok=True)
        self._active: dict[Hashable, _Active] = {}  # by appender: a source, or (writer, source)
        self._full: list[_Active] = []  # to be sealed by whoever syncs next
        self._lock = threading.Lock()  # append and sync come from different threads
        self._syncing = threading.Lock()
        self._next = max(self.numbers(), default=0) + 1

    def numbers(self) -> list[int]:
        """Numbers of the files there are, oldest first."""
        return sorted(int(p.stem) for p in self.folder.glob("*.seg") if p.stem.isdigit())

    def append(self, segment: Segment, file_bytes: int = FILE_BYTES) -> tuple[int, int, int]:
        """Write a record to its source's file; returns (file number, offset, length)."""
        return self.append_record(segment.header["source"], *record.encode(*segment), file_bytes)

    def append_record(
        self, source: str, buffers: list[Any], length: int, file_bytes: int = FILE_BYTES
    ) -> tuple[int, int, int]:
        """The same with an encoded record."""
        with self._lock:
            active = self._active.get(source)
            if active is None or active.end + length > active.size:
                active = self._open(source, max(file_bytes, length), length)
        return active.number, active.write(buffers, length), length

    def allocate(self, writer: str, source: str, file_bytes: int, least: int) -> tuple[int, int]:
        """A new file for `writer` to put its records into, in place of its last one; returns (number, size)."""
        with self._lock:
            others = (a for key, a in self._active.items() if key != (writer, source))
            if sum(each.size - each.end for each in others) + least > MAX_RESERVED_BYTES:
                raise OSError(errno.EDQUOT, f"{MAX_RESERVED_BYTES} bytes wait for their writers")
            active = self._open((writer, source), max(file_bytes, least), least)
            return active.number, active.size

    def adopt(self, writer: str, source: str, file: int, offset: int, length: int) -> None:
        """Count a record that `writer` put into its file as content; Rejected where that cannot be."""
        with self._lock:
            active = self._active.get((writer, source))
            if active is None or active.number != file:
                raise Rejected(
                    f"segment file {file} is not writer {writer!r}'s for source {source}"
                )
            if offset != active.end or length <= 0 or offset + length > active.size:
                raise Rejected(
                    f"bytes {offset} to {offset + length} do not follow the content of segment file {file}, "
                    f"which ends at {active.end} of {active.size}"
                )
            active.advance(length)

    def owned(self, writer: str, source: str) -> tuple[int, int] | None:
        """The file that was allocated to `writer` last, and where its content ends."""
        with self._lock:
            active = self._active.get((writer, source))
            return None if active is None else (active.number, active.end)

    def release(self, writer: str) -> None:
        """Seal the files that were allocated to `writer`."""
        with self._lock:
            for key in [k for k in self._active if isinstance(k, tuple) and k[0] == writer]:
                self._full.append(self._active.pop(key))

    def _open(self, key: Hashable, size: int, least: int) -> _Active:
        """A new file of `size` bytes, or of `least` at the least where the disk is nearly full."""
        if key in self._active:
            self._full.append(self._active.pop(key))
        while True:
            try:
                active = _Active(path_of(self.folder, self._next), self._next, size, self._durable)
                break
            except OSError as error:
                if size <= least or error.errno not in NO_ROOM:
                    raise
                size = max(size // 4, least)
        self._active[key] = active
        self._next += 1
        return active

    @property
    def appenders(self) -> int:
        """How many files are being written."""
        return len(self._active)

    def is_active(self, number: int) -> bool:
        """Whether records may still be appended to file `number` (or it waits to be sealed)."""
        with self._lock:
            return any(a.number == number for a in [*self._active.values(), *self._full])

    def sync(self) -> None:
        """Seal full files, and make everything written until now durable."""
        with self._syncing:
            with self._lock:
                full, self._full = self._full, []
                dirty = [active for active in self._active.values() if active.dirty]
                for active in dirty:
                    active.dirty = False
            for active in full:
                active.seal()
            for active in dirty if self._durable else ():
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

    def size(self, number: int) -> int:
        """Bytes of file `number`; 0 when it is gone."""
        with contextlib.suppress(FileNotFoundError):
            return path_of(self.folder, number).stat().st_size
        return 0

    def _unsynced_before_boot(self) -> bool:
        """Whether files were left unsynced when the machine died. Notes for the next start what may be by then."""
        note, boot = self.folder / "unsynced", ""
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        found = note.exists() and note.read_text() != boot
        if not self._durable:
            note.write_text(boot)
        elif found:  # what is left after this start was checked byte by byte
            note.unlink()
        return found

    def scan(self) -> Iterator[Found]:
        """Every whole record of the files of earlier processes, which are sealed on the way.

        The records of a file that was never sealed are checked byte by byte; the walk through a file ends at
        the first record that is torn.
        """
        doubtful = self._unsynced_before_boot()
        for number in self.numbers():
            path = path_of(self.folder, number)
            sealed = not doubtful and not stat.S_IMODE(path.stat().st_mode) & 0o200
            offset = 0
            if path.stat().st_size:
                buffer = map_file(path)
                while (found := record.prefix(buffer, offset)) is not None:
                    if not record.intact(buffer, offset, columns=not sealed):
                        break
                    yield Found(number, offset, found.length, found.time, sealed)
                    offset += found.length
            if not sealed:
                path.chmod(0o644)
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
        """The segment at `offset`, views of mapped memory. FileNotFoundError when it was evicted."""
        return record.decode(self.map(file), offset)

    def raw(self, file: int, offset: int, length: int) -> memoryview:
        """The bytes of a record."""
        return memoryview(self.map(file))[offset : offset + length]

    def forget(self, keep: set[int]) -> None:
        """Let go of the maps of all files but `keep`; views stay valid."""
        for number in [n for n in self._maps if n not in keep]:
            del self._maps[number]

    def map(self, file: int) -> mmap.mmap:
        """The whole file, mapped; views of it stay valid when it is deleted."""
        if file not in self._maps:
            self._maps[file] = map_file(path_of(self.folder, file))
        return self._maps[file]


def map_file(path: Path) -> mmap.mmap:
    """Map a whole file for reading."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
