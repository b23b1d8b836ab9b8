"""Forward and inverse kinematics of the 7-joint arm, vectorised over environments.

Poses are those of the tool centre point (tcp, between the fingertips) in the robot base frame.
"""

from __future__ import annotations

import numpy as np

from twins import rotation

JOINTS = 7
# Modified (Craig) Denavit-Hartenberg parameters of the Franka Panda: a (m), alpha (rad), d (m).
DH = (
    (0.0, 0.0, 0.333),
    (0.0, -np.pi / 2, 0.0),
    (0.0, np.pi / 2, 0.316),
    (0.0825, np.pi / 2, 0.0),
    (-0.0825, -np.pi / 2, 0.384),
    (0.0, np.pi / 2, 0.0),
    (0.088, np.pi / 2, 0.0),
)
FLANGE = 0.107  # m, from the last joint's frame along its axis
HAND_YAW = -np.pi / 4  # the hand is mounted an eighth of a turn off the flange
TCP = 0.1034  # m, from the hand's frame to between the fingertips
LIMITS = np.array(
    [
        (-2.8973, 2.8973),
        (-1.7628, 1.7628),
        (-2.8973, 2.8973),
        (-3.0718, -0.0698),
        (-2.8973, 2.8973),
        (-0.0175, 3.7525),
        (-2.8973, 2.8973),
    ]
)
HOME = np.array(
    [0.0, -0.1671, 0.0, -2.5074, 0.0, 2.3403, np.pi / 4]
)  # tcp at (0.45, 0, 0.24), hand down
DOWN = np.diag([1.0, -1.0, -1.0])  # the hand's orientation at yaw 0: fingers open along y

# How far one control step moves the commanded pose, and how far that may lead the measured one.
MAX_SHIFT, MAX_TURN = 0.03, 0.2  # m and rad
REACH, REACH_TURN = 0.15, 0.8  # m and rad
BOX = np.array([(0.25, -0.42, 0.012), (0.78, 0.42, 0.5)])  # m, where the commanded tcp may go
# Of the inverse kinematics, see `solve`.
ITERATIONS, DAMPING, POSTURE, MAX_STEP = 3, 0.02, 0.05, 0.4

_OFFSETS = np.array([(a, -np.sin(alpha) * d, np.cos(alpha) * d) for a, alpha, d in DH])
_TILTS = np.array([rotation.exp(np.array([alpha, 0.0, 0.0])) for _, alpha, _ in DH])
_HAND = rotation.about_z(HAND_YAW)


def frames(joints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Origins (N, 7, 3) and orientations (N, 7, 3, 3) of the joint frames at `joints` (N, 7)."""
    count = len(joints)
    origins, turns = np.empty((count, JOINTS, 3)), np.empty((count, JOINTS, 3, 3))
    sin, cos = np.sin(joints), np.cos(joints)
    origin, turn = np.zeros((count, 3)), np.broadcast_to(np.eye(3), (count, 3, 3))
    for i in range(JOINTS):
        origin = origin + turn @ _OFFSETS[i]
        tilted = turn @ _TILTS[i]
        c, s = cos[:, i, None], sin[:, i, None]
        turn = np.stack(
            [
                tilted[..., 0] * c + tilted[..., 1] * s,
                tilted[..., 1] * c - tilted[..., 0] * s,
                tilted[..., 2],
            ],
            axis=-1,
        )
        origins[:, i], turns[:, i] = origin, turn
    return origins, turns


def _tool(origins: np.ndarray, turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return origins[:, -1] + turns[:, -1, :, 2] * (FLANGE + TCP), turns[:, -1] @ _HAND


def forward(joints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tcp's positions (N, 3) in m and orientations (N, 3, 3) at `joints` (N, 7) in rad."""
    return _tool(*frames(joints))


def solve(
    joints: np.ndarray,
    position: np.ndarray,
    turn: np.ndarray,
    *,
    iterations: int = ITERATIONS,
    damping: float = DAMPING,
    posture: float = POSTURE,
    max_step: float = MAX_STEP,
) -> np.ndarray:
    """Joint angles (N, 7) whose tcp comes close to `position` (N, 3) and `turn` (N, 3, 3).

    Damped least squares from `joints` (N, 7), which a caller keeps from step to step. More `damping`
    is calmer near singularities and slower; `posture` pulls the free seventh degree of freedom back to
    HOME, without which the elbow drifts over an episode. `max_step` (rad) bounds each iteration.
    """
    eye = np.eye(6) * damping**2
    for _ in range(iterations):
        origins, turns = frames(joints)
        tip, tool = _tool(origins, turns)
        axes = turns[..., 2]
        jacobian = np.empty((len(joints), 6, JOINTS))
        jacobian[:, :3] = np.cross(axes, tip[:, None] - origins).swapaxes(1, 2)
        jacobian[:, 3:] = axes.swapaxes(1, 2)
        error = np.concatenate([position - tip, rotation.log(turn @ tool.swapaxes(1, 2))], axis=-1)
        home = posture * (HOME - joints)
        # A step towards HOME, then whatever task error that step leaves: the home step acts in the null space.
        residual = error - (jacobian @ home[..., None])[..., 0]
        inner = np.linalg.solve(jacobian @ jacobian.swapaxes(1, 2) + eye, residual[..., None])
        step = home + (jacobian.swapaxes(1, 2) @ inner)[..., 0]
        joints = np.clip(joints + np.clip(step, -max_step, max_step), LIMITS[:, 0], LIMITS[:, 1])
    return joints
