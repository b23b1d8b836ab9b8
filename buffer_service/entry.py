"""An index entry: what is known of a stored segment without touching its bytes."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

from twinrl.core.segment import IMAGE_PREFIX, Segment

OPEN, TERMINATED, CUT = 0, 1, 2  # how the segment ends: episode goes on, terminal, ended otherwise
LEASE = "lease"


class Entry(NamedTuple):
    """One stored segment. On the wire and in Redis it is the list of these fields."""

    id: int  # rises with every segment of the run: the order of insertion
    source: str
    task: str
    region: str
    episode: str
    first_step: int
    steps: int  # T
    end: int  # OPEN, TERMINATED or CUT
    frame_step: list[int] | None  # steps that have a frame; None = every one of the T + 1
    version: int  # lowest policy version among its steps, -1 where no policy acted
    writer: str
    sequence: int
    time: float  # s since the epoch, when it was inserted
    file: int  # number of the segment file
    offset: int  # byte of the record in that file
    length: int  # bytes of the record
    success: bool = False  # some step of the segment succeeded
    marked: str = (
        ""  # LEASE: the episode was closed for a writer that died; the columns do not say so
    )


def describe(id: int, segment: Segment, file: int, offset: int, length: int) -> Entry:
    """The entry of a segment whose record lies at `offset` of `file`."""
    header, columns = segment
    steps = segment.steps
    if columns["terminated"][-1]:
        end = TERMINATED
    elif columns["truncated"][-1] or header["last"]:
        end = CUT
    else:
        end = OPEN
    frames: list[int] | None = columns.get("frame_step", np.zeros(0, np.int32)).tolist()
    has_images = any(name.startswith(IMAGE_PREFIX) for name in columns)
    if not has_images or len(frames or ()) == steps + 1:
        frames = None  # without cameras the state alone is the observation, and it is dense
    versions = columns["policy_version"]
    acted = versions[versions >= 0]
    return Entry(
        id=id,
        source=header["source"],
        task=header["task"],
        region=header["region"],
        episode=header["episode"],
        first_step=header["first_step"],
        steps=steps,
        end=end,
        frame_step=frames,
        version=int(acted.min()) if len(acted) else -1,
        writer=header["writer"],
        sequence=header["sequence"],
        time=time.time(),
        file=file,
        offset=offset,
        length=length,
        success=bool(columns["success"].any()),
    )
