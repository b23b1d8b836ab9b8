"""SFT, pretraining and PPOFlow on a policy small enough to train in seconds."""

import copy

import numpy as np
import pytest
import torch

from learner.algorithms.ppoflow import PPOFlow, PPOFlowConfig
from learner.algorithms.pretrain import Pretrain, PretrainConfig
from learner.algorithms.sft import SFT, ImitationData, SFTConfig
from learner.dataset import Windows
from learner.features import FeatureCache, encode
from policies.vla import VLA
from twinrl.core.segment import Segment

C, SIZE, STATE, POSE, PRIVILEGED = 4, 16, 3, 2, 4


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return VLA(
        state_dim=STATE,
        pose_dim=POSE,
        image_size=SIZE,
        integration_steps=2,
        hidden=96,
        latent=16,
        keypoints=4,
        width=4,
        critics=4,
        precision="float32",
    )


def images(rng, rows):
    """Random images of both cameras."""
    shape = (rows, SIZE, SIZE, 3)
    return {
        f"observation.images.{name}": rng.integers(0, 256, shape, dtype=np.uint8)
        for name in ("side", "wrist")
    }


def make_windows(rows, seed=0, source=0):
    """Windows whose action is a linear function of the state."""
    rng = np.random.default_rng(seed)
    state = rng.normal(size=(rows, STATE)).astype(np.float32)
    action = np.tile(state[:, None, :1], (1, C, 7)) * 0.5
    mask = np.ones((rows, C), np.float32)
    return Windows(
        images(rng, rows), state, action, mask, np.full(rows, source, np.int64), ["go"] * rows
    )


def make_segments(policy, count, version=0, seed=0):
    """On-policy segments as an actor writes them: real paths, the likelihood at acting time."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    segments = []
    for episode in range(count):
        steps, start = 10, np.array([0, 4, 8], np.int32)
        frames = images(rng, 4)
        state = rng.normal(size=(steps + 1, STATE)).astype(np.float32)
        seen = {
            **{key: value[:3] for key, value in frames.items()},
            "observation.state": state[start],
        }
        action, info = policy.act(seen, "go", generator, explore=True)
        success = bool(episode % 2)
        ends = np.arange(steps) == steps - 1
        columns = {
            "action": action.reshape(-1, 7)[:steps],
            "reward": (ends * success).astype(np.float32),
            "terminated": ends & success,
            "truncated": ends & (not success),
            "success": ends & success,
            "intervention": np.zeros(steps, bool),
            "policy_version": np.full(steps, version, np.int64),
            "observation.state": state,
            "privileged.state": rng.normal(size=(steps + 1, PRIVILEGED)).astype(np.float32),
            "frame_step": np.append(start, np.int32(steps)),
            "chunk_step": start,
            "policy.path": info["path"],
            "policy.log_prob": info["log_prob"],
            **frames,
        }
        header = {"source": "twin", "episode": str(episode), "first_step": 0, "instruction": "go"}
        segments.append(Segment(header, columns))
    return segments


def make_batch(rows, seed=0):
    """An off-policy batch without images' ids."""
    rng = np.random.default_rng(seed)
    steps = rng.integers(1, C + 1, rows)
    ended = rng.integers(0, 3, rows)
    return {
        **images(rng, rows),
        **{"next." + key: value for key, value in images(rng, rows).items()},
        "observation.state": rng.normal(size=(rows, STATE)).astype(np.float32),
        "next.observation.state": rng.normal(size=(rows, STATE)).astype(np.float32),
        "action": rng.normal(size=(rows, C, 7)).astype(np.float32),
        "reward": rng.random((rows, C)).astype(np.float32),
        "step_mask": np.arange(C) < steps[:, None],
        "steps": steps,
        "terminated": ended == 1,
        "truncated": ended == 2,
    }


def test_sft_learns_what_it_is_shown(policy):
    """The loss falls, the averaged weights are the result, and the encoder stays."""
    before = [parameter.clone() for parameter in policy.encoder_parameters()]
    config = SFTConfig(steps=400, batch=128, draws=1, learning_rate=3e-3, warmup=10, ema=0.98)
    data = make_windows(200)
    policy.state_normaliser.fit_moments(torch.tensor(data.state))
    policy.fit_actions(data.action.reshape(-1, 7))
    sft = SFT(policy, config, data)
    losses = []
    while not sft.done:
        losses.append(sft.update()["flow_loss"])
    assert np.mean(losses[-20:]) < 0.6 * np.mean(losses[:20])
    assert all(map(torch.equal, before, policy.encoder_parameters()))
    chunk, _ = policy.act(data.observation, "go", torch.Generator().manual_seed(0), explore=False)
    assert np.corrcoef(chunk[:, 0, 0], data.action[:, 0, 0])[0, 1] > 0.9


def test_imitation_data_draws_sources_by_share(policy):
    """A share of zero silences a source."""
    data = make_windows(10)
    data.source[5:] = 1
    imitation = ImitationData(policy, data, {"demo": 1.0})
    assert imitation._probability[5:].sum() == 0 and len(imitation) == 10


def test_pretraining_regresses_labels(policy):
    """Pose errors of the training scenes fall below the labels' own spread."""
    rng = np.random.default_rng(0)
    observation = {**images(rng, 128), "observation.state": np.zeros((128, STATE), np.float32)}
    labels = np.zeros((128, POSE), np.float32)
    for row in range(128):  # a bright square whose place is the label
        x, y = rng.integers(0, SIZE - 4, 2)
        for camera in ("side", "wrist"):
            observation[f"observation.images.{camera}"][row] //= 8
            observation[f"observation.images.{camera}"][row, y : y + 4, x : x + 4] = 255
        labels[row] = x / 100, y / 100
    pretrain = Pretrain(policy, PretrainConfig(steps=300, batch=64), observation, labels, "go")
    while not pretrain.done:
        metrics = pretrain.update()
    assert metrics["pose_loss"] < 0.1
    assert (pretrain.errors(observation, labels) < 0.5 * labels.std(0)).all()


