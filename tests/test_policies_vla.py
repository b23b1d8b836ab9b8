"""The policy class, its normalisation, registry, runner and weights."""

import numpy as np
import pytest
import torch

from deploy.description import describe_job
from policies.language import tokens
from policies.normalise import QUANTILE_ROWS, Normaliser
from policies.policy import GRIPPER, shortest
from policies.presets import PRESETS
from policies.registry import make_policy
from policies.runner import PolicyRunner
from policies.streams import stream
from policies.weights import WeightsError, load_arrays, to_arrays
from twinrl.config import make_config
from twinrl.core.errors import ConfigError
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


def test_presets_have_the_sizes_that_they_promise():
    """About 1 M, some tens of M and 500 M parameters, without memory for them; single settings overrule."""
    limits = {"tiny": (0.7e6, 1.3e6), "small": (20e6, 50e6), "base": (450e6, 550e6)}
    assert limits.keys() == PRESETS.keys()
    for name, (low, high) in limits.items():
        with torch.device("meta"):
            policy = make_policy({"preset": name, "state_dim": 27, "pose_dim": 14})
        count = sum(parameter.numel() for parameter in policy.parameters())
        assert low < count < high, (name, count)
    narrow = make_policy({"preset": "tiny", "state_dim": 9, "pose_dim": 5, "hidden": 64})
    assert narrow.flow.project.out_features == 64 and narrow.latent == PRESETS["tiny"]["latent"]
    plain = make_policy({"state_dim": 9, "pose_dim": 5})
    tiny = make_policy({"preset": "tiny", "state_dim": 9, "pose_dim": 5})
    assert tiny.architecture == plain.architecture  # what a job gets that names no preset
    with pytest.raises(ConfigError, match="'huge': one of tiny, small, base"):
        make_policy({"preset": "huge", "state_dim": 9, "pose_dim": 5})
    with pytest.raises(ValueError, match="did you mean 'integration_steps'"):
        make_policy({"integration_step": 4, "state_dim": 9, "pose_dim": 5})


def test_a_job_keeps_what_its_preset_meant():
    """The policy that processes and checkpoints are given holds arguments, not the preset's name."""
    job = {"policy": {"preset": "small", "trunk_layers": 2}}
    told = describe_job(make_config(job))["policy"]
    assert "preset" not in told
    assert told["trunk_layers"] == 2 and told["latent"] == PRESETS["small"]["latent"]
    with pytest.raises(ConfigError, match="huge"):
        describe_job(make_config({"policy": {"preset": "huge"}}))


@pytest.mark.parametrize("method", ["quantiles", "moments"])
def test_normalisation_is_chosen_for_actions_and_states(method):
    """Quantiles bring what is between 1 and 99 % to [-1, 1], moments the standard deviation to 1."""
    policy = make_policy(
        {
            **CONFIG,
            "action_normalisation": method,
            "state_normalisation": method,
            "gripper": "binary",
        }
    )
    rng = np.random.default_rng(0)
    actions = rng.uniform(-0.02, 0.04, (4000, 7)).astype(np.float32)
    actions[:, GRIPPER] = rng.random(4000)
    states = rng.normal(3.0, 0.5, (4000, 9)).astype(np.float32)
    policy.fit_actions(actions)
    policy.fit_states(states)
    seen = policy.action_normaliser(torch.from_numpy(actions))
    if method == "quantiles":
        edges = torch.quantile(seen[:, :6], torch.tensor([0.01, 0.99]), dim=0)
        torch.testing.assert_close(edges, torch.tensor([[-1.0], [1.0]]).expand(2, 6))
    else:
        torch.testing.assert_close(seen[:, :6].std(0), torch.ones(6), atol=1e-2, rtol=0)
        normal = policy.state_normaliser(torch.from_numpy(states))
        torch.testing.assert_close(normal.std(0), torch.ones(9), atol=1e-2, rtol=0)
        torch.testing.assert_close(normal.mean(0), torch.zeros(9), atol=1e-3, rtol=0)
    assert seen[:, GRIPPER].amin() >= -1 and seen[:, GRIPPER].amax() <= 1  # its range is known
    again = make_policy(CONFIG)
    load_arrays(again, published(policy))
    torch.testing.assert_close(again.action_normaliser(torch.from_numpy(actions)), seen)
    with pytest.raises(ValueError, match="normalisation 'minmax': one of quantiles, moments"):
        make_policy({**CONFIG, "action_normalisation": "minmax"})


