"""The base class of environments, with a scene whose buffers behave as on a GPU.

Setters write buffers, for the environments of the reset mask; `_gpu_apply_all` hands them to the simulation, and
what that makes of them is in the buffers after `_gpu_fetch_all`.
"""

import os
import sys

import numpy as np
import sapien
import torch

from mani_skill.utils.structs.pose import Pose

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from toy import Thing, Toy, parse_urdf

SIM_CONFIG = {"sim_freq", "control_freq", "scene_config"}
SCENE_CONFIG = {"contact_offset", "solver_position_iterations", "bounce_threshold"}


def _check(tensor, shape):
    assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32, tensor
    assert tuple(tensor.shape) == tuple(shape), (tuple(tensor.shape), tuple(shape))
    assert torch.isfinite(tensor).all(), tensor
    return tensor


class Joint:
    def __init__(self, name, row):
        self.name, self.row, self.drive = name, row, None

    def set_drive_properties(self, stiffness, damping, force_limit=3.4e38, mode="force"):
        assert (
            stiffness > 0 and damping > 0 and force_limit > 0 and mode in ("force", "acceleration")
        )
        self.drive = stiffness, damping, force_limit


class Link:
    def __init__(self, name, scene):
        self.name, self._scene, self.groups, self.disable_gravity = name, scene, {}, False

    def set_collision_group(self, group, value):
        assert not self._scene.ready and group in (0, 1, 2, 3) and 0 <= value < 1 << 32, (
            group,
            value,
        )
        self.groups[group] = value


class Articulation:
    def __init__(self, name, urdf, scene):
        self.name, self.urdf, self._scene = name, urdf, scene
        self.active_joints = [Joint(joint.name, i) for i, joint in enumerate(reversed(urdf.moving))]
        self._links = [Link(link.name, scene) for link in urdf.links]
        shape = scene.num_envs, len(self.active_joints)
        self.qpos, self.qvel, self.target = (torch.zeros(shape) for _ in range(3))

    def get_links(self):
        return self._links

    def find_link_by_name(self, name):
        return next(link for link in self._links if link.name == name)

    def get_qpos(self):
        return self.qpos.clone()

    def get_qvel(self):
        return self.qvel.clone()

    def set_qpos(self, qpos):
        mask = self._scene._reset_mask
        self.qpos[mask] = _check(qpos, (int(mask.sum()), self.qpos.shape[1]))

    def set_qvel(self, qvel):
        mask = self._scene._reset_mask
        self.qvel[mask] = _check(qvel, (int(mask.sum()), self.qpos.shape[1]))

    def set_joint_drive_targets(self, targets, joints=None, joint_indices=None):
        assert joints == self.active_joints and joint_indices is None
        self.target = _check(targets, self.qpos.shape).clone()
        self._scene.targets_applied = False

    def get_net_contact_forces(self, link_names):
        assert set(link_names) <= {link.name for link in self._links}, link_names
        forces = torch.zeros((self._scene.num_envs, len(link_names), 3))
        for i, name in enumerate(link_names):
            if name.startswith("finger"):
                forces[:, i, 1] = torch.as_tensor(self._scene.toy.squeeze, dtype=torch.float32)
        return forces


class Actor:
    def __init__(self, name, kind, link, scene):
        self.name, self.px_body_type, self.link, self._scene = name, kind, link, scene
        self.data = torch.zeros((scene.num_envs, 13))
        self.data[:, 3] = 1.0

    @property
    def pose(self):
        return Pose.create(self.data[:, :7].clone())

    @property
    def linear_velocity(self):
        return self.data[:, 7:10].clone()

    @property
    def angular_velocity(self):
        return self.data[:, 10:].clone()

    def _put(self, columns, values, width):
        assert self._scene.ready and self.px_body_type != "static", self.name
        mask = self._scene._reset_mask
        self.data[mask, columns] = _check(values, (int(mask.sum()), width))

    def set_pose(self, pose):
        assert isinstance(pose, Pose), pose
        self._put(slice(0, 7), pose.raw_pose, 7)

    def set_linear_velocity(self, velocity):
        assert self.px_body_type == "dynamic", "a kinematic body has no velocity"
        self._put(slice(7, 10), velocity, 3)

    def set_angular_velocity(self, velocity):
        assert self.px_body_type == "dynamic", "a kinematic body has no velocity"
        self._put(slice(10, 13), velocity, 3)


