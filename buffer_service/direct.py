"""The writer's way round the socket: on the service's host it puts records into segment files itself.

The bytes go from the caller's arrays into the page cache once; the service maps them, checks them and adds them to
its index. What a writer puts into a file counts only when the service has adopted it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from buffer_service.files import identity, path_of, write_at


class Place(NamedTuple):
    """Where a record lies."""

    file: int
    offset: int
    length: int


class _File:
    def __init__(self, path: Path, number: int, size: int) -> None:
        self.number, self.size, self.end = number, size, 0
        self.descriptor = os.open(path, os.O_WRONLY)


class DirectFiles:
    """The files that the service allocated to one writer, at most one for each source."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, _File] = {}

    @staticmethod
    def possible(folder: str, token: str) -> bool:
        """Whether the service's folder is on this host and may be written."""
        return identity(Path(folder)).get("token") == token and os.access(folder, os.W_OK)

    def has_room(self, source: str, length: int) -> bool:
        """Whether a record fits into the file there is."""
        file = self._files.get(source)
        return file is not None and file.end + length <= file.size

    def use(self, source: str, number: int, size: int) -> None:
        """Go on in a new file. OSError when it cannot be opened."""
        file = _File(path_of(self._folder, number), number, size)
        self._drop(source)
        self._files[source] = file

    def put(self, source: str, buffers: list[Any], length: int) -> Place:
        """Write a record. OSError (disk full) leaves everything as it was."""
        file = self._files[source]
        write_at(file.descriptor, list(buffers), file.end)
        place = Place(file.number, file.end, length)
        file.end += length
        return place

    def forget(self) -> None:
        """Let go of all files: the service asked for new ones, or the writer closes."""
        for source in list(self._files):
            self._drop(source)

    def _drop(self, source: str) -> None:
        file = self._files.pop(source, None)
        if file is not None:
            os.close(file.descriptor)
