"""The policy class, its normalisation, registry, runner and weights."""

import numpy as np
import pytest
import torch

from policies.language import tokens
from policies.normalise import Normaliser
from policies.registry import make_policy
from policies.runner import PolicyRunner
from policies.streams import stream
from policies.weights import WeightsError, load_arrays, to_arrays
from twinrl.weights import checksum

CONFIG = {
    "name": "vla",
    "state_dim": 9,
    "pose_dim": 5,
    "image_size": 32,
    "integration_steps": 3,
    "hidden": 32,
    "latent": 16,
    "keypoints": 4,
    "width": 4,
    "critics": 3,
}
N = 6


@pytest.fixture
def policy():
    torch.manual_seed(0)
    policy = make_policy(CONFIG)
    policy.fit_actions(np.random.default_rng(0).normal(0, 0.01, (200, 7)).astype(np.float32))
    return policy


@pytest.fixture
def observation():
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (2, N, 32, 32, 3), dtype=np.uint8)
    return {
        "observation.images.side": images[0],
        "observation.images.wrist": images[1],
        "observation.state": rng.normal(size=(N, 9)).astype(np.float32),
    }


def published(policy):
    return {name: array.copy() for name, array in to_arrays(policy).items()}


def test_act_is_physical_clipped_and_explains_itself(policy, observation):
    """Exploring returns the raw path; only the executed chunk is clipped and in physical units."""
    generator = torch.Generator().manual_seed(0)
    chunk, info = policy.act(observation, "pick the banana", generator, explore=True)
    assert chunk.shape == (N, 4, 7) and chunk.dtype == np.float32
    assert info["path"].shape == (N, 4, 28) and info["log_prob"].shape == (N,)
    assert (chunk[..., 6] >= 0).all() and (chunk[..., 6] <= 1).all()
    raw = policy.action_normaliser.inverse(torch.tensor(info["path"][:, -1]).view(N, 4, 7)).numpy()
    expected = np.clip(raw, policy.action_low.numpy(), policy.action_high.numpy())
    np.testing.assert_array_equal(chunk, expected)
    assert (raw != chunk).any()


def test_path_likelihood_of_act_is_the_learners(policy, observation):
    """The likelihood stored while acting is what the learner computes from the stored path."""
    _, info = policy.act(observation, "x", torch.Generator().manual_seed(0), explore=True)
    tensors = {key: torch.from_numpy(value) for key, value in observation.items()}
    with torch.no_grad():
        again = policy.path_log_prob(policy.encode(tensors, "x"), torch.from_numpy(info["path"]))
    np.testing.assert_allclose(again, info["log_prob"], rtol=1e-4)


def test_the_pose_prediction_feeds_forward_without_gradient(policy, observation):
    """Imitation cannot bend the auxiliary head; pose labels can."""
    tensors = {key: torch.from_numpy(value) for key, value in observation.items()}
    features = policy.encode(tensors, "x")
    assert features.shape == (N, *policy.feature_shape)
    features[:, policy.latent : policy.latent + policy.pose_dim].sum()
    policy.sample(features, torch.zeros(N, 28)).sum().backward()
    assert policy.pose[0].weight.grad is None
    policy.predict_pose(policy.encode(tensors, "x")).sum().backward()
    assert policy.pose[0].weight.grad.abs().sum() > 0


def test_instructions_differ_and_batch(policy, observation):
    """One instruction for all equals the same instruction for each; other words, other features."""
    tensors = {key: torch.from_numpy(value) for key, value in observation.items()}
    with torch.no_grad():
        same = policy.encode(tensors, "put the banana away")
        each = policy.encode(tensors, ["put the banana away"] * N)
        other = policy.encode(tensors, "erase the board")
    torch.testing.assert_close(same, each)
    assert (same - other).abs().max() > 1e-3
    assert tokens("Put the Banana!", 512) == tokens("put the banana", 512)
    with pytest.raises(ValueError, match="2 instructions for 6"):
        policy.encode(tensors, ["a", "b"])


def test_choose_leaves_the_first_candidate_only_where_all_critics_agree(policy, observation):
    """The chosen chunk has the largest advantage over the first that every critic grants."""
    tensors = {key: torch.from_numpy(value) for key, value in observation.items()}
    with torch.no_grad():
        features = policy.encode(tensors, "x")
        chosen = policy.choose(features, 8, torch.Generator().manual_seed(2))
        noise = torch.randn(N * 8, 28, generator=torch.Generator().manual_seed(2))
        tiled = features.repeat_interleave(8, 0)
        chunks = policy.sample(tiled, noise)
        values = policy.critic(tiled, chunks, torch.ones(N * 8, 4)).view(-1, N, 8)
        chunks = chunks.view(N, 8, 4, 7)
        for i in range(N):
            sure = [
                min(float(v[i, k] - v[i, 0]) for v in values) for k in range(8)
            ]  # candidate 0 has 0
            best = int(np.argmax(sure))
            assert sure[best] >= 0
            torch.testing.assert_close(chosen[i], chunks[i, best])


