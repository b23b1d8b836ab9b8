"""The robot PC's control loop while observations, chunks and segments stream, and while what it depends on fails.

    python -m benchmarks.robot_loop [--quick] [--json FILE] [--rows GROUP,...] [--resume]

A simulated arm in real time, in a process of its own, keeps a log of every set-point that reaches it, from which
what it did is read. Replay service, gateway, policy and bridge are processes too, all on this machine's cores; the arm is
attached over TCP through a proxy that can be cut.

pace           two 64x64 cameras, 100 set-points and 10 control steps a second, a chunk for every other step, segments streaming:
               how far the time between two set-points is from 10 ms; which set-points exceed a limit; segments lost or repeated
cut            the network is cut for 1 s in mid-motion: until the watchdog holds, and until set-points rest; nothing lost
slow           the same at 50 kB/s for everything together: what still arrives
attach         20 times attached for an episode and gone again: from the command to the first executed control step
long_cut       a cut of 10 s: until hold and latched stop, whether it stays stopped when the network is back, and from the
               key that rearms it to motion
bridge_killed  SIGKILL of the bridge: the run goes on; until its name is free, and until the arm moves again
run_killed     SIGKILL of gateway, service and policy: until the arm holds and set-points rest
adversarial    10,000 commands that are not finite, huge, to and fro at full speed, stale, into table and boxes: the largest share
               of each limit that was reached, in lockstep
faults         a frozen camera, a reflex, a gripper that blocks: until the arm holds, what of it counts, and the pace meanwhile
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import _robot_groups as groups
from benchmarks._arm_log import exceeded, pace_errors, rest_ms
from benchmarks._robot_groups import QUICK, SIM, SLOW, TINY, Row, Size
from benchmarks._robot_run import Stage
from benchmarks.inference import Figure
from benchmarks.replay import machine

STEPS = 60  # of an episode
EACH = ("lost", "repeated", "limits_exceeded")  # summed over the groups
FIGURES = [
    Figure(
        "period_error_p99_ms",
        "pace",
        "time between two set-points, off 10 ms: 99 % are nearer, ms",
        "<= 2",
    ),
    Figure("period_error_p50_ms", "pace", "the same, half of them, ms"),
    Figure("period_error_max_ms", "pace", "the same, all of them, ms"),
    Figure("limits_exceeded", "all", "set-points beyond a limit, in all groups", "<= 0"),
    Figure("lost", "all", "segments lost, in all groups", "<= 0"),
    Figure("repeated", "all", "segments stored twice, in all groups", "<= 0"),
    Figure(
        "watchdog_ms",
        "cut,long_cut",
        "from a cut of the network to the hold, the longest, ms",
        "<= 300",
    ),
    Figure("cut_rest_ms", "cut", "from a cut to set-points that rest, the longest, ms"),
    Figure("slow_period_error_p99_ms", "slow", "the pace over a line of 50 kB/s, 99 %, ms"),
    Figure("slow_chunk_ms", "slow", "from an observation to its chunk over that line, ms"),
    Figure("attach_first_step_s", "attach", "from `twinrl attach` to the first executed step, s"),
    Figure("attach_first_step_max_s", "attach", "the same, the longest, s"),
    Figure("attach_episodes_lost", "attach", "episodes of them that are not in the replay"),
    Figure("long_cut_rest_ms", "long_cut", "from a long cut to set-points that rest, ms"),
    Figure("long_cut_stop_s", "long_cut", "from the hold to the latched stop, s; due at 2"),
    Figure("long_cut_stays_stopped", "long_cut", "1: nothing moves it when the network is back"),
    Figure(
        "long_cut_rearm_s",
        "long_cut",
        "from the key that rearms it to motion, s; the stand-in's reset takes no time",
    ),
    Figure("bridge_killed_free_s", "bridge_killed", "from a SIGKILL to a name that is free, s"),
    Figure("bridge_killed_again_s", "bridge_killed", "from attaching then to the first step, s"),
    Figure(
        "bridge_killed_again_at_once_s",
        "bridge_killed",
        "from a SIGKILL to the first step of who attaches at once, s",
    ),
    Figure(
        "bridge_killed_gateway_answer_ms",
        "bridge_killed",
        "the gateway's slowest answer meanwhile, ms",
    ),
    Figure("bridge_killed_spooled", "bridge_killed", "segments that only the spool had then"),
    Figure("run_killed_hold_ms", "run_killed", "from a SIGKILL of the whole run to the hold, ms"),
    Figure("run_killed_rest_ms", "run_killed", "the same, to set-points that rest, ms"),
    *(
        Figure(f"adversarial_share_{name}", "adversarial", f"largest share of `{name}` reached")
        for name in ("step_m", "step_rad", "speed", "acceleration", "jerk")
    ),
    *(
        Figure(f"adversarial_share_turn_{name}", "adversarial", f"the same of `turn_{name}`")
        for name in ("speed", "acceleration", "jerk")
    ),
    Figure("faults_reflex_rest_ms", "faults", "from a reflex to set-points that rest, ms"),
    Figure("faults_frozen_hold_ms", "faults", "from a camera that freezes to the hold, ms"),
    Figure("faults_counted", "faults", "episodes cut by a fault that count as the policy's"),
    Figure(
        "faults_gripper_period_error_p99_ms",
        "faults",
        "the pace while a gripper blocks for 2 s, 99 %, ms",
    ),
]


def session(folder: Path, seconds: float, cuts: int = 0, rate: float = 0.0) -> Row:
    """One attached arm for `seconds`; what its log, the gateway and the replay service know afterwards."""
    stage = Stage(folder, SIM, STEPS)
    run, network = stage.run, stage.network
    try:
        arm = stage.attach()
        run.wait("the first steps", lambda row: row["last"].get("step", 0) > 5)
        if rate:
            network.tell(f"rate {rate:g}")
        held = []
        for _ in range(cuts):
            stage.moving()
            when = network.tell("cut")
            time.sleep(1.0)
            network.tell("heal")
            before = run.wait("its return", lambda row, t=when: row["last"].get("held_at", 0) > t)
            held.append((when, before["last"]["held_at"]))
            time.sleep(1.0)
        time.sleep(seconds)
        network.tell("rate 0")
        stage.leave(arm)
        totals, chunk_ms = (run.row()["last"][key] for key in ("totals", "chunk_ms"))
        counts = stage.counts()
    finally:
        stage.close()
    return {
        "log": stage.set_points(),
        "held": held,
        **counts,
        "steps": int(totals["steps"]),
        "segment_bytes": int(totals["bytes"]),
        "spared_bytes": int(totals["spared_bytes"]),
        "chunk_ms": chunk_ms,
        "holds": totals["holds"],
    }


def streaming(folder: Path, seconds: float, cuts: int = 0, rate: float = 0.0) -> Row:
    """A session's figures."""
    found = session(folder, seconds, cuts, rate)
    log, held = found.pop("log"), found.pop("held")
    errors = pace_errors(log)
    row: Row = {
        "set_points": len(log),
        "period_error_p50_ms": float(np.percentile(errors, 50)),
        "period_error_p99_ms": float(np.percentile(errors, 99)),
        "period_error_max_ms": float(errors.max()),
        "limits_exceeded": exceeded(log),
    }
    if held:
        row["watchdog_ms"] = max(1e3 * (then - when) for when, then in held)
        row["rest_ms"] = max(rest_ms(log, when) for when, _ in held)
        row["cuts"] = len(held)
    return row | found


