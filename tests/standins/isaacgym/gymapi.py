# ruff: noqa: RUF012
"""The calls of `isaacgym.gymapi` that `twins.backends.isaac_gym` makes, with the names and defaults of Preview 4."""

from __future__ import annotations

import math
import os
import sys
import weakref
from enum import Enum

import numpy as np
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from toy import Thing, Toy, parse_urdf

HISTORY = []  # names of the calls on any Gym, newest last


class SimType(Enum):
    SIM_PHYSX = 0
    SIM_FLEX = 1


class UpAxis(Enum):
    UP_AXIS_Y = 0
    UP_AXIS_Z = 1


class ContactCollection(Enum):
    CC_NEVER = 0
    CC_LAST_SUBSTEP = 1
    CC_ALL_SUBSTEPS = 2


class DofDriveMode(int, Enum):
    DOF_MODE_NONE = 0
    DOF_MODE_POS = 1
    DOF_MODE_VEL = 2
    DOF_MODE_EFFORT = 3


class IndexDomain(Enum):
    DOMAIN_ACTOR = 0
    DOMAIN_ENV = 1
    DOMAIN_SIM = 2


class ImageType(Enum):
    IMAGE_COLOR = 0
    IMAGE_DEPTH = 1


class CameraFollowMode(Enum):
    FOLLOW_POSITION = 0
    FOLLOW_TRANSFORM = 1


class MeshType(Enum):
    MESH_NONE = 0
    MESH_COLLISION = 1
    MESH_VISUAL = 2
    MESH_VISUAL_AND_COLLISION = 3


SIM_PHYSX, UP_AXIS_Z = SimType.SIM_PHYSX, UpAxis.UP_AXIS_Z
CC_LAST_SUBSTEP, DOF_MODE_POS = ContactCollection.CC_LAST_SUBSTEP, DofDriveMode.DOF_MODE_POS
DOMAIN_ENV, DOMAIN_SIM = IndexDomain.DOMAIN_ENV, IndexDomain.DOMAIN_SIM
IMAGE_COLOR, MESH_VISUAL = ImageType.IMAGE_COLOR, MeshType.MESH_VISUAL
FOLLOW_TRANSFORM = CameraFollowMode.FOLLOW_TRANSFORM


class Struct:
    """A structure with typed fields: an unknown name or a wrong type is an error, as in the compiled module."""

    FIELDS = {}

    def __init__(self):
        for name, value in self.FIELDS.items():
            object.__setattr__(self, name, value() if isinstance(value, type) else value)

    def __setattr__(self, name, value):
        if name not in self.FIELDS:
            raise AttributeError(f"{type(self).__name__} has no property {name!r}")
        have = getattr(self, name)
        wanted = type(have)
        if wanted is float and type(value) in (int, float):
            value = float(value)
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            raise TypeError(f"{type(self).__name__}.{name} takes {wanted.__name__}, not {value!r}")
        object.__setattr__(self, name, value)


class Vec3(Struct):
    FIELDS = {"x": 0.0, "y": 0.0, "z": 0.0}

    def __init__(self, x=0.0, y=0.0, z=0.0):
        super().__init__()
        self.x, self.y, self.z = x, y, z

    def numbers(self):
        assert all(math.isfinite(v) for v in (self.x, self.y, self.z))
        return [self.x, self.y, self.z]


class Quat(Struct):
    FIELDS = {"x": 0.0, "y": 0.0, "z": 0.0, "w": 1.0}

    def __init__(self, x=0.0, y=0.0, z=0.0, w=1.0):
        super().__init__()
        self.x, self.y, self.z, self.w = x, y, z, w

    def numbers(self):
        values = [self.x, self.y, self.z, self.w]
        assert abs(np.linalg.norm(values) - 1) < 1e-3, f"quaternion {values} is not of length 1"
        return values


class Transform(Struct):
    FIELDS = {"p": Vec3, "r": Quat}

    def __init__(self, p=None, r=None):
        super().__init__()
        if p is not None:
            self.p = p
        if r is not None:
            self.r = r

    def numbers(self):
        return [*self.p.numbers(), *self.r.numbers()]


class Mat33(Struct):
    FIELDS = {"x": Vec3, "y": Vec3, "z": Vec3}


