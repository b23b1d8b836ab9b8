"""A person with a device in the hand: who acts, with which motion, and what happens when the device goes."""

from __future__ import annotations

import logging
import threading
import time
from typing import Dict, List

import numpy as np

from robot_bridge.operator import STOP, Moment, Operator, action_of
from robot_bridge.operators.device import AXES, REST, Device, Input, seen_from, shaped, signs
from twinrl.core.errors import ConfigError

log = logging.getLogger(__name__)
GRIPPER = "gripper"
MEANINGS = (GRIPPER, "success", "failure", "discard", "confirm", "stop", "estop", "none")
LOOK = 0.05  # s that the thread waits for the device at a time
AGAIN = 1.0  # s between looks for a device that has gone
LATE = 0.5  # s after which a press of the gripper's button is not obeyed any more


class HandOperator(Operator):
    """Listens in a thread of its own; the control loop finds the newest word. Base of those with a device.

    `step_m`, `step_rad`: of a control step at full deflection, m and rad. `dead_band`: share of an axis that counts
    as rest. `curve`: 0 straight, 1 cubic. `view`: see `seen_from`. `invert`: axes to reverse, as in "x,yaw".
    `silent_s`: a device that was left deflected and says nothing for so long counts as gone; 0 never.

    A device that goes while the person acts is a latched stop. One that goes while the policy acts is a warning,
    and it is looked for again.
    """

    def __init__(
        self,
        device: Device,
        buttons: Dict[str, str],
        step_m: float,
        step_rad: float,
        dead_band: float,
        curve: float,
        view: int,
        invert: str,
        silent_s: float,
    ) -> None:
        """`buttons`: what a button of the device means, one of MEANINGS."""
        super().__init__()
        for name, meaning in buttons.items():
            if meaning not in MEANINGS:
                raise ValueError(
                    f"button {name} means {meaning!r}, not one of {', '.join(MEANINGS)}"
                )
        if not 0.0 <= dead_band < 1.0 or not 0.0 <= curve <= 1.0:
            raise ValueError(
                f"dead_band is {dead_band}, curve {curve}: from 0 to below 1, and from 0 to 1"
            )
        seen_from(REST, view)
        self._device, self._buttons = device, dict(buttons)
        self._scale = np.repeat([float(step_m), float(step_rad)], 3)
        self._signs = signs(invert)
        self._dead_band, self._curve, self._view = float(dead_band), float(curve), view
        self._silent_s = float(silent_s)
        self._lock = threading.Lock()
        self._said: List[str] = []
        self._presses: List[float] = []  # of the gripper's button, when
        self._acting = self._stranded = False
        self._gripper = 1.0
        self._input = device.open()
        self._heard = time.monotonic()
        self._ready = not self._wants(self._input, self._heard)
        self._there, self._closing = True, threading.Event()
        self._thread = threading.Thread(target=self._listen, name=device.kind, daemon=True)
        self._thread.start()

    def _wants(self, given: Input, now: float) -> bool:
        """The person wants to act. Asked with each input, and again before each control step."""
        raise NotImplementedError

    # -- from the control loop -------------------------------------------------------------------------------

    def begin(self) -> None:
        """An episode starts."""
        with self._lock:
            self._acting = False
            self._presses.clear()

    def act(self, moment: Moment) -> np.ndarray | None:
        """The motion of the hand, while it wants to act; none where the device went and the arm does not stand yet."""
        with self._lock:
            now = time.monotonic()
            acting = self._stranded or (self._ready and self._wants(self._input, now))
            if acting and not self._acting:  # what the fingers hold is what the person begins with
                self._gripper = moment.gripper
            presses = sum(now - pressed < LATE for pressed in self._presses)
            self._presses.clear()
            if acting and presses % 2:
                self._gripper = 0.0 if self._gripper > 0.5 else 1.0
            self._acting = acting
            return action_of(self._motion(), self._gripper, moment) if acting else None

    def marks(self) -> list[str]:
        """What was said since the last call, by button or key."""
        with self._lock:
            said, self._said = self._said, []
            if self._stranded and any(mark.startswith(STOP) for mark in said):
                self._stranded = self._acting = False  # from here on it is the watchdog that holds
        return super().marks() + said

    def reading(self) -> str:
        """Axes, buttons, and who acts."""
        with self._lock:
            if not self._there:
                return f"the {self._device.kind} has gone"
            axes = " ".join(f"{n} {v:+.2f}" for n, v in zip(AXES, self._input.axes))
            who = "acting" if self._acting else "policy"
            return (
                f"{who}  gripper {self._gripper:.0f}  {axes}  {' '.join(sorted(self._input.down))}"
            )

    def close(self) -> None:
        """Let go of the device."""
        self._closing.set()
        self._thread.join(2)
        super().close()

    def _motion(self) -> np.ndarray:
        axes = shaped(self._signs * self._input.axes, self._dead_band, self._curve)
        return seen_from(axes, self._view) * self._scale

    # -- the thread ------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        while not self._closing.is_set():
            try:
                if self._there:
                    self._hear(self._device.read(LOOK))
                elif not self._closing.wait(AGAIN):
                    self._find()
            except Exception as error:  # also a bug in here must not leave the arm moving
                self._lose(error)
        self._device.close()

    def _hear(self, inputs: List[Input]) -> None:
        with self._lock:
            now = time.monotonic()
            for given in inputs:
                pressed = given.down - self._input.down
                self._input, self._heard = given, now
                self._ready = not self._wants(given, now) or self._ready
                for name in sorted(pressed):
                    self._mean(self._buttons.get(name, "none"), now)
            silent = now - self._heard
            deflected = np.abs(self._input.axes).max() > self._dead_band
            if deflected and self._wants(self._input, now) and 0 < self._silent_s < silent:
                raise OSError(f"silent for {silent:.1f} s although deflected (silent_s)")

    def _mean(self, meaning: str, now: float) -> None:
        if meaning == GRIPPER:
            self._presses.append(now)
        elif meaning != "none":
            self._said.append(meaning)

    def _lose(self, error: Exception) -> None:
        kind = self._device.kind
        with self._lock:
            in_use = self._acting or (self._ready and self._wants(self._input, time.monotonic()))
            self._there = self._ready = False
            self._input = Input(REST, frozenset())
            if in_use:
                self._stranded = True
                self._said.append(f"{STOP}:the {kind} has gone while a person acted: {error}")
        log.warning("the %s has gone (%s); looking for it again", kind, error or type(error))
        self._device.close()

    def _find(self) -> None:
        try:
            given = self._device.open()
        except ConfigError:
            return  # not there yet
        with self._lock:
            self._input, self._heard = given, time.monotonic()
            self._ready = not self._wants(given, self._heard)
            self._there = True
        log.warning("the %s is there again", self._device.kind)
