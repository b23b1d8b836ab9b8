"""What may be wrong with a camera's frames: none, late, frozen or dark. Looked at for every driver alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Dict, NamedTuple, Tuple

import numpy as np

if TYPE_CHECKING:
    from robot_bridge.driver import Frame

KINDS = ("missing", "late", "frozen", "dark")


class Tolerance(NamedTuple):
    """What a camera may do before something is wrong with it."""

    age_s: float = 0.3  # of the newest frame
    alike: int = 15  # frames in a row that are the same in every byte: a sensor is never so quiet
    alike_moving: int = (
        5  # the same where the arm has moved meanwhile, as also a rendered image must show
    )
    moved_m: float = 0.02  # which is farther than this, m at the tool
    moved_rad: float = 0.1
    dark: float = 6.0  # of 255, the mean of a frame under which nothing can be seen in it
    dark_frames: int = 5  # in a row


USUAL = Tolerance()
# Without a sensor's noise images of what does not move are alike, and of an arm that moves out of sight.
RENDERED = USUAL._replace(alike=1 << 62)


class Wrong(NamedTuple):
    """What is wrong with which camera."""

    kind: str  # one of KINDS; "" for nothing
    text: str


NOTHING = Wrong("", "")


class CameraGuard:
    """Looks at frames about as often as they are taken."""

    def __init__(
        self, names: Tuple[str, ...], tolerance: Tolerance = USUAL, lockstep: bool = False
    ) -> None:
        """In `lockstep` a frame's own time says nothing: it counts from when it was seen first."""
        self.names, self.tolerance, self._lockstep = tuple(names), tolerance, lockstep
        self.begin()

    def begin(self) -> None:
        """What was seen before does not count any more."""
        self._last: Dict[str, Frame] = {}
        self._came: Dict[str, float] = {}  # when the last one was seen first
        self._alike = dict.fromkeys(self.names, 1)
        self._dark = dict.fromkeys(self.names, 0)

    def __call__(self, frames: Dict[str, Frame], now: float) -> Wrong:
        """The first thing that is wrong at `now`, s of the frames' clock."""
        wrong = [self._look(name, frames.get(name), now) for name in self.names]
        return next((each for each in wrong if each.kind), NOTHING)

    def _look(self, name: str, frame: Frame | None, now: float) -> Wrong:
        if frame is None:
            return Wrong("missing", f"camera {name!r} has no frame")
        tolerance, last = self.tolerance, self._last.get(name)
        if last is None or frame.time > last.time:
            same = last is not None and np.array_equal(frame.image, last.image)
            self._alike[name] = self._alike[name] + 1 if same else 1
            dark = float(frame.image.mean()) < tolerance.dark
            self._dark[name] = self._dark[name] + 1 if dark else 0
            self._last[name], self._came[name] = frame, now
        age = now - (self._came[name] if self._lockstep else frame.time)
        if not age <= tolerance.age_s:
            return Wrong("late", f"camera {name!r} is late: its newest frame is {age:.1f} s old")
        alike = self._alike[name]
        if alike >= tolerance.alike:
            text = f"camera {name!r} is frozen: {alike} frames are the same in every byte"
            return Wrong("frozen", text)
        if self._dark[name] >= tolerance.dark_frames:
            text = f"camera {name!r} is dark: mean {frame.image.mean():.1f} of 255"
            return Wrong("dark", text)
        return NOTHING
