"""Stage 2: PPOFlow on segments that the twin actors stream, each consumed once and in order."""

from __future__ import annotations

import time
from typing import Any

from buffer_service.client import Cursor
from learner import distributed
from learner.algorithms.ppoflow import PPOFlow, PPOFlowConfig
from learner.algorithms.sft import ImitationData
from learner.dataset import windows
from learner.learner import Learner
from learner.settings import make_settings
from twinrl.core.errors import DeadlineError

CHECKPOINT_EVERY = 10  # iterations
CALIBRATION = 512  # observations on which the exploration noise is set
CURSOR = "twin_rl"
WAIT = 120.0  # s for an iteration's segments


def twin_rl(
    learner: Learner,
    *,
    start: str,
    name: str,
    privileged_dim: int,
    steps: int,
    segments: int,
    max_lag: int,
    action_noise: float,
    options: dict[str, Any],
) -> dict[str, Any]:
    """PPOFlow from checkpoint `start` until `steps` transitions were consumed; checkpoint `name`.

    An iteration takes at least `segments`, all that there are; those more than `max_lag` versions old are skipped
    and counted. The cursor's position is in each checkpoint, so that a resumed run sees each segment once.
    """
    resumed = learner.has(f"{name}-running")
    state = learner.restore(f"{name}-running" if resumed else start)
    learner.reader.sync()
    config = make_settings(PPOFlowConfig, options, "twin_rl.options")
    demos = shown(learner)
    anchor = None
    if demos:
        data = windows(demos, learner.policy.chunk)
        shares = {"demo": 0.5, "twin": 0.5}
        anchor = ImitationData(learner.policy, data, shares, trained=config.train_encoder)
    algorithm = PPOFlow(learner.policy, config, privileged_dim, anchor, learner.seed)
    # Rank 0 takes segments and tells the other ranks, if there are any.
    cursor = learner.reader.cursor(CURSOR, source="twin") if distributed.rank() == 0 else None
    consumed = 0
    if resumed:
        algorithm.load_state_dict(state["ppo"])
        consumed = state["consumed"]
        if cursor is not None:
            cursor.position = state["cursor"]
    else:
        policy = learner.policy
        if anchor is not None:  # without demonstrations it was done when the policy began
            policy.flow.calibrate_noise(
                anchor.features[:CALIBRATION],
                policy.integration_steps,
                learner.seed,
                action_noise,
                config.noise,
            )
        # What lies there already (the expansion) is not on-policy.
        if cursor is not None:
            cursor.pass_by()
    learner.publish()
    while consumed < steps and learner.goes_on():
        taken = take(learner, cursor, segments, max_lag) if cursor is not None else []
        taken, version = distributed.agree((taken, learner.version))
        if not taken:
            break
        metrics = algorithm.update(taken, version)
        learner.publish()
        consumed += sum(segment.steps for segment in taken)
        metrics["success"] = success_share(taken)
        learner.note(metrics, consumed / steps)
        if algorithm.iteration % CHECKPOINT_EVERY == 0 or learner.checkpoint_asked():
            _save(learner, f"{name}-running", algorithm, consumed, cursor)
    _save(learner, f"{name}-running" if learner.stopping else name, algorithm, consumed, cursor)
    return {"iterations": algorithm.iteration, "transitions": consumed}


def _save(
    learner: Learner, name: str, algorithm: PPOFlow, consumed: int, cursor: Cursor | None
) -> None:
    """The checkpoint holds the cursor's position: what the weights have seen and it are one. Rank 0's part."""
    if cursor is None:
        return
    state = {"ppo": algorithm.state_dict(), "consumed": consumed, "cursor": cursor.position}
    learner.save(name, state)
    cursor.commit()


def take(learner: Learner, cursor: Cursor, segments: int, max_lag: int) -> list[Any]:
    """The next segments; none when the stage is to end. Waits in short turns, so that it hears of that."""
    deadline = time.monotonic() + WAIT
    while not learner.stopping:
        since = time.monotonic()
        try:
            return cursor.take(
                min_segments=segments,
                current_version=learner.version,
                max_lag=max_lag,
                timeout=2.0,
            )
        except DeadlineError:
            if time.monotonic() > deadline:
                raise
        finally:
            learner.data_waited += time.monotonic() - since
    return []


def shown(learner: Learner) -> list[Any]:
    """Segments with clean labels: demonstrations and expansion, not what a policy did."""
    segments = [s for source in ("demo", "twin") for s in learner.reader.segments(source=source)]
    return [s for s in segments if "label_action" in s.columns]


def success_share(segments: list[Any]) -> float:
    """Of the episodes that ended in `segments`, how many succeeded; not a number where none did."""
    ended = [s for s in segments if s.header["last"]]
    if not ended:
        return float("nan")
    return sum(bool(s.columns["success"][-1]) for s in ended) / len(ended)
