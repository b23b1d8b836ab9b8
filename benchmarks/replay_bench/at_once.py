"""Rows of writing and sampling at the same time: ours in every setting against every peer, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.replay_bench.bench import Bench, Copying, Row, rates, running
from benchmarks.replay_bench.systems import Reverb, System, TwinRL
from benchmarks.replay_bench.workload import STEPS, Workload

REDIS = {"store": "redis", "redis_memory_mb": 8000}
# name in `bench.SETTINGS`: options of the service
OPTIONS: dict[str, dict[str, Any]] = {
    "files everysec": {},
    "files always": {"flush": "always"},
    "files never": {"flush": "never"},
    "redis everysec": REDIS,
    "redis always": {**REDIS, "flush": "always"},
    "redis never": {**REDIS, "flush": "never"},
}


def ours(bench: Bench, workload: Workload, names: Sequence[str]) -> list[TwinRL]:
    """Our service in the settings of those names, as far as this run has them."""
    return [
        TwinRL(
            name.replace(" ", "-"),
            workload,
            bench.data(workload),
            bench.folder,
            **OPTIONS[name],
        )
        for name in names
        if name in bench.settings
    ]


def at_once(bench: Bench) -> list[Row]:
    """Workload W: a writer inserts while a reader draws."""
    workload = bench.workload
    systems: list[System] = [
        kind(kind.kind, workload, bench.data(workload), bench.folder) for kind in bench.peers
    ]
    for place, system in enumerate(ours(bench, workload, bench.settings)):
        systems.insert(2 * place, system)  # each beside a peer, as far as they go
    copying = Copying(workload)
    rows = []
    with running(systems):
        for number in range(bench.rounds):
            memcpy = copying.rate(0.2)
            for system in turned(systems, number):
                found, others = bench.phase(lambda s=system: s.both(bench.seconds))
                row = {"rows": "at_once", "system": system.name, "round": number, "others": others}
                row |= {"memcpy_MB_s": memcpy, **rates(found, workload)}
                if isinstance(system, TwinRL):
                    row["ingested_vs_acked"] = _ingested(system) / found["write"]["acknowledged"]
                rows.append(row)
    return rows


def turned(systems: list[System], number: int) -> list[System]:
    """Another order each round, so that nobody always comes first."""
    place = 2 * number % len(systems)
    return systems[place:] + systems[:place]


def _ingested(system: TwinRL) -> int:
    """Transitions of the writer up to the newest in the index; 0 if the index has a gap before it."""
    known = system.reader.ask("known")
    return (known["newest"] + 1) * STEPS if known["whole"] else 0


def small(bench: Bench) -> list[Row]:
    """Transitions of 256 bytes without images."""
    systems: list[System] = [*ours(bench, bench.small, ["files everysec"])]
    if Reverb in bench.peers:
        systems.append(Reverb("reverb", bench.small, bench.data(bench.small), bench.folder))
    rows = []
    with running(systems):
        for number in range(bench.rounds):
            for system in systems:
                found, others = bench.phase(lambda s=system: s.both(bench.seconds))
                row = {"rows": "small", "system": system.name, "round": number, "others": others}
                rows.append(row | rates(found, bench.small))
    return rows
