"""What a wanted opening (0 closed, 1 open) makes a gripper do, the same on the arm and in the twin: kind and timing.

An arm's driver asks `Gripper`; the twin's control law (`twins.kernels.command`) is the same rule for many environments.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from twinrl.core.errors import ConfigError

KINDS = ("binary", "continuous")
TOGGLED = 0.5  # a command that moves the fingers by more of their range opens or closes them


class GripperKind(NamedTuple):
    """How a gripper takes commands."""

    kind: str = "binary"
    close_below: float = 0.4  # binary: it closes when less is wanted
    open_above: float = 0.6  # and opens when more is; between both it stays as it is
    busy_s: float = 0.0  # after a command the next one waits so long
    step: float = 0.02  # continuous: smaller changes are no command

    def checked(self) -> GripperKind:
        """Itself; ConfigError says which value cannot be."""
        if self.kind not in KINDS:
            raise ConfigError(f"gripper kind {self.kind!r} is none of {', '.join(KINDS)}")
        if not 0.0 < self.close_below <= self.open_above < 1.0:
            raise ConfigError(
                f"gripper close_below {self.close_below:g} and open_above {self.open_above:g}: must be "
                "between 0 and 1, in this order"
            )
        if not (0.0 <= self.busy_s < 10.0 and 0.0 <= self.step <= 1.0):
            raise ConfigError(
                f"gripper busy_s {self.busy_s:g} must be 0 to 10 s, step {self.step:g} 0 to 1"
            )
        return self


class Gripper:
    """Commands from wanted openings. Called with what is wanted as often as one likes; says what to send, if anything.

    `commanded` (0..1) is what the fingers were last told: what a control loop calls executed.
    """

    def __init__(self, kind: GripperKind, opening: float = 1.0) -> None:
        self.kind = kind.checked()
        self.begin(opening)

    def begin(self, opening: float) -> None:
        """The fingers are open by `opening`, and free to take a command."""
        self.commanded = float(opening)
        self._free = -math.inf

    def busy(self, now: float) -> bool:
        """The last command is still being carried out."""
        return now < self._free

    def __call__(self, wanted: float, now: float) -> float | None:
        """The opening to send at `now` (s), None for none; what is wanted while it is busy counts when it is free."""
        if not math.isfinite(wanted) or self.busy(now):
            return None
        goal = self._goal(min(max(float(wanted), 0.0), 1.0))
        if goal == self.commanded:
            return None
        self.commanded, self._free = goal, now + self.kind.busy_s
        return goal

    def _goal(self, wanted: float) -> float:
        if self.kind.kind == "binary":
            if wanted < self.kind.close_below:
                return 0.0
            return 1.0 if wanted > self.kind.open_above else self.commanded
        # Fully open and closed are reached, however small the last change is.
        if wanted in (0.0, 1.0) or abs(wanted - self.commanded) >= self.kind.step - 1e-9:
            return wanted
        return self.commanded
