"""Where segments are kept: what the service asks of a store. `FileStore` and `RedisStore` are its two forms.

The order that makes an acknowledgement a promise: `append` writes the payload (or a writer on the same host wrote
it, and `adopt` takes it in), `commit` makes it as durable as the flush policy says and then puts index entry,
dedupe state and counters into Redis with one transaction. A process that dies in between leaves payload without
an entry, which `recover` indexes from its own header.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from buffer_service.entry import Entry
from buffer_service.redis_address import Redis
from twinrl.core.segment import Segment

FLUSH_POLICIES = ("everysec", "always", "never")
REMOVERS = ("oldest", "lowest_priority")
SCHEMA_CURE = (
    "take the configuration the run was started with, or start a new run with another run.name"
)


class Recovery(NamedTuple):
    """What a start found."""

    segments: int  # in the index now
    reindexed: int  # payloads that had no index entry
    lost: list[Entry]  # index entries whose bytes are gone


class Store(ABC):
    """Segments with their index, in order of insertion.

    `append` and `adopt` are called by one thread, `commit` and `flush` by others; the caller guards the fields
    with a lock.
    """

    entries: dict[int, Entry]  # committed, by id, oldest first
    appended: dict[str, int]  # writer -> highest sequence number taken in
    committed: dict[str, int]  # writer -> highest sequence number that may be acknowledged
    cursors: dict[str, dict[str, int]]  # name -> {"position", "taken", "skipped", ...}
    counters: dict[str, int]  # kept over restarts: inserted and sampled transitions
    priorities: dict[int, float]  # of segments, where the learner set one
    open_episodes: dict[tuple[str, str], int]  # (writer, episode) -> id of its newest segment
    group_bytes: float = float("inf")  # payload that one commit should not exceed

    @abstractmethod
    def recover(self) -> Recovery:
        """Bring index and payload together. Called once, before anything else."""

    @abstractmethod
    def append(self, segment: Segment) -> Entry:
        """Write the payload; not yet visible, not yet to be acknowledged."""

    @abstractmethod
    def allocate(self, writer: str, source: str, nbytes: int) -> tuple[int, int]:
        """A file for a writer on this host to put records of at least `nbytes` into: (number, size)."""

    @abstractmethod
    def written(self, file: int, offset: int, length: int) -> Segment:
        """What a writer put there; Rejected where no whole record lies."""

    @abstractmethod
    def adopt(self, segment: Segment, file: int, offset: int, length: int) -> Entry:
        """`append` for a payload that its writer has written."""

    @abstractmethod
    def placed(self, writer: str, source: str) -> tuple[int, int] | None:
        """The file that was allocated to `writer` for `source` last, and where its content ends."""

    @abstractmethod
    def set_priorities(self, values: dict[int, float]) -> None:
        """Priorities of segments that there are; durable with the next commit."""

    @abstractmethod
    def abandoned(self, writer: str) -> list[Entry]:
        """Entries that close the episodes a dead writer left open."""

    @abstractmethod
    def evictions(self, entries: list[Entry]) -> list[Entry]:
        """Which segments must go when `entries` come in."""

    @abstractmethod
    def moves(self) -> list[Entry]:
        """Entries with the new places of records that were copied so that their old file, mostly dead, can go."""

    @abstractmethod
    def commit(
        self, entries: list[Entry], evicted: list[Entry], changed: Sequence[Entry] = ()
    ) -> None:
        """Make it all durable: payload first, then one transaction. May be repeated after a failure."""

    @abstractmethod
    def publish(
        self, entries: list[Entry], evicted: list[Entry], changed: Sequence[Entry] = ()
    ) -> None:
        """Show in the fields above what was committed."""

    @abstractmethod
    def raw(self, entry: Entry) -> memoryview:
        """The record of a segment. FileNotFoundError when it was evicted."""

    @abstractmethod
    def recall(self, entry: Entry) -> Entry:
        """The entry with its record's place in this host's files (file 0: there is no room). FileNotFoundError: gone."""

    @abstractmethod
    def flush(self) -> None:
        """What `everysec` does every second."""

    def stats(self) -> dict[str, Any]:
        """What this form has to show beside the sizes of all."""
        return {}

    @abstractmethod
    def release(self, writer: str) -> None:
        """The writer is gone: seal its files."""

    @abstractmethod
    def reconnect(self, redis: Redis) -> None:
        """Redis came back, perhaps without its last second: tell it everything again."""

    @abstractmethod
    def close(self) -> None:
        """Leave everything durable."""
