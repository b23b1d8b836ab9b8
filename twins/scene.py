"""The MuJoCo scene of a task: physics options, arm, table, light and cameras, which all share, and its things."""

from __future__ import annotations

import itertools

import mujoco
import numpy as np

from twins import arm, rotation
from twins.shapes import Shape, Thing
from twins.tasks.task import ARM, GRIPPER, TABLE, Task

TIMESTEP = 0.002  # s; grasps slip from 4 ms on
SUBSTEPS = 50  # of a control step: 10 Hz
CONTROL_HZ = 1.0 / (TIMESTEP * SUBSTEPS)


def parts(count: int, steps: int = SUBSTEPS) -> list[int]:
    """The physics steps of each of `count` parts of a control step of `steps`: as even as whole numbers can be."""
    ends = [round((k + 1) * steps / count) for k in range(count)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


CAMERAS = ("side", "wrist")
TABLE_CENTRE, TABLE_HALF = (0.5, 0.0), (0.42, 0.6)  # m
LIGHT = 0.6  # diffuse intensity of the lamp
GEOMS = {
    "box": mujoco.mjtGeom.mjGEOM_BOX,
    "capsule": mujoco.mjtGeom.mjGEOM_CAPSULE,
    "cylinder": mujoco.mjtGeom.mjGEOM_CYLINDER,
    "sphere": mujoco.mjtGeom.mjGEOM_SPHERE,
}


def build_scene(task: Task) -> mujoco.MjSpec:
    """The arm on its table with two cameras and a lamp, the task's things, and sensors of its contacts."""
    spec = _tabletop()
    for thing in task.things:
        _add_thing(spec, thing)
    for pair in task.contacts:
        _add_contact_sensors(spec, pair)
    return spec


def _tabletop() -> mujoco.MjSpec:
    spec = mujoco.MjSpec()
    spec.compiler.degree = (
        False  # MjSpec reads ranges and fovy's cousins in degrees unless told otherwise
    )
    option = spec.option
    option.timestep = TIMESTEP
    option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    # Elliptic cones with a stiff tangent: 0.5 mm of slip in 2 s of holding, against 8 mm with pyramids.
    option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    option.impratio = 10.0
    option.iterations = 30
    spec.visual.headlight.ambient = [0.35, 0.35, 0.35]
    spec.visual.headlight.diffuse = [0.1, 0.1, 0.1]
    spec.visual.headlight.specular = [0, 0, 0]
    world = spec.worldbody
    world.add_light(
        name="lamp",
        type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL,
        pos=[0.5, 0, 2],
        dir=[-0.3, 0.2, -1],
        diffuse=[LIGHT] * 3,
        specular=[0, 0, 0],
        castshadow=False,
    )
    # A plane collides cheaper than a box. Drawn it is finite; for contacts it has no edge, and a task
    # ends the episode when its object leaves the drawn part.
    world.add_geom(
        name="table",
        type=mujoco.mjtGeom.mjGEOM_PLANE,
        size=[*TABLE_HALF, 0.01],
        pos=[*TABLE_CENTRE, 0],
        contype=arm.TABLE,
        conaffinity=0,
        rgba=[0.55, 0.47, 0.4, 1],
    )
    world.add_geom(
        name="floor",
        type=mujoco.mjtGeom.mjGEOM_PLANE,
        size=[6, 6, 0.01],
        pos=[0, 0, -0.6],
        contype=0,
        conaffinity=0,
        rgba=[0.3, 0.33, 0.37, 1],
    )
    arm.add_arm(spec)
    _add_camera(world, "side", [1.06, 0.0, 0.8], [0.47, 0.0, 0.06], fovy=39.0)
    _add_camera(spec.body("hand"), "wrist", [0.085, 0.0, 0.03], [0.03, 0.0, 0.125], fovy=75.0)
    return spec


def _add_thing(spec: mujoco.MjSpec, thing: Thing) -> None:
    # What a reset only places is a mocap body: each simulation has its own pose of it, and it costs no degrees
    # of freedom.
    body = spec.worldbody.add_body(
        name=thing.name, mocap=not thing.free, pos=[0.5, 0, thing.height]
    )
    if thing.free:
        body.add_freejoint(name=thing.name)
    for shape in thing.shapes:
        _add_shape(body, shape, thing.free)


def _add_shape(body: mujoco.MjsBody, shape: Shape, free: bool) -> None:
    contype, conaffinity = arm.PLACED, 0
    if free:
        contype, conaffinity = arm.OBJECT, arm.TABLE | arm.PLACED | arm.OBJECT
    if not shape.solid:
        contype = conaffinity = 0
    body.add_geom(
        name=shape.name,
        type=GEOMS[shape.kind],
        size=[*shape.size, 0, 0][:3],
        pos=shape.position,
        quat=rotation.quaternion(np.array(shape.turn)),
        mass=shape.mass,
        contype=contype,
        conaffinity=conaffinity,
        friction=shape.friction,
        solref=arm.CONTACT,
        rgba=[*shape.rgb, 1],
    )


def contact_sensors(pair: tuple[str, str]) -> list[str]:
    """Names of the sensors that count the contacts of a pair."""
    return [f"contact_{a}_{b}" for a, b in itertools.product(*(_parts(name) for name in pair))]


def _parts(name: str) -> tuple[str, ...]:
    links = tuple(f"link{i + 1}" for i in range(len(arm.ARM_JOINTS)))
    return {GRIPPER: ("hand", *arm.FINGERS), ARM: links}.get(name, (name,))


def _add_contact_sensors(spec: mujoco.MjSpec, pair: tuple[str, str]) -> None:
    for first, second in itertools.product(*(_parts(name) for name in pair)):
        kinds = [
            mujoco.mjtObj.mjOBJ_GEOM if part == TABLE else mujoco.mjtObj.mjOBJ_BODY
            for part in (first, second)
        ]
        spec.add_sensor(
            name=f"contact_{first}_{second}",
            type=mujoco.mjtSensor.mjSENS_CONTACT,
            objtype=kinds[0],
            objname=first,
            reftype=kinds[1],
            refname=second,
            intprm=[1 << int(mujoco.mjtConDataField.mjCONDATA_FOUND), 0, 1],
        )


def _add_camera(
    body: mujoco.MjsBody, name: str, position: list[float], look_at: list[float], fovy: float
) -> None:
    """Add a camera to `body` that looks from `position` at `look_at` (both in the body's frame, m)."""
    back = np.subtract(position, look_at)
    back /= np.linalg.norm(back)
    up = [0.0, 0.0, 1.0] if body.name == "world" else [1.0, 0.0, 0.0]
    right = np.cross(up, back)
    right /= np.linalg.norm(right)
    body.add_camera(
        name=name,
        pos=position,
        xyaxes=[*right, *np.cross(back, right)],
        fovy=fovy,
        resolution=[64, 64],
    )
