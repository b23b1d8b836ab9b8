"""Rows of many writers and four readers on the same host: throughput, and how even the batches come."""

from __future__ import annotations

from benchmarks.replay_bench.at_once import ours
from benchmarks.replay_bench.bench import Bench, Row, percentile, running
from benchmarks.replay_bench.processes import Worker

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
                    for reader in readers:
                        reader.send("sample", seconds=bench.seconds)
                    written = crowd.ask("write", 120 + bench.seconds, seconds=bench.seconds)
                    sampled = [reader.receive(60 + bench.seconds) for reader in readers]
                    times = [each for found in sampled for each in found["times"]]
                    inserted = written["transitions"] / written["seconds"]
                    drawn = sum(found["transitions"] / found["seconds"] for found in sampled)
                    rows.append(
                        {
                            "rows": "scale",
                            "system": f"{count} writers",
                            "writers": count,
                            "round": number,
                            "write_per_s": inserted,
                            "write_MB_s": inserted * workload.transition_bytes / 1e6,
                            "sample_per_s": drawn,
                            "sample_MB_s": drawn * workload.sampled_bytes / 1e6,
                            "batches": len(times),
                            "p50_ms": percentile(times, 0.5) * 1e3,
                            "p99_ms": percentile(times, 0.99) * 1e3,
                        }
                    )
        finally:
            for worker in workers:
                worker.close()
    return rows
