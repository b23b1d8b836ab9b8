"""Warp kernels of the control law (`twins.control`): a thread is an environment, on the CPU or on CUDA.

Kernels take `ids`, the environments of their rows, and `active`, a mask over all of them: on a CPU the ids choose, on
a GPU the mask does. No launch depends on values that the host would have to see.
"""

from __future__ import annotations

import numpy as np
import warp as wp

from twinrl.core import interpolation
from twins import kinematics
from twins.randomise import MAX_LATENCY

wp.config.quiet = True
wp.config.log_level = getattr(wp, "LOG_ERROR", 40)
wp.set_module_options({"enable_backward": False})

PENDING = MAX_LATENCY + 1  # commanded poses that are remembered, the newest first
ACTION = 7  # shift (3), turn (3), gripper opening
STATE_DIM = 13 + 2 * ACTION

Seven = wp.types.vector(length=7, dtype=wp.float32)
Six = wp.types.vector(length=6, dtype=wp.float32)
State = wp.types.vector(length=STATE_DIM, dtype=wp.float32)
Points = wp.types.matrix(shape=(7, 3), dtype=wp.float32)
Square = wp.types.matrix(shape=(6, 6), dtype=wp.float32)
Ids = wp.array(dtype=wp.int32)
Flags = wp.array(dtype=wp.bool)

_OFFSET_X = wp.constant(Seven(*(a for a, _, _ in kinematics.DH)))
_OFFSET_Y = wp.constant(Seven(*(-np.sin(alpha) * d for _, alpha, d in kinematics.DH)))
_OFFSET_Z = wp.constant(Seven(*(np.cos(alpha) * d for _, alpha, d in kinematics.DH)))
# Every axis is along or square to the one before: the sines and cosines are -1, 0 or 1.
_SIN = wp.constant(Seven(*np.round([np.sin(alpha) for _, alpha, _ in kinematics.DH])))
_COS = wp.constant(Seven(*np.round([np.cos(alpha) for _, alpha, _ in kinematics.DH])))
_LOW = wp.constant(Seven(*kinematics.LIMITS[:, 0]))
_HIGH = wp.constant(Seven(*kinematics.LIMITS[:, 1]))
_HOME = wp.constant(Seven(*kinematics.HOME))
_TOOL_LENGTH = wp.constant(kinematics.FLANGE + kinematics.TCP)
_YAW_SIN, _YAW_COS = (wp.constant(float(f(kinematics.HAND_YAW))) for f in (np.sin, np.cos))
_ITERATIONS = wp.constant(kinematics.ITERATIONS)
_DAMPING = wp.constant(kinematics.DAMPING**2)
_POSTURE, _MAX_STEP = wp.constant(kinematics.POSTURE), wp.constant(kinematics.MAX_STEP)
_MAX_SHIFT, _MAX_TURN = wp.constant(kinematics.MAX_SHIFT), wp.constant(kinematics.MAX_TURN)
_REACH, _REACH_TURN = wp.constant(kinematics.REACH), wp.constant(kinematics.REACH_TURN)
_HISTORY, _TICKS = wp.constant(interpolation.HISTORY), wp.constant(interpolation.TICKS)
_PENDING, _ACTION = wp.constant(PENDING), wp.constant(ACTION)
_SMALL = wp.constant(1e-6)


@wp.struct
class Gripper:
    """A gripper's law (`twinrl.core.gripper.GripperKind`), its times in control steps."""

    binary: wp.bool
    close_below: float
    open_above: float
    step: float
    busy: int


@wp.func
def _shorten(vector: wp.vec3, limit: float) -> wp.vec3:
    return vector * wp.min(1.0, limit / wp.max(wp.length(vector), _SMALL))


@wp.func
def _exp(vector: wp.vec3) -> wp.mat33:
    angle = wp.length(vector)
    return wp.quat_to_matrix(wp.quat_from_axis_angle(vector / wp.max(angle, _SMALL), angle))


