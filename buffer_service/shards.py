"""Several replay services seen as one: how they are numbered, which there are, and a connection to each.

Services have numbers: 0 is the first, which keeps the list of the others (`shard_list`). A service numbers its
segments by itself, so elsewhere a segment's id is its number there with the service's number in the bits above:
what the first service holds has the same id with and without others.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from twinrl.core.errors import DeadlineError, Rejected, TwinRLError
from twinrl.core.keys import Keys
from twinrl.core.sockets import Client

log = logging.getLogger(__name__)
MAX_SHARDS = 64
ID_BITS = 36  # of a segment's number in its service; leaves room for 20 more in an int64
ASK_SECONDS = 2.0  # between two questions for new services
CONNECT_SECONDS = 5.0  # for one try to reach a service
AGAIN_SECONDS = 1.0  # between two tries
TICK_SECONDS = 0.5
_LOCAL = (1 << ID_BITS) - 1

Ids = TypeVar("Ids", int, np.ndarray)


def join_id(shard: int, id: Ids) -> Ids:
    """The id, among several services, of a segment with number `id` in service `shard`."""
    return id + (shard << ID_BITS)


def split_id(id: Ids) -> tuple[Ids, Ids]:
    """(service, number of the segment there)."""
    return id >> ID_BITS, id & _LOCAL


class Connection(Protocol):
    """A Writer or a Reader."""

    def close(self) -> None:
        """Hang up."""


Each = TypeVar("Each", bound=Connection)


class Links(Generic[Each]):
    """A connection to each service, made in the background as soon as it can be reached, and then kept.

    The first service is asked every two seconds for new ones.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        keys: Keys,
        make: Callable[[int, str], Each],
        tick: Callable[[], None],
        deadline: float,
        changed: threading.Condition | None = None,
    ) -> None:
        """Returns once every service is connected, or some are and the others did not answer for
        `CONNECT_SECONDS`; DeadlineError, or Rejected, when there is none after `deadline` s.

        addresses: of the services that are known, the first one first. make(number, address) connects; it may
        raise. tick() is called twice a second. changed: notified when a connection was made.
        """
        self.connected: dict[int, Each] = {}  # replaced, never changed: may be read by any thread
        self.addresses: dict[int, str] = {}
        self._trouble: dict[int, str] = {}  # of those that are not connected
        self._make, self._tick = make, tick
        self._rejected: Rejected | None = None
        self._stop = threading.Event()
        self._changed = changed or threading.Condition()
        self._client = Client("replay", addresses[0], keys, timeout=CONNECT_SECONDS)
        self._add(addresses)
        self._asker = threading.Thread(target=self._ask_for_ever, name="shards", daemon=True)
        self._asker.start()
        try:
            self._wait(deadline)
        except BaseException:
            self.close()
            raise

    def missing(self) -> dict[int, str]:
        """The services that were never reached, with the reason."""
        connected, trouble = self.connected, self._trouble
        missing = [number for number in self.addresses if number not in connected]
        return {number: trouble.get(number, "not reached yet") for number in missing}

    def close(self) -> dict[int, Each]:
        """Make and seek no more connections; gives those there are, which the caller closes."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        if threading.current_thread() is not self._asker:
            self._asker.join(CONNECT_SECONDS)
        self._client.close()
        return self.connected

    def _wait(self, deadline: float) -> None:
        begin = time.monotonic()

        def settled() -> bool:
            waited = time.monotonic() - begin
            if self.connected:
                return len(self.connected) == len(self.addresses) or waited >= CONNECT_SECONDS
            return self._rejected is not None or waited >= deadline

        with self._changed:
            while not settled():
                self._changed.wait(0.1)
            if self.connected:
                return
            if self._rejected is not None:
                raise self._rejected
            raise DeadlineError(
                f"no replay service answered within {deadline:g} s: "
                + "; ".join(f"shard {number}: {text}" for number, text in self.missing().items())
            )

    def _add(self, addresses: Sequence[str]) -> None:
        for number, address in enumerate(addresses[:MAX_SHARDS]):
            if number in self.addresses:
                continue
            self.addresses = {**self.addresses, number: address}
            thread = threading.Thread(
                target=self._connect, args=(number, address), name=f"shard {number}", daemon=True
            )
            thread.start()

    def _connect(self, number: int, address: str) -> None:
        """Until it is done."""
        while not self._stop.is_set():
            try:
                made = self._make(number, address)
            except (TwinRLError, OSError) as error:
                with self._changed:
                    if str(error) != self._trouble.get(number):
                        log.warning("shard %d at %s: %s", number, address, error)
                    self._trouble[number] = str(error)
                    if isinstance(error, Rejected):
                        self._rejected = error
                self._stop.wait(AGAIN_SECONDS)
                continue
            with self._changed:
                if not self._stop.is_set():
                    self.connected = dict(sorted({**self.connected, number: made}.items()))
                    self._trouble.pop(number, None)
                    self._changed.notify_all()
                    return
            with contextlib.suppress(TwinRLError):
                made.close()

    def _ask_for_ever(self) -> None:
        asked = -ASK_SECONDS
        while not self._stop.is_set():
            if time.monotonic() - asked >= ASK_SECONDS:
                asked = time.monotonic()
                with contextlib.suppress(TwinRLError):  # away: those that are known go on
                    answer: dict[str, Any] = self._client.call("shards", timeout=ASK_SECONDS)[0]
                    self._add([self._client.address, *answer["addresses"]])
            try:
                self._tick()
            except Exception:  # must not end the search for services
                log.exception("looking after the shards failed")
            self._stop.wait(TICK_SECONDS)
