"""What an environment costs beyond its physics and its images, beside other ways to have many of them.

    python -m benchmarks.envs [--quick] [--rows steps,images,...] [--device cpu|cuda] [--json FILE]

steps       the whole step without images (clipping, inverse kinematics, observation, reward, success, limits, resets
            with new draws) against bare physics: `mujoco.batch.Batch` with the same controls in the same states, which
            the environment must reach bit for bit
images      the same with both cameras at every step, against bare physics and the tracer called directly: ours
            (`twins.tracer`), and mujoco-warp's on warp's CPU device, which draws the same pictures
randomised  the whole step with every randomisation against none
memory      what each further environment adds to a process, both cameras at 8 pixels
processes   two processes at once against one
actor       a rollout actor without its policy, until the replay service has acknowledged the last segment, against a
            bare loop over the same environment, images at chunk boundaries
async       `gymnasium.vector.AsyncVectorEnv` of single MuJoCo environments with `mujoco.Renderer`, same scene, law and
            images; as many processes as it runs best with; multisampled as it comes, and without
gym_hil     gym-hil's own scene at its own 128 pixels, in its own environment (`make peers`), as many processes as best
border      the same environment behind a process border
cuda        physics and images of mujoco-warp on a GPU (with --device cuda, and then only these)

What is compared takes turns within a round; a ratio is taken within a round, figures are medians, with the lowest and the
highest beside them. `..._cpu` is the same ratio in processor time, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._others import Others
from benchmarks.replay import machine
from benchmarks.replay_bench.processes import PEERS, Worker, built

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
GYM_HIL = PEERS / "gym_hil"


class Size(NamedTuple):
    """How much is measured."""

    rounds: int = 5
    counts: tuple[tuple[int, int], ...] = ((64, 80), (512, 24), (2048, 8))  # environments, steps
    # Pixels, environments, steps.
    images: tuple[tuple[int, int, int], ...] = ((64, 128, 8), (128, 64, 6))
    randomised: tuple[int, int] = (512, 24)
    memory: tuple[int, int] = (256, 2304)  # environments
    fleet: int = 256  # environments of a process, where processes are measured
    seconds: float = 6.0  # of a phase of a process
    actor: tuple[int, int] = (128, 16)  # environments, chunks
    crowds: tuple[int, ...] = (1, 2, 4)  # a peer's processes for each core; the best counts
    cuda: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    patience: float = 20.0  # s that a round may wait for a quiet moment


QUICK = Size(3, ((64, 16), (512, 3)), ((64, 64, 3), (128, 32, 2)), (128, 12), (64, 576), 64, 2.0)
QUICK = QUICK._replace(actor=(32, 8), crowds=(1, 2), cuda=(256, 1024), patience=0.0)
TINY = Size(1, ((8, 4),), ((64, 4, 2),), (8, 4), (8, 40), 8, 0.3, (8, 2), (1,), (4,), 0.0)


class Rounds:
    """Rounds of measurements, each with what other programs used meanwhile."""

    def __init__(self, size: Size) -> None:
        self.size, self._others = size, Others()

    def take(self, group: str, what: Row, measure: Callable[[], Row]) -> list[Row]:
        """`rounds` rows of `measure()`."""
        rows = []
        for number in range(self.size.rounds):
            self._others.wait(self.size.patience)
            self._others.start()
            found = measure()
            rows.append({"rows": group, **what, "round": number, **found})
            rows[-1]["others"] = round(self._others.cores(), 3)
            show(rows[-1])
        return rows


def show(row: Row) -> None:
    """Print a row."""
    print(
        "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
        flush=True,
    )


def _against_bare(rounds: Rounds, group: str, count: int, steps: int, **options: Any) -> list[Row]:
    from benchmarks import _envs_play as playing

    env = playing.make(count, **options)
    recording = playing.record(env, steps)
    kinds = (
        {"": playing.OwnTracer, "_mujoco_warp": playing.MujocoWarp} if env.cameras else {"": None}
    )
    bare = {suffix: playing.Bare(env, 1, tracer) for suffix, tracer in kinds.items()}
    total = count * steps

    def measure() -> Row:
        whole = playing.play(env, recording)
        row = {"env_us": whole.seconds / total * 1e6}
        for suffix, each in bare.items():
            raw = each.play(recording)
            row[f"bare{suffix}_us"] = raw.seconds / total * 1e6
            row[f"ratio{suffix}"] = raw.seconds / whole.seconds
            row[f"cpu{suffix}"] = raw.processor / whole.processor
        return row

    resets = sum(len(ended) for ended, _ in recording.resets)
    what = {"envs": count, "px": env.image_size if env.cameras else 0, "resets": resets / total}
    measure()  # whatever is done once
    rows = rounds.take(group, what, measure)
    env.close()
    return rows


def steps(rounds: Rounds) -> list[Row]:
    """The whole step without images."""
    return [
        row
        for count, length in rounds.size.counts
        for row in _against_bare(rounds, "steps", count, length, render=False)
    ]


def images(rounds: Rounds) -> list[Row]:
    """The whole step with images."""
    return [
        row
        for px, count, length in rounds.size.images
        for row in _against_bare(rounds, "images", count, length, image_size=px)
    ]


def randomised(rounds: Rounds) -> list[Row]:
    """The whole step with and without randomisation."""
    from benchmarks import _envs_play

    count, length = rounds.size.randomised
    kinds = {
        kind: _envs_play.make(count, render=False, randomisation=kind) for kind in ("none", "full")
    }
    recordings = {kind: _envs_play.record(env, length) for kind, env in kinds.items()}

    def measure() -> Row:
        none, full = (_envs_play.play(env, recordings[kind]) for kind, env in kinds.items())
        each = 1e6 / count / length
        return {
            "none_us": none.seconds * each,
            "full_us": full.seconds * each,
            "ratio": none.seconds / full.seconds,
            "cpu": none.processor / full.processor,
        }

    measure()
    return rounds.take("randomised", {"envs": count}, measure)


def _worker(name: str, folder: str, **environment: str) -> Worker:
    before = dict(os.environ)
    os.environ.update(environment)  # the worker inherits it
    try:
        return Worker(name, [sys.executable, "-m", "benchmarks._envs_worker"], Path(folder))
    finally:
        os.environ.clear()
        os.environ.update(before)


def memory(rounds: Rounds) -> list[Row]:
    """What an environment adds to the process that holds it."""

    def held(count: int, folder: str) -> float:
        worker = _worker("memory", folder)
        try:
            worker.ask("open", 300.0, count=count, image_size=8, randomisation="full")
            return worker.ask("memory", 300.0)["kib"]
        finally:
            worker.close()

    few, many = rounds.size.memory
    images_kib = (
        2 * 2 * 16 * 16 * 3 / 1024
    )  # two cameras, in the environment and in the last result

    def measure() -> Row:
        with tempfile.TemporaryDirectory(prefix="envs-") as folder:
            small, large = held(few, folder), held(many, folder)
        each = (large - small) / (many - few) - images_kib
        return {"few_MiB": small / 1024, "many_MiB": large / 1024, "kib_per_env": each}

    return rounds.take("memory", {"few": few, "many": many}, measure)


def processes(rounds: Rounds) -> list[Row]:
    """Two processes at once against one."""
    rows = []
    for options in ({"render": False}, {"image_size": 64}):
        with tempfile.TemporaryDirectory(prefix="envs-") as folder:
            pair = [_worker(f"fleet{n}", folder) for n in range(2)]
            for worker in pair:
                worker.ask("open", 300.0, count=rounds.size.fleet, **options)

            def measure(pair: list[Worker] = pair) -> Row:
                alone = pair[0].ask("run", 300.0, seconds=rounds.size.seconds)["per_s"]
                for worker in pair:
                    worker.send("run", seconds=rounds.size.seconds)
                both = sum(worker.receive(300.0)["per_s"] for worker in pair)
                return {"one_per_s": alone, "two_per_s": both, "ratio": both / alone}

            what = {"envs": rounds.size.fleet, "px": options.get("image_size", 0)}
            rows += rounds.take("processes", what, measure)
            for worker in pair:
                worker.close()
    return rows


def actor(rounds: Rounds) -> list[Row]:
    """A rollout actor that writes acknowledged segments against its bare environment."""
    from benchmarks._envs_actor import Actors

    count, chunks = rounds.size.actor
    actors = Actors(count, 64)

    def measure() -> Row:
        alone, writing = actors.bare(chunks), actors.collect(chunks)
        return {"env_per_s": alone, "actor_per_s": writing, "ratio": writing / alone}

    try:
        measure()
        return rounds.take("actor", {"envs": count, "px": 64}, measure)
    finally:
        actors.close()


def _beside(rounds: Rounds, group: str, px: int, peer: Worker, opening: list[Row]) -> list[Row]:
    """Rows of our environment on all cores beside a peer's, in the form of `opening` that serves the peer best."""
    seconds, cores = rounds.size.seconds, len(os.sched_getaffinity(0))

    def rate(form: Row) -> float:
        peer.ask("open_async", 600.0, **form)
        peer.ask("run_async", 300.0, seconds=seconds / 2)
        return peer.ask("run_async", 300.0, seconds=seconds)["per_s"]

    best = max(opening, key=rate)
    peer.ask("open_async", 600.0, **best)
    with tempfile.TemporaryDirectory(prefix="envs-") as folder:
        own = _worker("own", folder)
        try:
            own.ask("open", 300.0, count=rounds.size.fleet, image_size=px, threads=cores)

            def measure() -> Row:
                mine = own.ask("run", 300.0, seconds=seconds)["per_s"]
                theirs = peer.ask("run_async", 300.0, seconds=seconds)["per_s"]
                return {"env_per_s": mine, "peer_per_s": theirs, "ratio": mine / theirs}

            what = {"envs": rounds.size.fleet, "px": px, "threads": cores}
            what |= {"peer_processes": best["count"], "samples": best.get("samples", -1)}
            rows = rounds.take(group, what, measure)
        finally:
            own.close()
    peer.ask("close_async", 60.0)
    return rows


