"""Configurations as arrays of mujoco-warp's model and state: what a reset brings to a device.

What a draw means is what it means in `twins.backends.mujoco_cpu`.
"""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np

from twins import arm, kinematics, rotation, scene
from twins.randomise import COLOURS
from twins.tasks.task import Task

ARM = slice(0, kinematics.JOINTS)
GRIPPER = slice(kinematics.JOINTS, kinematics.JOINTS + 2)
# Fields of the model that differ between environments.
PER_WORLD = (
    *("geom_friction", "geom_rgba", "body_mass", "body_inertia", "body_subtreemass"),
    *("body_invweight0", "dof_invweight0", "actuator_gainprm", "actuator_biasprm"),
    *("cam_pos", "cam_quat", "light_dir", "light_diffuse"),
)
Configuration = dict[str, Any]
Arrays = dict[str, np.ndarray]


class Layout:
    """Where each of a task's things is in the model's arrays."""

    def __init__(self, model: mujoco.MjModel, task: Task):
        self.things = task.things
        self.free: dict[str, tuple[int, int]] = {}  # where it begins in qpos and in qvel
        self.placed: dict[str, int] = {}  # its row of the mocap arrays
        for thing in task.things:
            if thing.free:
                joint = model.joint(thing.name)
                self.free[thing.name] = int(joint.qposadr[0]), int(joint.dofadr[0])
            else:
                self.placed[thing.name] = int(model.body_mocapid[model.body(thing.name).id])
        self.sensors: dict[tuple[str, str], slice] = {}  # a pair's part of sensordata
        for pair in task.contacts:
            found = [int(model.sensor(name).adr[0]) for name in scene.contact_sensors(pair)]
            self.sensors[pair] = slice(found[0], found[-1] + 1)
            if found != list(range(found[0], found[-1] + 1)):
                raise ValueError(f"sensors of {pair} are at {found}, must be side by side")
        owners = {thing.name for thing in task.things}
        self.kinds: dict[str, list[int]] = {name: [] for name in (*COLOURS, *owners)}  # of geoms
        for i in range(model.ngeom):
            geom, owner = model.geom(i).name, model.body(model.geom_bodyid[i]).name
            self.kinds[owner if owner in owners else geom if geom in COLOURS else "arm"].append(i)


class ConfigurationArrays:
    """Turns lists of n configurations into arrays (n, ...)."""

    def __init__(self, model: mujoco.MjModel, layout: Layout, cameras: tuple[str, ...]):
        self.model, self.layout, self.cameras = model, layout, cameras

    def states(self, configurations: list[Configuration]) -> Arrays:
        """`qpos`, `ctrl`, `mocap_pos` and `mocap_quat` of resets."""
        count, model = len(configurations), self.model
        qpos = np.tile(model.qpos0, (count, 1))
        qpos[:, ARM] = kinematics.HOME + np.array([c["joints"] for c in configurations])
        qpos[:, GRIPPER] = arm.FINGER_RANGE
        ctrl = qpos[:, : model.nu].copy()
        place, place_turn = np.zeros((count, model.nmocap, 3)), np.zeros((count, model.nmocap, 4))
        for thing in self.layout.things:
            poses = np.array([(*c[thing.name], 0.0)[:3] for c in configurations])
            position = np.column_stack([poses[:, :2], np.full(count, thing.height)])
            half = poses[:, 2] / 2
            quat = np.stack([np.cos(half), 0 * half, 0 * half, np.sin(half)], axis=1)
            if thing.free:
                at, _ = self.layout.free[thing.name]
                qpos[:, at : at + 3], qpos[:, at + 3 : at + 7] = position, quat
            else:
                at = self.layout.placed[thing.name]
                place[:, at], place_turn[:, at] = position, quat
        return {"qpos": qpos, "ctrl": ctrl, "mocap_pos": place, "mocap_quat": place_turn}

    def fields(self, configurations: list[Configuration]) -> Arrays:
        """The fields PER_WORLD that the configurations' draws make."""
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
        self._weigh(fields, drawn("mass"))
        for kind, geoms in self.layout.kinds.items():
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

    def _weigh(self, fields: Arrays, factor: np.ndarray) -> None:
        """Make free things `factor` (n,) times as heavy.

        What MuJoCo derives from masses (`mj_setConst`) is, for a single body that moves freely, proportional to its
        mass or to the inverse of it, so nothing needs to be computed anew.
        """
        for name, (_, dof) in self.layout.free.items():
            body = self.model.body(name).id
            heavier = (factor - 1.0) * self.model.body_mass[body]
            fields["body_mass"][:, body] *= factor
            fields["body_inertia"][:, body] *= factor[:, None]
            fields["body_subtreemass"][:, body] += heavier
            fields["body_subtreemass"][:, 0] += heavier
            fields["body_invweight0"][:, body] /= factor[:, None]
            fields["dof_invweight0"][:, dof : dof + 6] /= factor[:, None]
