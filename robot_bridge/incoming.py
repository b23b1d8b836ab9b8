"""What one robot sends to the gateway: segments in pieces, without frames that it has sent with a question before."""

from __future__ import annotations

from typing import Any, NamedTuple

from robot_bridge import parts, recent
from twinrl.core import arguments, wire
from twinrl.core.errors import WireError


class Arrived(NamedTuple):
    """A segment that is whole."""

    header: dict[str, Any]
    codec: Any  # of its frames, as the robot calls it
    columns: wire.Arrays


class Incoming:
    """Puts a robot's segments together. Not thread-safe: its owner locks."""

    def __init__(self) -> None:
        self.recent = recent.Recent()
        self._assembly = parts.Assembly()

    def add(
        self, args: dict[str, Any], arrays: wire.Arrays, writer: str
    ) -> tuple[dict[str, Any], Arrived | None]:
        """Take a piece: what is to be answered, or the segment of `writer` that it has completed.

        WireError for what is no such piece or segment.
        """
        data = arrays.get("data")
        if data is None or data.dtype.str != "|u1" or data.ndim != 1:
            raise WireError("a piece of a segment is data, uint8 (n,)")
        names = ("sequence", "offset", "total")
        sequence, offset, total = (arguments.integer(args, name, low=0) for name in names)
        have = self._assembly.add(sequence, offset, total, args.get("digest"), data.tobytes())
        if have < total:
            return {"offset": have}, None
        what = f"segment {sequence} of {writer}"
        told, columns = wire.unpack(parts.split(self._assembly.take(), what))
        header = arguments.mapping(told, "header")
        if header.get("writer") != writer or header.get("sequence") != sequence:
            raise WireError(
                f"{writer!r} writes its segment {sequence}, not {header.get('writer')!r} "
                f"segment {header.get('sequence')!r}"
            )
        missing = recent.whole(told, columns, self.recent)
        if missing:
            return {"missing": missing}, None
        return {}, Arrived(header, told.get("codec"), columns)

    def forget(self) -> None:
        """The robot has left: its frames need no room."""
        self.recent.clear()
