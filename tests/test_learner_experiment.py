"""The in-process experiment's own parts: settings, the paired gain, the replay."""

import numpy as np
import pytest

from experiments.stages import SETTINGS, paired_gain, parse_settings
from experiments.stand_in import Replay
from twinrl.core.segment import Segment


def test_settings_are_overlaid_and_checked():
    """Overrides win over --quick, which wins over the defaults; unknown sections are refused."""
    settings = parse_settings(True, ["sft.steps=7", "ppo.clip=0.1"])
    assert settings["sft"]["steps"] == 7 and settings["ppo"]["clip"] == 0.1
    assert settings["twin_rl"]["steps"] < SETTINGS["twin_rl"]["steps"]
    with pytest.raises(SystemExit, match="stf"):
        parse_settings(False, ["stf.steps=7"])


def test_paired_gain_uses_the_pairing():
    """Ten more successes of 100 on the same resets are a clear gain; swapped ones are none."""
    before = {"standin/id": np.arange(100) < 50, "twin/id": np.zeros(100, bool)}
    better = {"standin/id": np.arange(100) < 60}
    mean, low, _ = paired_gain(before, better, "standin")
    assert mean == pytest.approx(0.1) and low > 0.03
    mean, low, high = paired_gain(before, {"standin/id": np.arange(100) >= 50}, "standin")
    assert mean == 0.0 and low < -0.1 and high > 0.1


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
