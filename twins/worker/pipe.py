"""Messages over the socket that a worker inherits from the process that starts it.

Two threads meet here, one on each side, and nothing else: a call takes a tenth of what it takes through the threads
of a server and a client. The bytes are `twinrl.core.wire`'s frames behind their number and lengths, little endian:
u64 bytes that follow, u64 n, u64 length of each frame, frames.
"""

from __future__ import annotations

import select
import socket
import struct
from typing import Any, Callable, List, Sequence

from twinrl.core.errors import WireError

NUMBER = struct.Struct("<Q")
LOOK_SECONDS = 0.05  # between looks whether it is still worth waiting
MAX_BYTES = 1 << 30  # of one message
AT_ONCE = 256 << 10  # bytes that are joined, to be sent with one call


class Pipe:
    """One end. While it waits it calls `look` again and again, which raises to give up; EOFError: nobody is there."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        end.setblocking(False)
        end.set_inheritable(False)
        self._reading, self._writing = select.poll(), select.poll()
        self._reading.register(end, select.POLLIN)
        self._writing.register(end, select.POLLOUT)

    def send(self, frames: Sequence[Any], look: Callable[[], None]) -> None:
        """Send a message of bytes-like frames."""
        lengths = [len(frame) for frame in frames]
        head = struct.pack(f"<{len(frames) + 1}Q", len(frames), *lengths)
        parts = [NUMBER.pack(len(head) + sum(lengths)), head, *frames]
        if sum(lengths) < AT_ONCE:
            parts = [b"".join(parts)]
        for part in parts:
            left = memoryview(part)
            while len(left):
                try:
                    left = left[self._socket.send(left) :]
                except BlockingIOError:
                    self._wait(self._writing, look)
                except ConnectionError as error:
                    raise EOFError(str(error)) from None

    def wait(self, seconds: float) -> bool:
        """Whether a message begins to arrive within `seconds`."""
        return bool(self._reading.poll(seconds * 1e3))

    def receive(self, look: Callable[[], None]) -> List[memoryview]:
        """The frames of the next message, views of memory of its own."""
        (nbytes,) = NUMBER.unpack(self._read(NUMBER.size, look))
        if not NUMBER.size <= nbytes <= MAX_BYTES:
            raise WireError(f"a message of {nbytes} bytes, allowed {MAX_BYTES}")
        message = memoryview(self._read(nbytes, look))
        (count,) = NUMBER.unpack_from(message)
        at = (count + 1) * NUMBER.size
        if at > nbytes:
            raise WireError(f"{count} frames in {nbytes} bytes")
        frames = []
        for length in struct.unpack_from(f"<{count}Q", message, NUMBER.size):
            frames.append(message[at : at + length])
            at += length
        if at != nbytes:
            raise WireError(f"frames of {at} bytes in a message of {nbytes}")
        return frames

    def close(self) -> None:
        """Close this end; the other one reads EOFError."""
        self._socket.close()

    def _read(self, nbytes: int, look: Callable[[], None]) -> bytearray:
        found = bytearray(nbytes)
        left = memoryview(found)
        while len(left):
            try:
                count = self._socket.recv_into(left)
            except BlockingIOError:
                self._wait(self._reading, look)
                continue
            except ConnectionError as error:
                raise EOFError(str(error)) from None
            if not count:
                raise EOFError("the other end was closed")
            left = left[count:]
        return found

    @staticmethod
    def _wait(poll: Any, look: Callable[[], None]) -> None:
        if not poll.poll(LOOK_SECONDS * 1000):
            look()
