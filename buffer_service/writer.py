"""The writing side: numbers segments, keeps each until it is acknowledged, sends again what was lost.

On the service's host the payload goes into a segment file and only its place over the socket (`direct`).
"""

from __future__ import annotations

import collections
import itertools
import logging
import secrets
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from buffer_service import record
from buffer_service.direct import DirectFiles, Place
from twinrl.core import codec as codecs
from twinrl.core import wire
from twinrl.core.errors import ConfigError, DeadlineError, Rejected, TwinRLError
from twinrl.core.keys import Keys
from twinrl.core.provenance import provenance
from twinrl.core.segment import IMAGE_PREFIX, Schema, Segment, check
from twinrl.core.sockets import Client

log = logging.getLogger(__name__)
PROBE_SECONDS = 1.0  # without progress for so long, ask what arrived
RETRY_SECONDS = 1.0  # pause after the service refused for now (its disk is full)
LIMITED_WINDOW = 4  # segments under way where a rate limiter holds writers back
HELLO_SECONDS = 2.0  # one try of many
WHEN_FULL = ("block", "drop_oldest")
DROPPABLE = "twin"  # what people and robots did is never dropped


def greet(client: Client, args: dict[str, Any], deadline: float) -> dict[str, Any]:
    """The service's answer to `hello`, tried until `deadline` s are over; Rejected says what does not fit."""
    end = time.monotonic() + deadline
    while True:
        try:
            answer, _ = client.call(
                "hello", {"protocol": wire.PROTOCOL, **args}, timeout=min(HELLO_SECONDS, deadline)
            )
            return answer
        except DeadlineError:
            if time.monotonic() >= end:
                raise DeadlineError(
                    f"no replay service answered at {client.address} within {deadline:g} s: is it running, "
                    "and is the key of this run?"
                ) from None


class _Item:
    """A segment on its way."""

    def __init__(self, sequence: int, segment: Segment) -> None:
        self.sequence, self.segment, self.nbytes = sequence, segment, segment.nbytes
        self.future: Future | None = None
        self.record: tuple[list[Any], int] | None = None  # encoded for a file
        self.place: Place | None = None
        self.sent = False  # ever

    @property
    def source(self) -> str:
        return self.segment.header["source"]

    def encode(self, codec: str) -> None:
        """Encode what images are not yet."""
        images = {
            name: codecs.encode(column, codec)
            for name, column in self.segment.columns.items()
            if name.startswith(IMAGE_PREFIX) and not isinstance(column, codecs.Encoded)
        }
        if images:
            self.segment = self.segment._replace(columns={**self.segment.columns, **images})

    def renumber(self, sequence: int) -> None:
        """Only before it is sent: (writer, sequence) names the segment for ever."""
        self.sequence, self.record, self.place = sequence, None, None
        self.segment = self.segment._replace(header={**self.segment.header, "sequence": sequence})


