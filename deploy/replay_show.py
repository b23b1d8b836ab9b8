"""`twinrl replay RUN show`: one episode as a contact sheet or a video, and where it comes from."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.table import Table
from rich.text import Text

from buffer_service.client import Reader
from deploy.mp4 import write_mp4
from deploy.replay_columns import Track, track
from deploy.replay_episodes import Episode, ago, size
from deploy.replay_sheet import frame_rate, outcome, sheet, video
from twinrl.core.errors import ConfigError, TwinRLError
from twinrl.core.segment import Segment

VIDEO_QUALITY = 20  # x264's CRF
WHO = ("user", "host", "pid", "version", "commit")


def load(reader: Reader, episode: Episode) -> list[list[Segment]]:
    """The segments of an episode, stretch by stretch; TwinRLError when it was evicted meanwhile."""
    stretches = [reader.load(each) for each in episode.stretches()]
    if any(segment is None for each in stretches for segment in each):
        raise TwinRLError(f"episode {episode.name!r} was evicted or deleted meanwhile")
    return [[segment for segment in each if segment is not None] for each in stretches]


def seen_of(episode: Episode, stretches: list[list[Segment]]) -> Track:
    """The track of an episode; one that the service closed ends with its last step, as the index says."""
    seen = track(stretches)
    return seen._replace(ended="truncated") if episode.marked and not seen.ended else seen


def story(episode: Episode, stretches: list[list[Segment]]) -> dict[str, Any]:
    """Everything that is known about where an episode comes from, as plain values."""
    seen = seen_of(episode, stretches)
    segments = [segment for each in stretches for segment in each]
    first = segments[0].header
    written: list[dict[str, Any]] = []  # segments of one process in one stretch of time
    for segment, entry in zip(segments, episode.entries, strict=True):
        origin = segment.header.get("provenance") or {}
        who = {key: origin.get(key) for key in WHO}
        if not written or {key: written[-1][key] for key in WHO} != who:
            written.append({**who, "segments": [], "sequences": [], "time": [], "stored": []})
        row = written[-1]
        row["segments"].append(entry.id)
        row["sequences"].append(entry.sequence)
        row["time"].append(origin.get("time"))
        row["stored"].append(entry.time)
    return {
        **episode.row(),
        "instruction": first["instruction"],
        "ended": outcome(seen)[0],
        "return": float(seen.reward.sum()),
        "frames": len(seen.frame),
        "cameras": sorted(seen.images),
        "seconds": float(seen.timestamp[-1]),
        "versions_by_step": _by_step(seen, seen.version.tolist()),
        "interventions": _by_step(seen, seen.intervention.tolist(), only=True),
        "written": written,
        "configuration": first["configuration"],
        **{key: first[key] for key in ("robot", "parameters") if key in first},
    }


def _by_step(seen: Track, values: list[Any], only: Any = None) -> list[list[Any]]:
    """[[first step, last step, value], ...] of equal neighbours; with `only` just those of that value."""
    found: list[list[Any]] = []
    for step, value in zip(seen.step.tolist(), values, strict=True):
        if found and found[-1][2] == value and found[-1][1] == step - 1:
            found[-1][1] = step
        else:
            found.append([step, step, value])
    return [each for each in found if only is None or each[2] == only]


def show(
    reader: Reader,
    episode: Episode,
    folder: Path,
    *,
    png: Path | None = None,
    movie: Path | None = None,
    frames: int = 48,
    rate: float | None = None,
    as_json: bool = False,
    say: Callable[..., None],
) -> None:
    """Write the contact sheet (into `folder`, or to `png`) or the video `movie`, and print the episode's story.

    `say` prints a table.
    """
    stretches = load(reader, episode)
    seen, told = seen_of(episode, stretches), story(episode, stretches)
    paths = []
    if movie is not None:
        if not seen.images:
            raise ConfigError(f"episode {episode.name!r} has no images, so there is no video of it")
        title = f"{episode.name}   {told['source']}, {told['task']}, {told['region'].upper()}"
        pace = rate or frame_rate(seen)
        _write(movie, lambda path: write_mp4(video(seen, title), path, pace, VIDEO_QUALITY))
        paths.append(movie)
    if movie is None or png is not None:
        target = png or folder / f"{quote(episode.name, safe=' ')[:180]}.png"
        picture = sheet(seen, episode.name, _facts(told), frames)
        _write(target, lambda path: picture.save(path, "PNG", optimize=True))
        paths.append(target)
    if as_json:
        print(json.dumps({**told, "files": [str(path) for path in paths]}))
        return
    say(_table(told))
    for path in paths:
        print(path)


def _write(path: Path, save: Any) -> None:
    """A whole file or none: `save` writes beside the target, which is then replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        save(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise TwinRLError(f"cannot write {path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _facts(told: dict[str, Any]) -> list[str]:
    """Two lines under the picture."""
    names = [f'"{told["instruction"]}"', told["source"], told["task"], told["region"].upper()]
    if told.get("robot"):
        names.append(f"robot {told['robot']}")
    return ["   ".join(names), "written by " + "; ".join(_who(row) for row in told["written"])]


def _who(row: dict[str, Any]) -> str:
    if row["host"] is None:
        return "somebody who left no provenance"
    when = row["time"][0]
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when)) if when else "an unknown time"
    code = f"TwinRL {row['version']}" + (f" at {row['commit'][:10]}" if row["commit"] else "")
    return f"{row['user']}@{row['host']}, process {row['pid']}, {stamp}, {code}"


def _table(told: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, text: str) -> None:
        table.add_row(name, Text(text))

    first, last = told["first_step"], told["first_step"] + told["steps"] - 1
    row("episode", told["episode"])
    row("task", f"{told['task']}, {told['region'].upper()}: {told['instruction']}")
    row("source", told["source"] + (f", robot {told['robot']}" if "robot" in told else ""))
    row(
        "outcome",
        told["ended"]
        + (f", closed by {told['marked']}: the writer was lost" if told["marked"] else ""),
    )
    whole = "" if told["whole"] else f", {first}-{last}; not everything of it is stored"
    row("steps", f"{told['steps']} ({told['seconds']:.1f} s){whole}")
    row("return", f"{told['return']:.3f}")
    row("frames", f"{told['frames']} of {', '.join(told['cameras']) or 'no camera'}")
    row("policy", _spans(told["versions_by_step"]))
    taken = sum(high - low + 1 for low, high, _ in told["interventions"])
    where = ", ".join(_span([low, high]) for low, high, _ in told["interventions"])
    row("interventions", f"{taken} steps: {where}" if taken else "none")
    for each in told["written"]:
        row("written by", _who(each))
        ids = f"segments {_span(each['segments'])}, numbers {_span(each['sequences'])}"
        row("", f"{ids} of writer {told['writer']}")
        stored = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each["stored"][-1]))
        row("stored", f"{stored}, {ago(time.time() - each['stored'][-1])} ago")
    row("size", size(told["bytes"]))
    if "parameters" in told:
        row("parameters", json.dumps(told["parameters"]))
    row("configuration", json.dumps(told["configuration"]))
    return table


def _spans(versions: list[list[int]]) -> str:
    """ "steps 0-35: 76, 36-44: 77, 45-68: none"."""
    return "steps " + ", ".join(
        f"{_span([low, high])}: {'none' if value < 0 else value}" for low, high, value in versions
    )


def _span(numbers: list[int]) -> str:
    first, last = numbers[0], numbers[-1]
    return str(first) if first == last else f"{first}-{last}"
