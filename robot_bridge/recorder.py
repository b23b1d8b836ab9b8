"""Turns what happened in one episode into numbered-to-be segments with a frame at every step."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from robot_bridge import frames
from robot_bridge.control import Executed
from robot_bridge.driver import Outcome
from robot_bridge.spool import Entry
from twinrl.core.gripper import TOGGLED
from twinrl.core.provenance import provenance
from twinrl.core.wire import Arrays

MAX_STEPS = 64  # of one segment
STATE = "observation.state"


class Seen(NamedTuple):
    """One observation as it is kept: what the policy saw, byte for byte."""

    state: np.ndarray  # (S,) float32
    frames: frames.Frames


class Recorder:
    """One episode. `see` and `step` alternate; `entries` gives what goes into the spool."""

    def __init__(self, header: dict[str, Any], codec: str, toggle: float = 0.0) -> None:
        """`toggle`: the reward of each step that opens or closes the gripper, beside the task's."""
        self._header, self._codec, self._toggle = header, codec, toggle
        self._opening = 1.0  # what the gripper was told last
        self._seen: list[Seen] = []
        self._steps: list[Executed] = []
        self._outcomes: list[Outcome] = []
        self._cut_short = False

    def __len__(self) -> int:
        return len(self._steps)

    def see(self, seen: Seen) -> None:
        """The observation before the next step; one that was not acted upon is replaced."""
        del self._seen[len(self._steps) :]
        self._seen.append(seen)

    def step(self, done: Executed) -> None:
        """A step taken from the observation seen last."""
        assert len(self._seen) == len(self._steps) + 1, (len(self._seen), len(self._steps))
        toggled = abs(float(done.action[6]) - self._opening) > TOGGLED
        self._opening = float(done.action[6])
        reward = done.outcome.reward + self._toggle * toggled
        self._steps.append(done)
        self._outcomes.append(done.outcome._replace(reward=reward))

    @property
    def newest(self) -> Seen:
        """The observation seen last."""
        return self._seen[-1]

    def truncate(self) -> None:
        """Something outside the task ended the episode with the last step."""
        if self._outcomes and not self._outcomes[-1].terminated:
            self._cut_short = not self._outcomes[-1].truncated
            self._outcomes[-1] = self._outcomes[-1]._replace(truncated=True)

    def conclude(self, success: bool) -> None:
        """A person ended the episode with the last step."""
        if self._outcomes:
            other = self._outcomes[-1].reward - self._steps[-1].outcome.reward
            self._outcomes[-1] = Outcome(float(success) + other, True, False, success)

    @property
    def last(self) -> Outcome | None:
        """The last step's outcome, None before the first step."""
        return self._outcomes[-1] if self._outcomes else None

    @property
    def total_reward(self) -> float:
        """The sum of all rewards."""
        return float(sum(outcome.reward for outcome in self._outcomes))

    @property
    def interventions(self) -> int:
        """Steps that a person commanded."""
        return sum(step.intervention for step in self._steps)

    @property
    def version(self) -> int:
        """The policy version that acted last, -1 for none."""
        return next((s.plan.version for s in reversed(self._steps) if s.plan is not None), -1)

    def entries(self, more: dict[str, Any] | None = None) -> list[Entry]:
        """The segments, split at chunk boundaries, of an episode whose last observation was seen.

        `more` is known at the end only, and stands in each header.
        """
        self._header = {**self._header, **(more or {})}
        assert len(self._seen) == len(self._steps) + 1, (len(self._seen), len(self._steps))
        cuts = self._cuts()
        return [self._entry(low, high) for low, high in zip(cuts, cuts[1:])]

    def _cuts(self) -> list[int]:
        """Where segments begin: where a person takes over or gives back, and not inside a chunk otherwise."""
        cuts = [0]
        for end in (*(t for t in range(1, len(self)) if self._changes_hands(t)), len(self)):
            while end - cuts[-1] > MAX_STEPS:
                limit = cuts[-1] + MAX_STEPS
                starts = [t for t in range(cuts[-1] + 1, limit + 1) if not self._inside_chunk(t)]
                cuts.append(starts[-1] if starts else limit)
            cuts.append(end)
        return cuts

    def _changes_hands(self, t: int) -> bool:
        return self._steps[t].intervention != self._steps[t - 1].intervention

    def _inside_chunk(self, t: int) -> bool:
        before, after = self._steps[t - 1], self._steps[t]
        return after.plan is not None and before.plan is after.plan

    def _entry(self, low: int, high: int) -> Entry:
        steps, outcomes = self._steps[low:high], self._outcomes[low:high]
        seen = self._seen[low : high + 1]
        columns: Arrays = {
            "action": np.array([s.action for s in steps], "<f4"),
            "policy_action": np.array([s.policy_action for s in steps], "<f4"),
            "reward": np.array([o.reward for o in outcomes], "<f4"),
            "terminated": np.array([o.terminated for o in outcomes], bool),
            "truncated": np.array([o.truncated for o in outcomes], bool),
            "success": np.array([o.success for o in outcomes], bool),
            "intervention": np.array([s.intervention for s in steps], bool),
            "policy_version": np.array([s.plan.version if s.plan else -1 for s in steps], "<i8"),
            "chunk_id": np.array([s.plan.number if s.plan else -1 for s in steps], "<i4"),
            "timestamp": np.array([s.timestamp for s in steps], "<f8"),
            "skew": np.array([s.skew for s in steps], "<f4"),
            STATE: np.array([s.state for s in seen], "<f4"),
            "frame_step": np.arange(len(seen), dtype="<i4"),
            **self._policy_columns(low, high),
            **frames.pack([s.frames for s in seen], self._codec),
        }
        header = dict(self._header, first_step=low, last=high == len(self._steps))
        header["filtered"] = [[t, list(s.causes)] for t, s in enumerate(steps) if s.causes]
        header["provenance"] = provenance()  # of this PC; the cluster's side only passes it on
        return {"header": header, "codec": self._codec}, columns

    def _policy_columns(self, low: int, high: int) -> dict[str, np.ndarray]:
        """Rows of the chunks that were executed as planned, to their end or to the episode's."""
        starts, rows = [], []
        for t in range(low, high):
            plan = self._steps[t].plan
            if plan is None or self._steps[t].index != 0 or not plan.info:
                continue
            end = t + len(plan.actions)
            if not self._cut_short:
                end = min(end, len(self._steps))
            run = self._steps[t:end]
            whole = len(run) == end - t and all(s.plan is plan and not s.refused for s in run)
            if whole and end <= high:
                starts.append(t - low)
                rows.append(plan.info)
        if not rows:
            return {}
        names = set.intersection(*(set(row) for row in rows))
        columns = {name: np.stack([row[name] for row in rows]) for name in sorted(names)}
        return {"chunk_step": np.array(starts, "<i4"), **columns} if columns else {}
