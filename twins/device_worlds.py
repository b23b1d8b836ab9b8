"""N copies of a task's scene in mujoco-warp, everything on one device: physics, parameters, true state.

The scene, the order of a control step and the draws' meaning are those of `twins.backends.mujoco_cpu`. Arrays that
leave here are torch's, over warp's memory; nothing waits for the device unless its name says so.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import mujoco
import numpy as np
import warp as wp
from array_api_compat import array_namespace

from twinrl.core.interpolation import TICKS
from twins import arm, control, device_kernels, kinematics, rotation, scene
from twins.device_draws import PER_WORLD, ConfigurationArrays, Layout
from twins.tasks.task import Snapshot, Task

Array = Any  # torch.Tensor of the device

import mujoco_warp as mjw  # noqa: E402  (warp prints its banner then; `control` has told it not to)

log = logging.getLogger(__name__)
ARM = slice(0, kinematics.JOINTS)
GRIPPER = slice(kinematics.JOINTS, kinematics.JOINTS + 2)
FARTHEST, FASTEST = 10.0, 1000.0  # m or rad, m/s or rad/s: beyond these a simulation has diverged
GRAPH_STEPS = (
    scene.SUBSTEPS // TICKS
)  # physics steps in a graph, which a control step replays for each set-point
# Room for each environment. The tasks' experts were seen to need 19 contacts, in the mean, and 140 constraints.
CONTACTS, CONSTRAINTS = 48, 256
# What makes a step wrong. The solver's limits of iterations are not among these: C MuJoCo has the same.
OVERFLOWS = (
    *("NEFC", "NJMAX_NNZ", "BROADPHASE", "NARROWPHASE", "CCD"),
    *("HFIELD", "CONTACT_MATCH", "NVMAX"),
)
OVERFLOW = sum(int(mjw.OverflowType[name]) for name in OVERFLOWS)
SHARED = int(mjw.OverflowType.BROADPHASE) | int(mjw.OverflowType.NARROWPHASE)


class TooManyContacts(RuntimeError):
    """The environments' contacts did not fit into the room that they share."""


class Usage(NamedTuple):
    """The most that any physics step has needed so far, against the room there is."""

    contacts: float  # in the mean of the environments, which share their room
    contacts_room: int  # for each environment
    constraints: int  # in one environment
    constraints_room: int


