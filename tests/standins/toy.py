"""The tiny world of all stand-ins: an arm follows its targets, things fall, rest, and are carried when gripped.

No physics: it is there so that an adapter has states to write and read, and a scripted expert something to finish.
Bodies come as URDF text or as shapes; arrays are NumPy's, quaternions have w first.
"""

from __future__ import annotations

import math
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

LAG = 0.03  # s, how far the arm trails its targets
TCP = 0.1034  # m, from the hand's frame to between the fingertips
REACH = 0.02  # m, what is that near to the fingertips when they close is gripped
GRIPPED, HOLDS, LETS_GO = (
    0.015,
    0.03,
    0.06,
)  # m: a finger's stop; widths commanded below and above which it grips
GRAVITY = 9.81
SQUEEZE = 5.0  # N, on each finger that holds something


class Part(NamedTuple):
    """A primitive: half extents of a box, radius and half length otherwise."""

    kind: str
    size: tuple[float, ...]
    pose: np.ndarray  # (4, 4) in its body's frame


class Link(NamedTuple):
    name: str
    mass: float
    inertia: np.ndarray  # (3, 3)
    collisions: tuple[Part, ...]
    visuals: tuple[Part, ...]


class Joint(NamedTuple):
    name: str
    kind: str
    parent: str
    child: str
    origin: np.ndarray  # (4, 4)
    axis: np.ndarray
    limits: tuple[float, float]


class Urdf(NamedTuple):
    links: tuple[Link, ...]
    joints: tuple[Joint, ...]

    @property
    def moving(self) -> list[Joint]:
        return [joint for joint in self.joints if joint.kind != "fixed"]


def parse_urdf(text: str) -> Urdf:
    """A URDF file as strictly as a simulator that refuses what it does not know."""
    root = ElementTree.fromstring(text)
    assert root.tag == "robot" and root.get("name"), root.tag
    links = tuple(_link(element) for element in root.findall("link"))
    names = [link.name for link in links]
    assert len(set(names)) == len(names), names
    joints = tuple(_joint(element, names) for element in root.findall("joint"))
    assert len(joints) == len(links) - 1, "a URDF is a tree"
    return Urdf(links, joints)


def _link(element: ElementTree.Element) -> Link:
    inertial, mass, inertia = element.find("inertial"), 0.0, np.zeros((3, 3))
    if inertial is not None:
        mass = float(inertial.find("mass").get("value"))
        i = {k: float(v) for k, v in inertial.find("inertia").attrib.items()}
        inertia = np.array(
            [
                [i["ixx"], i["ixy"], i["ixz"]],
                [i["ixy"], i["iyy"], i["iyz"]],
                [i["ixz"], i["iyz"], i["izz"]],
            ]
        )
        values = np.linalg.eigvalsh(inertia)
        assert mass > 0 and values[0] > 0 and values[0] + values[1] >= values[2] * (1 - 1e-9)
    parts = {
        role: tuple(_part(e) for e in element.findall(role)) for role in ("collision", "visual")
    }
    for visual in element.findall("visual"):
        rgba = [float(v) for v in visual.find("material").find("color").get("rgba").split()]
        assert len(rgba) == 4 and all(0 <= v <= 1 for v in rgba), rgba
    return Link(element.get("name"), mass, inertia, parts["collision"], parts["visual"])


def _part(element: ElementTree.Element) -> Part:
    (shape,) = element.find("geometry")
    if shape.tag == "box":
        size = tuple(float(v) / 2 for v in shape.get("size").split())
    elif shape.tag == "sphere":
        size = (float(shape.get("radius")),)
    else:
        assert shape.tag in ("cylinder", "capsule"), shape.tag
        size = (float(shape.get("radius")), float(shape.get("length")) / 2)
    assert all(v > 0 for v in size), size
    return Part(shape.tag, size, origin_of(element))


