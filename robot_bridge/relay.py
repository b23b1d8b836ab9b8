"""Carries segments from robots to the replay service and its acknowledgements back, unchanged."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from robot_bridge import frames
from twinrl.core.errors import DeadlineError
from twinrl.core.keys import Keys
from twinrl.core.segment import Schema, Segment, check
from twinrl.core.sockets import Client
from twinrl.core.wire import Arrays

SECONDS = 25.0  # for the service's acknowledgement; then the robot sends again


class Relay:
    """A thread of its own looks through the frames, which are stored as they came: no observation waits behind it."""

    def __init__(self, address: str, keys: Keys, schema: Schema) -> None:
        self._client = Client("the replay service", address, keys)
        self._schema = schema
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="decoder")
        self._open: dict[
            Future, tuple[Future, float]
        ] = {}  # the service's: (the robot's, deadline)
        self.relayed = self.failed = 0

    def send(self, header: dict[str, Any], codec: Any, arrays: Arrays) -> Future:
        """The Future gives the service's answer, or its refusal."""
        answer: Future = Future()
        self._decoder.submit(self._send, answer, header, codec, arrays)
        return answer

    def tick(self) -> None:
        """Give up on acknowledgements that do not come."""
        now = time.monotonic()
        for theirs, (answer, deadline) in list(self._open.items()):
            if deadline < now and self._open.pop(theirs, None):
                self._client.forget(theirs)
                self.failed += 1
                text = f"the replay service did not acknowledge within {SECONDS:g} s"
                answer.set_exception(DeadlineError(text))

    def stats(self) -> dict[str, float]:
        """Segments by what became of them."""
        counts = {
            "relayed": self.relayed,
            "relay_failed": self.failed,
            "relays_open": len(self._open),
        }
        return {name: float(count) for name, count in counts.items()}

    def close(self) -> None:
        """Hang up; robots send what was not acknowledged to the next gateway."""
        self._decoder.shutdown(wait=True)
        self._client.close()

    def _send(self, answer: Future, header: Any, codec: Any, arrays: Arrays) -> None:
        try:
            frames.check(arrays, codec, self._schema.image_size)
            check(Segment(header, arrays), self._schema)
            theirs = self._client.submit("insert", {"header": header}, arrays)
        except Exception as error:
            self.failed += 1
            answer.set_exception(error)
            return
        self._open[theirs] = (answer, time.monotonic() + SECONDS)
        theirs.add_done_callback(self._answer)

    def _answer(self, theirs: Future) -> None:
        answer, _ = self._open.pop(theirs, (None, 0.0))
        if answer is None:
            return  # the deadline was faster; the robot sends again and the service drops the repeat
        if theirs.exception() is not None:
            self.failed += 1
            answer.set_exception(theirs.exception())
        else:
            self.relayed += 1
            answer.set_result(theirs.result()[0])
