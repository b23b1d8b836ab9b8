"""Poses and touch from plain numbers, for simulators that tell neither as the tasks want it.

NumPy only and Python 3.8's syntax: this runs beside a simulator in the simulator's own Python.
Quaternions have w first; `...` are any leading dimensions.
"""

from __future__ import annotations

from typing import Any, Sequence, Tuple

import numpy as np

Pose = Tuple[np.ndarray, np.ndarray]  # position (..., 3) in m, orientation (..., 3, 3)
# From a camera that looks along -z with y up (MuJoCo, OpenGL) to one that looks along x with z up.
FORWARD = np.array([[0.0, -1.0, 0.0], [0.0, 0.0, 1.0], [-1.0, 0.0, 0.0]])
SMALL = 1e-12


def matrix(quaternion: Any) -> np.ndarray:
    """Rotation matrices (..., 3, 3) of quaternions (..., 4)."""
    w, x, y, z = np.moveaxis(np.asarray(quaternion, float), -1, 0)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def quaternion(rotation: np.ndarray) -> np.ndarray:
    """Quaternions (..., 4) with w >= 0 of rotation matrices (..., 3, 3)."""
    m = np.asarray(rotation, float)
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    rows = [
        (
            1 + xx + yy + zz,
            m[..., 2, 1] - m[..., 1, 2],
            m[..., 0, 2] - m[..., 2, 0],
            m[..., 1, 0] - m[..., 0, 1],
        ),
        (
            m[..., 2, 1] - m[..., 1, 2],
            1 + xx - yy - zz,
            m[..., 0, 1] + m[..., 1, 0],
            m[..., 0, 2] + m[..., 2, 0],
        ),
        (
            m[..., 0, 2] - m[..., 2, 0],
            m[..., 0, 1] + m[..., 1, 0],
            1 - xx + yy - zz,
            m[..., 1, 2] + m[..., 2, 1],
        ),
        (
            m[..., 1, 0] - m[..., 0, 1],
            m[..., 0, 2] + m[..., 2, 0],
            m[..., 1, 2] + m[..., 2, 1],
            1 - xx - yy + zz,
        ),
    ]
    table = np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)
    # Each row is the quaternion times four of its own entries; the one with the largest is well conditioned.
    best = np.argmax(np.diagonal(table, axis1=-2, axis2=-1), axis=-1)
    quat = np.take_along_axis(table, best[..., None, None], axis=-2)[..., 0, :]
    quat = quat / np.linalg.norm(quat, axis=-1, keepdims=True)
    return np.where(quat[..., :1] < 0, -quat, quat)


def turned(vector: Any) -> np.ndarray:
    """Rotation matrices (..., 3, 3) of rotation vectors (..., 3) in rad."""
    vector = np.asarray(vector, float)
    angle = np.linalg.norm(vector, axis=-1, keepdims=True)
    axis = vector / np.maximum(angle, SMALL)
    return matrix(np.concatenate([np.cos(angle / 2), np.sin(angle / 2) * axis], axis=-1))


def compose(first: Pose, second: Pose) -> Pose:
    """The pose `second`, given in the frame of `first`, in the frame that `first` is given in."""
    position = first[0] + (first[1] @ np.asarray(second[0], float)[..., None])[..., 0]
    return position, first[1] @ second[1]


def camera_pose(camera: dict[str, Any], offset: Sequence[float] = (0.0,) * 6) -> Pose:
    """A camera's pose in its body's frame, x forward and z up, moved by `offset` (m, rotation vector in rad)."""
    shifted = np.asarray(camera["position"], float) + np.asarray(offset[:3], float)
    return shifted, turned(offset[3:]) @ matrix(camera["quaternion"]) @ FORWARD


class Chain:
    """Forward kinematics of the described arm: every body's pose from its joints."""

    def __init__(self, arm: dict[str, Any]):
        self._bodies = arm["bodies"]
        self.joints = [body["joint"]["name"] for body in self._bodies if body["joint"]]
        self._tool = arm["tool"]

    def frames(self, joints: np.ndarray) -> dict[str, Pose]:
        """{body: pose} in the robot base frame at `joints` (n, J), in the order of `self.joints`."""
        count = len(joints)
        poses: dict[str, Pose] = {}
        root = np.zeros((count, 3)), np.broadcast_to(np.eye(3), (count, 3, 3))
        for body in self._bodies:
            here = np.asarray(body["position"], float), matrix(body["quaternion"])
            pose = compose(poses.get(body["parent"], root), here)
            joint = body["joint"]
            if joint:
                value = joints[:, self.joints.index(joint["name"]), None] * np.asarray(
                    joint["axis"]
                )
                if joint["kind"] == "revolute":
                    pose = compose(pose, (np.zeros(3), turned(value)))
                else:
                    pose = compose(pose, (value, np.eye(3)))
            poses[body["name"]] = pose
        return poses

    def tool(self, frames: dict[str, Pose]) -> Pose:
        """The pose of the tool centre point, between the fingertips."""
        here = np.asarray(self._tool["position"], float), matrix(self._tool["quaternion"])
        return compose(frames[self._tool["body"]], here)


