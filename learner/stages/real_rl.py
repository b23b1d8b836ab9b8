"""Stage 3: off-policy RL on demonstrations, twin data and what the arm does, with chunk critics; or imitation alone."""

from __future__ import annotations

import time
from typing import Any

from buffer_service.client import Prefetcher
from learner.algorithms.chunk_q import ChunkQ, ChunkQConfig
from learner.algorithms.sft import ImitationData
from learner.dataset import CLONED_SHARES, windows
from learner.features import FeatureCache, with_ids
from learner.learner import Learner
from learner.pace import HOLD_SECONDS, Pace
from learner.settings import make_settings
from twinrl.core.segment import Segment

CHECKPOINT_SECONDS = 20.0
IDLE = 0.05  # s between looks for new transitions
DRAIN_SECONDS = 60.0  # for the updates that are due when the arm has left
TWIN_SEGMENTS = 1000  # newest of stage 2 of which the successes are cloned


def real_rl(
    learner: Learner,
    *,
    start: str,
    name: str,
    updates_per_step: float,
    publish_every: int,
    batch_size: int,
    mix: dict[str, float],
    options: dict[str, Any],
    max_lag: int = 10,
    hold_s: float = HOLD_SECONDS,
) -> dict[str, Any]:
    """ChunkQ from checkpoint `start` until stopped; checkpoint `name`.

    `updates_per_step` updates are made for each real transition, however fast the arm's clock runs: a fast
    simulated arm gives the learner no extra time, and a slow learner makes them after the arm has left. The
    `offline_updates` of `options` come before, on demonstrations and twin data. While the policy that acts for the arms is
    more than `max_lag` versions behind, a version waits, for `hold_s` seconds at most (learner/pace.py).
    """
    resumed = learner.has(f"{name}-running")
    state = learner.restore(f"{name}-running" if resumed else start)
    policy, reader = learner.policy, learner.reader
    config = make_settings(ChunkQConfig, options, "real_rl.options")
    algorithm = ChunkQ(policy, config, FeatureCache(policy, learner.instruction), learner.seed)
    if resumed:
        algorithm.load_state_dict(state["chunk_q"])
    imitation = _Imitation(learner, people_only=config.improvement == "none")
    learner.publish()
    pace = Pace(max_lag, hold_s)
    with Prefetcher(reader, batch_size, mix=mix, chunk=algorithm.window) as batches:
        updates, due = _train(
            learner, algorithm, imitation, batches, name, updates_per_step, publish_every, pace
        )
    learner.publish()
    learner.save(name, {"chunk_q": algorithm.state_dict()})
    return {"updates": updates, "real_transitions": imitation.real_steps, "due": due}


def _train(
    learner: Learner,
    algorithm: ChunkQ,
    imitation: _Imitation,
    batches: Prefetcher,
    name: str,
    updates_per_step: float,
    publish_every: int,
    pace: Pace,
) -> tuple[int, int]:
    """Update until the stage is stopped; returns how many updates were made in all, and how many were due."""
    updates, saved, leaving = algorithm.step, time.monotonic(), None
    while True:
        for id, segment in imitation.refresh():
            algorithm.cache.add(id, segment)
        due = algorithm.config.offline_updates + int(updates_per_step * imitation.real_steps)
        if learner.stopping:
            leaving = leaving or time.monotonic()
            if updates >= due or time.monotonic() - leaving > DRAIN_SECONDS:
                break
        if pace.publishes(learner.acting_lag):
            learner.publish()
            learner.held_versions = pace.held
        if updates >= due:
            time.sleep(IDLE)
            continue
        batch = with_ids(next(batches))
        learner.data_waited += batches.last_wait_s
        metrics = algorithm.update(batch, imitation.data)
        updates += 1
        learner.note(metrics, updates / max(due, 1))
        if updates % publish_every == 0:
            pace.due()
        if time.monotonic() - saved > CHECKPOINT_SECONDS or learner.checkpoint_asked():
            saved = time.monotonic()
            learner.save(f"{name}-running", {"chunk_q": algorithm.state_dict()})
    return updates, due


class _Imitation:
    """What is worth cloning: demonstrations, expansion, what stage 2 achieved last in randomised twins, and of the
    arm's episodes what a person did or what succeeded; with `people_only` (HG-DAgger) of the latter only what a
    person did. Without stage 2's own successes the first two would pull the policy back to stage 1. Grows as episodes
    arrive; only new windows are encoded."""

    def __init__(self, learner: Learner, people_only: bool) -> None:
        self._learner, self._people_only = learner, people_only
        self._seen: set[int] = set()
        learner.reader.sync()
        self.real_steps = 0
        reader = learner.reader
        entries = reader.entries(source="twin")
        shown = [e for e in entries if e.version < 0]  # by no policy: the expansion
        acted = [e for e in entries if e.version >= 0][-TWIN_SEGMENTS:]
        segments = [
            *reader.segments(source="demo"),
            *(s for s in reader.load(shown + acted) if s is not None),
        ]
        data = windows(segments, learner.policy.chunk)
        self.data = ImitationData(learner.policy, data, CLONED_SHARES)

    def refresh(self) -> list[tuple[int, Segment]]:
        """Take in the segments that arrived meanwhile; -> each with its id."""
        reader = self._learner.reader
        entries = [e for e in reader.entries(source="real") if e.id not in self._seen]
        if not entries:
            return []
        loaded = zip(entries, reader.load(entries), strict=True)
        arrived = [(entry.id, segment) for entry, segment in loaded if segment is not None]
        segments = [segment for _, segment in arrived]
        self._seen.update(entry.id for entry in entries)
        self.real_steps += sum(segment.steps for segment in segments)
        if self._people_only:
            segments = [s for s in segments if s.columns["intervention"].any()]
        try:
            fresh = windows(segments, self._learner.policy.chunk)
        except ValueError:  # nothing in them may be cloned
            return arrived
        self.data.extend(self._learner.policy, fresh)
        return arrived