def test_quantiles_of_more_rows_than_torch_sorts():
    """Of very large data evenly spaced rows are enough."""
    values = torch.linspace(0.0, 1.0, 3 * QUANTILE_ROWS + 7)[:, None]
    normaliser = Normaliser(1)
    normaliser.fit(values, "quantiles")
    torch.testing.assert_close(normaliser.centre, torch.tensor([0.5]), atol=1e-4, rtol=0)
    torch.testing.assert_close(normaliser.scale, torch.tensor([0.49]), atol=1e-4, rtol=0)


def test_a_binary_gripper_is_thresholded_where_it_is_executed_only(policy, observation):
    """The stored path keeps what was drawn; what is executed is open or closed, as the path's last point says."""
    binary = make_policy({**CONFIG, "gripper": "binary"})
    binary.load_state_dict(policy.state_dict())
    chunk, info = policy.act(observation, "x", stream(0, 0), explore=True)
    sharp, told = binary.act(observation, "x", stream(0, 0), explore=True)
    np.testing.assert_array_equal(told["path"], info["path"])
    np.testing.assert_array_equal(told["log_prob"], info["log_prob"])
    np.testing.assert_array_equal(sharp[..., :GRIPPER], chunk[..., :GRIPPER])
    assert set(np.unique(sharp[..., GRIPPER])) == {0.0, 1.0}
    np.testing.assert_array_equal(sharp[..., GRIPPER], chunk[..., GRIPPER] >= 0.5)
    drawn = told["path"][:, -1].reshape(N, 4, 7)[..., GRIPPER]
    np.testing.assert_array_equal(sharp[..., GRIPPER], drawn >= 0)
    with pytest.raises(ValueError, match="gripper 'soft': one of continuous, binary"):
        make_policy({**CONFIG, "gripper": "soft"})


def test_rotations_near_pi_are_executed_as_the_shortest():
    """A box of shortest rotations has corners beyond pi; there, the same turn is commanded the other way round."""
    policy = make_policy(CONFIG)
    actions = np.zeros((200, 7), np.float32)
    for axis in range(3):  # turns of up to nearly pi about each axis
        actions[axis::3, 3 + axis] = np.linspace(-3.1, 3.1, len(actions[axis::3]))
    policy.fit_actions(actions)
    corner = torch.tensor([[9.0] * 7])
    executed = policy.physical(corner)[0, 3:6]
    assert float(executed.norm()) <= np.pi
    wanted, turned = (quaternion(v) for v in (torch.full((3,), 3.1), executed))
    assert abs(float(wanted @ turned)) == pytest.approx(1.0, abs=1e-5)
    small = torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shortest(small), small)  # unchanged bit for bit
    assert torch.equal(shortest(torch.zeros(1, 3)), torch.zeros(1, 3))
    beyond = shortest(torch.tensor([[0.0, np.pi + 0.1, 0.0]]))
    torch.testing.assert_close(beyond, torch.tensor([[0.0, 0.1 - np.pi, 0.0]]).float())
    free = make_policy(
        {**CONFIG, "rotation": "none"}
    )  # numbers that are no rotation stay as they are
    free.load_state_dict(policy.state_dict())
    torch.testing.assert_close(free.physical(corner)[0, 3:6], policy.action_high[3:6])
    with pytest.raises(ValueError, match="rotation 'euler': one of vector, none"):
        make_policy({**CONFIG, "rotation": "euler"})


def quaternion(rotation):
    angle = rotation.norm()
    return torch.cat([(angle / 2).cos()[None], rotation / angle * (angle / 2).sin()])
