"""Rows of what is kept: bare sequential writing against ours, memory and disk per raw byte, restart."""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.protocol import load
from benchmarks.replay_bench.at_once import OPTIONS, ours
from benchmarks.replay_bench.bench import Bench, Row, rates, running
from benchmarks.replay_bench.systems import TwinRL
from benchmarks.replay_bench.workload import CHUNK, STEPS
from buffer_service.client import Reader
from buffer_service.files import FILE_BYTES
from twinrl.core.codec import STORAGE


def disk(bench: Bench) -> list[Row]:
    """Ours, writing alone, against a process that only appends the same bytes with the same syncing."""
    workload = bench.workload
    systems = ours(bench, workload, ["files everysec", "files always", "redis everysec"])
    segments = [list(columns.values()) for columns in load(str(bench.data(workload)))]
    rows = []
    with running(systems):
        for number in range(bench.rounds):
            for system in systems:
                found, others = bench.phase(lambda s=system: s.write(bench.seconds))
                row = {"rows": "disk", "system": system.name, "round": number, "others": others}
                rows.append(row | rates(found, workload))
            for flush in ("everysec", "always"):
                arguments = (bench.folder / "bare", segments, bench.seconds, flush)
                found, others = bench.phase(lambda a=arguments: write_bare(*a, systems[0].options))
                row = {"rows": "disk", "system": f"bare {flush}", "round": number, "others": others}
                rows.append(row | rates({"write": found}, workload))
    return rows


def write_bare(
    folder: Path, segments: list[list[Any]], seconds: float, flush: str, options: dict[str, Any]
) -> dict[str, Any]:
    """Append `segments` in turn to files, removing the oldest as ours does; synced after each or once a second."""
    folder.mkdir(exist_ok=True)
    limit = min(FILE_BYTES, max(options["capacity"] // 8, 1 << 20))
    files: list[Path] = []
    full: queue.SimpleQueue[int] = queue.SimpleQueue()  # descriptors to be synced and closed
    stop, swapping = threading.Event(), threading.Lock()
    descriptor, place, count = -1, limit, 0

    def sync_each_second() -> None:
        running = True
        while running:
            running = not stop.wait(1.0)
            with swapping:
                full.put(os.dup(descriptor))
            while not full.empty():
                each = full.get()
                os.fdatasync(each)
                os.close(each)

    syncing = threading.Thread(target=sync_each_second)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        buffers = segments[count % len(segments)]
        if place >= limit:
            files.append(folder / f"{count}")
            fresh = os.open(files[-1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.posix_fallocate(fresh, 0, limit)
            with swapping:
                if count:
                    full.put(descriptor)
                descriptor, place = fresh, 0
            if len(files) * limit > options["capacity"]:
                files.pop(0).unlink()
        place += os.writev(descriptor, buffers)
        if flush == "always":
            os.fdatasync(descriptor)
        if not count:
            syncing.start()
        count += 1
    elapsed = time.perf_counter() - start
    stop.set()
    syncing.join()
    os.close(descriptor)
    for path in files:
        path.unlink()
    return {"transitions": count * STEPS, "seconds": elapsed}


def memory(bench: Bench) -> list[Row]:
    """Memory and disk of a service with `stored_bytes` of images, and how soon it is back after a kill."""
    workload = bench.workload
    transitions = bench.stored_bytes // workload.image_bytes // STEPS * STEPS
    kept = workload._replace(capacity=4 * transitions)  # nothing is evicted
    rows = []
    for codec in ("raw", STORAGE):
        for name in ("files everysec", "redis everysec"):
            if name not in bench.settings:
                continue
            options = OPTIONS[name]
            system = TwinRL(
                f"{name} {codec}", kept, bench.data(workload), bench.folder, codec, **options
            )
            try:
                rows += _stored(bench, system, transitions)
            finally:
                system.close()
    return rows


def _stored(bench: Bench, system: TwinRL, transitions: int) -> list[Row]:
    system.start_service()
    system.writer = system.worker("writer")
    before = time.perf_counter()
    system.writer.ask("fill", 300, transitions=transitions)
    images = transitions // STEPS * (STEPS + 1) * system.workload.image_bytes
    written = time.perf_counter() - before
    time.sleep(bench.settle)
    run = system.folder / "run"
    row: Row = {
        "rows": "memory",
        "system": system.name,
        "round": 0,
        "image_bytes": images,
        "written_in_s": written,
        "process_bytes": sum(map(process_bytes, system.pids())),
        "page_cache_bytes": sum(map(cached_bytes, files_in(run))),
        "disk_bytes": sum(path.stat().st_blocks * 512 for path in files_in(run)),
    }
    row["memory_vs_raw"] = (row["process_bytes"] + row["page_cache_bytes"]) / images
    row["disk_vs_raw"] = row["disk_bytes"] / images
    rows = [row]
    system.writer.close()
    for number in range(bench.restarts):
        (ready, sampled), others = bench.phase(lambda: _restart(system))
        row = {"rows": "memory", "system": system.name, "round": number, "others": others}
        row |= {"ready_s": ready, "sampled_s": sampled}
        rows.append(row | {"rebuild_MB_s": images / sampled / 1e6})
    return rows


def _restart(system: TwinRL) -> tuple[float, float]:
    """Seconds from the start after a kill until the service is ready, and until a first batch is drawn."""
    system.service.kill()
    start = time.perf_counter()
    system.service.start()
    ready = time.perf_counter() - start
    with Reader(system.service.address, system.service.keys()) as reader:
        reader.sample(system.workload.batch, chunk=CHUNK)
    return ready, time.perf_counter() - start


def files_in(folder: Path) -> list[Path]:
    """Every file below `folder`."""
    return [path for path in folder.rglob("*") if path.is_file()]


def process_bytes(pid: int) -> int:
    """A process's memory, its share of what it shares, without mapped segment files (`cached_bytes` has them)."""
    total, counted = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first, *rest = line.split(None, 5)
        if "-" in first and not first.endswith(":"):
            counted = not (rest and rest[-1].endswith(".seg"))
        elif first == "Pss:" and counted:
            total += int(rest[0]) * 1024
    return total


def cached_bytes(path: Path) -> int:
    """How much of a file is in the page cache."""
    size = path.stat().st_size
    if not size:
        return 0
    pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        address, out = ctypes.c_void_p(view.ctypes.data), ctypes.c_void_p(pages.ctypes.data)
        failed = ctypes.CDLL(None, use_errno=True).mincore(address, ctypes.c_size_t(size), out)
        del view
    if failed:
        raise OSError(ctypes.get_errno(), f"mincore of {path}")
    return int((pages & 1).sum()) * mmap.PAGESIZE
