"""Rows of benchmarks.robot_loop in which something fails or misbehaves; each function measures one group in `folder`."""

from __future__ import annotations

import json
import os
import pty
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import _arm_log as arm_log
from benchmarks._robot_run import Stage
from robot_bridge.driver import make_driver
from robot_bridge.limits import Limits
from robot_bridge.motion import between, shorten
from robot_bridge.protocol import make_job
from robot_bridge.safety import SafetyFilter
from twinrl.core.segment import Schema
from twinrl.core.sockets import wait_until

Row = dict[str, Any]
SIM = Schema(27, 14, ("side", "wrist"), 64, 2)
SLOW = 50e3  # bytes/s
POINT = Schema(6, 0, ("side",), 16, 4)
QUIET = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


class Size(NamedTuple):
    """How much is measured."""

    seconds: float = 30.0  # of pace, cut and slow
    cuts: int = 5
    attaches: int = 20
    long_cut_s: float = 10.0
    bridge_kills: int = 2
    run_kills: int = 3
    commands: int = 10_000
    faults: int = 3  # of each kind; the fourth reflex in ten minutes would ask for a person


QUICK = Size(4.0, 1, 4, 5.0, 1, 1, 2000, 1)
TINY = Size(1.0, 1, 2, 4.0, 1, 1, 360, 1)


def attach(size: Size, folder: Path) -> Row:
    """Attach and detach, an episode each time, while another arm practises."""
    stage = Stage(folder, POINT)
    run, seconds = stage.run, []
    try:
        steady = run.attach("--name", "steady", "--robot", "point", "--speed", "4", **QUIET)
        while not run.row("steady").get("episodes"):
            time.sleep(0.05)
        for _ in range(size.attaches):
            began = time.monotonic()
            arm = run.attach(
                *("--robot", "point", "--speed", "4", "--once"),
                *("--robot-option", "reset_seconds=0.1"),
                port=stage.network.port,
                **QUIET,
            )
            run.wait("a step", _steps, every=0.01)
            seconds.append(time.monotonic() - began)
            if arm.wait(30):
                raise RuntimeError(f"attach ended with {arm.returncode}")
        other = run.row("steady")
        stage.leave(steady)
        episodes = {h["episode"] for h, _ in run.stored() if h["robot"] == "arm"}
        counts = _sum(stage.counts("arm"), stage.counts("steady"))
    finally:
        stage.close()
    return {
        "attaches": len(seconds),
        "first_step_s": statistics.median(seconds),
        "first_step_max_s": max(seconds),
        "episodes_lost": len(seconds) - len(episodes),
        "others_episodes": int(other["episodes"]),
        "others_stops": int(other["last"]["totals"]["stops"]),
        **counts,
    }


def long_cut(size: Size, folder: Path) -> Row:
    """The network away for longer than the arm's patience; a person rearms at a terminal when it has come back."""
    stage = Stage(folder, SIM)
    person, terminal = pty.openpty()
    try:
        arm = stage.attach("--operator-option", "rearm_after=0", stdin=terminal)
        stage.moving()
        when = stage.network.tell("cut")
        time.sleep(size.long_cut_s)
        healed = stage.network.tell("heal")
        row = stage.run.wait("its return", lambda row: _is_back(row, when))
        back, held_at = time.monotonic(), row["last"]["held_at"]
        time.sleep(2.0)
        stopped = stage.run.row()["state"] == "stopped"
        rearmed = time.monotonic()
        os.write(person, b"u")
        stage.run.wait("motion", lambda row: row["state"] == "running" and _steps(row))
        stage.leave(arm)
        log, counts = stage.set_points(), stage.counts()
    finally:
        stage.close()
        os.close(person)
        os.close(terminal)
    before = log[(log["time"] > when) & (log["time"] < rearmed)]
    return {
        "cut_s": size.long_cut_s,
        "watchdog_ms": 1e3 * (held_at - when),
        "rest_ms": arm_log.rest_ms(before, when),
        "stop_s": float(before["time"].max()) - held_at,
        "back_s": back - healed,
        "stays_stopped": int(stopped and before["time"].max() < healed),
        "rearm_s": arm_log.moves_at(log, rearmed) - rearmed,
        "limits_exceeded": arm_log.exceeded(log),
        **counts,
    }