GROUPS = {
    "pace": lambda size, folder: streaming(folder, size.seconds),
    "cut": lambda size, folder: streaming(folder, size.seconds, size.cuts),
    "slow": lambda size, folder: streaming(folder, size.seconds, rate=SLOW),
    **groups.GROUPS,
}


def figures(rows: list[Row]) -> dict[str, float]:
    """Keys of `pace` stand alone, others have their group in front; what may not be in any group is summed over all."""
    found: dict[str, float] = {}
    for row in rows:
        prefix = "" if row["group"] == "pace" else f"{row['group']}_"
        for key, value in row.items():
            if key != "group" and not (key in EACH and not prefix):
                found[f"{prefix}{key}"] = value
    for key in EACH:
        known = [row[key] for row in rows if key in row]
        if known:
            found[key] = sum(known)
    known = [row["watchdog_ms"] for row in rows if "watchdog_ms" in row]
    return found | ({"watchdog_ms": max(known)} if known else {})


def measure(names: list[str], size: Size, report: Row, file: str) -> None:
    """Run the groups and put their rows into `report`, and that into `file` after each group."""
    for name in names:
        load, start = os.getloadavg()[0], time.monotonic()
        with tempfile.TemporaryDirectory(prefix="robot-loop-") as folder:
            found = GROUPS[name](size, Path(folder))
        row = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in found.items()}
        report["rows"] = [each for each in report["rows"] if each["group"] != name]
        report["rows"].append({"group": name, **row})
        report["groups"][name] = {
            "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "took_s": round(time.monotonic() - start, 1),
            "load_before": round(load, 2),
        }
        report["figures"] = figures(report["rows"])
        print(f"{name}  " + "  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
        if file:
            Path(file).write_text(json.dumps(report, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write the JSON file."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.robot_loop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="less of each, about two minutes")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # tests
    parser.add_argument("--json", metavar="FILE", default="")
    parser.add_argument("--rows", default=",".join(GROUPS), help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="keep the groups that FILE has")
    options = parser.parse_args(arguments)
    names = [name for name in options.rows.split(",") if name]
    for name in names:
        if name not in GROUPS:
            parser.error(f"no rows {name!r}; there are {', '.join(GROUPS)}")
    command = ["python", "-m", "benchmarks.robot_loop", *(["--quick"] if options.quick else [])]
    report: Row = {
        "machine": machine(),
        "command": shlex.join(command),
        "figures": {},
        "groups": {},
        "rows": [],
    }
    if options.resume and options.json and Path(options.json).exists():
        report |= json.loads(Path(options.json).read_text())
        names = [name for name in names if name not in report["groups"]]
    measure(
        names, TINY if options.tiny else QUICK if options.quick else Size(), report, options.json
    )


if __name__ == "__main__":
    main()
