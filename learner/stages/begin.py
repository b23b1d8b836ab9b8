"""In place of stage 1 where nobody shows anything: a policy that knows ranges, and explores."""

from __future__ import annotations

from typing import Any

import numpy as np

from learner.features import encode
from learner.learner import Learner
from twinrl.env import STATE

CALIBRATION = 512  # observations on which the exploration noise is set


def begin(
    learner: Learner,
    *,
    name: str,
    observation: dict[str, np.ndarray],
    action_low: np.ndarray,
    action_high: np.ndarray,
    action_noise: float,
) -> dict[str, Any]:
    """Fit the untrained policy to observations of random play {key: (N, ...)}, and to the actions' range (7,).

    Publishes it and leaves checkpoint `name`. Its encoder stays untrained: what it learns, it learns from the state.
    """
    policy = learner.policy
    policy.fit_begin(observation[STATE], action_low, action_high)
    features = encode(policy, observation, learner.instruction)
    order = np.random.default_rng(learner.seed).permutation(len(features))[:CALIBRATION]
    reached = policy.flow.calibrate_noise(
        features[order], policy.integration_steps, learner.seed, action_noise
    )
    learner.publish()
    learner.save(name)
    return {"observations": len(features), "action_noise": reached}
