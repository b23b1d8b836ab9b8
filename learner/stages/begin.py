"""In place of stage 1 where nobody shows anything: a policy that knows ranges, plays at random, and explores."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner.features import encode
from learner.learner import Learner
from learner.optimiser import Optimiser
from policies.policy import Policy
from twinrl.env import STATE

CALIBRATION = 512  # observations on which the exploration noise is set
NOISE_WIDTH = (
    2.0  # of the noise head's band: from scratch noise starts large and has to be able to fall
)
UPDATES, BATCH, LEARNING_RATE = 200, 256, 3e-3  # of fitting random play


def begin(
    learner: Learner,
    *,
    name: str,
    observation: dict[str, np.ndarray],
    action_low: np.ndarray,
    action_high: np.ndarray,
    action_noise: float,
) -> dict[str, Any]:
    """Fit the untrained policy to observations of random play {key: (N, ...)}, and to the actions' range (A,).

    Publishes it and leaves checkpoint `name`. Its encoder stays untrained: what it learns, it learns from the state.
    """
    policy = learner.policy
    policy.fit_begin(observation[STATE], action_low, action_high)
    features = encode(policy, observation, learner.instruction)
    reached = prepare(policy, features, learner.seed, action_noise)
    learner.publish()
    learner.save(name)
    return {"observations": len(features), "action_noise": reached}


def prepare(policy: Policy, features: Tensor, seed: int, action_noise: float) -> float:
    """Make the untrained flow one over the whole range of actions, and set its exploration; -> the action noise.

    An untrained field hands the integration's first noise through to the action, and RL would first have to learn to
    undo that. So the flow is fitted to uniformly random normalised chunks on `features` (N, ...): K = 1 then begins in
    the middle of the range, larger K with random play.
    """
    generator, steps = torch.Generator().manual_seed(seed), policy.integration_steps
    optimiser = Optimiser(
        policy.flow.parameters(), LEARNING_RATE, clip=1.0, schedule=lambda step: 1 - step / UPDATES
    )
    for _ in range(UPDATES):
        rows = torch.randint(len(features), (BATCH,), generator=generator)
        chunk = 2 * torch.rand((BATCH, policy.flow.dim), generator=generator) - 1
        # Only at the times at which it will be asked.
        t = torch.randint(steps, (BATCH, 1, 1), generator=generator) / steps
        eps = policy.flow.start((BATCH, 1, policy.flow.dim), features, generator)
        points = t.to(policy.device), eps
        mask = torch.ones_like(chunk).to(policy.device)
        loss = policy.flow.matching_loss(
            features[rows], chunk.to(policy.device), mask, points=points
        )
        optimiser.step(loss.mean())
    rows = torch.randperm(len(features), generator=generator)[:CALIBRATION]
    return policy.flow.calibrate_noise(
        features[rows], policy.integration_steps, seed, action_noise, width=NOISE_WIDTH
    )
