"""ManiSkill 3 (SAPIEN): PhysX with all environments on a GPU, or one environment on a CPU.

Runs in ManiSkill's own Python through `twins.worker`. docs/simulators.md says what has been seen working.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from twins.backends.contract import Capabilities
from twins.backends.geometry import camera_pose, quaternion
from twins.backends.lockstep import FINGERS, HAND, PRESSING, Body, Lockstep
from twins.export_urdf import arm_urdf, body_urdf

# Shapes with a common bit in this collision group never collide.
GROUP = 2
LINK_BITS, HAND_BITS = 1 | 2 | 4, 1
BITS = {"table": 0, "free": 2, "placed": 4, "mark": 7}
NEAR, FAR = 0.01, 10.0  # m


class ManiSkill(Lockstep):
    """N copies of a task's scene in one ManiSkill environment, of which scene, sensors and renderer are used."""

    capabilities = Capabilities(
        repeatable=False, physics_draw=False, looks_draw=False, contact_pairs=False
    )

    def __init__(
        self,
        task: Any,
        count: int,
        *,
        cameras: Sequence[str] = (),
        image_size: int = 64,
        backend: str = "auto",
        physics_hz: int = 200,
        iterations: int = 16,
    ) -> None:
        """`backend` is "physx_cuda", "physx_cpu" (one environment) or "auto"; `iterations` are the solver's."""
        super().__init__(task, count, cameras, image_size)
        control_hz = round(1 / self.scene["control_seconds"])
        self._steps = max(1, round(physics_hz / control_hz))
        self._env = _make_environment(
            self.scene,
            self.bodies,
            num_envs=count,
            obs_mode="rgb" if self.cameras else "none",
            robot_uids="none",
            sim_backend=backend,
            render_backend="gpu" if self.cameras else "none",
            sim_config={
                "sim_freq": self._steps * control_hz,
                "control_freq": control_hz,
                "scene_config": {
                    "contact_offset": 0.002,
                    "solver_position_iterations": iterations,
                    "bounce_threshold": 0.2,
                },
            },
            image_size=image_size,
        )
        self._world = self._env.scene
        self._gpu = self._world.gpu_sim_enabled
        names = [joint.name for joint in self._env.arm.active_joints]
        self._order = [names.index(name) for name in self._chain.joints]

    def _write(self, ids: np.ndarray, dofs: np.ndarray, roots: np.ndarray) -> None:
        import torch

        device = self._env.device
        mask = torch.zeros(self.count, dtype=torch.bool, device=device)
        mask[torch.as_tensor(ids, device=device)] = True
        # ManiSkill's setters write the environments of this mask, in ascending order, as `ids` is.
        self._world._reset_mask = mask
        states = np.empty_like(dofs)
        states[:, self._order] = dofs
        self._env.arm.set_qpos(_tensor(states[..., 0], device))
        self._env.arm.set_qvel(_tensor(states[..., 1], device))
        for row, body in enumerate(self.movable):
            actor, root = self._env.things[body.name], _tensor(roots[:, row], device)
            actor.set_pose(_pose(root[:, :7]))
            if body.role == "free":
                actor.set_linear_velocity(root[:, 7:10])
                actor.set_angular_velocity(root[:, 10:])
        self._world._reset_mask = torch.ones_like(mask)
        if self._gpu:
            self._world._gpu_apply_all()
            self._world.px.gpu_update_articulation_kinematics()
            self._world._gpu_fetch_all()

    def _simulate(self, steps: int) -> None:
        targets = np.empty_like(self._targets)
        targets[:, self._order] = self._targets
        arm = self._env.arm
        arm.set_joint_drive_targets(_tensor(targets, self._env.device), joints=arm.active_joints)
        if self._gpu:
            self._world.px.gpu_apply_articulation_target_position()
        for _ in range(steps):
            self._world.step()
        if self._gpu:
            self._world._gpu_fetch_all()

    def _advance(self, targets: np.ndarray, steps: int) -> None:
        self._simulate(steps)

    def _tick(self) -> None:
        self._simulate(1)

    def _read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        arm = self._env.arm
        dofs = np.stack([_array(arm.get_qpos()), _array(arm.get_qvel())], axis=-1)
        roots = self._roots[:, : len(self.movable)].copy()
        for row, body in enumerate(self.movable):
            if body.role == "free":
                actor = self._env.things[body.name]
                roots[:, row, :7] = _array(actor.pose.raw_pose)
                roots[:, row, 7:10] = _array(actor.linear_velocity)
                roots[:, row, 10:] = _array(actor.angular_velocity)
        forces = _array(arm.get_net_contact_forces([HAND, *FINGERS]))
        return (
            dofs[:, self._order],
            roots,
            (np.linalg.norm(forces, axis=-1) > PRESSING).any(axis=-1),
        )

    def _set_physics(self, ids: np.ndarray, draws: list[dict[str, Any]]) -> None:
        self._refuse(draws, ("friction", "mass", "servo"))

    def _set_looks(self, ids: np.ndarray, draws: list[dict[str, Any]]) -> None:
        self._refuse(draws, ("light", "lamp", "cameras", "colours"))

    def _render(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        seen = self._env.get_sensor_images()
        return {name: seen[name]["rgb"][ids].cpu().numpy() for name in self.cameras}

    def close(self) -> None:
        """See the contract."""
        self._env.close()


def _tensor(values: np.ndarray, device: Any) -> Any:
    import torch

    return torch.as_tensor(np.ascontiguousarray(values), dtype=torch.float32, device=device)


def _array(tensor: Any) -> np.ndarray:
    return tensor.cpu().numpy().astype(float)


def _pose(rows: Any) -> Any:
    from mani_skill.utils.structs.pose import Pose

    return Pose.create(rows)


def _make_environment(
    scene: dict[str, Any], bodies: list[Body], *, image_size: int, **options: Any
) -> Any:
    """A ManiSkill environment without agent, task or observations: arm, bodies, lamp and cameras."""
    import sapien
    from mani_skill.envs.sapien_env import BaseEnv
    from mani_skill.sensors.camera import CameraConfig

    # Whatever is to be seen needs a Vulkan device; physics alone needs none.
    visuals = bool(scene["cameras"])

    class Scene(BaseEnv):
        SUPPORTED_ROBOTS = ("none",)

        def _load_scene(self, options: dict[str, Any]) -> None:
            with tempfile.TemporaryDirectory(prefix="twins-maniskill-") as folder:
                self.arm = self._load_arm(folder)
                self.things = {body.name: self._load_body(folder, body) for body in bodies}

        def _loader(self, name: str, friction: float) -> Any:
            loader = self.scene.create_urdf_loader()
            loader.name, loader.fix_root_link = name, True
            loader.set_material(friction, friction, 0.0)
            return loader

        def _load_arm(self, folder: str) -> Any:
            file = _written(folder, "arm", arm_urdf(scene["arm"], visuals=visuals))
            shapes = [s for body in scene["arm"]["bodies"] for s in body["shapes"]]
            builder = self._loader("arm", shapes[-1]["friction"]).parse(file)[
                "articulation_builders"
            ][0]
            builder.set_initial_pose(sapien.Pose())
            arm = builder.build("arm")
            servos = {b["joint"]["name"]: b["joint"] for b in scene["arm"]["bodies"] if b["joint"]}
            for joint in arm.active_joints:
                servo = servos[joint.name]
                joint.set_drive_properties(
                    servo["stiffness"],
                    servo["damping"] + servo["drag"],
                    force_limit=servo["effort"],
                    mode="force",
                )
            for link in arm.get_links():
                link.disable_gravity = True
                hands = (HAND, *FINGERS)
                link.set_collision_group(GROUP, HAND_BITS if link.name in hands else LINK_BITS)
            return arm

        def _load_body(self, folder: str, body: Body) -> Any:
            file = _written(folder, body.name, body_urdf(body, visuals=visuals))
            loader = self._loader(body.name, body.shapes[0]["friction"])
            builder = loader.parse(file)["actor_builders"][0]
            builder.collision_groups[GROUP] = BITS[body.role]
            builder.set_initial_pose(
                sapien.Pose(p=[0.0 if body.role == "table" else 2.0, 0.0, 0.0])
            )
            if body.role == "free":
                return builder.build_dynamic(body.name)
            return builder.build_kinematic(body.name)

        def _load_lighting(self, options: dict[str, Any]) -> None:
            light = scene["light"]
            self.scene.set_ambient_light(light["ambient"])
            self.scene.add_directional_light(light["direction"], light["diffuse"])

        @property
        def _default_sensor_configs(self) -> list[Any]:
            configurations = []
            for name, camera in scene["cameras"].items():
                position, turn = camera_pose(camera)
                mount = self.arm.find_link_by_name(camera["body"]) if camera["body"] else None
                configurations.append(
                    CameraConfig(
                        uid=name,
                        pose=sapien.Pose(position, quaternion(turn)),
                        width=image_size,
                        height=image_size,
                        fov=camera["fovy"],
                        near=NEAR,
                        far=FAR,
                        mount=mount,
                    )
                )
            return configurations

        def _initialize_episode(self, env_idx: Any, options: dict[str, Any]) -> None:
            """States are written from outside."""

        def get_obs(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return {}

        def get_state_dict(self) -> dict[str, Any]:
            return self.scene.get_sim_state()

    return Scene(**options)


def _written(folder: str, name: str, urdf: str) -> str:
    path = os.path.join(folder, name + ".urdf")
    with open(path, "w") as stream:
        stream.write(urdf)
    return path
