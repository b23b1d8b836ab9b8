"""How fast the replay takes segments in and gives batches out, against a plain memory copy in the same run.

    python -m benchmarks.replay [--quick] [--json FILE]

One writer process, one service process, one reader process (this one), as in a run on one host. A transition
counts with its two camera frames once on insert, and twice in a batch (the window's first and last frame).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from buffer_service.client import Reader, Writer
from buffer_service.testing import ServiceProcess, segment
from twinrl.core.keys import Keys
from twinrl.core.segment import Schema

STEPS = 50  # transitions in a segment
BATCH = 256
CHUNK = 8
COPY_BYTES = 64 << 20  # larger than any cache
CAPACITY = 512 << 20  # reached before the clock starts: steady state, with eviction


def schema_of(size: int) -> Schema:
    """Two cameras of `size` pixels."""
    return Schema(
        state_dim=32, privileged_dim=0, cameras=("front", "wrist"), image_size=size, chunk=CHUNK
    )


def memcpy_rate(seconds: float) -> float:
    """MB/s of numpy's copy between two large arrays that are in memory already."""
    source, target = np.ones(COPY_BYTES, np.uint8), np.zeros(COPY_BYTES, np.uint8)
    np.copyto(target, source)  # the first touch of a page costs more than many copies
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        np.copyto(target, source)
        count += 1
    return count * COPY_BYTES / (time.perf_counter() - start) / 1e6


def write_for(address: str, keys: str, size: int, name: str, seconds: float) -> dict[str, float]:
    """Insert segments for `seconds` s; the clock stops when the last one is acknowledged."""
    schema = schema_of(size)
    ready = [segment(n, STEPS, schema=schema, end="truncated") for n in range(16)]
    nbytes = sum(column.nbytes for column in ready[0][1].values())
    with Writer(address, Keys.load(keys), name, schema=schema, queue_bytes=128 << 20) as writer:
        writer.write(*ready[0])
        writer.flush()
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            writer.write(*ready[count % len(ready)])
            count += 1
        writer.flush()
        elapsed = time.perf_counter() - start
    return {"MB_per_s": count * nbytes / elapsed / 1e6, "steps_per_s": count * STEPS / elapsed}


def sample_while(reader: Reader, running: Callable[[], bool]) -> dict[str, float]:
    """Draw batches into the same arrays while `running`."""
    batch = reader.sample(BATCH, chunk=CHUNK)
    nbytes = sum(array.nbytes for array in batch.values())
    count, start = 0, time.perf_counter()
    while running():
        reader.sample(BATCH, chunk=CHUNK, out=batch)
        count += 1
    elapsed = time.perf_counter() - start
    return {"MB_per_s": count * nbytes / elapsed / 1e6, "windows_per_s": count * BATCH / elapsed}


@contextlib.contextmanager
def writing(service: ServiceProcess, size: int, name: str, seconds: float) -> Iterator[Any]:
    """A writer process; gives its Popen."""
    key = str(service.run_dir / "keys" / "cluster.key")
    arguments = [service.address, key, str(size), name, str(seconds)]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.replay", "--writer", *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.wait(120)


def finish(process: Any) -> dict[str, float]:
    """What a writer process measured."""
    return json.loads(process.communicate(timeout=120)[0])


def rounds(size: int, count: int, seconds: float) -> list[dict[str, Any]]:
    """`count` interleaved rounds of memcpy, insert alone, sample alone and both at once."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="replay-") as folder:
        service = ServiceProcess(Path(folder) / "run", schema_of(size), capacity=CAPACITY)
        for n in range(2):
            with writing(service, size, f"warm{n}", seconds) as process:
                finish(process)
        reader = Reader(service.address, service.keys())
        for n in range(count):
            row: dict[str, Any] = {"image": size, "memcpy_MB_per_s": memcpy_rate(seconds / 4)}
            with writing(service, size, f"alone{n}", seconds) as process:
                row["insert"] = finish(process)
            end = time.perf_counter() + seconds
            row["sample"] = sample_while(reader, lambda end=end: time.perf_counter() < end)
            with writing(service, size, f"both{n}", seconds) as process:
                row["both_sample"] = sample_while(
                    reader, lambda process=process: process.poll() is None
                )
                row["both_insert"] = finish(process)
            rows.append(row)
        reader.close()
        service.stop()
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the rounds; the ratios are taken round by round."""
    size = rows[0]["image"]
    figures = {f"memcpy_MB_per_s_{size}": statistics.median(row["memcpy_MB_per_s"] for row in rows)}
    for key in ("insert", "sample", "both_insert", "both_sample"):
        for unit in rows[0][key]:
            figures[f"{key}_{unit}_{size}"] = statistics.median(row[key][unit] for row in rows)
        figures[f"{key}_of_memcpy_{size}"] = statistics.median(
            row[key]["MB_per_s"] / row["memcpy_MB_per_s"] for row in rows
        )
    return figures


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, write the JSON file."""
    parser = argparse.ArgumentParser(prog="benchmarks.replay", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="within two minutes")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--writer", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.writer:
        address, keys, size, name, seconds = options.writer
        print(json.dumps(write_for(address, keys, int(size), name, float(seconds))))
        return
    rows, figures = [], {}
    print(
        f"{'MB/s':>8} {'memcpy':>8} {'insert':>8} {'sample':>8}   at once: {'insert':>8} {'sample':>8}"
    )
    for size in (64, 128):
        found = rounds(size, 3, 1.5 if options.quick else 5.0)
        rows += found
        mine = summary(found)
        figures |= mine
        print(
            f"{size:>4} px "
            f"{mine[f'memcpy_MB_per_s_{size}']:>9.0f} {mine[f'insert_MB_per_s_{size}']:>8.0f} "
            f"{mine[f'sample_MB_per_s_{size}']:>8.0f}            "
            f"{mine[f'both_insert_MB_per_s_{size}']:>8.0f} {mine[f'both_sample_MB_per_s_{size}']:>8.0f}"
        )
        print(
            f"   of memcpy     1.00 {mine[f'insert_of_memcpy_{size}']:>8.2f} "
            f"{mine[f'sample_of_memcpy_{size}']:>8.2f}            "
            f"{mine[f'both_insert_of_memcpy_{size}']:>8.2f} {mine[f'both_sample_of_memcpy_{size}']:>8.2f}"
        )
    if options.json:
        report = {
            "machine": {
                "system": platform.platform(),
                "cpus": os.cpu_count(),
                "python": platform.python_version(),
                "load": os.getloadavg()[0],
            },
            "command": shlex.join(["python", "-m", "benchmarks.replay", *(sys.argv[1:])]),
            "figures": figures,
            "rows": rows,
        }
        Path(options.json).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
