"""Stage 0, the encoder from labelled twin renders, and stage 1, SFT on demonstrations and expansion."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from learner.algorithms.pretrain import Pretrain, PretrainConfig
from learner.algorithms.sft import SFT, SFTConfig
from learner.dataset import windows
from learner.learner import Learner
from learner.settings import make_settings
from twinrl.core.errors import TwinRLError
from twinrl.env import STATE, image_key

# Images by camera, state, labels, and what is asked in each scene.
Scenes = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, list[str]]
HELD_OUT = 512  # scenes whose pose error is reported
CHECKPOINT_SECONDS = 60.0


def pretrain(
    learner: Learner,
    *,
    scenes: Sequence[Scenes],
    options: dict[str, Any],
    start: str | None = None,
) -> dict[str, Any]:
    """Train the vision encoder on labelled scenes; leaves checkpoint "pretrained".

    A policy without cameras, or one that predicts no poses, has nothing to learn from them: the checkpoint holds what
    it began with.
    """
    cameras = learner.policy.cameras
    if not cameras or not hasattr(learner.policy, "predict_pose"):
        learner.save("pretrained")
        return {"pose_rmse": [], "scenes": 0}
    observation = {
        image_key(camera): np.concatenate([images[camera] for images, *_ in scenes])
        for camera in cameras
    }
    observation[STATE] = np.concatenate([state for _, state, *_ in scenes])
    labels = np.concatenate([labels for _, _, labels, _ in scenes])
    told = [text for *_, instruction in scenes for text in instruction]
    held_out = min(HELD_OUT, len(labels) // 10)
    test = {key: value[:held_out] for key, value in observation.items()}
    train = {key: value[held_out:] for key, value in observation.items()}
    resumed, state = learner.begin("pretrained", start)
    algorithm = Pretrain(
        learner.policy,
        make_settings(PretrainConfig, options, "pretrain.options"),
        train,
        labels[held_out:],
        told[held_out:],
        learner.seed,
    )
    if resumed:
        algorithm.load_state_dict(state["pretrain"])
    if _train(learner, algorithm, "pretrained", "pretrain"):
        learner.finish("pretrained")
    errors = algorithm.errors(test, labels[:held_out], told[:held_out])
    return {"pose_rmse": errors.tolist(), "scenes": len(labels) - held_out, "steps": algorithm.step}


def sft(
    learner: Learner,
    *,
    name: str,
    sources: Sequence[str],
    options: dict[str, Any],
    start: str | None = "pretrained",
) -> dict[str, Any]:
    """Supervised fine-tuning from checkpoint `start` on all segments of `sources`; checkpoint `name`.

    Of an arm's episodes (source "real") only what a person did is cloned.
    Sources are drawn equally often unless `options` have `shares`. None for `start` trains the policy as it is.
    """
    resumed, state = learner.begin(name, start)
    learner.reader.sync()
    segments = [s for source in sources for s in learner.reader.segments(source=source)]
    segments = [
        s for s in segments if s.header["source"] != "real" or s.columns["intervention"].any()
    ]
    try:
        data = windows(segments, learner.policy.chunk)
    except ValueError as error:
        raise TwinRLError(f"SFT on {', '.join(sources)}: {error}") from None
    learner.policy.fit_actions(data.action[data.mask > 0])
    settings = {"shares": dict.fromkeys(sources, 1.0), **options}
    config = make_settings(SFTConfig, settings, "sft.options")
    algorithm = SFT(learner.policy, config, data, learner.seed)
    if resumed:
        algorithm.load_state_dict(state["sft"])
    if _train(learner, algorithm, name, "sft"):
        learner.publish()
        learner.finish(name)
    summary = {"windows": len(algorithm.data), "segments": len(segments), "steps": algorithm.step}
    if algorithm.validation is None:
        return summary
    best = {"best_step": algorithm.overfitting.best_step, "validation": algorithm.overfitting.best}
    return {**summary, **best, "validation_windows": len(algorithm.validation)}


def _train(learner: Learner, algorithm: Pretrain | SFT, name: str, key: str) -> bool:
    """Update until it is done; False where somebody asked to end, and checkpoint NAME-running says how to go on."""
    saved, warned = time.monotonic(), ""
    while not algorithm.done:
        if not learner.goes_on():
            learner.save(f"{name}-running", {key: algorithm.state_dict()})
            return False
        with learner.autocast():
            metrics = algorithm.update()
        learner.note(metrics, algorithm.step / algorithm.config.steps)
        warning = algorithm.overfitting.warning if isinstance(algorithm, SFT) else ""
        if warning != warned:
            warned = warning
            learner.reporter.event("warning", f"{name}: {warning}")
        if time.monotonic() - saved > CHECKPOINT_SECONDS or learner.checkpoint_asked():
            saved = time.monotonic()
            learner.save(f"{name}-running", {key: algorithm.state_dict()})
    return True
