"""Weights between the processes of one host: files in shared memory, each holding one version.

A run's folder (`slots_folder`) has files `v<VERSION>`, complete sets; `s<NUMBER>`, spare or being written;
`newest`, the newest version as int64; `owner`, locked by the process that writes as long as it lives; and `turn`.
A file, little endian:

    0   8s  b"TWINWGT1"
    8   i64 version, -1 while it is written
    16  u64 checksum of the arrays (twinrl.weights.checksum)
    24  u64 bytes in the table
    32  u64 XXH3-64 of the 32 bytes before and the table
    40  table, msgpack: [[name, dtype, shape, offset of the array in the file], ...]

Nothing can be read while it is written: readers hold a shared lock on a file (flock) as long as one of their views
lives, the writer takes files that nobody holds, and takes them exclusively. A lock ends with its process. Files are
used again, because touching fresh pages costs far more than copying into them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import math
import mmap
import os
import shutil
import struct
import tempfile
import threading
import time
import weakref
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import psutil

from twinrl.core.checksum import digest, digest_of
from twinrl.core.errors import DeadlineError, TwinRLError, WireError
from twinrl.weights import BLOCK, Weights, checksum, compare, label, map_blocks, packed

MAGIC = b"TWINWGT1"
HEAD = struct.Struct("<8sqQQ")
HEAD_BYTES = HEAD.size + 8
NUMBER = struct.Struct("<q")
ALIGN = 64
PIECE = (
    1 << 20
)  # bytes copied at a time: they are in the second-level cache when the checksum reads them
SPARE = 2  # files that are kept though no version is in them
POLL = 0.002  # s between looks
TURN = 1.0  # s to wait for other readers of this host before reading beside them
TURN_POLL = 0.005  # s between looks whether it is ours: many wait, and should not disturb who reads
OWNER_SECONDS = 10.0  # for a learner that is brought back, until the dead one's lock is gone
ABANDONED = 600.0  # s after which a folder that nobody owns is an ended run's
POPULATE_READ, POPULATE_WRITE = 22, 23  # madvise: map all pages at once instead of one fault each
MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
PREFIX = "twinrl-"


def slots_folder(run_dir: str | Path) -> Path:
    """Where the weights of the run in `run_dir` lie, the same on every host that has some."""
    path = str(Path(run_dir).resolve())
    name = hashlib.sha256(path.encode()).hexdigest()[:12]
    return MEMORY / f"{PREFIX}{os.getuid()}-{Path(path).name}-{name}"


def remove_abandoned(memory: Path = MEMORY) -> None:
    """Give back what ended runs of this user have left in memory."""
    for folder in memory.glob(f"{PREFIX}{os.getuid()}-*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > ABANDONED and not owned(folder):
                shutil.rmtree(folder)


def owned(folder: Path) -> bool:
    """Whether a living process publishes into `folder`."""
    try:
        fd = os.open(folder / "owner", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _lock(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)


class Slot:
    """One file, mapped for writing."""

    def __init__(self, path: Path, nbytes: int = 0) -> None:
        """Open the file, or make it with `nbytes`; OSError when there is no room."""
        self.path, self.version = path, -1
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if nbytes:
                os.posix_fallocate(
                    self.fd, 0, nbytes
                )  # a map without pages behind it would kill us
            self.size = os.fstat(self.fd).st_size
            self.memory = mmap.mmap(self.fd, self.size)
        except (OSError, ValueError):
            os.close(self.fd)
            raise
        with contextlib.suppress(OSError, ValueError):
            self.memory.madvise(POPULATE_WRITE)

    def take(self) -> bool:
        """Lock for writing and mark as unfinished; False when somebody reads it."""
        if not _lock(self.fd, fcntl.LOCK_EX):
            return False
        NUMBER.pack_into(self.memory, 8, -1)
        self.version = -1
        return True

    def copy(self, arrays: Mapping[str, np.ndarray], table: list[Any]) -> None:
        """Copy `arrays` in, no more."""
        for (name, *_), target in zip(table, self.views(table).values(), strict=True):
            np.copyto(target, arrays[name])

    def fill(self, arrays: Mapping[str, np.ndarray], table: list[Any]) -> int:
        """Copy `arrays` in; gives their checksum, computed from each piece while it is in the processor's cache."""
        covered: list[bytes | None] = []  # None: the next block's digest
        blocks = []
        for name, dtype, shape, offset in table:
            source = np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8)
            target = np.frombuffer(self.memory, np.uint8, source.size, offset)
            starts = range(0, source.size, BLOCK)
            blocks += [(target[i : i + BLOCK], source[i : i + BLOCK]) for i in starts]
            covered += [label(name, dtype, shape), *[None] * len(starts)]
        digests = map_blocks(_copy, blocks)
        return digest_of(packed(next(digests)) if part is None else part for part in covered)

    def seal(self, version: int, checksum: int, table: bytes, path: Path) -> None:
        """Complete: from now on it is `version` for everybody."""
        head = HEAD.pack(MAGIC, version, checksum, len(table))
        self.memory[HEAD_BYTES : HEAD_BYTES + len(table)] = table
        self.memory[:HEAD_BYTES] = head + struct.pack("<Q", digest(head, table))
        self.rename(path)
        self.version = version
        fcntl.flock(self.fd, fcntl.LOCK_UN)

    def views(self, table: list[Any]) -> dict[str, np.ndarray]:
        """What was filled in."""
        return _views(np.frombuffer(self.memory, np.uint8), table, self.path)

    def rename(self, path: Path) -> None:
        """Give the file another name."""
        os.rename(self.path, path)
        self.path = path

    def close(self, remove: bool = False) -> None:
        """Unmap; `remove`: also the file, whose memory goes when its last reader lets go."""
        if remove:
            self.path.unlink(missing_ok=True)
        os.close(self.fd)  # the map goes with the last view of it
        del self.memory


