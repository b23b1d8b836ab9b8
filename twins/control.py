"""The control law: from actions to joint targets, one launch for all environments, on the CPU or on CUDA.

An action moves the commanded tool pose, which may lead the measured one by so much; differential inverse
kinematics (`kinematics.solve` is the same in NumPy) turns the pose, as late as the latency says, into joint targets,
which the set-points approach as those of a real arm do (`twinrl.core.interpolation`).
Nothing here waits for a device or looks at values on the host, so every launch can be part of a CUDA graph.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import warp as wp

from twinrl.core.gripper import TOGGLED, GripperKind
from twinrl.core.interpolation import HISTORY, TICKS, weights
from twins import kernels, kinematics, scene
from twins.kernels import PENDING, Seven, Six, State

FREE = GripperKind("continuous", step=0.0)  # every command counts, at once


class Controller:
    """Commanded poses of N environments, and the way from actions to joint targets.

    Environments take part by `ids` (n,), with NumPy arrays in their order, or all at once with a mask and arrays
    of the device (warp's or torch's): these launches wait for nothing. `target` (N,) vec3, `turn` (N,) mat33,
    `joints` (N, HISTORY) 7 and `actions` (N, 2) 7, the newest first, are warp arrays of the device; on the CPU `.numpy()`
    of them is a view.
    """

    def __init__(
        self,
        count: int,
        *,
        device: str = "cpu",
        box: np.ndarray = kinematics.BOX,
        gripper: GripperKind = FREE,
    ) -> None:
        """`box` (2, 3) in m is where the commanded tcp may go: its low and high corners."""
        self.count, self.device = count, wp.get_device(device)
        self._limits = wp.vec3(*box[0]), wp.vec3(*box[1]), _law(gripper)

        def zeros(dtype: Any, *shape: int) -> wp.array:
            return wp.zeros((count, *shape), dtype=dtype, device=self.device)

        self.target, self.turn = zeros(wp.vec3), zeros(wp.mat33)
        self.joints, self.actions = zeros(Seven, HISTORY), zeros(Seven, 2)
        self.latency = zeros(wp.int32)
        self._pending = (
            zeros(wp.vec3, PENDING),
            zeros(wp.mat33, PENDING),
            zeros(wp.float32, PENDING),
            zeros(wp.int32),  # steps for which the gripper takes no command
        )
        self._state = (self.latency, self.joints, self.target, self.turn, *self._pending)
        # What launches read and write, a row for each environment that takes part.
        self._ids = wp.array(np.arange(count), dtype=wp.int32, device=self.device)
        self._everyone = wp.array(np.ones(count), dtype=wp.bool, device=self.device)
        self._still = zeros(Six)
        self.executed, self.opening = zeros(Seven), zeros(wp.float32)
        self.path = zeros(Seven, TICKS)
        self.weights = wp.array(weights(), dtype=wp.float32, device=self.device)
        self.state = zeros(State)
        self._host = _Host(self) if self.device.is_cpu else None

    # -- all at once, on the device ----------------------------------------------------------------------------

    def begin_all(self, joints: Any, latency: Any, active: Any) -> None:
        """Start episodes where `active` (N,) bool: measured joints (N, 7) float32, latency (N,) int32."""
        start, late = _array(joints, Seven), _array(latency, wp.int32)
        mask = _array(active, wp.bool)
        self._launch(kernels.begin, [self._ids, mask, start, late, *self._state, self.actions])

    def command_all(
        self, actions: Any, measured: Any, active: Any, disturbance: Any | None = None
    ) -> tuple[wp.array, wp.array, wp.array]:
        """One control step where `active` (N,) bool, of `actions` (N, 7), measured joints (N, 7) and an unseen
        `disturbance` (N, 6), all float32: executed actions (N,) 7, joint set-points (N, TICKS) 7 and openings (N,).

        Where not active nothing is written: rows keep what the last step gave.
        """
        unseen = self._still if disturbance is None else _array(disturbance, Six)
        wanted, joints, mask = (
            _array(actions, Seven),
            _array(measured, Seven),
            _array(active, wp.bool),
        )
        found = self.executed, self.path, self.opening
        given = self._ids, mask, wanted, joints, unseen, *self._limits
        self._launch(kernels.command, [*given, *self._state, self.actions, self.weights, *found])
        return found

    def observe_all(
        self, tcp: Any, turn: Any, width: Any, active: Any, disturbance: Any | None = None
    ) -> wp.array:
        """`observation.state` (N,) of measured tool poses (N, 3), (N, 3, 3) and widths (N,), where `active`."""
        unseen = self._still if disturbance is None else _array(disturbance, Six)
        seen = _array(tcp, wp.vec3), _array(turn, wp.mat33), _array(width, wp.float32)
        given = self._ids, _array(active, wp.bool), *seen, unseen
        self._launch(kernels.observe, [*given, self.target, self.turn, self.actions, self.state])
        return self.state

    def _launch(self, kernel: wp.Kernel, inputs: list[Any]) -> None:
        wp.launch(kernel, self.count, inputs=inputs, device=self.device)

    # -- some of them, in NumPy --------------------------------------------------------------------------------

    def begin(self, ids: np.ndarray, joints: np.ndarray, latency: np.ndarray) -> None:
        """Start episodes of `ids` (n,) at measured joints (n, 7) rad; `latency` (n,) in control steps."""
        self._here().begin(ids, joints, latency)

    def command(
        self,
        ids: np.ndarray,
        actions: np.ndarray,
        measured: np.ndarray,
        disturbance: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One control step of `ids`: executed actions (n, 7), joint set-points (n, TICKS, 7), gripper openings (n,).

        `actions` (n, 7) are clipped to the limits of a step; `measured` (n, 7) are the joint angles, and
        `disturbance` (n, 6) moves the commanded pose unseen. The results are overwritten by the next call.
        """
        return self._here().command(ids, actions, measured, disturbance)

    def observe(
        self,
        ids: np.ndarray,
        tcp: np.ndarray,
        turn: np.ndarray,
        width: np.ndarray,
        disturbance: np.ndarray | None = None,
    ) -> np.ndarray:
        """`observation.state` (n, S) of measured tool poses (n, 3), (n, 3, 3) and widths (n,) of `ids`.

        `disturbance` (n, 6) is the noise of the measured pose. The result is overwritten by the next call.
        """
        return self._here().observe(ids, tcp, turn, width, disturbance)

    def toggled(self, ids: np.ndarray) -> np.ndarray:
        """(n,) bool: the last step opened or closed the gripper of `ids`."""
        return self._here().toggled(ids)

    def noise(
        self, seed: np.ndarray, step: np.ndarray, spread: np.ndarray, stream: int
    ) -> np.ndarray:
        """Normal numbers (n, 6) as the function `noise` draws them. The result is overwritten by the next call."""
        return self._here().noise(seed, step, spread, stream)

    def _here(self) -> _Host:
        if self._host is None:
            raise ValueError(
                f"environments by ids need the CPU, this controller is on {self.device}"
            )
        return self._host


