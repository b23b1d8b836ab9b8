"""What a version of the weights costs on its way: into actors of this host, of the learner's time, over a slow link.

    python -m benchmarks.weights [--quick] [--rows channel,stall,link] [--json FILE]

channel  500 MB from `publish` until the first of n Ray actors has them, compared with their checksum, as views;
         against numpy's copy of as many bytes, in the same rounds. Beside it Ray's object store, put from the same
         arrays and checked by the reader. Rounds before every file and map exists are rows of their own ("first").
stall    updates of a plain network with Adam, a version published after each, and of the demo's policy, which is
         published every 50 updates: what `publish` takes of them, and how much slower they are than without.
link     one Adam step of a 50 MB model to a member behind a 20 Mbit/s link (a token bucket in a process of its own):
         from `publish` until it has the new version, decoded and compared. Sizes at other learning rates.

Other programs' use of the processors is measured beside every row (`others`, cores). Rounds wait for quiet moments, not
for ever, and figures are medians of the quiet rows where there are at least 3, else of all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks._others import QUIET, Others
from benchmarks._slow_link import SlowLink
from benchmarks.replay import machine
from twinrl.config import load_config
from twinrl.weights import checksum
from twinrl.weights_publisher import KEEP, Publisher
from twinrl.weights_slots import slots_folder

CROWDS = (1, 4, 16)  # actors
WARM = KEEP + 3  # rounds until each file was written and mapped once
MBIT_S = 20.0
RATES = (3e-4, 3e-5, 3e-6)
WIDTH = 2048  # of the network: 12.6 million parameters, 50 MB
BATCH = 256  # the default of real_rl.batch_size
Row = dict[str, Any]


class Size(NamedTuple):
    """How much is measured."""

    nbytes: int = 500_000_000  # of the set that actors get
    crowds: tuple[int, ...] = CROWDS
    rounds: int = 9
    demo_updates: int = 20
    networks: tuple[tuple[int, int], ...] = (
        (WIDTH, 12),
        (6455, 3),
    )  # width, updates: 50 and 500 MB
    width: int = WIDTH  # of the network behind the link
    steps: int = 100  # of Adam before the one that is sent
    patience: float = 30.0  # s that a group of rounds may wait for quiet moments


QUICK = Size(100_000_000, rounds=3, demo_updates=10, networks=((WIDTH, 6),), steps=20, patience=3.0)
TINY = Size(20_000_000, (1,), 1, 2, ((64, 2),), 256, 2, 0.0)  # for the tests


def make_arrays(nbytes: int) -> dict[str, np.ndarray]:
    """`nbytes` in matrices of 20 MB."""
    rng, count = np.random.default_rng(0), nbytes // 20_000_000
    each = rng.normal(0, 0.02, (nbytes // count // 4 // 1000, 1000)).astype(np.float32)
    return {f"layer{i}.weight": each + np.float32(i) for i in range(count)}


def copy_seconds(arrays: dict[str, np.ndarray], into: dict[str, np.ndarray]) -> float:
    """One plain copy of the set, between memory that was touched before."""
    start = time.perf_counter()
    for name, array in arrays.items():
        np.copyto(into[name], array)
    return time.perf_counter() - start


def quiet_rounds(wanted: int, patience: float, measure: Callable[[], Row]) -> list[Row]:
    """Rows of `measure()` until `wanted` of them are quiet, twice as many at most."""
    others, rows = Others(), []
    while sum(row["others"] <= QUIET for row in rows) < wanted:
        if len(rows) >= wanted * (2 if patience > 0 else 1):
            break
        patience = others.wait(max(patience, 0.0))
        others.start()
        row = measure()
        rows.append({**row, "others": others.cores()})
        show(rows[-1])
    return rows


def show(row: Row) -> None:
    """Print a row."""
    print(
        "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in row.items()),
        flush=True,
    )


class Member:
    """An actor that waits for weights and says when it has them."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def adopt(self, newer_than: int) -> float:
        """The system-wide monotonic time at which a newer version is here and compared."""
        weights = self._source.wait(newer_than, 120.0)
        now = time.monotonic()
        assert weights.verified and weights.arrays
        return now

    def adopt_object(self, boxed: list[Any], published: int) -> float:
        """The same for an object of Ray's store."""
        import ray

        arrays = ray.get(boxed[0])
        assert checksum(arrays) == published
        return time.monotonic()