def test_normaliser_round_trip_and_degenerate_dimensions():
    """Values come back; a constant dimension keeps the minimum scale; known ranges overrule."""
    values = torch.randn(500, 3) * torch.tensor([1.0, 20.0, 0.0]) + 3.0
    for fit in ("fit_quantiles", "fit_moments"):
        normaliser = Normaliser(3)
        getattr(normaliser, fit)(values, minimum_scale=0.1)
        torch.testing.assert_close(normaliser.inverse(normaliser(values)), values)
        assert normaliser.scale[2] == pytest.approx(0.1)
        assert normaliser(values)[:, :2].abs().mean() < 1.5
    normaliser.fix([1], 0.0, 1.0)
    assert normaliser(torch.tensor([0.0, 1.0, 0.0]))[1] == 1.0
    assert set(normaliser.state_dict()) == {"centre", "scale"}


def test_registry_names_what_it_knows():
    """An unknown name is refused with the known ones; module:Class works."""
    with pytest.raises(ValueError, match="vla"):
        make_policy({"name": "transformer"})
    assert type(make_policy({**CONFIG, "name": "policies.vla:VLA"})).__name__ == "VLA"


def test_weights_round_trip(policy, observation):
    """Loaded weights act alike, and the arrays are views until copied."""
    runner = PolicyRunner(CONFIG, seed=3)
    with pytest.raises(RuntimeError, match="no weights"):
        runner.infer(observation, "x", explore=False)
    arrays = published(policy)
    runner.load(7, arrays, checksum(arrays))
    assert runner.version == 7
    expected, _ = policy.act(observation, "x", stream(3, 0), explore=False)
    actual, info = runner.infer(observation, "x", explore=False)
    np.testing.assert_array_equal(actual, expected)
    assert info == {}
    runner.seed(3)
    np.testing.assert_array_equal(runner.infer(observation, "x", explore=False)[0], expected)
    view = to_arrays(policy)["action_low"]
    policy.action_low.fill_(-5.0)
    assert (view == -5.0).all()


def test_a_bad_load_changes_nothing(policy):
    """Missing, surplus, misshapen, mistyped or corrupted weights are refused as a whole."""
    runner = PolicyRunner(CONFIG)
    before = published(runner.policy)
    good = published(policy)
    name = "flow.project.weight"
    bad = {
        "missing": {key: value for key, value in good.items() if key != name},
        "surplus": {**good, "extra": np.zeros(1, np.float32)},
        "shape": {**good, name: good[name][:, :-1]},
        "dtype": {**good, name: good[name].astype(np.float64)},
    }
    for word, arrays in bad.items():
        with pytest.raises(WeightsError, match=word if word in ("shape", "dtype") else "names"):
            runner.load(1, arrays)
    flipped = {**good, name: good[name] + np.float32(1e-7)}
    with pytest.raises(WeightsError, match="checksum"):
        runner.load(1, flipped, checksum(good))
    assert runner.version == -1
    for key, value in published(runner.policy).items():
        np.testing.assert_array_equal(value, before[key])


def test_checksum_ignores_order_and_sees_everything():
    """Names, dtypes, shapes and bytes count; order does not."""
    a = {"x": np.arange(6, dtype=np.float32), "y": np.ones(2)}
    assert checksum(a) == checksum(dict(reversed(a.items())))
    others = [{**a, "x": a["x"].reshape(2, 3)}, {**a, "x": a["x"].astype(np.int32)}, {"x": a["x"]}]
    assert len({checksum(b) for b in [a, *others]}) == 4


def test_load_arrays_accepts_read_only_views(policy):
    """Arrays from the wire are read-only."""
    arrays = published(policy)
    for array in arrays.values():
        array.flags.writeable = False
    load_arrays(make_policy(CONFIG), arrays)


def test_numbers_that_never_vary_in_scenes_are_kept_from_the_encoder(policy, observation):
    """Placed scenes have no past actions: the latent ignores them, the flow head's state does not."""
    rng = np.random.default_rng(2)
    states = rng.normal(size=(100, 9)).astype(np.float32)
    states[:, 4:] = 0.5
    policy.fit_scenes(torch.from_numpy(states), torch.randn(100, 5))
    policy.fit_states(rng.normal(size=(100, 9)).astype(np.float32))
    tensors = {key: torch.from_numpy(value) for key, value in observation.items()}
    moved = {**tensors, "observation.state": tensors["observation.state"].clone()}
    moved["observation.state"][:, 4:] += 1.0
    with torch.no_grad():
        before, after = policy.encode(tensors, "x"), policy.encode(moved, "x")
        here = {**tensors, "observation.state": tensors["observation.state"] + 1.0}
        shifted = policy.encode(here, "x")
    seen = policy.latent + policy.pose_dim
    torch.testing.assert_close(before[:, :seen], after[:, :seen])
    assert (before[:, seen:] - after[:, seen:]).abs().max() > 0.5
    assert (before[:, :seen] - shifted[:, :seen]).abs().max() > 1e-3
