"""The Env seam: how actors, evaluation and the bridge reach any environment.

An environment is a `gymnasium.vector.VectorEnv` with autoreset DISABLED (the caller resets, with a mask)
plus `step_chunk`, which executes an action chunk and renders images once, at its end.
"""

from __future__ import annotations

from typing import Any, Dict, NamedTuple, Protocol

import numpy as np

Observation = Dict[str, np.ndarray]  # Python 3.8, where simulators of their own import this

STATE = "observation.state"
PRIVILEGED = "privileged.state"
IMAGE_PREFIX = "observation.images."
ACTION_DIM = 7


def image_key(camera: str) -> str:
    """The observation key of a camera, in LeRobot's naming."""
    return IMAGE_PREFIX + camera


class ChunkStep(NamedTuple):
    """What executing an action chunk of C control steps in N environments gave.

    An environment that ends inside the chunk stops there: later rows of its `mask` are False and the
    other arrays hold zeros in those rows. `observation` is the one after each environment's last executed step
    (the terminal one where the episode ended): a reset never overwrites it.
    """

    observation: (
        Observation  # {key: (N, ...)}: images uint8 HWC, state float32, privileged.state float32
    )
    states: np.ndarray  # (N, C, S) float32, observation.state after each step
    privileged: (
        np.ndarray | None
    )  # (N, C, P) float32, privileged.state after each step; None on a real arm
    action: np.ndarray  # (N, C, 7) float32, what was executed
    reward: np.ndarray  # (N, C) float32
    terminated: (
        np.ndarray
    )  # (N, C) bool, the task ended the episode (success or an irrecoverable failure)
    truncated: np.ndarray  # (N, C) bool, the time limit ended it; never both in one step
    success: np.ndarray  # (N, C) bool
    mask: np.ndarray  # (N, C) bool, the step was executed
    invalid: np.ndarray | None = (
        None  # (N,) bool, the simulation failed and the episode's unsent part is void; None: nowhere
    )

    @property
    def done(self) -> np.ndarray:
        """(N,) bool: the episode ended within this chunk, or its simulation failed."""
        ended = (self.terminated | self.truncated).any(axis=1)
        return ended if self.invalid is None else ended | self.invalid


class EnvSpec(NamedTuple):
    """What can be known of an environment before it exists: a job's schema and policy follow from it."""

    state_names: tuple[str, ...]  # a name for each number of observation.state
    privileged_names: tuple[
        str, ...
    ]  # of privileged.state; empty where nothing privileged is known
    cameras: tuple[str, ...]
    image_size: int  # height = width, pixels
    instruction: str  # what the task is about; an episode's own may say more (Env.instructions)
    max_steps: int  # control steps until truncation
    control_hz: float
    expert: bool  # it has a scripted expert
    placed: str | None = None  # key of a configuration whose x and y a map of results shows
    regions: tuple[str, ...] = ("id", "ood")  # where resets draw from, beside "all"


class Env(Protocol):
    """N environments of one task. Seeds make trajectories repeatable bit for bit on one machine."""

    num_envs: int
    cameras: tuple[str, ...]
    image_size: int  # height = width, pixels
    state_dim: int
    privileged_dim: int  # 0 where nothing privileged is known
    instruction: str  # what the task is about
    max_steps: int  # control steps until truncation
    control_hz: float

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Reset the environments in `options["reset_mask"]` ((N,) bool; all when absent).

        `options["configurations"]`: a list of N configurations (None = draw one), `options["region"]`:
        "id", "ood" or "all", where to draw from. Observations of the others are returned unchanged.
        """

    def step_chunk(self, actions: np.ndarray) -> ChunkStep:
        """Execute `actions` (N, C, 7) float32. Environments that are done stay untouched (mask all False)."""

    def configurations(self) -> list[dict[str, Any]]:
        """The configuration of each environment's present episode; passing one to `reset` repeats it."""

    def instructions(self) -> list[str]:
        """N, what the policy is told in each environment's present episode.

        Where it differs between episodes it is drawn by a reset, and part of the configuration. A task that always
        asks for the same gives `instruction` N times.
        """

    def close(self) -> None: ...
