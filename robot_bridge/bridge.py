"""The robot PC's process: asks for a start, plays the episode, records it. The arm moves only from here."""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import Any, NamedTuple

from robot_bridge import frames
from robot_bridge.alarms import Alarms
from robot_bridge.clock import RobotClock
from robot_bridge.control import ControlLoop, Executed, Plan
from robot_bridge.driver import Driver
from robot_bridge.eyes import View
from robot_bridge.link import Link, Uploader
from robot_bridge.operator import Operator
from robot_bridge.pilot import POLL, Pilot
from robot_bridge.planned import PlannedPath
from robot_bridge.protocol import Job
from robot_bridge.recorder import Recorder, Seen
from robot_bridge.recovery import Recovery
from robot_bridge.safety import SafetyFilter
from robot_bridge.scene import Stopped
from robot_bridge.spool import Spool
from robot_bridge.watchdog import ESTOP, HOLDING, STOPPED, Watchdog, heed
from twinrl.core.errors import TwinRLError

log = logging.getLogger(__name__)
LOOK = 0.01  # s between looks at an episode
COUNTS = ("episodes", "invalid", "successes", "takeovers", "faults", "steps", "interventions")


class Settings(NamedTuple):
    """How the bridge behaves; times in real seconds."""

    speed: float = 1.0  # of the simulated clock, 1 = real time; a real arm knows only 1
    speed_scale: float = 1.0  # of the motion: at 0.2 each control step takes five times as long
    codec: str = "jpeg"
    confirm: bool = False  # a person lets each chunk begin
    give_up_s: float = 10.0  # an episode held for so long by link or policy is closed as truncated
    max_lag: int = 20  # versions that an acting policy may be behind the run's newest
    episodes: int = 0  # leave after so many, 0 = when told
    alone_s: float = 0.0  # a stop of so long that nobody can end is an error; 0: somebody can
    drain_s: float = 3.0  # on leaving, wait so long for the replay service's acknowledgements


