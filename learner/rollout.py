"""From on-policy segments to the columns PPO trains on, one row for each policy chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from twinrl.core.segment import Segment
from twinrl.env import IMAGE_PREFIX, PRIVILEGED, STATE


class Rollout(NamedTuple):
    """M policy chunks in order of time within each segment; chunk m executed L_m steps."""

    observation: dict[str, np.ndarray]  # images (M, H, W, 3) and state (M, S) at each chunk's start
    instruction: list[str]
    critic: np.ndarray  # (M, P + S) float32 at the start: privileged state and proprioception
    next_critic: np.ndarray  # (M, P + S) float32 after the last executed step
    path: np.ndarray  # (M, K+1, D) float32, raw
    log_prob: np.ndarray  # (M,) float32, of the policy that acted
    version: np.ndarray  # (M,) int64, of the policy that acted
    reward: np.ndarray  # (M,) float32, sum over the chunk of gamma^i r_i
    discount: np.ndarray  # (M,) float32, gamma^L
    terminated: np.ndarray  # (M,) bool
    chained: np.ndarray  # (M,) bool: row m + 1 continues this episode


def rollout(segments: Sequence[Segment], gamma: float) -> Rollout:
    """Columns of all chunks of `segments`; gamma is per control step.

    Two consecutive segments of an episode are chained, so that cutting an episode costs no advantage.
    """
    parts = [_segment_rollout(segment, gamma) for segment in segments]
    for (header, columns), part, (after, _) in zip(segments, parts, segments[1:], strict=False):
        follows = after["first_step"] == header["first_step"] + len(columns["reward"])
        part["chained"][-1] = follows and after["episode"] == header["episode"]
    joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    images = {key: joined.pop(key) for key in list(joined) if key.startswith(IMAGE_PREFIX)}
    observation = {**images, STATE: joined.pop(STATE)}
    instruction = [
        segment.header["instruction"]
        for segment, part in zip(segments, parts, strict=True)
        for _ in range(len(part["path"]))
    ]
    return Rollout(observation, instruction, **joined)


def _segment_rollout(segment: Segment, gamma: float) -> dict[str, np.ndarray]:
    columns = segment.columns
    start = columns["chunk_step"]
    steps = len(columns["reward"])
    end = np.append(start[1:], steps)  # a chunk runs until the next begins
    length = end - start
    inside = np.arange(steps) - np.repeat(start, length)
    images = {key: column for key, column in columns.items() if key.startswith(IMAGE_PREFIX)}
    if images:
        frame = np.searchsorted(columns["frame_step"], start)
        if frame[-1] >= len(columns["frame_step"]) or (columns["frame_step"][frame] != start).any():
            raise ValueError(
                f"segment of {segment.header['episode']!r}: a policy chunk starts without a frame"
            )
        images = {key: column[frame] for key, column in images.items()}
    # Proprioception tells the critic what is commanded but not yet done, which privileged state may lack.
    critic = np.concatenate([columns[PRIVILEGED], columns[STATE]], axis=1)
    return {
        **images,
        STATE: columns[STATE][start],
        "critic": critic[start],
        "next_critic": critic[end],
        "path": columns["policy.path"],
        "log_prob": columns["policy.log_prob"],
        "version": columns["policy_version"][start],
        "reward": np.add.reduceat(gamma**inside * columns["reward"], start).astype(np.float32),
        "discount": (gamma**length).astype(np.float32),
        "terminated": columns["terminated"][end - 1],
        "chained": np.arange(len(start)) < len(start) - 1,
    }


def gae(
    reward: np.ndarray,
    discount: np.ndarray,
    value: np.ndarray,
    next_value: np.ndarray,
    terminated: np.ndarray,
    chained: np.ndarray,
    lam: float,
) -> np.ndarray:
    """Generalised advantage estimation over chunks -> (M,) float32.

    delta_m = R_m + gamma^L V(s_{m+1}) (1 - terminated) - V(s_m);  A_m = delta_m + gamma^L lam A_{m+1} where row
    m + 1 continues the episode. A truncated episode bootstraps from the value of its final observation: running out
    of time says nothing about the state.
    """
    delta = reward + discount * next_value * ~terminated - value
    advantage = np.zeros_like(delta)
    following = 0.0
    for m in reversed(range(len(delta))):
        following = delta[m] + (discount[m] * lam * following if chained[m] else 0.0)
        advantage[m] = following
    return advantage
