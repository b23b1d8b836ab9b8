"""Isaac Lab 2.3: PhysX in Isaac Sim, all environments on a GPU, cameras tiled into one image.

Runs in Isaac Lab's own Python through `twins.worker`. Written against the documented API; docs/simulators.md says
what has been seen working and what has not.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from twins.backends.contract import Capabilities
from twins.backends.geometry import quaternion
from twins.backends.lockstep import FINGERS, HAND, PRESSING, Body, Lockstep
from twins.export_urdf import arm_urdf, body_urdf

SPACING = 8.0  # m between environments; cameras see no further than FAR
NEAR, FAR = 0.01, 3.0  # m
FOCAL_LENGTH = 24.0  # mm, from which the aperture gives the field of view
LAMP, SKY = 3000.0, 800.0  # of Isaac Sim's units, at full diffuse and ambient light
ENVIRONMENT = "{ENV_REGEX_NS}"  # Isaac Lab puts each environment's path in


class IsaacLab(Lockstep):
    """N copies of a task's scene in one Isaac Lab `InteractiveScene`."""

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
        device: str = "cuda:0",
        physics_hz: float = 200.0,
        iterations: int = 16,
    ) -> None:
        """`physics_hz` simulation steps in a second, each with `iterations` of the solver."""
        super().__init__(task, count, cameras, image_size)
        from isaaclab.app import AppLauncher

        # Nothing else of Isaac Lab can be imported before the app runs.
        launcher = AppLauncher(headless=True, enable_cameras=bool(self.cameras), device=device)
        self._app = launcher.app
        import isaaclab.sim as sim_utils
        import torch
        from isaaclab.scene import InteractiveScene

        self._torch = torch
        self._steps = max(1, round(self.scene["control_seconds"] * physics_hz))
        self._seconds = self.scene["control_seconds"] / self._steps
        physx = sim_utils.PhysxCfg(
            solver_type=1,
            min_position_iteration_count=iterations,
            bounce_threshold_velocity=0.2,
            friction_offset_threshold=0.001,
            friction_correlation_distance=0.0005,
        )
        settings = sim_utils.SimulationCfg(dt=self._seconds, device=device, physx=physx)
        self._sim = sim_utils.SimulationContext(settings)
        self._folder = tempfile.TemporaryDirectory(prefix="twins-isaac-lab-")
        self._scene = InteractiveScene(
            scene_settings(self.scene, self.bodies, self._folder.name, count, image_size)
        )
        self._sim.reset()
        self._device = self._scene.env_origins.device
        self._arm = self._scene["arm"]
        self._things = [self._scene[body.name] for body in self.movable]
        names = list(self._arm.joint_names)
        self._order = [names.index(name) for name in self._chain.joints]

    def _tensor(self, values: np.ndarray) -> Any:
        array = np.ascontiguousarray(values, np.float32)
        return self._torch.as_tensor(array, device=self._device)

    def _write(self, ids: np.ndarray, dofs: np.ndarray, roots: np.ndarray) -> None:
        which = self._torch.as_tensor(ids, dtype=self._torch.long, device=self._device)
        states = np.empty_like(dofs)
        states[:, self._order] = dofs
        self._arm.write_joint_state_to_sim(
            self._tensor(states[..., 0]), self._tensor(states[..., 1]), env_ids=which
        )
        origins = self._scene.env_origins[which]
        for row, (body, thing) in enumerate(zip(self.movable, self._things, strict=True)):
            pose = self._tensor(roots[:, row, :7])
            pose[:, :3] += origins
            thing.write_root_pose_to_sim(pose, env_ids=which)
            if body.role == "free":
                thing.write_root_velocity_to_sim(self._tensor(roots[:, row, 7:]), env_ids=which)

    def _simulate(self, steps: int) -> None:
        targets = np.empty_like(self._targets)
        targets[:, self._order] = self._targets
        self._arm.set_joint_position_target(self._tensor(targets))
        for _ in range(steps):
            self._scene.write_data_to_sim()
            self._sim.step(render=False)
            self._scene.update(self._seconds)

    def _advance(self, targets: np.ndarray, steps: int) -> None:
        self._simulate(steps)

    def _tick(self) -> None:
        self._simulate(1)

    def _read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        arm = self._arm.data
        dofs = np.stack([_array(arm.joint_pos), _array(arm.joint_vel)], axis=-1)[:, self._order]
        roots = self._roots[:, : len(self.movable)].copy()
        for row, (body, thing) in enumerate(zip(self.movable, self._things, strict=True)):
            if body.role == "free":
                data = thing.data
                roots[:, row, :3] = _array(data.root_pos_w - self._scene.env_origins)
                roots[:, row, 3:7] = _array(data.root_quat_w)
                roots[:, row, 7:10] = _array(data.root_lin_vel_w)
                roots[:, row, 10:] = _array(data.root_ang_vel_w)
        forces = _array(self._scene["touch"].data.net_forces_w)
        return dofs, roots, (np.linalg.norm(forces, axis=-1) > PRESSING).any(axis=-1)

    def _set_physics(self, ids: np.ndarray, draws: list[dict[str, Any]]) -> None:
        self._refuse(draws, ("friction", "mass", "servo"))

    def _set_looks(self, ids: np.ndarray, draws: list[dict[str, Any]]) -> None:
        self._refuse(draws, ("light", "lamp", "cameras", "colours"))

    def _render(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        self._sim.render()
        images = {}
        for name in self.cameras:
            camera = self._scene[name]
            camera.update(0.0, force_recompute=True)
            images[name] = camera.data.output["rgb"][..., :3].cpu().numpy()[ids]
        return images

    def close(self) -> None:
        """See the contract. Isaac Sim ends the process with its app."""
        self._folder.cleanup()
        self._app.close()


def _array(tensor: Any) -> np.ndarray:
    return tensor.cpu().numpy().astype(float)


def scene_settings(
    scene: dict[str, Any], bodies: list[Body], folder: str, count: int, image_size: int
) -> Any:
    """An `InteractiveSceneCfg`: arm, bodies, touch sensor, cameras and light, with URDF files in `folder`."""
    import isaaclab.sim as sim_utils
    from isaaclab.assets import AssetBaseCfg
    from isaaclab.scene import InteractiveSceneCfg
    from isaaclab.sensors import ContactSensorCfg, TiledCameraCfg

    settings = InteractiveSceneCfg(num_envs=count, env_spacing=SPACING)
    # Entities are made in the order in which they are set.
    settings.arm = _arm_settings(scene["arm"], folder)
    for body in bodies:
        setattr(settings, body.name, _body_settings(body, folder))
    settings.touch = ContactSensorCfg(
        prim_path=f"{ENVIRONMENT}/arm/({'|'.join((HAND, *FINGERS))})", update_period=0.0
    )
    for name, camera in scene["cameras"].items():
        mount = f"arm/{camera['body']}/" if camera["body"] else ""
        aperture = 2 * FOCAL_LENGTH * math.tan(camera["fovy"] / 2)  # the images are square
        lens = sim_utils.PinholeCameraCfg(
            focal_length=FOCAL_LENGTH, horizontal_aperture=aperture, clipping_range=(NEAR, FAR)
        )
        place = TiledCameraCfg.OffsetCfg(
            pos=tuple(camera["position"]), rot=tuple(camera["quaternion"]), convention="opengl"
        )
        eye = TiledCameraCfg(
            prim_path=f"{ENVIRONMENT}/{mount}{name}",
            offset=place,
            spawn=lens,
            width=image_size,
            height=image_size,
            data_types=["rgb"],
            update_period=0.0,
        )
        setattr(settings, name, eye)
    light = scene["light"]
    settings.lamp = AssetBaseCfg(
        prim_path="/World/lamp",
        spawn=sim_utils.DistantLightCfg(intensity=LAMP * light["diffuse"][0]),
        init_state=AssetBaseCfg.InitialStateCfg(rot=_looking(light["direction"])),
    )
    settings.sky = AssetBaseCfg(
        prim_path="/World/sky", spawn=sim_utils.DomeLightCfg(intensity=SKY * light["ambient"][0])
    )
    return settings


def _looking(direction: Sequence[float]) -> tuple[float, ...]:
    """The quaternion, w first, that turns -z, the way that a distant light shines, into `direction`."""
    back = -np.asarray(direction, float) / np.linalg.norm(direction)
    right = np.cross([0.0, 1.0, 0.0], back)
    right /= np.linalg.norm(right)
    return tuple(quaternion(np.stack([right, np.cross(back, right), back], axis=1)).tolist())


def _written(folder: str, name: str, urdf: str) -> str:
    path = os.path.join(folder, name + ".urdf")
    with open(path, "w") as stream:
        stream.write(urdf)
    return path


def _arm_settings(arm: dict[str, Any], folder: str) -> Any:
    import isaaclab.sim as sim_utils
    from isaaclab.actuators import ImplicitActuatorCfg
    from isaaclab.assets import ArticulationCfg

    servos = {body["joint"]["name"]: body["joint"] for body in arm["bodies"] if body["joint"]}
    revolute = [name for name, servo in servos.items() if servo["kind"] == "revolute"]
    start = dict(zip(revolute, arm["home"], strict=True))
    start.update({name: arm["open"] for name in servos if name not in start})
    drive = sim_utils.UrdfConverterCfg.JointDriveCfg(
        # The servos' own numbers come with the actuators below.
        gains=sim_utils.UrdfConverterCfg.JointDriveCfg.PDGainsCfg(stiffness=0.0, damping=0.0)
    )
    return ArticulationCfg(
        prim_path=f"{ENVIRONMENT}/arm",
        spawn=sim_utils.UrdfFileCfg(
            asset_path=_written(folder, "arm", arm_urdf(arm)),
            usd_dir=os.path.join(folder, "arm"),
            fix_base=True,
            merge_fixed_joints=False,
            joint_drive=drive,
            self_collision=False,
            activate_contact_sensors=True,
            rigid_props=sim_utils.RigidBodyPropertiesCfg(disable_gravity=True),
            collision_props=sim_utils.CollisionPropertiesCfg(contact_offset=0.002, rest_offset=0.0),
        ),
        init_state=ArticulationCfg.InitialStateCfg(joint_pos=start),
        actuators={
            "servos": ImplicitActuatorCfg(
                joint_names_expr=list(servos),
                effort_limit_sim={name: servo["effort"] for name, servo in servos.items()},
                stiffness={name: servo["stiffness"] for name, servo in servos.items()},
                damping={n: servo["damping"] + servo["drag"] for n, servo in servos.items()},
                armature={name: servo["armature"] for name, servo in servos.items()},
            )
        },
    )


def _body_settings(body: Body, folder: str) -> Any:
    import isaaclab.sim as sim_utils
    from isaaclab.assets import RigidObjectCfg

    free = body.role == "free"
    return RigidObjectCfg(
        prim_path=f"{ENVIRONMENT}/{body.name}",
        spawn=sim_utils.UrdfFileCfg(
            asset_path=_written(folder, body.name, body_urdf(body)),
            usd_dir=os.path.join(folder, body.name),
            fix_base=False,
            joint_drive=None,
            # The converter makes an articulation of every URDF; this is to be a rigid body.
            articulation_props=sim_utils.ArticulationRootPropertiesCfg(articulation_enabled=False),
            rigid_props=sim_utils.RigidBodyPropertiesCfg(
                kinematic_enabled=not free,
                disable_gravity=not free,
                max_depenetration_velocity=1.0,
            ),
            mass_props=None if free else sim_utils.MassPropertiesCfg(mass=1.0),
            collision_props=sim_utils.CollisionPropertiesCfg(contact_offset=0.002, rest_offset=0.0),
        ),
        init_state=RigidObjectCfg.InitialStateCfg(
            pos=(0.0 if body.role == "table" else 2.0, 0.0, 0.0)
        ),
    )
