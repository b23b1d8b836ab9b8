"""For the tests of the learner: a small policy, demonstrations whose actions are a function of the state, and a learner."""

from pathlib import Path

import numpy as np
import torch

from learner.dataset import Windows
from learner.learner import Learner
from twinrl.core.segment import Segment

C, SIZE, STATE, POSE = 4, 16, 3, 2
POLICY = {
    "name": "vla",
    "state_dim": STATE,
    "pose_dim": POSE,
    "image_size": SIZE,
    "integration_steps": 2,
    "hidden": 32,
    "latent": 16,
    "keypoints": 4,
    "width": 4,
    "critics": 2,
    "precision": "float32",
}


def images(rng, rows):
    """Random images of both cameras."""
    shape = (rows, SIZE, SIZE, 3)
    return {
        f"observation.images.{name}": rng.integers(0, 256, shape, dtype=np.uint8)
        for name in ("side", "wrist")
    }


def make_windows(rows, seed=0, source=0, episodes=20, noise=0.0):
    """Windows whose action is a tenth of the state's first number, in `episodes` episodes; `noise` is relative to that."""
    rng = np.random.default_rng(seed)
    state = rng.normal(size=(rows, STATE)).astype(np.float32)
    action = np.tile(state[:, None, :1], (1, C, 7))
    action = (0.1 * (action + noise * rng.normal(size=action.shape))).astype(np.float32)
    return Windows(
        images(rng, rows),
        state,
        action,
        np.ones((rows, C), np.float32),
        np.full(rows, source, np.int64),
        ["go"] * rows,
        [f"episode {seed}-{i % episodes}" for i in range(rows)],
    )


def make_segments(count, source="demo", steps=8, seed=0):
    """Successful episodes of one segment each, a frame at every step."""
    rng = np.random.default_rng(seed)
    segments = []
    for episode in range(count):
        state = rng.normal(size=(steps + 1, STATE)).astype(np.float32)
        ends = np.arange(steps) == steps - 1
        columns = {
            "action": np.tile(state[:-1, :1], (1, 7)) * 0.1,
            "reward": ends.astype(np.float32),
            "terminated": ends,
            "truncated": np.zeros(steps, bool),
            "success": ends,
            "intervention": np.zeros(steps, bool),
            "policy_version": np.full(steps, -1, np.int64),
            "chunk_id": np.full(steps, -1, np.int32),
            "timestamp": np.arange(steps) / 10,
            "observation.state": state,
            "privileged.state": state[:, :POSE].copy(),
            "frame_step": np.arange(steps + 1, dtype=np.int32),
            **images(rng, steps + 1),
        }
        name = f"{source} {seed}-{episode}"
        header = {
            "source": source,
            "task": "follow",
            "instruction": "go",
            "region": "id",
            "configuration": {},
            "episode": name,
            "first_step": 0,
            "last": True,
        }
        segments.append(Segment(header, columns))
    return segments


def make_rollouts(policy, count, version=0, steps=10):
    """On-policy segments as an actor writes them; the last chunk of each was cut short, every second one succeeded."""
    generator, segments = torch.Generator().manual_seed(0), []
    for segment in make_segments(count, source="twin", steps=steps):
        start = np.arange(0, steps, C, dtype=np.int32)
        seen = {key: value[start] for key, value in segment.columns.items() if "observation" in key}
        action, info = policy.act(seen, "go", generator, explore=True)
        failed = len(segments) % 2 == 0
        ends = np.arange(steps) == steps - 1
        changed = {
            "action": action.reshape(-1, 7)[:steps],
            "reward": (ends & (not failed)).astype(np.float32),
            "terminated": ends & (not failed),
            "truncated": ends & failed,
            "success": ends & (not failed),
            "policy_version": np.full(steps, version, np.int64),
            "chunk_step": start,
            "policy.path": info["path"],
            "policy.log_prob": info["log_prob"],
        }
        segments.append(Segment(segment.header, {**segment.columns, **changed}))
    return segments


class Shelf:
    """Stands where a replay's reader would: segments at hand."""

    def __init__(self, segments):
        self._segments = segments

    def sync(self):
        pass

    def segments(self, source=None):
        return [each for each in self._segments if source in (None, each.header["source"])]

    def close(self):
        pass


class Sink:
    """Keeps the newest published version."""

    def __init__(self):
        self.version, self.arrays = -1, {}

    def publish(self, version, arrays):
        self.version = version
        self.arrays = {name: array.copy() for name, array in arrays.items()}

    def flush(self, timeout=60.0):
        pass

    def newest(self):
        return self.version

    def close(self):
        pass


class Events:
    """Stands where a reporter would: keeps what it is told."""

    def __init__(self):
        self.events = []

    def event(self, level, text, **_):
        self.events.append((level, text))

    def close(self):
        pass


def make_learner(folder: Path, segments=(), **options) -> Learner:
    """A learner on the CPU, in `folder`, that reads `segments`."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    return Learner(
        **{
            "policy_config": POLICY,
            "instruction": "go",
            "checkpoints": folder / "checkpoints",
            "make_reader": lambda: Shelf(segments),
            "make_reporter": lambda name, stats: Events(),
            "sink": Sink(),
            "seed": 0,
            "device": "cpu",
            **options,
        }
    )
