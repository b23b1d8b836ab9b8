"""From on-policy segments to the columns PPO trains on, one row for each policy chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from twinrl.core.segment import Segment
from twinrl.env import IMAGE_PREFIX, PRIVILEGED, STATE


class Rollout(NamedTuple):
    """M policy chunks in order of time within each segment; chunk m executed L_m steps."""

    observation: dict[str, np.ndarray]  # images (M, H, W, 3) and state (M, S) at each chunk's start
    final: dict[str, np.ndarray]  # the same keys, one row for each segment: after its last step
    last: (
        np.ndarray
    )  # (M,) bool: the chunk is its segment's last, so that a row of `final` follows it
    instruction: list[str]
    final_instruction: list[str]
    critic: np.ndarray  # (M, P + S) float32 at the start: privileged state and proprioception
    next_critic: np.ndarray  # (M, P + S) float32 after the last executed step
    path: np.ndarray  # (M, K+1, D) float32, raw
    log_prob: np.ndarray  # (M,) float32, of the policy that acted
    version: np.ndarray  # (M,) int64, of the policy that acted
    reward: np.ndarray  # (M,) float32, sum over the chunk of gamma^i r_i
    length: np.ndarray  # (M,) int64, L: how many of the chunk's actions were executed
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
    final = [part.pop("final") for part in parts]
    joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    observation = {key: joined.pop(key) for key in final[0]}
    said = [segment.header["instruction"] for segment in segments]
    return Rollout(
        observation=observation,
        final={key: np.stack([row[key] for row in final]) for key in final[0]},
        instruction=[
            text for text, part in zip(said, parts, strict=True) for _ in range(len(part["path"]))
        ],
        final_instruction=said,
        **joined,
    )


def _segment_rollout(segment: Segment, gamma: float) -> dict[str, Any]:
    columns = segment.columns
    start = columns["chunk_step"]
    steps = len(columns["reward"])
    end = np.append(start[1:], steps)  # a chunk runs until the next begins
    length = end - start
    inside = np.arange(steps) - np.repeat(start, length)
    seen = {STATE: columns[STATE][np.append(start, steps)]}
    images = {key: column for key, column in columns.items() if key.startswith(IMAGE_PREFIX)}
    if images:
        frames = columns["frame_step"]
        frame = np.searchsorted(frames, np.append(start, steps))
        if frame[-2] >= len(frames) or (frames[frame[:-1]] != start).any():
            raise ValueError(
                f"segment of {segment.header['episode']!r}: a policy chunk starts without a frame"
            )
        if frame[-1] >= len(frames):
            raise ValueError(f"segment of {segment.header['episode']!r} ends without a frame")
        seen |= {key: column[frame] for key, column in images.items()}
    # Proprioception tells the critic what is commanded but not yet done, which privileged state may lack.
    critic = columns[STATE]
    if PRIVILEGED in columns:
        critic = np.concatenate([columns[PRIVILEGED], critic], axis=1)
    return {
        **{key: rows[:-1] for key, rows in seen.items()},
        "final": {key: rows[-1] for key, rows in seen.items()},
        "last": np.arange(len(start)) == len(start) - 1,
        "critic": critic[start],
        "next_critic": critic[end],
        "path": columns["policy.path"],
        "log_prob": columns["policy.log_prob"],
        "version": columns["policy_version"][start],
        "reward": np.add.reduceat(gamma**inside * columns["reward"], start).astype(np.float32),
        "length": length.astype(np.int64),
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
    carried = (discount * lam * chained).tolist()
    advantage, following = delta.tolist(), 0.0
    for m in reversed(range(len(delta))):
        following = advantage[m] = advantage[m] + carried[m] * following
    return np.array(advantage, np.float32)
