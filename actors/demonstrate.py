"""Episodes without a policy: demonstrations by an expert, and their re-targeting to new placements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from actors.segmenter import Segmenter
from twinrl.env import Env

Teacher = Callable[[], tuple[np.ndarray, np.ndarray]]


def record_successes(
    env: Env,
    teacher: Teacher,
    segmenter: Segmenter,
    episodes: int,
    *,
    start: Callable[[np.ndarray], dict[str, Any]],
    max_attempts: int,
    on_begin: Callable[[np.ndarray], None] | None = None,
) -> tuple[int, int]:
    """Play until `episodes` succeeded; record only those. Returns (recorded, attempted).

    `teacher()` gives (executed, label) actions, each (N, 7), for the environments' present states.
    `start(mask)` gives the reset options for the environments in `mask`, `on_begin(mask)` hears that their
    episodes began. Frames are rendered at every step.
    """
    recorded = attempted = 0
    fresh = np.ones(env.num_envs, bool)
    while recorded < episodes and attempted < max_attempts:
        if fresh.any():
            observation, _ = env.reset(options={"reset_mask": fresh, **start(fresh)})
            segmenter.begin(observation, fresh)
            if on_begin is not None:
                on_begin(fresh)
        executed, label = teacher()
        step = env.step_chunk(executed[:, None])
        segmenter.add(step, extras={"label_action": label[:, None].astype("<f4")})
        fresh = step.done
        good = fresh & step.success.any(1)
        kept = np.zeros_like(good)
        kept[np.flatnonzero(good)[: episodes - recorded]] = True
        segmenter.cut(kept)
        segmenter.drop(fresh & ~kept)
        recorded += int(kept.sum())
        attempted += int(fresh.sum())
    return recorded, attempted
