"""Batched rotations: matrices (..., 3, 3) and rotation vectors (..., 3) in radians."""

from __future__ import annotations

import numpy as np

SMALL = 1e-9


def exp(vector: np.ndarray) -> np.ndarray:
    """Rotation matrices (..., 3, 3) of rotation vectors (..., 3), by Rodrigues' formula."""
    angle = np.linalg.norm(vector, axis=-1, keepdims=True)
    axis = vector / np.maximum(angle, SMALL)
    x, y, z = np.moveaxis(axis, -1, 0)
    sin, cos = np.sin(angle[..., 0]), np.cos(angle[..., 0])
    rest = 1.0 - cos
    rows = (
        (cos + x * x * rest, x * y * rest - z * sin, x * z * rest + y * sin),
        (y * x * rest + z * sin, cos + y * y * rest, y * z * rest - x * sin),
        (z * x * rest - y * sin, z * y * rest + x * sin, cos + z * z * rest),
    )
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def log(matrix: np.ndarray) -> np.ndarray:
    """Rotation vectors (..., 3), of length at most pi, of rotation matrices (..., 3, 3).

    The logarithm goes through the quaternion, which stays well conditioned near half a turn.
    """
    m = matrix
    trace = m[..., 0, 0] + m[..., 1, 1] + m[..., 2, 2]
    squares = np.stack(
        [
            1.0 + trace,
            1.0 + 2.0 * m[..., 0, 0] - trace,
            1.0 + 2.0 * m[..., 1, 1] - trace,
            1.0 + 2.0 * m[..., 2, 2] - trace,
        ],
        axis=-1,
    )
    skew = (
        m[..., 2, 1] - m[..., 1, 2],
        m[..., 0, 2] - m[..., 2, 0],
        m[..., 1, 0] - m[..., 0, 1],
    )
    xy, xz, yz = (m[..., i, j] + m[..., j, i] for i, j in ((0, 1), (0, 2), (1, 2)))
    w2, x2, y2, z2 = np.moveaxis(squares, -1, 0)
    candidates = np.stack(
        [
            np.stack([w2, *skew], axis=-1),
            np.stack([skew[0], x2, xy, xz], axis=-1),
            np.stack([skew[1], xy, y2, yz], axis=-1),
            np.stack([skew[2], xz, yz, z2], axis=-1),
        ],
        axis=-2,
    )
    best = squares.argmax(axis=-1)
    quat = np.take_along_axis(candidates, best[..., None, None], axis=-2)[..., 0, :]
    quat = quat / np.linalg.norm(quat, axis=-1, keepdims=True)
    quat = np.where(quat[..., :1] < 0.0, -quat, quat)
    length = np.linalg.norm(quat[..., 1:], axis=-1, keepdims=True)
    angle = 2.0 * np.arctan2(length, quat[..., :1])
    return np.where(length > SMALL, angle / np.maximum(length, SMALL), 2.0) * quat[..., 1:]


def about_z(angle: np.ndarray) -> np.ndarray:
    """Rotation matrices (..., 3, 3) about the vertical by `angle` (...) in radians."""
    angle = np.asarray(angle, float)
    return exp(np.stack([np.zeros_like(angle), np.zeros_like(angle), angle], axis=-1))


def quaternion(vector: np.ndarray) -> np.ndarray:
    """Unit quaternions (..., 4), w first as in MuJoCo, of rotation vectors (..., 3)."""
    angle = np.linalg.norm(vector, axis=-1, keepdims=True)
    axis = vector / np.maximum(angle, SMALL)
    return np.concatenate([np.cos(angle / 2), np.sin(angle / 2) * axis], axis=-1)


def matrix(quat: np.ndarray) -> np.ndarray:
    """Rotation matrices (..., 3, 3) of unit quaternions (..., 4), w first."""
    w, x, y, z = np.moveaxis(quat, -1, 0)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def clip_norm(vector: np.ndarray, limit: float) -> np.ndarray:
    """`vector` (..., d), shortened to a length of at most `limit`; its direction stays."""
    length = np.linalg.norm(vector, axis=-1, keepdims=True)
    return vector * np.minimum(1.0, limit / np.maximum(length, SMALL))


def wrap_half_turn(angle: np.ndarray) -> np.ndarray:
    """`angle` folded into [-pi/2, pi/2): a parallel gripper looks the same after half a turn."""
    return (angle + np.pi / 2) % np.pi - np.pi / 2