class Solid:
    """Shapes that move as one, ready to be asked how near they are to other ones."""

    def __init__(self, shapes: list[dict[str, Any]]):
        self.shapes = [shape for shape in shapes if shape["solid"]]
        self._probes = [_probes(shape) for shape in self.shapes]
        self.radius = max(
            (self._reach(s) for s in self.shapes), default=0.0
        )  # m, around its origin

    @staticmethod
    def _reach(shape: dict[str, Any]) -> float:
        return float(np.linalg.norm(shape["position"]) + np.linalg.norm(shape["size"]) + 1e-6)

    def probes(self, pose: Pose) -> tuple[np.ndarray, np.ndarray]:
        """Points (n, k, 3) in m and radii (k,): balls that make up the surfaces."""
        points, radii = zip(*self._probes)
        local = np.concatenate(points)
        return pose[0][:, None] + local @ np.swapaxes(pose[1], -1, -2), np.concatenate(radii)

    def distance(self, pose: Pose, points: np.ndarray) -> np.ndarray:
        """(n, k) distances in m of `points` (n, k, 3) from the nearest surface, negative inside."""
        local = (points - pose[0][:, None]) @ pose[1]
        each = []
        for shape in self.shapes:
            own = (local - np.asarray(shape["position"], float)) @ matrix(shape["quaternion"])
            each.append(_distance(shape["kind"], shape["size"], own))
        return np.min(each, axis=0)


def touching(first: Solid, at: Pose, second: Solid, there: Pose, gap: float) -> np.ndarray:
    """(n,) bool: whether two solids at poses of (n, 3) and (n, 3, 3) come within `gap` m of each other."""
    result = np.zeros(len(at[0]), bool)
    apart = np.linalg.norm(at[0] - there[0], axis=1)
    near = np.flatnonzero(apart < first.radius + second.radius + gap)
    if not len(near) or not first.shapes or not second.shapes:
        return result
    at, there = (at[0][near], at[1][near]), (there[0][near], there[1][near])
    points, radii = first.probes(at)
    close = (second.distance(there, points) - radii).min(axis=1)
    points, radii = second.probes(there)
    close = np.minimum(close, (first.distance(at, points) - radii).min(axis=1))
    result[near] = close < gap
    return result


def _distance(kind: str, size: Sequence[float], points: np.ndarray) -> np.ndarray:
    """Signed distances (n, k) of `points` (n, k, 3) from a primitive at the origin."""
    if kind == "sphere":
        return np.linalg.norm(points, axis=-1) - size[0]
    if kind == "capsule":
        along = np.clip(points[..., 2], -size[1], size[1])
        return (
            np.linalg.norm(
                np.stack([points[..., 0], points[..., 1], points[..., 2] - along], -1), axis=-1
            )
            - size[0]
        )
    if kind == "cylinder":
        out = np.stack(
            [np.hypot(points[..., 0], points[..., 1]) - size[0], np.abs(points[..., 2]) - size[1]],
            -1,
        )
    else:
        out = np.abs(points) - np.asarray(size, float)
    return np.linalg.norm(np.maximum(out, 0.0), axis=-1) + np.minimum(out.max(axis=-1), 0.0)


def _probes(shape: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Balls (points (k, 3) in the thing's frame, radii (k,)) whose union has the shape's surface, nearly."""
    kind, size = shape["kind"], shape["size"]
    if kind == "sphere":
        points, radius = np.zeros((1, 3)), size[0]
    elif kind == "capsule":
        points, radius = np.zeros((9, 3)), size[0]
        points[:, 2] = np.linspace(-size[1], size[1], 9)
    elif kind == "cylinder":
        angle = np.arange(24) * (2 * np.pi / 24)
        ring = np.stack([np.cos(angle), np.sin(angle), np.zeros(24)], axis=1) * size[0]
        heights = np.linspace(-1, 1, 5)[:, None] * [0, 0, size[1]]
        inner = np.concatenate(
            [ring * 0.5 + heights[0], ring * 0.5 + heights[-1], heights[[0, -1]]]
        )
        points, radius = np.concatenate([ring + h for h in heights] + [inner]), 0.0
    else:
        steps = np.stack(np.meshgrid(*[np.linspace(-1, 1, 5)] * 3, indexing="ij"), -1).reshape(
            -1, 3
        )
        points, radius = steps[np.abs(steps).max(axis=1) == 1] * np.asarray(size, float), 0.0
    placed = points @ matrix(shape["quaternion"]).T + np.asarray(shape["position"], float)
    return placed, np.full(len(points), radius)
