"""From rows to the figures: what each key is, what it is to reach, and how it comes from the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from benchmarks.replay_bench.bench import Row, median
from twinrl.core.codec import STORAGE

Values = list[float]  # one a round
CALM = 0.3  # cores that others may use in a round that counts; the kernel's writing back for us is among them
ENOUGH = 3  # rounds


class Figure(NamedTuple):
    """A key of the table."""

    key: str
    rows: str  # the group it comes from
    text: str
    goal: str  # ">= 2"; "" where none is set
    values: Callable[[list[Row]], Values]

    def reached(self, value: float) -> bool | None:
        """Whether the goal is; None without one."""
        if not self.goal:
            return None
        sign, limit = self.goal.split()
        return value >= float(limit) if sign == ">=" else value <= float(limit)


def of(rows: Iterable[Row], system: str, key: str) -> dict[int, float]:
    """A system's value in each round."""
    return {row["round"]: row[key] for row in rows if row["system"] == system and key in row}


def ratio(system: str, other: str, key: str, other_key: str = "") -> Callable[[list[Row]], Values]:
    """`system` against `other`, round by round."""

    def values(rows: list[Row]) -> Values:
        mine, theirs = of(rows, system, key), of(rows, other, other_key or key)
        return [mine[n] / theirs[n] for n in mine if n in theirs]

    return values


def better(first: Callable, second: Callable) -> Callable[[list[Row]], Values]:
    """Of two lists of values, the one with the higher median."""

    def values(rows: list[Row]) -> Values:
        return max(first(rows), second(rows), key=lambda found: median(found) if found else -1)

    return values


def plain(system: str, key: str) -> Callable[[list[Row]], Values]:
    """A value of the rows as it is."""
    return lambda rows: list(of(rows, system, key).values())


def least(key: str) -> Callable[[list[Row]], Values]:
    """The least of all systems that have it."""
    return lambda rows: sorted(row[key] for row in rows if key in row)[:1]


def against_peak(count: int) -> Callable[[list[Row]], Values]:
    """What so many writers insert in all, against the best number of writers."""

    def values(rows: list[Row]) -> Values:
        systems = {row["system"] for row in rows if row["system"].endswith("writers")}
        peak = max((median(plain(system, "write_per_s")(rows)) for system in systems), default=0)
        return [each / peak for each in plain(f"{count} writers", "write_per_s")(rows)]

    return values


def tail(count: int, who: str = "writers") -> Callable[[list[Row]], Values]:
    """The slowest batch in a hundred against the middle one."""
    return ratio(f"{count} {who}", f"{count} {who}", "p99_ms", "p50_ms")


def larger(system: str) -> Callable[[list[Row]], Values]:
    """Memory or disk, whichever is more."""

    def values(rows: list[Row]) -> Values:
        memory, disk = of(rows, system, "memory_vs_raw"), of(rows, system, "disk_vs_raw")
        return [max(memory[n], disk[n]) for n in memory]

    return values


