"""`twinrl replay RUN export`: episodes as NumPy files, one each. docs/replay-command.md lists what is in them."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from buffer_service.client import Entry, Reader
from deploy.replay_columns import join
from deploy.replay_episodes import Episode
from twinrl import __version__
from twinrl.core.errors import TwinRLError
from twinrl.core.segment import Segment

FORMAT = 1  # of the files; raised when a key changes its meaning
HEADER = ("source", "task", "instruction", "region", "configuration", "episode", "robot")


class Exported(NamedTuple):
    """What an export did."""

    written: int
    kept: int  # files that were there already, with the same segments
    gone: int  # stretches of episodes that were evicted or deleted meanwhile
    bytes: int  # of the written files


def export(
    reader: Reader,
    found: list[Episode],
    folder: Path,
    *,
    compress: bool = False,
    console: Console | None = None,
) -> Exported:
    """Write the episodes into `folder`, a file each; one with a gap gets a file for each stretch without.

    Files appear whole or not at all. One that holds the same segments already is kept, so that an export that
    was cut off goes on where it was, and one of a running job adds what is new.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TwinRLError(f"cannot write to {folder}: {error}") from None
    work = [(path, entries) for each in found for path, entries in _files(folder, each)]
    written = kept = gone = size = 0
    with Progress(
        TextColumn("exporting"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("episodes"),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
        transient=True,
        disable=not (console or Console(stderr=True)).is_terminal,
    ) as progress:
        task = progress.add_task("export", total=len(work))
        for path, entries in work:
            progress.advance(task)
            if _holds(path, entries):
                kept += 1
                continue
            segments = [segment for segment in reader.load(entries) if segment is not None]
            if len(segments) < len(entries):
                gone += 1
                continue
            try:
                _write(path, _arrays(segments, entries, reader), compress)
            except OSError as error:
                raise TwinRLError(
                    f"cannot write {path}: {error}; {written} episodes are there, the same command goes on"
                ) from None
            written += 1
            size += path.stat().st_size
    return Exported(written, kept, gone, size)


def _files(folder: Path, episode: Episode) -> list[tuple[Path, list[Entry]]]:
    stretches = episode.stretches()
    name = quote(episode.name, safe=" ")[:180]
    if len(stretches) == 1:
        return [(folder / f"{name}.npz", stretches[0])]
    return [(folder / f"{name}.from{each[0].first_step:05d}.npz", each) for each in stretches]


def _names(entries: list[Entry]) -> list[list[Any]]:
    """What never changes about segments: [[writer, sequence], ...]."""
    return [[entry.writer, entry.sequence] for entry in entries]


def _holds(path: Path, entries: list[Entry]) -> bool:
    """Whether the file is whole and has just these segments."""
    try:
        with np.load(path) as file:  # reads the directory at the end, and then this one member
            header = json.loads(str(file["header"]))
        held = [[each["writer"], each["sequence"]] for each in header["segments"]]
        marked = [each["marked"] for each in header["segments"]]
        return (
            header["format"] == FORMAT
            and held == _names(entries)
            and marked == [entry.marked for entry in entries]
        )
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return False


def _arrays(segments: list[Segment], entries: list[Entry], reader: Reader) -> dict[str, np.ndarray]:
    """What goes into the file: the joined columns, `step`, and `header`, a JSON text."""
    columns = join(segments)
    if entries[-1].marked:  # the index closed the episode, the columns do not say so yet
        columns["truncated"] = columns["truncated"].copy()
        columns["truncated"][-1] = True
    first = segments[0].header
    header = {
        **{key: first[key] for key in HEADER if key in first},
        "first_step": first["first_step"],
        "steps": len(columns["action"]),
        "success": bool(columns["success"].any()),
        "finished": bool(columns["terminated"][-1] | columns["truncated"][-1])
        or bool(segments[-1].header["last"]),
        "segments": [_segment(*each) for each in zip(segments, entries, strict=True)],
        "schema": {**reader.schema._asdict(), "cameras": list(reader.schema.cameras)},
        "twinrl": __version__,
        "format": FORMAT,
    }
    steps = first["first_step"] + np.arange(len(columns["action"]))
    return {"header": np.array(json.dumps(header)), "step": steps.astype("<i8"), **columns}


def _segment(segment: Segment, entry: Entry) -> dict[str, Any]:
    return {
        "writer": entry.writer,
        "sequence": entry.sequence,
        "id": entry.id,
        "first_step": entry.first_step,
        "steps": entry.steps,
        "time": entry.time,
        "marked": entry.marked,
        "provenance": segment.header.get("provenance"),
    }


def _write(path: Path, arrays: dict[str, np.ndarray], compress: bool) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            (np.savez_compressed if compress else np.savez)(file, **arrays)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the new name with an empty file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