def test_first_ratio_is_one_and_kl_zero(policy):
    """Data of the present version: the stored likelihood is the policy's own."""
    ppo = PPOFlow(policy, PPOFlowConfig(critic_warmup=0, epochs=1, ratio_power=1.0), PRIVILEGED)
    metrics = ppo.update(make_segments(policy, 6), version=0)
    assert abs(metrics["first_kl"]) < 1e-6
    assert metrics["behaviour_weight"] == 1.0 and metrics["lag"] == 0.0


def test_critic_learns_alone_during_warmup(policy):
    """The policy does not move before its critic has seen some iterations."""
    ppo = PPOFlow(policy, PPOFlowConfig(critic_warmup=1, minibatch=8), PRIVILEGED)
    before = [parameter.clone() for parameter in policy.flow.parameters()]
    assert "kl" not in ppo.update(make_segments(policy, 6), version=0)
    assert all(map(torch.equal, before, policy.flow.parameters()))
    ppo.update(make_segments(policy, 6), version=0)
    assert not all(map(torch.equal, before, policy.flow.parameters()))


def test_ppo_raises_the_likelihood_of_what_was_better(policy):
    """After an update, paths of positive advantage are more likely, relative to the others."""
    config = PPOFlowConfig(critic_warmup=0, critic_updates=0, ratio_power=0.2, anchor=0, max_kl=1.0)
    ppo = PPOFlow(policy, config, PRIVILEGED)
    segments = make_segments(policy, 40)
    ppo.update(segments, version=0)
    gains = {False: [], True: []}
    for segment in segments:
        columns = segment.columns
        seen = {key: columns[key][:3] for key in columns if "images" in key}
        seen["observation.state"] = columns["observation.state"][columns["chunk_step"]]
        with torch.no_grad():
            path = torch.from_numpy(columns["policy.path"])
            now = policy.path_log_prob(encode(policy, seen, "go"), path).numpy()
        gains[bool(columns["success"].any())].extend(now - columns["policy.log_prob"])
    assert np.mean(gains[True]) > np.mean(gains[False]) + 0.1


def test_the_learning_rate_follows_the_kl(policy):
    """Too steep a step stops the iteration and lowers the rate; too timid ones raise it."""
    for rate, sign in ((3e-2, -1), (1e-7, 1)):
        config = PPOFlowConfig(critic_warmup=0, learning_rate=rate, minibatch=8, ratio_power=1.0)
        ppo = PPOFlow(copy.deepcopy(policy), config, PRIVILEGED)
        metrics = ppo.update(make_segments(policy, 10), version=0)
        assert np.sign(metrics["learning_rate"] - rate) == sign
        assert (metrics["updates"] < 4 * 4) == (sign < 0)


def test_lagging_data_get_a_truncated_weight(policy):
    """Older versions' data are corrected towards the proximal policy, never by more than the bound."""
    segments = make_segments(policy, 6, version=3)
    with torch.no_grad():
        for parameter in policy.flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    config = PPOFlowConfig(critic_warmup=0, epochs=1, ratio_power=1.0, max_behaviour_weight=1.5)
    ppo = PPOFlow(policy, config, PRIVILEGED)
    metrics = ppo.update(segments, version=5)
    assert metrics["lag"] == 2.0
    assert metrics["behaviour_weight"] != 1.0 and metrics["behaviour_weight"] <= 1.5
    assert abs(metrics["first_kl"]) < 1e-5  # the clip is centred on the proximal policy


def test_cache_encodes_each_observation_once(policy):
    """Lookups by id agree with encoding, and repeat without it."""
    cache = FeatureCache(policy, "go")
    batch = {**make_batch(6), "observation.id": np.array([5, 3, 5, 9, 3, 1])}
    for key in batch:
        if key.startswith("observation.") and key != "observation.id":
            batch[key] = batch[key][[0, 1, 0, 3, 1, 5]]  # equal ids are equal observations
    torch.testing.assert_close(cache.lookup(batch), encode(policy, batch, "go"))
    assert cache.stats() == {"entries": 4, "hit_share": 0.0}
    batch["observation.images.side"] = np.zeros_like(batch["observation.images.side"])
    before = cache.lookup(batch)
    assert cache.stats()["hit_share"] == 1.0
    del batch["observation.id"]
    assert not torch.equal(before, cache.lookup(batch))


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_resume_repeats_the_run_bit_for_bit(policy, name):
    """State saved after one update and loaded into a new object continues identically."""

    def build(own):
        if name == "sft":
            return SFT(own, SFTConfig(steps=10, batch=16, warmup=2), make_windows(30))
        return PPOFlow(own, PPOFlowConfig(critic_warmup=0, minibatch=8), PRIVILEGED)

    def step(algorithm, number):
        if name == "sft":
            return algorithm.update()
        return algorithm.update(make_segments(algorithm.policy, 4, seed=number), version=0)

    first = build(policy)
    step(first, 0)
    twin = copy.deepcopy(policy)
    state = copy.deepcopy(first.state_dict())
    expected = step(first, 1)
    second = build(twin)
    second.load_state_dict(state)
    assert step(second, 1) == pytest.approx(expected, nan_ok=True, abs=0)
    for mine, theirs in zip(policy.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