@wp.func
def _log(matrix: wp.mat33) -> wp.vec3:
    quat = wp.normalize(wp.quat_from_matrix(matrix))
    axis, w = wp.vec3(quat[0], quat[1], quat[2]), quat[3]
    if w < 0.0:
        axis, w = -axis, -w
    length = wp.length(axis)
    if length < _SMALL:
        return 2.0 * axis
    return axis * (2.0 * wp.atan2(length, w) / length)


@wp.func
def _chain(joints: Seven):
    """Joint origins and axes, the tool's position and orientation."""
    origins, axes = Points(), Points()
    origin = wp.vec3(0.0, 0.0, 0.0)
    x, y, z = wp.vec3(1.0, 0.0, 0.0), wp.vec3(0.0, 1.0, 0.0), wp.vec3(0.0, 0.0, 1.0)
    for i in range(7):
        origin = origin + x * _OFFSET_X[i] + y * _OFFSET_Y[i] + z * _OFFSET_Z[i]
        tilted = y * _COS[i] + z * _SIN[i]
        z = z * _COS[i] - y * _SIN[i]
        s, c = wp.sin(joints[i]), wp.cos(joints[i])
        y = tilted * c - x * s
        x = x * c + tilted * s
        origins[i] = origin
        axes[i] = z
    tool_x = x * _YAW_COS + y * _YAW_SIN
    tool_y = y * _YAW_COS - x * _YAW_SIN
    return origins, axes, origin + z * _TOOL_LENGTH, wp.matrix_from_cols(tool_x, tool_y, z)


@wp.func
def _tool(joints: Seven):
    """The tool's position and orientation."""
    _origins, _axes, tip, tool = _chain(joints)
    return tip, tool


@wp.func
def _solved(matrix: Square, right: Six) -> Six:
    """The solution of a symmetric positive definite system, by Cholesky's decomposition."""
    lower = Square()
    for j in range(6):
        pivot = matrix[j, j]
        for k in range(j):
            pivot -= lower[j, k] * lower[j, k]
        inverse = 1.0 / wp.sqrt(pivot)
        lower[j, j] = inverse  # the diagonal is kept inverted
        for i in range(j + 1, 6):
            rest = matrix[i, j]
            for k in range(j):
                rest -= lower[i, k] * lower[j, k]
            lower[i, j] = rest * inverse
    found = right
    for i in range(6):
        rest = found[i]
        for k in range(i):
            rest -= lower[i, k] * found[k]
        found[i] = rest * lower[i, i]
    for m in range(6):
        i = 5 - m
        rest = found[i]
        for k in range(i + 1, 6):
            rest -= lower[k, i] * found[k]
        found[i] = rest * lower[i, i]
    return found


@wp.func
def _towards(joints: Seven, position: wp.vec3, turn: wp.mat33) -> Seven:
    """One iteration of `kinematics.solve`."""
    origins, axes, tip, tool = _chain(joints)
    away, spin = position - tip, _log(turn @ wp.transpose(tool))
    error = Six(away[0], away[1], away[2], spin[0], spin[1], spin[2])
    normal = Square()
    for i in range(6):
        normal[i, i] = _DAMPING
    home = Seven()
    for j in range(7):
        axis = axes[j]
        lever = wp.cross(axis, tip - origins[j])
        column = Six(lever[0], lever[1], lever[2], axis[0], axis[1], axis[2])
        home[j] = _POSTURE * (_HOME[j] - joints[j])
        error -= column * home[j]
        normal += wp.outer(column, column)
    inner = _solved(normal, error)
    pull, twist = wp.vec3(inner[0], inner[1], inner[2]), wp.vec3(inner[3], inner[4], inner[5])
    found = Seven()
    for j in range(7):
        axis = axes[j]
        step = home[j] + wp.dot(wp.cross(axis, tip - origins[j]), pull) + wp.dot(axis, twist)
        step = wp.clamp(step, -_MAX_STEP, _MAX_STEP)
        found[j] = wp.clamp(joints[j] + step, _LOW[j], _HIGH[j])
    return found


