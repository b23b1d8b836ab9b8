"""The reference experiment's own parts: what it collects, how it is scored, and which K it allows."""

import json
import sys

import numpy as np
import pytest
import torch

from experiments.baselines import Runs, score, wall
from experiments.baselines_ppo import Collector, train
from experiments.integration_steps import allowed
from experiments.learning_curve import LearningCurve, play
from learner.rollout import rollout
from policies.vla import VLA
from twinrl.env import STATE


def test_the_collectors_segments_are_the_environments_own_steps():
    """Cut where episodes end, bootstrapped from the last observation before the reset, chained between; first episodes
    end at different times."""
    torch.manual_seed(0)
    collector = Collector("Pendulum-v1", 2, seed=0)
    policy = VLA(
        state_dim=3, pose_dim=0, cameras=(), chunk=1, action_dim=1, integration_steps=1, critics=0
    )
    policy.fit_begin(collector.random_play(80, seed=0), np.array([-2.0]), np.array([2.0]))
    generator = torch.Generator().manual_seed(0)
    first = collector.collect(policy, generator, 100, version=0)
    second = collector.collect(policy, generator, 100, version=1)
    assert collector.played == 2 * 39 + 400
    # The first copy's first episode is cut after 100 steps of 200, the second's ends by itself.
    assert [len(segment.columns["reward"]) for segment in first] == [61, 39, 100]
    assert [len(segment.columns["reward"]) for segment in second] == [100, 61, 39]
    for segment in (first[0], second[1]):
        columns = segment.columns
        assert columns["truncated"].tolist() == [False] * 60 + [True]
        assert not columns["terminated"].any()
        assert len(columns[STATE]) == 62
        # Angles are continuous up to the last observation; a reset would jump.
        turn = np.diff(np.unwrap(np.arctan2(columns[STATE][:, 1], columns[STATE][:, 0])))
        assert np.abs(turn).max() < 0.45
    data = rollout(first, 0.9)
    assert data.length.tolist() == [1] * 200 and data.version.tolist() == [0] * 200
    assert data.chained.sum() == 197
    assert not data.chained[60]  # another episode
    assert rollout([first[1], second[0]], 0.9).chained[38]  # the same one goes on


@pytest.fixture
def few_episodes(monkeypatch):
    """Evaluation in a moment."""
    monkeypatch.setattr("experiments.learning_curve.EPISODES", 2)
    monkeypatch.setattr("experiments.learning_curve.FINAL_EPISODES", 4)


def test_training_counts_its_steps_and_repeats_itself(few_episodes):
    runs = [train("Pendulum-v1", 3, 600, envs=4, chunks=64, epochs=1) for _ in range(2)]
    assert runs[0]["returns"] == runs[1]["returns"] and len(runs[0]["returns"]) == 4
    assert runs[0]["curve"][-1][0] >= 600
    assert np.isfinite(runs[0]["returns"]).all()


def test_a_curve_leaves_evaluation_out_of_its_seconds(few_episodes):
    """Measuring an expensive policy costs no training time."""
    curve = LearningCurve("Pendulum-v1", 100, points=2)

    def act(observation):
        torch.randn(200, 200) @ torch.randn(200, 200)
        return np.zeros((len(observation), 1), np.float32)

    for done in range(0, 101, 10):
        curve.update(done, act)
    result = curve.result(act)
    assert [row[0] for row in result["curve"]] == [50, 100]
    assert result["seconds"] < 0.2
    np.testing.assert_array_equal(play("Pendulum-v1", act, 3), result["returns"][:3])


def test_scores_are_normalised_task_by_task():
    """Half of the way to the peer on one task and twice on another: the interquartile mean of both; sure, if seeds agree."""
    final = {
        "a": {"ours": np.full(4, 50.0), "sb3": np.full(4, 100.0)},
        "b": {"ours": np.full(4, -100.0), "sb3": np.full(4, -200.0)},
    }
    found = score(final, {"a": 0.0, "b": -300.0})
    assert found.value == pytest.approx((0.5 + 2.0) / 2)
    assert found.low == found.high == pytest.approx(found.value)
    final["a"]["ours"] = np.array([0.0, 0.0, 100.0, 100.0])
    wide = score(final, {"a": 0.0, "b": -300.0})
    assert wide.low < wide.high and wide.low <= wide.value <= wide.high


def test_times_to_the_peers_score_are_compared_by_medians():
    def runs(*arrivals):
        return [
            {"curve": [[1, t, 1.0]] if t else [[1, 9.0, 0.0]], "seconds": 9.0} for t in arrivals
        ]

    rows = {"a": {"ours": runs(1.0, 2.0, None), "sb3": runs(4.0, 4.0, 4.0)}}
    ratio, exact, times = wall(rows, {"a": 0.5})
    assert ratio == pytest.approx(0.5) and exact and times["a"]["ours"] == "2.0"
    rows = {"a": {"ours": runs(1.0, None, None), "sb3": runs(4.0, 4.0, 4.0)}}
    ratio, exact, times = wall(rows, {"a": 0.5})
    assert ratio == pytest.approx(9 / 4) and not exact and times["a"]["ratio"].startswith(">=")


def test_a_run_that_is_there_is_not_run_again(tmp_path):
    runs = Runs(tmp_path, sys.executable)
    file = tmp_path / "ppo-ours-Pendulum-v1-10-0.json"
    file.write_text(json.dumps({"returns": [1.0], "seconds": 1.0, "curve": []}))
    assert runs.result("ppo", "ours", "Pendulum-v1", 0, 10)["returns"] == [1.0]


def test_one_step_is_allowed_where_it_loses_two_points_at_most():
    """The same resets; of what passes, the smallest."""
    ten = np.arange(200) < 160
    assert allowed({1: np.arange(200) < 156, 4: ten, 10: ten}) == 1
    assert allowed({1: np.arange(200) < 155, 4: ten, 10: ten}) == 4
    assert allowed({1: ~ten, 10: ten}) == 10
    with pytest.raises(ValueError, match="same resets"):
        allowed({1: ten[:100], 10: ten})
