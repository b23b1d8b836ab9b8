"""The scene in Isaac Gym's words: simulation parameters, assets, environments with their actors and cameras."""

from __future__ import annotations

import os
import shutil
import tempfile
from typing import Any, Dict, Sequence

import numpy as np

from twins.backends.lockstep import FINGERS, HAND, Body
from twins.export_urdf import arm_urdf, body_urdf

SPACING = 4.0  # m, half of what an environment keeps for itself; cameras see no further
NEAR, FAR = 0.01, 3.0  # m
# Shapes with a common bit never collide: links meet only the table, hand and fingers everything but the arm, what
# lies and what stands each other.
LINK_BITS, HAND_BITS = 1 | 2 | 4, 1
BITS = {"table": 0, "free": 2, "placed": 4, "mark": 7}


def parameters(
    gymapi: Any,
    *,
    seconds: float,
    substeps: int,
    iterations: int,
    gpu: bool,
    pipeline: bool,
    count: int,
) -> Any:
    """Settings for contacts with clearances of a millimetre and stiff servos."""
    params = gymapi.SimParams()
    params.dt, params.substeps = seconds, substeps
    params.up_axis = gymapi.UP_AXIS_Z
    params.gravity = gymapi.Vec3(0.0, 0.0, -9.81)
    params.use_gpu_pipeline = pipeline
    physx = params.physx
    physx.use_gpu = gpu
    physx.solver_type = 1  # temporal Gauss-Seidel: what is held stays held
    physx.num_position_iterations, physx.num_velocity_iterations = iterations, 1
    physx.contact_offset, physx.rest_offset = 0.002, 0.0  # m
    physx.bounce_threshold_velocity = 0.2
    physx.max_depenetration_velocity = 1.0
    physx.friction_offset_threshold = 0.001
    physx.friction_correlation_distance = 0.0005
    physx.contact_collection = gymapi.CC_LAST_SUBSTEP
    physx.max_gpu_contact_pairs = max(1 << 20, 4096 * count)
    return params


