"""SFT, pretraining, PPOFlow and chunk-Q on a policy small enough to train in seconds."""

import copy

import numpy as np
import pytest
import torch

from learner.algorithms.chunk_q import ChunkQ, ChunkQConfig
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


def test_chunk_targets_closed_form(policy):
    """y = sum gamma^i r_i + gamma^L Q', no bootstrap past an end, masked rewards ignored, clamped."""
    config = ChunkQConfig(gamma=0.9, reward_bounds=(-1.0, 2.0))
    algorithm = ChunkQ(policy, config, FeatureCache(policy, "go"))
    for parameter in algorithm.target.parameters():
        parameter.zero_()
    algorithm.target.last.bias.fill_(0.5)  # Q' = 0.5 everywhere
    batch = {
        "step_mask": np.array(
            [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1] * 4], bool
        ),
        "reward": np.array(
            [[0, 0, 0, 1], [0, 0.5, 7, 7], [0, 0, 0, 0], [1, 0, 0, 0], [9] * 4], np.float32
        ),
        "steps": np.array([4, 2, 4, 1, 4]),
        "terminated": np.array([0, 0, 0, 1, 0], bool),
        "truncated": np.array([0, 0, 1, 0, 0], bool),
    }
    features = torch.zeros(5, *policy.feature_shape)
    expected = [0.9**3 + 0.9**4 * 0.5, 0.45 + 0.81 * 0.5, 0.0, 1.0, 2.0]
    np.testing.assert_allclose(algorithm.targets(batch, features), expected, rtol=1e-5)
    through = ChunkQ(
        policy,
        ChunkQConfig(gamma=0.9, timeout_is_terminal=False, step_cost=0.01),
        FeatureCache(policy, "go"),
    )
    through.target = algorithm.target
    cost = 0.01 * (1 + 0.9 + 0.81 + 0.729)
    assert float(through.targets(batch, features)[2]) == pytest.approx(
        0.9**4 * 0.5 - cost, rel=1e-4
    )


def test_critics_fit_a_known_chain(policy):
    """On a two-state chain that ends with reward 1, values approach gamma^4 and 1."""
    rng = np.random.default_rng(0)
    config = ChunkQConfig(gamma=0.9, critic_learning_rate=3e-3, tau=0.05)
    policy.action_normaliser.scale.fill_(1.0)
    algorithm = ChunkQ(policy, config, FeatureCache(policy, "go"))
    rows = 32
    last = np.arange(rows) % 2 == 1
    state = np.where(last[:, None], 1.0, -1.0).repeat(STATE, 1).astype(np.float32)
    batch = {
        **make_batch(rows),
        "observation.state": state,
        "next.observation.state": np.ones((rows, STATE), np.float32),
        "step_mask": np.ones((rows, C), bool),
        "steps": np.full(rows, C),
        "reward": np.where(last[:, None], [[1.0, 0, 0, 0]], 0.0).astype(np.float32),
        "terminated": last,
        "truncated": np.zeros(rows, bool),
        "observation.id": np.arange(rows),
        "next.observation.id": np.arange(rows, 2 * rows),
    }
    for _ in range(400):
        metrics = algorithm.update({**batch, "action": rng.normal(size=(rows, C, 7))})
    features = algorithm.cache.lookup(batch)
    with torch.no_grad():
        chunk = torch.as_tensor(batch["action"], dtype=torch.float32)
        value = policy.value(features, chunk).numpy()
    assert value[last].mean() == pytest.approx(1.0, abs=0.1)
    assert value[~last].mean() == pytest.approx(0.9**4, abs=0.1)
    assert metrics["critic_loss"] < 0.02


def test_steps_that_were_not_executed_do_not_reach_the_critic(policy):
    """Whatever a chunk holds beyond its mask, the value is the same."""
    features = torch.randn(3, *policy.feature_shape)
    mask = torch.tensor([[1.0, 1, 0, 0]]).repeat(3, 1)
    chunk = torch.randn(3, C, 7)
    other = chunk.clone()
    other[:, 2:] = 99.0
    torch.testing.assert_close(
        policy.critic(features, chunk, mask), policy.critic(features, other, mask)
    )
    assert policy.critic(features, chunk, mask).shape == (4, 3)


def test_actor_waits_then_follows_imitation(policy):
    """The acting flow moves only after the critic's warm-up, and candidates are switched on."""
    data = ImitationData(policy, make_windows(40), {"demo": 1.0})
    algorithm = ChunkQ(
        policy, ChunkQConfig(actor_warmup=2, actor_every=1), FeatureCache(policy, "go")
    )
    assert int(policy.candidates) == 1
    before = [parameter.clone() for parameter in policy.flow.parameters()]
    algorithm.update(make_batch(8), data)
    algorithm.update(make_batch(8), data)
    assert all(map(torch.equal, before, policy.flow.parameters()))
    metrics = algorithm.update(make_batch(8), data)
    assert "imitation_loss" in metrics and metrics["drift"] < 1e-9
    assert int(policy.candidates) == 4
    assert not all(map(torch.equal, before, policy.flow.parameters()))


def test_the_anchor_keeps_the_policy_where_nobody_corrected_it(policy):
    """With the anchor the policy drifts less from where it started; a person's windows do not hold it."""
    data = ImitationData(policy, make_windows(40), {"demo": 1.0})
    drifts = {}
    for name, anchor, taken in (("free", 0.0, 0), ("anchored", 30.0, 0), ("person", 30.0, 1)):
        config = ChunkQConfig(
            actor_warmup=0, actor_every=1, anchor=anchor, actor_learning_rate=1e-3
        )
        algorithm = ChunkQ(copy.deepcopy(policy), config, FeatureCache(policy, "go"))
        batch = {**make_batch(16), "intervention": np.full((16, C), taken, bool)}
        for _ in range(40):
            algorithm.update(batch, data)
        features = algorithm.cache.lookup(batch)
        noise = torch.randn(16, 28, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            moved = algorithm.actor.integrate(features, noise, 2)
            drifts[name] = float((moved - algorithm.reference.integrate(features, noise, 2)).std())
    assert drifts["anchored"] < 0.6 * drifts["free"]
    assert drifts["person"] == pytest.approx(drifts["free"], rel=0.5)


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


@pytest.mark.parametrize("name", ["sft", "ppo", "chunk_q"])
def test_resume_repeats_the_run_bit_for_bit(policy, name):
    """State saved after one update and loaded into a new object continues identically."""

    def build(own):
        if name == "sft":
            return SFT(own, SFTConfig(steps=10, batch=16, warmup=2), make_windows(30))
        if name == "ppo":
            return PPOFlow(own, PPOFlowConfig(critic_warmup=0, minibatch=8), PRIVILEGED)
        return ChunkQ(own, ChunkQConfig(actor_warmup=0, actor_every=1), FeatureCache(own, "go"))

    def step(algorithm, number):
        if name == "sft":
            return algorithm.update()
        if name == "ppo":
            return algorithm.update(make_segments(algorithm.policy, 4, seed=number), version=0)
        data = ImitationData(algorithm.policy, make_windows(20), {"demo": 1.0})
        return algorithm.update(make_batch(8, seed=number), data)

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
