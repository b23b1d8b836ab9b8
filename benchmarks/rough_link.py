"""An arm on a network at its worst for minutes: nothing may be lost, stored twice, or moved beyond a limit.

    python -m benchmarks.rough_link [--quick] [--minutes N] [--way packets|proxy] [--seed N] [--json FILE]

Replay service, gateway and policy, and `twinrl attach` of a simulated arm in real time, all processes, as in
benchmarks.robot_loop. Between gateway and arm packets are lost, doubled, reordered and delayed (benchmarks._packets), and all of
them for a while, again and again. Where that needs rights that are not there, it says so and takes a TCP proxy that is cut,
closed, delayed and slowed instead (benchmarks._network): what TCP would make of such packets. Exit status 1 if anything is not
as it should be.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import _packets
from benchmarks._arm_log import exceeded, set_points
from benchmarks._network import BadLink
from benchmarks._robot_run import RobotRun, lost_and_repeated
from benchmarks.replay import machine
from twinrl.core.segment import Schema

SCHEMA = Schema(27, 14, ("side", "wrist"), 32, 4)
STEPS = 60  # of an episode
CALM_S = 60.0  # at the end, for what still waits


def packet_weather(rng: random.Random) -> list[str]:
    """Lines for `_packets` that make another kind of bad."""
    delay = rng.choice((0.0, 0.005, 0.02))
    return [
        f"loss {rng.choice((0.0, 0.01, 0.03, 0.08)):g}",
        f"double {rng.choice((0.0, 0.02, 0.1)):g}",
        f"delay {delay:g} {rng.choice((0.0, 0.004, 0.02)):g}",
    ]


def proxy_weather(rng: random.Random) -> list[str]:
    """The same for `_network`."""
    return [
        f"rate {rng.choice((0, 0, 30_000, 100_000)):g}",
        f"delay {rng.choice((0.0, 0.01, 0.05)):g} {rng.choice((0.0, 0.02, 0.1)):g}",
        *(["break"] if rng.random() < 0.3 else []),
    ]


CALM = {
    "packets": ["heal", "loss 0", "double 0", "delay 0 0"],
    "proxy": ["heal", "rate 0", "delay 0 0"],
}


def play(network: Any, way: str, seconds: float, seed: int, say: Callable[[str], None]) -> int:
    """Bad weather for so long; the number of cuts."""
    rng, cuts, until = random.Random(seed), 0, time.monotonic() + seconds
    while time.monotonic() < until:
        for line in packet_weather(rng) if way == "packets" else proxy_weather(rng):
            network.tell(line)
        time.sleep(rng.uniform(2.0, 8.0))
        if rng.random() < 0.4:
            network.tell("cut")
            # Some for longer than the arm's patience: it stops, and the operator lets it go on.
            time.sleep(rng.choice((0.1, 0.3, 1.0, 1.5, 3.0)))
            network.tell("heal")
            cuts += 1
        say(f"{max(0.0, until - time.monotonic()):.0f} s left, {cuts} cuts")
    for line in CALM[way]:
        network.tell(line)
    return cuts


@contextlib.contextmanager
def line_to(folder: Path, way: str) -> Iterator[tuple[RobotRun, Any, dict[str, Any]]]:
    """A run, the network to it, and how an arm is attached over that."""
    job = {"max_steps": STEPS, "chunk": SCHEMA.chunk, "lease_s": 5.0}
    network: Any = None
    if way == "packets":
        network = _packets.Line()
        run = RobotRun(folder, SCHEMA, host=_packets.HERE, **job)
        where = {"before": tuple(network.enter)}
    else:
        run = RobotRun(folder, SCHEMA, **job)
        network = BadLink(run.port)
        where = {"port": network.port}
    try:
        yield run, network, where
    finally:
        run.close()
        network.close()


def check(folder: Path, way: str, seconds: float, seed: int) -> dict[str, Any]:
    """One attached arm in bad weather; what is known afterwards."""
    log = folder / "arm.log"
    options = (f"log={log}", "reset_seconds=0.3")
    with line_to(folder, way) as (run, network, where):
        with (folder / "attach.log").open("wb") as output:
            arm = run.attach(
                *("--robot", "sim", "--operator", "scripted", "--takeovers", "0"),
                *(part for option in options for part in ("--robot-option", option)),
                stdout=output,
                stderr=subprocess.STDOUT,
                **where,
            )
        run.wait("the first steps", lambda row: row["last"].get("step", 0) > 5)
        cuts = play(network, way, seconds, seed, lambda text: print(text, flush=True))
        done = run.row()["episodes"]
        run.wait("calm", lambda row: row["attached"] and row["episodes"] > done, seconds=CALM_S)
        arm.send_signal(signal.SIGTERM)
        arm.wait(30)
        row, stored = run.row(), run.stored()
        counts = network.counts() if way == "packets" else {}
    totals = row["last"]["totals"]
    numbered = 1 + max((header["sequence"] for header, _ in stored), default=-1)
    lost, repeated = lost_and_repeated(stored, numbered)
    spool = folder / "spool/arm/bench"
    return {
        "way": way,
        "minutes": round(seconds / 60, 2),
        "cuts": cuts,
        "episodes": int(row["episodes"]),
        "segments": len(stored),
        "lost": lost,
        "repeated": repeated,
        "waiting": len(list(spool.glob("*.seg"))),
        "refused": len(list(spool.glob("*.refused"))) + int(totals["refused"]),
        "limits_exceeded": exceeded(set_points(log)),
        "tracebacks": (folder / "attach.log").read_text().count("Traceback"),
        "exit": int(arm.returncode),
        "holds": totals["holds"],
        "stops": totals["stops"],
        **{f"packets_{name}": count for name, count in counts.items()},
    }


WRONG = ("lost", "repeated", "waiting", "refused", "limits_exceeded", "tracebacks", "exit")


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write the JSON file; the exit status."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.rough_link",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of bad weather (%(default)g)")
    parser.add_argument("--quick", action="store_true", help="half a minute of it")
    parser.add_argument("--way", choices=tuple(CALM), help="packets, where that is possible")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", default="")
    options = parser.parse_args(arguments)
    reason = "" if options.way == "proxy" else _packets.why_not()
    if reason and options.way:
        parser.error(f"no packets can be lost here: {reason}")
    if reason:
        print(f"no packets can be lost here ({reason}): a TCP proxy instead", flush=True)
    minutes = 0.5 if options.quick else options.minutes
    way = options.way or ("proxy" if reason else "packets")
    if way == "packets":
        _packets.new_network()  # all that is started from here on lives in it
    with tempfile.TemporaryDirectory(prefix="rough-link-") as folder:
        found = check(Path(folder), way, minutes * 60, options.seed)
    print("  ".join(f"{key} {value}" for key, value in found.items()), flush=True)
    if options.json:
        report = {"machine": machine(), "figures": found}
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    wrong = [name for name in WRONG if found[name]] + ["episodes"] * (not found["episodes"])
    if wrong:
        print(f"not as it should be: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
