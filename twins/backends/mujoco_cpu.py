"""C MuJoCo on the CPU: N copies of one scene in a batch, with images from the CPU's tracer, or mujoco-warp's on a GPU."""

from __future__ import annotations

import copy
import logging
from typing import Any

import mujoco
import numpy as np
from mujoco.batch import Batch

from twins import arm, kinematics, rotation, scene, tracer
from twins.backends.contract import Capabilities
from twins.control import ToolPoses
from twins.randomise import COLOURS
from twins.snapshot import Snapshot
from twins.tasks import Task, make_task

log = logging.getLogger(__name__)

POSITION_STAGE = int(mujoco.mjtStage.mjSTAGE_POS)
ARM = slice(0, kinematics.JOINTS)
GRIPPER = slice(kinematics.JOINTS, kinematics.JOINTS + 2)


def _log_warnings() -> None:
    """Hand MuJoCo's warnings to `logging`; left alone it writes MUJOCO_LOG.TXT into the working directory.

    They come from the batch's threads too. A handler that the process has set already stays.
    """
    if mujoco.get_mju_user_warning() is None:
        mujoco.set_mju_user_warning(lambda message: log.warning("MuJoCo: %s", message))


class MujocoSimulation:
    """N simulations of a task's scene in one `mujoco.batch.Batch` (`twins.backends.contract.Simulation`)."""

    capabilities = Capabilities(
        repeatable=True, physics_draw=True, looks_draw=True, contact_pairs=True
    )

    def __init__(
        self,
        task: Task | dict[str, Any],
        count: int,
        *,
        cameras: tuple[str, ...] = (),
        image_size: int = 64,
        threads: int = 1,
        device: str = "cpu",
    ):
        """`task` is a task, or its description (`twins.scene_description`), which is what a worker is told."""
        _log_warnings()
        task = make_task(task["task"]) if isinstance(task, dict) else task
        self.task, self.count = task, count
        self.cameras, self.image_size = tuple(cameras), image_size
        self.model = model = scene.build_scene(task).compile()
        honest = copy.copy(model)
        # A simulation that diverges must show it; MuJoCo would silently put it back to the default pose.
        honest.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)
        self.batch = batch = Batch(honest, count, threads)
        self.qpos, self.qvel, self.ctrl = (batch.bind(f) for f in ("qpos", "qvel", "ctrl"))
        self._friction = batch.expand("geom_friction")
        self._mass, self._inertia = batch.expand("body_mass"), batch.expand("body_inertia")
        self._gain, self._bias = batch.expand("actuator_gainprm"), batch.expand("actuator_biasprm")
        self._weighed = np.ones(count)  # the mass factor that set_const last saw
        self._find_things()
        self._tool_poses = ToolPoses(count)
        self._renderer: Any = None
        if self.cameras:
            self._prepare_images(image_size, threads, device)

    def _find_things(self) -> None:
        """Where each thing's pose, velocity, contacts and geoms are in the model's arrays."""
        model, batch = self.model, self.batch
        self._free, self._placed = {}, {}  # thing -> index into qpos and qvel; into mocap arrays
        for thing in self.task.things:
            body = model.body(thing.name)
            if thing.free:
                joint = model.joint(thing.name)
                self._free[thing.name] = int(joint.qposadr[0]), int(joint.dofadr[0])
            else:
                self._placed[thing.name] = int(model.body_mocapid[body.id])
        self._heavy = [model.body(name).id for name in self._free]
        if self._placed:
            self._place, self._place_turn = batch.bind("mocap_pos"), batch.bind("mocap_quat")
        self._sensors = {
            pair: [int(model.sensor(name).adr[0]) for name in scene.contact_sensors(pair)]
            for pair in self.task.contacts
        }
        if self._sensors:
            self._found = batch.bind("sensordata")
        owners = {thing.name: thing.name for thing in self.task.things}
        self._kinds: dict[str, list[int]] = {name: [] for name in (*COLOURS, *owners)}
        for i in range(model.ngeom):
            geom, owner = model.geom(i).name, model.body(model.geom_bodyid[i]).name
            self._kinds[owners.get(owner, geom if geom in COLOURS else "arm")].append(i)

    def _prepare_images(self, image_size: int, threads: int, device: str) -> None:
        model, batch = self.model, self.batch
        self._camera_pos, self._camera_quat = batch.expand("cam_pos"), batch.expand("cam_quat")
        self._poses = {name: batch.bind(name) for name in tracer.POSES}
        self._looks = {
            "geom_rgba": np.tile(model.geom_rgba.astype(np.float32), (self.count, 1, 1)),
            "light_diffuse": np.tile(model.light_diffuse, (self.count, 1, 1)),
            "light_xdir": np.tile(model.light_dir, (self.count, 1, 1)),
        }
        if device == "cpu":
            self._renderer = tracer.Tracer(model, self.cameras, image_size, threads=threads)
            return
        from twins import render  # it takes most of a second to import

        block = min(self.count, render.BLOCK)
        self._renderer = render.Renderer(
            model, self.cameras, image_size, block=block, device=device
        )

    # -- resets ----------------------------------------------------------------------------------------------

    def configure(self, ids: np.ndarray, configurations: list[dict[str, Any]]) -> None:
        """See the contract."""
        self.batch.reset(ids, stage=int(mujoco.mjtStage.mjSTAGE_NONE))
        draws = [configuration["draw"] for configuration in configurations]
        self._set_physics(ids, draws)
        if self._renderer is not None:
            self._set_looks(ids, draws)
        joints = kinematics.HOME + np.array([c["joints"] for c in configurations])
        self.place_arm(ids, joints, arm.FINGER_RANGE)
        for thing in self.task.things:
            poses = np.array([(*c[thing.name], 0.0)[:3] for c in configurations])
            position = np.column_stack([poses[:, :2], np.full(len(ids), thing.height)])
            half = poses[:, 2:] / 2
            none = np.zeros_like(half)
            quat = np.concatenate([np.cos(half), none, none, np.sin(half)], axis=1)
            self._put(ids, thing.name, position, quat)
        self.refresh(ids)

    def place_arm(self, ids: np.ndarray, joints: np.ndarray, finger: float | np.ndarray) -> None:
        """Set joint angles (n, 7) and each finger's opening (m; one or n) of simulations `ids`."""
        for field in (self.qpos, self.ctrl):
            field[ids, ARM] = joints
            field[ids, GRIPPER] = np.broadcast_to(finger, len(ids))[:, None]

    def place(self, ids: np.ndarray, thing: str, position: np.ndarray, turn: np.ndarray) -> None:
        """Set a thing's position (n, 3) and orientation (n, 3, 3) in simulations `ids`."""
        self._put(ids, thing, position, rotation.quaternion(rotation.log(turn)))

    def _put(self, ids: np.ndarray, thing: str, position: np.ndarray, quat: np.ndarray) -> None:
        if thing in self._free:
            at, _ = self._free[thing]
            self.qpos[ids, at : at + 3], self.qpos[ids, at + 3 : at + 7] = position, quat
        else:
            at = self._placed[thing]
            self._place[ids, at], self._place_turn[ids, at] = position, quat

    def push(self, ids: np.ndarray, thing: str, velocity: np.ndarray) -> None:
        """Set a free thing's linear velocity (n, 3) in m/s in simulations `ids`."""
        _, at = self._free[thing]
        self.qvel[ids, at : at + 3] = velocity

    def _set_physics(self, ids: np.ndarray, draws: list[dict[str, Any]]) -> None:
        model = self.model
        friction, servo, mass = (
            np.array([draw[name] for draw in draws]) for name in ("friction", "servo", "mass")
        )
        self._friction[ids] = model.geom_friction
        self._friction[ids, :, 0] *= friction[:, None]
        self._gain[ids], self._bias[ids] = model.actuator_gainprm, model.actuator_biasprm
        self._gain[ids, ARM] *= servo[:, None, None]
        self._bias[ids, ARM] *= servo[:, None, None]
        changed = self._weighed[ids] != mass  # constants are derived again only where they differ
        if changed.any():
            rows, factor = ids[changed], mass[changed, None]
            self._weighed[rows] = mass[changed]
            heavy = rows[:, None], self._heavy
            self._mass[heavy] = model.body_mass[self._heavy] * factor
            self._inertia[heavy] = model.body_inertia[self._heavy] * factor[..., None]
            self.batch.set_const(rows)

    def _set_looks(self, ids: np.ndarray, draws: list[dict[str, Any]]) -> None:
        model, looks = self.model, self._looks
        looks["geom_rgba"][ids, :, 3] = model.geom_rgba[:, 3]
        for kind, geoms in self._kinds.items():
            moved = np.array([draw["colours"][kind] for draw in draws])[:, None]
            colours = np.clip(model.geom_rgba[geoms, :3] + moved, 0.0, 1.0)
            looks["geom_rgba"][ids[:, None], geoms, :3] = colours
        looks["light_diffuse"][ids] = np.array([draw["light"] for draw in draws])[:, None, None]
        direction = np.array([[*draw["lamp"], -1.0] for draw in draws])
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        looks["light_xdir"][ids] = direction[:, None]
        for name in self.cameras:
            camera = model.camera(name).id
            offset = np.array([draw["cameras"][name] for draw in draws])
            self._camera_pos[ids, camera] = model.cam_pos[camera] + offset[:, :3]
            turned = rotation.exp(offset[:, 3:]) @ rotation.matrix(model.cam_quat[camera])
            self._camera_quat[ids, camera] = rotation.quaternion(rotation.log(turned))

    # -- steps -----------------------------------------------------------------------------------------------

    def refresh(self, ids: np.ndarray) -> None:
        """Compute the poses that images need from the present state."""
        self.batch.forward(ids, stage=POSITION_STAGE)

    def step(self, ids: np.ndarray, path: np.ndarray, gripper: np.ndarray) -> None:
        """See the contract."""
        self.ctrl[ids, GRIPPER] = gripper[:, None] * arm.FINGER_RANGE
        for k, count in enumerate(scene.parts(path.shape[1])):
            self.ctrl[ids, ARM] = path[:, k]
            self.batch.step(ids, nstep=count)

    def joints(self, ids: np.ndarray) -> np.ndarray:
        """(n, 7) measured joint angles, rad."""
        return self.qpos[ids, ARM]

    def snapshot(self, ids: np.ndarray) -> Snapshot:
        """See the contract. Contacts are those of the last physics step's beginning."""
        qpos = self.qpos[ids]
        tcp, tcp_turn = self._tool_poses(qpos[:, ARM])
        position, turn, velocity = {}, {}, {}
        for name, (at, dof) in self._free.items():
            position[name] = qpos[:, at : at + 3]
            turn[name] = rotation.matrix(qpos[:, at + 3 : at + 7])
            velocity[name] = self.qvel[ids, dof : dof + 6]
        for name, at in self._placed.items():
            position[name] = self._place[ids, at]
            turn[name] = rotation.matrix(self._place_turn[ids, at])
        return Snapshot(
            tcp=tcp,
            tcp_turn=tcp_turn,
            width=qpos[:, GRIPPER].sum(axis=1),
            position=position,
            turn=turn,
            velocity=velocity,
            contact={
                pair: (self._found[ids][:, sensors] > 0.0).any(axis=1)
                for pair, sensors in self._sensors.items()
            },
            memory={},
        )

    # -- images ----------------------------------------------------------------------------------------------

    def hide(self, ids: np.ndarray, hidden: dict[str, np.ndarray]) -> None:
        """See the contract."""
        if self._renderer is None or not hidden:
            return
        geoms = [self.model.geom(name).id for name in hidden]
        # The ray tracer passes through what is fully transparent.
        opacity = 1.0 - np.stack(list(hidden.values()), axis=1)
        self._looks["geom_rgba"][ids[:, None], geoms, 3] = opacity

    def images(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """See the contract."""
        self.refresh(ids)
        return self._renderer.render(self._poses, self._looks, ids)

    def close(self) -> None:
        """End the tracer's threads; all else the garbage collector frees."""
        if isinstance(self._renderer, tracer.Tracer):
            self._renderer.close()