def _law(kind: GripperKind) -> Any:
    law = kernels.Gripper()
    law.binary = kind.checked().kind == "binary"
    law.close_below, law.open_above, law.step = kind.close_below, kind.open_above, kind.step
    law.busy = max(0, math.ceil(kind.busy_s * scene.CONTROL_HZ - 1e-9) - 1)
    return law


class _Host:
    """The NumPy side of a controller on the CPU: launches are prepared once, rows are copied in.

    Preparing a launch takes longer than computing some dozen environments.
    """

    def __init__(self, controller: Controller) -> None:
        own, count = controller, controller.count

        def rows(dtype: Any) -> wp.array:
            return wp.zeros(count, dtype=dtype, device="cpu")

        ids, joints, wanted, unseen = rows(wp.int32), rows(Seven), rows(Seven), rows(Six)
        late, tcp, turn, width = rows(wp.int32), rows(wp.vec3), rows(wp.mat33), rows(wp.float32)
        self._ids, self._joints, self._wanted = ids.numpy(), joints.numpy(), wanted.numpy()
        self._unseen, self._late = unseen.numpy(), late.numpy()
        self._seen = tcp.numpy(), turn.numpy(), width.numpy()
        self._results = own.executed.numpy(), own.path.numpy(), own.opening.numpy()
        self._state, self._opened = own.state.numpy(), own.actions.numpy()[:, :, 6]
        head: tuple[wp.array, ...] = (ids, own._everyone)
        results = own.weights, own.executed, own.path, own.opening

        def prepared(kernel: wp.Kernel, *inputs: Any) -> wp.Launch:
            return wp.launch(kernel, count, inputs=[*head, *inputs], device="cpu", record_cmd=True)

        self._begin = prepared(kernels.begin, joints, late, *own._state, own.actions)
        command = wanted, joints, unseen, *own._limits, *own._state, own.actions, *results
        self._command = prepared(kernels.command, *command)
        observe = tcp, turn, width, unseen, own.target, own.turn, own.actions, own.state
        self._observe = prepared(kernels.observe, *observe)
        seed, step, spread, drawn = rows(wp.int32), rows(wp.int32), rows(wp.float32), rows(Six)
        self._sown, self._drawn = (seed.numpy(), step.numpy(), spread.numpy()), drawn.numpy()
        head = ()
        self._noise = [prepared(kernels.noise, seed, step, spread, k, drawn) for k in (0, 1)]

    def _run(self, launch: wp.Launch, ids: np.ndarray) -> int:
        n = len(ids)
        self._ids[:n] = ids
        launch.set_dim(n)
        if n:
            launch.launch()
        return n

    def begin(self, ids: np.ndarray, joints: np.ndarray, latency: np.ndarray) -> None:
        self._joints[: len(ids)] = joints
        self._late[: len(ids)] = latency
        self._run(self._begin, ids)

    def command(
        self,
        ids: np.ndarray,
        actions: np.ndarray,
        measured: np.ndarray,
        disturbance: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        n = len(ids)
        self._wanted[:n] = actions
        self._joints[:n] = measured
        self._unseen[:n] = 0.0 if disturbance is None else disturbance
        self._run(self._command, ids)
        executed, path, opening = self._results
        return executed[:n], path[:n], opening[:n]

    def toggled(self, ids: np.ndarray) -> np.ndarray:
        newest, earlier = self._opened[ids].T
        return np.abs(newest - earlier) > TOGGLED

    def observe(
        self,
        ids: np.ndarray,
        tcp: np.ndarray,
        turn: np.ndarray,
        width: np.ndarray,
        disturbance: np.ndarray | None,
    ) -> np.ndarray:
        n = len(ids)
        for buffer, values in zip(self._seen, (tcp, turn, width), strict=True):
            buffer[:n] = values
        self._unseen[:n] = 0.0 if disturbance is None else disturbance
        self._run(self._observe, ids)
        return self._state[:n]

    def noise(
        self, seed: np.ndarray, step: np.ndarray, spread: np.ndarray, stream: int
    ) -> np.ndarray:
        n = len(seed)
        for buffer, values in zip(self._sown, (seed, step, spread), strict=True):
            buffer[:n] = values
        self._noise[stream].set_dim(n)
        self._noise[stream].launch()
        return self._drawn[:n]


class ToolPoses:
    """Tool poses of up to `count` arms on the CPU, without preparing a launch each time."""

    def __init__(self, count: int) -> None:
        joints, tcp, turn = (
            wp.zeros(count, dtype=dtype, device="cpu") for dtype in (Seven, wp.vec3, wp.mat33)
        )
        self._joints, self._tcp, self._turn = joints.numpy(), tcp.numpy(), turn.numpy()
        self._launch = wp.launch(
            kernels.forward, count, inputs=[joints, tcp, turn], device="cpu", record_cmd=True
        )

    def __call__(self, joints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions (n, 3) in m and orientations (n, 3, 3), float32, at `joints` (n, 7) in rad."""
        n = len(joints)
        self._joints[:n] = joints
        if n:
            self._launch.set_dim(n)
            self._launch.launch()
        return self._tcp[:n].copy(), self._turn[:n].copy()


def forward(joints: Any, tcp: Any, turn: Any) -> None:
    """Write the tool's poses at `joints` (N, 7) to `tcp` (N, 3) and `turn` (N, 3, 3); float32, of one device."""
    start = _array(joints, Seven)
    outputs = [_array(tcp, wp.vec3), _array(turn, wp.mat33)]
    wp.launch(kernels.forward, len(start), inputs=[start], outputs=outputs, device=start.device)


def noise(seed: Any, step: Any, spread: Any, stream: int, drawn: Any) -> None:
    """Write normal numbers to `drawn` (N, 6) float32: a function of `seed`, `step` (N,) int32 and `stream` alone.

    `spread` (N,) float32 is their standard deviation in m; a degree of angle goes with 3 mm of position. `stream`
    (0 or 1) keeps two uses apart. Nothing is remembered, so a step's noise is the same whatever came before.
    """
    rows = _array(drawn, Six)
    given = [_array(seed, wp.int32), _array(step, wp.int32), _array(spread, wp.float32), stream]
    wp.launch(kernels.noise, len(rows), inputs=given, outputs=[rows], device=rows.device)


def seed_of(number: int) -> int:
    """A seed of any size as the 31 bits that kernels take."""
    while number >> 31:
        number = (number & 0x7FFFFFFF) ^ (number >> 31)
    return number


def _array(values: Any, dtype: Any) -> wp.array:
    """`values` (warp's, torch's or NumPy's) as a warp array over the same memory."""
    if isinstance(values, wp.array):
        return values
    if not isinstance(values, np.ndarray):
        return wp.from_torch(values, dtype=dtype)
    array = wp.array(values, dtype=dtype, device="cpu", copy=False)
    if (
        array.ptr != values.ctypes.data
    ):  # warp copies what has another layout, and results would be lost
        raise ValueError(f"array is {values.dtype} {values.strides}, must be {dtype} without gaps")
    return array
