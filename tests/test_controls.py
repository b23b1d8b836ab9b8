"""The controls of the stages: self-imitation instead of RL, the expert instead of re-targeting, clones of takeovers alone."""

import subprocess
import sys
import types
from collections import defaultdict

import numpy as np
import pytest
import torch

import twins
from actors.twin_actor import TwinActor
from deploy.memory import Memory
from learner.stages import STAGES, supervised
from learner.stages.self_imitation import successful_episodes
from policies.registry import make_policy
from twinrl.core.segment import Segment
from twinrl.env import STATE

C, S = 2, 5
POLICY = {"state_dim": S, "pose_dim": 0, "cameras": [], "chunk": C, "integration_steps": 2}


def segment(
    source, action, episode, *, success=True, last=True, steps=4, intervention=False, seed=0
):
    """`steps` steps of one `action` (7,), from random states."""
    rng = np.random.default_rng(seed)
    ended = (np.arange(steps) == steps - 1) & last
    columns = {
        "action": np.tile(np.asarray(action, np.float32), (steps, 1)),
        "reward": (ended & success).astype(np.float32),
        "terminated": ended & success,
        "truncated": ended & (not success),
        "success": ended & success,
        "intervention": np.full(steps, intervention),
        STATE: rng.normal(size=(steps + 1, S)).astype(np.float32),
    }
    if source == "demo":
        columns["label_action"] = columns["action"]
    header = {"source": source, "episode": episode, "instruction": "go", "last": last}
    return Segment(header, columns)


def moved(shift):
    return np.array([shift, 0, 0, 0, 0, 0, 1])


class Stream:
    """A reader with demonstrations, and a cursor that hands out `rounds` in turn."""

    def __init__(self, kept, rounds=()):
        self.kept, self.rounds, self.passed = kept, list(rounds), False

    def sync(self):
        pass

    def segments(self, source):
        return [s for s in self.kept if s.header["source"] == source]

    def cursor(self, name, source):
        return self

    def pass_by(self):
        self.passed = True

    def take(self, **_):
        return self.rounds.pop(0)

    def commit(self):
        pass


def make_learner(reader):
    """What a stage uses of a learner, around a policy that has seen both directions."""
    torch.manual_seed(0)
    policy = make_policy({"name": "vla", **POLICY})
    rng = np.random.default_rng(0)
    policy.fit_states(rng.normal(size=(64, S)).astype(np.float32))
    policy.fit_actions(np.stack([moved(x) for x in np.linspace(-0.02, 0.02, 41)]))
    learner = types.SimpleNamespace(
        policy=policy, reader=reader, seed=0, version=0, stopping=False, data_waited=0.0, noted=[]
    )
    learner.restore = lambda name: {}
    learner.publish = lambda: None
    learner.save = lambda name, state=None: None
    learner.note = lambda metrics, progress, batches=1: learner.noted.append((metrics, progress))
    return learner


def mean_shift(policy):
    """Mean first number of the policy's actions, m."""
    observation = {STATE: np.random.default_rng(5).normal(size=(64, S)).astype(np.float32)}
    chunk, _ = policy.act(observation, "go", torch.Generator().manual_seed(0), explore=False)
    return float(chunk[..., 0].mean())


def test_self_imitation_follows_successes_alone():
    """Failures are not cloned, however many; an episode counts as a whole once it has ended."""
    shown = [segment("demo", moved(0.0), "shown", steps=40)]
    rounds = [
        [
            *(segment("twin", moved(0.02), f"good-{i}-{k}", seed=i) for k in range(4)),
            *(segment("twin", moved(-0.02), f"bad-{i}-{k}", success=False) for k in range(12)),
        ]
        for i in range(6)
    ]
    learner = make_learner(Stream(shown, rounds))
    summary = STAGES["self_imitation"](
        learner,
        start="stage1",
        name="stage2",
        privileged_dim=0,
        steps=6 * 64,
        segments=16,
        max_lag=1,
        action_noise=0.1,
        options={"learning_rate": 1e-3, "updates": 40, "batch": 64},
    )
    assert summary == {"iterations": 6, "transitions": 6 * 64}
    assert learner.reader.passed
    assert mean_shift(learner.policy) > 0.01
    assert [metrics["success"] for metrics, _ in learner.noted] == [0.25] * 6
    assert learner.noted[-1][1] == 1.0


