"""A script in the place of a person: slow to react, with an unsteady hand, and sometimes wrong."""

from __future__ import annotations

import collections
import time
from typing import Deque

import numpy as np

from robot_bridge.operator import Moment, Operator
from robot_bridge.watchdog import STOPPED, Ruling


class ScriptedOperator(Operator):
    """Takes over with the driver's expert when an episode is slow or the arm is stuck, until the episode ends.

    `slow_after`: control steps without success before the operator steps in. `stuck_after`: steps in which the
    tool moved less than `stuck_m` metres in all. `at_most`: takeovers in one run of the bridge.

    How imperfect it is, all of it off at 0: `noise`: share of the step limits by which the expert's hand trembles,
    drawn by the driver. `delay`: steps from seeing to acting; also the takeover comes so much later. `mistakes`:
    share of takeovers that begin with `mistake_steps` steps in a wrong direction: the expert's step, turned by a
    right angle or more. `seed`: of the mistakes; the same seed makes the same ones in the same takeovers.

    `rearm_after`: s until a latched stop is released, as a person would after a look; 0 never.
    """

    def __init__(
        self,
        slow_after: int = 40,
        stuck_after: int = 12,
        stuck_m: float = 0.01,
        at_most: int = 30,
        noise: float = 0.0,
        delay: int = 0,
        mistakes: float = 0.0,
        mistake_steps: int = 3,
        seed: int = 0,
        rearm_after: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0.0 <= mistakes <= 1.0:
            raise ValueError(f"mistakes is {mistakes}: must be a share from 0 to 1")
        if delay < 0 or mistake_steps < 1:
            raise ValueError(
                f"delay is {delay}, mistake_steps {mistake_steps}: at least 0 and 1 step"
            )
        self.slow_after, self.stuck_after = int(slow_after), int(stuck_after)
        self.stuck_m, self.noise = float(stuck_m), float(noise)
        self.at_most, self.delay = int(at_most), int(delay)
        self.mistakes, self.mistake_steps = float(mistakes), int(mistake_steps)
        self.rearm_after = float(rearm_after)
        self.takeovers = self.mistaken = 0
        self._seed = int(seed)
        self._stopped: float | None = None
        self.begin()

    def begin(self) -> None:
        """An episode starts: the policy's turn."""
        self._acting = False
        self._path: list[np.ndarray] = []
        self._decided: Deque[np.ndarray] = collections.deque()
        self._wrong = 0  # steps of the mistake that are left
        self._heading = np.zeros(3)  # of the mistake

    def act(self, moment: Moment) -> np.ndarray | None:
        """The expert's action once it has taken over."""
        if moment.step >= len(self._path):
            self._path.append(np.asarray(moment.tool))
        if not self._acting and self.takeovers < self.at_most and self._is_needed(moment.step):
            self._step_in()
        if not self._acting:
            return None
        action = moment.driver.expert(self.noise, moment.commanded)
        self._decided.append(self._mistaken(action, moment))
        return self._decided.popleft() if len(self._decided) > self.delay else None

    def notice(self, ruling: Ruling) -> None:
        """A stop is looked at for a while."""
        if ruling.state != STOPPED:
            self._stopped = None
        elif self._stopped is None:
            self._stopped = time.monotonic()

    def marks(self) -> list[str]:
        """Beside a person's at the keys: rearm."""
        said, since = super().marks(), self._stopped
        if since is not None and 0 < self.rearm_after <= time.monotonic() - since:
            self._stopped = None
            said.append("rearm")
        return said

    def _step_in(self) -> None:
        # Drawn from the takeover's number: how many steps the earlier ones had changes nothing.
        rng = np.random.default_rng((self._seed, self.takeovers))
        self._acting = True
        self.takeovers += 1
        if rng.random() < self.mistakes:
            self._wrong, self._heading = self.mistake_steps, rng.normal(size=3)
            self.mistaken += 1

    def _mistaken(self, action: np.ndarray, moment: Moment) -> np.ndarray:
        """The expert's step with its length, in the wrong direction; the gripper stays as it is."""
        if not self._wrong:
            return action
        self._wrong -= 1
        right, wrong = np.asarray(action[:3], float), self._heading
        length = float(np.linalg.norm(right))
        if length > 0.0:
            ahead = right / length
            wrong = wrong - max(0.0, float(wrong @ ahead)) * ahead
        wrong = wrong * (length / max(float(np.linalg.norm(wrong)), 1e-9))
        return np.array([*wrong, 0, 0, 0, moment.gripper], np.float32)

    def _is_needed(self, step: int) -> bool:
        if step >= self.slow_after:
            return True
        recent = np.array(self._path[-self.stuck_after - 1 :])
        if len(recent) <= self.stuck_after:
            return False
        return bool(np.linalg.norm(recent - recent[0], axis=1).max() < self.stuck_m)
