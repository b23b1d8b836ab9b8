"""A task's scene as plain numbers: what a simulator in another process, or another Python, is told.

`describe_scene` reads task and MuJoCo model, so that no number is kept in two places; what it returns is JSON
(docs/simulators.md has every key). Lengths in m, angles in rad, masses in kg, quaternions with w first.
"""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np

from twins import kinematics, scene
from twins.shapes import Shape, Thing
from twins.tasks.task import Task

FORMAT = 1
_KINDS = {int(number): kind for kind, number in scene.GEOMS.items()}
_WORLD = 0


def describe_scene(task: Task, cameras: tuple[str, ...] = scene.CAMERAS) -> dict[str, Any]:
    """The scene of `task`, seen by `cameras`: arm, table, things, contacts, light."""
    model = scene.build_scene(task).compile()
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return {
        "format": FORMAT,
        "task": task.name,
        "control_seconds": scene.TIMESTEP * scene.SUBSTEPS,
        "arm": _describe_arm(model),
        "things": [_describe_thing(model, thing) for thing in task.things],
        "contacts": [list(pair) for pair in task.contacts],
        "hideable": _hideable(task),
        "cameras": {name: _describe_camera(model, name) for name in cameras},
        "table": _describe_plane(model, "table"),
        "floor": _describe_plane(model, "floor"),
        "light": {
            "direction": _plain(model.light("lamp").dir),
            "diffuse": _plain(model.light("lamp").diffuse),
            "ambient": _plain(model.vis.headlight.ambient),
        },
    }


def _plain(values: Any) -> list[float]:
    return [float(value) for value in np.ravel(values)]


def _hideable(task: Task) -> list[str]:
    """Names of the shapes that the task may take out of sight."""
    memory = {name: np.zeros((1, *m.shape), m.dtype) for name, m in task.memory.items()}
    return sorted(task.hidden(memory))


def _describe_thing(model: mujoco.MjModel, thing: Thing) -> dict[str, Any]:
    return {
        "name": thing.name,
        "free": thing.free,
        "height": float(thing.height),
        "shapes": [_describe_shape(shape) for shape in thing.shapes],
        **_describe_mass(model, model.body(thing.name).id),
    }


def _describe_shape(shape: Shape) -> dict[str, Any]:
    return {
        "name": shape.name,
        "kind": shape.kind,
        "size": _plain(shape.size),
        "position": _plain(shape.position),
        "quaternion": _turn(shape.turn),
        "rgb": _plain(shape.rgb),
        "friction": float(shape.friction[0]),
        "solid": bool(shape.solid),
    }


def _turn(vector: Any) -> list[float]:
    angle = float(np.linalg.norm(vector))
    axis = np.asarray(vector, float) / angle if angle else np.zeros(3)
    return [float(np.cos(angle / 2)), *_plain(np.sin(angle / 2) * axis)]


def _describe_mass(model: mujoco.MjModel, body: int) -> dict[str, Any]:
    """Mass, its centre in the body's frame, and the inertia tensor (3, 3) about that centre, axes as the body's."""
    axes = np.empty(9)
    mujoco.mju_quat2Mat(axes, model.body_iquat[body])
    axes = axes.reshape(3, 3)
    inertia = axes @ np.diag(model.body_inertia[body]) @ axes.T
    return {
        "mass": float(model.body_mass[body]),
        "centre": _plain(model.body_ipos[body]),
        "inertia": [_plain(row) for row in inertia],
    }


def _describe_arm(model: mujoco.MjModel) -> dict[str, Any]:
    """Bodies from base to fingers, parents first, with the joint that moves each."""
    base = model.body("base").id
    ids = [i for i in range(model.nbody) if model.body_rootid[i] == base]
    tool = model.site("tcp")
    return {
        "bodies": [_describe_body(model, i) for i in ids],
        "home": _plain(kinematics.HOME),
        "open": float(model.joint("finger_left").range[1]),
        "tool": {
            "body": model.body(int(tool.bodyid[0])).name,
            "position": _plain(tool.pos),
            "quaternion": _plain(tool.quat),
        },
    }


def _describe_body(model: mujoco.MjModel, body: int) -> dict[str, Any]:
    parent = int(model.body_parentid[body])
    geoms = np.flatnonzero(model.geom_bodyid == body)
    return {
        "name": model.body(body).name,
        "parent": None if parent == _WORLD else model.body(parent).name,
        "position": _plain(model.body_pos[body]),
        "quaternion": _plain(model.body_quat[body]),
        "joint": _describe_joint(model, body),
        "shapes": [_describe_geom(model, int(geom)) for geom in geoms],
        **_describe_mass(model, body),
    }


def _describe_joint(model: mujoco.MjModel, body: int) -> dict[str, Any] | None:
    if not model.body_jntnum[body]:
        return None
    joint = model.joint(int(model.body_jntadr[body]))
    servo = model.actuator(joint.name)
    hinge = int(joint.type[0]) == int(mujoco.mjtJoint.mjJNT_HINGE)
    return {
        "name": joint.name,
        "kind": "revolute" if hinge else "prismatic",
        "axis": _plain(joint.axis),
        "range": _plain(joint.range),
        "stiffness": float(servo.gainprm[0]),
        "damping": float(-servo.biasprm[2]),
        "effort": float(servo.forcerange[1]),
        "armature": float(joint.armature[0]),
        "drag": float(joint.damping[0]),
    }


def _describe_geom(model: mujoco.MjModel, geom: int) -> dict[str, Any]:
    kind = _KINDS[int(model.geom_type[geom])]
    sizes = {"box": 3, "capsule": 2, "cylinder": 2, "sphere": 1}[kind]
    return {
        "name": model.geom(geom).name,
        "kind": kind,
        "size": _plain(model.geom_size[geom][:sizes]),
        "position": _plain(model.geom_pos[geom]),
        "quaternion": _plain(model.geom_quat[geom]),
        "rgb": _plain(model.geom_rgba[geom][:3]),
        "friction": float(model.geom_friction[geom][0]),
        "solid": bool(model.geom_contype[geom] | model.geom_conaffinity[geom]),
    }


def _describe_camera(model: mujoco.MjModel, name: str) -> dict[str, Any]:
    """`body` is None where the camera stands still; it looks along -z of its frame, with y up."""
    camera = model.camera(name)
    body = int(camera.bodyid[0])
    return {
        "body": None if body == _WORLD else model.body(body).name,
        "position": _plain(camera.pos),
        "quaternion": _plain(camera.quat),
        "fovy": float(np.radians(camera.fovy[0])),
    }


def _describe_plane(model: mujoco.MjModel, name: str) -> dict[str, Any]:
    """Where its top is and how far it reaches; in other simulators a box below that."""
    geom = model.geom(name)
    return {
        "centre": _plain(geom.pos),
        "half": _plain(geom.size[:2]),
        "rgb": _plain(geom.rgba[:3]),
        "friction": float(geom.friction[0]),
    }