def _joint(element: ElementTree.Element, links: list[str]) -> Joint:
    kind, parent = element.get("type"), element.find("parent").get("link")
    child = element.find("child").get("link")
    assert kind in ("revolute", "prismatic", "fixed") and {parent, child} <= set(links), kind
    axis, limits = np.array([1.0, 0.0, 0.0]), (0.0, 0.0)
    if kind != "fixed":
        axis = np.array([float(v) for v in element.find("axis").get("xyz").split()])
        limit = element.find("limit")
        limits = float(limit.get("lower")), float(limit.get("upper"))
        assert limits[0] < limits[1] and float(limit.get("effort")) > 0
        assert float(limit.get("velocity")) > 0 and abs(np.linalg.norm(axis) - 1) < 1e-9
    return Joint(element.get("name"), kind, parent, child, origin_of(element), axis, limits)


def origin_of(element: ElementTree.Element) -> np.ndarray:
    """(4, 4) of an element's origin: roll, pitch and yaw about the fixed axes in turn."""
    origin, pose = element.find("origin"), np.eye(4)
    if origin is not None:
        pose[:3, 3] = [float(v) for v in origin.get("xyz").split()]
        r, p, y = (float(v) for v in origin.get("rpy").split())
        pose[:3, :3] = _about(2, y) @ _about(1, p) @ _about(0, r)
    return pose


def _about(axis: int, angle: float) -> np.ndarray:
    c, s, m = math.cos(angle), math.sin(angle), np.eye(3)
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    m[i, i], m[j, j], m[i, j], m[j, i] = c, c, -s, s
    return m


def rotation(quaternion: np.ndarray) -> np.ndarray:
    """(..., 3, 3) of unit quaternions (..., 4), w first."""
    w, v = quaternion[..., :1, None], quaternion[..., 1:]
    zero = np.zeros(v.shape[:-1])
    x, y, z = np.moveaxis(v, -1, 0)
    cross = np.stack(
        [np.stack(r, -1) for r in ((zero, -z, y), (z, zero, -x), (-y, x, zero))], axis=-2
    )
    return np.eye(3) + 2 * w * cross + 2 * cross @ cross


def quaternion(matrix: np.ndarray) -> np.ndarray:
    """(4,), w first, of a rotation matrix, by the eigenvector that all its rotations share."""
    m = matrix
    k = np.array(
        [
            [m[0, 0] - m[1, 1] - m[2, 2], 0, 0, 0],
            [m[0, 1] + m[1, 0], m[1, 1] - m[0, 0] - m[2, 2], 0, 0],
            [m[0, 2] + m[2, 0], m[1, 2] + m[2, 1], m[2, 2] - m[0, 0] - m[1, 1], 0],
            [m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1], np.trace(m)],
        ]
    )
    _, vectors = np.linalg.eigh(k / 3.0)
    x, y, z, w = vectors[:, -1]
    return np.array([w, x, y, z]) * (1.0 if w >= 0 else -1.0)


class Thing(NamedTuple):
    """A body beside the arm."""

    name: str
    fixed: bool
    parts: tuple[Part, ...]  # that collide