class PhysXParams(Struct):
    FIELDS = {
        "use_gpu": False,
        "solver_type": 1,
        "num_position_iterations": 4,
        "num_velocity_iterations": 1,
        "contact_offset": 0.02,
        "rest_offset": 0.0,
        "bounce_threshold_velocity": 0.2,
        "max_depenetration_velocity": 100.0,
        "friction_offset_threshold": 0.04,
        "friction_correlation_distance": 0.025,
        "contact_collection": ContactCollection.CC_ALL_SUBSTEPS,
        "max_gpu_contact_pairs": 1024 * 1024,
    }


class SimParams(Struct):
    FIELDS = {
        "dt": 1 / 60,
        "substeps": 2,
        "up_axis": UpAxis.UP_AXIS_Y,
        "gravity": Vec3,
        "use_gpu_pipeline": False,
        "physx": PhysXParams,
    }


class AssetOptions(Struct):
    FIELDS = {
        "fix_base_link": False,
        "disable_gravity": False,
        "collapse_fixed_joints": False,
        "thickness": 0.02,
        "armature": 0.0,
        "linear_damping": 0.0,
        "angular_damping": 0.5,
        "use_physx_armature": True,
        "default_dof_drive_mode": 0,
    }


class CameraProperties(Struct):
    FIELDS = {
        "width": 1600,
        "height": 900,
        "horizontal_fov": 90.0,
        "near_plane": 0.001,
        "far_plane": 2e6,
        "enable_tensors": False,
    }


class RigidShapeProperties(Struct):
    FIELDS = {"friction": 1.0, "restitution": 0.0, "filter": 0}


class RigidBodyProperties(Struct):
    FIELDS = {
        "mass": 0.0,
        "invMass": 0.0,
        "com": Vec3,
        "inertia": Mat33,
        "invInertia": Mat33,
        "flags": 0,
    }


class IndexRange(Struct):
    FIELDS = {"start": 0, "count": 0}


class Tensor:
    """A handle of memory; for arguments it does not keep the memory alive, as the real one does not."""

    def __init__(self, tensor, dtype, own=False):
        self.kept = tensor if own else None
        self.reference, self.dtype, self.shape = weakref.ref(tensor), dtype, tuple(tensor.shape)

    @property
    def torch(self):
        return self.reference()


class Asset:
    def __init__(self, urdf, options):
        self.urdf, self.options = urdf, options
        order = sorted(joint.name for joint in urdf.moving)  # not the file's order
        self.dofs = order


class Actor:
    def __init__(self, asset, name, index):
        self.asset, self.name, self.index = asset, name, index
        self.colours, self.friction, self.filter, self.mass = {}, [], [], {}


class Env:
    def __init__(self, number):
        self.number, self.actors, self.cameras = number, [], []


class Camera:
    def __init__(self, properties):
        self.properties, self.pose, self.body = properties, None, None
        size = properties.height, properties.width, 4
        self.drawn = torch.zeros(size, dtype=torch.uint8)
        self.tensor = torch.zeros(size, dtype=torch.uint8)


class Sim:
    def __init__(self, graphics, params):
        self.graphics, self.params = graphics, params
        self.envs, self.prepared, self.open = [], False, True
        self.pending, self.light = {}, None
        self.fetched = self.stepped = self.rendered = self.accessed = False


def acquire_gym():
    return Gym()


DOF_DTYPE = np.dtype(
    [
        ("hasLimits", "?"),
        ("lower", "<f4"),
        ("upper", "<f4"),
        ("driveMode", "<i4"),
        ("velocity", "<f4"),
        ("effort", "<f4"),
        ("stiffness", "<f4"),
        ("damping", "<f4"),
        ("friction", "<f4"),
        ("armature", "<f4"),
    ]
)


def check(value, kind, what):
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{what} takes {kind.__name__}, not {type(value).__name__}")
    return value


