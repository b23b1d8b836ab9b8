"""`python scripts/benchmark_docs.py`: writes docs/benchmarks.md from benchmarks/results/*.json; `--check` only compares."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks are no package of the distribution

from benchmarks import envs, inference, learner, robot_loop  # noqa: E402
from benchmarks.replay_bench.bench import Row  # noqa: E402
from benchmarks.replay_bench.figures import CALM, FIGURES, medians  # noqa: E402

PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {
    "files-everysec": "TwinRL, segment files, synced every second (default)",
    "files-always": "TwinRL, segment files, synced before the acknowledgement",
    "files-never": "TwinRL, segment files, never synced",
    "redis-everysec": "TwinRL, payload in Redis, log synced every second",
    "redis-always": "TwinRL, payload in Redis, log synced before the acknowledgement",
    "redis-never": "TwinRL, payload in Redis, log never synced",
    "reverb": "dm-reverb 0.14",
    "torchrl": "TorchRL 0.14 LazyMemmapStorage",
    "redis_pickle": "pickled transitions in plain Redis",
    "zmq_pickle": "pickles over ZeroMQ REQ/REP, as agentlace does",
}
WEIGHTS = (  # key, what it is, goal
    (
        "weights_vs_memcpy",
        "500 MB of weights into the first of 1, 4, 16 same-host actors, against memcpy (the least of them)",
        ">= 0.5",
    ),
    ("publish_stall", "learner's time lost to publishing, of an update's time", "<= 0.02"),
    (
        "delta_20mbit_s",
        "delta of one Adam step of a 50 MB model over a simulated 20 Mbit/s link, seconds",
        "<= 3",
    ),
)
# Why a goal is missed, for the keys whose figure misses it.
REASONS: dict[str, str] = {
    "insert_memory_vs_reverb": (
        "On two cores the writer, the service and the reader compete, and the reader takes more than its part: it draws "
        "9 times what Reverb's draws meanwhile. What an insert costs does not depend on the syncing, so `never` is no "
        "faster than `everysec`: 1.4 core seconds a GB, of which the writer has 0.9 (0.6 of them the kernel's, copying "
        "into the page cache; the rest checksum and Python) and the service 0.4 (it reads every byte once to compare the "
        "checksum, and maps the pages). A plain copy costs 0.12."
    ),
    "batch_tcp_vs_zmq": (
        "The service encrypts and authenticates every byte (CURVE); bare ZeroMQ with the same encryption reaches only a "
        "quarter of what it reaches without. Against that see `batch_tcp_vs_zmq_curve`: what is missing there is the "
        "service's gathering of the rows and its check of the request, which one thread does between two transfers. A "
        "reader whose cache holds all of the replay fetches each segment once and then draws at memory speed "
        "(`over tcp, cached`)."
    ),
    "p99_vs_p50_4": (
        "Most of it is the scheduler's: four readers, the writers, the service and Redis share two cores, and who has used "
        "his slice waits for everybody else's. Four processes that do nothing but copy 50 MB in the readers' place miss the "
        "goal as well (`p99_vs_p50_4_copies`). A batch takes longer than such a copy, so more of these waits fall into it; "
        "what else is in the difference was not looked into."
    ),
    "p99_vs_p50_64": "As above; see `p99_vs_p50_64_copies`.",
    "two_process_scaling": (
        "The two processes share nothing but the machine, and its two virtual cores do not keep one speed: the same ratio "
        "with images is 1.92 in this run, and a shorter repetition without images gave 2.07 (1.95 to 2.07), with images 1.65 "
        "(1.65 to 2.08). Bare `mujoco.batch.Batch` of the same scene in two processes scattered from 1.98 to 2.33."
    ),
    "updates_vs_bare": (
        "The machine has two cores, and what feeds the learner works on the other: the bare loop itself, beside a process "
        "that does nothing but copy memory, falls to 0.74-0.82 with off-policy RL and to 0.73-0.93 with PPOFlow; beside one "
        "that computes in its cache it stays at 0.93-1.07. With PPOFlow the training thread also waits 11 % of the time for "
        "a core, which writer, service and the reader's threads have (7,700 transitions/s come in); for data it waits 1-5 %, "
        "off-policy RL 0.2 %. Off-policy RL encodes what comes in on the side, which the bare loop does not. Tried: Python's "
        "switch interval at 0.5 instead of 5 ms (no gain beyond the scatter), and batches drawn without their images, as the "
        "features are known (0.88-0.97 instead of 0.80-0.88 in four rounds each; not built: every reader, local, remote and "
        "sharded, would need a second form of a batch, and what to do with a frame that was evicted in between)."
    ),
}
HEAD = """# Benchmarks

