"""What is written and drawn, for us and for the peers alike.

Workload W: a transition is two RGB images of 128x128, 32 float32 of state, 4x7 float32 of actions, a reward and
four flags: 98,552 bytes. `small` has no images: 256 bytes. A writer inserts segments of 50 transitions; a reader
draws batches of 256, each with its next observation.

Peers store these columns as they are. In TwinRL's schema an action belongs to one control step, so W's 4x7 actions
are a window of 4 steps: every step is stored with its own 7 numbers, and a batch has (256, 4, 7). `small` puts the
numbers that this saves into the optional columns, so that a stored transition has its 256 bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.replay_bench.frames import frames
from twinrl.core.segment import IMAGE_PREFIX, Schema

STEPS = 50  # transitions in a segment
CHUNK = 4
BATCH = 256
CAMERAS = ("cam0", "cam1")


class Workload(NamedTuple):
    """Sizes of a workload."""

    image: int  # pixels, 0 without images
    state: int
    segments: int  # different ones, written in turn
    capacity: int  # transitions that are kept
    batch: int = BATCH

    @property
    def image_bytes(self) -> int:
        """Bytes of a transition's images."""
        return len(CAMERAS) * self.image**2 * 3

    @property
    def observation_bytes(self) -> int:
        """Images and state."""
        return self.image_bytes + 4 * self.state

    @property
    def transition_bytes(self) -> int:
        """An observation, 4x7 actions, reward, four flags."""
        return self.observation_bytes + 4 * CHUNK * 7 + 4 + 4

    @property
    def sampled_bytes(self) -> int:
        """A transition and its next observation."""
        return self.transition_bytes + self.observation_bytes

    @property
    def schema(self) -> Schema:
        """TwinRL's, see above."""
        state = self.state if self.image else self.state + 7
        return Schema(state, 0, CAMERAS if self.image else (), self.image or 8, CHUNK)


W = Workload(image=128, state=32, segments=16, capacity=5000)
SMALL = Workload(image=0, state=34, segments=64, capacity=20_000)


def create(path: Path, workload: Workload) -> None:
    """Write the segments to `path`, an .npz file that every environment can read."""
    generator = np.random.default_rng(0)
    count = workload.segments
    columns: dict[str, Any] = {}
    for place, name in enumerate(CAMERAS if workload.image else ()):
        columns[name] = np.stack(
            [
                frames(STEPS + 1, workload.image, seed=2 * n + place, moving=bool(place))
                for n in range(count)
            ]
        )
    steps = np.cumsum(generator.normal(0, 0.01, (count, STEPS + 1, workload.state)), 1)
    columns["state"] = steps.astype(np.float32)
    columns["action"] = generator.normal(size=(count, STEPS, CHUNK, 7)).astype(np.float32)
    columns["reward"] = generator.normal(size=(count, STEPS)).astype(np.float32)
    columns["flags"] = np.zeros((count, STEPS, 4), bool)
    np.savez(path, **columns)


def ours(columns: dict[str, np.ndarray], first: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and columns of TwinRL's segment for one of the peers' segments."""
    steps = len(columns["reward"])
    mine: dict[str, Any] = {
        "observation.state": columns["state"],
        "action": np.ascontiguousarray(columns["action"][:, 0]),
        "reward": columns["reward"],
        "policy_version": np.zeros(steps, "<i8"),
        "chunk_id": np.arange(steps, dtype="<i4") // CHUNK,
        "timestamp": np.arange(steps) / 10,
        "frame_step": np.arange(steps + 1, dtype="<i4"),
    }
    for place, name in enumerate(("terminated", "truncated", "success", "intervention")):
        mine[name] = np.ascontiguousarray(columns["flags"][:, place])
    mine["truncated"][-1] = True
    if CAMERAS[0] in columns:
        for name in CAMERAS:
            mine[IMAGE_PREFIX + name] = columns[name]
    else:
        mine["frame_step"] = np.zeros(0, "<i4")
        mine["label_action"] = np.ascontiguousarray(columns["action"][:, 1])
        mine["policy_action"] = np.ascontiguousarray(columns["action"][:, 2])
        rest = np.concatenate([columns["action"][:, 3], columns["action"][-1:, 3]])
        mine["observation.state"] = np.concatenate([columns["state"], rest], 1)
    header = {
        "source": "twin",
        "task": "lift",
        "instruction": "lift the cube",
        "region": "id",
        "configuration": {"x": 0.1},
        "episode": f"episode {first}",
        "first_step": 0,
        "last": True,
    }
    return header, mine
