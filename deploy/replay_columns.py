"""An episode's segments joined into whole columns, each observation and frame once."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from twinrl.core.segment import (
    IMAGE_PREFIX,
    OPTIONAL_STEP_COLUMNS,
    STEP_COLUMNS,
    Segment,
)

OBSERVATIONS = ("observation.state", "privileged.state")
Columns = dict[str, np.ndarray]


def join(segments: list[Segment]) -> Columns:
    """The columns of segments that follow each other, T steps in all, on the axes of one long segment.

    `frame_step` and `chunk_step` count from the first of these steps. The observation at a seam, which both
    sides store, is taken from the later one. What only some of the segments have is NaN in the others
    (-1 for integers, False for bools).
    """
    names = list(dict.fromkeys(name for each in segments for name in each.columns))
    starts = np.cumsum([0, *(each.steps for each in segments)])
    frames = [_kept_frames(segments, i) for i in range(len(segments))]
    joined: Columns = {}
    for name in names:
        parts = []
        for i, (segment, start) in enumerate(zip(segments, starts[:-1], strict=True)):
            column = segment.columns.get(name)
            if name == "frame_step":
                column = np.zeros(0, "<i4") if column is None else column[frames[i]] + start
            elif name == "chunk_step":
                column = np.zeros(0, "<i4") if column is None else column + start
            elif column is None:
                column = _nothing(segments, name, _rows(segment, name, int(frames[i].sum())))
            elif name.startswith(IMAGE_PREFIX):
                column = column[frames[i]]
            if name in OBSERVATIONS and i + 1 < len(segments):
                column = column[: segment.steps]
            parts.append(column)
        joined[name] = np.concatenate(parts) if len(parts) > 1 else np.asarray(parts[0])
    return joined


def _kept_frames(segments: list[Segment], i: int) -> np.ndarray:
    """(F,) bool: the frames of segment i that no later segment stores again."""
    steps = segments[i].columns.get("frame_step", np.zeros(0, "<i4"))
    keep = np.ones(len(steps), bool)
    if i + 1 < len(segments) and len(steps):
        following = segments[i + 1].columns.get("frame_step", np.zeros(0, "<i4"))
        if len(following) and following[0] == 0:
            keep &= steps < segments[i].steps
    return keep


def _rows(segment: Segment, name: str, frames: int) -> int:
    """How many rows a column that the segment lacks would have."""
    if name in STEP_COLUMNS or name in OPTIONAL_STEP_COLUMNS:
        return segment.steps
    if name in OBSERVATIONS:
        return segment.steps + 1
    if name.startswith(IMAGE_PREFIX):
        return frames
    return len(segment.columns.get("chunk_step", ()))


def _nothing(segments: list[Segment], name: str, rows: int) -> np.ndarray:
    model = next(each.columns[name] for each in segments if name in each.columns)
    fill: Any = {"f": np.nan, "i": -1}.get(model.dtype.kind, 0)
    return np.full((rows, *model.shape[1:]), fill, model.dtype)


class Track(NamedTuple):
    """What there is to be seen of an episode; steps are numbered as in the episode, also across a gap."""

    step: np.ndarray  # (T,) int
    reward: np.ndarray  # (T,) float32
    intervention: np.ndarray  # (T,) bool
    version: np.ndarray  # (T,) int, -1 where no policy acted
    timestamp: np.ndarray  # (T,) s
    success: bool
    ended: str  # "terminated", "truncated" or "" (it goes on)
    frame: np.ndarray  # (F,) int: the step before which each frame was seen
    images: dict[str, np.ndarray]  # camera -> (F, H, W, 3) uint8


def track(stretches: list[list[Segment]]) -> Track:
    """A track of runs of segments as `Episode.stretches` gives them."""
    joined = [(each[0].header["first_step"], join(each)) for each in stretches]

    def rows(name: str) -> np.ndarray:
        return np.concatenate([columns[name] for _, columns in joined])

    def numbered(name: str) -> np.ndarray:
        return np.concatenate(
            [columns.get(name, np.zeros(0, int)) + start for start, columns in joined]
        )

    last = joined[-1][1]
    ended = "terminated" if last["terminated"][-1] else "truncated" if last["truncated"][-1] else ""
    if not ended and stretches[-1][-1].header["last"]:
        ended = "truncated"
    cameras = {n for _, columns in joined for n in columns if n.startswith(IMAGE_PREFIX)}
    return Track(
        step=np.concatenate([start + np.arange(len(c["action"])) for start, c in joined]),
        reward=rows("reward"),
        intervention=rows("intervention"),
        version=rows("policy_version"),
        timestamp=rows("timestamp"),
        success=bool(rows("success").any()),
        ended=ended,
        frame=numbered("frame_step") if cameras else np.zeros(0, int),
        images={name[len(IMAGE_PREFIX) :]: rows(name) for name in sorted(cameras)},
    )