def test_an_episode_is_cloned_whole_when_it_has_ended():
    """Its beginning waits for its end; of a failure nothing is kept."""
    waiting = defaultdict(list)
    begun = segment("twin", moved(0.0), "a", last=False)
    assert (
        successful_episodes([begun, segment("twin", moved(0), "b", success=False)], waiting) == []
    )
    assert list(waiting) == ["a"]
    ended = segment("twin", moved(0.0), "a")
    assert successful_episodes([ended], waiting) == [begun, ended]
    assert not waiting


def test_a_clone_learns_what_a_person_did_and_nothing_else_of_the_arm(monkeypatch):
    """Of the arm's own successes nothing is cloned: the policy goes where demonstrations and takeovers go."""
    seen = {}

    class Recorded(Exception):
        pass

    def windows(segments, chunk):
        seen["episodes"] = [s.header["episode"] for s in segments]
        raise Recorded

    monkeypatch.setattr(supervised, "windows", windows)
    kept = [
        segment("demo", moved(0.0), "shown"),
        segment("real", moved(0.01), "own success"),
        segment("real", moved(0.01), "helped", intervention=True),
    ]
    learner = make_learner(Stream(kept))
    learner.begin = lambda name, start: (False, {})
    with pytest.raises(Recorded):
        STAGES["sft"](learner, name="stage3", sources=["demo", "real"], options={})
    assert seen["episodes"] == ["shown", "helped"]


class Kept:
    """A writer and a reporter that keep what they get."""

    def __init__(self):
        self.segments = []

    def write(self, header, columns):
        self.segments.append((header, columns))

    def event(self, level, text):
        pass

    def flush(self, timeout):
        pass

    def stats(self):
        return {}

    def close(self):
        pass


def test_the_expert_may_expand_all_over_the_table():
    """As many successes as asked for, in both regions, with clean labels; no demonstration is needed."""
    kept = Kept()
    reader = types.SimpleNamespace(
        sync=lambda: None, segments=lambda source: [], close=lambda: None
    )
    actor = TwinActor(
        "twin-0",
        seed=0,
        task="pick-and-place",
        num_envs=16,
        make_env=lambda count, **options: twins.make_env(
            num_envs=count, observe="state", **options
        ),
        make_runner=lambda: types.SimpleNamespace(version=-1),
        make_writer=lambda name: kept,
        make_reader=lambda: reader,
        make_reporter=lambda name, stats: kept,
        weights=None,
        make_retargeter=lambda env, demonstrations, rng: None,
    )
    recorded, attempted = actor.expand(12, 0.2, "expert")
    assert recorded == 12 <= attempted
    actor.close()
    headers = [header for header, _ in kept.segments]
    assert {header["source"] for header in headers} == {"twin"}
    assert {header["region"] for header in headers} == {"id", "ood"}
    assert len({header["episode"] for header in headers}) == 12
    assert all("label_action" in columns for _, columns in kept.segments)


def test_core_seconds_count_what_has_ended_too():
    """A child that has computed and gone still has computed."""
    memory = Memory()
    busy = "import time\nwhile time.process_time() < 0.6: pass\nprint('x', flush=True)\ninput()"
    child = subprocess.Popen(
        [sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    child.stdout.readline()
    memory.measure()
    first = memory.core_seconds
    assert first > 0.6
    child.communicate(b"\n")
    memory._measured = -1e9  # as if its period had passed
    memory.measure()
    assert memory.core_seconds >= first