Written by `scripts/benchmark_docs.py` from `benchmarks/results/`: measure again, then run
`python scripts/benchmark_docs.py`.

| command | measures | results |
| --- | --- | --- |
| `python -m benchmarks.replay` | the replay service beside other replays, memory, disk and bare sockets | `replay.json` |
| `python -m benchmarks.weights` | weights from the learner to actors and over slow links | `weights.json` |
| `python -m benchmarks.codecs` | image codecs: [codecs](codecs.md) | `codecs.json` |
| `python -m benchmarks.envs` | environments beside bare physics and tracing, and beside other fleets | `envs.json` |
| `python -m benchmarks.envs --device cuda` | the same environments on a GPU | `envs_cuda.json` |
| `python -m benchmarks.learner --full` | training, fed by the replay service beside a bare loop; each size of policy | `learner.json` |
| `python -m benchmarks.inference` | a policy in each rollout actor beside a shared one | `inference.json` |
| `python -m benchmarks.robot_loop` | an arm's control loop: its pace, its limits, and what a failure of anything around it does | `robot_loop.json` |
| `python -m benchmarks.rough_link` | minutes of an arm over lost, doubled, reordered and late packets: [robots](robots.md); the exit status says whether all was well | |

Each takes `--quick` (some minutes at most) and `--json FILE`; `make bench` runs the quick forms of all. The replay's peers
run in environments of their own: `make peers` builds them (1.4 GB); without them their rows are left out. One group of
rows at a time: `--rows at_once,disk`; with `--resume`, groups that FILE has already are not measured again.
"""
METHOD = """## How it is measured

**Workload W.** A transition is two RGB images of 128x128, 32 float32 of state, 4x7 float32 of actions, a reward and four
flags: 98,552 bytes. A writer process inserts segments of 50 transitions, a reader process draws batches of 256 transitions
with their next observations: 50 MB each. The images look rendered, with the noise of a small camera (standard deviation 2
of 255), one camera fixed and one moving; 16 different segments are written in turn. Every system gets the same bytes.
TwinRL stores an action per control step, so W's 4x7 actions are a window of four steps (`chunk=4`), and its next
observation lies four steps on. Small transitions have 256 bytes and no images.

**Taking turns.** All systems of a group are started and filled to their capacity (5,000 transitions), so that each insert
also removes. Then they take turns of 2.5 s, five rounds of them (with many systems in another
order each round); the others are idle meanwhile. A ratio is taken within a round; the table has the median of the rounds, and the lowest and highest in
brackets. Rates are counted in transitions, and a writer's clock stops when its last segment is acknowledged.

