"""Warp kernels that keep a world that fails from disturbing the others; a thread is a world."""

from __future__ import annotations

import warp as wp

wp.set_module_options({"enable_backward": False})

Rows = wp.array2d(dtype=wp.float32)
Flags = wp.array(dtype=wp.bool)
Counts = wp.array(dtype=wp.int32)


@wp.func
def _is_sound(world: int, qpos: Rows, qvel: Rows, farthest: float, fastest: float) -> bool:
    # Comparisons with something that is not a number are false.
    for i in range(qpos.shape[1]):
        if not (wp.abs(qpos[world, i]) < farthest):
            return False
    for i in range(qvel.shape[1]):  # noqa: SIM110  (warp knows no generators)
        if not (wp.abs(qvel[world, i]) < fastest):
            return False
    return True


@wp.func
def _copy(world: int, source: Rows, to: Rows):
    for i in range(to.shape[1]):
        to[world, i] = source[world, i]


@wp.kernel
def begin(
    qpos: Rows,
    qvel: Rows,
    warmstart: Rows,
    safe_qpos: Rows,
    safe_qvel: Rows,
    safe_warmstart: Rows,
    farthest: float,
    fastest: float,
    diverged: Flags,
    overflow: Counts,
):
    """Remember the state before a control step."""
    world = wp.tid()
    overflow[world] = 0
    if _is_sound(world, qpos, qvel, farthest, fastest):
        diverged[world] = False
        _copy(world, qpos, safe_qpos)
        _copy(world, qvel, safe_qvel)
        _copy(world, warmstart, safe_warmstart)
    else:
        diverged[world] = True
        _copy(world, safe_qpos, qpos)
        _copy(world, safe_qvel, qvel)
        _copy(world, safe_warmstart, warmstart)


@wp.kernel
def guard(
    qpos: Rows,
    qvel: Rows,
    warmstart: Rows,
    safe_qpos: Rows,
    farthest: float,
    fastest: float,
    contacts: Counts,
    constraints: Counts,
    peak: Counts,
    diverged: Flags,
):
    """Put a world whose state is absurd or not a number back at once: its contacts would crowd out the others'."""
    world = wp.tid()
    if world == 0:
        wp.atomic_max(peak, 0, contacts[0])
    wp.atomic_max(peak, 1, constraints[world])
    if not _is_sound(world, qpos, qvel, farthest, fastest):
        diverged[world] = True
        _copy(world, safe_qpos, qpos)
        for i in range(qvel.shape[1]):
            qvel[world, i] = 0.0
            warmstart[world, i] = 0.0


@wp.kernel
def settle(
    active: Flags,
    overflow: Counts,
    mask: int,
    diverged: Flags,
    safe_qpos: Rows,
    safe_qvel: Rows,
    safe_warmstart: Rows,
    qpos: Rows,
    qvel: Rows,
    warmstart: Rows,
    spilled: Counts,
):
    """Undo the step of worlds that do not take part or failed in it."""
    world = wp.tid()
    over = overflow[world] & mask
    if active[world] and over != 0:
        spilled[world] = spilled[world] | over
        diverged[world] = True
    if active[world] and not diverged[world]:
        return
    _copy(world, safe_qpos, qpos)
    _copy(world, safe_qvel, qvel)
    _copy(world, safe_warmstart, warmstart)


@wp.kernel
def blank(chosen: Flags, rows: Rows):
    """Write zeros to the rows of chosen worlds."""
    world, i = wp.tid()
    if chosen[world]:
        rows[world, i] = 0.0
