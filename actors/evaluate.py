"""Evaluation: the deterministic policy on given resets, nothing recorded but what happened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from twinrl.core.errors import TwinRLError
from twinrl.env import Env, Observation

RETRIES = 3  # of an episode whose simulation fails


class Runner(Protocol):
    """What evaluation needs of a policy."""

    def infer(
        self, observation: Observation, instruction: Sequence[str], explore: bool
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Observations {key: (N, ...)}, an instruction for each -> action chunks (N, C, 7) float32 and `policy.*` columns."""


class Outcome(NamedTuple):
    """How the episodes ended, in the order of the configurations."""

    success: np.ndarray  # (n,) bool
    steps: np.ndarray  # (n,) int, control steps until success or the end
    configurations: list[dict[str, Any]]


def draw_configurations(env: Env, region: str, episodes: int, seed: int) -> list[dict[str, Any]]:
    """`episodes` reset configurations of a region; the same for the same seed and task."""
    drawn: list[dict[str, Any]] = []
    while len(drawn) < episodes:
        env.reset(seed=seed + len(drawn), options={"region": region})
        drawn += env.configurations()
    return drawn[:episodes]


def evaluate(env: Env, runner: Runner, configurations: list[dict[str, Any]]) -> Outcome:
    """One episode from each configuration, noise off. Refills environments as they finish."""
    n, total = env.num_envs, len(configurations)
    success, steps = np.zeros(total, bool), np.zeros(total, int)
    episode = np.full(n, -1)  # which configuration each environment plays, -1 for none
    waiting = list(range(total))
    observation: Observation = {}
    free = np.ones(n, bool)
    retries = np.zeros(total, int)
    while waiting or not free.all():
        mask = np.zeros(n, bool)
        for i in np.flatnonzero(free)[: len(waiting)]:
            episode[i], mask[i] = waiting.pop(0), True
        if mask.any():
            starts = [configurations[episode[i]] if mask[i] else None for i in range(n)]
            if (
                not observation
            ):  # fewer episodes than environments: the rest start, idle and are ignored
                filler = [start or configurations[0] for start in starts]
                observation, _ = env.reset(options={"configurations": filler})
            else:
                observation, _ = env.reset(options={"reset_mask": mask, "configurations": starts})
            free &= ~mask
        actions, _ = runner.infer(observation, env.instructions(), explore=False)
        step = env.step_chunk(actions)
        observation = step.observation
        playing = ~free
        steps[episode[playing]] += step.mask.sum(1)[playing]
        for i in np.flatnonzero(step.done & playing):
            success[episode[i]] = step.success[i].any()
            if step.invalid is not None and step.invalid[i]:
                # Its simulation failed, which says nothing about the policy: the episode is played again.
                retries[episode[i]] += 1
                if retries[episode[i]] > RETRIES:
                    raise TwinRLError(
                        f"the simulation failed {RETRIES + 1} times in one episode of evaluation, from "
                        f"{configurations[episode[i]]}"
                    )
                steps[episode[i]] = 0
                waiting.append(int(episode[i]))
        free |= step.done
    return Outcome(success, steps, configurations)