def bridge_killed(size: Size, folder: Path) -> Row:
    """SIGKILL of the bridge, twice each time: in mid-episode, attached again when its name is free; and over a slow line,
    when an episode is over and only the spool has it, attached again at once."""
    stage = Stage(folder, SIM)
    run, found, spool = stage.run, [], folder / "spool/arm/bench"
    try:
        arm = stage.attach()
        run.wait("an episode", lambda row: row["episodes"] >= 1)
        for _ in range(size.bridge_kills):
            row, slowest = stage.moving(), 0.0
            killed = _kill(arm)
            while row.get("attached", True):
                asked = time.monotonic()
                row = run.row()
                slowest = max(slowest, time.monotonic() - asked)
                time.sleep(0.02)
            free, last = time.monotonic(), float(stage.set_points()["time"].max())
            began = time.monotonic()
            arm = stage.attach()
            run.wait("a step", _steps, every=0.01)
            again = time.monotonic()
            stage.network.tell(f"rate {SLOW:g}")  # so that an episode still waits in the spool
            before = stage.moving()["last"]["episode"]
            wait_until(lambda: any(spool.glob("*.seg")), 30.0, "an episode in the spool")
            gone, spooled = _kill(arm), len(list(spool.glob("*.seg")))
            stage.network.tell("rate 0")
            arm = stage.attach()
            run.wait("a step", lambda row, e=before: _steps(row, e), every=0.01)
            found.append(
                {
                    "free_s": free - killed,
                    "again_s": again - began,
                    "again_at_once_s": time.monotonic() - gone,
                    "gateway_answer_ms": 1e3 * slowest,
                    "moved_after_ms": max(0.0, 1e3 * (last - killed)),
                    "run_died": int(not run.alive),
                    "spooled": spooled,
                }
            )
            done = run.row()["episodes"]
            run.wait("an episode", lambda row, n=done: row["episodes"] > n)
        stage.leave(arm)
        counts = stage.counts()
    finally:
        stage.close()
    return {"kills": 2 * len(found), **_most(found), **counts}


def run_killed(size: Size, folder: Path) -> Row:
    """SIGKILL of gateway, service and policy at once, in mid-motion."""
    found = []
    for number in range(size.run_kills):
        inner = folder / str(number)
        inner.mkdir()
        stage = Stage(inner, SIM)
        try:
            arm = stage.attach()
            stage.moving()
            when = stage.run.kill()
            held = stage.told("holding: ")
            time.sleep(1.5)
            log = stage.set_points()
            rest = arm_log.rest_ms(log, when)
            still = log[log["time"] > when + rest / 1e3 + 0.05]["setpoint"]
            found.append(
                {
                    "hold_ms": 1e3 * (held - when),
                    "rest_ms": rest,
                    "drift_m": float(np.ptp(still, axis=0).max()) if len(still) else 0.0,
                    "limits_exceeded": arm_log.exceeded(log),
                    "exit": stage.leave(arm),
                }
            )
        finally:
            stage.close()
    return {"kills": len(found), **_most(found)}


def faults(size: Size, folder: Path) -> Row:
    """A gripper that blocks, frozen cameras, reflexes: injected into the arm while a policy moves arm and gripper."""
    reality, inject = folder / "reality.json", folder / "inject"
    reality.write_text(json.dumps({"gripper_s": 0.5}))
    stage = Stage(folder, SIM, max_steps=60, toggle=2)
    reflexes, frozen, busy, spoilt = [], [], [], []

    def say(**what: Any) -> float:
        with inject.open("a") as file:
            file.write(json.dumps(what) + "\n")
        return time.monotonic()

    try:
        arm = stage.attach("--reality", str(reality), options=(f"inject={inject}",))
        episode = ""
        for _ in range(size.faults):
            episode = stage.moving(episode)["last"]["episode"]
            busy.append(say(gripper_s=2.0))
        for _ in range(size.faults):
            episode = stage.moving(episode)["last"]["episode"]
            spoilt.append(episode)
            when = say(frozen=True)
            row = stage.run.wait("a hold", lambda row, t=when: row["last"].get("held_at", 0) > t)
            frozen.append(1e3 * (row["last"]["held_at"] - when))
            say(frozen=False)
        for _ in range(size.faults):
            episode = stage.moving(episode)["last"]["episode"]
            spoilt.append(episode)
            reflexes.append(say(reflex="asked for"))
        last = stage.moving(episode)["last"]
        results = {each["episode"]: each for each in stage.run.link.results()}
        stage.leave(arm)
        log, counts = stage.set_points(), stage.counts()
        stored = stage.run.stored()
    finally:
        stage.close()
    windows = [log[(log["time"] >= t) & (log["time"] <= t + 2.0)] for t in busy]
    errors = np.concatenate([arm_log.pace_errors(window) for window in windows])
    blocked = [c["action"][:, 6] != c["policy_action"][:, 6] for _, c in stored]
    return {
        "each": size.faults,
        "limits_exceeded": arm_log.exceeded(log),
        "frozen_hold_ms": max(frozen),
        "reflex_rest_ms": max(arm_log.pause_ms(log, when) for when in reflexes),
        # Of the episodes that a fault cut: those that a success rate would count.
        "counted": sum(not results.get(each, {}).get("invalid") for each in spoilt),
        "failures_stored": sum(
            bool(c["terminated"].any()) for h, c in stored if h["episode"] in spoilt
        ),
        "stops": int(last["totals"]["stops"]),
        "gripper_period_error_p99_ms": float(np.percentile(errors, 99)),
        "gripper_blocked_steps": int(np.concatenate(blocked).sum()),
        **counts,
    }


# -- commands that nobody should give ------------------------------------------------------------------------