class Writer:
    """Sends one stream of segments, each exactly once and in order, whatever happens to the service.

    Thread-safe. The arrays given to `write` must not change until they are acknowledged: they are not copied.
    """

    def __init__(
        self,
        address: str,
        keys: Keys,
        writer: str,
        *,
        schema: Schema,
        window: int = 128,
        window_bytes: int = 32 << 20,
        queue_bytes: int = 256 << 20,
        deadline: float = 30.0,
        codec: str = "raw",
        when_full: str = "block",
        direct: bool = True,
    ) -> None:
        """`writer`: a name that no other process writes under. At most `window` segments of together
        `window_bytes` are under way and `queue_bytes` unacknowledged; `deadline` (s) bounds the greeting, `write` and `flush`.

        codec: of camera images, one of `twinrl.core.codec.CODECS`. when_full: what `write` does when the queue
        is full: "block", or "drop_oldest" twin segments that were not sent yet. direct: write into the service's
        files where they are on this host.
        """
        if when_full not in WHEN_FULL:
            raise ConfigError(f"when_full is {when_full!r}, must be one of {', '.join(WHEN_FULL)}")
        self.writer, self.schema, self.deadline = writer, schema, deadline
        self.codec = codecs.check_codec(codec)
        self._window, self._window_bytes = window, window_bytes
        self._queue_bytes, self._when_full = queue_bytes, when_full
        self._client = Client("replay", address, keys, timeout=deadline)
        self._session = secrets.token_hex(8)
        self._hello = {"digest": schema.digest(), "writer": writer, "session": self._session}
        try:
            answer = greet(self._client, self._hello, deadline)
        except BaseException:
            self._client.close()
            raise
        self._keepalive = answer["lease"] / 4  # s
        if answer["limited"]:  # what is under way goes beyond the limiter's bound
            self._window = min(self._window, LIMITED_WINDOW)
        self._files: DirectFiles | None = None
        if direct and DirectFiles.possible(answer["folder"], answer["token"]):
            self._files = DirectFiles(Path(answer["folder"]))
        self._next = answer["appended"] + 1
        self._queue: collections.deque[_Item] = collections.deque()  # oldest first
        self._sent = 0  # so many at its left are under way
        self._turn = 0  # raised when something must be sent again
        self._queued_bytes = 0
        self._held = ""  # why the limiter holds us
        self._trouble = ""  # what the service said last when it could not
        self._failure: TwinRLError | None = None
        self._probe: Any = None  # a Future with `since`
        self._probed_to = -1  # the last number sent before it
        self._permit: Any = None
        self._allocation: Any = None
        self._stale = False  # the service takes no more records from the files we have
        self._retry_at = self._progress = self._spoke = time.monotonic()
        self._counts: collections.Counter[str] = collections.Counter()
        self._blocked = 0.0
        self._stop = False
        self._changed = threading.Condition(threading.RLock())
        self._thread = threading.Thread(target=self._run, name=f"writer {writer}", daemon=True)
        self._thread.start()

    @property
    def direct(self) -> bool:
        """Whether payloads go into the service's files rather than over the socket."""
        return self._files is not None

    def write(
        self, header: dict[str, Any], columns: wire.Arrays, deadline: float | None = None
    ) -> int:
        """Queue a segment (header without writer and sequence); returns its number.

        Blocks while the queue is full; DeadlineError after `deadline` s, and then the segment was not taken.
        """
        header = {"provenance": provenance(), **header, "writer": self.writer, "sequence": 0}
        segment = Segment(header, columns)
        check(segment, self.schema)
        size = segment.nbytes
        with self._changed:
            if self._when_full == "drop_oldest":
                self._make_room(size)
            self._wait(
                lambda: not self._queue or self._queued_bytes + size <= self._queue_bytes,
                deadline,
                "room in the queue",
            )
            item = _Item(self._next, segment)
            item.renumber(self._next)
            if not self._queue:
                self._progress = time.monotonic()
            self._next += 1
            self._queue.append(item)
            self._queued_bytes += size
            self._changed.notify_all()
            return item.sequence

    def _make_room(self, size: int) -> None:
        """Drop the oldest twin segments that are not under way; those behind them move up in number."""
        kept = list(self._queue)
        # The one after those under way may be on its way into a file; one that was ever sent keeps its number.
        places = [
            n
            for n in range(self._sent + 1, len(kept))
            if kept[n].source == DROPPABLE and not kept[n].sent
        ]
        excess, dropped = self._queued_bytes + size - self._queue_bytes, set()
        for place in places:
            if excess <= 0:
                break
            dropped.add(place)
            excess -= kept[place].nbytes
        if not dropped:
            return
        self._queued_bytes -= sum(kept[place].nbytes for place in dropped)
        self._counts["dropped"] += len(dropped)
        kept = [item for place, item in enumerate(kept) if place not in dropped]
        for before, item in zip(kept[self._sent :], kept[self._sent + 1 :], strict=False):
            if item.sequence != before.sequence + 1:
                item.renumber(before.sequence + 1)
        self._next = kept[-1].sequence + 1
        self._queue = collections.deque(kept)

    def flush(self, deadline: float | None = None) -> None:
        """Wait until everything written is acknowledged; DeadlineError says what is not, and why."""
        with self._changed:
            self._wait(lambda: not self._queue, deadline, "acknowledgements")

    def stats(self) -> dict[str, Any]:
        """What is queued, done and waited for."""
        with self._changed:
            return {
                "writer/queued_segments": len(self._queue),
                "writer/queued_bytes": self._queued_bytes,
                "writer/acknowledged": self._counts["acknowledged"],
                "writer/resent": self._counts["resent"],
                "writer/dropped": self._counts["dropped"],
                "writer/direct": self.direct,
                "writer/blocked_s": self._blocked,
                "writer/waiting_for": self._reason() if self._queue else "",
            }

    def close(self, deadline: float | None = None) -> None:
        """Flush and close. DeadlineError when something stays unacknowledged, which is lost then."""
        try:
            if not self._stop:
                self.flush(deadline)
        finally:
            with self._changed:
                self._stop = True
                self._changed.notify_all()
            self._client.close()
            self._thread.join(5)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.close(None if kind is None else 0.0)

    def _wait(self, condition: Any, deadline: float | None, what: str) -> None:
        deadline = self.deadline if deadline is None else deadline
        since = time.monotonic()
        while True:
            if self._failure is not None:
                raise self._failure
            if condition():
                break
            left = since + deadline - time.monotonic()
            if left <= 0 or self._stop:
                raise DeadlineError(
                    f"writer {self.writer!r} waited {deadline:g} s for {what}: {len(self._queue)} segments "
                    f"({self._queued_bytes} bytes) are not acknowledged; {self._reason()}"
                )
            self._changed.wait(left)
        self._blocked += time.monotonic() - since

    def _reason(self) -> str:
        if self._failure is not None:
            return str(self._failure)
        silent = time.monotonic() - self._progress
        if self._held:
            return self._held
        if self._trouble:
            return self._trouble
        return f"replay at {self._client.address} acknowledged nothing for {silent:.1f} s"

    def _run(self) -> None:
        try:
            self._pump()
        except Exception as error:  # else callers would wait for a thread that is no more
            log.exception("writer %s cannot go on", self.writer)
            with self._changed:
                self._failure = TwinRLError(f"writer {self.writer!r} failed: {error!r}")
                self._changed.notify_all()
        finally:
            if self._files is not None:
                self._files.forget()

    def _pump(self) -> None:
        while True:
            with self._changed:
                if self._stop:
                    break
                item, turn = self._due(), self._turn
                if item is None:
                    self._changed.wait(0.2 if self._queue else self._keepalive / 2)
                    continue
            # Without the lock: callers go on queueing while the bytes are encoded and copied.
            if self.codec != "raw":
                item.encode(self.codec)
            if self._files is not None and item.place is None:
                ready = self._put(self._files, item)
            else:
                ready = True
            with self._changed:
                current = turn == self._turn and self._sent < len(self._queue)
                if ready and current and self._queue[self._sent] is item:
                    self._send(item)

    def _due(self) -> _Item | None:
        """The segment to be sent now; keeps in touch with the service on the way."""
        now = time.monotonic()
        if (
            self._sent and now - self._progress > PROBE_SECONDS
        ) or now - self._spoke > self._keepalive:
            self._ask(now)
        if now < self._retry_at or not self._may_send():
            return None
        return self._queue[self._sent]

    def _put(self, files: DirectFiles, item: _Item) -> bool:
        """Write an item's record into its file; False when there is none yet, or no room on the disk."""
        if item.record is None:
            item.record = record.encode(*item.segment)
        buffers, length = item.record
        if self._stale:
            self._stale = False
            files.forget()
        try:
            if not files.has_room(item.source, length):
                self._allocate(files, item.source, length)
                return False
            item.place = files.put(item.source, buffers, length)
            return True
        except OSError as error:
            with self._changed:
                self._trouble = f"its files cannot be written: {error}; make room there"
                self._retry_at = time.monotonic() + RETRY_SECONDS
            return False

    def _allocate(self, files: DirectFiles, source: str, length: int) -> None:
        """Ask for a file; what comes back is opened by the writer's thread."""
        with self._changed:
            asked = self._allocation
            if asked is None or time.monotonic() - asked.since > 2 * PROBE_SECONDS:
                if asked is not None:
                    self._client.forget(asked)
                args = {"writer": self.writer, "session": self._session}
                args |= {"source": source, "bytes": length}
                self._allocation = self._submit("allocate", args, None, lambda future: None)
            elif asked.done():
                self._allocation = None
                if self._failed(asked):
                    self._retry_at = time.monotonic() + RETRY_SECONDS
                    self._changed.notify_all()  # whoever flushes need not wait for his deadline
                    return
                answer, _ = asked.result()
                files.use(source, answer["file"], answer["size"])
                return
            self._changed.wait(0.2)

    def _may_send(self) -> bool:
        if self._sent >= min(len(self._queue), self._window) or self._failure is not None:
            return False
        under_way = sum(item.nbytes for item in itertools.islice(self._queue, self._sent))
        if under_way >= self._window_bytes:
            return False
        if not self._held or self._queue[self._sent].segment.header["source"] != "twin":
            return True
        if self._permit is None:
            args = {"wait": 1.0, "who": f"writer {self.writer}"}
            self._permit = self._submit("permit", args, None, self._permitted)
        elif time.monotonic() - self._permit.since > 10:
            self._client.forget(self._permit)
            self._permit = None
        return False

    def _send(self, item: _Item) -> None:
        args: dict[str, Any] = {"oldest": self._queue[0].sequence, "session": self._session}
        columns = None
        if item.place is None:
            method, columns = "insert", item.segment.columns
            args["header"] = item.segment.header
        else:
            method = "insert_file"
            args |= {"writer": self.writer, "sequence": item.sequence, "source": item.source}
            args |= item.place._asdict()
        item.sent = True
        self._sent += 1  # first: the answer may be there before `submit` returns
        item.future = self._submit(
            method, args, columns, lambda future: self._answered(item, future)
        )

    def _ask(self, now: float) -> None:
        """Ask what arrived. Requests of one connection are served in order, so the answer is exact."""
        if self._probe is not None:
            if now - self._probe.since < 2 * PROBE_SECONDS:
                return
            self._client.forget(self._probe)
        self._probed_to = self._queue[self._sent - 1].sequence if self._sent else -1
        args = {**self._hello, "protocol": wire.PROTOCOL, "probe": True}
        self._probe = self._submit("hello", args, None, self._probed)

    def _submit(self, method: str, args: dict, arrays: Any, done: Any) -> Any:
        future: Any = self._client.submit(method, args, arrays)
        future.since = self._spoke = time.monotonic()

        def guarded(finished: Any) -> None:
            with self._changed:
                if not self._stop:
                    done(finished)
                    self._changed.notify_all()

        # In the client's thread; should the answer be there already, in this one, which holds the lock.
        future.add_done_callback(guarded)
        return future

    def _answered(self, item: _Item, future: Future) -> None:
        if item.future is not None and item.future is not future:
            return  # sent again meanwhile
        if self._failed(future):
            if self._failure is None:
                self._retry_at = time.monotonic() + RETRY_SECONDS
                self._resend_from(item.sequence)
            return
        result, _ = future.result()
        self._trouble = ""
        if result.get("refused"):
            if result.get(
                "anew"
            ):  # the service was away, or took us for dead: our files are sealed
                self._place_anew()
            self._resend_from(result["expected"])
            return
        self._acknowledge(result["acknowledged"])
        self._held = self._held or ("the limiter holds inserts" if result["hold"] else "")

    def _probed(self, future: Future) -> None:
        if future is not self._probe or self._failed(future):
            return
        self._probe = None
        result, _ = future.result()
        self._acknowledge(result["committed"])
        self._progress = time.monotonic()
        # What was sent after the probe may be on its way still.
        if result["appended"] < self._probed_to:
            self._resend_from(result["appended"] + 1)

    def _permitted(self, future: Future) -> None:
        self._permit = None
        if not self._failed(future):
            result, _ = future.result()
            self._held = result["reason"]

    def _failed(self, future: Future) -> bool:
        error = future.exception()
        if isinstance(error, Rejected):
            self._failure = error
        elif error is not None:
            self._trouble = str(error)
        return error is not None

    def _acknowledge(self, sequence: int) -> None:
        while self._queue and self._queue[0].sequence <= sequence:
            item = self._queue.popleft()
            self._queued_bytes -= item.nbytes
            self._sent = max(self._sent - 1, 0)
            self._counts["acknowledged"] += 1
            self._progress = time.monotonic()

    def _place_anew(self) -> None:
        for item in self._queue:
            item.place = None
        self._stale = True

    def _resend_from(self, sequence: int) -> None:
        """Take everything from `sequence` on as not sent."""
        self._turn += 1
        for place, item in enumerate(self._queue):
            if place >= self._sent:
                break
            if item.sequence >= sequence:
                for again in list(self._queue)[place : self._sent]:
                    if again.future is not None:
                        self._client.forget(again.future)
                        again.future = None
                    self._counts["resent"] += 1
                self._sent = place
                break
