"""Weights for members outside the cluster: offered, encoded once for all that need the same, sent in pieces.

The gateway reads the newest version where the cluster's actors do, in shared memory (twinrl.weights_slots): the
learner does nothing for outside members, and nothing is encoded unless one asks. Methods:

    weights_offer  {newer_than, exactly, have: [version, checksum], timeout}     long poll
                   -> {version, base, checksum, etag, bytes}, or {} when nothing newer came
    weights_chunk  {etag, offset, bytes}  -> {offset} + data (n,) uint8
"""

from __future__ import annotations

import collections
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Tuple

import numpy as np

from twinrl.core.arguments import seconds
from twinrl.core.errors import Rejected
from twinrl.weights_delta import FORMAT, Rounded, encode, round_weights, smallest
from twinrl.weights_slots import SlotReader

GONE = "weights are gone: "  # how a Rejected begins after which a member asks for another offer
BASES = 4  # newest sets that are kept to make differences to
BLOBS = 8  # encoded sets that are kept, the last offered, for members that are fetching them
LARGEST_CHUNK = 1 << 20  # bytes; more would hold up what else goes over the member's connection
LONGEST_POLL = 30.0  # s
MAX_WAITING = 1000  # offers


class _Asked(NamedTuple):
    """A member's question."""

    newer_than: int
    exactly: int | None
    have: Tuple[int, int]  # version and checksum, (-1, 0) for none
    until: float
    answer: Future


class WeightsRelay:
    """Thread-safe; reading and encoding happen in a thread of its own."""

    def __init__(self, folder: Path, bases: int = BASES, blobs: int = BLOBS) -> None:
        self._slots = SlotReader(folder)
        self._bases, self._blobs = bases, blobs
        self._sets: dict[int, Rounded] = {}
        self._offers: collections.OrderedDict = collections.OrderedDict()  # by (version, base)
        self._encoded: dict[str, bytes] = {}  # by etag
        self._waiting: list[_Asked] = []
        self._lock = threading.Lock()
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._counts: collections.Counter = collections.Counter()

    def newest(self) -> int:
        """The newest version that the learner has published, -1 for none."""
        return self._slots.newest()

    def offer(self, args: dict[str, Any]) -> Future:
        """What a member should fetch; the Future gives the answer."""
        asked = _Asked(
            newer_than=_number(args, "newer_than", -1),
            exactly=None if args.get("exactly") is None else _number(args, "exactly"),
            have=_have(args.get("have")),
            until=time.monotonic() + seconds(args, "timeout", 0.0, LONGEST_POLL),
            answer=Future(),
        )
        if asked.exactly is not None or self._slots.newest() > asked.newer_than:
            self._submit(asked)
            return asked.answer
        with self._lock:
            if len(self._waiting) >= MAX_WAITING:
                raise Rejected(f"{MAX_WAITING} members wait for weights already")
            self._waiting.append(asked)
        return asked.answer

    def chunk(self, args: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """A piece of an encoded set."""
        etag, offset, count = args.get("etag"), _number(args, "offset"), _number(args, "bytes")
        with self._lock:
            blob = self._encoded.get(str(etag))
            if blob is None:
                raise Rejected(f"{GONE}{etag!r} is not kept here")
        if not 0 <= offset <= len(blob) or count < 1:
            raise Rejected(f"{count} bytes at {offset} are none of {etag!r}, which has {len(blob)}")
        piece = blob[offset : offset + min(count, LARGEST_CHUNK)]
        self._counts["bytes"] += len(piece)
        return {"offset": offset}, {"data": np.frombuffer(piece, np.uint8)}

    def tick(self) -> None:
        """Answer those who waited for a version that is there now, or long enough."""
        now, newest = time.monotonic(), self._slots.newest()
        with self._lock:
            due = [w for w in self._waiting if newest > w.newer_than or now > w.until]
            self._waiting = [w for w in self._waiting if w not in due] if due else self._waiting
        for asked in due:
            if newest > asked.newer_than:
                self._submit(asked)
            else:
                asked.answer.set_result({})

    def stats(self) -> dict[str, float]:
        """Snapshots and differences that were offered, and bytes that were sent."""
        return {f"weights_{name}": float(count) for name, count in dict(self._counts).items()}

    def close(self) -> None:
        """Members ask whoever serves next."""
        self._encoder.shutdown(wait=True)

    def _submit(self, asked: _Asked) -> None:
        def finish(done: Future) -> None:
            if done.exception() is not None:
                asked.answer.set_exception(done.exception())
            else:
                asked.answer.set_result(done.result())

        self._encoder.submit(self._make, asked).add_done_callback(finish)

    def _make(self, asked: _Asked) -> dict[str, Any]:
        exactly = asked.exactly
        version = self._slots.newest() if exactly is None else exactly
        new = self._set(version) if version >= 0 else None
        if new is None and exactly is not None:
            raise Rejected(f"{GONE}policy version {version}; there are {self._slots.versions()}")
        if new is None or (exactly is None and version <= asked.newer_than):
            return {}
        base = self._base(asked.have, new)
        key = (version, -1 if base is None else base.version)
        found = self._offers.get(key)
        if found is None:
            blob, used = smallest(new, base, lambda: self._snapshot(new))
            self._counts["snapshots" if used < 0 else "differences"] += 1
            # The checksum in its name keeps version 7 of two runs apart.
            etag = f"{version}-{used}-{FORMAT}-{new.checksum:016x}"
            found = {"version": version, "base": used, "checksum": new.checksum}
            found.update(etag=etag, bytes=len(blob))
            with self._lock:
                self._encoded[etag] = blob
        with self._lock:
            self._offers[key] = found
            self._offers.move_to_end(key)
            while len(self._offers) > self._blobs:
                self._offers.popitem(last=False)
            kept = {offer["etag"] for offer in self._offers.values()}
            self._encoded = {etag: blob for etag, blob in self._encoded.items() if etag in kept}
        return found

    def _set(self, version: int) -> Rounded | None:
        """A version, rounded; None when it is gone. The newest few stay at hand as bases."""
        if version in self._sets:
            return self._sets[version]
        weights = self._slots.open(version)
        if weights is None:
            return None
        rounded = self._sets[version] = round_weights(version, weights.arrays)
        while len(self._sets) > self._bases + 1:
            del self._sets[min(self._sets)]
        return rounded

    def _base(self, have: Tuple[int, int], new: Rounded) -> Rounded | None:
        """The set that a member says it has, if this is the one we know."""
        version, checksum = have
        base = self._set(version) if 0 <= version != new.version else None
        return base if base is not None and base.checksum == checksum else None

    def _snapshot(self, new: Rounded) -> bytes:
        offered = self._offers.get((new.version, -1))
        return self._encoded[offered["etag"]] if offered else encode(new)


def _number(args: dict[str, Any], name: str, default: Any = None, kind: Any = int) -> Any:
    value = args.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        raise Rejected(f"{name!r} of a request for weights is a number, not {value!r}")
    return kind(value)


def _have(value: Any) -> tuple[int, int]:
    if value is None:
        return -1, 0
    if not isinstance(value, list) or [type(v) for v in value] != [int, int]:
        raise Rejected(f"'have' of a request for weights is [version, checksum], not {value!r}")
    return value[0], value[1]
