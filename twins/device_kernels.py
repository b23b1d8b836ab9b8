"""Warp kernels that keep a world that fails from disturbing the others; a thread is a world."""

from __future__ import annotations

import warp as wp

wp.set_module_options({"enable_backward": False})


@wp.kernel
def guard(
    qpos: wp.array2d(dtype=wp.float32),
    qvel: wp.array2d(dtype=wp.float32),
    warmstart: wp.array2d(dtype=wp.float32),
    safe: wp.array2d(dtype=wp.float32),
    farthest: float,
    fastest: float,
    contacts: wp.array(dtype=wp.int32),
    constraints: wp.array(dtype=wp.int32),
    peak: wp.array(dtype=wp.int32),
    diverged: wp.array(dtype=wp.bool),
):
    """Put a world whose state is absurd or not a number back at once: its contacts would crowd out the others'."""
    world = wp.tid()
    if world == 0:
        wp.atomic_max(peak, 0, contacts[0])
    wp.atomic_max(peak, 1, constraints[world])
    sound = wp.bool(True)  # a plain True would be a constant
    for i in range(qpos.shape[1]):
        # Comparisons with something that is not a number are false.
        if not (wp.abs(qpos[world, i]) < farthest):
            sound = False
    for i in range(qvel.shape[1]):
        if not (wp.abs(qvel[world, i]) < fastest):
            sound = False
    if not sound:
        diverged[world] = True
        for i in range(qpos.shape[1]):
            qpos[world, i] = safe[world, i]
        for i in range(qvel.shape[1]):
            qvel[world, i] = 0.0
            warmstart[world, i] = 0.0


@wp.kernel
def settle(
    active: wp.array(dtype=wp.bool),
    overflow: wp.array(dtype=wp.int32),
    mask: int,
    diverged: wp.array(dtype=wp.bool),
    safe_qpos: wp.array2d(dtype=wp.float32),
    safe_qvel: wp.array2d(dtype=wp.float32),
    safe_warmstart: wp.array2d(dtype=wp.float32),
    qpos: wp.array2d(dtype=wp.float32),
    qvel: wp.array2d(dtype=wp.float32),
    warmstart: wp.array2d(dtype=wp.float32),
    spilled: wp.array(dtype=wp.int32),
):
    """Undo the step of worlds that do not take part or failed in it."""
    world = wp.tid()
    over = overflow[world] & mask
    if active[world] and over != 0:
        spilled[world] = spilled[world] | over
        diverged[world] = True
    if active[world] and not diverged[world]:
        return
    for i in range(qpos.shape[1]):
        qpos[world, i] = safe_qpos[world, i]
    for i in range(qvel.shape[1]):
        qvel[world, i] = safe_qvel[world, i]
        warmstart[world, i] = safe_warmstart[world, i]
