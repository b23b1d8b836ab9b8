# ruff: noqa: RUF012
"""Actuators."""

from isaaclab.settings import MISSING, Settings


class ImplicitActuatorCfg(Settings):
    FIELDS = {
        "joint_names_expr": MISSING,
        "effort_limit_sim": None,
        "stiffness": MISSING,
        "damping": MISSING,
        "armature": None,
    }
