"""Stage 0, the encoder from labelled twin renders, and stage 1, SFT on demonstrations and expansion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from learner.algorithms.pretrain import Pretrain, PretrainConfig
from learner.algorithms.sft import SFT, SFTConfig
from learner.dataset import windows
from learner.learner import Learner
from twinrl.env import STATE, image_key

Scenes = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]  # images by camera, state, labels
HELD_OUT = 512  # scenes whose pose error is reported


def pretrain(
    learner: Learner, *, scenes: Sequence[Scenes], options: dict[str, Any]
) -> dict[str, Any]:
    """Train the vision encoder on labelled scenes; leaves checkpoint "pretrained"."""
    cameras = learner.policy.cameras
    observation = {
        image_key(camera): np.concatenate([images[camera] for images, _, _ in scenes])
        for camera in cameras
    }
    observation[STATE] = np.concatenate([state for _, state, _ in scenes])
    labels = np.concatenate([labels for _, _, labels in scenes])
    held_out = min(HELD_OUT, len(labels) // 10)
    test = {key: value[:held_out] for key, value in observation.items()}
    train = {key: value[held_out:] for key, value in observation.items()}
    algorithm = Pretrain(
        learner.policy,
        PretrainConfig(**options),
        train,
        labels[held_out:],
        learner.instruction,
        learner.seed,
    )
    while not algorithm.done and not learner.stopping:
        learner.note(algorithm.update(), algorithm.step / algorithm.config.steps)
    errors = algorithm.errors(test, labels[:held_out])
    learner.save("pretrained")
    return {"pose_rmse": errors.tolist(), "scenes": len(labels) - held_out}


def sft(
    learner: Learner, *, name: str, sources: Sequence[str], options: dict[str, Any]
) -> dict[str, Any]:
    """Supervised fine-tuning from the pretrained encoder on all segments of `sources`; checkpoint `name`."""
    learner.restore("pretrained")
    learner.reader.sync()
    segments = [s for source in sources for s in learner.reader.segments(source=source)]
    data = windows(segments, learner.policy.chunk)
    learner.policy.fit_actions(data.action[data.mask > 0])
    algorithm = SFT(learner.policy, SFTConfig(**options), data, learner.seed)
    while not algorithm.done and not learner.stopping:
        learner.note(algorithm.update(), algorithm.step / algorithm.config.steps)
    learner.publish()
    learner.save(name)
    return {"windows": len(data), "segments": len(segments)}
