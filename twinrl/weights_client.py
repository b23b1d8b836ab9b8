"""Weights for a member outside the cluster, through the gateway: a WeightSource over one authenticated connection.

A thread asks for what is newer than what is at hand, fetches it in pieces, and goes on where it was after a cut, with
the same gateway or with one that was started again. What it gives has been compared with the published checksum.
"""

from __future__ import annotations

import collections
import threading
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from twinrl.core.errors import DeadlineError, RemoteError, TwinRLError, WireError
from twinrl.core.keys import Keys
from twinrl.core.sockets import Client
from twinrl.weights import Weights, make_weights
from twinrl.weights_delta import Rounded, decode, restore

CHUNK = 256 << 10  # bytes asked for at once
IN_FLIGHT = 2  # pieces asked for at a time: one travels while the next one's request does
STALL = 10.0  # s without a piece until it is asked for again
STALLS = 6  # one after the other, then another offer is asked for
POLL = (
    5.0  # s that the gateway may hold an offer back; one that was started again knows nothing of us
)
PAUSE = 0.5  # s after an error
LARGEST = 4 << 30  # bytes of an encoded set


class WeightClient:
    """A WeightSource. `keys` of any role; arrays are the learner's rounded to bf16, as float32."""

    def __init__(self, address: str, keys: Keys, stall: float = STALL) -> None:
        self._client = Client("the gateway", address, keys)
        self._stall = stall
        self._changed = threading.Condition()
        self._fetching = threading.Lock()  # one set at a time: there is one line
        self._rounded: Rounded | None = None  # what differences are made to
        self._newest: Weights | None = None
        self._partial: tuple[str, bytearray, int] = ("", bytearray(), 0)  # etag, blob, bytes there
        self._trouble = ""
        self._counts: collections.Counter = collections.Counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="weights", daemon=True)
        self._thread.start()

    def poll(self, newer_than: int) -> Weights | None:
        """The newest weights above `newer_than` that have arrived."""
        newest = self._newest
        return newest if newest is not None and newest.version > newer_than else None

    def wait(self, newer_than: int, timeout: float) -> Weights:
        """The newest weights above `newer_than`; DeadlineError after `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self.poll(newer_than) is not None, timeout)
        weights = self.poll(newer_than)
        if weights is None:
            there = self._partial[2]
            raise DeadlineError(
                f"waited {timeout:g} s for a policy version above {newer_than} from the gateway at "
                f"{self._client.address}; {there} bytes of one are there. {self._trouble}".strip()
            )
        return weights

    def get(self, version: int) -> Weights:
        """Exactly `version`, one of the last few; TwinRLError when it is gone."""
        with self._fetching:
            newest = self._newest
            if newest is not None and newest.version == version:
                return newest
            return _weights(self._take(self._ask({"exactly": version}, self._stall)))

    def stats(self) -> dict[str, float]:
        """Sets and bytes fetched, and how often a transfer went on after a cut."""
        names = ("snapshots", "differences", "bytes", "resumed", "refused")
        return {f"weights/{name}": float(self._counts[name]) for name in names}

    def close(self) -> None:
        """Hang up."""
        self._stop.set()
        self._client.close()
        self._thread.join(5)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                version = -1 if self._newest is None else self._newest.version
                offer = self._ask({"newer_than": version, "timeout": POLL}, POLL + self._stall)
                if offer:
                    with self._fetching:
                        self._rounded = self._take(offer)
                    with self._changed:
                        self._newest, self._trouble = _weights(self._rounded), ""
                        self._changed.notify_all()
            except TwinRLError as error:
                if isinstance(error, WireError):  # whatever it was, a snapshot mends it
                    self._counts["refused"] += 1
                    self._rounded = None
                self._trouble = str(error)
                self._stop.wait(PAUSE)

    def _ask(self, args: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The gateway's offer, {} for none."""
        have = self._rounded
        if have is not None:
            args = {**args, "have": [have.version, have.checksum]}
        return self._client.call("weights_offer", args, timeout=timeout)[0]

    def _take(self, offer: dict[str, Any]) -> Rounded:
        """Fetch and decode what was offered."""
        try:
            version, base, checksum = (int(offer[key]) for key in ("version", "base", "checksum"))
            etag, size = str(offer["etag"]), int(offer["bytes"])
        except (KeyError, TypeError, ValueError) as error:
            raise WireError(f"malformed offer of weights {offer!r}: {error}") from None
        blob = self._fetch(etag, size)
        self._partial = ("", bytearray(), 0)  # damaged or not, it is not needed again
        rounded = decode(blob, self._rounded)
        if (rounded.version, rounded.checksum) != (version, checksum):
            raise WireError(f"weights of version {rounded.version} came, {version} was offered")
        self._counts["snapshots" if base < 0 else "differences"] += 1
        return rounded

    def _fetch(self, etag: str, size: int) -> bytearray:
        """The encoded set `etag`; goes on where an earlier attempt was cut off."""
        if not 0 <= size <= LARGEST:
            raise WireError(f"the gateway offers {size} bytes of weights; allowed are {LARGEST}")
        if self._partial[0] != etag or len(self._partial[1]) != size:
            self._partial = (etag, bytearray(size), 0)
        elif self._partial[2]:
            self._counts["resumed"] += 1
        blob = self._partial[1]
        stalls = 0
        while self._partial[2] < size:
            before = self._partial[2]
            try:
                self._pieces(etag, blob)
            except DeadlineError:
                stalls = 1 if self._partial[2] > before else stalls + 1
                if stalls >= STALLS:
                    raise
                self._counts["resumed"] += 1
        return blob

    def _pieces(self, etag: str, blob: bytearray) -> None:
        """Ask for what is missing of `blob`, a few pieces ahead; DeadlineError when none comes."""
        asked: collections.deque = collections.deque()  # (offset, future), in order
        following = there = self._partial[2]
        try:
            while there < len(blob):
                while len(asked) < IN_FLIGHT and following < len(blob):
                    args = {"etag": etag, "offset": following, "bytes": CHUNK}
                    asked.append((following, self._client.submit("weights_chunk", args)))
                    following += min(CHUNK, len(blob) - following)
                offset, future = asked[0]
                piece = self._piece(future, offset, min(CHUNK, len(blob) - offset))
                asked.popleft()
                there = offset + len(piece)
                blob[offset:there] = piece
                self._partial = (etag, blob, there)
                self._counts["bytes"] += len(piece)
        finally:
            for _, future in asked:
                self._client.forget(future)

    def _piece(self, future: Any, offset: int, count: int) -> memoryview:
        try:
            result, arrays = future.result(self._stall)
        except FutureTimeout:
            raise DeadlineError(
                f"no piece of weights came from the gateway for {self._stall:g} s"
            ) from None
        data = arrays.get("data")
        if result.get("offset") != offset or data is None or data.nbytes != count:
            raise RemoteError(f"the gateway sent something else than {count} bytes at {offset}")
        return memoryview(data).cast("B")


def _weights(rounded: Rounded) -> Weights:
    return make_weights(rounded.version, restore(rounded))._replace(verified=True)
