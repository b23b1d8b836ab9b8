"""The control loop: a thread at the arm's rate, and the only thing that moves the arm.

A control step is one action, some ten ticks long. At its end the loop says what was executed and what is seen now,
and begins the next one: the person's, if one acts, else the policy's, cut from the newest plan. In every tick it
reads the arm, asks the watchdog, and hands on the set-point that the safety filter makes of the way to the target.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Dict, NamedTuple

import numpy as np

from robot_bridge.clock import RobotClock
from robot_bridge.driver import Commanded, Driver, Outcome
from robot_bridge.eyes import Eyes, View
from robot_bridge.motion import between
from robot_bridge.operator import Moment, Operator
from robot_bridge.safety import Measured, SafetyFilter, Verdict
from robot_bridge.watchdog import HOLDING, MOVING, Ruling, Watchdog, obey

log = logging.getLogger(__name__)
PAUSE = 0.05  # s between looks while there is nothing to do
STALE = 0.5  # s after which a plan that was not begun is too old
PATIENCE = 0.5  # s that a simulated clock waits for the policy although a person acts
REST = np.array([0, 0, 0, 0, 0, 0, 1], np.float32)  # the actions before an episode's first


class Plan(NamedTuple):
    """A chunk from the policy, and where its wholly executed rows belong."""

    actions: np.ndarray  # (C, 7) float32
    version: int
    number: int  # in the episode
    info: Dict[str, np.ndarray]  # policy.* columns
    first: int = 0  # the step of the episode that its first action is meant for


class Executed(NamedTuple):
    """One control step that has ended."""

    action: np.ndarray  # (7,) what was executed
    policy_action: np.ndarray  # (7,) what the policy wanted
    intervention: bool  # a person acted
    plan: Plan | None  # None where no policy acted
    index: int  # in the plan
    refused: bool  # the safety filter refused the whole command, or a hold cut the step short
    causes: tuple  # why it is not what was asked for
    timestamp: float  # s of the robot's clock in the episode, at the step's end
    outcome: Outcome
    view: View  # at the step's end
    skew: float  # s, of that view


class _Step(NamedTuple):
    """The control step under way."""

    start: np.ndarray  # (6,) where the target was
    verdict: Verdict
    wanted: np.ndarray  # (7,)
    intervention: bool
    plan: Plan | None
    index: int
    number: int  # in the episode, the first is 1


class ControlLoop:
    """Plays one episode after the other: `begin`, then `follow` plans and take what was `finished`, then `end`."""

    def __init__(
        self,
        driver: Driver,
        safety: SafetyFilter,
        watchdog: Watchdog,
        operator: Operator,
        clock: RobotClock,
        period_s: float,
        max_steps: int = 0,
        patient: bool = False,
    ) -> None:
        """`period_s`: a control step, s of the robot's clock. `max_steps`: of an episode, 0 for no limit. `patient`: that
        there is no plan after the last one is nothing to hold for, as where a person lets each begin."""
        self._patient = patient
        self._driver, self._safety, self._watchdog = driver, safety, watchdog
        self._operator, self._clock, self._max_steps = operator, clock, max_steps
        self._tick_s = safety.tick_s
        self._ticks = max(1, round(period_s / safety.tick_s))
        self._period_s = self._ticks * self._tick_s
        self.eyes = Eyes(driver, self._tick_s, watchdog.patience.camera_s)
        self.finished: queue.Queue[Executed] = queue.Queue()
        self.marks: queue.Queue[str] = queue.Queue()  # success, failure, discard, confirm
        self.failed: BaseException | None = None
        self.late_ticks = self.ticks = 0
        self._changed = threading.Condition()
        self._active = self._closing = False
        self._quiet = threading.Event()
        self._quiet.set()
        self._forget()
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._thread.start()

    # -- from the bridge's thread ----------------------------------------------------------------------------

    def begin(self) -> View:
        """An episode starts where the arm stands; what is seen there."""
        measured = self._driver.measure()
        self._safety.begin(measured.pose, 1.0)
        self._forget()
        self.eyes.begin()
        self._began = self._clock.seconds
        self._watchdog.plan(None)
        view = self._look(measured)
        with self._changed:
            self._active = True
            self._quiet.clear()
            self._changed.notify_all()
        return view

    def look(self) -> View | None:
        """What is seen now; None if the loop does not say within a second."""
        request: Future = Future()
        with self._changed:
            self._asked = request
            self._changed.notify_all()
        try:
            return request.result(1.0)
        except FutureTimeout:
            return None

    def end(self) -> None:
        """The episode is over: come to rest, and leave the arm to the driver."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        while not self._quiet.wait(PAUSE):
            if not self._thread.is_alive():
                break
        self._watchdog.plan(None)
        self._watchdog.blind("")

    def follow(self, plan: Plan) -> None:
        """Go on with `plan`; its actions for steps that are over are cut. After a hold what was seen before it is of
        no use: only a plan for the next step is taken."""
        with self._changed:
            if self._held and (plan.first != self._number or self._step is not None):
                return
            if self._held:
                self._held = False
                self._watchdog.plan(None)  # none is missing any more
            self._plan, self._came = plan, time.monotonic()
            self._changed.notify_all()

    def drop(self) -> None:
        """What is left of the plan is not executed."""
        with self._changed:
            self._plan = None

    @property
    def steps(self) -> int:
        """Control steps that were begun in this episode."""
        return self._number

    @property
    def planned(self) -> int:
        """Control steps that are planned and not yet begun."""
        with self._changed:
            plan = self._plan
            return 0 if plan is None else max(0, plan.first + len(plan.actions) - self._number)

    @property
    def acting(self) -> bool:
        """A person acts."""
        return self._acting

    def hear(self) -> None:
        """What the operator says, while no episode runs."""
        self._obey()

    def close(self) -> None:
        """End the thread; the arm comes to rest."""
        with self._changed:
            self._ending = self._closing = True
            self._changed.notify_all()
        self._thread.join(5)

    # -- the loop --------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._plan: Plan | None = None
        self._step: _Step | None = None
        self._number, self._tick_of_step = 0, 0
        self._acting = self._over = self._ending = False
        self.fault = ""  # what the arm has reported in this episode
        self.takeovers = 0
        self.ruling = Ruling(MOVING, "", False)
        self._newest, self._earlier = REST, REST
        self._asked: Future | None = None
        self._held, self._came = False, 0.0  # since the last plan; when that came
        self._waiting = False
        self._ended = time.monotonic()  # of the last step

    def _run(self) -> None:
        while not self._closing:
            with self._changed:
                self._changed.wait_for(lambda: self._active or self._closing, PAUSE)
                if not self._active:
                    continue
            try:
                self._play()
            except BaseException as error:
                log.exception("the control loop failed")
                self.failed = error
            finally:
                with self._changed:
                    self._active = False
                    self._quiet.set()

    def _play(self) -> None:
        """One episode, and then until the arm has come to rest."""
        rest = 0
        self._clock.lapse("idle")
        while rest < self._safety.settling:
            rest = rest + 1 if self._ending else 0
            if self._tick():
                self.ticks += 1
                self.late_ticks += not self._clock.spend(self._kind(), self._tick_s)

    def _kind(self) -> str:
        """What the robot's time is spent on."""
        if self._step is not None:
            if self._acting:
                self._clock.count("takeover", self._tick_s)
            return "motion"
        return "held" if self.ruling.by_person else "wait"

    def _tick(self) -> bool:
        """Read, decide, command. False where a simulated clock stands still instead, for a plan is awaited."""
        measured = self._driver.measure()
        self._obey()
        self.fault = self.fault or measured.fault
        self._watchdog.blind(self.eyes.wrong.text)
        self.ruling = self._watchdog.ask()
        if self.fault and self.ruling.may_move:
            self.ruling = Ruling(HOLDING, f"the arm does not move: {self.fault}")
        if self._asked is not None:
            asked, self._asked = self._asked, None
            asked.set_result(self._look(measured))
        told_later: _Step | None = None
        told = self._driver.opening()  # before the next set-point says something else
        if self._step is not None:
            if self._tick_of_step >= self._ticks:
                if self._goes_on:
                    told_later, self._step = self._step, None
                else:
                    self._finish(self._step, measured, self._step.verdict.action, told)
            elif self._ending or not self.ruling.may_move or self._safety.backing_off:
                self._cut(measured, told)
        if self._step is None and not self._ending:
            if not self.ruling.may_move:
                self._hold()
            elif (
                not (self._over or self.eyes.fault or self._next(measured))
                and self._driver.lockstep
            ):
                self._await_plan()
                return False
        if self._waiting:
            self._waiting = False
            self._clock.lapse("wait", hidden=self._period_s)
        wanted = None
        if self._step is not None:
            self._tick_of_step += 1
            share = self._tick_of_step / self._ticks
            wanted = between(self._step.start, self._step.verdict.target, share)
        self._driver.servo(self._safety.tick(wanted, measured), self._safety.gripper)
        self.eyes.tick()
        if told_later is not None:
            self._finish(told_later, measured, told_later.verdict.action, told)
            if self._over and self._step is not None:  # its first tick was one too many
                self._safety.settle(self._step.start)
                self._step, self._number = None, self._number - 1
        return True

    @property
    def _goes_on(self) -> bool:
        """What has ended may be judged and looked at when the next set-point is out: neither takes its time from the pace.

        A simulated clock that stands still meanwhile needs no such haste.
        """
        last = 0 < self._max_steps <= self._number
        return (
            not (self._driver.lockstep or self._ending or last or self._safety.backing_off)
            and self.ruling.may_move
        )

    def _hold(self) -> None:
        """What was planned before the hold is not executed after it."""
        if not self._held:
            self.drop()
            self._held = True

    def _next(self, measured: Measured) -> bool:
        """Begin the next control step, if anybody says what to do in it."""
        plan, index = self._cue()
        if plan is None and self._driver.lockstep and self._boundary_s < PATIENCE:
            return (
                False  # also while a person acts: what the policy would have done is kept beside it
            )
        place = self._safety.target
        moment = Moment(self._number, measured.pose[:3], self._driver, place, self._safety.gripper)
        person = self._operator.act(moment)
        if self._acting and person is None:
            self.drop()  # handed back: the person went where the old chunk did not expect
            plan, index = None, -1
        self.takeovers += person is not None and not self._acting
        self._acting = person is not None
        if person is None and plan is None:
            return False
        action = person if person is not None else plan.actions[index]
        start = place.copy()
        verdict = self._safety.step(action, measured)
        wished = verdict.action if plan is None else plan.actions[index]
        wished = np.where(np.isfinite(wished), wished, verdict.action).astype(np.float32)
        if person is not None:
            plan, index = None, -1
        self._number += 1
        self._step = _Step(start, verdict, wished, person is not None, plan, index, self._number)
        self._tick_of_step = 0
        if (
            not self._driver.lockstep and not self._patient
        ):  # there a plan cannot end before its last step does
            left = 1 if plan is None else len(plan.actions) - index
            self._watchdog.plan(time.monotonic() + left * self._period_s)
        return True

    @property
    def _boundary_s(self) -> float:
        return time.monotonic() - self._ended

    def _cue(self) -> tuple[Plan | None, int]:
        """The plan for the next step, and which of its actions that is; a plan that has ended is dropped."""
        with self._changed:
            plan = self._plan
            index = -1 if plan is None else self._number - plan.first
            old = index == 0 and not self._driver.lockstep and time.monotonic() - self._came > STALE
            if plan is None or old or not 0 <= index < len(plan.actions):
                self._plan, plan, index = None, None, -1
        return plan, index

    def _cut(self, measured: Measured, told: float | None) -> None:
        """The step ends here, and what the arm was led to meanwhile is what was executed."""
        step = self._step
        if step is None:
            return
        done = self._safety.settle(step.start)
        action = np.array([*done, self._safety.gripper], np.float32)
        self._finish(step, measured, action, told, cut=True)
        self._hold()

    def _finish(
        self,
        step: _Step,
        measured: Measured,
        action: np.ndarray,
        told: float | None,
        cut: bool = False,
    ) -> None:
        """`told`: what the fingers were, where that is not `action`'s opening."""
        if step is self._step:
            self._step = None
        self._ended = time.monotonic()
        if told is not None:
            action = np.array([*action[:6], told], np.float32)
        outcome = self._driver.ended(action)
        self._earlier, self._newest = self._newest, action
        if 0 < self._max_steps <= step.number and not outcome.terminated:
            outcome = outcome._replace(truncated=True)
        self._over = outcome.terminated or outcome.truncated
        causes = (*step.verdict.causes, self.ruling.state) if cut else tuple(step.verdict.causes)
        view = self._look(measured, self._safety.target if cut else step.verdict.target)
        self.finished.put(
            Executed(
                action,
                step.wanted,
                step.intervention,
                step.plan,
                step.index,
                step.verdict.refused or cut,
                causes,
                self._clock.seconds - self._began,
                outcome,
                view,
                0.0 if self._driver.lockstep else view.skew,
            )
        )

    def _look(self, measured: Measured, target: np.ndarray | None = None) -> View:
        pose = self._safety.target if target is None else target
        return self.eyes.view(measured, Commanded(pose, self._newest, self._earlier))

    def _await_plan(self) -> None:
        """The simulated clock stands still while the policy thinks; counted as if an arm had waited."""
        self._waiting = True
        with self._changed:
            self._changed.wait_for(
                lambda: self._asked or self._ending or self._plan is not None, PAUSE
            )

    def _obey(self) -> None:
        for said in self._operator.marks():
            if not obey(said, self._watchdog):
                self.marks.put(said.partition(":")[0])