class Bridge:
    """One attached robot. `run` returns when it is told to leave."""

    def __init__(
        self,
        link: Link,
        driver: Driver,
        operator: Operator,
        safety: SafetyFilter,
        watchdog: Watchdog,
        spool: Spool,
        job: Job,
        settings: Settings,
    ) -> None:
        self._link, self._driver, self._operator, self._safety = link, driver, operator, safety
        self._watchdog, self._spool, self._job, self._settings = watchdog, spool, job, settings
        self.writer = f"{link.name}-{spool.id}"
        period = 1.0 / (job.control_hz * settings.speed_scale)
        self._clock = RobotClock(settings.speed)
        self._loop = ControlLoop(
            *(driver, safety, watchdog, operator, self._clock, period, job.max_steps),
            patient=settings.confirm,
        )
        self._offered: Plan | None = None  # a chunk that a person has not let begin yet
        self._pilot = Pilot(
            link,
            settings.codec,
            period / settings.speed,
            self._offer,
            job.run,
            settings.max_lag,
        )
        self._path = PlannedPath(driver, safety)
        self._uploader = Uploader(link, spool)
        self._stop = threading.Event()
        self._doing, self._reason = "idle", ""
        self._episode, self._step = "", 0
        self._action = [0.0] * 7
        self._estop_seen = 0
        self._held_since: float | None = None  # by link or policy
        self._alarms = Alarms(watchdog.patience.skew_s)
        self._void = ""  # why the last episode counts for nothing
        self._recovery = Recovery(driver, safety, watchdog, self._clock, settings.alone_s)
        self._finished: dict[str, Any] | None = None
        self._counts = dict.fromkeys(COUNTS, 0)

    def stop(self) -> None:
        """Leave: the running episode is closed as truncated and kept."""
        self._stop.set()

    def state(self) -> dict[str, Any]:
        """How the arm is; goes out with each heartbeat. `totals` count from the bridge's start."""
        causes = {f"filter/{cause}": n for cause, n in dict(self._safety.counts).items()}
        causes.update({f"camera/{kind}": n for kind, n in dict(self._loop.eyes.counts).items()})
        uploads = {"segments": self._uploader.sent, "refused": self._uploader.refused}
        uploads["stale_chunks"] = self._pilot.refused
        uploads.update(bytes=self._link.sent_bytes, spared_bytes=self._link.spared_bytes)
        ticks = {"ticks": self._loop.ticks, "late_ticks": self._loop.late_ticks}
        watch = {"holds": self._watchdog.holds, "stops": self._watchdog.stops}
        totals = {**self._counts, **watch, **self._clock.stats(), **causes, **uploads, **ticks}
        return {
            "doing": self._doing,
            "reason": self._reason,
            "uploads": self._uploader.waits_for,
            "episode": self._episode,
            "step": self._step,
            "action": self._action,
            "path": self._path.told
            if self._doing == "running" or self._offered is not None
            else {},
            "estop_seen": self._estop_seen,
            "held_at": self._watchdog.held_at,
            "speed": self._settings.speed,
            "chunk_ms": self._pilot.latency_ms,
            "totals": totals,
            **self._alarms.state(),
            **self._link.offset.state(),
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
            self._loop.close()
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
        self._loop.hear()
        self._obey_cluster()
        ruling = self._watchdog.ask()
        self._operator.notice(ruling)
        self._recovery.attend(ruling)
        reason = ruling.reason
        if not reason and self._spool.full:
            reason = f"the spool is full, nothing is acknowledged: {self._uploader.waits_for}"
        if reason:
            self._stop.wait(0.05)
            answer: dict[str, Any] = {"wait": reason}
        else:
            answer = self._link.episode(self._finished, POLL)
        self._clock.lapse("idle")
        if "start" not in answer:
            state = ruling.state if ruling.by_person or ruling.state in (STOPPED, ESTOP) else "idle"
            self._set("stopped" if state == ESTOP else state, answer.get("wait", ""))
            return None
        self._finished = None
        return answer["start"]

    # -- an episode ------------------------------------------------------------------------------------------

    def _play(self, start: dict[str, Any]) -> None:
        self._step = 0
        self._set("resetting")
        before = self._clock.seconds
        self._episode = episode = f"{self.writer}-{self._spool.next_episode()}"
        try:
            configuration = self._driver.reset(start["configuration"], start["region"])
        except Stopped as error:
            self._watchdog.estop(str(error))
            return
        except TwinRLError as error:  # the start goes to whoever asks next
            self._watchdog.stop(f"the reset failed: {error}")
            return
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
        recorder = Recorder(header, self._settings.codec, self._job.toggle)
        self._operator.begin()
        self._pilot.begin(episode, start["parameters"], instruction)
        self._held_since, self._offered = None, None
        try:
            keep = self._control(recorder)
        except BaseException:
            self._keep(recorder)  # an arm that fails ends the episode, it does not undo it
            raise
        if keep and start["parameters"].get("record", True):
            self._keep(recorder)
        self._counts["takeovers"] += self._loop.takeovers
        faulty = self._loop.eyes.fault or self._loop.fault
        if faulty:
            self._alarms.tell(f"episode {episode} does not count: {faulty}")
        if self._loop.fault:
            self._counts["faults"] += 1
            self._recovery.after(self._loop.fault)
        if not len(recorder):
            return
        last = recorder.last
        self._counts["invalid" if faulty else "episodes"] += 1
        self._counts["steps"] += len(recorder)
        self._counts["interventions"] += recorder.interventions
        self._counts["successes"] += last.success and keep and not self._void
        self._finished = {
            "start": start["id"],
            "episode": episode,
            "region": region,
            "configuration": configuration,
            "parameters": start["parameters"],
            "success": last.success,
            "truncated": last.truncated or bool(self._void and not last.terminated),
            "discarded": not keep,
            "invalid": self._void,
            "steps": len(recorder),
            "return": recorder.total_reward,
            "takeovers": self._loop.takeovers,
            "interventions": recorder.interventions,
            "seconds": self._clock.seconds - before,
            "version": recorder.version,
        }
        word = "success" if last.success else "discarded" if not keep else "no success"
        word = f"invalid, {self._void}," if self._void else word
        log.info("%s: %s after %d steps", episode, word, len(recorder))

    def _keep(self, recorder: Recorder) -> None:
        # Of images that were not what lay before the arm nobody may learn, nor know since when they were not.
        if len(recorder) and not self._loop.eyes.fault:
            recorder.truncate()  # unless the task has ended it
            self._spool.add(recorder.entries(self._link.offset.header()))

    def _control(self, recorder: Recorder) -> bool:
        """Until the episode ends. Whether it is worth keeping."""
        recorder.see(self._seen(self._loop.begin()))
        mark = ""
        try:
            while not mark and not self._must_leave() and not self._has_given_up():
                if self._take(recorder, LOOK):
                    break
                self._obey_cluster()
                ruling = self._loop.ruling
                self._operator.notice(ruling)
                if ruling.state in (STOPPED, ESTOP) or self._loop.fault:
                    self._set("stopped", ruling.reason)
                    break
                if self._link.wishes.detach and not ruling.may_move:
                    break
                eyes = self._loop.eyes
                if eyes.fault and not eyes.wrong.kind:
                    break  # it sees again, but this episode is spoilt
                self._tell(ruling)
                self._ask(recorder)
                mark = self._heard()
        finally:
            self._loop.end()
            self._pilot.forget()
        if self._loop.failed is not None:
            raise self._loop.failed
        ended = recorder.last is not None and (recorder.last.terminated or recorder.last.truncated)
        while not ended and not self._loop.finished.empty():
            ended = self._take(recorder, 0.0)
        if mark in ("success", "failure"):
            recorder.conclude(mark == "success")
        cut = "" if ended or mark else self._loop.fault or self._reason or "left in mid-episode"
        self._void = self._loop.eyes.fault or cut
        return mark != "discard"

    def _take(self, recorder: Recorder, patience: float) -> bool:
        """Record the next step that the loop has finished, if it does within `patience` s; whether it was the last."""
        try:
            done: Executed = (
                self._loop.finished.get(timeout=patience)
                if patience
                else self._loop.finished.get_nowait()
            )
        except queue.Empty:
            if self._loop.failed is not None:
                raise self._loop.failed from None
            return False
        recorder.step(done)
        if not self._driver.lockstep:
            self._alarms.skew(done.view)
        recorder.see(self._seen(done.view))
        self._step, self._action = len(recorder), done.action.tolist()
        return done.outcome.terminated or done.outcome.truncated

    def _seen(self, view: View) -> Seen:
        self._viewed = time.monotonic()
        images = {frames.key_of(name): frame.image for name, frame in view.frames.items()}
        return Seen(view.state, frames.encode(images, self._settings.codec))

    def _ask(self, recorder: Recorder) -> None:
        """Ask for a chunk, if it is time to; from what is seen after the last finished step."""
        step = len(recorder)
        # Steps that the arm goes on without an answer.
        left = self._loop.planned + self._loop.steps - step
        ahead = 0 if self._driver.lockstep else min(self._pilot.ahead, self._job.chunk - 1)
        ruling = self._loop.ruling
        if self._offered is not None and self._offered.first == step:
            return  # a person looks at it
        if self._loop.eyes.fault:
            return
        if left > ahead or ruling.by_person or not self._link.connected or not self._pilot.may_ask:
            return
        if left == 0 and time.monotonic() - self._viewed > 2.0 / self._job.control_hz:
            view = self._loop.look()  # it stood: what was seen at the last step's end is old
            if view is None or self._loop.steps > step:
                return
            recorder.see(self._seen(view))
        self._pilot.ask(step, recorder.newest)

    def _offer(self, plan: Plan) -> None:
        if self._settings.confirm:
            self._offered = plan
        else:
            self._loop.follow(plan)
        self._path.show(plan.actions[max(0, self._loop.steps - plan.first) :])

    def _heard(self) -> str:
        """What the operator said of the episode."""
        try:
            mark = self._loop.marks.get_nowait()
        except queue.Empty:
            return ""
        if mark != "confirm":
            return mark
        plan, self._offered = self._offered, None
        if plan is not None:
            self._loop.follow(plan)
        return ""

    # -- standing still --------------------------------------------------------------------------------------

    def _obey_cluster(self) -> None:
        """Hand on to the watchdog what the cluster wants."""
        self._alarms.clock(self._link.offset)
        self._estop_seen = heed(self._link.wishes, self._watchdog, self._estop_seen)

    def _tell(self, ruling: Any) -> None:
        """Keep in `state` what the arm does, and since when it stands for want of link or policy."""
        if self._offered is not None and not self._loop.planned:
            self._set(HOLDING, "the next chunk waits for a person: press c")
            return
        late = self._driver.lockstep and self._pilot.waiting_s > self._watchdog.patience.latch_s / 4
        if ruling.may_move and not late:
            self._held_since = None
            self._set("takeover" if self._loop.acting else "running")
            return
        reason = ruling.reason or self._pilot.reason or "no chunk from the policy server"
        if self._doing != HOLDING:
            log.warning("holding: %s", reason)
        self._set(HOLDING, reason)
        if ruling.by_person:
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

    def _set(self, doing: str, reason: str = "") -> None:
        if doing == "idle" and reason and reason != self._reason:
            log.info("waiting: %s", reason)
        self._doing, self._reason = doing, reason


def command(argv: list[str]) -> int:
    """`twinrl attach`."""
    from robot_bridge.attach import main

    return main(argv)
