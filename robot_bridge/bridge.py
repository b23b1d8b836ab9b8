"""The robot PC's process: asks for a start, plays the episode, records it. The arm moves only from here."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any, NamedTuple

import numpy as np

from robot_bridge import frames
from robot_bridge.clock import RobotClock
from robot_bridge.driver import Driver, Outcome
from robot_bridge.link import Link, Uploader
from robot_bridge.operator import Moment, Operator
from robot_bridge.pilot import POLL, Pilot
from robot_bridge.protocol import Job
from robot_bridge.recorder import STATE, Recorder, Seen, Step
from robot_bridge.safety import SafetyFilter
from robot_bridge.spool import Spool

log = logging.getLogger(__name__)


class Settings(NamedTuple):
    """How the control loop behaves; times in real seconds."""

    speed: float = 1.0  # of the simulated clock, 1 = real time; a real arm knows only 1
    codec: str = "jpeg"
    watchdog_s: float = 0.5  # without a fresh chunk for so long, the arm holds
    give_up_s: float = 10.0  # an episode held for so long by link or policy is closed as truncated
    episodes: int = 0  # leave after so many, 0 = when told
    drain_s: float = 3.0  # on leaving, wait so long for the replay service's acknowledgements


class Bridge:
    """One attached robot. `run` returns when it is told to leave."""

    def __init__(
        self,
        link: Link,
        driver: Driver,
        operator: Operator,
        safety: SafetyFilter,
        spool: Spool,
        job: Job,
        settings: Settings,
    ) -> None:
        self._link, self._driver, self._operator, self._safety = link, driver, operator, safety
        self._spool, self._job, self._settings = spool, job, settings
        self.writer = f"{link.name}-{spool.id}"
        self._period = 1.0 / job.control_hz
        self._clock = RobotClock(settings.speed)
        self._pilot = Pilot(
            link,
            settings.codec,
            self._period / settings.speed,
            settings.watchdog_s,
            safety.limits.stale_s / 2,
        )
        self._uploader = Uploader(link, spool)
        self._stop = threading.Event()
        self._doing, self._reason = "idle", ""
        self._episode, self._step = "", 0
        self._action = [0.0] * 7
        self._latched, self._estop_seen = False, 0
        self._held_since: float | None = None  # by link or policy
        self._finished: dict[str, Any] | None = None
        self._counts = dict.fromkeys(("episodes", "successes", "takeovers", "holds"), 0)

    def stop(self) -> None:
        """Leave: the running episode is closed as truncated and kept."""
        self._stop.set()

    def state(self) -> dict[str, Any]:
        """How the arm is; goes out with each heartbeat. `totals` count from the bridge's start."""
        causes = {f"filter/{cause}": n for cause, n in dict(self._safety.counts).items()}
        uploads = {"segments": self._uploader.sent, "refused": self._uploader.refused}
        return {
            "doing": self._doing,
            "reason": self._reason,
            "uploads": self._uploader.waits_for,
            "episode": self._episode,
            "step": self._step,
            "action": self._action,
            "stopped": self._latched,
            "estop_seen": self._estop_seen,
            "speed": self._settings.speed,
            "chunk_ms": self._pilot.latency_ms,
            "totals": {**self._counts, **self._clock.stats(), **causes, **uploads},
            **self._spool.stats(),
        }

    def run(self) -> None:
        """Play episodes until told to leave."""
        try:
            while not self._is_leaving():
                start = self._next_start()
                if start is not None:
                    self._play(start)
        finally:
            self._set("leaving")
            self._driver.hold()
            self._drain()
            self._uploader.close()
            self._link.close(self._finished)

    def _drain(self) -> None:
        deadline = time.monotonic() + self._settings.drain_s
        while self._link.connected and time.monotonic() < deadline:
            if self._spool.wait_empty(0.1):
                return

    def _is_leaving(self) -> bool:
        enough = 0 < self._settings.episodes <= self._counts["episodes"]
        return self._must_leave() or self._link.wishes.detach or enough

    def _must_leave(self) -> bool:
        """At once. Whoever is detached from the cluster plays the episode to its end."""
        if self._link.fatal is not None:
            raise self._link.fatal
        return self._stop.is_set()

    def _next_start(self) -> dict[str, Any] | None:
        """The next episode's start; None, at the latest after a poll's time, with the reason in `state`."""
        self._hear("")
        reason = self._why_stand()
        if not reason and self._spool.full:
            reason = f"the spool is full, nothing is acknowledged: {self._uploader.waits_for}"
        if reason:
            self._stop.wait(0.05)
            answer: dict[str, Any] = {"wait": reason}
        else:
            answer = self._link.episode(self._finished, POLL)
        self._clock.lapse("idle")
        if "start" not in answer:
            held = self._link.wishes.hold or self._link.wishes.paused
            doing = "stopped" if self._latched else "holding" if held else "idle"
            self._set(doing, answer.get("wait", ""))
            return None
        self._finished = None
        return answer["start"]

    # -- an episode ------------------------------------------------------------------------------------------

    def _play(self, start: dict[str, Any]) -> None:
        self._step = 0
        self._set("resetting")
        before, takeovers = self._clock.seconds, self._counts["takeovers"]
        self._episode = episode = f"{self.writer}-{self._spool.next_episode()}"
        configuration = self._driver.reset(start["configuration"], start["region"])
        self._clock.spend("reset", self._driver.reset_seconds)
        region = str(configuration.get("region", start["region"]))
        # What is asked in this episode, where that differs between episodes; else the job's.
        instruction = str(configuration.get("instruction", self._job.instruction))
        header = {
            "source": "real",
            "task": self._job.task,
            "instruction": instruction,
            "region": region,
            "configuration": configuration,
            "episode": episode,
            "writer": self.writer,
            "robot": self._link.name,
            "parameters": start["parameters"],
        }
        recorder = Recorder(header, self._settings.codec)
        self._operator.begin()
        self._pilot.begin(episode, start["parameters"], instruction)
        self._held_since = None
        try:
            keep = self._control(recorder)
        except BaseException:
            self._keep(recorder)  # an arm that fails ends the episode, it does not undo it
            raise
        if keep and start["parameters"].get("record", True):
            self._keep(recorder)
        if not len(recorder):
            return
        last = recorder.last
        self._counts["episodes"] += 1
        self._counts["successes"] += last.success and keep
        self._finished = {
            "start": start["id"],
            "episode": episode,
            "region": region,
            "configuration": configuration,
            "parameters": start["parameters"],
            "success": last.success,
            "truncated": last.truncated,
            "discarded": not keep,
            "steps": len(recorder),
            "return": recorder.total_reward,
            "takeovers": self._counts["takeovers"] - takeovers,
            "seconds": self._clock.seconds - before,
            "version": recorder.version,
        }
        word = "success" if last.success else "discarded" if not keep else "no success"
        log.info("%s: %s after %d steps", episode, word, len(recorder))

    def _keep(self, recorder: Recorder) -> None:
        if len(recorder):
            recorder.truncate()  # unless the task has ended it
            recorder.see(self._look())
            self._spool.add(recorder.entries())

    def _control(self, recorder: Recorder) -> bool:
        """The control loop: until the episode ends. Whether it is worth keeping."""
        began, acting = self._clock.seconds, False
        while not self._must_leave() and not self._has_given_up():
            mark = self._hear("discard", "success", "failure")
            if mark in ("success", "failure"):
                recorder.conclude(mark == "success")
            if mark:
                return mark != "discard"
            reason = self._why_stand()
            if reason:
                if self._latched or self._link.wishes.detach:
                    return True
                self._stand(reason)
                continue
            seen = self._look()
            recorder.see(seen)
            person = self._operator.act(Moment(len(recorder), self._driver.tool(), self._driver))
            if acting and person is None:
                self._pilot.drop()  # handed back: the person went where the old chunk did not expect
            self._counts["takeovers"] += person is not None and not acting
            acting = person is not None
            if not self._pilot.ready:
                on_late = self._stop_waiting if acting else self._hold_on
                reason = self._pilot.ask(len(recorder), seen, on_late)
                if reason and not acting:
                    self._stand(reason)
                    continue
            self._held_since = None
            self._clock.lapse("wait", hidden=self._period)
            if self._execute(recorder, person, began):
                return True
        return True

    def _execute(self, recorder: Recorder, person: np.ndarray | None, began: float) -> bool:
        """One control step by the person, if one acts, else by the policy. Whether the episode ended with it."""
        acting = person is not None
        self._set("takeover" if acting else "running")
        cue = self._pilot.next() if self._pilot.ready or not acting else None
        action = person if acting else cue.action
        verdict = self._safety(
            action, self._driver.target(), self._driver.tool(), 0.0 if acting else cue.age
        )
        executed = np.asarray(self._driver.command(verdict.action), np.float32)
        self._clock.spend("motion", self._period)
        self._clock.count("takeover", self._period if acting else 0.0)
        outcome = self._judge(len(recorder) + 1)
        wanted = (
            executed if cue is None else np.where(np.isfinite(cue.action), cue.action, executed)
        )
        recorder.step(
            Step(
                executed,
                wanted,
                acting,
                None if acting else cue.plan,
                -1 if acting else cue.index,
                verdict.refused,
                self._clock.seconds - began,
            ),
            outcome,
        )
        self._step, self._action = len(recorder), executed.tolist()
        return outcome.terminated or outcome.truncated

    def _judge(self, steps: int) -> Outcome:
        outcome = self._driver.judge()
        too_long = 0 < self._job.max_steps <= steps and not outcome.terminated
        return outcome._replace(truncated=True) if too_long else outcome

    def _look(self) -> Seen:
        observation = self._driver.read()
        state = np.array(observation[STATE], np.float32)
        return Seen(state, frames.encode(observation, self._settings.codec))

    # -- standing still --------------------------------------------------------------------------------------

    def _why_stand(self) -> str:
        """Why the arm must not move now; empty when it may."""
        wishes = self._link.wishes
        if wishes.estop > self._estop_seen:
            self._estop_seen, self._latched = wishes.estop, True
            log.warning("emergency stop was asked for: latched until it is released on this PC")
        if self._latched:
            return "stopped: released by the operator's u key or by starting attach again"
        if not self._link.connected:
            return f"the gateway has been silent for {self._link.silent_s:.1f} s"
        if wishes.hold:
            return "held from the cluster"
        return "the run is paused" if wishes.paused else ""

    def _stand(self, reason: str) -> None:
        """Hold for a moment. What was left of the chunk is not executed afterwards."""
        by_person = self._link.connected and (self._link.wishes.hold or self._link.wishes.paused)
        self._hold(reason, by_person)
        self._pilot.drop()
        self._stop.wait(0.02)
        self._clock.lapse("held" if by_person else "wait")

    def _hold_on(self) -> bool:
        """A chunk is late: hold. Whether to wait on for it."""
        self._hold("no chunk from the policy server")
        return not (self._why_stand() or self._stop.is_set())

    @staticmethod
    def _stop_waiting() -> bool:
        """A person acts: what the policy would have done is of interest, but not worth a pause."""
        return False

    def _hold(self, reason: str, by_person: bool = False) -> None:
        self._driver.hold()
        if self._doing != "holding":
            self._counts["holds"] += 1
            log.warning("holding: %s", reason)
        self._set("holding", reason)
        if by_person:
            self._held_since = None
        elif self._held_since is None:
            self._held_since = time.monotonic()

    def _has_given_up(self) -> bool:
        since = self._held_since
        if since is None or time.monotonic() - since < self._settings.give_up_s:
            return False
        log.warning(
            "held for %g s, the episode is closed: %s", self._settings.give_up_s, self._reason
        )
        return True

    def _hear(self, *awaited: str) -> str:
        """What the operator said: stop and rearm are obeyed here, the last of `awaited` is returned."""
        heard = ""
        for mark in self._operator.marks():
            if mark in ("stop", "rearm"):
                self._latched = mark == "stop"
                log.warning("emergency stop %s", "latched" if self._latched else "released")
            elif mark in awaited:
                heard = mark
        return heard

    def _set(self, doing: str, reason: str = "") -> None:
        if doing == "idle" and reason and reason != self._reason:
            log.info("waiting: %s", reason)
        self._doing, self._reason = doing, reason


def command(argv: list[str]) -> int:
    """`twinrl attach`."""
    from robot_bridge.attach import main

    return main(argv)