class SlotWriter:
    """The one process that publishes into `folder`. Not thread-safe but for `take` beside the rest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_uid != os.getuid():  # /dev/shm is everybody's
            raise TwinRLError(f"{folder} belongs to another user: remove it")
        self._owner = os.open(folder / "owner", os.O_RDWR | os.O_CREAT, 0o600)
        _lock_within(self._owner, OWNER_SECONDS, f"the publisher of {folder} before us to end")
        self._newest = Slot(folder / "newest", mmap.PAGESIZE)
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._spare: list[Slot] = []
        self._sealed: dict[int, Slot] = {}
        for path in sorted(folder.glob("[vs][0-9]*")):
            slot = Slot(path)
            version = _read_head(slot.memory, path)[0] if path.name[0] == "v" else -1
            if version < 0:  # spare, or its writer died over it
                slot.close(remove=True)
            else:
                slot.version = version
                self._sealed[version] = slot
        self._tell()

    @property
    def versions(self) -> list[int]:
        """The versions that are there."""
        return sorted(self._sealed.copy())  # another thread may be sealing

    def take(self, arrays: Mapping[str, np.ndarray]) -> tuple[Slot, list[Any]]:
        """A file to write, locked, and the table of what goes where. TwinRLError when memory has no room."""
        table, nbytes = _lay_out(arrays)
        with self._lock:
            for slot in self._spare:
                if slot.size >= nbytes and slot.take():
                    self._spare.remove(slot)
                    return slot, table
        slot = self._make(nbytes)
        slot.take()
        return slot, table

    def seal(self, slot: Slot, version: int, checksum: int, table: list[Any]) -> None:
        """Publish what was filled into `slot`."""
        slot.seal(version, checksum, msgpack.packb(table), self.folder / f"v{version}")
        with self._lock:
            self._sealed[version] = slot
        self._tell()

    def give_back(self, slot: Slot) -> None:
        """What was taken is not going to be published."""
        fcntl.flock(slot.fd, fcntl.LOCK_UN)
        with self._lock:
            self._spare.append(slot)

    def retain(self, versions: Collection[int]) -> None:
        """Files of other versions may be used again; one of the newest set's size is made if there is none."""
        with self._lock:
            for version in [v for v in self._sealed if v not in versions]:
                slot = self._sealed.pop(version)
                slot.rename(self._spare_path())
                self._spare.append(slot)
            wanted = max((s.size for s in self._sealed.values()), default=0)
            self._spare.sort(key=lambda slot: slot.size >= wanted)
            surplus, self._spare = self._spare[:-SPARE], self._spare[-SPARE:]
            ready = any(slot.size >= wanted for slot in self._spare)
        for slot in surplus:
            slot.close(remove=True)
        if wanted and not ready:
            with contextlib.suppress(TwinRLError):  # then it fails where it is needed, and says so
                made = self._make(wanted)
                with self._lock:
                    self._spare.append(made)

    def close(self, remove: bool = False) -> None:
        """Let go of the folder; `remove`: with all that is in it."""
        for slot in [*self._sealed.values(), *self._spare, self._newest]:
            slot.close()
        os.close(self._owner)
        if remove:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _make(self, nbytes: int) -> Slot:
        path = self._spare_path()
        free = min(shutil.disk_usage(self.folder).free, psutil.virtual_memory().available)
        try:
            if nbytes > free:  # shared memory may promise more than there is
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return Slot(path, -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise TwinRLError(
                f"no room for {nbytes / 1e6:.0f} MB of weights in {self.folder} ({free / 1e6:.0f} MB free): "
                f"{error.strerror}. Give {MEMORY} more, or keep fewer versions (learner.keep_versions)"
            ) from None

    def _spare_path(self) -> Path:
        return self.folder / f"s{next(self._numbers)}"

    def _tell(self) -> None:
        NUMBER.pack_into(self._newest.memory, 0, max(self._sealed, default=-1))


class SlotReader:
    """A WeightSource for processes of the writer's host. Arrays are views: nothing is copied, and as long as one
    of them lives, its file is not written. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._maps: dict[int, mmap.mmap] = {}  # by inode: pages are mapped once, not once a version
        self._newest: np.ndarray | None = None

    def newest(self) -> int:
        """The newest version, -1 for none; costs no system call."""
        if self._newest is None:
            try:
                with (self.folder / "newest").open("rb") as file:
                    memory = mmap.mmap(file.fileno(), NUMBER.size, access=mmap.ACCESS_READ)
            except (FileNotFoundError, ValueError):
                return -1
            self._newest = np.frombuffer(
                memory, "<i8"
            )  # read and written whole: eight aligned bytes
        return int(self._newest[0])

    def versions(self) -> list[int]:
        """The versions that are there."""
        with contextlib.suppress(FileNotFoundError):
            names = os.listdir(self.folder)
            return sorted(int(n[1:]) for n in names if n[0] == "v" and n[1:].isdigit())
        return []

    def open(self, version: int) -> Weights | None:
        """Exactly `version`, compared with its checksum; None when it is gone. WireError when it is damaged."""
        found = self.look(version)
        if found is None:
            return None
        with self._turn():
            compare(version, checksum(found.arrays), found.checksum)
        return found._replace(verified=True)

    def look(self, version: int) -> Weights | None:
        """As `open`, without reading the arrays."""
        path = self.folder / f"v{version}"
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            # A file that is being written, or was since it was opened, is another version's.
            memory = self._map(path, os.fstat(fd).st_ino) if _lock(fd, fcntl.LOCK_SH) else None
            found = memory and _read_head(memory, path)
            if not found or found[0] != version:
                os.close(fd)
                return None
        except BaseException:
            os.close(fd)
            raise
        root = np.frombuffer(memory, np.uint8)
        weakref.finalize(
            root, os.close, fd
        )  # all views have `root` as their base: the lock goes with the last
        return Weights(version, _views(root, found[2], path), found[1])

    def poll(self, newer_than: int) -> Weights | None:
        """The newest weights if their version is above `newer_than`."""
        while True:
            newest = self.newest()
            if newest <= newer_than:
                return None
            weights = self.open(newest)
            if weights is not None or self.newest() == newest:
                return weights  # None: its writer is about to replace it

    def wait(self, newer_than: int, timeout: float) -> Weights:
        """The newest weights above `newer_than`; DeadlineError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            weights = self.poll(newer_than)
            if weights is not None:
                return weights
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"waited {timeout:g} s for a policy version above {newer_than} in {self.folder}, "
                    f"whose newest is {self.newest()}"
                )
            time.sleep(POLL)

    def get(self, version: int) -> Weights:
        """Exactly `version`; TwinRLError when it is gone."""
        weights = self.open(version)
        if weights is None:
            raise TwinRLError(f"policy version {version} is gone; there are {self.versions()}")
        return weights

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """One reader of a host after the other: the first is done early, and the last no later."""
        try:
            fd = os.open(self.folder / "turn", os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:  # the run has ended
            yield
            return
        try:
            with contextlib.suppress(DeadlineError):  # somebody hangs there
                _lock_within(fd, TURN, "other readers", TURN_POLL)
            yield
        finally:
            os.close(fd)

    def _map(self, path: Path, inode: int) -> mmap.mmap | None:
        """The file `inode`, None when it has lost the name `path`."""
        with self._lock:
            if inode not in self._maps:
                with os.scandir(self.folder) as entries:
                    there = {entry.inode() for entry in entries}
                self._maps = {i: memory for i, memory in self._maps.items() if i in there}
                # Opened anew: a map keeps its file open, and with it would keep the reader's lock.
                with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                    if os.fstat(file.fileno()).st_ino == inode:
                        self._maps[inode] = _map_all(file.fileno())
            return self._maps.get(inode)


def _map_all(fd: int) -> mmap.mmap:
    memory = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
    with contextlib.suppress(OSError, ValueError):
        memory.madvise(POPULATE_READ)
    return memory


def _copy(block: tuple[np.ndarray, np.ndarray]) -> int:
    """Copy a block; gives its digest."""
    target, source = block

    def pieces() -> Iterator[np.ndarray]:
        for start in range(0, target.size, PIECE):
            piece = target[start : start + PIECE]
            np.copyto(piece, source[start : start + PIECE])
            yield piece

    return digest_of(pieces())


def _lay_out(arrays: Mapping[str, np.ndarray]) -> tuple[list[Any], int]:
    """The table for `arrays`, and how large a file must be."""
    table: list[Any] = []
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        table.append([name, array.dtype.str, list(array.shape), 1 << 62])  # an offset of nine bytes
    end = HEAD_BYTES + len(msgpack.packb(table))
    for row in table:
        row[3] = end = -(-end // ALIGN) * ALIGN
        end += np.asarray(arrays[row[0]]).nbytes
    return table, end


def _read_head(memory: mmap.mmap, path: Path) -> tuple[int, int, list[Any]]:
    """(version, checksum, table); version -1 for a file that is not finished."""
    if len(memory) < HEAD_BYTES:
        raise WireError(f"{path} is too short for weights: {len(memory)} bytes")
    head = memory[: HEAD.size]
    magic, version, checksum, length = HEAD.unpack(head)
    if version == -1:
        return -1, 0, []
    table = memory[HEAD_BYTES : HEAD_BYTES + length] if length < len(memory) else b""
    (expected,) = struct.unpack_from("<Q", memory, HEAD.size)
    if magic != MAGIC or digest(head, table) != expected:
        raise WireError(f"weights of version {path.name[1:]} are damaged: {path} has a broken head")
    return version, checksum, msgpack.unpackb(table)


def _views(root: np.ndarray, table: list[Any], path: Path) -> dict[str, np.ndarray]:
    arrays = {}
    for name, dtype_name, shape, offset in table:
        dtype = np.dtype(dtype_name)
        end = offset + math.prod(shape) * dtype.itemsize
        if end > len(root):
            raise WireError(f"weights in {path}: {name} ends at {end}, the file at {len(root)}")
        arrays[name] = root[offset:end].view(dtype).reshape(shape)
    return arrays


def _lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _lock_within(fd: int, seconds: float, what: str, pause: float = POLL) -> None:
    deadline = time.monotonic() + seconds
    while not _lock(fd, fcntl.LOCK_EX):
        if time.monotonic() > deadline:
            raise DeadlineError(f"waited {seconds:g} s for {what}")
        time.sleep(pause)
