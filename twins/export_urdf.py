"""URDF files of a described scene (`twins.scene_description`): the arm, and a file for each body beside it.

Standard library only and Python 3.8's syntax: simulators write these files beside themselves from the description.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any
from xml.etree import ElementTree

MAX_SPEED = {
    "revolute": 10.0,
    "prismatic": 1.0,
}  # rad/s and m/s; the servos' forces are what limits


def arm_urdf(arm: dict[str, Any], *, capsules: bool = True, visuals: bool = True) -> str:
    """The arm: one link for each body, joints with limits, efforts and passive damping.

    URDF has no capsules; Isaac Gym, Isaac Sim, SAPIEN, Newton and MuJoCo read them all the same. Without `capsules`
    each is a cylinder and two balls; without `visuals` there is nothing to be seen.
    """
    robot = ElementTree.Element("robot", name="arm")
    for body in arm["bodies"]:
        _add_link(robot, body["name"], body, capsules, visuals)
    for body in arm["bodies"]:
        if body["parent"] is not None:
            _add_joint(robot, body)
    return _text(robot)


def body_urdf(body: Any, *, capsules: bool = True, visuals: bool = True) -> str:
    """One rigid body (`twins.backends.lockstep.Body`) as a link of its name."""
    robot = ElementTree.Element("robot", name=body.name)
    _add_link(robot, body.name, body._asdict(), capsules, visuals)
    return _text(robot)


def _add_joint(robot: ElementTree.Element, body: dict[str, Any]) -> None:
    moved = body["joint"]
    kind = moved["kind"] if moved else "fixed"
    name = moved["name"] if moved else body["name"] + "_mount"
    joint = ElementTree.SubElement(robot, "joint", name=name, type=kind)
    ElementTree.SubElement(joint, "parent", link=body["parent"])
    ElementTree.SubElement(joint, "child", link=body["name"])
    _add_origin(joint, body["position"], body["quaternion"])
    if moved:
        low, high = moved["range"]
        ElementTree.SubElement(joint, "axis", xyz=_numbers(moved["axis"]))
        ElementTree.SubElement(
            joint,
            "limit",
            lower=_number(low),
            upper=_number(high),
            effort=_number(moved["effort"]),
            velocity=_number(MAX_SPEED[kind]),
        )
        ElementTree.SubElement(joint, "dynamics", damping=_number(moved["drag"]), friction="0")


def _add_link(
    robot: ElementTree.Element, name: str, body: dict[str, Any], capsules: bool, visuals: bool
) -> None:
    link = ElementTree.SubElement(robot, "link", name=name)
    if body["mass"] > 0:
        inertial = ElementTree.SubElement(link, "inertial")
        _add_origin(inertial, body["centre"], (1.0, 0.0, 0.0, 0.0))
        ElementTree.SubElement(inertial, "mass", value=_number(body["mass"]))
        (xx, xy, xz), (_, yy, yz), (_, _, zz) = body["inertia"]
        tensor = {"ixx": xx, "ixy": xy, "ixz": xz, "iyy": yy, "iyz": yz, "izz": zz}
        ElementTree.SubElement(
            inertial, "inertia", {name: _number(value) for name, value in tensor.items()}
        )
    for shape in body["shapes"]:
        for piece in [shape] if capsules else _plain(shape):
            if visuals:
                _add_shape(link, "visual", piece)
            if shape["solid"]:
                _add_shape(link, "collision", piece)


def _plain(shape: dict[str, Any]) -> list[dict[str, Any]]:
    """The shape, or what URDF knows that makes up a capsule: a cylinder and a ball at each end."""
    if shape["kind"] != "capsule":
        return [shape]
    radius, half = shape["size"]
    axis = _axis(shape["quaternion"])
    balls = []
    for name, side in (("top", half), ("bottom", -half)):
        end = [shape["position"][i] + side * axis[i] for i in range(3)]
        name = f"{shape['name']}_{name}"
        balls.append(dict(shape, kind="sphere", size=[radius], position=end, name=name))
    return [dict(shape, kind="cylinder"), *balls]


def _add_shape(link: ElementTree.Element, role: str, shape: dict[str, Any]) -> None:
    name = shape["name"] if role == "visual" else shape["name"] + "_touch"  # no name is used twice
    element = ElementTree.SubElement(link, role, name=name)
    _add_origin(element, shape["position"], shape["quaternion"])
    geometry, size = ElementTree.SubElement(element, "geometry"), shape["size"]
    if shape["kind"] == "box":
        ElementTree.SubElement(geometry, "box", size=_numbers(2 * s for s in size))
    elif shape["kind"] == "sphere":
        ElementTree.SubElement(geometry, "sphere", radius=_number(size[0]))
    else:
        lengths = {"radius": _number(size[0]), "length": _number(2 * size[1])}
        if shape["kind"] == "capsule":
            lengths["height"] = lengths["length"]  # as Newton calls it
        ElementTree.SubElement(geometry, shape["kind"], lengths)
    if role == "visual":
        # Materials are known by name in some readers, so a name is one colour's.
        name = "rgb_" + "_".join(str(round(255 * c)) for c in shape["rgb"])
        material = ElementTree.SubElement(element, "material", name=name)
        ElementTree.SubElement(material, "color", rgba=_numbers([*shape["rgb"], 1.0]))


def _add_origin(
    element: ElementTree.Element, position: Sequence[float], quaternion: Sequence[float]
) -> None:
    ElementTree.SubElement(
        element, "origin", xyz=_numbers(position), rpy=_numbers(roll_pitch_yaw(quaternion))
    )


def roll_pitch_yaw(quaternion: Sequence[float]) -> list[float]:
    """URDF's angles in rad, about the fixed axes x, y, z in turn, of a quaternion with w first."""
    w, x, y, z = quaternion
    # The sine of the pitch; near a quarter turn roll and yaw turn about the same axis, and all goes to the roll.
    sine = 2 * (w * y - x * z)
    if abs(sine) > 1 - 1e-12:
        side = math.copysign(1.0, sine)
        return [2 * math.atan2(x, w), side * math.pi / 2, 0.0]
    return [
        math.atan2(2 * (w * x + y * z), 1 - 2 * (x * x + y * y)),
        math.asin(sine),
        math.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)),
    ]


def _axis(quaternion: Sequence[float]) -> list[float]:
    """The z axis of a frame."""
    w, x, y, z = quaternion
    return [2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)]


def _number(value: float) -> str:
    return repr(float(value) + 0.0)


def _numbers(values: Iterable[float]) -> str:
    return " ".join(_number(v) for v in values)


def _text(robot: ElementTree.Element) -> str:
    _indent(robot, 0)
    return '<?xml version="1.0"?>\n' + ElementTree.tostring(robot, encoding="unicode") + "\n"


def _indent(element: ElementTree.Element, depth: int) -> None:
    """`ElementTree.indent`, which Python 3.8 lacks."""
    if len(element):
        element.text = "\n" + "  " * (depth + 1)
        for child in element:
            _indent(child, depth + 1)
            child.tail = "\n" + "  " * (depth + 1)
        element[-1].tail = "\n" + "  " * depth
