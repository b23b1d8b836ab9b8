"""Episodes as the replay's index knows them, and which of them a command means. Nothing here reads payload."""

from __future__ import annotations

import fnmatch
import re
import time
from collections.abc import Iterable
from datetime import datetime
from typing import Any, NamedTuple

from buffer_service.client import Entry
from buffer_service.entry import OPEN
from twinrl.core.errors import ConfigError

SUCCESS, FAILURE, UNFINISHED = "success", "failure", "unfinished"
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
SIZES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class Episode(NamedTuple):
    """The stored segments of one episode of one writer, in the order of their steps."""

    entries: list[Entry]

    @property
    def name(self) -> str:
        """Its name, unique in the run."""
        return self.entries[0].episode

    @property
    def steps(self) -> int:
        """Transitions that are stored."""
        return sum(entry.steps for entry in self.entries)

    @property
    def bytes(self) -> int:
        """Bytes of its records."""
        return sum(entry.length for entry in self.entries)

    @property
    def outcome(self) -> str:
        """SUCCESS, FAILURE, or UNFINISHED while its last segment says that it goes on."""
        if any(entry.success for entry in self.entries):
            return SUCCESS
        return UNFINISHED if self.entries[-1].end == OPEN else FAILURE

    @property
    def marked(self) -> str:
        """Why it was closed by somebody else than its writer, e.g. "lease"; else ""."""
        return next((entry.marked for entry in self.entries if entry.marked), "")

    @property
    def versions(self) -> tuple[int, int] | None:
        """Lowest and highest of the segments' policy versions; None where no policy acted."""
        acted = [entry.version for entry in self.entries if entry.version >= 0]
        return (min(acted), max(acted)) if acted else None

    @property
    def time(self) -> float:
        """When its newest segment came in, s since the epoch."""
        return max(entry.time for entry in self.entries)

    @property
    def whole(self) -> bool:
        """Whether it is there from its first step on, without a gap."""
        return self.entries[0].first_step == 0 and len(self.stretches()) == 1

    def stretches(self) -> list[list[Entry]]:
        """Runs of segments that follow each other step by step; several where something in between is gone."""
        found: list[list[Entry]] = []
        for entry in self.entries:
            if found and found[-1][-1].first_step + found[-1][-1].steps == entry.first_step:
                found[-1].append(entry)
            else:
                found.append([entry])
        return found

    def row(self) -> dict[str, Any]:
        """Everything that the index knows, as plain values."""
        first = self.entries[0]
        return {
            "episode": self.name,
            "source": first.source,
            "task": first.task,
            "region": first.region,
            "outcome": self.outcome,
            "marked": self.marked,
            "first_step": first.first_step,
            "steps": self.steps,
            "whole": self.whole,
            "versions": None if self.versions is None else list(self.versions),
            "writer": first.writer,
            "sequences": [entry.sequence for entry in self.entries],
            "segments": [entry.id for entry in self.entries],
            "time": self.time,
            "bytes": self.bytes,
        }


def episodes(entries: Iterable[Entry]) -> list[Episode]:
    """The entries by episode, in the order in which the episodes began to come in."""
    found: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        found.setdefault((entry.writer, entry.episode), []).append(entry)
    order = sorted(found.values(), key=lambda group: group[0].id)
    return [Episode(sorted(group, key=lambda each: (each.first_step, each.id))) for group in order]


class Selection(NamedTuple):
    """What the filters of the command line let through; names may hold * and ?."""

    source: tuple[str, ...] = ()  # any when empty
    task: str = "*"
    region: str = "*"
    writer: str = "*"
    episode: str = "*"
    outcome: str = ""  # any when empty
    since: float = 0.0  # s since the epoch
    until: float = float("inf")
    versions: tuple[int, int] | None = None  # lowest and highest
    marked: bool = False  # only those

    @property
    def everything(self) -> bool:
        """Whether nothing is left out."""
        return self == Selection()

    def keeps(self, episode: Episode) -> bool:
        """Whether an episode passes. Of its policy versions one must be among those asked for."""
        first = episode.entries[0]
        names = (
            (first.task, self.task),
            (first.region, self.region),
            (first.writer, self.writer),
            (first.episode, self.episode),
        )
        return (
            (not self.source or first.source in self.source)
            and all(fnmatch.fnmatchcase(name, pattern) for name, pattern in names)
            and self.outcome in ("", episode.outcome)
            and (not self.marked or bool(episode.marked))
            and self.since <= episode.time <= self.until
            and (self.versions is None or self._has_version(episode))
        )

    def _has_version(self, episode: Episode) -> bool:
        assert self.versions is not None
        low, high = self.versions
        return any(low <= entry.version <= high for entry in episode.entries)


def find(found: list[Episode], wanted: str) -> Episode:
    """The episode that `wanted` names: "last", "#ID" of one of its segments, its name, or a part of that only it has.

    ConfigError says which there are when it is none or several.
    """
    if not found:
        raise ConfigError("no episode passes the filters")
    if wanted == "last":
        return max(found, key=lambda episode: episode.time)
    if re.fullmatch(r"#\d+", wanted):
        fits = [e for e in found if any(entry.id == int(wanted[1:]) for entry in e.entries)]
    else:
        fits = [e for e in found if e.name == wanted] or [e for e in found if wanted in e.name]
    if len(fits) == 1:
        return fits[0]
    if not fits:
        newest = ", ".join(repr(episode.name) for episode in found[:-4:-1])
        raise ConfigError(f"no episode {wanted!r} among {len(found)}; the newest are {newest}")
    names = ", ".join(f"{e.name!r} of {e.entries[0].writer!r}" for e in fits[:5])
    raise ConfigError(
        f"{wanted!r} fits {len(fits)} episodes ({names}{', ...' if len(fits) > 5 else ''}): "
        "give more of the name, or --writer"
    )


def moment(text: str, now: float | None = None) -> float:
    """s since the epoch of "10m" (ago; s, m, h, d) or of an ISO time such as "2026-11-21T15:30", local."""
    ago = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text)
    if ago:
        return (time.time() if now is None else now) - float(ago[1]) * UNITS[ago[2]]
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise ConfigError(
            f"{text!r} is no time: say how long ago (90s, 10m, 2h, 3d) or when (2026-11-21T15:30)"
        ) from None


def version_range(text: str) -> tuple[int, int]:
    """Lowest and highest version of "7", "3:7", "3:" or ":7"; "none" is where no policy acted."""
    if text == "none":
        return -1, -1
    match = re.fullmatch(r"(\d*)(:?)(\d*)", text)
    if match is None or not (match[1] or match[3]):
        raise ConfigError(f"{text!r} is no policy version: 7, 3:7, 3:, :7 or none")
    low = int(match[1] or 0)
    high = low if not match[2] else int(match[3] or 1 << 62)
    if high < low:
        raise ConfigError(f"{text!r} ends before it begins")
    return low, high


def ago(seconds: float) -> str:
    """How long ago, as people say it."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            number = seconds / size
            return f"{number:.0f} {unit}" if number >= 10 else f"{number:.1f} {unit}"
    return f"{max(seconds, 0.0):.0f} s"


def size(number: float) -> str:
    """Bytes as people read them: 1,234,567 is 1.23 MB."""
    for unit, name in SIZES:
        if number >= unit:
            return (
                f"{number / unit:.3g} {name}"
                if number < 1000 * unit
                else f"{number / unit:,.0f} {name}"
            )
    return f"{number:.0f} B"