@contextlib.contextmanager
def cluster(store_mb: int) -> Iterator[str]:
    """A local Ray and a run's folder."""
    import ray

    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    ray.init(
        num_cpus=2,
        object_store_memory=store_mb << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    try:
        with tempfile.TemporaryDirectory(prefix="weights-") as folder:
            yield folder
    finally:
        ray.shutdown()


def channel(size: Size) -> list[Row]:
    """Into the first of n actors of this host."""
    import shutil

    arrays = make_arrays(size.nbytes)
    into = {name: np.zeros_like(array) for name, array in arrays.items()}
    copy_seconds(arrays, into)
    rows: list[Row] = []
    with cluster(100) as folder:
        try:
            for actors in size.crowds:
                rows += _crowd(folder, arrays, into, actors, size)
        finally:
            shutil.rmtree(slots_folder(folder), ignore_errors=True)
    with cluster(100 + (size.nbytes * 5 >> 20)):
        rows += _objects(arrays, into, 1, size)
    return rows


def _crowd(folder: str, arrays: Any, into: Any, actors: int, size: Size) -> list[Row]:
    import ray

    from deploy.ray_weights import STORE, RayWeightSink, RayWeightSource, WeightStore

    store = ray.remote(WeightStore).options(name=STORE, num_cpus=0).remote(folder)
    sink = RayWeightSink(folder)
    kind = ray.remote(Member).options(num_cpus=0)
    members = [kind.remote(RayWeightSource(folder)) for _ in range(actors)]
    version = sink.newest()

    def measure() -> Row:
        nonlocal version
        waiting = [member.adopt.remote(version) for member in members]
        time.sleep(0.3 + 0.05 * actors)  # all wait
        copied = copy_seconds(arrays, into)
        version += 1
        start = time.monotonic()
        sink.publish(version, arrays)
        lost = time.monotonic() - start
        there = sorted(at - start for at in ray.get(waiting, timeout=120))
        sink.flush()
        return {
            "rows": "channel",
            "what": "shared memory",
            "actors": actors,
            "MB": sum(a.nbytes for a in arrays.values()) / 1e6,
            "memcpy_ms": copied * 1e3,
            "publish_ms": lost * 1e3,
            "first_ms": there[0] * 1e3,
            "last_ms": there[-1] * 1e3,
            "vs_memcpy": copied / there[0],
        }

    rows = [{**measure(), "what": "shared memory, first"} for _ in range(WARM)]
    rows += quiet_rounds(size.rounds, size.patience, measure)
    sink.close()
    for actor in (store, *members):
        ray.kill(actor)
    while _there(STORE):
        time.sleep(0.05)
    return rows


def _there(name: str) -> bool:
    import ray

    try:
        ray.get_actor(name)
    except ValueError:
        return False
    return True


def _objects(arrays: Any, into: Any, actors: int, size: Size) -> list[Row]:
    """The way before: the caller puts, the actor gets."""
    import ray

    members = [ray.remote(Member).options(num_cpus=0).remote(None) for _ in range(actors)]
    kept: list[Any] = []

    def measure() -> Row:
        copied = copy_seconds(arrays, into)
        start = time.monotonic()
        kept.append(ray.put(arrays))
        lost = time.monotonic() - start
        del kept[:-KEEP]
        published = checksum(arrays)
        there = ray.get([m.adopt_object.remote([kept[-1]], published) for m in members])
        return {
            "rows": "channel",
            "what": "Ray's store",
            "actors": actors,
            "memcpy_ms": copied * 1e3,
            "publish_ms": lost * 1e3,
            "first_ms": (min(there) - start) * 1e3,
            "vs_memcpy": copied / (min(there) - start),
        }

    # Its allocator needs longer until all pages are touched.
    rows = [{**measure(), "what": "Ray's store, first"} for _ in range(WARM + 4)]
    return rows + quiet_rounds(size.rounds, size.patience, measure)


@contextlib.contextmanager
def publishing() -> Iterator[tuple[Path, Publisher]]:
    """A run's folder and a publisher."""
    with tempfile.TemporaryDirectory(prefix="weights-") as folder:
        publisher = Publisher(slots_folder(folder))
        try:
            yield Path(folder), publisher
        finally:
            publisher.close(remove=True)


class Network:
    """A plain regression that Adam trains: every parameter gets a gradient in every step."""

    def __init__(self, width: int, rate: float, layers: int = 3) -> None:
        import torch

        torch.manual_seed(0)
        torch.set_num_threads(1)
        sizes = [torch.nn.Linear(width, width) for _ in range(layers)]
        modules = [m for linear in sizes for m in (linear, torch.nn.GELU())][:-1]
        self.module = torch.nn.Sequential(*modules)
        self._target = torch.nn.Linear(width, width)
        self._optimiser = torch.optim.Adam(self.module.parameters(), rate, fused=True)
        self._width, self._torch = width, torch

    def update(self, batch: int) -> None:
        """One step on `batch` fresh examples."""
        seen = self._torch.randn(batch, self._width)
        with self._torch.no_grad():
            wanted = self._target(seen).tanh()
        loss = (self.module(seen) - wanted).square().mean()
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step()

    def arrays(self) -> dict[str, np.ndarray]:
        """Views of the parameters."""
        return {k: v.detach().numpy() for k, v in self.module.state_dict().items()}


class DemoPolicy:
    """The demo's policy, and the cheapest of its updates: the flow head's, on a frozen encoder."""

    def __init__(self) -> None:
        import torch

        from deploy.description import describe_job
        from learner.algorithms.sft import SFT, SFTConfig
        from learner.dataset import Windows
        from policies.registry import make_policy
        from policies.weights import to_arrays

        torch.manual_seed(0)
        torch.set_num_threads(1)
        policy = describe_job(load_config("configs/demo.yaml"))["policy"]
        rng, n, size, chunk = np.random.default_rng(0), 512, policy["image_size"], policy["chunk"]
        images = {
            f"observation.images.{camera}": rng.integers(0, 256, (n, size, size, 3), np.uint8)
            for camera in policy["cameras"]
        }
        state = rng.normal(size=(n, policy["state_dim"])).astype(np.float32)
        action = rng.normal(0, 0.01, (n, chunk, 7)).astype(np.float32)
        data = Windows(
            images, state, action, np.ones((n, chunk), np.float32), np.zeros(n, int), ["go"] * n
        )
        self.policy, self._to_arrays = make_policy(policy), to_arrays
        self.policy.fit_actions(action.reshape(-1, 7))
        self._algorithm = SFT(self.policy, SFTConfig(shares={"demo": 1.0}), data, 0)

    def update(self, batch: int) -> None:
        """One step; `batch` windows are the algorithm's own default."""
        assert batch == self._algorithm.config.batch
        self._algorithm.update()

    def arrays(self) -> dict[str, np.ndarray]:
        """What the learner publishes."""
        return self._to_arrays(self.policy)


def stall(size: Size) -> list[Row]:
    """What publishing takes of updates, each of which is published."""
    every = load_config("configs/demo.yaml").real_rl.publish_every
    rows = _stall("demo's policy, SFT", DemoPolicy(), size, size.demo_updates, every)
    for width, updates in size.networks:
        rows += _stall(f"3 x {width} x {width}", Network(width, 3e-5), size, updates)
    return rows


def _stall(what: str, network: Any, size: Size, updates: int, every: int = 1) -> list[Row]:
    nbytes = sum(array.nbytes for array in network.arrays().values())
    with publishing() as (_, publisher):
        version = -1
        for _ in range(WARM):
            version += 1
            publisher.publish(version, network.arrays())
            publisher.flush()
        network.update(BATCH)

        def measure() -> Row:
            nonlocal version
            plain = [_timed(lambda: network.update(BATCH)) for _ in range(updates)]
            with_it, lost = [], []
            for _ in range(updates):
                version += 1
                lost.append(_timed(lambda v=version: publisher.publish(v, network.arrays())))
                with_it.append(lost[-1] + _timed(lambda: network.update(BATCH)))
            return {
                "rows": "stall",
                "what": what,
                "MB": nbytes / 1e6,
                "update_ms": statistics.median(plain) * 1e3,
                "with_publish_ms": statistics.median(with_it) * 1e3,
                "publish_ms": statistics.median(lost) * 1e3,
                "every": every,
                "share": statistics.median(lost) / statistics.median(plain) / every,
                "slower": statistics.median(with_it) / statistics.median(plain) - 1,
            }

        rows = quiet_rounds(3, size.patience, measure)
    return rows


def link(size: Size) -> list[Row]:
    """One Adam step over a slow link, and how large it is at other learning rates."""
    rows = _over_link(size, 3e-5, 3)
    sizes = [_sizes(size, rate) for rate in RATES]
    for row in sizes:
        show(row)
    return rows + sizes


def _sizes(size: Size, rate: float) -> Row:
    from twinrl.weights_delta import encode, round_weights

    network = Network(size.width, rate)
    for _ in range(size.steps):
        network.update(64)
    before = round_weights(0, network.arrays())
    network.update(64)
    after = round_weights(1, network.arrays())
    start = time.perf_counter()
    delta = encode(after, before)
    took, snapshot = time.perf_counter() - start, encode(after)
    changed = sum(int((after.tensors[n] != before.tensors[n]).sum()) for n in after.tensors)
    return {
        "rows": "link",
        "what": "sizes",
        "rate": rate,
        "steps_before": size.steps,
        "changed": changed / sum(array.size for array in after.tensors.values()),
        "bf16_MB": after.nbytes / 1e6,
        "snapshot_MB": len(snapshot) / 1e6,
        "delta_MB": len(delta) / 1e6,
        "ratio": after.nbytes / len(delta),
        "encode_ms": took * 1e3,
    }


def _over_link(size: Size, rate: float, rounds: int) -> list[Row]:
    from robot_bridge import protocol
    from robot_bridge.gateway import Gateway
    from twinrl.core.keys import Keys, create_keys
    from twinrl.core.segment import Schema
    from twinrl.core.sockets import free_port
    from twinrl.weights_client import WeightClient

    schema = Schema(state_dim=3, privileged_dim=0, cameras=(), image_size=16, chunk=2)
    job = protocol.make_job(schema, {"run": "bench", "task": "none", "instruction": ""})
    network = Network(size.width, rate)
    for _ in range(size.steps):
        network.update(64)
    with publishing() as (folder, publisher):
        create_keys(folder / "keys")
        port = free_port()
        gateway = Gateway(folder, f"tcp://127.0.0.1:{port}", "", "tcp://127.0.0.1:1", job).start()
        slow = SlowLink(port, MBIT_S)
        key = Keys.load(folder / "keys/robot.key")
        member = WeightClient(f"tcp://127.0.0.1:{slow.port}", key)
        version = -1

        def measure() -> Row:
            nonlocal version
            version += 1
            if version:
                network.update(64)
            before = member.stats()
            start = time.perf_counter()
            publisher.publish(version, network.arrays())
            member.wait(version - 1, 120.0)
            seconds = time.perf_counter() - start
            nbytes = member.stats()["weights/bytes"] - before["weights/bytes"]
            return {
                "rows": "link",
                "what": "step" if version else "snapshot",
                "rate": rate,
                "steps_before": size.steps,
                "seconds": seconds,
                "sent_MB": nbytes / 1e6,
                "link_alone_s": nbytes * 8 / MBIT_S / 1e6,
            }

        rows = [measure(), *quiet_rounds(rounds, size.patience, measure)]
        member.close()
        slow.cut()
        gateway.close()
    return rows


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def figures(rows: list[Row]) -> dict[str, float]:
    """Medians of the rows, by the keys that stay."""

    def middle(key: str, **which: Any) -> float | None:
        found = [r for r in rows if all(r.get(k) == v for k, v in which.items())]
        quiet = [r for r in found if r.get("others", 0.0) <= QUIET]
        values = [r[key] for r in (quiet if len(quiet) >= 3 else found)]
        return statistics.median(values) if values else None

    found: dict[str, float | None] = {}
    for actors in CROWDS:
        mine = {"rows": "channel", "what": "shared memory", "actors": actors}
        found[f"weights_vs_memcpy_{actors}"] = middle("vs_memcpy", **mine)
        found[f"weights_first_ms_{actors}"] = middle("first_ms", **mine)
        found[f"weights_last_ms_{actors}"] = middle("last_ms", **mine)
    found["weights_vs_memcpy_ray_store"] = middle("vs_memcpy", rows="channel", what="Ray's store")
    found["memcpy_ms"] = middle("memcpy_ms", rows="channel", what="shared memory")
    whats = {row["what"]: row["every"] for row in rows if row["rows"] == "stall"}
    shares = [middle("share", rows="stall", what=what) for what in whats]
    found["publish_stall"] = max((s for s in shares if s is not None), default=None)
    slower = [middle("slower", rows="stall", what=w) for w, every in whats.items() if every == 1]
    found["publish_slower"] = max((s for s in slower if s is not None), default=None)
    found["delta_20mbit_s"] = middle("seconds", rows="link", what="step")
    found["snapshot_20mbit_s"] = middle("seconds", rows="link", what="snapshot")
    for rate in RATES:
        found[f"delta_ratio_{rate:g}"] = middle("ratio", rows="link", what="sizes", rate=rate)
    return {key: value for key, value in found.items() if value is not None}


GROUPS = {"channel": channel, "stall": stall, "link": link}
GOALS = {
    **{f"weights_vs_memcpy_{actors}": (">=", 0.5) for actors in CROWDS},
    "publish_stall": ("<=", 0.02),
    "delta_20mbit_s": ("<=", 3.0),
}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, write the JSON file."""
    parser = argparse.ArgumentParser(prog="benchmarks.weights", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller and within two minutes")
    parser.add_argument("--patience", type=float, help="s to wait for quiet moments, each time")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rows", default=",".join(GROUPS), help="groups, default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="rows of other groups in FILE stay")
    options = parser.parse_args(arguments)
    names = options.rows.split(",")
    if unknown := [name for name in names if name not in GROUPS]:
        parser.error(f"no rows {unknown[0]!r}; there are {', '.join(GROUPS)}")
    size = TINY if options.tiny else QUICK if options.quick else Size()
    if options.patience is not None:
        size = size._replace(patience=options.patience)
    if arguments is None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # shared memory is given back
    command = ["python", "-m", "benchmarks.weights"]
    command += sys.argv[1:] if arguments is None else arguments
    report: dict[str, Any] = {"machine": machine(), "command": shlex.join(command)}
    report |= {"figures": {}, "groups": {}, "rows": []}
    if options.json and Path(options.json).exists():
        before = json.loads(Path(options.json).read_text())
        report |= {"groups": before["groups"], "rows": before["rows"]}
    for name in names:
        load = os.getloadavg()[0]
        rows = GROUPS[name](size)
        report["rows"] = [row for row in report["rows"] if row["rows"] != name] + rows
        report["groups"][name] = {
            "command": report["command"],
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "quiet_rows": sum(row.get("others", 9.0) <= QUIET for row in rows),
            "load_before": round(load, 2),
            "load_after": round(os.getloadavg()[0], 2),
        }
        report["figures"] = figures(report["rows"])
        if options.json:
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    print()
    for key, value in report["figures"].items():
        sign, goal = GOALS.get(key, ("", 0.0))
        reached = value >= goal if sign == ">=" else value <= goal
        verdict = f"{sign} {goal:g}  {'reached' if reached else 'MISSED'}" if sign else ""
        print(f"{key:<30}{value:10.4g}  {verdict}")


if __name__ == "__main__":
    main()
