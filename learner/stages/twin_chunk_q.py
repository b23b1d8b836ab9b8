"""Stage 2 by off-policy RL: for simulators whose steps are dear, as each is learned from many times.

The twins collect as they do for PPOFlow, with the same noise and never waiting for updates beyond the stated lag; the
learner makes a fixed number of updates for each control step, from batches of demonstrations and of all that the twins
did.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from buffer_service.client import Prefetcher
from learner.algorithms.chunk_q import ChunkQ, ChunkQConfig
from learner.algorithms.sft import ImitationData
from learner.dataset import windows
from learner.features import FeatureCache, with_ids
from learner.learner import Learner
from learner.settings import make_settings
from learner.stages.self_imitation import successful_episodes
from learner.stages.twin_rl import CALIBRATION, CURSOR, shown, success_share, take
from twinrl.core.segment import Segment

ANY_LAG = 10**9  # versions: old data are as good as new


@dataclass(frozen=True)
class TwinChunkQConfig(ChunkQConfig):
    """Settings of the stage, beside the algorithm's."""

    updates_per_step: float = 0.05  # for each control step of a twin
    batch_size: int = 256  # windows
    mix: Mapping[str, float] = field(default_factory=lambda: {"demo": 0.25, "twin": 0.75})


def twin_chunk_q(
    learner: Learner,
    *,
    start: str,
    name: str,
    privileged_dim: int,
    steps: int,
    segments: int,
    max_lag: int,
    action_noise: float,
    options: dict[str, Any],
) -> dict[str, Any]:
    """ChunkQ from checkpoint `start` on until `steps` transitions were consumed; checkpoint `name`.

    Arguments as of the stage "twin_rl", of which `privileged_dim` and `max_lag` mean nothing here: critics see what the
    policy sees, and no data is too old. An interrupted stage starts over.
    """
    config = make_settings(TwinChunkQConfig, options, "twin_rl.options")
    learner.restore(start)
    policy, reader = learner.policy, learner.reader
    reader.sync()
    imitation = ImitationData(
        policy, windows(shown(learner), policy.chunk), {"demo": 0.25, "twin": 0.75}
    )
    policy.flow.calibrate_noise(
        imitation.features[:CALIBRATION], policy.integration_steps, learner.seed, action_noise
    )
    algorithm = ChunkQ(policy, config, FeatureCache(policy, learner.instruction), learner.seed)
    cursor = reader.cursor(CURSOR, source="twin")
    cursor.pass_by()
    learner.publish()
    open_episodes: dict[str, list[Segment]] = defaultdict(list)
    consumed = iterations = 0
    mix = dict(config.mix)
    with Prefetcher(reader, config.batch_size, mix=mix, chunk=algorithm.window) as batches:
        while consumed < steps and not learner.stopping:
            taken = take(learner, cursor, segments, ANY_LAG)
            if not taken:
                break
            consumed += sum(segment.steps for segment in taken)
            iterations += 1
            finished = successful_episodes(taken, open_episodes)
            if finished:
                imitation.extend(policy, windows(finished, policy.chunk))
            metrics = {"success": success_share(taken)}
            while algorithm.step < config.updates_per_step * consumed and not learner.stopping:
                batch = with_ids(next(batches))
                learner.data_waited += batches.last_wait_s
                metrics |= algorithm.update(batch, imitation)
                learner.note(metrics, consumed / steps)
            learner.publish()
    learner.save(name)
    cursor.commit()
    return {"iterations": iterations, "transitions": consumed, "updates": algorithm.step}
