"""Repair of an append-only file whose end never reached the disk.

After a power cut a file may end with zeros or old bytes where its length was written and its content was not. Redis
forgives an end that is missing, not one that is wrong. What stands behind the last whole transaction is cut off, and
kept beside; whoever wrote it had no acknowledgement, or reads it from the segment files again.
"""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import Any

_HEAD = re.compile(rb"([*$])(\d{1,10})\r\n")


def repair(folder: Path) -> tuple[Path, int] | None:
    """Cut the damaged end of the newest file in `folder`; returns (file, bytes cut), None where none is damaged."""
    files = sorted(folder.glob("*.incr.aof"), key=lambda path: int(path.name.split(".")[-3]))
    if not files or not files[-1].stat().st_size:
        return None
    path = files[-1]
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = whole(content)
        rest = content[end:]
        if not rest:
            return None
        path.with_suffix(".cut").write_bytes(rest)
        file.truncate(end)
    return path, len(rest)


def whole(content: Any) -> int:
    """Bytes of `content` up to the end of its last whole command or transaction."""
    place, end, inside = 0, 0, False
    while place < len(content):
        if content[place : place + 1] == b"#":  # a note, for instance a time
            place = content.find(b"\n", place) + 1
            if not place:
                break
            continue
        name, place = _command(content, place)
        if name is None:
            break
        inside = (inside or name == b"MULTI") and name != b"EXEC"
        if not inside:
            end = place
    return end


def _command(content: Any, place: int) -> tuple[bytes | None, int]:
    """(the first word of the command at `place`, where the next begins); None where no whole command stands."""
    head = _HEAD.match(content, place)
    if head is None or head[1] != b"*" or not int(head[2]):
        return None, place
    place, first = head.end(), None
    for _ in range(int(head[2])):
        argument = _HEAD.match(content, place)
        if argument is None or argument[1] != b"$":
            return None, place
        start, length = argument.end(), int(argument[2])
        place = start + length + 2
        if content[start + length : place] != b"\r\n":
            return None, place
        if first is None:
            first = bytes(content[start : start + min(length, 20)]).upper()
    return first, place
