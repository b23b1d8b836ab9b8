"""Stage 3 against a real replay service: updates are bound to the arm's steps, and it may imitate alone."""

import importlib
import threading
import time

import numpy as np
import pytest

from learner.learner import Learner
from tests.training import POLICY, POSE, STATE, C, Events, Sink
from twinrl.core.segment import Schema
from twinrl.core.sockets import wait_until

SCHEMA = Schema(state_dim=STATE, privileged_dim=POSE, cameras=(), image_size=16, chunk=C)
STEPS = 12
MIX = {"demo": 0.25, "twin": 0.25, "real": 0.5}


def episode(number, source, taken_from=STEPS):
    """A successful episode; a person takes over at step `taken_from`."""
    rng = np.random.default_rng(number)
    state = rng.normal(size=(STEPS + 1, STATE)).astype(np.float32)
    ends = np.arange(STEPS) == STEPS - 1
    header = {
        "source": source,
        "task": "follow",
        "instruction": "go",
        "region": "id",
        "configuration": {},
        "episode": f"{source} {number}",
        "first_step": 0,
        "last": True,
    }
    return header, {
        "action": (np.tile(state[:-1, :1], (1, 7)) * 0.1).astype("<f4"),
        "reward": ends.astype("<f4"),
        "terminated": ends,
        "truncated": np.zeros(STEPS, bool),
        "success": ends,
        "intervention": np.arange(STEPS) >= taken_from,
        "policy_version": np.full(STEPS, -1 if source == "demo" else 0, "<i8"),
        "chunk_id": (np.arange(STEPS) // C).astype("<i4"),
        "timestamp": np.arange(STEPS) / 10,
        "observation.state": state.astype("<f4"),
    }


@pytest.mark.parametrize(
    "options",
    [
        {"improvement": "best_of_n", "horizon": 2, "offline_updates": 3, "actor_warmup": 5},
        {"improvement": "one_step", "offline_updates": 2, "actor_warmup": 5},
        {"improvement": "none"},
    ],
    ids=lambda options: options["improvement"],
)
def test_stage_3_makes_the_updates_that_are_due(bench, tmp_path, options):
    bench.start(schema=SCHEMA)
    writer = bench.writer(schema=SCHEMA)
    for number in range(3):
        writer.write(*episode(number, "demo"))
        writer.write(*episode(number, "twin"))
    writer.write(*episode(0, "real"))
    writer.write(*episode(1, "real", taken_from=8))
    writer.flush()
    policy = {**POLICY, "cameras": (), "one_step": True}
    (tmp_path / "checkpoints").mkdir()
    learner = Learner(
        policy_config=policy,
        instruction="go",
        checkpoints=tmp_path / "checkpoints",
        make_reader=bench.reader,
        make_reporter=lambda name, stats: Events(),
        sink=Sink(),
        seed=0,
    )
    learner.save("stage2")
    summary = {}
    due = options.get("offline_updates", 0) + 2 * STEPS // 2

    def run():
        summary.update(
            learner.run(
                "real_rl",
                start="stage2",
                name="stage3",
                updates_per_step=0.5,
                publish_every=5,
                batch_size=16,
                mix=MIX,
                options=options,
            )
        )

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: learner._updates >= due or not thread.is_alive(), 60, "updates")
    learner.stop()
    thread.join(60)
    assert summary["updates"] == summary["due"] == due
    assert summary["real_transitions"] == 2 * STEPS
    imitated = learner._losses["imitation_loss"]
    assert np.isfinite(imitated) and learner.has("stage3")
    assert ("critic_loss" in learner._losses) == (options["improvement"] != "none")
    assert bool(learner.policy.one_step.active) == (options["improvement"] == "one_step")
    assert (int(learner.policy.candidates) > 1) == (options["improvement"] == "best_of_n")


