"""From segments to imitation windows: which steps may be cloned, and the chunk that starts at each frame."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from twinrl.core.checksum import digest
from twinrl.core.segment import SOURCES, Segment
from twinrl.env import ACTION_DIM, IMAGE_PREFIX, STATE

FEWEST_EPISODES = 10  # of which some are held out
TAKEOVER = "takeover"
# What has a share of its own: a source, and a person's part of "real".
GROUPS = (*SOURCES, TAKEOVER)
# What is cloned while a person helps: takeovers keep a share of their own, for the policy's own successes soon outnumber
# what people corrected.
CLONED_SHARES = {"demo": 0.2, "twin": 0.25, "real": 0.25, TAKEOVER: 0.3}


@dataclass
class Windows:
    """N imitation examples: what was seen, and the C actions a demonstrator took from there on."""

    images: dict[str, np.ndarray]  # {"observation.images.<camera>": (N, H, W, 3) uint8}
    state: np.ndarray  # (N, S) float32
    action: np.ndarray  # (N, C, 7) float32, physical units; zeros where the mask is 0
    mask: np.ndarray  # (N, C) float32: 1 where `action` is a demonstrated step
    source: np.ndarray  # (N,) int64, index in GROUPS
    instruction: list[str]  # N
    episode: list[str] = field(default_factory=list)  # N, or none where nobody asks

    def __len__(self) -> int:
        return len(self.state)

    @property
    def observation(self) -> dict[str, np.ndarray]:
        """The observation dict that a policy encodes."""
        return {**self.images, STATE: self.state}

    def take(self, rows: np.ndarray) -> Windows:
        """The windows `rows` (indices, or a mask (N,))."""
        rows = np.arange(len(self))[rows]
        return Windows(
            {key: value[rows] for key, value in self.images.items()},
            *(getattr(self, name)[rows] for name in ("state", "action", "mask", "source")),
            *(
                [texts[i] for i in rows] if texts else []
                for texts in (self.instruction, self.episode)
            ),
        )


def concatenate(parts: Sequence[Windows]) -> Windows:
    """All windows of `parts`, in order."""
    joined = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in (each.name for each in fields(Windows))
        if name not in ("images", "instruction", "episode")
    }
    images = {key: np.concatenate([part.images[key] for part in parts]) for key in parts[0].images}
    instruction, episode = (
        [text for part in parts for text in getattr(part, name)]
        for name in ("instruction", "episode")
    )
    return Windows(images, instruction=instruction, episode=episode, **joined)


def imitated_steps(segments: Sequence[Segment]) -> list[np.ndarray]:
    """Which steps of each segment may be cloned, (T,) bool each; give all segments of an episode at once.

    Demonstrations, and a person's steps wherever they occur. Of other episodes only successful ones, and of these
    none in which a person took over: what came before is a failing prefix, and cloning it teaches the failure.
    """
    succeeded: dict[str, bool] = defaultdict(bool)
    rescued: dict[str, bool] = defaultdict(bool)
    for segment in segments:
        episode = segment.header["episode"]
        succeeded[episode] |= bool(segment.columns["success"].any())
        rescued[episode] |= bool(segment.columns["intervention"].any())
    masks = []
    for segment in segments:
        episode = segment.header["episode"]
        intervention = segment.columns["intervention"]
        whole = segment.header["source"] == "demo" or (succeeded[episode] and not rescued[episode])
        masks.append(np.full(len(intervention), True) if whole else intervention.astype(bool))
    return masks


def windows(segments: Sequence[Segment], chunk: int) -> Windows:
    """The windows of `chunk` steps that start at a frame and at a step that may be cloned.

    The clean `label_action` is the target where a segment has it (noisily executed demonstrations). A window ends
    with its segment or with the cloned stretch; the rest is masked, never padded with invented actions.
    """
    parts = [
        _segment_windows(segment, imitated, chunk)
        for segment, imitated in zip(segments, imitated_steps(segments), strict=True)
    ]
    parts = [part for part in parts if len(part)]
    if not parts:
        raise ValueError(
            f"none of {len(segments)} segments has a frame at a step that may be cloned"
        )
    return concatenate(parts)


def _segment_windows(segment: Segment, imitated: np.ndarray, chunk: int) -> Windows:
    columns, steps = segment.columns, len(imitated)
    source = segment.header["source"]
    group = TAKEOVER if source == "real" and columns["intervention"].any() else source
    target = columns.get("label_action", columns["action"])
    frames = _frames(columns)
    rows = np.flatnonzero(frames < steps)
    rows = rows[imitated[frames[rows]]]
    start = frames[rows]
    # Rows beyond the segment's end read the padding: not imitated, zero.
    padded = np.concatenate([target, np.zeros((chunk, ACTION_DIM), np.float32)])
    allowed = np.concatenate([imitated, np.zeros(chunk, bool)])
    index = start[:, None] + np.arange(chunk)
    mask = np.logical_and.accumulate(allowed[index], axis=1)
    return Windows(
        images={key: columns[key][rows] for key in columns if key.startswith(IMAGE_PREFIX)},
        state=columns[STATE][start],
        action=padded[index] * mask[..., None],
        mask=mask.astype(np.float32),
        source=np.full(len(rows), GROUPS.index(group), np.int64),
        instruction=[segment.header["instruction"]] * len(rows),
        episode=[segment.header["episode"]] * len(rows),
    )


def _frames(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """The steps at which all of the observation is known; without cameras the state is, at every step."""
    return columns.get("frame_step", np.arange(len(columns[STATE])))


def held_out(episodes: Sequence[str], share: float) -> np.ndarray:
    """Which windows (N,) bool belong to the `share` of episodes that is kept for validation.

    A hash of its name decides about an episode: whoever reads it, and whenever, finds it on the same side. Of fewer than
    10 episodes, or where the hash leaves one side empty, none are held out: there is too little to learn from.
    """
    names = sorted(set(episodes))
    limit = share * 2.0**64
    chosen = {name for name in names if digest(name.encode()) < limit}
    if len(names) < FEWEST_EPISODES or len(chosen) == len(names):
        chosen = set()
    return np.array([name in chosen for name in episodes], dtype=bool)


def source_probabilities(source: np.ndarray, shares: Mapping[str, float]) -> np.ndarray:
    """Sampling probability (N,) of each row such that groups are drawn in the ratio of `shares`.

    `source` (N,) and the keys of `shares` are of GROUPS. A group without rows gives its share to the others; one without
    a share is never drawn, but for takeovers, which then belong to the source "real".
    """
    if unknown := sorted(set(shares) - set(GROUPS)):
        raise ValueError(f"no share can be had by {unknown}, only by {', '.join(GROUPS)}")
    if TAKEOVER not in shares:
        source = np.where(source == GROUPS.index(TAKEOVER), GROUPS.index("real"), source)
    probability = np.zeros(len(source))
    for name, share in shares.items():
        rows = source == GROUPS.index(name)
        if rows.any():
            probability[rows] = share / rows.sum()
    if not probability.any():
        raise ValueError(f"no rows of the sources {sorted(shares)}")
    return probability / probability.sum()


def executed_windows(
    segments: Iterable[Segment], chunk: int, stride: int = 1
) -> dict[str, np.ndarray]:
    """Off-policy windows of up to `chunk` *executed* steps, whoever decided them -> batch of columns.

    A window starts at every `stride`-th frame whose successor observation has a frame too; it straddles policy
    chunks freely and is cut at its segment's end. Keys and shapes as ChunkQ.update expects; without images but
    with `frame` and `next.frame` (N, 2) int64: (index of the segment, row on its frame axis).
    """
    rows = defaultdict(list)
    for number, segment in enumerate(segments):
        columns = segment.columns
        steps, frames = len(columns["action"]), _frames(columns)
        row_of = {int(t): row for row, t in enumerate(frames)}
        for row, t in enumerate(frames[::stride]):
            length = min(chunk, steps - int(t))
            after = int(t) + length
            if length <= 0 or after not in row_of:
                continue
            part = slice(int(t), after)
            pad = ((0, chunk - length),)
            ended = columns["terminated"][after - 1], columns["truncated"][after - 1]
            rows["frame"].append((number, row * stride))
            rows["next.frame"].append((number, row_of[after]))
            rows[STATE].append(columns[STATE][t])
            rows["next." + STATE].append(columns[STATE][after])
            rows["action"].append(np.pad(columns["action"][part], (*pad, (0, 0))))
            rows["reward"].append(np.pad(columns["reward"][part], pad))
            rows["intervention"].append(np.pad(columns["intervention"][part], pad))
            rows["step_mask"].append(np.arange(chunk) < length)
            rows["terminated"].append(ended[0])
            rows["truncated"].append(ended[1])
            rows["steps"].append(length)
            rows["source"].append(SOURCES.index(segment.header["source"]))
            rows["instruction"].append(segment.header["instruction"])
    return {key: np.asarray(value) for key, value in rows.items()}
