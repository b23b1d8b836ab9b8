"""Rows of writing and sampling at the same time: ours in every setting against every peer, one after the other."""

from __future__ import annotations

from typing import Any

from benchmarks.replay_bench.bench import Bench, Copying, Row, rates, running, service_knows
from benchmarks.replay_bench.systems import Reverb, System, TwinRL
from benchmarks.replay_bench.workload import STEPS, Workload

# name: options of the service, whether its folder is in memory
SETTINGS: dict[str, tuple[dict[str, Any], bool]] = {
    "files everysec": ({}, False),
    "files always": ({"flush": "always"}, False),
    "files in memory": ({"flush": "never"}, True),
    "redis everysec": ({"form": "redis"}, False),
    "redis always": ({"form": "redis", "flush": "always"}, False),
    "redis in memory": ({"form": "redis", "flush": "never"}, True),
}


def ours(bench: Bench, workload: Workload, names: list[str]) -> list[TwinRL]:
    """Our service in the settings of those names that it knows."""
    known, systems = service_knows(), []
    for name in names:
        options, in_memory = SETTINGS[name]
        if "form" in options and "--form" not in known:
            continue
        folder = bench.memory() if in_memory else bench.folder
        systems.append(
            TwinRL(name.replace(" ", "-"), workload, bench.data(workload), folder, **options)
        )
    return systems


def at_once(bench: Bench) -> list[Row]:
    """Workload W: a writer inserts while a reader draws."""
    workload = bench.workload
    systems: list[System] = [*ours(bench, workload, list(SETTINGS))]
    systems += [
        kind(kind.kind, workload, bench.data(workload), bench.folder) for kind in bench.peers
    ]
    copying = Copying(workload)
    rows = []
    with running(systems):
        for number in range(bench.rounds):
            memcpy = copying.rate(0.2)
            for system in systems:
                found = system.both(bench.seconds)
                row = {"rows": "at_once", "system": system.name, "round": number}
                row |= {"memcpy_MB_s": memcpy, **rates(found, workload)}
                if isinstance(system, TwinRL):
                    row["ingested_vs_acked"] = _ingested(system) / found["write"]["acknowledged"]
                rows.append(row)
    return rows


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
                found = system.both(bench.seconds)
                row = {"rows": "small", "system": system.name, "round": number}
                rows.append(row | rates(found, bench.small))
    return rows
