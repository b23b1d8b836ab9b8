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

from twins import arm, control, kinematics, rotation, scene
from twins.randomise import COLOURS
from twins.tasks.task import Snapshot, Task

wp.set_module_options({"enable_backward": False})

import mujoco_warp as mjw  # noqa: E402  (warp prints its banner then, unless `control` has told it not to)

log = logging.getLogger(__name__)

Array = Any  # torch.Tensor of the device
ARM = slice(0, kinematics.JOINTS)
GRIPPER = slice(kinematics.JOINTS, kinematics.JOINTS + 2)
FARTHEST, FASTEST = 10.0, 1000.0  # m or rad, m/s or rad/s: beyond these a simulation has diverged
GRAPH_STEPS = (
    10  # physics steps in a CUDA graph, which a control step replays SUBSTEPS / GRAPH_STEPS times
)
CONTACTS, CONSTRAINTS = (
    48,
    192,
)  # room in each environment, three times what the tasks' experts need
# What makes a step wrong. The solver's limits of iterations are not among these: C MuJoCo has the same.
OVERFLOWS = (
    *("NEFC", "NJMAX_NNZ", "BROADPHASE", "NARROWPHASE", "CCD"),
    *("HFIELD", "CONTACT_MATCH", "NVMAX"),
)
OVERFLOW = sum(int(mjw.OverflowType[name]) for name in OVERFLOWS)
SHARED = int(mjw.OverflowType.BROADPHASE) | int(mjw.OverflowType.NARROWPHASE)
# Fields of the model that differ between environments.
PER_WORLD = (
    *("geom_friction", "geom_rgba", "body_mass", "body_inertia", "body_subtreemass"),
    *("body_invweight0", "dof_invweight0", "actuator_gainprm", "actuator_biasprm"),
    *("cam_pos", "cam_quat", "light_dir", "light_diffuse"),
)


class TooManyContacts(RuntimeError):
    """The environments' contacts did not fit into the room that they share."""


class Usage(NamedTuple):
    """The most that any physics step has needed so far, against the room there is."""

    contacts: float  # in the mean of the environments, which share their room
    contacts_room: int  # for each environment
    constraints: int  # in one environment
    constraints_room: int


@wp.kernel
def _guard(
    qpos: wp.array2d(dtype=wp.float32),
    qvel: wp.array2d(dtype=wp.float32),
    warmstart: wp.array2d(dtype=wp.float32),
    safe: wp.array2d(dtype=wp.float32),
    farthest: float,
    fastest: float,
    contacts: wp.array(dtype=wp.int32),
    constraints: wp.array(dtype=wp.int32),
    peak: wp.array(dtype=wp.int32),
    diverged: wp.array(dtype=wp.bool),
):
    """Put a world whose state is absurd or not a number back at once: its contacts would crowd out the others'."""
    world = wp.tid()
    if world == 0:
        wp.atomic_max(peak, 0, contacts[0])
    wp.atomic_max(peak, 1, constraints[world])
    sound = wp.bool(True)  # a plain True would be a constant
    for i in range(qpos.shape[1]):
        # Comparisons with something that is not a number are false.
        if not (wp.abs(qpos[world, i]) < farthest):
            sound = False
    for i in range(qvel.shape[1]):
        if not (wp.abs(qvel[world, i]) < fastest):
            sound = False
    if not sound:
        diverged[world] = True
        for i in range(qpos.shape[1]):
            qpos[world, i] = safe[world, i]
        for i in range(qvel.shape[1]):
            qvel[world, i] = 0.0
            warmstart[world, i] = 0.0


