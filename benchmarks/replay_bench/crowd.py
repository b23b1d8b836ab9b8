"""Rows of many writers and four readers on the same host: throughput, and how even the batches come."""

from __future__ import annotations

from typing import Any

from benchmarks.replay_bench.at_once import ours
from benchmarks.replay_bench.bench import Bench, Row, percentile, running
from benchmarks.replay_bench.processes import Worker
from benchmarks.replay_bench.workload import Workload

READERS = 4


def scale(bench: Bench) -> list[Row]:
    """`crowds` writers in turn, each a process that writes as fast as it may."""
    system = ours(bench, bench.workload, ["files everysec"])[0]
    workload = bench.workload
    rows = []
    workers: list[Worker] = []
    with running([system]):
        try:
            readers = [system.worker("reader", f"reader{n}") for n in range(READERS)]
            crowds = {n: system.worker("crowd", f"crowd{n}", count=n) for n in bench.crowds}
            workers += [*readers, *crowds.values()]
            for reader in readers:
                reader.ask("sample", 120, seconds=0.2)
            for crowd in crowds.values():
                crowd.ask("write", 180, seconds=0.1)
            for number in range(bench.rounds):
                for count, crowd in crowds.items():
                    found, others = bench.phase(
                        lambda c=crowd: _both(c, readers, 2 * bench.seconds)
                    )
                    row = {"rows": "scale", "system": f"{count} writers", "round": number}
                    rows.append({**row, "others": others, **_summary(*found, workload)})
        finally:
            for worker in workers:
                worker.close()
    return rows


def _both(
    crowd: Worker, readers: list[Worker], seconds: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    for reader in readers:
        reader.send("sample", seconds=seconds)
    written = crowd.ask("write", 120 + seconds, seconds=seconds)
    return written, [reader.receive(60 + seconds) for reader in readers]


def _summary(written: dict[str, Any], sampled: list[dict[str, Any]], workload: Workload) -> Row:
    times = [each for found in sampled for each in found["times"]]
    inserted = written["transitions"] / written["seconds"]
    drawn = sum(found["transitions"] / found["seconds"] for found in sampled)
    return {
        "write_per_s": inserted,
        "write_MB_s": inserted * workload.transition_bytes / 1e6,
        "sample_per_s": drawn,
        "sample_MB_s": drawn * workload.sampled_bytes / 1e6,
        "batches": len(times),
        "p50_ms": percentile(times, 0.5) * 1e3,
        "p99_ms": percentile(times, 0.99) * 1e3,
    }
