# ruff: noqa: RUF012
"""Simulation and spawners."""

import os
import sys

import isaaclab
from isaaclab.settings import MISSING, Settings

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from toy import parse_urdf

if not isaaclab.LAUNCHED:
    raise ModuleNotFoundError("No module named 'omni': launch the app before this import")


class PhysxCfg(Settings):
    FIELDS = {
        "solver_type": 1,
        "min_position_iteration_count": 1,
        "bounce_threshold_velocity": 0.5,
        "friction_offset_threshold": 0.04,
        "friction_correlation_distance": 0.025,
    }


class SimulationCfg(Settings):
    FIELDS = {"dt": 1 / 60, "device": "cuda:0", "physx": None}


class RigidBodyPropertiesCfg(Settings):
    FIELDS = {
        "kinematic_enabled": None,
        "disable_gravity": None,
        "max_depenetration_velocity": None,
    }


class CollisionPropertiesCfg(Settings):
    FIELDS = {"contact_offset": None, "rest_offset": None}


class MassPropertiesCfg(Settings):
    FIELDS = {"mass": None}


class ArticulationRootPropertiesCfg(Settings):
    FIELDS = {"articulation_enabled": None}


class PinholeCameraCfg(Settings):
    FIELDS = {"focal_length": 24.0, "horizontal_aperture": 20.955, "clipping_range": (0.01, 1e6)}


class DistantLightCfg(Settings):
    FIELDS = {"intensity": 1.0}


class DomeLightCfg(Settings):
    FIELDS = {"intensity": 1.0}


class UrdfConverterCfg(Settings):
    class JointDriveCfg(Settings):
        FIELDS = {"gains": None}

        class PDGainsCfg(Settings):
            FIELDS = {"stiffness": MISSING, "damping": None}


class UrdfFileCfg(UrdfConverterCfg):
    FIELDS = {
        "asset_path": MISSING,
        "usd_dir": None,
        "fix_base": MISSING,
        "merge_fixed_joints": True,
        "joint_drive": MISSING,  # its default is not complete
        "self_collision": False,
        "activate_contact_sensors": False,
        "articulation_props": None,
        "rigid_props": None,
        "mass_props": None,
        "collision_props": None,
    }

    def __init__(self, **given):
        super().__init__(**given)
        with open(self.asset_path) as file:
            self.urdf = parse_urdf(file.read())


class SimulationContext:
    """One at a time, as there."""

    current = None

    def __init__(self, cfg=None):
        assert isinstance(cfg, SimulationCfg) and isinstance(cfg.physx, PhysxCfg), cfg
        self.cfg, self.scene, self.playing, self.drawn = cfg, None, False, None
        SimulationContext.current = self

    def reset(self, soft=False):
        assert self.scene is not None, "the scene is made before the simulation starts"
        self.scene.start()
        self.playing = True

    def step(self, render=True):
        assert self.playing and render is False
        self.scene.advance(self.cfg.dt)

    def render(self, mode=None):
        assert self.playing and isaaclab.CAMERAS, "cameras were not enabled at the launch"
        self.scene.draw()