class Environments:
    """All environments of a simulation: handles of their actors and cameras."""

    def __init__(
        self,
        gymapi: Any,
        gym: Any,
        sim: Any,
        scene: Dict[str, Any],
        bodies: Sequence[Body],
        count: int,
        image_size: int,
        tensors: bool,
    ) -> None:
        """`tensors`: images are read as tensors on the GPU."""
        self._gymapi, self._gym, self._sim, self._scene = gymapi, gym, sim, scene
        self._bodies = bodies
        self._load_assets()
        self.envs, self.arms = [], []  # type: list, list
        self.actors = {body.name: [] for body in bodies}  # type: Dict[str, List[int]]
        self.cameras = {name: [] for name in scene["cameras"]}  # type: Dict[str, List[int]]
        low, high = gymapi.Vec3(-SPACING, -SPACING, 0.0), gymapi.Vec3(SPACING, SPACING, SPACING)
        across = max(1, round(count**0.5))
        for group in range(count):
            env = gym.create_env(sim, low, high, across)
            self.envs.append(env)
            # Groups never collide with each other; within one the shapes' own bits decide (`set_shapes`).
            self.arms.append(self._create(env, self._arm, "arm", group))
            for i, body in enumerate(bodies):
                actor = self._create(env, self._assets[i], body.name, group, at=2.0 + 0.5 * i)
                self.actors[body.name].append(actor)
            for name, camera in scene["cameras"].items():
                self.cameras[name].append(self._add_camera(env, camera, image_size, tensors))

    def _load_assets(self) -> None:
        """Load the arm and the bodies from URDF files that live until then."""
        folder = tempfile.mkdtemp(prefix="twins-isaac-gym-")
        try:
            self._arm = self._load(folder, "arm", arm_urdf(self._scene["arm"]), self._arm_options())
            self._assets = [
                self._load(folder, f"body{i}", body_urdf(body), self._body_options(body))
                for i, body in enumerate(self._bodies)
            ]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.dof_names = list(self._gym.get_asset_dof_names(self._arm))

    def _arm_options(self) -> Any:
        options = self._body_options(None)
        options.collapse_fixed_joints = False
        options.use_physx_armature = True
        options.default_dof_drive_mode = int(self._gymapi.DOF_MODE_POS)
        return options

    def _body_options(self, body: Any) -> Any:
        options = self._gymapi.AssetOptions()
        free = body is not None and body.role == "free"
        options.fix_base_link = options.disable_gravity = not free
        options.thickness = options.armature = 0.0
        options.linear_damping = options.angular_damping = 0.0
        return options

    def _load(self, folder: str, name: str, urdf: str, options: Any) -> Any:
        file = name + ".urdf"
        with open(os.path.join(folder, file), "w") as stream:
            stream.write(urdf)
        asset = self._gym.load_asset(self._sim, folder, file, options)
        if asset is None:
            raise RuntimeError(f"Isaac Gym could not load the URDF of {name}:\n{urdf}")
        return asset

    def _create(self, env: Any, asset: Any, name: str, group: int, at: float = 0.0) -> int:
        """An actor `at` m along x, the table and the floor in the middle."""
        pose = self._gymapi.Transform()
        if name not in ("arm", "table", "floor"):
            pose.p = self._gymapi.Vec3(at, 0.0, 0.5)
        return int(self._gym.create_actor(env, asset, pose, name, group, 0, 0))

    def _add_camera(self, env: Any, camera: Dict[str, Any], image_size: int, tensors: bool) -> int:
        properties = self._gymapi.CameraProperties()
        properties.width = properties.height = image_size
        properties.horizontal_fov = float(np.degrees(camera["fovy"]))  # the images are square
        properties.near_plane, properties.far_plane = NEAR, FAR
        properties.enable_tensors = tensors
        return int(self._gym.create_camera_sensor(env, properties))

    # -- what differs between environments -------------------------------------------------------------------

    def set_shapes(self, i: int, friction: float) -> None:
        """Collision bits, and friction times `friction`, of all shapes of environment `i`."""
        links = {body["name"]: body["shapes"] for body in self._scene["arm"]["bodies"]}
        hands = (HAND, *FINGERS)
        bits = {name: HAND_BITS if name in hands else LINK_BITS for name in links}
        self._set_actor_shapes(i, self.arms[i], links, bits, friction)
        for body in self._bodies:
            own = {body.name: body.shapes}
            self._set_actor_shapes(
                i, self.actors[body.name][i], own, {body.name: BITS[body.role]}, friction
            )

    def _set_actor_shapes(
        self, i: int, actor: int, shapes: Dict[str, Any], bits: Dict[str, int], friction: float
    ) -> None:
        env, gym = self.envs[i], self._gym
        properties = gym.get_actor_rigid_shape_properties(env, actor)
        if not properties:
            return
        names = gym.get_actor_rigid_body_names(env, actor)
        for name, place in zip(names, gym.get_actor_rigid_body_shape_indices(env, actor)):
            solid = [shape for shape in shapes[name] if shape["solid"]]
            for k in range(place.count):
                one = properties[place.start + k]
                one.friction = solid[min(k, len(solid) - 1)]["friction"] * friction
                one.filter = bits[name]
        if not gym.set_actor_rigid_shape_properties(env, actor, properties):
            raise RuntimeError(f"Isaac Gym refused the shapes of actor {actor} in environment {i}")

    def set_servos(self, i: int, strength: float) -> None:
        """Position servos as in MuJoCo, the arm's times `strength`; passive damping goes with the servo's."""
        env, arm = self.envs[i], self.arms[i]
        properties = self._gym.get_actor_dof_properties(env, arm)
        for body in self._scene["arm"]["bodies"]:
            joint = body["joint"]
            if joint:
                row = self.dof_names.index(joint["name"])
                factor = strength if joint["kind"] == "revolute" else 1.0
                properties["driveMode"][row] = int(self._gymapi.DOF_MODE_POS)
                properties["stiffness"][row] = joint["stiffness"] * factor
                properties["damping"][row] = joint["damping"] * factor + joint["drag"]
                properties["effort"][row] = joint["effort"]
                properties["armature"][row] = joint["armature"]
        if not self._gym.set_actor_dof_properties(env, arm, properties):
            raise RuntimeError(f"Isaac Gym refused the servos of environment {i}")

    def set_masses(self, i: int, factor: float) -> None:
        """Mass and inertia of the free bodies, times `factor`; their centre of mass may not change."""
        gymapi, env = self._gymapi, self.envs[i]
        for body in self._bodies:
            if body.role != "free":
                continue
            actor = self.actors[body.name][i]
            properties = self._gym.get_actor_rigid_body_properties(env, actor)
            mine = properties[0]
            inertia = np.asarray(body.inertia, float) * factor
            mine.mass, mine.invMass = body.mass * factor, 1.0 / (body.mass * factor)
            for target, tensor in (
                (mine.inertia, inertia),
                (mine.invInertia, np.linalg.inv(inertia)),
            ):
                target.x, target.y, target.z = (gymapi.Vec3(*map(float, row)) for row in tensor)
            if not self._gym.set_actor_rigid_body_properties(env, actor, properties, False):
                raise RuntimeError(f"Isaac Gym refused the mass of {body.name} in environment {i}")
