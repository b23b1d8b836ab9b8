"""Training on segments that are there already, without actors: the encoder and off-policy RL. SFT is so anyway."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from buffer_service.client import Prefetcher
from learner import distributed
from learner.algorithms.chunk_q import ChunkQ, ChunkQConfig
from learner.algorithms.sft import ImitationData
from learner.dataset import windows
from learner.features import FeatureCache, with_ids
from learner.learner import Learner
from learner.settings import make_settings
from learner.stages.supervised import CHECKPOINT_SECONDS, Scenes, pretrain
from twinrl.core.errors import TwinRLError
from twinrl.core.segment import Segment
from twinrl.env import PRIVILEGED, STATE, image_key


def offline_pretrain(
    learner: Learner, *, sources: Sequence[str], options: dict[str, Any], start: str | None = None
) -> dict[str, Any]:
    """The stage `pretrain` on the frames of recorded segments, whose privileged state is their label."""
    learner.reader.sync()
    segments = [s for source in sources for s in learner.reader.segments(source=source)]
    scenes = [scene for scene in map(_scene, segments) if scene is not None]
    if not scenes:
        raise TwinRLError(
            f"none of {len(segments)} segments of {', '.join(sources)} has frames with privileged state"
        )
    return pretrain(learner, scenes=scenes, options=options, start=start)


def offline_rl(
    learner: Learner,
    *,
    name: str,
    sources: Sequence[str],
    steps: int,
    batch_size: int,
    options: dict[str, Any],
    start: str | None = None,
) -> dict[str, Any]:
    """`steps` updates of ChunkQ from checkpoint `start` on windows of `sources`, drawn equally often; checkpoint `name`.

    What may be cloned of them (learner/dataset.py) trains the flow; without any, the critics alone learn.
    """
    resumed, state = learner.begin(name, start)
    learner.reader.sync()
    segments = [s for source in sources for s in learner.reader.segments(source=source)]
    if not segments:
        raise TwinRLError(f"the replay holds nothing of {', '.join(sources)}")
    config = make_settings(ChunkQConfig, options, "chunk-q")
    cache = FeatureCache(learner.policy, learner.instruction)
    algorithm = ChunkQ(learner.policy, config, cache, learner.seed)
    if resumed:
        algorithm.load_state_dict(state["chunk_q"])
    shares = dict.fromkeys(sources, 1.0)
    try:
        imitation = ImitationData(learner.policy, windows(segments, learner.policy.chunk), shares)
    except ValueError:  # nothing in them may be cloned
        imitation = None
    # Each rank draws windows of its own, and a resumed training others than before.
    seed = learner.seed + 1_000_003 * algorithm.step + distributed.rank()
    share = -(-batch_size // distributed.size())
    saved = time.monotonic()
    settings = {"mix": shares, "seed": seed, "chunk": algorithm.window}
    with Prefetcher(learner.reader, share, **settings) as batches:
        while algorithm.step < steps:
            if not learner.goes_on():
                learner.save(f"{name}-running", {"chunk_q": algorithm.state_dict()})
                break
            batch = with_ids(next(batches))
            learner.data_waited += batches.last_wait_s
            learner.note(algorithm.update(batch, imitation), algorithm.step / steps)
            if time.monotonic() - saved > CHECKPOINT_SECONDS or learner.checkpoint_asked():
                saved = time.monotonic()
                learner.save(f"{name}-running", {"chunk_q": algorithm.state_dict()})
    if algorithm.step >= steps:
        learner.publish()
        learner.finish(name)
    cloned = len(imitation) if imitation is not None else 0
    return {"updates": algorithm.step, "segments": len(segments), "windows_cloned": cloned}


def _scene(segment: Segment) -> Scenes | None:
    """What a segment shows at its frames; None where it lacks frames or labels."""
    columns = segment.columns
    if PRIVILEGED not in columns or "frame_step" not in columns:
        return None
    at = columns["frame_step"]
    prefix = image_key("")
    images = {key[len(prefix) :]: columns[key] for key in columns if key.startswith(prefix)}
    told = [segment.header["instruction"]] * len(at)
    return images, columns[STATE][at], columns[PRIVILEGED][at], told
