"""Rows of many writers and four readers on the same host: throughput, and how even the batches come.

Beside the readers, at other times, four processes that only copy as many bytes: so uneven is the machine itself.
"""

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
            bytes = workload.batch * workload.sampled_bytes
            copiers = [system.worker("copier", f"copier{n}", bytes=bytes) for n in range(READERS)]
            workers += [*readers, *copiers, *crowds.values()]
            for reader in readers:
                reader.ask("sample", 120, seconds=0.2)
            for crowd in crowds.values():
                crowd.ask("write", 180, seconds=0.1)
            for number in range(bench.rounds):
                for count, crowd in crowds.items():
                    for name, group in (("writers", readers), ("writers, copies", copiers)):
                        if group is copiers and count == 1:
                            continue
                        found, others = bench.phase(
                            lambda c=crowd, g=group: _both(c, g, 1.5 * bench.seconds)
                        )
                        row = {"rows": "scale", "system": f"{count} {name}", "round": number}
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
