"""A control for stage 2: the policy clones its own successes in the twins, without a critic and without failures.

The same rollouts as PPOFlow's, streamed in the same way and as many; of a success all executed actions are cloned
(filtered behaviour cloning). What PPOFlow gains beyond it, it has from telling better from worse.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from learner.algorithms.sft import ImitationData
from learner.dataset import windows
from learner.learner import Learner
from learner.optimiser import Optimiser
from learner.settings import make_settings
from learner.stages.twin_rl import CALIBRATION, CURSOR, shown, success_share, take
from twinrl.core.segment import Segment


@dataclass(frozen=True)
class SelfImitationConfig:
    """Settings of self-imitation."""

    learning_rate: float = 1e-4
    updates: int = 32  # gradient steps an iteration
    batch: int = 256  # windows of successes a step
    memory: int = 8  # iterations whose successes are cloned
    anchor: float = 0.1  # weight of flow matching on demonstrations, as in PPOFlow
    anchor_batch: int = 64
    gradient_norm: float = 1.0


def self_imitation(
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
    """Clone successes from checkpoint `start` on until `steps` transitions were consumed; checkpoint `name`.

    Arguments as of the stage "twin_rl". An interrupted stage starts over.
    """
    config = make_settings(SelfImitationConfig, options, "twin_rl.options")
    learner.restore(start)
    policy, reader = learner.policy, learner.reader
    reader.sync()
    data = windows(shown(learner), policy.chunk)
    anchor = ImitationData(policy, data, {"demo": 0.5, "twin": 0.5})
    policy.flow.calibrate_noise(
        anchor.features[:CALIBRATION], policy.integration_steps, learner.seed, action_noise
    )
    parameters = list(policy.flow.parameters())
    optimiser = Optimiser(parameters, config.learning_rate, clip=config.gradient_norm)
    generator = torch.Generator().manual_seed(learner.seed)
    cursor = reader.cursor(CURSOR, source="twin")
    cursor.pass_by()
    learner.publish()
    open_episodes: dict[str, list[Segment]] = defaultdict(list)
    successes: list[ImitationData] = []
    consumed = iterations = 0
    while consumed < steps and not learner.stopping:
        taken = take(learner, cursor, segments, max_lag)
        if not taken:
            break
        consumed += sum(segment.steps for segment in taken)
        iterations += 1
        metrics = {"success": success_share(taken)}
        finished = successful_episodes(taken, open_episodes)
        if finished:
            cloned = windows(finished, policy.chunk)
            successes.append(ImitationData(policy, cloned, {"twin": 1.0}))
            successes = successes[-config.memory :]
        if successes:
            for _ in range(config.updates):
                recent = successes[int(torch.randint(len(successes), (), generator=generator))]
                loss = recent.loss(policy.flow, config.batch, 1, generator)
                shown_loss = anchor.loss(policy.flow, config.anchor_batch, 1, generator)
                optimiser.step(loss + config.anchor * shown_loss)
            metrics |= {
                "flow_loss": float(loss.detach()),
                "anchor_loss": float(shown_loss.detach()),
            }
        learner.publish()
        learner.note(metrics, consumed / steps)
    learner.save(name)
    cursor.commit()
    return {"iterations": iterations, "transitions": consumed}


def successful_episodes(
    taken: list[Segment], open_episodes: dict[str, list[Segment]]
) -> list[Segment]:
    """All segments of the episodes that have ended in success; those of unfinished ones are kept for later."""
    finished: list[Segment] = []
    for segment in taken:
        episode = segment.header["episode"]
        open_episodes[episode].append(segment)
        if segment.header["last"]:
            whole = open_episodes.pop(episode)
            if bool(np.any(segment.columns["success"])):
                finished += whole
    return finished