FIGURES = (
    Figure(
        "insert_vs_reverb",
        "at_once",
        "insert with a log written within a second, against Reverb's without one; both while sampling",
        ">= 2",
        ratio("files-everysec", "reverb", "write_per_s"),
    ),
    Figure(
        "insert_memory_vs_reverb",
        "at_once",
        "insert without a log (never synced) against Reverb's, while sampling",
        ">= 5",
        ratio("files-never", "reverb", "write_per_s"),
    ),
    Figure(
        "insert_vs_disk",
        "disk",
        "insert against a bare sequential writer with the same sync policy (once a second)",
        ">= 0.7",
        ratio("files-everysec", "bare everysec", "write_per_s"),
    ),
    Figure(
        "insert_vs_disk_always",
        "disk",
        "the same, synced before every acknowledgement",
        "",
        ratio("files-always", "bare always", "write_per_s"),
    ),
    Figure(
        "sample_vs_reverb",
        "at_once",
        "sampling against Reverb's, while inserting",
        ">= 5",
        ratio("files-everysec", "reverb", "sample_per_s"),
    ),
    Figure(
        "ingested_vs_acked",
        "at_once",
        "transitions in the index at the end, of those acknowledged (least of all rounds and settings)",
        ">= 1.0",
        least("ingested_vs_acked"),
    ),
    Figure(
        "batch_vs_memcpy",
        "batch",
        "batches of a reader on the same host against memcpy of the same bytes",
        ">= 0.7",
        ratio("files-everysec", "files-everysec", "sample_MB_s", "memcpy_MB_s"),
    ),
    Figure(
        "batch_tcp_vs_zmq",
        "tcp",
        "batches over TCP against a bare ZeroMQ transfer of the same bytes, unencrypted",
        ">= 0.8",
        ratio("over tcp", "zmq", "sample_per_s"),
    ),
    Figure(
        "batch_tcp_vs_zmq_curve",
        "tcp",
        "the same, against ZeroMQ with the encryption that the service uses",
        "",
        ratio("over tcp", "zmq with CURVE", "sample_per_s"),
    ),
    Figure(
        "memory_vs_raw",
        "memory",
        "memory (page cache included) or disk, whichever is more, per raw byte of images: raw codec",
        "<= 1.1",
        larger("files everysec raw"),
    ),
    Figure(
        "memory_vs_raw_lossless",
        "memory",
        "the same with the lossless codec",
        "<= 0.6",
        larger(f"files everysec {STORAGE}"),
    ),
    Figure(
        "small_insert_vs_reverb",
        "small",
        "insert of transitions of 256 bytes against Reverb's, while sampling",
        ">= 3",
        ratio("files-everysec", "reverb", "write_per_s"),
    ),
    Figure(
        "small_sample_vs_reverb",
        "small",
        "sampling of those against Reverb's, while inserting",
        ">= 3",
        ratio("files-everysec", "reverb", "sample_per_s"),
    ),
    Figure(
        "scale_4_writers",
        "scale",
        "inserts of 4 writers with 4 readers, against the best number of writers",
        ">= 0.8",
        against_peak(4),
    ),
    Figure(
        "scale_64_writers",
        "scale",
        "inserts of 64 writers with 4 readers, against the best number of writers",
        ">= 0.6",
        against_peak(64),
    ),
    Figure("p99_vs_p50_4", "scale", "p99 of batch times against p50, 4 writers", "<= 3", tail(4)),
    Figure(
        "p99_vs_p50_64", "scale", "p99 of batch times against p50, 64 writers", "<= 5", tail(64)
    ),
    Figure(
        "p99_vs_p50_4_copies",
        "scale",
        "the same of plain copies in place of the 4 readers, 4 writers",
        "",
        tail(4, "writers, copies"),
    ),
    Figure(
        "p99_vs_p50_64_copies",
        "scale",
        "the same of plain copies, 64 writers",
        "",
        tail(64, "writers, copies"),
    ),
    Figure(
        "rebuild_mb_s",
        "memory",
        "MB of stored images a second of restart after a kill, until the first batch",
        ">= 2000",
        plain("files everysec raw", "rebuild_MB_s"),
    ),
    Figure(
        "data_wait",
        "wait",
        "share of a learner's time spent waiting for data, prefetched",
        "<= 0.05",
        plain("prefetched", "waited_share"),
    ),
)


def figures(rows: list[Row]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The median of each key that the rows give, and [lowest, highest] of its rounds.

    Rounds in which others used the processors count only where fewer than three were quiet.
    """
    found, spread = {}, {}
    for figure in FIGURES:
        group = [row for row in rows if row["rows"] == figure.rows]
        values = figure.values(calm(group))
        if len(values) < ENOUGH:
            values = figure.values(group)
        if values:
            found[figure.key] = round(median(values), 4)
            spread[figure.key] = [round(min(values), 4), round(max(values), 4)]
    return found, spread


def calm(rows: list[Row]) -> list[Row]:
    """Those during which others used little."""
    return [row for row in rows if row.get("others", 0.0) <= CALM]


def medians(rows: list[Row]) -> dict[tuple[str, str], dict[str, float]]:
    """(group, system): the median of every number in its rows, of the calm ones where there are enough."""
    found = {}
    for place in dict.fromkeys((row["rows"], row["system"]) for row in rows):
        mine = [row for row in rows if (row["rows"], row["system"]) == place]
        quiet = calm(mine)
        numbers: dict[str, list[float]] = {}
        for row in quiet if len(quiet) >= ENOUGH else mine:
            for key, value in row.items():
                if isinstance(value, float | int) and key != "round":
                    numbers.setdefault(key, []).append(value)
        found[place] = {key: median(values) for key, values in numbers.items()}
    return found