class Builder:
    def __init__(self, urdf, loader):
        self._urdf, self._loader, self._scene = urdf, loader, loader.scene
        self.collision_groups, self.initial_pose = [1, 1, 0, 0], None

    def set_initial_pose(self, pose):
        assert isinstance(pose, sapien.Pose), pose
        self.initial_pose = pose
        return self


class ArticulationBuilder(Builder):
    def build(self, name=None, fix_root_link=None):
        assert (
            isinstance(name, str) and self.initial_pose is not None and self._loader.fix_root_link
        )
        self._scene.arm = Articulation(name, self._urdf, self._scene)
        return self._scene.arm


class ActorBuilder(Builder):
    def _build(self, name, kind):
        assert isinstance(name, str) and name not in self._scene.actors, name
        assert self.initial_pose is not None, "an actor without an initial pose"
        actor = Actor(name, kind, self._urdf.links[0], self._scene)
        actor.groups = list(self.collision_groups)
        actor.data[:, :3] = torch.as_tensor(self.initial_pose.p)
        self._scene.actors[name] = actor
        return actor

    def build_dynamic(self, name):
        assert self._urdf.links[0].mass > 0, "a dynamic body has mass"
        return self._build(name, "dynamic")

    def build_kinematic(self, name):
        return self._build(name, "kinematic")


class Loader:
    def __init__(self, scene):
        self.scene, self.name, self.fix_root_link, self._material = scene, None, True, None

    def set_material(self, static_friction, dynamic_friction, restitution):
        assert static_friction >= 0 and dynamic_friction >= 0 and 0 <= restitution <= 1
        self._material = static_friction, dynamic_friction, restitution

    def parse(self, urdf_file, srdf_file=None, package_dir=None):
        with open(urdf_file) as file:
            urdf = parse_urdf(file.read())
        seen = any(link.visuals for link in urdf.links)
        assert not seen or self.scene.renders, "failed to find a rendering device"
        many = len(urdf.links) > 1
        return {
            "articulation_builders": [ArticulationBuilder(urdf, self)] if many else [],
            "actor_builders": [] if many else [ActorBuilder(urdf, self)],
            "cameras": [],
        }


class Physx:
    def __init__(self, scene):
        self._scene = scene

    def gpu_apply_articulation_target_position(self):
        assert self._scene.gpu_sim_enabled
        self._scene.targets_applied = True

    def gpu_update_articulation_kinematics(self):
        assert self._scene.gpu_sim_enabled and self._scene.applied
        self._scene.frames = self._scene.toy.frames()