PILLAR = ((0.5, -0.1, 0.0), (0.6, 0.1, 0.3))  # m, a box of its own to run into
KINDS = (
    *("random", "not finite", "huge", "to and fro", "stale"),
    *("table", "pillar", "out of reach", "sideways"),
)
BURST = 20  # commands of a kind in a row
EPISODE = 500  # commands between two resets


def commands(
    rng: np.random.Generator, count: int, place: Any
) -> Iterator[tuple[np.ndarray, float]]:
    """So many actions (7,) and their age in s; `place()` is the commanded pose (6,)."""
    for number in range(count):
        if number % BURST == 0:
            kind = KINDS[number // (2 * BURST) % len(KINDS)]  # as actions, then as poses
            corner = rng.choice((-1.0, 1.0), 3)
        action, age = np.array([*rng.normal(size=6) * 0.05, rng.normal()]), 0.0
        if kind == "not finite":
            action[rng.integers(7)] = rng.choice((np.nan, np.inf, -np.inf))
        elif kind == "huge":
            action *= 10.0 ** rng.uniform(2, 300)
        elif kind == "to and fro":
            action[:6] = np.repeat(corner[:2], 3) * (1.0 if number % 2 else -1.0)
        elif kind == "stale":
            age = float(rng.choice((rng.uniform(0.3, 1e6), -1.0, np.nan)))
        elif kind == "table":
            action[:3] = (0.0, 0.0, -0.03)
        elif kind == "pillar":
            action[:3] = shorten(np.mean(PILLAR, axis=0) - place()[:3], 0.03)
        elif kind == "out of reach":
            action[:3] = 0.03 * corner
        elif kind == "sideways":
            action[:6] = (*(0.03 * corner[:2]), 0.0, *(0.15 * corner))
        yield action, age


def adversarial(size: Size, folder: Path) -> Row:
    """Commands of every bad kind through the safety filter into the stand-in, whose clock waits for each set-point.

    Half are actions of a control step; half are poses at the arm's own rate, which the filter meets without the
    limits on a step.
    """
    log = folder / "arm.log"
    limits = Limits(keep_out=(*Limits().keep_out, PILLAR))
    rng, reflexes = np.random.default_rng(0), 0
    told = {"run": "r", "task": "pick-and-place", "instruction": "i", "max_steps": 0}
    driver = make_driver("sim", log=str(log), reset_seconds=0.0)
    driver.connect(make_job(SIM._replace(image_size=16), told), 8.0)
    safety = SafetyFilter(limits, driver.rate_hz, 0.1, driver.joint_range)
    ticks = round(0.1 * driver.rate_hz)

    def begin() -> None:
        time.sleep(2 * arm_log.BREAK_S)  # so that its log shows a break
        safety.begin(driver.measure().pose, 1.0)

    try:
        given = commands(rng, size.commands, lambda: safety.setpoint)
        for number, (action, age) in enumerate(given):
            if number % EPISODE == 0:
                driver.reset(None, "id")
                begin()
            measured = driver.measure()
            if measured.fault:
                driver.recover()
                reflexes += 1
                begin()
                measured = driver.measure()
            if number // BURST % 2:  # a pose, wherever the action would lead
                driver.servo(safety.tick(safety.setpoint + action[:6], measured), safety.gripper)
                continue
            if number % BURST == 0:
                safety.settle(safety.target)
            start = safety.target
            verdict = safety.step(action, measured, age)
            for k in range(1, ticks + 1):
                wanted = between(start, verdict.target, k / ticks)
                driver.servo(safety.tick(wanted, driver.measure()), safety.gripper)
    finally:
        driver.disconnect()
    rows = arm_log.set_points(log)
    shares = arm_log.reached(rows, limits)
    return {
        "commands": size.commands,
        "set_points": len(rows),
        "limits_exceeded": arm_log.exceeded(rows, limits),
        "travelled_m": arm_log.travelled(rows),
        "refused": sum(safety.counts[cause] for cause in ("not_finite", "stale")),
        "changed": sum(safety.counts.values()),
        "reflexes": reflexes,
        **{f"share_{name}": share for name, share in shares.items()},
    }


# -- what they share -----------------------------------------------------------------------------------------


def _steps(row: Row, after: str = "") -> bool:
    """An attached arm has executed a step of an episode that is not `after`."""
    last = row["last"]
    return bool(row["attached"] and last.get("step", 0) >= 1 and last["episode"] != after)


def _is_back(row: Row, when: float) -> bool:
    return bool(row["attached"] and row["last"].get("held_at", 0.0) > when)


def _kill(arm: subprocess.Popen) -> float:
    when = time.monotonic()
    arm.kill()
    arm.wait(10)
    return when


def _sum(*counts: dict[str, int]) -> dict[str, int]:
    return {key: sum(each[key] for each in counts) for key in counts[0]}


def _most(found: list[Row]) -> Row:
    return {key: max(each[key] for each in found) for key in found[0]}


GROUPS = {
    each.__name__: each
    for each in (attach, long_cut, bridge_killed, run_killed, adversarial, faults)
}
