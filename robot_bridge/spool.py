"""What the replay service has not acknowledged yet, on the robot PC's disk. Nothing here is ever dropped.

    ROOT/NAME/spool.json        this spool's identity, part of the writer's name
    ROOT/NAME/lock              held by the one process that may write
    ROOT/NAME/RUN/numbers.json  next sequence and episode number
    ROOT/NAME/RUN/SEQUENCE.seg  one segment, as it goes over the wire

An episode's segments appear together, after they are on the disk: a crash loses the running episode at most.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import uuid
from pathlib import Path
from typing import Any, Dict, Tuple

import numpy as np

from robot_bridge import parts
from twinrl.core import wire
from twinrl.core.errors import ConfigError

Entry = Tuple[Dict[str, Any], Dict[str, np.ndarray]]  # header, arrays


class Spool:
    """Numbers and keeps the segments of one robot, a folder for each run."""

    def __init__(self, root: Path, name: str, max_bytes: int = 2 << 30) -> None:
        self.folder, self.max_bytes = Path(root) / name, max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock_file = (self.folder / "lock").open("a+")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"another process on this PC is attached as {name!r} with the spool {self.folder}: "
                "end it, or attach with another --name or --spool"
            ) from None
        self.id = self._identity()
        self._run: Path | None = None
        self._sizes: dict[int, int] = {}  # sequence: bytes of what waits
        self._changed = threading.Condition()
        self._sequence = self._episode = 0

    def open(self, run: str, numbering: dict[str, int] | None = None) -> None:
        """Continue in `run`; numbers go on after what lies here and after what the cluster remembers."""
        folder = self.folder / run
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob("*.tmp"):
            leftover.unlink()
        kept = {int(path.stem): path.stat().st_size for path in folder.glob("*.seg")}
        numbers = _read_json(folder / "numbers.json", {"sequence": 0, "episode": 0})
        known = numbering or {}
        with self._changed:
            self._run, self._sizes = folder, kept
            self._sequence = max(
                numbers["sequence"], known.get("sequence", 0), max(kept, default=-1) + 1
            )
            self._episode = max(numbers["episode"], known.get("episode", 0))
            self._changed.notify_all()

    def close(self) -> None:
        """Let another process have the spool."""
        self._lock_file.close()

    @property
    def numbering(self) -> dict[str, int]:
        """The numbers that the next segment and the next episode get."""
        return {"sequence": self._sequence, "episode": self._episode}

    def next_episode(self) -> int:
        """Number an episode; a number is never given twice."""
        self._episode += 1
        self._save_numbers()
        return self._episode - 1

    def add(self, entries: list[Entry]) -> None:
        """Number an episode's segments and keep them: all of them, or after a crash none."""
        assert self._run is not None, "open() comes first"
        written = []
        for header, arrays in entries:
            header = dict(header, header=dict(header["header"], sequence=self._sequence))
            path = self._path(self._sequence)
            written.append((self._sequence, path, _write(path.with_suffix(".tmp"), header, arrays)))
            self._sequence += 1
        self._save_numbers()
        for _, path, _ in written:
            os.replace(path.with_suffix(".tmp"), path)
        _sync_folder(self._run)
        with self._changed:
            self._sizes.update({sequence: size for sequence, _, size in written})
            self._changed.notify_all()

    def oldest(self, timeout: float) -> int | None:
        """The sequence number of the segment to send next; None when there is none within `timeout` s."""
        with self._changed:
            self._changed.wait_for(lambda: self._sizes, timeout)
            return min(self._sizes, default=None)

    def read(self, sequence: int) -> Entry:
        """A kept segment; WireError if its file is damaged."""
        return wire.unpack(parts.split(self.data(sequence), str(self._path(sequence))))

    def data(self, sequence: int) -> bytes:
        """A kept segment as it lies in its file (`robot_bridge.parts`)."""
        return self._path(sequence).read_bytes()

    def remove(self, sequence: int) -> None:
        """The service has acknowledged it."""
        self._forget(sequence)
        self._path(sequence).unlink(missing_ok=True)

    def set_aside(self, sequence: int) -> Path:
        """Keep a refused or damaged segment for a person to look at; it is not sent again."""
        self._forget(sequence)
        target = self._path(sequence).with_suffix(".refused")
        os.replace(self._path(sequence), target)
        return target

    def wait_empty(self, timeout: float) -> bool:
        """Whether everything was acknowledged within `timeout` s."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._sizes, timeout)

    @property
    def full(self) -> bool:
        """Too much waits for the service: no new episode should begin."""
        return sum(self._sizes.copy().values()) > self.max_bytes

    def stats(self) -> dict[str, float]:
        """What waits for an acknowledgement."""
        sizes = self._sizes.copy()
        return {"spool_segments": float(len(sizes)), "spool_bytes": float(sum(sizes.values()))}

    def _forget(self, sequence: int) -> None:
        with self._changed:
            self._sizes.pop(sequence, None)
            self._changed.notify_all()

    def _path(self, sequence: int) -> Path:
        assert self._run is not None, "open() comes first"
        return self._run / f"{sequence:010d}.seg"

    def _save_numbers(self) -> None:
        assert self._run is not None, "open() comes first"
        _write_json(self._run / "numbers.json", self.numbering)

    def _identity(self) -> str:
        path = self.folder / "spool.json"
        identity = _read_json(path, {}).get("id")
        if identity is None:
            identity = uuid.uuid4().hex[:8]
            _write_json(path, {"id": identity})
        return identity


def _write(path: Path, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> int:
    data = parts.join(wire.pack(header, arrays))
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return len(data)


def _read_json(path: Path, default: dict[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return default
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); move {path.parent} aside") from None


def _write_json(path: Path, data: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        json.dump(data, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(str(folder), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
