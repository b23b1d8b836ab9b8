# ruff: noqa: RUF012
"""Articulations and rigid objects; quaternions have w first, velocities are linear then angular."""

import numpy as np
import torch

from isaaclab.settings import MISSING, Settings


class AssetBaseCfg(Settings):
    FIELDS = {"prim_path": MISSING, "spawn": None, "init_state": None}

    class InitialStateCfg(Settings):
        FIELDS = {"pos": (0.0, 0.0, 0.0), "rot": (1.0, 0.0, 0.0, 0.0)}


class RigidObjectCfg(AssetBaseCfg):
    class InitialStateCfg(AssetBaseCfg.InitialStateCfg):
        pass


class ArticulationCfg(AssetBaseCfg):
    FIELDS = {**AssetBaseCfg.FIELDS, "actuators": MISSING}

    class InitialStateCfg(AssetBaseCfg.InitialStateCfg):
        FIELDS = {**AssetBaseCfg.InitialStateCfg.FIELDS, "joint_pos": {".*": 0.0}}


def check(values, shape):
    assert isinstance(values, torch.Tensor) and values.dtype == torch.float32, values
    assert tuple(values.shape) == tuple(shape), (tuple(values.shape), tuple(shape))
    assert torch.isfinite(values).all(), values
    return values.numpy().astype(float)


class Data:
    """What was last updated."""


class Articulation:
    def __init__(self, cfg, scene):
        self.cfg, self._scene, self.data, self.urdf = cfg, scene, Data(), cfg.spawn.urdf
        assert cfg.spawn.fix_base and not cfg.spawn.merge_fixed_joints, "the hand's link is needed"
        assert cfg.spawn.rigid_props.disable_gravity, "the arm would sag"
        self.joint_names = [joint.name for joint in reversed(self.urdf.moving)]
        (actuator,) = cfg.actuators.values()
        assert sorted(actuator.joint_names_expr) == sorted(self.joint_names)
        for table in (
            actuator.effort_limit_sim,
            actuator.stiffness,
            actuator.damping,
            actuator.armature,
        ):
            assert set(table) == set(self.joint_names) and min(table.values()) > 0, table
        limits = {joint.name: joint.limits for joint in self.urdf.moving}
        for name, value in cfg.init_state.joint_pos.items():
            assert limits[name][0] <= value <= limits[name][1], (name, value)
        self.target = None

    def _rows(self, env_ids):
        assert env_ids.dtype == torch.long and env_ids.ndim == 1, env_ids
        return env_ids.numpy()

    def write_joint_state_to_sim(self, position, velocity, joint_ids=None, env_ids=None):
        rows, toy = self._rows(env_ids), self._scene.toy
        shape = len(rows), len(self.joint_names)
        toy.q[np.ix_(rows, self._scene.order)] = check(position, shape)
        toy.qd[np.ix_(rows, self._scene.order)] = check(velocity, shape)
        toy.release(rows)

    def set_joint_position_target(self, target, joint_ids=None, env_ids=None):
        self.target = check(target, (self._scene.num_envs, len(self.joint_names)))
        self._scene.written = False


class RigidObject:
    def __init__(self, name, cfg, scene):
        self.name, self.cfg, self._scene, self.data = name, cfg, scene, Data()
        spawn = cfg.spawn
        assert len(spawn.urdf.links) == 1 and spawn.joint_drive is None, name
        assert spawn.articulation_props.articulation_enabled is False, "found an articulation root"
        self.fixed = spawn.rigid_props.kinematic_enabled
        assert spawn.urdf.links[0].mass > 0 or spawn.mass_props.mass > 0, "a body without mass"
        self.link = spawn.urdf.links[0]

    def write_root_pose_to_sim(self, root_pose, env_ids=None):
        rows = env_ids.numpy()
        values = check(root_pose, (len(rows), 7))
        assert np.abs(np.linalg.norm(values[:, 3:], axis=1) - 1).max() < 1e-3
        values[:, :3] -= self._scene.env_origins[env_ids].numpy()
        self._scene.roots(self)[rows, :7] = values
        self._scene.toy.release(rows)

    def write_root_velocity_to_sim(self, root_velocity, env_ids=None):
        assert not self.fixed, "a kinematic body has no velocity"
        rows = env_ids.numpy()
        self._scene.roots(self)[rows, 7:] = check(root_velocity, (len(rows), 6))
