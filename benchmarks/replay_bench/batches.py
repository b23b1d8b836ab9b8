"""Rows of batches alone: on the same host against memcpy, over TCP against bare ZeroMQ; a learner's waiting."""

from __future__ import annotations

from benchmarks.replay_bench.at_once import ours
from benchmarks.replay_bench.bench import Bench, Copying, Row, rates, running
from benchmarks.replay_bench.processes import Worker
from benchmarks.replay_bench.systems import System, TwinRL
from twinrl.core.sockets import free_port

CACHED = 2 << 30  # the reader's default
PACE = 400.0  # transitions a second that come in while the learner works: what a machine of this size simulates


def batch(bench: Bench) -> list[Row]:
    """Batches of a reader on the service's host, nobody writing."""
    workload = bench.workload
    systems: list[System] = [*ours(bench, workload, ["files everysec", "redis everysec"])]
    copying = Copying(workload)
    rows = []
    with running(systems):
        for number in range(bench.rounds):
            for system in systems:
                memcpy = copying.rate(bench.seconds / 4)
                found, others = bench.phase(lambda s=system: s.sample(bench.seconds))
                row = {"rows": "batch", "system": system.name, "round": number, "others": others}
                rows.append(row | {"memcpy_MB_s": memcpy} | rates(found, workload))
    return rows


def tcp(bench: Bench) -> list[Row]:
    """Batches of a reader that cannot see the service's folder, as on another host, over the loopback device."""
    workload = bench.workload
    system = ours(bench, workload, ["files everysec"])[0]
    # As long as a batch: images now and next.
    sizes = {"bytes": workload.batch * workload.sampled_bytes}
    rows = []
    workers: list[Worker] = []
    with running([system]):
        try:
            elsewhere = {"elsewhere": str(system.folder / "nothing")}
            readers = {
                "over tcp": system.worker("reader", "far", **elsewhere, cache_bytes=0),
                "over tcp, cached": system.worker("reader", "cached", **elsewhere),
            }
            for name, curve in (("zmq", False), ("zmq with CURVE", True)):
                address = {"at": f"tcp://127.0.0.1:{free_port()}", "curve": curve, **sizes}
                workers.append(system.worker("sender", f"{name}-sender", **address))
                readers[name] = system.worker("receiver", name, **address)
            workers += readers.values()
            for number in range(bench.rounds):
                for name, reader in readers.items():
                    found, others = bench.phase(
                        lambda r=reader: r.ask("sample", 120 + bench.seconds, seconds=bench.seconds)
                    )
                    row = {"rows": "tcp", "system": name, "round": number, "others": others}
                    rows.append(row | rates({"sample": found}, workload))
        finally:
            for worker in workers:
                worker.close()
    return rows


def wait(bench: Bench) -> list[Row]:
    """A learner that works `update` s on each batch, one thread, while transitions come in at an actors' pace."""
    system = ours(bench, bench.workload, ["files everysec"])[0]
    rows = []
    with running([system]):
        learner = system.worker("learner", "learner")
        try:
            products = learner.ask("calibrate", 120, seconds=bench.update)["products"]
            seconds = max(4 * bench.seconds, 4 * bench.update)
            for number in range(max(bench.rounds // 2, 1) + 1):
                for name, prefetch in (("prefetched", True), ("not prefetched", False)):
                    found, others = bench.phase(
                        lambda p=prefetch: _learn(system, learner, seconds, products, p)
                    )
                    row = {"rows": "wait", "system": name, "round": number, "others": others}
                    rows.append({**row, **found})
        finally:
            learner.close()
    return rows


def _learn(
    system: TwinRL, learner: Worker, seconds: float, products: int, prefetch: bool
) -> dict[str, float]:
    system.writer.send("pace", seconds=seconds, rate=PACE)
    arguments = {"seconds": seconds, "products": products, "prefetch": prefetch}
    found = learner.ask("learn", 120 + seconds, **arguments)
    system.writer.receive(60 + seconds)
    return {**found, "waited_share": found["waited_s"] / found["seconds"]}