class Gym:
    """Methods of `gymapi.Gym`, positional as there."""

    def __getattribute__(self, name):
        if not name.startswith("_"):
            HISTORY.append(name)
        return object.__getattribute__(self, name)

    # -- making ----------------------------------------------------------------------------------------------

    def create_sim(self, compute_device=0, graphics_device=0, type=SimType.SIM_FLEX, params=None):
        check(compute_device, int, "compute_device")
        check(graphics_device, int, "graphics_device")
        assert type is SIM_PHYSX and isinstance(params, SimParams), (type, params)
        assert not params.use_gpu_pipeline or params.physx.use_gpu, (
            "the GPU pipeline needs GPU PhysX"
        )
        assert params.up_axis is UP_AXIS_Z and params.gravity.numbers() == [0.0, 0.0, -9.81]
        assert 0 < params.dt < 0.05 and params.substeps >= 1
        assert params.physx.solver_type in (0, 1) and params.physx.num_position_iterations <= 255
        return Sim(graphics_device, params)

    def load_asset(self, sim, rootpath, filename, options=None):
        self._making(sim)
        check(rootpath, str, "rootpath")
        check(filename, str, "filename")
        assert isinstance(options, AssetOptions), options
        assert filename.endswith(".urdf"), filename
        with open(os.path.join(rootpath, filename)) as file:
            return Asset(parse_urdf(file.read()), options)

    def get_asset_dof_names(self, asset):
        return list(check(asset, Asset, "asset").dofs)

    def create_env(self, sim, lower, upper, per_row):
        self._making(sim)
        assert isinstance(lower, Vec3) and isinstance(upper, Vec3), (lower, upper)
        assert lower.x < upper.x and lower.y < upper.y and check(per_row, int, "per_row") > 0
        sim.envs.append(Env(len(sim.envs)))
        sim.envs[-1].sim = sim
        return sim.envs[-1]

    def create_actor(self, env, asset, pose, name=None, group=-1, filter=-1, segmentationId=0):
        self._making(check(env, Env, "env").sim)
        assert env is env.sim.envs[-1], (
            "actors of an environment are made before the next environment"
        )
        check(asset, Asset, "asset"), check(pose, Transform, "pose"), check(name, str, "name")
        for number in (group, filter, segmentationId):
            check(number, int, "a group, filter or segmentation")
        pose.numbers()
        index = sum(len(other.actors) for other in env.sim.envs)
        actor = Actor(asset, name, index)
        actor.start = pose.numbers()
        shapes = sum(len(link.collisions) for link in asset.urdf.links)
        actor.friction, actor.filter = [1.0] * shapes, [0] * shapes
        env.actors.append(actor)
        return len(env.actors) - 1

    def create_camera_sensor(self, env, properties):
        self._making(check(env, Env, "env").sim)
        assert env.sim.graphics >= 0, "cameras need a graphics device"
        assert isinstance(properties, CameraProperties), properties
        assert 0 < properties.horizontal_fov < 180 and properties.near_plane < properties.far_plane
        assert not properties.enable_tensors or env.sim.params.use_gpu_pipeline
        env.cameras.append(Camera(properties))
        return len(env.cameras) - 1

    def prepare_sim(self, sim):
        self._making(sim)
        envs = sim.envs
        assert envs and all(len(env.actors) == len(envs[0].actors) for env in envs)
        arms = [actor for actor in envs[0].actors if actor.asset.dofs]
        assert len(arms) == 1, "the toy world has one actor with joints"
        self._arm = envs[0].actors.index(arms[0])
        assert arms[0].asset.options.fix_base_link and arms[0].asset.options.disable_gravity
        things = [
            Thing(
                actor.name, actor.asset.options.fix_base_link, actor.asset.urdf.links[0].collisions
            )
            for actor in envs[0].actors
        ]
        sim.toy = Toy(len(envs), arms[0].asset.urdf, things)
        for env in envs:
            for k, actor in enumerate(env.actors):
                p = actor.start
                sim.toy.roots[env.number, k, :7] = [*p[:3], p[6], *p[3:6]]
        # Where the asset's joints are in the toy's.
        sim.order = [sim.toy.names.index(name) for name in arms[0].asset.dofs]
        count, actors, dofs = len(envs), len(envs[0].actors), len(sim.order)
        sim.links = [(k, link) for k, a in enumerate(envs[0].actors) for link in a.asset.urdf.links]
        sim.root = torch.zeros((count * actors, 13))
        sim.dof = torch.zeros((count * dofs, 2))
        sim.force = torch.zeros((count * len(sim.links), 3))
        sim.target = np.zeros((count, dofs))
        sim.frames = sim.toy.frames()
        sim.prepared = True
        self._give_states(sim)
        return True

    def destroy_sim(self, sim):
        self._alive(sim)
        sim.open = False

    # -- handles and properties ------------------------------------------------------------------------------

    def get_actor_index(self, env, actor, domain):
        assert isinstance(domain, IndexDomain), domain
        return self._actor(env, actor).index if domain is DOMAIN_SIM else actor

    def find_actor_rigid_body_index(self, env, actor, name, domain):
        assert domain is DOMAIN_ENV, domain
        before = sum(len(a.asset.urdf.links) for a in env.actors[:actor])
        return before + self.get_actor_rigid_body_names(env, actor).index(check(name, str, "name"))

    def find_actor_rigid_body_handle(self, env, actor, name):
        return self.find_actor_rigid_body_index(env, actor, name, DOMAIN_ENV)

    def get_actor_rigid_body_names(self, env, actor):
        return [link.name for link in self._actor(env, actor).asset.urdf.links]

    def get_actor_rigid_body_shape_indices(self, env, actor):
        ranges, start = [], 0
        for link in self._actor(env, actor).asset.urdf.links:
            place = IndexRange()
            place.start, place.count = start, len(link.collisions)
            start += place.count
            ranges.append(place)
        return ranges

    def get_actor_rigid_shape_properties(self, env, actor):
        mine, result = self._actor(env, actor), []
        for friction, bits in zip(mine.friction, mine.filter, strict=True):
            result.append(RigidShapeProperties())
            result[-1].friction, result[-1].filter = friction, bits
        return result

    def set_actor_rigid_shape_properties(self, env, actor, properties):
        mine = self._actor(env, actor)
        assert isinstance(properties, list) and len(properties) == len(mine.friction), properties
        assert all(isinstance(p, RigidShapeProperties) and p.friction >= 0 for p in properties)
        mine.friction = [p.friction for p in properties]
        mine.filter = [p.filter for p in properties]
        return True

    def get_actor_rigid_body_properties(self, env, actor):
        result = []
        for link in self._actor(env, actor).asset.urdf.links:
            properties = RigidBodyProperties()
            properties.mass = float(link.mass)
            result.append(properties)
        return result

    def set_actor_rigid_body_properties(self, env, actor, properties, recomputeInertia=False):
        mine = self._actor(env, actor)
        links = mine.asset.urdf.links
        assert isinstance(properties, list) and len(properties) == len(links), properties
        for link, p in zip(links, properties, strict=True):
            assert isinstance(p, RigidBodyProperties) and p.mass > 0, p
            assert abs(p.mass * p.invMass - 1) < 1e-6, (p.mass, p.invMass)
            inertia, inverse = (
                np.array([m.x.numbers(), m.y.numbers(), m.z.numbers()])
                for m in (p.inertia, p.invInertia)
            )
            assert np.allclose(inertia @ inverse, np.eye(3), atol=1e-6)
            assert np.allclose(inertia, link.inertia * (p.mass / link.mass), rtol=1e-5)
            assert p.com.numbers() == [0.0, 0.0, 0.0], "the GPU pipeline can't change it"
            mine.mass[link.name] = p.mass
        return True

    def get_actor_dof_properties(self, env, actor):
        asset = self._actor(env, actor).asset
        properties = np.zeros(len(asset.dofs), DOF_DTYPE)
        for row, name in enumerate(asset.dofs):
            joint = next(j for j in asset.urdf.joints if j.name == name)
            properties["lower"][row], properties["upper"][row] = joint.limits
            properties["hasLimits"][row] = True
        return properties

    def set_actor_dof_properties(self, env, actor, properties):
        mine = self._actor(env, actor)
        assert properties.dtype == DOF_DTYPE and properties.shape == (len(mine.asset.dofs),)
        assert (properties["driveMode"] == int(DOF_MODE_POS)).all(), properties["driveMode"]
        for name in ("stiffness", "damping", "effort"):
            assert (properties[name] > 0).all(), (name, properties[name])
        mine.servos = properties.copy()
        return True

    def set_rigid_body_color(self, env, actor, body, mesh, colour):
        mine = self._actor(env, actor)
        assert 0 <= check(body, int, "body") < len(mine.asset.urdf.links), body
        assert mesh is MESH_VISUAL and all(0 <= v <= 1 for v in colour.numbers()), (mesh, colour)
        mine.colours[body] = colour.numbers()

    def set_light_parameters(self, sim, index, intensity, ambient, direction):
        self._alive(sim)
        assert 0 <= check(index, int, "index") < 4, index
        for colour in (intensity, ambient):
            assert all(0 <= v <= 1 for v in check(colour, Vec3, "a light").numbers()), (
                colour.numbers()
            )
        assert any(check(direction, Vec3, "a direction").numbers())
        sim.light = intensity.numbers()

    def set_camera_transform(self, camera, env, pose):
        mine = self._camera(env, camera)
        mine.pose, mine.body = check(pose, Transform, "pose").numbers(), None

    def attach_camera_to_body(self, camera, env, body, pose, mode):
        mine = self._camera(env, camera)
        links = [link for a in env.actors for link in a.asset.urdf.links]
        assert mode is FOLLOW_TRANSFORM and 0 <= check(body, int, "body") < len(links), (mode, body)
        mine.pose, mine.body = check(pose, Transform, "pose").numbers(), links[body].name

    # -- states ----------------------------------------------------------------------------------------------

    def acquire_actor_root_state_tensor(self, sim):
        return Tensor(self._ready(sim).root, "float32", own=True)

    def acquire_dof_state_tensor(self, sim):
        return Tensor(self._ready(sim).dof, "float32", own=True)

    def acquire_net_contact_force_tensor(self, sim):
        return Tensor(self._ready(sim).force, "float32", own=True)

    def refresh_actor_root_state_tensor(self, sim):
        toy = self._ready(sim).toy
        r = toy.roots
        ordered = np.concatenate([r[..., :3], r[..., 4:7], r[..., 3:4], r[..., 7:]], axis=-1)
        sim.root.copy_(torch.as_tensor(ordered.reshape(-1, 13)))
        return True

    def refresh_dof_state_tensor(self, sim):
        toy = self._ready(sim).toy
        both = np.stack([toy.q[:, sim.order], toy.qd[:, sim.order]], axis=-1)
        sim.dof.copy_(torch.as_tensor(both.reshape(-1, 2)))
        return True

    def refresh_net_contact_force_tensor(self, sim):
        toy, force = self._ready(sim).toy, np.zeros((len(sim.envs), len(sim.links), 3))
        for k, (_, link) in enumerate(sim.links):
            if link.name.startswith("finger"):
                force[:, k, 1] = toy.squeeze
        sim.force.copy_(torch.as_tensor(force.reshape(-1, 3)))
        return True

    def set_actor_root_state_tensor_indexed(self, sim, states, indices, count):
        self._ready(sim)
        ids = self._indices(sim, "root", states, (len(sim.root), 13), indices, count)
        marks = [a.index for env in sim.envs for a in env.actors]
        assert set(ids) <= set(marks), ids
        return True

    def set_dof_state_tensor_indexed(self, sim, states, indices, count):
        self._ready(sim)
        ids = self._indices(sim, "dof", states, (len(sim.dof), 2), indices, count)
        arms = [env.actors[self._arm].index for env in sim.envs]
        assert set(ids) <= set(arms), f"actors {set(ids) - set(arms)} have no joints"
        return True

    def set_dof_position_target_tensor(self, sim, targets):
        self._ready(sim)
        values = self._values(targets, "float32")
        assert values.numel() == len(sim.dof), (values.shape, len(sim.dof))
        sim.target = values.reshape(len(sim.envs), -1).numpy().astype(float)
        return True

    def simulate(self, sim):
        self._ready(sim)
        assert not sim.accessed, "image tensors are still being accessed"
        self._take_states(sim)
        target = np.empty_like(sim.target)
        target[:, sim.order] = sim.target
        sim.toy.advance(target, sim.params.dt)
        sim.frames = sim.toy.frames()  # links follow joints only here
        sim.fetched = sim.stepped = sim.rendered = False
        if not sim.params.use_gpu_pipeline:
            sim.unfetched = True

    def fetch_results(self, sim, wait):
        self._ready(sim)
        assert wait is True, wait
        sim.fetched = True

    # -- images ----------------------------------------------------------------------------------------------

    def step_graphics(self, sim):
        assert self._ready(sim).fetched, "graphics follow what fetch_results has fetched"
        sim.stepped = True

    def render_all_camera_sensors(self, sim):
        assert self._ready(sim).stepped, "step_graphics comes first"
        for env in sim.envs:
            for camera in env.cameras:
                assert camera.pose is not None, "a camera without a pose"
                camera.drawn[...] = self._picture(sim, env, camera)
        sim.rendered = True

    def get_camera_image_gpu_tensor(self, sim, env, camera, kind):
        mine = self._camera(env, camera)
        assert mine.properties.enable_tensors and kind is IMAGE_COLOR
        return Tensor(mine.tensor, "uint8", own=True)

    def get_camera_image(self, sim, env, camera, kind):
        assert sim.rendered and kind is IMAGE_COLOR, "render_all_camera_sensors comes first"
        drawn = self._camera(env, camera).drawn
        return drawn.reshape(drawn.shape[0], -1).numpy().copy()

    def start_access_image_tensors(self, sim):
        assert self._ready(sim).rendered and not sim.accessed
        sim.accessed = True
        for env in sim.envs:
            for camera in env.cameras:
                camera.tensor.copy_(camera.drawn)

    def end_access_image_tensors(self, sim):
        assert sim.accessed, "nothing is being accessed"
        sim.accessed = False
        for env in sim.envs:
            for camera in env.cameras:
                camera.tensor.zero_()

    # -- inside ----------------------------------------------------------------------------------------------

    def _alive(self, sim):
        assert isinstance(sim, Sim) and sim.open, "no simulation, or a destroyed one"
        return sim

    def _making(self, sim):
        assert not self._alive(sim).prepared, "the simulation is prepared already"

    def _ready(self, sim):
        assert self._alive(sim).prepared, "prepare_sim comes first"
        return sim

    def _actor(self, env, actor):
        self._alive(check(env, Env, "env").sim)
        return env.actors[check(actor, int, "an actor's handle")]

    def _camera(self, env, camera):
        self._alive(check(env, Env, "env").sim)
        return env.cameras[check(camera, int, "a camera's handle")]

    def _values(self, tensor, dtype):
        assert isinstance(tensor, Tensor), f"{type(tensor)}: unwrap it with gymtorch"
        assert tensor.dtype == dtype, f"{tensor.dtype}, must be {dtype}"
        assert tensor.torch is not None, "a tensor that is no longer alive"
        return tensor.torch

    def _indices(self, sim, name, states, shape, indices, count):
        assert name not in sim.pending, f"{name} states were set twice before simulate: one is lost"
        values, ids = self._values(states, "float32"), self._values(indices, "int32")
        assert values.numel() == math.prod(shape), (values.shape, shape)
        assert ids.ndim == 1 and count == len(ids) > 0, (ids.shape, count)
        assert len(set(ids.tolist())) == len(ids), "an actor is named twice"
        sim.pending[name] = states, indices
        return ids.tolist()

    def _take_states(self, sim):
        """Apply what was set, from the tensors as they are now."""
        actors, toy = len(sim.envs[0].actors), sim.toy
        touched = set()
        for name, (states, indices) in sim.pending.items():
            values = self._values(states, "float32").reshape(
                len(sim.root if name == "root" else sim.dof), -1
            )
            ids = self._values(indices, "int32").tolist()
            for index in ids:
                world, k = divmod(index, actors)
                touched.add(world)
                if name == "root":
                    row = values[index].numpy().astype(float)
                    assert np.isfinite(row).all(), (
                        "PhysX does not survive numbers that are not finite"
                    )
                    assert abs(np.linalg.norm(row[3:7]) - 1) < 1e-3, row[3:7]
                    toy.roots[world, k] = [*row[:3], row[6], *row[3:6], *row[7:]]
                else:
                    rows = values.reshape(len(sim.envs), -1, 2)[world].numpy().astype(float)
                    assert np.isfinite(rows).all(), rows
                    toy.q[world, sim.order], toy.qd[world, sim.order] = rows[:, 0], rows[:, 1]
        toy.release(sorted(touched))
        sim.pending = {}

    def _give_states(self, sim):
        self.refresh_actor_root_state_tensor(sim)
        self.refresh_dof_state_tensor(sim)

    def _picture(self, sim, env, camera):
        """Not a picture: flat colours that tell hand, last body, its colour, light and camera apart."""
        hand = sim.frames["hand"][env.number, :3, 3]
        last = sim.toy.roots[env.number, -1, :3]
        colour = env.actors[-1].colours.get(0, [0.5] * 3)
        pixels = np.zeros((camera.properties.height, camera.properties.width, 4), np.uint8)
        half = len(pixels) // 2
        pixels[:half, :, :3] = np.clip(128 + 100 * np.array([hand[0], hand[1], last[0]]), 0, 255)
        shade = sum(colour) / 3 * (sim.light or [1.0])[0]
        pixels[half:, :, :3] = np.clip(
            [200 * shade, 128 + 100 * last[2], 128 + 20 * np.sum(camera.pose)], 0, 255
        )
        pixels[..., 3] = 255
        return torch.as_tensor(pixels)
