# ruff: noqa: RUF012
"""The scene of all environments."""

import os
import re
import sys

import numpy as np
import torch

import isaaclab
from isaaclab.assets import (
    Articulation,
    ArticulationCfg,
    AssetBaseCfg,
    Data,
    RigidObject,
    RigidObjectCfg,
)
from isaaclab.sensors import ContactSensorCfg, TiledCameraCfg
from isaaclab.settings import MISSING, Settings
from isaaclab.sim import DistantLightCfg, DomeLightCfg, SimulationContext

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from toy import Thing, Toy


class InteractiveSceneCfg(Settings):
    FIELDS = {"num_envs": MISSING, "env_spacing": MISSING}


class Sensor:
    def __init__(self, cfg, scene):
        self.cfg, self._scene, self.data = cfg, scene, Data()

    def update(self, dt, force_recompute=False):
        assert dt == 0.0 and force_recompute and self._scene.drawn is not None, "render comes first"
        self.data.output = {"rgb": self._scene.drawn[self.cfg.prim_path]}


class InteractiveScene:
    def __init__(self, cfg):
        assert isinstance(cfg, InteractiveSceneCfg) and SimulationContext.current is not None
        self.num_envs, self._entities, self.written, self.drawn = cfg.num_envs, {}, True, None
        self.env_origins = torch.zeros((cfg.num_envs, 3))
        self.env_origins[:, 0] = torch.arange(cfg.num_envs) * cfg.env_spacing
        SimulationContext.current.scene = self
        for name, entity in vars(cfg).items():
            if name not in InteractiveSceneCfg.FIELDS:
                self._entities[name] = self._make(name, entity)

    def _make(self, name, cfg):
        cfg.prim_path = cfg.prim_path.format(ENV_REGEX_NS="/World/envs/env_.*")
        path = cfg.prim_path.rpartition("/env_.*/")[2]
        if isinstance(cfg, ArticulationCfg):
            return Articulation(cfg, self)
        if isinstance(cfg, RigidObjectCfg):
            return RigidObject(name, cfg, self)
        arm = self._entities["arm"].urdf
        links = [f"arm/{link.name}" for link in arm.links]
        if isinstance(cfg, ContactSensorCfg):
            assert self._entities["arm"].cfg.spawn.activate_contact_sensors
            self.pressed = [link for link in links if re.fullmatch(path, link)]
            assert self.pressed, f"{path} names none of {links}"
            return Sensor(cfg, self)
        if isinstance(cfg, TiledCameraCfg):
            assert (
                isaaclab.CAMERAS and cfg.offset.convention == "opengl" and cfg.data_types == ["rgb"]
            )
            mount = path.rpartition("/")[0]
            assert not mount or mount in links, f"{mount} is none of {links}"
            return Sensor(cfg, self)
        assert isinstance(cfg, AssetBaseCfg) and isinstance(
            cfg.spawn, (DistantLightCfg, DomeLightCfg)
        )
        return cfg

    def __getitem__(self, name):
        return self._entities[name]

    def _of(self, kind):
        return [entity for entity in self._entities.values() if isinstance(entity, kind)]

    def start(self):
        arm, self._things = self._entities["arm"], self._of(RigidObject)
        things = [Thing(t.name, t.fixed, t.link.collisions) for t in self._things]
        self.toy = Toy(self.num_envs, arm.urdf, things)
        for k, thing in enumerate(self._things):
            self.toy.roots[:, k, :3] = thing.cfg.init_state.pos
        self.order = [self.toy.names.index(name) for name in arm.joint_names]
        self.frames = self.toy.frames()

    def roots(self, thing):
        return self.toy.roots[:, self._things.index(thing)]

    def write_data_to_sim(self):
        self.written = True

    def advance(self, seconds):
        assert self.written, "targets were set and not written"
        target = np.empty((self.num_envs, len(self.order)))
        target[:, self.order] = self._entities["arm"].target
        self.toy.advance(target, seconds)
        self.frames = self.toy.frames()

    def update(self, dt):
        assert dt == SimulationContext.current.cfg.dt
        arm, toy = self._entities["arm"].data, self.toy
        arm.joint_pos = torch.as_tensor(toy.q[:, self.order], dtype=torch.float32)
        arm.joint_vel = torch.as_tensor(toy.qd[:, self.order], dtype=torch.float32)
        for thing in self._things:
            row = torch.as_tensor(self.roots(thing).copy(), dtype=torch.float32)
            data = thing.data
            data.root_pos_w, data.root_quat_w = row[:, :3] + self.env_origins, row[:, 3:7]
            data.root_lin_vel_w, data.root_ang_vel_w = row[:, 7:10], row[:, 10:]
        forces = torch.zeros((self.num_envs, len(self.pressed), 3))
        for i, link in enumerate(self.pressed):
            if "finger" in link:
                forces[:, i, 1] = torch.as_tensor(toy.squeeze, dtype=torch.float32)
        self._entities["touch"].data.net_forces_w = forces

    def draw(self):
        hand, last = self.frames["hand"][:, :3, 3], self.roots(self._things[-1])
        values = np.clip(128 + 100 * np.stack([hand[:, 0], last[:, 0], last[:, 2]], 1), 0, 255)
        self.drawn = {}
        for sensor in self._of(Sensor):
            if isinstance(sensor.cfg, TiledCameraCfg):
                size = self.num_envs, sensor.cfg.height, sensor.cfg.width, 3
                pixels = np.broadcast_to(values[:, None, None], size).astype(np.uint8)
                self.drawn[sensor.cfg.prim_path] = torch.as_tensor(pixels)