class Scene:
    def __init__(self, num_envs, gpu, seconds, renders):
        self.num_envs, self.gpu_sim_enabled, self._seconds, self.renders = (
            num_envs,
            gpu,
            seconds,
            renders,
        )
        self.actors, self.arm, self.ready = {}, None, False
        self._reset_mask, self.px = torch.ones(num_envs, dtype=torch.bool), Physx(self)
        self._needs_fetch, self.applied, self.targets_applied = False, False, False
        self.ambient, self.lights = None, []

    def create_urdf_loader(self):
        return Loader(self)

    def set_ambient_light(self, color):
        self.ambient = np.asarray(color, float).reshape(3)

    def add_directional_light(self, direction, color):
        self.lights.append(
            (np.asarray(direction, float).reshape(3), np.asarray(color, float).reshape(3))
        )

    def get_sim_state(self):
        return {}

    def start(self):
        self.names = list(self.actors)
        things = [
            Thing(actor.name, actor.px_body_type != "dynamic", actor.link.collisions)
            for actor in self.actors.values()
        ]
        self.toy = Toy(self.num_envs, self.arm.urdf, things)
        self.order = [self.toy.names.index(joint.name) for joint in self.arm.active_joints]
        self.ready = True
        self._put()
        self.frames = self.toy.frames()

    def _put(self):
        arm, toy = self.arm, self.toy
        toy.q[:, self.order], toy.qd[:, self.order] = arm.qpos.numpy(), arm.qvel.numpy()
        before = toy.roots.copy()
        for k, name in enumerate(self.names):
            toy.roots[:, k] = self.actors[name].data.numpy()
        toy.release(np.flatnonzero(np.abs(before - toy.roots).max(axis=(1, 2)) > 1e-5))

    def _take(self):
        arm, toy = self.arm, self.toy
        arm.qpos = torch.as_tensor(toy.q[:, self.order], dtype=torch.float32)
        arm.qvel = torch.as_tensor(toy.qd[:, self.order], dtype=torch.float32)
        for k, name in enumerate(self.names):
            self.actors[name].data = torch.as_tensor(toy.roots[:, k].copy(), dtype=torch.float32)

    def _gpu_apply_all(self):
        assert self.gpu_sim_enabled and not self._needs_fetch, "fetch before you apply again"
        assert self._reset_mask.all(), "the reset mask was left as it was"
        self._put()
        self._needs_fetch = self.applied = True

    def _gpu_fetch_all(self):
        assert self.gpu_sim_enabled
        self._take()
        self._needs_fetch = False

    def step(self):
        assert not self._needs_fetch or self.gpu_sim_enabled
        if self.gpu_sim_enabled:
            assert self.targets_applied, "targets of joints were never applied"
        else:
            self._put()
        target = np.empty((self.num_envs, len(self.order)))
        target[:, self.order] = self.arm.target.numpy()
        self.toy.advance(target, self._seconds)
        self.frames = self.toy.frames()
        if not self.gpu_sim_enabled:
            self._take()


class BaseEnv:
    """What `mani_skill.envs.sapien_env.BaseEnv` does when it is made, in its order."""

    def __init__(
        self,
        num_envs=1,
        obs_mode=None,
        robot_uids=None,
        sim_config=None,
        sim_backend="auto",
        render_backend="gpu",
    ):
        assert robot_uids in self.SUPPORTED_ROBOTS and obs_mode in ("none", "rgb"), (
            robot_uids,
            obs_mode,
        )
        assert set(sim_config) <= SIM_CONFIG and set(sim_config["scene_config"]) <= SCENE_CONFIG
        assert sim_config["sim_freq"] % sim_config["control_freq"] == 0, sim_config
        if sim_backend == "auto":
            sim_backend = "physx_cuda" if num_envs > 1 else "physx_cpu"
        assert sim_backend in ("physx_cuda", "physx_cpu"), sim_backend
        if sim_backend == "physx_cpu" and num_envs > 1:
            raise RuntimeError(
                "Cannot set the sim backend to 'cpu' and have multiple environments."
            )
        self.num_envs, self.device = num_envs, torch.device("cpu")
        renders = render_backend != "none"
        assert renders or obs_mode == "none"
        gpu = sim_backend == "physx_cuda"
        self.scene = Scene(num_envs, gpu, 1 / sim_config["sim_freq"], renders)
        self._load_scene({})
        if renders:
            self._load_lighting({})
        self.scene.start()
        self._sensors = {c.uid: c for c in self._default_sensor_configs} if renders else {}
        self._initialize_episode(torch.arange(num_envs), {})
        assert self.get_obs() == {} and self.get_state_dict() == {}

    def get_sensor_images(self):
        assert not self.scene._needs_fetch
        hand = self.scene.frames["hand"][:, :3, 3]
        last = list(self.scene.actors.values())[-1].data.numpy()
        images = {}
        for name, camera in self._sensors.items():
            pixels = np.zeros((self.num_envs, camera.height, camera.width, 3), np.uint8)
            values = np.stack([hand[:, 0], last[:, 0], last[:, 2]], axis=1)
            pixels[:] = np.clip(128 + 100 * values, 0, 255)[:, None, None]
            images[name] = {"rgb": torch.as_tensor(pixels)}
        return images

    def close(self):
        self.scene = None