def test_publishing_slows_while_the_arms_policy_lags(bench, tmp_path, monkeypatch):
    """Updates go on, a version waits; a deadline lets one go; when the lag is made up, every version goes again."""
    monkeypatch.setattr(importlib.import_module("learner.stages.real_rl"), "DRAIN_SECONDS", 0.0)
    bench.start(schema=SCHEMA)
    writer = bench.writer(schema=SCHEMA)
    for number in range(3):
        writer.write(*episode(number, "demo"))
        writer.write(*episode(number, "twin"))
    writer.write(*episode(0, "real"))
    writer.flush()
    (tmp_path / "checkpoints").mkdir()
    learner = Learner(
        policy_config={**POLICY, "cameras": ()},
        instruction="go",
        checkpoints=tmp_path / "checkpoints",
        make_reader=bench.reader,
        make_reporter=lambda name, stats: Events(),
        sink=Sink(),
        seed=0,
    )
    learner.save("stage2")
    options = {"improvement": "none", "offline_updates": 10**6}
    arguments = {"start": "stage2", "name": "stage3", "updates_per_step": 0.5, "mix": MIX}
    arguments |= {"publish_every": 1, "batch_size": 16, "options": options, "max_lag": 4}
    thread = threading.Thread(target=lambda: learner.run("real_rl", **arguments, hold_s=0.5))
    thread.start()

    def grown(count):
        """Versions published while `count` updates are made."""
        version, updates = learner.version, learner._updates
        wait_until(
            lambda: learner._updates >= updates + count or not thread.is_alive(), 30, "updates"
        )
        assert thread.is_alive()
        return learner.version - version

    try:
        wait_until(lambda: learner._updates > 3, 30, "the first updates")
        learner.hear_lag(4)  # as far as it may
        assert grown(10) >= 9 and learner.held_versions == 0
        learner.hear_lag(5)
        grown(2)
        began, version = time.monotonic(), learner.version
        wait_until(lambda: learner.held_versions >= 3, 30, "versions whose time was up")
        assert time.monotonic() - began >= 2 * 0.5 - 0.1
        assert learner.version - version <= 1 + (time.monotonic() - began) / 0.5
        assert learner.stats()["learner/held_versions"] >= 3
        assert learner.stats()["learner/acting_lag"] == 5
        learner.hear_lag(0)
        grown(2)
        assert grown(10) >= 9
    finally:
        learner.stop()
        thread.join(30)
    assert not thread.is_alive()


def test_twins_may_be_learned_from_off_policy(bench, tmp_path):
    """Updates follow the twins' steps, whatever their version; what lay there before is not counted."""
    bench.start(schema=SCHEMA)
    writer = bench.writer(schema=SCHEMA)
    for number in range(3):
        header, columns = episode(number, "demo")
        writer.write(header, {**columns, "label_action": columns["action"]})
        writer.write(*episode(100 + number, "twin"))
    writer.flush()
    (tmp_path / "checkpoints").mkdir()
    sink = Sink()
    learner = Learner(
        policy_config={**POLICY, "cameras": (), "one_step": True},
        instruction="go",
        checkpoints=tmp_path / "checkpoints",
        make_reader=bench.reader,
        make_reporter=lambda name, stats: Events(),
        sink=sink,
        seed=0,
    )
    learner.save("stage1")
    began = learner.version
    summary = {}

    def run():
        summary.update(
            learner.run(
                "twin_chunk_q",
                start="stage1",
                name="stage2",
                privileged_dim=POSE,
                steps=4 * STEPS,
                segments=2,
                max_lag=1,
                action_noise=0.1,
                options={"updates_per_step": 0.25, "batch_size": 16, "actor_warmup": 2},
            )
        )

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: learner.version > began, 30, "the first version")
    for number in range(4):
        writer.write(*episode(number, "twin"))
    writer.flush()
    thread.join(60)
    assert summary["transitions"] == 4 * STEPS
    assert summary["updates"] == STEPS
    assert int(learner.policy.candidates) > 1 and learner.has("stage2")
    assert np.isfinite(learner._losses["critic_loss"])
    assert np.isfinite(learner._losses["imitation_loss"])
