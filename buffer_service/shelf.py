"""The segments that a reader has at hand: mapped, or fetched and kept."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from buffer_service import record
from buffer_service.entry import CUT, Entry
from buffer_service.files import MappedFiles
from buffer_service.gather import belongs
from buffer_service.index import Chosen, Index
from twinrl.core import wire
from twinrl.core.codec import Encoded
from twinrl.core.errors import WireError
from twinrl.core.segment import Segment

MAPPED_COST = 16 << 10  # bytes that a decoded segment in a mapped file takes
Ask = Callable[[str, dict[str, Any], int], tuple[dict[str, Any], wire.Arrays]]


class Shelf:
    """Segments by id, and in the index's `places` where their columns lie. `changed` guards all but the asking."""

    def __init__(
        self,
        index: Index,
        changed: threading.Condition,
        files: MappedFiles | None,
        cache_bytes: int,
        ask: Ask,
        recalls: bool,
    ) -> None:
        """files: of this host, where the service's are here. ask(method, args, bytes of the answer) asks the service.
        recalls: the files are only a cache, and the service can bring segments back into them."""
        self._index, self._changed, self._files = index, changed, files
        self._cache_bytes, self._ask, self._recalls = cache_bytes, ask, recalls
        # Segments that are no views of mapped files, and those with encoded columns; with what they cost.
        self._decoded: collections.OrderedDict[int, tuple[Segment, int]] = collections.OrderedDict()
        self.cached = 0  # bytes of these
        self.fetched = 0  # bytes that came over the network, ever

    @property
    def mapped(self) -> bool:
        """Whether the segment files are mapped rather than fetched."""
        return self._files is not None

    @property
    def keeps_all(self) -> bool:
        """Whether whole segments should be fetched, because all of them fit in, or only rows."""
        return self.mapped or self._index.bytes <= self._cache_bytes

    def load(self, entries: list[Entry]) -> list[Segment | None]:
        """The segments of `entries`, every column an array; None where one was evicted meanwhile."""
        found: dict[int, Segment] = {}
        with self._changed:
            absent = [entry for entry in entries if not self._hold(entry, found)]
        found |= self.fetch(absent)
        with self._changed:
            self.shrink()
        return [
            _closed(found[entry.id].decoded(), entry) if entry.id in found else None
            for entry in entries
        ]

    # -- for a batch, all but `fetch` under the lock -----------------------------------------------------

    def locate(self, chosen: Chosen, held: dict[int, Segment]) -> list[Entry]:
        """See that the places of all chosen segments are known; gives those that must be fetched for it.

        `held` takes the segments that the batch needs as such, because a column is encoded.
        """
        places, absent = self._index.places, []
        wanted = ~places.known[chosen.rows] | places.coded[chosen.rows]
        for row in chosen.rows[wanted].tolist():
            entry = self._index.entry_at(row)
            if places.known[row] or entry.id in self._decoded or not self._map_place(row, entry):
                if not self._hold(entry, held):
                    absent.append(entry)
                elif not places.known[row]:
                    places.put(row, entry, held[entry.id])
        return absent

    def adopt(self, chosen: Chosen, held: dict[int, Segment]) -> bool:
        """Take in the places of fetched segments; False when a chosen one is gone by now."""
        places, index = self._index.places, self._index
        for row, id in zip(chosen.rows.tolist(), chosen.ids.tolist(), strict=True):
            if index.row(id) != row or (not places.known[row] and id not in held):
                return False
            if not places.known[row]:
                places.put(row, index.entries[id], held[id])
        return True

    def keep_alive(self, chosen: Chosen, held: dict[int, Segment]) -> list[Any]:
        """What the chosen segments' memory belongs to."""
        keep: list[Any] = [dict(held)]
        if self._decoded:
            keep += [self._decoded[id] for id in chosen.ids.tolist() if id in self._decoded]
        if self._files is not None:
            for file in np.unique(self._index.file[chosen.rows]).tolist():
                with contextlib.suppress(FileNotFoundError):  # its segments were fetched
                    keep.append(self._files.map(file))
        return keep

    def fetch(self, entries: list[Entry]) -> dict[int, Segment]:
        """Whole segments from the service, which are kept; those that are evicted are dropped."""
        ids, fetched = {entry.id for entry in entries}, {}
        nbytes = sum(entry.length for entry in entries)
        if self._recalls:
            self._recall(ids, fetched)
        while ids:
            answer, records = self._ask("fetch", {"ids": sorted(ids)}, nbytes)
            here = {int(id): record.decode(raw, verify=True) for id, raw in records.items()}
            fetched |= here
            with self._changed:
                self.fetched += sum(len(raw) for raw in records.values())
                for id in answer["missing"]:
                    self.drop(id)
                for id, segment in here.items():
                    if id in self._index.entries:
                        self._keep(id, segment, segment.nbytes)
            ids -= {*answer["missing"], *here}
        return fetched

    def drop(self, id: int) -> None:
        """Forget a segment that the service has no more."""
        self._index.remove(id)
        self._release(id)

    def forget(self, ids: Iterable[int], anew: bool) -> None:
        """Let go of segments that are out of the index. anew: the service is another process than before."""
        for id in ids:
            self._release(id)
        if self._files is None:
            return
        if anew:  # the number of a deleted file may have been given again
            self._files.forget(set())
            self._index.places.known[:] = False
        else:
            self._files.forget(set(self._index.files))

    def shrink(self) -> None:
        """Keep to `cache_bytes`; what a batch holds stays until that is made."""
        while self.cached > self._cache_bytes:
            id, (_, cost) = self._decoded.popitem(last=False)
            self.cached -= cost
            self._index.forget_place(id)

    def _map_place(self, row: int, entry: Entry) -> bool:
        """Learn the places of a segment in a mapped file; False when that is not enough to read it."""
        if self._files is None:
            return False
        try:
            file = self._files.map(entry.file)
            self._index.places.put_record(row, entry, file, entry.offset)
        except (FileNotFoundError, WireError):
            return False
        return not self._index.places.coded[row]

    def _hold(self, entry: Entry, held: dict[int, Segment]) -> bool:
        """Put a segment that is at hand into `held`; False when it must be fetched."""
        if entry.id in self._decoded:
            self._decoded.move_to_end(entry.id)
            held[entry.id] = self._decoded[entry.id][0]
            return True
        if self._files is None:
            return False
        try:
            segment = self._files.segment(entry.file, entry.offset)
        except (FileNotFoundError, WireError):  # evicted, or no longer in this host's files
            return False
        if not belongs(segment.header, entry):
            return False
        held[entry.id] = segment
        if any(isinstance(column, Encoded) for column in segment.columns.values()):
            self._keep(entry.id, segment, MAPPED_COST)
        return True

    def _keep(self, id: int, segment: Segment, cost: int) -> None:
        if id not in self._decoded:
            self._decoded[id] = (segment, cost)
            self.cached += cost

    def _release(self, id: int) -> None:
        _, cost = self._decoded.pop(id, (None, 0))
        self.cached -= cost

    def _recall(self, ids: set[int], held: dict[int, Segment]) -> None:
        """Have the service bring segments back into the files on this host; moves what is at hand then to `held`."""
        asked = sorted(ids)
        while asked:
            answer = self._ask("recall", {"ids": asked}, 0)[0]
            entries = [Entry(*fields) for fields in answer["entries"]]
            with self._changed:
                for id in answer["missing"]:
                    self.drop(id)
                for entry in entries:
                    if entry.id in self._index.entries:
                        self._index.put(entry)
                    if self._hold(entry, held):
                        ids.discard(entry.id)
            ids -= set(answer["missing"])
            done = {*answer["missing"], *(entry.id for entry in entries)}
            asked = [id for id in asked if id not in done]


def _closed(segment: Segment, entry: Entry) -> Segment:
    """The segment with the end that the index gives it: an episode whose writer died is truncated."""
    terminated, truncated = (segment.columns[name] for name in ("terminated", "truncated"))
    if entry.end != CUT or terminated[-1] or truncated[-1]:
        return segment
    truncated = truncated.copy()
    truncated[-1] = True
    truncated.flags.writeable = False
    return Segment({**segment.header, "last": True}, {**segment.columns, "truncated": truncated})