@wp.kernel
def _settle(
    active: wp.array(dtype=wp.bool),
    overflow: wp.array(dtype=wp.int32),
    mask: int,
    diverged: wp.array(dtype=wp.bool),
    safe_qpos: wp.array2d(dtype=wp.float32),
    safe_qvel: wp.array2d(dtype=wp.float32),
    safe_warmstart: wp.array2d(dtype=wp.float32),
    qpos: wp.array2d(dtype=wp.float32),
    qvel: wp.array2d(dtype=wp.float32),
    warmstart: wp.array2d(dtype=wp.float32),
    spilled: wp.array(dtype=wp.int32),
):
    """Undo the step of worlds that do not take part or failed in it."""
    world = wp.tid()
    over = overflow[world] & mask
    if active[world] and over != 0:
        spilled[world] = spilled[world] | over
        diverged[world] = True
    if active[world] and not diverged[world]:
        return
    for i in range(qpos.shape[1]):
        qpos[world, i] = safe_qpos[world, i]
    for i in range(qvel.shape[1]):
        qvel[world, i] = safe_qvel[world, i]
        warmstart[world, i] = safe_warmstart[world, i]


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
            self._find_things()
            self._capture()
            self.renderer = None
            if self.cameras:
                from twins.device_render import DeviceRenderer

                self.renderer = DeviceRenderer(
                    model, self.cameras, image_size, count, device=device, block=render_block
                )

    def _allocate(self) -> None:
        data, count = self._data, self.count
        # Views of warp's arrays: writing to these is writing to the simulation.
        self.qpos, self.qvel, self.ctrl = (
            wp.to_torch(a) for a in (data.qpos, data.qvel, data.ctrl)
        )
        self._place, self._place_turn = wp.to_torch(data.mocap_pos), wp.to_torch(data.mocap_quat)
        self._found = wp.to_torch(data.sensordata)
        # Rows beyond a world's constraints are multiplied by 0: what is not a number in them would come back.
        self._constraints = [
            wp.to_torch(array)
            for array in vars(data.efc).values()
            if isinstance(array, wp.array) and array.dtype is wp.float32 and array.size
        ]
        self._fields = {name: wp.to_torch(getattr(self._model, name)) for name in PER_WORLD}
        self._safe = [wp.clone(a) for a in (data.qpos, data.qvel, data.qacc_warmstart)]
        self._diverged, self._active = (
            wp.zeros(count, dtype=wp.bool),
            wp.zeros(count, dtype=wp.bool),
        )
        self._spilled, self._peak = wp.zeros(count, dtype=wp.int32), wp.zeros(2, dtype=wp.int32)
        self.diverged, self.active = wp.to_torch(self._diverged), wp.to_torch(self._active)
        self._tcp, self._tcp_turn = wp.zeros(count, dtype=wp.vec3), wp.zeros(count, dtype=wp.mat33)
        self.tcp, self.tcp_turn = wp.to_torch(self._tcp), wp.to_torch(self._tcp_turn)

    def _find_things(self) -> None:
        """Where each thing's pose, velocity, contacts and geoms are in the model's arrays."""
        model = self.model
        self._free: dict[str, tuple[int, int]] = {}  # where it begins in qpos and in qvel
        self._placed: dict[str, int] = {}  # its row of the mocap arrays
        for thing in self.task.things:
            if thing.free:
                joint = model.joint(thing.name)
                self._free[thing.name] = int(joint.qposadr[0]), int(joint.dofadr[0])
            else:
                body = model.body(thing.name).id
                self._placed[thing.name] = int(model.body_mocapid[body])
        self._sensors = {
            pair: [int(model.sensor(name).adr[0]) for name in scene.contact_sensors(pair)]
            for pair in self.task.contacts
        }
        owners = {thing.name for thing in self.task.things}
        self._kinds: dict[str, list[int]] = {name: [] for name in (*COLOURS, *owners)}
        for i in range(model.ngeom):
            geom, owner = model.geom(i).name, model.body(model.geom_bodyid[i]).name
            self._kinds[owner if owner in owners else geom if geom in COLOURS else "arm"].append(i)

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
                wp.synchronize_device(self.device)
                stack.enter_context(wp.ScopedStream(stream))
            self._graphs = []
            for part in (
                self._begin_step,
                lambda: self._substeps(GRAPH_STEPS),
                self._end_step,
                self._refresh,
                self._clear,
            ):
                with wp.ScopedCapture(device=self.device, stream=stream) as capture:
                    part()
                self._graphs.append(capture.graph)
        if stream is not None:
            wp.synchronize_device(self.device)
        self._spilled.zero_()
        self._peak.zero_()

    def _begin_step(self) -> None:
        data = self._data
        for kept, now in zip(self._safe, (data.qpos, data.qvel, data.qacc_warmstart), strict=True):
            wp.copy(kept, now)
        self._diverged.zero_()
        data.overflow.zero_()

    def _substeps(self, count: int) -> None:
        data = self._data
        for _ in range(count):
            mjw.step(self._model, data)
            guarded = data.qpos, data.qvel, data.qacc_warmstart, self._safe[0], FARTHEST, FASTEST
            counted = data.nacon, data.nefc, self._peak
            wp.launch(_guard, self.count, inputs=[*guarded, *counted, self._diverged])

    def _end_step(self) -> None:
        data = self._data
        inputs = self._active, data.overflow, OVERFLOW, self._diverged, *self._safe
        outputs = data.qpos, data.qvel, data.qacc_warmstart, self._spilled
        wp.launch(_settle, self.count, inputs=[*inputs, *outputs])

    def step(self, goal: Array, opening: Array, active: Array) -> None:
        """One control step of `active` (N,) bool towards joints `goal` (N, 7) and gripper openings (N,), 0 to 1.

        Afterwards `diverged` (N,) bool names simulations whose step failed. They stand where they stood before, as do
        those that were not active.
        """
        self.active.copy_(active)
        self.ctrl[:, ARM] = goal
        self.ctrl[:, GRIPPER] = opening[:, None] * arm.FINGER_RANGE
        begin, substeps, end, _, _ = self._graphs
        with self.here():
            wp.capture_launch(begin)
            for _ in range(scene.SUBSTEPS // GRAPH_STEPS):
                wp.capture_launch(substeps)
            wp.capture_launch(end)

    def refresh(self) -> None:
        """Compute the poses that images need from the present state."""
        with self.here():
            wp.capture_launch(self._graphs[3])

    def _clear(self) -> None:
        # Not only the state: the next step would go on with sums that a diverged world has left.
        mjw.reset_data(self._model, self._data, reset=self._active)

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
        for name, (at, dof) in self._free.items():
            position[name] = self.qpos[:, at : at + 3]
            turn[name] = rotation.matrix(self.qpos[:, at + 3 : at + 7])
            velocity[name] = self.qvel[:, dof : dof + 6]
        for name, at in self._placed.items():
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
                for pair, sensors in self._sensors.items()
            },
            memory={},
        )

    def usage_waiting(self) -> Usage:
        """How much of the room for contacts and constraints was needed so far. Waits for the device."""
        contacts, constraints = self._peak.numpy()
        mean = float(contacts) / self.count
        return Usage(mean, self.contacts_room, int(constraints), self.constraints_room)

    def check_waiting(self) -> None:
        """Raise `TooManyContacts` if environments crowded each other out since the last check. Waits for the device.

        An environment that needed more constraints than fit has failed alone; that is only told.
        """
        spilled = self._spilled.numpy().copy()  # on the CPU it would be a view
        if not spilled.any():
            return
        usage = self.usage_waiting()
        self._spilled.zero_()
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
        columns = {**self._states(configurations), **self._draws(configurations)}
        rows, values = self._upload(ids, columns)
        self.active.zero_()
        self.active[rows] = True
        with self.here():
            wp.capture_launch(self._graphs[4])
        for field in self._constraints:
            field[rows] = 0.0
        self.qpos[rows] = values["qpos"]
        self.ctrl[rows] = values["ctrl"]
        if self._placed:
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
        # Not waited for: the copy reads pageable memory, which CUDA stages before it returns.
        there = wp.to_torch(wp.array(packed, dtype=wp.float32, device=self.device))
        rows, values, at = there[:, 0].long(), {}, 1
        for (name, value), part in zip(columns.items(), flat[1:], strict=True):
            width = part.shape[1]
            values[name] = there[:, at : at + width].reshape(value.shape)
            at += width
        return rows, values

    def _states(self, configurations: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        count, model = len(configurations), self.model
        qpos = np.tile(model.qpos0, (count, 1))
        qpos[:, ARM] = kinematics.HOME + np.array([c["joints"] for c in configurations])
        qpos[:, GRIPPER] = arm.FINGER_RANGE
        ctrl = qpos[:, : model.nu].copy()
        place, place_turn = np.zeros((count, model.nmocap, 3)), np.zeros((count, model.nmocap, 4))
        for thing in self.task.things:
            poses = np.array([(*c[thing.name], 0.0)[:3] for c in configurations])
            position = np.column_stack([poses[:, :2], np.full(count, thing.height)])
            half = poses[:, 2] / 2
            quat = np.stack([np.cos(half), 0 * half, 0 * half, np.sin(half)], axis=1)
            if thing.free:
                at, _ = self._free[thing.name]
                qpos[:, at : at + 3], qpos[:, at + 3 : at + 7] = position, quat
            else:
                at = self._placed[thing.name]
                place[:, at], place_turn[:, at] = position, quat
        return {"qpos": qpos, "ctrl": ctrl, "mocap_pos": place, "mocap_quat": place_turn}

    def _draws(self, configurations: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        """The fields PER_WORLD of the configurations' draws."""
        model, count = self.model, len(configurations)
        draws = [configuration["draw"] for configuration in configurations]

        def tiled(name: str) -> np.ndarray:
            return np.tile(getattr(model, name), (count, *[1] * getattr(model, name).ndim))

        def drawn(name: str) -> np.ndarray:
            return np.array([draw[name] for draw in draws])

        fields = {name: tiled(name) for name in PER_WORLD}
        fields["geom_friction"][:, :, 0] *= drawn("friction")[:, None]
        for name in ("actuator_gainprm", "actuator_biasprm"):
            fields[name][:, ARM] *= drawn("servo")[:, None, None]
        self._weigh(fields, drawn("mass")[:, None])
        for kind, geoms in self._kinds.items():
            moved = np.array([draw["colours"][kind] for draw in draws])[:, None]
            colours = fields["geom_rgba"][:, geoms, :3] + moved
            fields["geom_rgba"][:, geoms, :3] = np.clip(colours, 0.0, 1.0)
        fields["light_diffuse"][:] = drawn("light")[:, None, None]
        direction = np.column_stack([drawn("lamp"), np.full(count, -1.0)])
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        fields["light_dir"][:] = direction[:, None]
        for name in self.cameras:
            camera = model.camera(name).id
            offset = np.array([draw["cameras"][name] for draw in draws])
            fields["cam_pos"][:, camera] += offset[:, :3]
            turned = rotation.exp(offset[:, 3:]) @ rotation.matrix(model.cam_quat[camera])
            fields["cam_quat"][:, camera] = rotation.quaternion(rotation.log(turned))
        return fields

    def _weigh(self, fields: dict[str, np.ndarray], factor: np.ndarray) -> None:
        """Make free things `factor` (n, 1) times as heavy.

        What MuJoCo derives from masses (`mj_setConst`) is, for a single body that moves freely, proportional to its
        mass or to the inverse of it, so nothing needs to be computed anew.
        """
        for name, (_, dof) in self._free.items():
            body = self.model.body(name).id
            heavier = (factor[:, 0] - 1.0) * self.model.body_mass[body]
            fields["body_mass"][:, body] *= factor[:, 0]
            fields["body_inertia"][:, body] *= factor
            fields["body_subtreemass"][:, body] += heavier
            fields["body_subtreemass"][:, 0] += heavier
            fields["body_invweight0"][:, body] /= factor
            fields["dof_invweight0"][:, dof : dof + 6] /= factor

    # -- images ----------------------------------------------------------------------------------------------------

    def hide(self, hidden: dict[str, Array]) -> None:
        """{shape name: (N,) bool}: shapes that images no longer show, or show again."""
        for name, gone in hidden.items():
            alpha = self._fields["geom_rgba"][:, self.model.geom(name).id, 3]
            alpha.copy_(~gone)

    def images(self, into: dict[str, Array], ids: np.ndarray | None = None) -> None:
        """Write images of simulations `ids`, or of all, to `into` {camera: (N, H, W, 3) uint8}."""
        self.refresh()
        data = self._data
        poses = {name: getattr(data, name) for name in ("geom_xpos", "geom_xmat")}
        poses |= {name: getattr(data, name) for name in ("cam_xpos", "cam_xmat", "light_xdir")}
        looks = {name: getattr(self._model, name) for name in ("geom_rgba", "light_diffuse")}
        with self.here():
            self.renderer.trace(poses | looks, into, ids)

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
