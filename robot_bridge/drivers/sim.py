"""The stand-in for reality: a simulated arm in a process of its own, which differs from the twin in every respect."""

from __future__ import annotations

import json
import math
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np

from robot_bridge.camera_guard import RENDERED, USUAL
from robot_bridge.driver import Commanded, Driver, Frame, Outcome, state_vector
from robot_bridge.projection import Camera, project
from robot_bridge.protocol import Job
from robot_bridge.safety import Measured
from twinrl.core.errors import ConfigError, TwinRLError
from twinrl.core.spec import dimensions_of

START_S = 60.0  # to import a simulator
ANSWER_S = 20.0
SILENT_S = 0.2  # after which an arm whose state does not change any more has a fault


class SimDriver(Driver):
    """Drives `robot_bridge.drivers.sim_arm`."""

    kind = "sim"
    simulated = True

    def __init__(
        self,
        task: str = "",
        seed: int = 0,
        reset_seconds: float = 5.0,
        threads: int = 1,
        reality: str = "",
        reality_seed: int | None = None,
        log: str = "",
        inject: str = "",
        rearm_s: float = 0.0,
    ) -> None:
        """`reality`: a JSON or YAML file of numbers that differ from the stand-in's, or from those that `reality_seed` draws.

        `rearm_s`: after a stop of so long it may move again by itself, for nobody stands beside it; 0: never.
        """
        self._options: dict[str, Any] = {"seed": int(seed), "threads": int(threads)}
        self._options.update(log=log, inject=inject)
        self._task, self.reset_seconds, self.rearm_s = task, float(reset_seconds), float(rearm_s)
        if reality:
            self._options["reality"] = _read(reality)
        if reality_seed is not None:
            if int(reality_seed) < 0:
                raise ConfigError(f"reality_seed is {reality_seed}, must be 0 or more")
            self._options["reality_seed"] = int(reality_seed)
        self._process: subprocess.Popen | None = None
        self._frames: dict[str, Frame] = {}

    def connect(self, job: Job, speed: float) -> None:
        """Start the arm's process with the job's cameras, or without any where the job observes poses."""
        from robot_bridge.drivers import sim_arm
        from twins import kinematics
        from twins.worker.pipe import Pipe

        self._format = sim_arm
        ours, theirs = socket.socketpair()
        watching, filming = socket.socketpair()
        self._pipe, self._watch = Pipe(ours), Pipe(watching)
        descriptor = os.memfd_create("stand-in")
        os.ftruncate(descriptor, sim_arm.MEMORY)
        self._memory = mmap.mmap(descriptor, sim_arm.MEMORY)
        fds = (theirs.fileno(), filming.fileno(), descriptor)
        command = [sys.executable, "-m", "robot_bridge.drivers.sim_arm"]
        for name, fd in zip(("--pipe", "--camera", "--memory"), fds):
            command += [name, str(fd)]
        self._process = subprocess.Popen(
            command, pass_fds=fds, stdin=subprocess.DEVNULL, start_new_session=True
        )
        for end in (theirs, filming):
            end.close()
        os.close(descriptor)
        options = {
            **self._options,
            "task": self._task or job.task,
            "speed": speed,
            "image_size": job.schema.image_size,
            "cameras": list(job.schema.cameras),
            "observe": job.observe,
            "max_steps": job.max_steps or None,
        }
        self.lockstep = speed > 1.0
        self._send([json.dumps(options).encode()])
        answer, *seen = self._receive(START_S)
        made = _answered(answer)
        self._see(seen)
        self._views = _views(made["views"])
        self.cameras, self.image_size = tuple(made["cameras"]), int(made["image_size"])
        self.tolerance = USUAL if made["noisy"] else RENDERED
        self.dimensions = dimensions_of(made["state_names"])
        self.joint_range = np.asarray(kinematics.LIMITS, float).T
        self._felt = sim_arm.read_felt(self._memory)
        if not self.lockstep and self.cameras:
            threading.Thread(target=self._take_frames, name="frames", daemon=True).start()

    def disconnect(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        self._pipe.close()
        self._watch.close()
        try:
            process.wait(2.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(2.0)

    def reset(self, configuration: dict[str, Any] | None, region: str) -> dict[str, Any]:
        """Place things as `configuration` says. Only reality decides about physics, camera and light."""
        args = {"configuration": configuration, "region": region}
        answer, *seen = self._ask("reset", args)
        self._see(seen)
        self._felt = self._format.read_felt(self._memory)
        if self.lockstep:
            self._frames = {}  # those of before
        else:
            self._await_frames()
        found = _answered(answer)
        self._views = _views(found["views"])
        return found["configuration"]

    def measure(self) -> Measured:
        """What the arm says; in lockstep what it said after the last set-point."""
        if not self.lockstep:
            self._felt = self._format.read_felt(self._memory)
        felt = self._felt
        fault = felt[17].rstrip(b"\0").decode()
        if not self.lockstep and time.monotonic() - felt[0] > SILENT_S:
            fault = fault or "its process is silent"
            if self._process is None or self._process.poll() is not None:
                raise TwinRLError("the stand-in's process has ended")
        return Measured(
            felt[0], np.array(felt[1:7]), np.array(felt[7:14]), felt[14], felt[15], fault
        )

    def servo(self, pose: np.ndarray, gripper: float) -> None:
        """Hand on a set-point."""
        self._send([b"servo", self._format.SETPOINT.pack(*pose, gripper, time.monotonic())])
        if self.lockstep:
            (felt,) = self._receive(ANSWER_S)
            self._felt = self._format.FELT.unpack(felt)

    def frames(self) -> dict[str, Frame]:
        """The newest image of each camera."""
        if self.lockstep and self.cameras:
            # A frame that does not come leaves the last one, as it does in real time.
            self._frames = {**self._frames, **_frames(self._ask("frames", {}))}
        return self._frames

    def state(self, measured: Measured, commanded: Commanded) -> np.ndarray:
        """The arm's numbers with this reality's noise, and what the task shows of poses."""
        own = state_vector(measured, commanded)
        own[:6] += self._error
        return np.concatenate([own, self._more]).astype(np.float32)

    def ended(self, action: np.ndarray) -> Outcome:
        """The task's reward and ending."""
        answer, *seen = self._ask("end_step", {"action": np.asarray(action, float).tolist()})
        self._see(seen)
        found = _answered(answer)
        return Outcome(found["reward"], found["terminated"], found["truncated"], found["success"])

    def opening(self) -> float | None:
        """What the fingers were last told, while they are busy and do not do what is wanted."""
        return None if math.isnan(self._felt[16]) else float(self._felt[16])

    def project(self, points: np.ndarray) -> dict[str, np.ndarray]:
        """As the simulated cameras see them: they are where this episode's configuration has put them."""
        return project(self._views, points, self.measure().pose)

    def recover(self) -> None:
        """Clear a reflex."""
        self._ask("recover", {})
        self._felt = self._format.read_felt(self._memory)

    def expert(self, noise: float, commanded: np.ndarray) -> np.ndarray:
        """The task's scripted expert."""
        (answer,) = self._ask("expert", {"noise": noise, "commanded": list(map(float, commanded))})
        return np.array(_answered(answer)["action"], np.float32)

    # -- the process -----------------------------------------------------------------------------------------

    def _see(self, seen: list[Any]) -> None:
        self._error = np.frombuffer(seen[0], "<f8").astype(np.float32)
        self._more = np.frombuffer(seen[1], "<f4")

    def _ask(self, method: str, args: dict[str, Any]) -> list[memoryview]:
        self._send([method.encode(), json.dumps(args).encode()])
        answer = self._receive(ANSWER_S)
        _answered(answer[0])
        return answer

    def _send(self, frames: list[bytes]) -> None:
        try:
            self._pipe.send(frames, _look(ANSWER_S))
        except EOFError:
            raise TwinRLError("the stand-in's process has ended") from None

    def _receive(self, seconds: float) -> list[memoryview]:
        try:
            return self._pipe.receive(_look(seconds))
        except EOFError:
            raise TwinRLError("the stand-in's process has ended") from None

    def _take_frames(self) -> None:
        while self._process is not None:
            try:
                self._frames = {**self._frames, **_frames(self._watch.receive(_look(1e9)))}
            except (EOFError, OSError, ValueError):
                return

    def _await_frames(self) -> None:
        """After a reset no frame of before it may be used."""
        began, deadline = time.monotonic(), time.monotonic() + 5.0
        while self.cameras and time.monotonic() < deadline:
            if all(
                name in self._frames and self._frames[name].time > began for name in self.cameras
            ):
                return
            time.sleep(0.005)


def _frames(parts: list[Any]) -> dict[str, Frame]:
    head = json.loads(bytes(parts[0]))
    return {
        name: Frame(head["time"], np.frombuffer(part, np.uint8).reshape(shape))
        for (name, shape), part in zip(head["shapes"].items(), parts[1:])
    }


def _views(told: dict[str, dict[str, Any]]) -> dict[str, Camera]:
    return {
        name: Camera(
            *(np.array(view["position"]), np.array(view["turn"])),
            *(view["focal"], np.array(view["centre"]), view["on_tool"]),
        )
        for name, view in told.items()
    }


def _answered(frame: Any) -> dict[str, Any]:
    answer = json.loads(bytes(frame))
    if "error" in answer:
        raise ConfigError(f"--robot sim: {answer['error']}")
    return answer


def _look(seconds: float):
    deadline = time.monotonic() + seconds

    def look() -> None:
        if time.monotonic() > deadline:
            raise TwinRLError(f"the stand-in's process gave no answer within {seconds:g} s")

    return look


def _read(path: str) -> dict[str, Any]:
    """A mapping in JSON, or in YAML where the name says so."""
    try:
        with open(path) as file:
            text = file.read()
    except OSError as error:
        raise ConfigError(f"reality {path}: {error.strerror}") from None
    if path.endswith((".yaml", ".yml")):
        found = _yaml(path, text)
    else:
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"reality {path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"reality {path} holds no mapping")
    return found


def _yaml(path: str, text: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise ConfigError(
            f"reality {path}: no YAML reader is installed: pip install pyyaml, or give a .json file"
        ) from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"reality {path} is not YAML: {error}") from None