class Toy:
    """`count` worlds with the same arm and things."""

    def __init__(self, count: int, arm: Urdf, things: list[Thing]) -> None:
        self.count, self.arm, self.things = count, arm, things
        self.names = [joint.name for joint in arm.moving]
        self.q, self.qd = np.zeros((2, count, len(self.names)))
        self.limits = np.array([joint.limits for joint in arm.moving])
        self.roots = np.zeros((count, len(things), 13))
        self.roots[..., 3] = 1.0
        self.squeeze = np.zeros(count)  # N on each finger
        self._held = np.zeros((count, len(things)), bool)
        self._grip = np.zeros((count, len(things), 4, 4))
        self._bottom = [self._lowest(thing) for thing in things]

    @staticmethod
    def _lowest(thing: Thing) -> float:
        """How far the thing reaches below its origin when it stands upright."""
        low = 0.0
        for part in thing.parts:
            reach = np.abs(part.pose[2, :3]) @ _extent(part)
            low = min(low, part.pose[2, 3] - reach)
        return low

    def frames(self) -> dict[str, np.ndarray]:
        """{link: (count, 4, 4)} at the present joints."""
        poses = {self.arm.links[0].name: np.tile(np.eye(4), (self.count, 1, 1))}
        for joint in self.arm.joints:
            motion = np.tile(np.eye(4), (self.count, 1, 1))
            if joint.kind != "fixed":
                value = self.q[:, self.names.index(joint.name), None]
                if joint.kind == "prismatic":
                    motion[:, :3, 3] = value * joint.axis
                else:
                    half = value / 2
                    motion[:, :3, :3] = rotation(
                        np.concatenate([np.cos(half), np.sin(half) * joint.axis], axis=1)
                    )
            poses[joint.child] = poses[joint.parent] @ joint.origin @ motion
        return poses

    def advance(self, targets: np.ndarray, seconds: float) -> None:
        """Let `seconds` pass with joints driven towards `targets` (count, J), in the order of `names`."""
        before, roots = self.q.copy(), self.roots.copy()
        goal = np.clip(targets, self.limits[:, 0], self.limits[:, 1])
        fingers = [i for i, name in enumerate(self.names) if name.startswith("finger")]
        width = goal[:, fingers].sum(axis=1)
        self.q += (goal - self.q) * (1 - math.exp(-seconds / LAG))
        hand = self.frames()["hand"]
        tip = hand[:, :3, 3] + TCP * hand[:, :3, 2]
        for b, thing in enumerate(self.things):
            if not thing.fixed:
                self._move(b, hand, tip, width, seconds)
        for world in np.flatnonzero(self._held.any(axis=1)):
            self.q[world, fingers] = np.maximum(self.q[world, fingers], GRIPPED)
        self.squeeze = np.where(self._held.any(axis=1), SQUEEZE, 0.0)
        self.qd = (self.q - before) / seconds
        self.roots[..., 7:10] = (self.roots[..., :3] - roots[..., :3]) / seconds
        self.roots[:, [t.fixed for t in self.things], 7:] = 0.0

    def _move(
        self, b: int, hand: np.ndarray, tip: np.ndarray, width: np.ndarray, seconds: float
    ) -> None:
        here = self.roots[:, b]
        near = np.linalg.norm(here[:, :3] - tip, axis=1) < REACH
        held = self._held[:, b]
        fresh = near & (width < HOLDS) & ~held
        pose = np.tile(np.eye(4), (self.count, 1, 1))
        pose[:, :3, :3], pose[:, :3, 3] = rotation(here[:, 3:7]), here[:, :3]
        self._grip[fresh, b] = np.linalg.inv(hand[fresh]) @ pose[fresh]
        self._held[:, b] = held = (held | fresh) & (width < LETS_GO)
        for world in range(self.count):
            if held[world]:
                moved = hand[world] @ self._grip[world, b]
                here[world, :3], here[world, 3:7] = moved[:3, 3], quaternion(moved[:3, :3])
            else:
                rest = self._support(world, b) - self._bottom[b]
                speed = here[world, 9] - GRAVITY * seconds
                here[world, 2] = max(rest, here[world, 2] + speed * seconds)

    def _support(self, world: int, b: int) -> float:
        """The height of what is below a thing: the highest box of a fixed body under its middle."""
        point = self.roots[world, b, :3]
        height = -0.6
        for other, thing in enumerate(self.things):
            if not thing.fixed:
                continue
            pose = np.eye(4)
            pose[:3, :3] = rotation(self.roots[world, other, 3:7])
            pose[:3, 3] = self.roots[world, other, :3]
            for part in thing.parts:
                placed = pose @ part.pose
                if part.kind != "box" or placed[2, 2] < 0.999:
                    continue
                local = placed[:3, :3].T @ (point - placed[:3, 3])
                top = placed[2, 3] + part.size[2]
                if (np.abs(local[:2]) < part.size[:2]).all() and top <= point[2] + 1e-3:
                    height = max(height, top)
        return height

    def release(self, worlds: np.ndarray) -> None:
        """Somebody wrote the state of `worlds`: nothing is gripped there any more."""
        self._held[worlds] = False


def _extent(part: Part) -> np.ndarray:
    if part.kind == "box":
        return np.array(part.size)
    if part.kind == "sphere":
        return np.full(3, part.size[0])
    long = part.size[1] + (part.size[0] if part.kind == "capsule" else 0.0)
    return np.array([part.size[0], part.size[0], long])
