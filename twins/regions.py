"""Regions: where a task's things lie at a reset."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np

from twins.tasks.task import Box, Task

ALL = "all"  # ID or OOD, with equal chance
TABLE = Box((0.25, 0.8), (-0.45, 0.45), (-np.pi, np.pi))  # m, what the arm reaches; rad
TRIES = 1000
WIDER = 0.25  # of a box, where shrunk ones leave no room

Regions = dict[str, dict[str, Box]]


def make_regions(task: Task, custom: Mapping[str, Any] | None) -> Regions:
    """The task's regions and those of a job's configuration: {name: {thing: {x: [low, high], y, yaw}}}.

    A custom region may leave out things and axes: they are drawn as in "id".
    """
    regions = dict(task.regions)
    for name, boxes in (custom or {}).items():
        if name in regions or name == ALL:
            raise ValueError(f"region {name!r} is the task's own; give yours another name")
        if not isinstance(boxes, Mapping):
            raise ValueError(
                f"region {name!r} is {boxes!r}, must be {{thing: {{x: [low, high], ...}}}}"
            )
        region = dict(task.regions["id"])
        for thing, axes in boxes.items():
            if thing not in region:
                raise ValueError(f"region {name!r}: no thing {thing!r}{_nearest(thing, region)}")
            region[thing] = _box(f"region {name!r}, {thing}", axes, region[thing])
        regions[name] = region
    return regions


def _box(where: str, axes: Any, default: Box) -> Box:
    if not isinstance(axes, Mapping):
        raise ValueError(f"{where} is {axes!r}, must be {{x: [low, high], y: ..., yaw: ...}}")
    box = default
    for axis, span in axes.items():
        if axis not in Box._fields:
            raise ValueError(f"{where}: no axis {axis!r}{_nearest(axis, Box._fields)}")
        low, high = getattr(TABLE, axis)
        try:
            first, last = (float(bound) for bound in span)
        except (TypeError, ValueError):
            raise ValueError(f"{where}: {axis} is {span!r}, must be [low, high]") from None
        if not low <= first <= last <= high:
            raise ValueError(
                f"{where}: {axis} [{first:g}, {last:g}] is outside what the arm reaches, [{low:g}, {high:g}]"
            )
        box = box._replace(**{axis: (first, last)})
    return box


def _nearest(name: str, names: Any) -> str:
    close = difflib.get_close_matches(str(name), list(names), 1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(map(str, names))}"


def check_region(name: str, regions: Regions) -> str:
    """`name` if it is known."""
    if name != ALL and name not in regions:
        names = (*regions, ALL)
        raise ValueError(f"region is {name!r}, not one of {names}{_nearest(name, names)}")
    return name


def draw(
    rng: np.random.Generator, task: Task, region: dict[str, Box], scale: float = 1.0
) -> dict[str, list[float]]:
    """{thing: [x, y, yaw] in m and rad}, each uniform in its box, drawn again until they fit together.

    `scale` shrinks the boxes around their centres: at 0 every thing is at the centre of its own. Where they do not fit
    together so, the boxes are widened again until they do; at 0 in the same way in every episode.
    """
    still = scale == 0.0
    room, tries = scale, 1 if still else TRIES  # at their centres things fit or do not
    while True:
        source = np.random.default_rng(0) if still and room > scale else rng
        for _ in range(tries):
            placement = {
                thing: [float(source.uniform(*_shrunk(span, room))) for span in box]
                for thing, box in region.items()
            }
            if task.fits(placement):
                return placement
        if room >= 1.0:
            raise ValueError(
                f"{task.name}: {TRIES} draws found no room for {', '.join(region)} together"
            )
        room, tries = min(room + WIDER, 1.0), TRIES


def _shrunk(span: tuple[float, float], scale: float) -> tuple[float, float]:
    low, high = span
    margin = (1.0 - scale) / 2.0 * (high - low)
    return low + margin, high - margin