class DeviceWorlds:
    """N simulations of a task's scene on one device.

    Simulations are frozen by a mask, not left out: a step costs the same for one and for all.
    """

    def __init__(
        self,
        task: Task,
        count: int,
        *,
        cameras: tuple[str, ...] = (),
        image_size: int = 64,
        device: str = "cuda",
        contacts: int = CONTACTS,
        constraints: int = CONSTRAINTS,
        repeatable: bool = True,
        conditional: bool | None = None,
        render_block: int | None = None,
        tensors: bool = False,
    ):
        """`contacts` and `constraints` are the room for each environment; contacts share theirs.

        `repeatable` asks for the same bits from the same actions on a GPU too, where sums otherwise come in any order;
        `conditional` stops the solver's iterations when all environments have converged (None: where CUDA can).
        `render_block` environments are traced at once. With `tensors` the environment gives tensors, not NumPy arrays.
        """
        self.task, self.count, self.tensors = task, count, tensors
        self.cameras, self.image_size = tuple(cameras), image_size
        self.device = _find_device(device)
        self.contacts_room, self.constraints_room = contacts, constraints
        spec = scene.build_scene(task)
        # C MuJoCo must not put a diverged simulation back by itself; mujoco-warp never does, and knows no such flag.
        spec.option.disableflags &= ~int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)
        self.model = model = spec.compile()
        with wp.ScopedDevice(self.device):
            self._model = mjw.put_model(model, batch_sizes=dict.fromkeys(PER_WORLD, count))
            option = self._model.opt
            option.warn_overflow = 0  # told below, once, and not from inside a kernel
            option.deterministic = repeatable
            option.graph_conditional = (
                self.device.is_cpu or wp.is_conditional_graph_supported()
                if conditional is None
                else conditional
            )
            start = mujoco.MjData(model)
            start.qpos[ARM], start.qpos[GRIPPER] = kinematics.HOME, arm.FINGER_RANGE
            self._data = mjw.put_data(
                model, start, nworld=count, nconmax=contacts, njmax=constraints
            )
            self._allocate()
            self._layout = layout = Layout(model, task)
            self._arrays = ConfigurationArrays(model, layout, self.cameras)
            self._capture()
            self.renderer = None
            if self.cameras:
                from twins.device_render import DeviceRenderer

                self.renderer = DeviceRenderer(
                    model, self.cameras, image_size, count, device=device, block=render_block
                )
        wp.synchronize_device(self.device)  # from here on everything is on torch's stream

    def _allocate(self) -> None:
        data, count = self._data, self.count
        # Views of warp's arrays: writing to these is writing to the simulation.
        self.qpos, self.qvel, self.ctrl = (
            wp.to_torch(a) for a in (data.qpos, data.qvel, data.ctrl)
        )
        self._place, self._place_turn = wp.to_torch(data.mocap_pos), wp.to_torch(data.mocap_quat)
        self._found = wp.to_torch(data.sensordata)
        self._shapes: dict[
            tuple[str, ...], Array
        ] = {}  # geoms that have been hidden, by their names
        self._fields = {name: wp.to_torch(getattr(self._model, name)) for name in PER_WORLD}
        self._moving = data.qpos, data.qvel, data.qacc_warmstart
        self._safe = [wp.clone(array) for array in self._moving]
        self._diverged, self._active = (
            wp.zeros(count, dtype=wp.bool),
            wp.zeros(count, dtype=wp.bool),
        )
        self._spilled, self._peak = wp.zeros(count, dtype=wp.int32), wp.zeros(2, dtype=wp.int32)
        self.diverged, self.active = wp.to_torch(self._diverged), wp.to_torch(self._active)
        self._tcp, self._tcp_turn = wp.zeros(count, dtype=wp.vec3), wp.zeros(count, dtype=wp.mat33)
        self.tcp, self.tcp_turn = wp.to_torch(self._tcp), wp.to_torch(self._tcp_turn)

    # -- physics ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """Launch on this device, and on CUDA on the stream that torch uses now: neither waits for the other."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(wp.ScopedDevice(self.device))
            if self.device.is_cuda:
                stream = wp.stream_from_torch(wp.device_to_torch(self.device))
                stack.enter_context(wp.ScopedStream(stream, sync_enter=False))
            yield

    def _capture(self) -> None:
        """Run once, which compiles every kernel, and record what a control step will replay."""
        self._begin_step()
        self._substeps(1)
        self._end_step()
        self._refresh()
        self._clear()
        stream = wp.Stream(self.device) if self.device.is_cuda else None
        with contextlib.ExitStack() as stack:
            if stream is not None:
                stack.enter_context(wp.ScopedStream(stream))  # which waits for the one before
            self._graphs = {}
            for name, part in {
                "begin": self._begin_step,
                "substeps": lambda: self._substeps(GRAPH_STEPS),
                "end": self._end_step,
                "refresh": self._refresh,
                "clear": self._clear,
            }.items():
                with wp.ScopedCapture(device=self.device, stream=stream) as capture:
                    part()
                self._graphs[name] = capture.graph
        self._spilled.zero_()
        self._peak.zero_()

    def _begin_step(self) -> None:
        data = self._data
        inputs = *self._moving, *self._safe, FARTHEST, FASTEST, self._diverged, data.overflow
        wp.launch(device_kernels.begin, self.count, inputs=[*inputs])

    def _substeps(self, count: int) -> None:
        data = self._data
        for _ in range(count):
            mjw.step(self._model, data)
            guarded = *self._moving, self._safe[0], FARTHEST, FASTEST
            counted = data.nacon, data.nefc, self._peak
            wp.launch(device_kernels.guard, self.count, inputs=[*guarded, *counted, self._diverged])

    def _end_step(self) -> None:
        data = self._data
        inputs = self._active, data.overflow, OVERFLOW, self._diverged, *self._safe
        wp.launch(device_kernels.settle, self.count, inputs=[*inputs, *self._moving, self._spilled])

    def step(self, path: Array, opening: Array, active: Array) -> None:
        """One control step of `active` (N,) bool along joint set-points (N, TICKS, 7), to gripper openings (N,), 0 to 1.

        Afterwards `diverged` (N,) bool names simulations whose step failed. They stand where they stood before, as do
        those that were not active.
        """
        self.active.copy_(active)
        self.ctrl[:, GRIPPER] = opening[:, None] * arm.FINGER_RANGE
        with self.here():
            self._replay("begin")
            for k in range(TICKS):
                self.ctrl[:, ARM] = path[:, k]
                self._replay("substeps")
            self._replay("end")

    def refresh(self) -> None:
        """Compute the poses that images need from the present state."""
        with self.here():
            self._replay("refresh")

    def _replay(self, name: str) -> None:
        wp.capture_launch(self._graphs[name])

    def _clear(self) -> None:
        # Not only the state: the next step would go on with sums that a diverged world has left.
        mjw.reset_data(self._model, self._data, reset=self._active)
        for array in vars(self._data.efc).values():
            if isinstance(array, wp.array) and array.dtype is wp.float32 and array.size:
                # What is beyond a world's constraints is multiplied by 0: if it is not a number, it stays so.
                rows = array.reshape((self.count, -1))
                wp.launch(device_kernels.blank, rows.shape, inputs=[self._active, rows])

    def _refresh(self) -> None:
        mjw.kinematics(self._model, self._data)
        mjw.camlight(self._model, self._data)

    # -- true state ------------------------------------------------------------------------------------------------

    @property
    def joints(self) -> Array:
        """(N, 7) measured joint angles, rad."""
        return self.qpos[:, ARM]

    def snapshot(self) -> Snapshot:
        """The true state of all simulations, `memory` empty. Contacts are those of the last physics step's beginning."""
        with self.here():
            control.forward(self.joints, self._tcp, self._tcp_turn)
        position, turn, velocity = {}, {}, {}
        for name, (at, dof) in self._layout.free.items():
            position[name] = self.qpos[:, at : at + 3]
            turn[name] = rotation.matrix(self.qpos[:, at + 3 : at + 7])
            velocity[name] = self.qvel[:, dof : dof + 6]
        for name, at in self._layout.placed.items():
            position[name] = self._place[:, at]
            turn[name] = rotation.matrix(self._place_turn[:, at])
        return Snapshot(
            tcp=self.tcp,
            tcp_turn=self.tcp_turn,
            width=self.qpos[:, GRIPPER].sum(axis=1),
            position=position,
            turn=turn,
            velocity=velocity,
            contact={
                pair: (self._found[:, sensors] > 0.0).any(axis=1)
                for pair, sensors in self._layout.sensors.items()
            },
            memory={},
        )

    def usage_waiting(self) -> Usage:
        """How much of the room for contacts and constraints was needed so far. Waits for the device."""
        with self.here():
            contacts, constraints = self._peak.numpy()
        mean = float(contacts) / self.count
        return Usage(mean, self.contacts_room, int(constraints), self.constraints_room)

    def stats(self) -> dict[str, float]:
        """How full the room for contacts and constraints was at most, as shares. Waits for the device."""
        usage = self.usage_waiting()
        return {
            "room/contacts": usage.contacts / usage.contacts_room,
            "room/constraints": usage.constraints / usage.constraints_room,
        }

    def check_waiting(self) -> None:
        """Raise `TooManyContacts` if environments crowded each other out since the last check. Waits for the device.

        An environment that needed more constraints than fit has failed alone; that is only told.
        """
        with self.here():
            spilled = self._spilled.numpy().copy()  # on the CPU it would be a view
            if not spilled.any():
                return
            self._spilled.zero_()
        usage = self.usage_waiting()
        if (spilled & SHARED).any():
            raise TooManyContacts(
                f"{self.task.name}: {self.count} environments had {usage.contacts:.1f} contacts each and room for "
                f"{usage.contacts_room}; give the backend more with the option contacts"
            )
        log.warning(
            "%s: environments %s needed up to %d constraints and had room for %d: their episodes are void; "
            "give the backend more with the options constraints and contacts",
            *(self.task.name, np.flatnonzero(spilled).tolist()),
            *(usage.constraints, usage.constraints_room),
        )

    # -- resets ----------------------------------------------------------------------------------------------------

    def configure(self, ids: np.ndarray, configurations: list[dict[str, Any]]) -> None:
        """Put simulations `ids` (n,) into the states of their configurations, with their parameters and looks."""
        columns = self._arrays.states(configurations) | self._arrays.fields(configurations)
        rows, values = self._upload(ids, columns)
        self.active.zero_()
        self.active[rows] = True
        with self.here():
            self._replay("clear")
        self.qpos[rows] = values["qpos"]
        self.ctrl[rows] = values["ctrl"]
        if self._layout.placed:
            self._place[rows] = values["mocap_pos"]
            self._place_turn[rows] = values["mocap_quat"]
        for name in PER_WORLD:
            self._fields[name][rows] = values[name]

    def _upload(
        self, ids: np.ndarray, columns: dict[str, np.ndarray]
    ) -> tuple[Array, dict[str, Array]]:
        """`ids` and `columns` {name: (n, ...)} on the device, brought there by one copy."""
        count = len(ids)
        flat = [np.asarray(ids, np.float64), *columns.values()]
        flat = [np.asarray(value, np.float32).reshape(count, -1) for value in flat]
        packed = np.concatenate(flat, axis=1)
        there = self.qpos.new_tensor(packed)  # torch's own memory, which it keeps for its stream
        rows, values, at = there[:, 0].long(), {}, 1
        for (name, value), part in zip(columns.items(), flat[1:], strict=True):
            width = part.shape[1]
            values[name] = there[:, at : at + width].reshape(value.shape)
            at += width
        return rows, values

    # -- images ----------------------------------------------------------------------------------------------------

    def hide(self, hidden: dict[str, Array]) -> None:
        """{shape name: (N,) bool}: shapes that images no longer show, or show again."""
        if not hidden:
            return
        names = tuple(hidden)
        if names not in self._shapes:
            geoms = [self.model.geom(name).id for name in names]
            self._shapes[names] = self.qpos.new_tensor(geoms).long()
        gone = array_namespace(*hidden.values()).stack(list(hidden.values()), axis=1)
        # The tracer passes through what is fully transparent.
        rgba = self._fields["geom_rgba"]
        rgba[:, self._shapes[names], 3] = (~gone).to(rgba.dtype)

    def images(self, into: dict[str, Array], seen: Array, ids: np.ndarray | None = None) -> None:
        """Write images of those simulations that `seen` (N,) bool names to `into` {camera: (N, H, W, 3) uint8}.

        `ids` (n,) spares the work for all others, where the host knows.
        """
        self.refresh()
        data = self._data
        poses = {name: getattr(data, name) for name in ("geom_xpos", "geom_xmat")}
        poses |= {name: getattr(data, name) for name in ("cam_xpos", "cam_xmat", "light_xdir")}
        looks = {name: getattr(self._model, name) for name in ("geom_rgba", "light_diffuse")}
        with self.here():
            self.renderer.trace(poses | looks, into, seen, ids)

    def close(self) -> None:
        """Nothing is held that the garbage collector would not free."""


def _find_device(name: str) -> wp.Device:
    if name.startswith("cuda") and not wp.is_cuda_available():
        raise ValueError(
            f"device is {name!r}, and warp finds no CUDA device here: run `nvidia-smi`, or take device 'cpu'"
        )
    try:
        return wp.get_device(name)
    except (ValueError, RuntimeError) as error:
        known = [device.alias for device in wp.get_devices()]
        raise ValueError(f"device is {name!r}, not one of {known}") from error