**Quiet moments.** A phase waits for a moment in which other programs use less than 0.15 cores, though not for ever, and its
row says how much they used meanwhile (`others`; the kernel's own work of writing files back is among it). Rounds with more
than 0.3 cores count only where fewer than three are quieter.

| group | what runs |
| --- | --- |
| `at_once` | W, a writer and a reader at the same time |
| `small` | the same with small transitions |
| `disk` | the writer alone; against a process that appends the same segments to files of the same size with `writev`, removes the oldest, and syncs with `fdatasync` once a second from a thread (or after each segment), in reserved space as ours |
| `batch` | the reader alone; against numpy's copy of the same 50 MB from a store-sized array into the same target |
| `tcp` | a reader that cannot open the service's folder and keeps no cache, so every row comes through the socket; against a bare ZeroMQ REQ/REP pair, 50 MB in four parts, nothing copied, without and with CURVE. The service always encrypts |
| `memory` | 2 GiB of images stored. Memory: each process's share (`Pss`) of service and Redis, without mapped segment files, plus what `mincore` finds in the page cache of every file of the run. Disk: blocks of those files. Then service and Redis are killed with SIGKILL and started again; the clock stops when a new reader has its first batch |
| `scale` | 1, 4 and 64 writer processes, each as fast as it may, with 4 readers; batch times are those of all readers; at other times four processes that only copy 50 MB in pieces of a frame take the readers' place |
| `wait` | a learner that computes for 150 ms on each batch (one thread) while 400 transitions a second come in |

**What each keeps.** An acknowledged segment of TwinRL's survives the death of every process, and of the machine but for the
last second (`everysec`) or nothing (`always`); with `never` the system writes when it likes. Repeats are dropped, also after
a restart. Reverb keeps everything in its
process: a crash loses all since the last checkpoint, which somebody must ask for and which stops the tables while it is
written. TorchRL's memmap is files that nobody syncs, without a record of what is valid in them; writer and reader share one
lock on one host. Redis runs without a log here, and the ZeroMQ learner holds its data in arrays. Only TwinRL's figures
include a checksum over every byte and the check of every segment's columns against the schema.

**Settings of the peers.** Reverb: chunk length 1 with images and 50 without (the fastest of those tried), a `TrajectoryDataset` with one worker,
`rate_limiter=MinSize`, an item of two steps for each transition. TorchRL: `extend` by whole segments, observations stored
once and the next one read from the next row (its usual layout stores it twice, which halves its inserts), one thread;
no service lies in between, so it has nothing to copy into. Redis: `SET` of 50 pickles in a pipeline over a Unix socket,
`MGET`. ZeroMQ: one request of 50 pickled transitions, REP thread and sampling in one Python process.
"""

ENVS_METHOD = """## How environments are measured

**The same states.** The scripted expert plays pick-and-place (with some noise) and its actions, what reached the servos and
each reset are recorded. Then the environment plays the actions again, and a bare `mujoco.batch.Batch` gets the recorded
controls: 50 physics steps of 2 ms for each control step, states put in place at resets. Both must end in the recorded state
bit for bit, or the benchmark stops. Beside episodes that are over, one in forty is ended in every step, so that resets with
new draws are spread as in a long run. One thread each. With images both cameras are drawn in every step, by the tracer
called directly in the bare run; computing poses for it is not counted there.

**The tracer.** `twins.tracer` draws what mujoco-warp's tracer draws (a test compares them pixel by pixel); against that one,
on warp's CPU device, there are rows of their own.

**Actor.** `TwinActor.collect` with actions from a table in the policy's place, chunks of 8 steps, images at chunk boundaries,
a replay service in its own process; the clock stops when the last segment is acknowledged.

**Peers.** `AsyncVectorEnv` runs single environments of the same scene, with the same control law in the same kernels, two
images of `mujoco.Renderer` (EGL; without a GPU Mesa draws them in software) and neither rewards nor randomisation. It is tried
with as many processes as there are cores, and twice and four times as many; the best counts. Ours runs in one process with as
many threads as there are cores. gym-hil runs its own scene, whose robot is made of meshes, with its own shadows.

**Memory.** Resident memory of two processes with few and with many environments, with every randomisation, after two
resets of all; two copies of the images (8 pixels) are taken off.
"""

LEARNER_METHOD = """## How learner and inference are measured

**Fed by the replay service.** The demo's policy, untrained, on one thread. A replay service in a process of its own holds 100
segments of 32 transitions of each source (two 64x64 images), and another process writes to it while the learner trains:
400 transitions a second for SFT, 1.5 times what is taken for PPOFlow, 60 for off-policy RL. PPOFlow takes 64 segments (512
chunks) an iteration, without an early end; off-policy RL draws batches of 256 windows ahead from all sources and has met
the observations before, but for those that come in. *Bare* is the same policy with everything in memory and nobody
else at work: for SFT a loop written with PyTorch alone, for the other two the algorithm's own `update` called on
ready segments or batches. An update is one call. A ratio is taken within a round; `..._cpu` is the same ratio in processor
time of the training thread.

**Presets.** SFT's update with everything trained: encoding of the images, flow matching, gradients, AdamW, float32, one
thread, a process for each; batches of 64 (`tiny`), 16 (`small`) and 1 (`base`). Memory is the most that the process used beyond
what it had with its libraries loaded. `base` was not trained there: forward and backward, each gradient dropped as soon as it
is known. FLOPs are counted by PyTorch while a step runs. On a GPU: bfloat16, MFU against the maker's figure for dense
bfloat16.

**Inference.** Ray actors with random observations, two images of 64x64 each; they ask again as soon as they have an answer,
and simulate nothing in between. Latency is what the caller sees.
"""

ROBOT_METHOD = """## How the robot's loop is measured

Replay service, gateway, policy, `twinrl attach` and the stand-in arm are processes on one machine; the arm is attached over TCP
through a proxy that cuts, delays and slows. The arm runs in real time and has two cameras of 64x64; it is asked for 100
set-points a second, by chunks of two control steps. Its process writes each set-point that reaches it into a log, with the time at
which it was sent: pace, limits and rest are read from there, and not from what the bridge says of itself. `watchdog_ms` is the
bridge's own time of the hold. Segments are lost if the spool has numbered them and the replay service has not got them, or if an episode has
a gap. Kills are SIGKILL. In `attach` a point stands for the arm, which needs no simulator to start; in `adversarial` the arm waits for each
set-point, and its limits have a box of their own in its way. The longest of several repetitions is shown, but for pace (percentiles)
and attaching (the median). No physical arm was measured.
"""


def page() -> str:
    """The page's text."""
    replay = _load("replay")
    parts = [HEAD, "## The replay service\n", *_environment(replay)]
    parts += _table(
        [(f.key, f.text, f.goal, f"`--rows {f.rows}`") for f in FIGURES],
        replay,
    )
    if replay:
        parts += ["", "### Side by side\n", *_systems(replay["rows"])]
    weights = _load("weights")
    if weights:
        parts += ["", "## Weights\n", "See [weights](weights.md).\n", *_environment(weights)]
        parts += _table([(*each, "all of it") for each in WEIGHTS], weights)
    found = _load("envs")
    if found:
        parts += ["", "## Environments\n", *_environment(found)]
        parts += _table(
            [(f.key, f.text, f.goal, f"`--rows {f.rows}`") for f in envs.FIGURES], found
        )
    device = _load("envs_cuda")
    if device:
        parts += ["", "### On a GPU\n", *_environment(device), *_device(device)]
    trained = _load("learner")
    if trained:
        parts += ["", "## Learner\n", *_environment(trained), *_figures(learner.FIGURES, trained)]
    asked = _load("inference")
    if asked:
        parts += ["", "## Inference\n", "See [inference](inference.md).\n", *_environment(asked)]
        parts += _figures(inference.FIGURES, asked)
    arm = _load("robot_loop")
    if arm:
        parts += ["", "## Robots\n", "See [robots](robots.md).\n", *_environment(arm)]
        parts += _figures(robot_loop.FIGURES, arm)
    parts += ["", METHOD, *([ENVS_METHOD] if found else [])]
    parts += [*([LEARNER_METHOD] if trained or asked else [])]
    parts += [*([ROBOT_METHOD] if arm else []), *_missed()]
    return "\n".join(parts).rstrip() + "\n"


def missed() -> list[str]:
    """Keys whose goals the committed results miss."""
    goals = {figure.key: figure.goal for figure in FIGURES} | {key: g for key, _, g in WEIGHTS}
    goals |= {
        figure.key: figure.goal for figure in (*envs.FIGURES, *learner.FIGURES, *robot_loop.FIGURES)
    }
    found = {
        key: value
        for name in ("replay", "weights", "envs", "learner", "robot_loop")
        for key, value in _load(name).get("figures", {}).items()
    }
    return [key for key, goal in goals.items() if key in found and not _reached(found[key], goal)]


def _load(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    crowds = [f"weights_vs_memcpy_{count}" for count in (1, 4, 16)]
    found = report.get("figures", {})
    if all(key in found for key in crowds):  # the goal holds for each of them
        found.setdefault("weights_vs_memcpy", min(found[key] for key in crowds))
    return report


def _reached(value: float, goal: str) -> bool:
    if not goal:
        return True
    sign, limit = goal.split()
    return value >= float(limit) if sign == ">=" else value <= float(limit)


def _environment(report: dict[str, Any]) -> list[str]:
    if not report:
        return []
    machine = report["machine"]
    cpu = f" ({machine['cpu']})" if "cpu" in machine else ""
    memory = f", {machine['memory_GB']} GB" if "memory_GB" in machine else ""
    text = f"`{report['command']}` on {machine['cpus']} cores{cpu}{memory}, {machine['system']}, "
    text += f"Python {machine['python']}."
    groups = report.get("groups", {})
    if groups:
        text += f" Measured on {min(g['at'] for g in groups.values())[:10]}"
        seconds = sum(g.get("took_s", 0.0) for g in groups.values())
        text += f", {seconds / 60:.0f} minutes." if seconds else "."
        others = sorted(row["others"] for row in report["rows"] if "others" in row)
        if others:
            quiet = sum(each <= CALM for each in others) / len(others)
            text += f" Other programs used {others[len(others) // 2]:.2f} cores in the middle phase"
            text += f" ({quiet:.0%} of the phases were quiet, see below)."
        else:
            text += f" Load of the machine at the start: {machine['load']:g}."
    elif "load" in machine:
        text += f" Load of the machine at the start: {machine['load']:g}."
    return [text + "\n"]


def _table(lines: list[tuple[str, str, str, str]], report: dict[str, Any]) -> list[str]:
    out = [
        "| key | what it is | goal | figure | reached | rows |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for key, text, goal, rows in lines:
        value = report.get("figures", {}).get(key)
        if value is None:
            out.append(f"| `{key}` | {text} | {goal} | not measured | | {rows} |")
            continue
        spread = report.get("spread", {}).get(key)
        shown = f"**{_number(value)}**" + (
            f" [{_number(spread[0])}, {_number(spread[1])}]" if spread else ""
        )
        verdict = ("yes" if _reached(value, goal) else "**no**") if goal else ""
        out.append(f"| `{key}` | {text} | {goal} | {shown} | {verdict} | {rows} |")
    return out


def _figures(figures: list[Any], report: dict[str, Any]) -> list[str]:
    """The table of those figures that there are: which, depends on the machine."""
    known = [figure for figure in figures if figure.goal or figure.key in report["figures"]]
    rows = {f: "all of it" if f.rows == "all" else f"`--rows {f.rows}`" for f in known}
    return _table([(f.key, f.text, f.goal, rows[f]) for f in known], report)


def _device(report: dict[str, Any]) -> list[str]:
    """Control steps a second on a GPU."""
    rows = [row for row in report["rows"] if row["rows"] == "cuda"]
    sizes, counts = (sorted({row[key] for row in rows}) for key in ("px", "envs"))
    titles = [f"two images of {px} px" if px else "without images" for px in sizes]
    out = [f"| environments on one {rows[0]['device']} | " + " | ".join(titles) + " |"]
    out.append("| ---: |" + " ---: |" * len(sizes))
    for count in counts:
        keys = [f"cuda_per_s_{count}_{px}px" for px in sizes]
        cells = [
            _number(report["figures"][key]) if key in report["figures"] else "" for key in keys
        ]
        out.append(f"| {count:,} | " + " | ".join(cells) + " |")
    note = "Control steps a second, of 50 physics steps each; ManiSkill 3 publishes 30,000 frames a second with rendering."
    return [*out, "", note]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _systems(rows: list[Row]) -> list[str]:
    found = medians(rows)
    out = []
    titles = {
        "at_once": "Workload W, writing and sampling at once",
        "small": "Small transitions, writing and sampling at once",
        "scale": "Four readers at once with",
        "tcp": "Batches through a socket",
        "disk": "Writing alone",
    }
    for group, title in titles.items():
        places = [place for place in found if place[0] == group]
        if not places:
            continue
        columns = [
            (key, name)
            for key, name in (
                ("write_MB_s", "insert MB/s"),
                ("write_per_s", "transitions/s"),
                ("sample_MB_s", "sample MB/s"),
                ("sample_per_s", "transitions/s"),
                ("p50_ms", "batch p50 ms"),
                ("p99_ms", "batch p99 ms"),
            )
            if any(key in found[place] for place in places)
        ]
        out.append(f"| {title} | " + " | ".join(name for _, name in columns) + " |")
        out.append("| --- |" + " ---: |" * len(columns))
        for place in places:
            cells = [
                _number(found[place][key]) if key in found[place] else "" for key, _ in columns
            ]
            out.append(f"| {NAMES.get(place[1], place[1])} | " + " | ".join(cells) + " |")
        out.append("")
    stored = [(place[1], numbers) for place, numbers in found.items() if place[0] == "memory"]
    if stored:
        out.append(
            "| 2 GiB of images stored as | memory / raw | disk / raw | back after a kill, s |"
        )
        out.append("| --- | ---: | ---: | ---: |")
        out += [
            f"| {name} | {n['memory_vs_raw']:.3g} | {n['disk_vs_raw']:.3g} | {n['sampled_s']:.3g} |"
            for name, n in stored
        ]
    return out


def _missed() -> list[str]:
    keys = missed()
    if not keys:
        return []
    lines = [f"- `{key}`: {REASONS.get(key, 'no reason is written down yet')}" for key in keys]
    return ["## Goals that are missed, and why\n", *lines]


def main(arguments: list[str] | None = None) -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the page is current")
    options = parser.parse_args(arguments)
    text = page()
    if options.check:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
            sys.exit("docs/benchmarks.md is not current: python scripts/benchmark_docs.py")
    else:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