def _crowds(size: Size) -> list[int]:
    """How many processes a peer is tried with."""
    cores = len(os.sched_getaffinity(0))
    return [cores * n for n in size.crowds]


def async_vector(rounds: Rounds) -> list[Row]:
    """`AsyncVectorEnv` with images of 64 pixels."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="envs-") as folder:
        peer = _worker("async", folder, MUJOCO_GL=os.environ.get("MUJOCO_GL", "egl"))
        try:
            for samples in (4, 0):
                forms = [
                    {"count": n, "image_size": 64, "samples": samples} for n in _crowds(rounds.size)
                ]
                rows += _beside(rounds, "async", 64, peer, forms)
        finally:
            peer.close()
    return rows


def gym_hil(rounds: Rounds) -> list[Row]:
    """gym-hil with its images of 128 pixels, in its own environment."""
    python = GYM_HIL / "venv" / "bin" / "python"
    if not built("gym_hil"):
        print("gym_hil: left out, its environment is not built: make peers", flush=True)
        return []
    with tempfile.TemporaryDirectory(prefix="envs-") as folder:
        before = os.environ.get("MUJOCO_GL")
        os.environ["MUJOCO_GL"] = before or "egl"
        try:
            peer = Worker("gym_hil", [str(python), str(GYM_HIL / "measure.py")], Path(folder))
        finally:
            if before is None:
                del os.environ["MUJOCO_GL"]
        try:
            return _beside(
                rounds, "gym_hil", 128, peer, [{"count": n} for n in _crowds(rounds.size)]
            )
        finally:
            peer.close()


def border(rounds: Rounds) -> list[Row]:
    """What the process border takes of the throughput, see `benchmarks.envs_border`."""
    if importlib.util.find_spec("benchmarks.envs_border") is None:
        print("border: left out, benchmarks.envs_border is not there", flush=True)
        return []
    from benchmarks import envs_border

    found = envs_border.measure(quick=rounds.size.rounds < Size().rounds)
    rows = found if isinstance(found, list) else found.get("rows", [found])
    return [{"rows": "border", **row} for row in rows]


def cuda(rounds: Rounds) -> list[Row]:
    """mujoco-warp on a GPU: control steps a second without images, and with both cameras."""
    from benchmarks import _envs_cuda

    return [
        row
        for px in (0, 64, 128)
        for count in rounds.size.cuda
        for row in rounds.take(
            "cuda", {"envs": count, "px": px}, _envs_cuda.measure(count, px, rounds.size.seconds)
        )
    ]


GROUPS: dict[str, Callable[[Rounds], list[Row]]] = {
    "steps": steps,
    "images": images,
    "randomised": randomised,
    "memory": memory,
    "processes": processes,
    "actor": actor,
    "async": async_vector,
    "gym_hil": gym_hil,
    "border": border,
    "cuda": cuda,
}
CPU = [name for name in GROUPS if name != "cuda"]


class Figure(NamedTuple):
    """A figure that the page of benchmarks shows."""

    key: str
    text: str
    goal: str
    rows: str
    value: str = "ratio"
    where: dict[str, Any] = {}  # noqa: RUF012  (never changed)


FIGURES = (
    *(
        Figure(f"step_vs_raw_{n}", f"whole step against bare physics, {n:,} environments", ">= 0.85", "steps", where={"envs": n})
        for n in (64, 512, 2048)
    ),
    *(
        Figure(f"image_step_vs_raw_{px}px", f"whole step with two images of {px} px against bare physics and tracing", ">= 0.9", "images", where={"px": px})
        for px in (64, 128)
    ),
    *(
        Figure(f"image_step_vs_mujoco_warp_{px}px", f"the same against bare physics and mujoco-warp's tracer on its CPU device, {px} px", ">= 0.9", "images", "ratio_mujoco_warp", {"px": px})
        for px in (64, 128)
    ),
    Figure("actor_vs_env", "rollout actor without policy, writing acknowledged segments, against its bare environment", ">= 0.9", "actor"),
    Figure("kib_per_env", "memory of each further environment beyond its images, KiB", "<= 20", "memory", "kib_per_env"),
    Figure("two_process_scaling", "two processes against one, without images", ">= 1.9", "processes", where={"px": 0}),
    Figure("two_process_scaling_64px", "the same with two images of 64 px in each step", "", "processes", where={"px": 64}),
    Figure("vs_async_vector", "against AsyncVectorEnv with `mujoco.Renderer` as it comes (4 samples a pixel), two images of 64 px", ">= 4", "async", where={"samples": 4}),
    Figure("vs_async_vector_1_sample", "the same without its multisampling (we have none either)", ">= 4", "async", where={"samples": 0}),
    Figure("vs_gym_hil", "against gym-hil in its own scene, two images of 128 px", ">= 4", "gym_hil"),
    Figure("randomised_vs_plain", "step with every randomisation against none", ">= 0.95", "randomised"),
    Figure("process_border", "throughput that a process border takes, 512 environments with images of 64 px", "<= 0.05", "border", "process_border"),
)  # fmt: skip


def figures(rows: list[Row]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Medians by key, and their lowest and highest."""
    middle, spread = {}, {}

    def put(key: str, values: list[float]) -> None:
        if values:
            middle[key], spread[key] = statistics.median(values), [min(values), max(values)]

    def pick(group: str, value: str, where: dict[str, Any]) -> list[float]:
        return [
            row[value]
            for row in rows
            if row["rows"] == group and value in row and all(row[k] == v for k, v in where.items())
        ]

    for figure in FIGURES:
        put(figure.key, pick(figure.rows, figure.value, figure.where))
        if figure.value == "ratio":  # the same in processor time, which other programs disturb less
            put(f"{figure.key}_cpu", pick(figure.rows, "cpu", figure.where))
    rates = {
        (r["rows"], r["envs"], r["px"]) for r in rows if r["rows"] in ("steps", "images", "cuda")
    }
    for group, count, px in sorted(rates):
        where = {"envs": count, "px": px}
        if group == "cuda":
            put(f"cuda_per_s_{count}_{px}px", pick(group, "env_per_s", where))
        else:
            put(f"env_us_{count}_{px}px", pick(group, "env_us", where))
            put(f"bare_us_{count}_{px}px", pick(group, "bare_us", where))
    return middle, spread


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write the JSON file after each group."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.envs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="smaller, some minutes")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", help=f"groups, of {', '.join(CPU)}; default: all")
    parser.add_argument("--json", metavar="FILE", help="rows of other groups in FILE stay")
    options = parser.parse_args(arguments)
    names = (
        options.rows.split(",") if options.rows else ["cuda"] if options.device == "cuda" else CPU
    )
    if unknown := [name for name in names if name not in GROUPS]:
        parser.error(f"no rows {unknown[0]!r}; there are {', '.join(GROUPS)}")
    size = TINY if options.tiny else QUICK if options.quick else Size()
    command = ["python", "-m", "benchmarks.envs"]
    command += sys.argv[1:] if arguments is None else arguments
    report: dict[str, Any] = {"machine": machine(), "command": shlex.join(command)}
    report |= {"figures": {}, "spread": {}, "groups": {}, "rows": []}
    if options.json and Path(options.json).exists():
        before = json.loads(Path(options.json).read_text())
        report |= {"groups": before["groups"], "rows": before["rows"]}
    rounds = Rounds(size)
    for name in names:
        load, start = os.getloadavg()[0], time.monotonic()
        rows = GROUPS[name](rounds)
        report["rows"] = [row for row in report["rows"] if row["rows"] != name] + rows
        report["groups"][name] = {
            "command": report["command"],
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "took_s": round(time.monotonic() - start, 1),
            "load_before": round(load, 2),
            "load_after": round(os.getloadavg()[0], 2),
        }
        report["figures"], report["spread"] = figures(report["rows"])
        if options.json:
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    print()
    goals = {figure.key: figure.goal for figure in FIGURES}
    for key, value in report["figures"].items():
        low, high = report["spread"][key]
        print(f"{key:<28}{value:10.4g}  [{low:.4g}, {high:.4g}]  {goals.get(key, '')}")


if __name__ == "__main__":
    main()
