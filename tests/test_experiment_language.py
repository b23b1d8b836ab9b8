"""Several instructions in one batch, from an actor to the learner, and the experiment that measures whether they are read."""

import json

import numpy as np
import pytest
import torch

from actors.evaluate import evaluate
from experiments import language
from experiments.stand_in import collect_into
from learner.algorithms.pretrain import Pretrain, PretrainConfig
from learner.dataset import windows
from learner.features import FeatureCache, encode
from policies.registry import make_policy
from twins import make_env

SIZE, STATE, POSE = 16, 3, 1
TOLD = ["put it left", "put it right"]


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return make_policy(
        {
            "state_dim": STATE,
            "pose_dim": POSE,
            "cameras": ("side",),
            "image_size": SIZE,
            "integration_steps": 2,
            "critics": 0,
        }
    )


def observation(rows, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "observation.state": rng.normal(size=(rows, STATE)).astype(np.float32),
        "observation.images.side": rng.integers(0, 256, (rows, SIZE, SIZE, 3), np.uint8),
    }


def test_a_batch_with_instructions_is_encoded_with_them_and_cached(policy):
    cache = FeatureCache(policy, TOLD[0])
    seen = {key: value[[0, 0, 1, 0]] for key, value in observation(2).items()}
    told = np.array([TOLD[0], TOLD[1], TOLD[1], TOLD[0]])
    batch = {**seen, "instruction": told, "observation.id": np.array([1, 2, 3, 1])}
    expected = encode(policy, seen, told.tolist())
    assert not torch.allclose(expected[0], expected[1])  # one picture, two instructions
    torch.testing.assert_close(cache.lookup(batch), expected)
    torch.testing.assert_close(cache.lookup(batch), expected)
    assert cache.stats() == {"entries": 3, "hit_share": 0.5}
    unnamed = {**seen, "instruction": told}
    torch.testing.assert_close(cache.lookup(unnamed), expected)
    torch.testing.assert_close(cache.lookup(seen), encode(policy, seen, TOLD[0]))


def test_labels_that_follow_the_words_can_be_learned_and_only_with_them(policy):
    """Equal pictures: the label is the state's first number, or its negative where the other thing is asked."""
    seen, rng = observation(512), np.random.default_rng(1)
    which = rng.integers(2, size=512)
    labels = np.where(which, 1.0, -1.0)[:, None] * seen["observation.state"][:, :1]
    told = [TOLD[k] for k in which]
    train = {key: value[56:] for key, value in seen.items()}
    test = {key: value[:56] for key, value in seen.items()}
    errors = {}
    for name, texts in (("told", told), ("silent", TOLD[0])):
        learner = make_policy(
            {
                "state_dim": STATE,
                "pose_dim": POSE,
                "cameras": ("side",),
                "image_size": SIZE,
                "critics": 0,
            }
        )
        silent = isinstance(texts, str)
        algorithm = Pretrain(
            learner,
            PretrainConfig(steps=300, batch=64),
            train,
            labels[56:],
            texts if silent else texts[56:],
        )
        while not algorithm.done:
            algorithm.update()
        errors[name] = algorithm.errors(test, labels[:56], None if silent else texts[:56])[0]
    assert errors["told"] < 0.5 * errors["silent"]


class Listener:
    """In a policy's place: stands still and keeps what it was told."""

    def __init__(self):
        self.heard = []

    def infer(self, observation, instruction, explore):
        self.heard.append(list(instruction))
        return np.zeros((len(observation["observation.state"]), 4, 7), np.float32), {}


def test_evaluation_tells_each_row_what_is_asked_in_its_episode():
    env = make_env(language.TASK, 2, image_size=SIZE, cameras=(), max_steps=4)
    errands = env.task.errands
    starts = [
        {"seed": k, "errand": errand.name, "instruction": errand.held_out[k]}
        for k, errand in enumerate(errands)
    ]
    listener = Listener()
    outcome = evaluate(env, listener, starts)
    wanted = [start["instruction"] for start in starts]
    assert listener.heard == [wanted[:2], wanted[2:]] and (outcome.steps == 4).all()


def test_a_segment_and_its_windows_carry_the_episodes_own_words():
    env = make_env(language.TASK, 3, image_size=SIZE, cameras=("side",), max_steps=6)
    segments = []
    segmenter = collect_into(env, "demo", segments)
    told = []
    for seed in (0, 1):
        first, _ = env.reset(seed=seed)
        told += env.instructions()
        segmenter.begin(first, np.ones(3, bool))
        for _ in range(3):
            segmenter.add(env.step_chunk(env.expert()[:, None].repeat(2, axis=1)))
        segmenter.cut(np.ones(3, bool))
    assert [segment.header["instruction"] for segment in segments] == told
    assert [segment.header["configuration"]["instruction"] for segment in segments] == told
    data = windows(segments, 2)
    assert data.instruction == [text for text in told for _ in range(3)]


def test_the_experiment_runs_and_its_cells_are_what_they_say(tmp_path, monkeypatch):
    played = {}
    true = language.evaluate

    def recorded(env, runner, starts):
        played[len(played)] = (starts, type(runner).__name__)
        return true(env, runner, starts)

    monkeypatch.setattr(language, "evaluate", recorded)
    target = tmp_path / "language.json"
    words = ["--quick", "--first", "1", "--episodes", "4", "--json", str(target)]
    words += ["scenes.count=32", "pretrain.steps=2", "sft.steps=2", "demonstrations.episodes=2"]
    language.main(words)
    result = json.loads(target.read_text())
    cells = [row["cell"] for row in result["rows"]]
    assert cells == ["success", "paraphrase", "combination", "swapped", "chance"]
    assert all(f"language_{cell}" in result["figures"] for cell in cells)
    assert result["figures"]["language_success_n"] == 4
    held_out = result["rows"][0]["held_out"]
    by_name = {
        errand.name: errand for errand in language.errands_of(language.make_task(language.TASK))
    }
    starts = {cell: played[k][0] for k, cell in enumerate(cells)}
    for cell, errands, wordings in (
        ("success", set(by_name) - {held_out}, "instructions"),
        ("paraphrase", set(by_name) - {held_out}, "held_out"),
        ("combination", {held_out}, "instructions"),
    ):
        for start in starts[cell]:
            assert start["errand"] in errands, cell
            assert start["instruction"] in getattr(by_name[start["errand"]], wordings), cell
    for start in starts["swapped"]:
        texts = by_name[start["errand"]]
        assert start["instruction"] not in texts.instructions + texts.held_out
    assert starts["chance"] == starts["success"] and played[4][1] == "Wordless"
    # Less than all.
    language.main(["--cells", "swapped", *words])
    result = json.loads(target.read_text())
    assert [row["cell"] for row in result["rows"]] == ["swapped"] and len(played) == 6
    assert "--cells swapped" in result["command"]
    with pytest.raises(SystemExit):
        language.main(["--cells", "swaped", *words])
    # The same scenes in every cell.
    places = [[(s["red_block"], s["seed"]) for s in each] for each in starts.values()]
    assert all(each == places[0] for each in places)


def test_seeds_are_pooled():
    rows = [
        {"cell": "success", "episodes": 10, "successes": 9, "wrong": 1},
        {"cell": "success", "episodes": 30, "successes": 21, "wrong": 3},
    ]
    figures = language.summarise(rows)
    assert figures["language_success"] == 0.75 and figures["language_success_wrong"] == 0.1
    assert figures["language_success_low"] < 0.75 < figures["language_success_high"]
