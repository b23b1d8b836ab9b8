"""N copies of one scene: physics, per-copy parameters and looks, and images of any of them."""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np
from mujoco.batch import Batch

from twins import arm, kinematics, rotation, scene
from twins.tasks.task import Snapshot, Task

POSITION_STAGE = int(mujoco.mjtStage.mjSTAGE_POS)
ARM = slice(0, kinematics.JOINTS)
GRIPPER = slice(kinematics.JOINTS, kinematics.JOINTS + 2)


class World:
    """N simulations of a task's scene in one `mujoco.batch.Batch`, with a renderer if cameras are given."""

    def __init__(
        self,
        task: Task,
        count: int,
        *,
        cameras: tuple[str, ...],
        image_size: int,
        threads: int = 1,
        device: str = "cpu",
    ):
        spec = scene.build_scene()
        task.add_objects(spec)
        self.task, self.count, self.cameras = task, count, cameras
        self.model = model = spec.compile()
        self.batch = batch = Batch(model, count, threads)
        self.qpos, self.qvel, self.ctrl = (batch.bind(f) for f in ("qpos", "qvel", "ctrl"))
        self.basket = batch.bind("mocap_pos")
        self._touch = batch.bind("sensordata")
        self._friction = batch.expand("geom_friction")
        self._mass, self._inertia = batch.expand("body_mass"), batch.expand("body_inertia")
        self._gain, self._bias = batch.expand("actuator_gainprm"), batch.expand("actuator_biasprm")
        self._object = model.body("object").id
        self._weighed = np.ones(count)  # the mass factor that set_const last saw
        self._kinds = self._geoms_by_kind()
        self._renderer = None
        if cameras:
            self._prepare_images(image_size, device)

    def _geoms_by_kind(self) -> dict[str, list[int]]:
        """The geoms of each colour group of the randomisation."""
        kinds: dict[str, list[int]] = {
            "table": [],
            "floor": [],
            "object": [],
            "basket": [],
            "arm": [],
        }
        for i in range(self.model.ngeom):
            name = self.model.geom(i).name.split("_")[0]
            kinds[name if name in kinds else "arm"].append(i)
        return kinds

    def _prepare_images(self, image_size: int, device: str) -> None:
        # Warp takes most of a second to import: an environment without images does without it.
        from twins import render

        model, batch = self.model, self.batch
        self._camera_pos, self._camera_quat = batch.expand("cam_pos"), batch.expand("cam_quat")
        self._poses = {name: batch.bind(name) for name in render.POSES}
        self._looks = {
            "geom_rgba": np.tile(model.geom_rgba, (self.count, 1, 1)),
            "light_diffuse": np.tile(model.light_diffuse, (self.count, 1, 1)),
            "light_xdir": np.tile(model.light_dir, (self.count, 1, 1)),
        }
        block = min(self.count, render.BLOCK)
        self._renderer = render.Renderer(
            model, self.cameras, image_size, block=block, device=device
        )

    def configure(self, ids: np.ndarray, configurations: list[dict[str, Any]]) -> None:
        """Put simulations `ids` into the states and give them the parameters of their configurations."""
        self.batch.reset(ids, stage=int(mujoco.mjtStage.mjSTAGE_NONE))
        draws = [configuration["draw"] for configuration in configurations]
        for i, draw in zip(ids, draws, strict=True):
            self._set_physics(i, draw)
        if self._renderer is not None:
            self._set_looks(ids, draws)
        joints = kinematics.HOME + np.array([c["joints"] for c in configurations])
        self.place_arm(ids, joints, arm.FINGER_RANGE)
        x, y, yaw = np.array([c["object"] for c in configurations]).T
        height = np.full(len(ids), self.task.rest_height)
        self.place_object(ids, np.column_stack([x, y, height]), rotation.about_z(yaw))
        self.basket[ids, 0, :2] = [c["basket"] for c in configurations]
        self.basket[ids, 0, 2] = 0.0
        self.refresh(ids)

    def place_arm(self, ids: np.ndarray, joints: np.ndarray, finger: float | np.ndarray) -> None:
        """Set joint angles (n, 7) and each finger's opening (m; one or n) of simulations `ids`."""
        for field in (self.qpos, self.ctrl):
            field[ids, ARM] = joints
            field[ids, GRIPPER] = np.broadcast_to(finger, len(ids))[:, None]

    def place_object(self, ids: np.ndarray, position: np.ndarray, turn: np.ndarray) -> None:
        """Set the object's position (n, 3) and orientation (n, 3, 3) in simulations `ids`."""
        self.qpos[ids, -7:-4] = position
        self.qpos[ids, -4:] = rotation.quaternion(rotation.log(turn))

    def _set_physics(self, i: int, draw: dict[str, Any]) -> None:
        model = self.model
        self._friction[i] = model.geom_friction
        self._friction[i, :, 0] *= draw["friction"]
        self._gain[i], self._bias[i] = model.actuator_gainprm, model.actuator_biasprm
        self._gain[i, ARM] *= draw["servo"]
        self._bias[i, ARM] *= draw["servo"]
        if self._weighed[i] != draw["mass"]:
            self._weighed[i] = draw["mass"]
            self._mass[i, self._object] = model.body_mass[self._object] * draw["mass"]
            self._inertia[i, self._object] = model.body_inertia[self._object] * draw["mass"]
            self.batch.set_const([i])

    def _set_looks(self, ids: np.ndarray, draws: list[dict[str, Any]]) -> None:
        model, looks = self.model, self._looks
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

    def refresh(self, ids: np.ndarray) -> None:
        """Compute the poses that images need from the present state."""
        self.batch.forward(ids, stage=POSITION_STAGE)

    def step(self, ids: np.ndarray, joints: np.ndarray, gripper: np.ndarray) -> None:
        """One control step of `ids` towards joint targets (n, 7) and gripper openings (n,), 0 to 1."""
        self.ctrl[ids, ARM] = joints
        self.ctrl[ids, GRIPPER] = gripper[:, None] * arm.FINGER_RANGE
        self.batch.step(ids, nstep=scene.SUBSTEPS)

    def snapshot(self, ids: np.ndarray) -> Snapshot:
        """What a task may look at, of simulations `ids`."""
        qpos = self.qpos[ids]
        position, turn = kinematics.forward(qpos[:, ARM])
        return Snapshot(
            tcp=position,
            tcp_turn=turn,
            width=qpos[:, GRIPPER].sum(axis=1),
            object=qpos[:, -7:-4],
            object_turn=rotation.matrix(qpos[:, -4:]),
            velocity=self.qvel[ids, -6:],
            basket=self.basket[ids, 0],
            touching=self._touch[ids].max(axis=1) > 0.0,
        )

    def images(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Images {camera: (n, H, W, 3) uint8} of simulations `ids` at the last `refresh` or forward."""
        return self._renderer.render(self._poses, self._looks, ids)
