"""Batched rotations: matrices (..., 3, 3) and rotation vectors (..., 3) in radians, NumPy's or torch's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from array_api_compat import array_namespace

SMALL = 1e-9
Array = Any  # numpy.ndarray or torch.Tensor


def norm(vector: Array) -> Array:
    """Lengths (...) of vectors (..., d)."""
    xp = array_namespace(vector)
    return xp.sqrt(xp.sum(vector * vector, axis=-1))


def _matrix(xp: Any, rows: tuple[tuple[Array, ...], ...]) -> Array:
    flat = xp.stack([entry for row in rows for entry in row], axis=-1)
    return xp.reshape(flat, (*flat.shape[:-1], 3, 3))


def exp(vector: Array) -> Array:
    """Rotation matrices (..., 3, 3) of rotation vectors (..., 3), by Rodrigues' formula."""
    xp = array_namespace(vector)
    angle = norm(vector)
    scale = 1.0 / xp.clip(angle, min=SMALL)
    x, y, z = (vector[..., i] * scale for i in range(3))
    sin, cos = xp.sin(angle), xp.cos(angle)
    rest = 1.0 - cos
    return _matrix(
        xp,
        (
            (cos + x * x * rest, x * y * rest - z * sin, x * z * rest + y * sin),
            (y * x * rest + z * sin, cos + y * y * rest, y * z * rest - x * sin),
            (z * x * rest - y * sin, z * y * rest + x * sin, cos + z * z * rest),
        ),
    )


def log(matrix: Array) -> Array:
    """Rotation vectors (..., 3), of length at most pi, of rotation matrices (..., 3, 3).

    The logarithm goes through the quaternion, which stays well conditioned near half a turn.
    """
    xp = array_namespace(matrix)
    m = matrix
    trace = m[..., 0, 0] + m[..., 1, 1] + m[..., 2, 2]
    w2 = 1.0 + trace
    x2, y2, z2 = (1.0 + 2.0 * m[..., i, i] - trace for i in range(3))
    wx, wy, wz = (m[..., i, j] - m[..., j, i] for i, j in ((2, 1), (0, 2), (1, 0)))
    xy, xz, yz = (m[..., i, j] + m[..., j, i] for i, j in ((0, 1), (0, 2), (1, 2)))
    # Four forms of the same quaternion; the one with the largest entry squared loses no digits.
    quat = xp.stack([w2, wx, wy, wz], axis=-1)
    best = w2
    for squared, row in (
        (x2, (wx, x2, xy, xz)),
        (y2, (wy, xy, y2, yz)),
        (z2, (wz, xz, yz, z2)),
    ):
        better = squared > best
        quat = xp.where(better[..., None], xp.stack(row, axis=-1), quat)
        best = xp.where(better, squared, best)
    quat = quat / norm(quat)[..., None]
    quat = xp.where(quat[..., :1] < 0.0, -quat, quat)
    length = norm(quat[..., 1:])[..., None]
    angle = 2.0 * xp.atan2(length, quat[..., :1])
    factor = angle / xp.clip(length, min=SMALL)
    return xp.where(length > SMALL, factor, xp.full_like(factor, 2.0)) * quat[..., 1:]


def about_z(angle: Array) -> Array:
    """Rotation matrices (..., 3, 3) about the vertical by `angle` (...), an array or a number, in radians."""
    if isinstance(angle, (int, float)):
        angle = np.asarray(angle, float)
    xp = array_namespace(angle)
    sin, cos = xp.sin(angle), xp.cos(angle)
    zero, one = xp.zeros_like(sin), xp.ones_like(sin)
    return _matrix(xp, ((cos, -sin, zero), (sin, cos, zero), (zero, zero, one)))


def quaternion(vector: Array) -> Array:
    """Unit quaternions (..., 4), w first as in MuJoCo, of rotation vectors (..., 3)."""
    xp = array_namespace(vector)
    angle = norm(vector)[..., None]
    axis = vector / xp.clip(angle, min=SMALL)
    return xp.concat([xp.cos(angle / 2), xp.sin(angle / 2) * axis], axis=-1)


def matrix(quat: Array) -> Array:
    """Rotation matrices (..., 3, 3) of unit quaternions (..., 4), w first."""
    xp = array_namespace(quat)
    w, x, y, z = (quat[..., i] for i in range(4))
    return _matrix(
        xp,
        (
            (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
            (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
            (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
        ),
    )


def transpose(matrix: Array) -> Array:
    """The inverse rotations (..., 3, 3)."""
    return array_namespace(matrix).matrix_transpose(matrix)


def apply(matrix: Array, vector: Array) -> Array:
    """`vector` (..., 3) turned by `matrix` (..., 3, 3)."""
    return (matrix @ vector[..., None])[..., 0]


def clip_norm(vector: Array, limit: float) -> Array:
    """`vector` (..., d), shortened to a length of at most `limit`; its direction stays."""
    xp = array_namespace(vector)
    return vector * xp.clip(limit / xp.clip(norm(vector), min=SMALL), max=1.0)[..., None]


def wrap(angle: Array, period: float) -> Array:
    """`angle` folded into [-period / 2, period / 2)."""
    return (angle + period / 2) % period - period / 2


def wrap_half_turn(angle: Array) -> Array:
    """`angle` folded into [-pi/2, pi/2): a parallel gripper looks the same after half a turn."""
    return wrap(angle, math.pi)


def yaw(matrix: Array) -> Array:
    """(...) the direction of a body's x axis over the table, rad, of (..., 3, 3)."""
    return array_namespace(matrix).atan2(matrix[..., 1, 0], matrix[..., 0, 0])
