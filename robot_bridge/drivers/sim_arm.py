"""The stand-in's own process: an arm whose time goes on, with cameras, faults and a log of its own.

    python -m robot_bridge.drivers.sim_arm --pipe FD --camera FD --memory FD

Started by `robot_bridge.drivers.sim`. At speed 1 it runs by the clock, takes set-points when they come and holds the
last one; faster than time it moves a tick for each set-point (lockstep), so that what happens does not depend on how
busy the PC is.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import socket
import struct
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, Callable

import numpy as np

from twins.standin import QUIETEST, RATE_HZ, Reality, StandIn, make_reality, split_reality
from twins.worker.pipe import Pipe

FELT = struct.Struct("<d6d7dddd64s")  # time, pose, joints, width, force, opening, fault
NUMBER = struct.Struct("<Q")  # of the newest state, which lies in the slot of its parity
MEMORY = NUMBER.size + 2 * FELT.size
SETPOINT = struct.Struct("<8d")  # pose, gripper, when it was sent
# The hardware's own log: a row for each tick, each set-point, and each time that it took set-points again after a
# fault, from where it stood: the next set-point begins there.
LOG = np.dtype(
    [
        ("kind", "<u4"),
        ("time", "<f8"),  # of a set-point: when it was sent, by the same clock
        ("setpoint", "<f8", (6,)),
        ("gripper", "<f8"),
        ("pose", "<f8", (6,)),  # measured
        ("force", "<f8"),
    ]
)
TICK, SENT, RECOVERED = 0, 1, 2
# At 30 a frame is up to 33 ms older than what the arm says of itself: more than a run is told of as skew.
CAMERA_HZ = 60.0
LOOK_S = 0.05  # between looks at what is to be injected


class SimArm:
    """Serves one `StandIn` over a pipe, and its state in shared memory."""

    def __init__(self, pipe: Pipe, camera: Pipe, memory: mmap.mmap) -> None:
        self._pipe, self._camera, self._memory = pipe, camera, memory
        self._lock = threading.Lock()  # around the simulation
        self._number = 0
        self._log: Any = None
        self._inject, self._injected, self._looked = "", 0, 0.0
        self._frozen = self._dark = False
        self._missing_until = self._blocked_until = self._silent_until = self._late_s = 0.0
        self._last_images: dict[str, np.ndarray] = {}
        self._arm: StandIn

    def open(self, args: dict[str, Any]) -> dict[str, Any]:
        """Make the arm; says what it is."""
        number = args.pop("reality_seed", None)
        reality = Reality.drawn(int(number)) if number is not None else Reality()
        settings = dict(args.pop("reality", None) or {})
        own, physics = split_reality(settings)
        if number is not None:
            args["variant"] = f"reality-{int(number)}"
        self._speed = float(args.pop("speed"))
        self.lockstep = self._speed > 1.0
        self._inject = str(args.pop("inject", None) or "")
        log = args.pop("log", None)
        if log:
            self._log = Path(log).open("ab", buffering=1 << 16)  # noqa: SIM115 - until the end
        self._arm = StandIn(reality=make_reality(own, reality), physics=physics, **args)
        env = self._arm.env
        self._publish()
        return {
            "state_names": list(env.state_names),
            "cameras": list(env.cameras),
            "image_size": env.image_size,
            "views": self._arm.views(),
            "noisy": self._arm.reality.image_noise >= QUIETEST,
        }

    def serve(self) -> None:
        """Until the other side hangs up."""
        if not self.lockstep and self._arm.env.cameras:
            threading.Thread(target=self._film, name="cameras", daemon=True).start()
        period = 1.0 / (RATE_HZ * self._speed)
        due = time.monotonic()
        while True:
            if self.lockstep:
                self._answer(_forever)
                continue
            now = time.monotonic()
            if now < due:
                if self._pipe.wait(due - now):
                    self._answer(_forever)
                continue
            due = max(due + period, now - 0.1)  # after a stall it does not run after what is lost
            self._tick()

    def close(self) -> None:
        """Write what is left of the log."""
        if self._log is not None:
            self._log.close()

    # -- requests --------------------------------------------------------------------------------------------

    def _answer(self, look: Callable[[], None]) -> None:
        frames = self._pipe.receive(look)
        method = bytes(frames[0]).decode()
        if method == "servo":
            *pose, gripper, sent = SETPOINT.unpack(frames[1])
            self._arm.command(np.array(pose), gripper)
            self._note(SENT, sent)
            if self.lockstep:
                self._tick()
                self._pipe.send([self._felt()], look)
            return
        args = json.loads(bytes(frames[1])) if len(frames) > 1 and len(frames[1]) else {}
        try:
            with self._lock:
                answer = getattr(self, f"do_{method}")(args)
        except Exception as error:
            answer = [json.dumps({"error": f"{type(error).__name__}: {error}"}).encode()]
        self._pipe.send(answer, look)

    def do_reset(self, args: dict[str, Any]) -> list[bytes]:
        """Place everything."""
        configuration = self._arm.reset(args["configuration"], args["region"])
        self._publish()
        told = {"configuration": configuration, "views": self._arm.views()}
        return [json.dumps(told).encode(), *self.seen()]

    def do_end_step(self, args: dict[str, Any]) -> list[bytes]:
        """Judge the control step that has ended."""
        outcome = self._arm.end_step(np.array(args["action"], np.float32))
        return [json.dumps(outcome).encode(), *self.seen()]

    def do_frames(self, args: dict[str, Any]) -> list[bytes]:
        """What the cameras see now."""
        return _packed(time.monotonic(), self._images())

    def do_expert(self, args: dict[str, Any]) -> list[bytes]:
        """The scripted expert's action."""
        action = self._arm.expert(args["noise"], np.array(args["commanded"]))
        return [json.dumps({"action": action.tolist()}).encode()]

    def do_recover(self, args: dict[str, Any]) -> list[bytes]:
        """Clear the fault."""
        self._arm.recover()
        self._publish()
        self._note(RECOVERED, time.monotonic())
        return [b"{}"]

    def seen(self) -> list[bytes]:
        """The measurement's error, and what the state has beside the arm's own numbers."""
        error, more = self._arm.seen()
        return [error.astype("<f8").tobytes(), np.asarray(more, "<f4").tobytes()]

    # -- time ------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        self._look()
        arm = self._arm
        if time.monotonic() < self._silent_until:
            return
        if time.monotonic() < self._blocked_until:
            arm._busy = max(arm._busy, 2)
        with self._lock:
            arm.tick()
            self._publish()
        self._note(TICK, self._last[0])
        if self._log is not None and self._number % 25 == 0:
            self._log.flush()

    def _note(self, kind: int, when: float) -> None:
        if self._log is not None:
            arm, felt = self._arm, self._last
            row = (kind, when, arm.target, arm._asked, felt[1], felt[4])
            self._log.write(np.array([row], LOG).tobytes())

    def _publish(self) -> None:
        felt = self._arm.felt()
        opening = self._arm.opening
        told = float("nan") if opening is None else opening
        self._last = (time.monotonic(), *felt[:-1], told, felt.fault)
        self._number += 1
        at = NUMBER.size + self._number % 2 * FELT.size
        self._memory[at : at + FELT.size] = self._felt()
        self._memory[: NUMBER.size] = NUMBER.pack(self._number)

    def _felt(self) -> bytes:
        when, pose, joints, width, force, opening, fault = self._last
        return FELT.pack(when, *pose, *joints, width, force, opening, fault.encode()[:64])

    # -- cameras ---------------------------------------------------------------------------------------------

    def _film(self) -> None:
        under_way: deque[tuple[float, list[bytes]]] = deque()
        while True:
            began = time.monotonic()
            with self._lock:  # the arm stands still meanwhile: what is seen is of this moment
                exposed = time.monotonic()
                under_way.append((exposed, _packed(exposed, self._images())))
            try:
                while under_way and time.monotonic() - under_way[0][0] >= self._late_s:
                    self._camera.send(under_way.popleft()[1], _forever)
            except EOFError:
                return
            time.sleep(max(0.0, 1.0 / CAMERA_HZ - (time.monotonic() - began)))

    def _images(self) -> dict[str, np.ndarray]:
        if time.monotonic() < self._missing_until:
            return {}
        if self._frozen and self._last_images:
            return self._last_images
        images = self._arm.images()
        if self._dark:
            images = {name: image // 64 for name, image in images.items()}
        self._last_images = images
        return images

    # -- faults that somebody asks for -----------------------------------------------------------------------

    def _look(self) -> None:
        """Lines of JSON in the file `inject`: {"reflex": "why"}, {"silent_s": 1}, {"frozen": true}, {"dark": true},
        {"missing_s": 1}, {"late_s": 0.5}, {"gripper_s": 2}."""
        if not self._inject or time.monotonic() - self._looked < LOOK_S:
            return
        self._looked = time.monotonic()
        try:
            lines = Path(self._inject).read_text().splitlines()
        except FileNotFoundError:
            return
        for line in lines[self._injected :]:
            wanted = json.loads(line)
            if "reflex" in wanted:
                self._arm.fault = f"reflex: {wanted['reflex']}"
            self._frozen = bool(wanted.get("frozen", self._frozen))
            self._dark = bool(wanted.get("dark", self._dark))
            self._late_s = float(wanted.get("late_s", self._late_s))
            now = time.monotonic()
            if "missing_s" in wanted:
                self._missing_until = now + float(wanted["missing_s"])
            if "gripper_s" in wanted:
                self._blocked_until = now + float(wanted["gripper_s"])
            if "silent_s" in wanted:
                self._silent_until = now + float(wanted["silent_s"])
        self._injected = len(lines)


def read_felt(memory: mmap.mmap) -> tuple[Any, ...]:
    """The newest state in shared memory, as `FELT` packs it."""
    while True:
        (number,) = NUMBER.unpack_from(memory)
        found = FELT.unpack_from(memory, NUMBER.size + number % 2 * FELT.size)
        (now,) = NUMBER.unpack_from(memory)
        if now - number < 2 and number:  # or its slot may have been written meanwhile
            return found


def read_log(path: Path) -> np.ndarray:
    """What the simulated hardware saw (`LOG`)."""
    data = path.read_bytes()
    return np.frombuffer(data[: len(data) // LOG.itemsize * LOG.itemsize], LOG)


def _packed(exposed: float, images: dict[str, np.ndarray]) -> list[bytes]:
    head = {"time": exposed, "shapes": {k: list(v.shape) for k, v in images.items()}}
    return [json.dumps(head).encode(), *(image.tobytes() for image in images.values())]


def _forever() -> None:
    if os.getppid() == 1:
        raise EOFError


def main() -> None:
    """The process."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("pipe", "camera", "memory"):
        parser.add_argument(f"--{name}", type=int, required=True, metavar="FD")
    arguments = parser.parse_args()
    pipe, camera = (Pipe(socket.socket(fileno=fd)) for fd in (arguments.pipe, arguments.camera))
    memory = mmap.mmap(arguments.memory, MEMORY)
    arm = SimArm(pipe, camera, memory)
    try:
        frames = pipe.receive(_forever)
        try:
            answer = arm.open(json.loads(bytes(frames[0])))
        except Exception as error:
            pipe.send([json.dumps({"error": str(error)}).encode()], _forever)
            raise
        pipe.send([json.dumps(answer).encode(), *arm.seen()], _forever)
        arm.serve()
    except EOFError:
        pass
    finally:
        arm.close()


if __name__ == "__main__":
    main()