@wp.func
def _opened(law: Gripper, wanted: float, commanded: float) -> float:
    """The opening that a free gripper is told."""
    if law.binary:
        if wanted < law.close_below:
            return 0.0
        if wanted > law.open_above:
            return 1.0
        return commanded
    if wanted == 0.0 or wanted == 1.0 or wp.abs(wanted - commanded) >= law.step - 1e-6:
        return wanted
    return commanded


@wp.kernel
def begin(
    ids: Ids,
    active: Flags,
    start: wp.array(dtype=Seven),
    late: wp.array(dtype=wp.int32),
    latency: wp.array(dtype=wp.int32),
    joints: wp.array2d(dtype=Seven),
    target: wp.array(dtype=wp.vec3),
    turn: wp.array(dtype=wp.mat33),
    pending_target: wp.array2d(dtype=wp.vec3),
    pending_turn: wp.array2d(dtype=wp.mat33),
    pending_gripper: wp.array2d(dtype=wp.float32),
    busy: wp.array(dtype=wp.int32),
    actions: wp.array2d(dtype=Seven),
):
    """Start episodes with joints `start`, whose commands reach the servos `late` steps later."""
    row = wp.tid()
    i = ids[row]
    if not active[i]:
        return
    latency[i] = wp.clamp(late[row], 0, _PENDING - 1)
    for m in range(_HISTORY):
        joints[i, m] = start[row]
    tip, tool = _tool(start[row])
    target[i] = tip
    turn[i] = tool
    for k in range(_PENDING):
        pending_target[i, k] = tip
        pending_turn[i, k] = tool
        pending_gripper[i, k] = 1.0
    busy[i] = 0
    rest = Seven()
    rest[6] = 1.0
    actions[i, 0] = rest
    actions[i, 1] = rest


@wp.kernel
def command(
    ids: Ids,
    active: Flags,
    wanted: wp.array(dtype=Seven),
    measured: wp.array(dtype=Seven),
    disturbance: wp.array(dtype=Six),
    low: wp.vec3,
    high: wp.vec3,
    law: Gripper,
    latency: wp.array(dtype=wp.int32),
    joints: wp.array2d(dtype=Seven),
    target: wp.array(dtype=wp.vec3),
    turn: wp.array(dtype=wp.mat33),
    pending_target: wp.array2d(dtype=wp.vec3),
    pending_turn: wp.array2d(dtype=wp.mat33),
    pending_gripper: wp.array2d(dtype=wp.float32),
    busy: wp.array(dtype=wp.int32),
    actions: wp.array2d(dtype=Seven),
    weights: wp.array2d(dtype=wp.float32),
    executed: wp.array(dtype=Seven),
    path: wp.array2d(dtype=Seven),
    opening: wp.array(dtype=wp.float32),
):
    """One control step: `wanted` actions move the commanded pose, joint targets `joints` (the newest first) follow it,
    and set-points `path` go from the last to the newest (`twinrl.core.interpolation`)."""
    row = wp.tid()
    i = ids[row]
    if not active[i]:
        return
    asked, unseen = wanted[row], disturbance[row]
    shift = _shorten(wp.vec3(asked[0], asked[1], asked[2]), _MAX_SHIFT)
    spin = _shorten(wp.vec3(asked[3], asked[4], asked[5]), _MAX_TURN)
    gripper = actions[i, 0][6]
    if busy[i] > 0:
        busy[i] = busy[i] - 1
    else:
        commanded = gripper
        gripper = _opened(law, wp.clamp(asked[6], 0.0, 1.0), commanded)
        if gripper != commanded:
            busy[i] = law.busy
    action = Seven(shift[0], shift[1], shift[2], spin[0], spin[1], spin[2], gripper)
    executed[row] = action
    actions[i, 1] = actions[i, 0]
    actions[i, 0] = action
    shift += wp.vec3(unseen[0], unseen[1], unseen[2])
    spin += wp.vec3(unseen[3], unseen[4], unseen[5])

    tip, tool = _tool(measured[row])
    there = tip + _shorten(target[i] + shift - tip, _REACH)
    there = wp.max(wp.min(there, high), low)
    # Rebuilt from the measured orientation in every step, it stays a rotation over any number of them.
    lead = _log(_exp(spin) @ turn[i] @ wp.transpose(tool))
    facing = _exp(_shorten(lead, _REACH_TURN)) @ tool
    target[i] = there
    turn[i] = facing
    for m in range(1, _PENDING):
        k = _PENDING - m
        pending_target[i, k] = pending_target[i, k - 1]
        pending_turn[i, k] = pending_turn[i, k - 1]
        pending_gripper[i, k] = pending_gripper[i, k - 1]
    pending_target[i, 0] = there
    pending_turn[i, 0] = facing
    pending_gripper[i, 0] = gripper

    late = latency[i]
    found = joints[i, 0]
    for _ in range(_ITERATIONS):
        found = _towards(found, pending_target[i, late], pending_turn[i, late])
    for m in range(1, _HISTORY):
        joints[i, _HISTORY - m] = joints[i, _HISTORY - m - 1]
    joints[i, 0] = found
    for k in range(_TICKS):
        point = Seven()
        for m in range(_HISTORY):
            point += weights[k, m] * joints[i, m]
        path[row, k] = point
    opening[row] = pending_gripper[i, late]


