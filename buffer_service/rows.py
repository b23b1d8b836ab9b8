"""Batches for readers on other hosts: the service gathers the rows and sends nothing else.

A window of a 50-step segment is a fiftieth of it, so a reader that cannot keep all segments asks for rows.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from buffer_service import record
from buffer_service.entry import OPEN, Entry
from buffer_service.gather import Batch, Places, gather, row_bytes
from buffer_service.sampler import windows_at
from twinrl.core import wire
from twinrl.core.arguments import integer, text
from twinrl.core.codec import CODECS, encode
from twinrl.core.errors import WireError
from twinrl.core.segment import IMAGE_PREFIX, Schema

MAX_CHUNK = 4096
MAX_BATCH_BYTES = 448 << 20  # of one answer; a message holds 512 MiB
Wanted = tuple[int, int, int, int]  # segment, first step, steps, the segment it goes on in or 0


def wanted(args: dict[str, Any], schema: Schema) -> tuple[list[Wanted], int]:
    """The windows that a request asks for, and its chunk C; WireError when they make no sense."""
    chunk = integer(args, "chunk", low=1, high=MAX_CHUNK)
    windows = args.get("windows")
    if not isinstance(windows, list) or not windows:
        raise WireError("the request lacks 'windows', a list of [segment, start, length, second]")
    row = row_bytes(schema, chunk)
    if len(windows) * row > MAX_BATCH_BYTES:
        raise WireError(
            f"{len(windows)} windows of {row} bytes, at most {MAX_BATCH_BYTES // row} in one answer"
        )
    for window in windows:
        if not isinstance(window, list) or [type(each) for each in window] != [int] * 4:
            raise WireError(f"{window!r:.80} is no window [segment, start, length, second]")
        id, start, length, second = window
        if id < 1 or second < 0:
            raise WireError(f"segment {min(id, second)} cannot be; the first has number 1")
        if start < 0 or not 1 <= length <= chunk:
            raise WireError(f"a window of {length} steps from {start} on, 1 to {chunk} are allowed")
    return [tuple(window) for window in windows], chunk


def row_codec(args: dict[str, Any]) -> str:
    """The codec in which a request wants the images of its batch; WireError if there is none of that name."""
    codec = text(args, "codec", "raw", longest=40)
    if codec not in CODECS:
        raise WireError(f"codec {codec!r} is none of {', '.join(CODECS)}")
    return codec


class RowGatherer:
    """Makes batches from records in a thread of its own, so that the service goes on meanwhile."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rows")

    def submit(
        self,
        windows: list[Wanted],
        chunk: int,
        entries: dict[int, Entry],
        records: dict[int, Any],
        codec: str = "raw",
    ) -> Future:
        """A Future of the answer: ({"missing": [], "instructions"}, columns); `instruction` (B,) int32 in these.

        records: bytes-like, by segment, of all that `windows` name. codec: of the image columns in the answer.
        """
        return self._pool.submit(self._gather, windows, chunk, entries, records, codec)

    def close(self) -> None:
        """Gather nothing more."""
        self._pool.shutdown(cancel_futures=True)

    def _gather(
        self,
        windows: list[Wanted],
        chunk: int,
        entries: dict[int, Entry],
        records: dict[int, Any],
        codec: str,
    ) -> tuple[dict[str, Any], wire.Arrays]:
        batch, instructions = gather_from(windows, chunk, self._schema, entries, records)
        columns: wire.Arrays = dict(batch)
        if codec != "raw":
            for name in columns:
                if IMAGE_PREFIX in name:
                    columns[name] = encode(batch[name], codec)
        return {"missing": [], "instructions": instructions}, columns


def gather_from(
    windows: list[Wanted],
    chunk: int,
    schema: Schema,
    entries: dict[int, Entry],
    records: dict[int, Any],
) -> tuple[Batch, list[str]]:
    """The batch of `windows` (see `gather.gather`) and the instructions that its `instruction` counts in.

    WireError for a window that its segments do not have.
    """
    rows = {id: row for row, id in enumerate(entries)}
    places = Places(schema, len(entries))
    for id, row in rows.items():
        places.put_record(row, entries[id], records[id], 0)
    coded = {id: record.decode(records[id]) for id, row in rows.items() if places.coded[row]}
    for window in windows:
        _check(window, entries, chunk)
    ids, starts, lengths, seconds = zip(*windows, strict=True)
    found = windows_at(
        [entries[id] for id in ids], [entries.get(id) for id in seconds], starts, lengths
    )
    first = np.array([rows[id] for id in ids])
    second = np.array(
        [rows.get(id, rows[first_id]) for first_id, id in zip(ids, seconds, strict=True)]
    )
    addresses = places.addresses
    batch = gather(found, places.fields, addresses[first], addresses[second], chunk, coded=coded)
    batch["instruction"] = places.instruction[first]
    return batch, places.instructions


def _check(window: Wanted, entries: dict[int, Entry], chunk: int) -> None:
    id, start, length, second = window
    entry, following = entries[id], entries.get(second)
    reach = entry.steps
    if following is not None:
        follows = (
            entry.end == OPEN
            and (following.writer, following.episode) == (entry.writer, entry.episode)
            and following.first_step == entry.first_step + entry.steps
        )
        if not follows:
            raise WireError(f"segment {second} does not follow {id} in its episode")
        reach += following.steps
    if start >= entry.steps or start + length > reach:
        raise WireError(f"segment {id} has no steps {start} to {start + length}: {reach} there are")
    frames = entry.frame_step
    if frames is not None and (not frames or frames[0] > start):
        raise WireError(f"segment {id} has no frame at or before step {start}")
