"""The in-process experiment's replay."""

import numpy as np
import pytest

from experiments.stand_in import Replay
from twinrl.core.segment import Segment


def test_replay_returns_the_frames_of_its_windows():
    """Ids, frames and successor frames belong to the window's steps; sources come in the mix's ratio."""
    segments = []
    for number, source in enumerate(("demo", "real")):
        t = np.arange(6)
        frames = np.arange(7, dtype=np.uint8) + 10 * number
        columns = {
            "action": np.zeros((6, 7), np.float32),
            "reward": np.zeros(6, np.float32),
            "terminated": t == 5,
            "truncated": np.zeros(6, bool),
            "intervention": np.zeros(6, bool),
            "observation.state": np.arange(7, dtype=np.float32)[:, None] + 10 * number,
            "frame_step": np.arange(7, dtype=np.int32),
            "observation.images.side": np.tile(frames[:, None, None, None], (1, 2, 2, 3)),
        }
        segments.append(
            Segment({"source": source, "episode": source, "instruction": "go"}, columns)
        )
    replay = Replay(4, seed=0)
    replay.add(segments[:1])
    replay.add(segments[1:])
    batch = replay.sample(400)
    pixels = batch["observation.images.side"][:, 0, 0, 0]
    np.testing.assert_array_equal(pixels, batch["observation.state"][:, 0])
    after = batch["next.observation.images.side"][:, 0, 0, 0]
    np.testing.assert_array_equal(after - pixels, batch["steps"])
    np.testing.assert_array_equal(batch["observation.id"] >> 20, pixels // 10)
    assert (batch["source"] == 2).mean() == pytest.approx(2 / 3, abs=0.08)