@wp.kernel
def observe(
    ids: Ids,
    active: Flags,
    tcp: wp.array(dtype=wp.vec3),
    tcp_turn: wp.array(dtype=wp.mat33),
    width: wp.array(dtype=wp.float32),
    disturbance: wp.array(dtype=Six),
    target: wp.array(dtype=wp.vec3),
    turn: wp.array(dtype=wp.mat33),
    actions: wp.array2d(dtype=Seven),
    state: wp.array(dtype=State),
):
    """What `observation.state` holds, of measured poses with noise."""
    row = wp.tid()
    i = ids[row]
    if not active[i]:
        return
    seen = State()
    tool = tcp_turn[row]
    down = wp.mat33(1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, -1.0)
    place, facing = tcp[row], _log(tool @ down)
    ahead, lead = target[i] - place, _log(turn[i] @ wp.transpose(tool))
    unseen = disturbance[row]
    for k in range(3):
        seen[k] = place[k] + unseen[k]
        seen[3 + k] = facing[k] + unseen[3 + k]
        seen[7 + k] = ahead[k]
        seen[10 + k] = lead[k]
    seen[6] = width[row]
    newest, earlier = actions[i, 0], actions[i, 1]
    for k in range(_ACTION):
        seen[13 + k] = newest[k]
        seen[13 + _ACTION + k] = earlier[k]
    state[row] = seen


@wp.kernel
def forward(
    joints: wp.array(dtype=Seven), tcp: wp.array(dtype=wp.vec3), turn: wp.array(dtype=wp.mat33)
):
    """Tool poses of joints."""
    row = wp.tid()
    tip, tool = _tool(joints[row])
    tcp[row] = tip
    turn[row] = tool


@wp.kernel
def noise(
    seed: wp.array(dtype=wp.int32),
    step: wp.array(dtype=wp.int32),
    spread: wp.array(dtype=wp.float32),
    stream: int,
    drawn: wp.array(dtype=Six),
):
    """Normal numbers, a function of seed, step and stream."""
    row = wp.tid()
    out = Six()
    if spread[row] > 0.0:
        state = wp.rand_init(seed[row], 2 * step[row] + stream)
        for k in range(3):
            out[k] = spread[row] * wp.randn(state)
        for k in range(3, 6):
            # A degree of angle goes with 3 mm of position.
            out[k] = 6.0 * spread[row] * wp.randn(state)
    drawn[row] = out
