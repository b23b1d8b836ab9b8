"""PPOFlow's parts against closed forms, and the mechanisms of what is known to go wrong."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.evaluate import evaluate
from learner.algorithms.ppoflow import PPOFlow, PPOFlowConfig
from learner.features import encode
from learner.rollout import gae, rollout
from learner.stages.begin import prepare
from policies.vla import VLA
from twinrl.core.segment import Segment
from twinrl.env import PRIVILEGED, STATE

C, A, DIM, EXTRA = 4, 2, 3, 2
PLAIN = PPOFlowConfig(critic_warmup=0, epochs=1, ratio_power=1.0, max_kl=1e9)


def make_policy(steps=1, chunk=C, **settings):
    torch.manual_seed(0)
    policy = VLA(
        state_dim=DIM,
        pose_dim=0,
        cameras=(),
        chunk=chunk,
        action_dim=A,
        integration_steps=steps,
        latent=8,
        hidden=32,
        critics=0,
        **settings,
    )
    policy.flow.log_std_band.copy_(torch.tensor([-1.0, -0.5]))
    return policy


def play(policy, count=4, steps=10, version=0, seed=0, reward=None, told=""):
    """On-policy segments as an actor writes them; the last chunk of each ends early."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    segments = []
    start = np.arange(0, steps, policy.chunk, dtype=np.int32)
    for episode in range(count):
        state = rng.normal(size=(steps + 1, DIM)).astype(np.float32)
        action, info = policy.act({STATE: state[start]}, told, generator, explore=True)
        ends = np.arange(steps) == steps - 1
        action = action.reshape(-1, A)[:steps]
        columns = {
            "action": action,
            "reward": rng.normal(size=steps).astype(np.float32)
            if reward is None
            else reward(action),
            "terminated": ends & bool(episode % 2),
            "truncated": ends & (not episode % 2),
            "policy_version": np.full(steps, version, np.int64),
            STATE: state,
            PRIVILEGED: rng.normal(size=(steps + 1, EXTRA)).astype(np.float32),
            "chunk_step": start,
            "policy.path": info["path"],
            "policy.log_prob": info["log_prob"],
        }
        header = {"episode": str(episode), "first_step": 0, "instruction": told}
        segments.append(Segment(header, columns))
    return segments


def changed(segments, **columns):
    """Copies of `segments` with `columns` {name: function of the old one}."""
    return [
        Segment(s.header, {**s.columns, **{k: f(s.columns[k].copy()) for k, f in columns.items()}})
        for s in segments
    ]


def parameters_of(policy):
    return torch.cat([parameter.detach().flatten() for parameter in policy.flow.parameters()])


# -- likelihoods and ratios --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "chunk_steps", "noise"),
    [(1, 8, "head"), (1, 10, "head"), (3, 10, "head"), (1, 10, "sde"), (4, 10, "sde")],
)
def test_the_first_ratio_is_one(steps, chunk_steps, noise):
    """From the stored path and x_0, whole chunks or with masked tails, with either noise."""
    policy = make_policy(steps)
    policy.flow.sde_noise.fill_(0.5 if noise == "sde" else 0.0)
    ppo = PPOFlow(policy, PLAIN, EXTRA)
    metrics = ppo.update(play(policy, steps=chunk_steps), version=0)
    assert abs(metrics["first_kl"]) < 1e-6 and metrics["clip_fraction"] == 0.0
    assert metrics["behaviour_weight"] == 1.0


def test_a_clipped_stored_action_would_shift_the_ratio():
    """Why the raw path is stored: the executed action in its place is another path."""
    policy = make_policy(2)
    segments = play(policy, steps=8)
    clipped = changed(
        segments,
        **{
            "policy.path": lambda path: np.concatenate(
                [path[:, :-1], path[:, -1:].clip(-0.5, 0.5)], 1
            )
        },
    )
    wrong = PPOFlow(policy, PLAIN, EXTRA).update(clipped, version=0)
    assert abs(wrong["first_kl"]) > 0.5


def test_the_first_point_of_a_path_must_be_its_own():
    """Another x_0 does not cancel: it is where the mean starts."""
    policy = make_policy(1)
    shift = np.array([[[0.3], [0.0]]], np.float32)
    moved = changed(play(policy, steps=8), **{"policy.path": lambda path: path + shift})
    assert abs(PPOFlow(policy, PLAIN, EXTRA).update(moved, version=0)["first_kl"]) > 0.05


@pytest.mark.parametrize("trained", [False, True])
def test_the_encoder_is_trained_where_that_is_wanted(trained):
    """Its gradient comes from the likelihood; on the first minibatch it is the encoder that acted."""
    policy = make_policy()
    words = policy.language.embedding.weight.detach().clone()
    algorithm = PPOFlow(policy, replace(PLAIN, train_encoder=trained, learning_rate=1e-3), EXTRA)
    metrics = algorithm.update(play(policy, told="go"), 0)
    assert abs(metrics["first_kl"]) < 1e-6
    moved = (policy.language.embedding.weight != words).any(1)
    assert int(moved.sum()) == trained  # the one word that was told


@pytest.mark.parametrize("steps", [1, 3])
def test_what_was_never_executed_counts_only_in_a_path_of_several_steps(steps):
    """At K = 1 the policy learns the same whatever a chunk holds beyond its end; at larger K the path is one."""
    policy = make_policy(steps)
    segments = play(policy, steps=10)  # the third chunk executes two of four actions

    def other_tail(path):
        path[2, -1, 2 * A :] += 0.4
        return path

    after = []
    for data in (segments, changed(segments, **{"policy.path": other_tail})):
        learning = copy.deepcopy(policy)
        torch.manual_seed(1)  # of the critic
        PPOFlow(learning, PLAIN, EXTRA).update(data, version=0)
        after.append(parameters_of(learning))
    same = torch.allclose(*after, atol=1e-7)
    assert same == (steps == 1)


def test_lag_moves_the_clip_to_the_present_policy_and_weighs_the_past():
    """Decoupled: proximal and behaviour policies are two. The weight is truncated; masked tails change neither."""
    policy = make_policy(1)
    for chunk_steps in (8, 10):
        moving = copy.deepcopy(policy)
        segments = play(moving, steps=chunk_steps, version=3)
        with torch.no_grad():
            for parameter in moving.flow.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        config = replace(PLAIN, max_behaviour_weight=1.5)
        metrics = PPOFlow(moving, config, EXTRA).update(segments, version=5)
        assert metrics["lag"] == 2.0 and abs(metrics["first_kl"]) < 1e-5
        assert metrics["behaviour_weight"] != 1.0 and metrics["behaviour_weight"] <= 1.5


def test_the_ratio_power_scales_the_policys_gradient_and_nothing_else():
    """On the first minibatch by exactly s; the critic learns the same."""
    norms, critics = [], []
    for power in (1.0, 0.25):
        policy = make_policy(2)
        config = replace(PLAIN, ratio_power=power, minibatch=1000)
        ppo = PPOFlow(policy, config, EXTRA)
        norms.append(ppo.update(play(policy), version=0)["gradient_norm"])
        critics.append(torch.cat([p.detach().flatten() for p in ppo.value.parameters()]))
    assert norms[1] == pytest.approx(0.25 * norms[0], rel=1e-4)
    assert torch.equal(*critics)


# -- advantages ---------------------------------------------------------------------------------------------


def chunks_of_an_episode(rng, count, gamma):
    """Rewards of single steps, chunk lengths, and what a rollout makes of them."""
    length = rng.integers(1, C + 1, count)
    rewards = [rng.normal(size=n) for n in length]
    chunk_reward = np.array([(gamma ** np.arange(len(r)) * r).sum() for r in rewards])
    return rewards, chunk_reward, gamma**length


@pytest.mark.parametrize("terminated", [True, False])
def test_with_lambda_one_advantages_are_discounted_returns_of_single_steps(terminated):
    """Chunks of any length: sum_t gamma^t r_t (+ gamma^T V after a time-out) minus the value, by plain loops."""
    rng, gamma, count = np.random.default_rng(0), 0.9, 6
    rewards, reward, discount = chunks_of_an_episode(rng, count, gamma)
    value, next_value = rng.normal(size=count), rng.normal(size=count)
    next_value[:-1] = value[1:]
    last = np.arange(count) == count - 1
    found = gae(reward, discount, value, next_value, last & terminated, ~last, 1.0)
    for m in range(count):
        total, factor = 0.0, 1.0
        for r in np.concatenate(rewards[m:]):
            total, factor = total + factor * r, factor * gamma
        total += 0.0 if terminated else factor * next_value[-1]
        assert found[m] == pytest.approx(total - value[m], rel=1e-5)


@pytest.mark.parametrize("lam", [0.0, 0.7])
def test_gae_is_the_weighted_mean_of_n_chunk_advantages(lam):
    """(1 - lam) sum_n lam^(n-1) A^(n), the rest of the weight on the longest: by brute force."""
    rng, count = np.random.default_rng(1), 5
    _, reward, discount = chunks_of_an_episode(rng, count, 0.9)
    value, next_value = rng.normal(size=count), rng.normal(size=count)
    last = np.arange(count) == count - 1
    found = gae(reward, discount, value, next_value, np.zeros(count, bool), ~last, lam)
    value = np.append(value, next_value[-1])
    value_after = np.append(next_value[:-1], next_value[-1])
    for m in range(count):
        expected, weight = 0.0, 1.0
        for n in range(1, count - m + 1):
            advantage, factor = 0.0, 1.0
            for k in range(
                m, m + n
            ):  # n TD errors: n-chunk return with each chunk's own next value
                advantage += factor * (reward[k] + discount[k] * value_after[k] - value[k])
                factor *= discount[k]
            share = weight if n == count - m else weight * (1 - lam)
            expected, weight = expected + share * advantage, weight * lam
        assert found[m] == pytest.approx(expected, rel=1e-5)


# -- values -------------------------------------------------------------------------------------------------


def test_a_critic_on_features_sees_what_follows_each_chunk():
    """The next features are those of the next chunk's start, or of the segment's last observation."""
    policy = make_policy(1)
    segments = play(policy, count=3, steps=10)
    ppo = PPOFlow(policy, replace(PLAIN, critic="features"), EXTRA)
    data = rollout(segments, 0.9)
    features = encode(policy, data.observation, data.instruction)
    found = ppo._transitions(data, features)
    after = np.concatenate([s.columns[STATE][[4, 8, 10]] for s in segments])
    torch.testing.assert_close(found["critic"], features)
    torch.testing.assert_close(found["next_critic"], encode(policy, {STATE: after}, ""))
    assert "kl" in ppo.update(segments, version=0)


def test_without_privileged_state_the_critic_sees_the_policys_features():
    """A real arm: cameras, and nobody who knows the poses. Without cameras the state is all there is."""
    real = VLA(state_dim=DIM, pose_dim=0, cameras=("side",), image_size=16, critics=0, width=4)
    assert PPOFlow(real, PLAIN, 0).value.network[0].in_features == real.flow.summary_dim
    assert PPOFlow(real, PLAIN, 5).value.network[0].in_features == DIM + 5
    assert PPOFlow(make_policy(), PLAIN, 0).value.network[0].in_features == DIM
    with pytest.raises(ValueError, match="auto, state, features"):
        PPOFlow(make_policy(), replace(PLAIN, critic="image"), 0)


def test_values_far_from_one_are_learned_in_their_own_unit():
    """Returns near -500: the network's unit follows them, without moving what it says in between."""
    errors = {}
    for normalised in (True, False):
        policy = make_policy(1)
        config = replace(PLAIN, normalise_values=normalised, gamma=0.0, critic_updates=100)
        ppo = PPOFlow(policy, config, EXTRA)
        for _ in range(2):
            segments = play(policy, count=20, reward=lambda action: 50 * action[:, 0] - 500)
            loss = ppo.update(segments, version=0)["critic_loss"]
        errors[normalised] = loss / float(ppo._memory[-1]["reward"].var())
    assert errors[True] < 1.2 and errors[False] > 5.0  # 1: all but what the state does not say
    states = torch.randn(5, DIM + EXTRA)
    with torch.no_grad():
        said = ppo._value_centre + ppo._value_scale * ppo.value(states)
        ppo._rescale_values(torch.tensor([3.0, 40.0, -7.0]))
        again = ppo._value_centre + ppo._value_scale * ppo.value(states)
    torch.testing.assert_close(said, again, rtol=1e-3, atol=1e-2)


# -- acting -------------------------------------------------------------------------------------------------


def test_evaluation_has_its_noise_off():
    """However loud the noise head is, what is evaluated is the integration without it."""
    policy, generator = make_policy(2), torch.Generator()
    seen = {STATE: np.ones((5, DIM), np.float32)}
    quiet = policy.act(seen, "", generator.manual_seed(0), explore=False)[0]
    policy.flow.log_std_band.fill_(2.0)
    again, info = policy.act(seen, "", generator.manual_seed(0), explore=False)
    np.testing.assert_array_equal(quiet, again)
    assert not info
    loud = policy.act(seen, "", generator.manual_seed(0), explore=True)[0]
    assert np.abs(loud - quiet).max() > 1.0


def test_the_evaluator_asks_for_no_noise():
    """actors.evaluate, whatever the environment."""
    asked = []

    class OneStep:
        num_envs, instruction = 2, ""

        def instructions(self):
            return ["", ""]

        def reset(self, seed=None, options=None):
            return {STATE: np.zeros((2, DIM), np.float32)}, {}

        def step_chunk(self, actions):
            from types import SimpleNamespace

            done = np.ones(2, bool)
            return SimpleNamespace(
                observation={}, mask=done[:, None], done=done, success=done[:, None], invalid=None
            )

    class Runner:
        def infer(self, observation, instruction, explore):
            asked.append(explore)
            return np.zeros((2, C, A), np.float32), {}

    assert evaluate(OneStep(), Runner(), [{}] * 4).success.all()
    assert asked == [False, False]


@pytest.mark.parametrize("steps", [1, 8])
def test_a_policy_from_scratch_begins_in_its_range_and_explores_as_told(steps):
    """K = 1: the middle, whatever the first noise is. More steps: random play. The noise is what was asked for."""
    policy = make_policy(steps, chunk=1)
    features = torch.randn(500, *policy.feature_shape)
    reached = prepare(policy, features, seed=0, action_noise=0.6)
    assert reached == pytest.approx(0.6, rel=0.03)
    assert float(policy.flow.log_std_band.diff()) == pytest.approx(2.0)
    with torch.no_grad():
        chunk = policy.sample(features, generator=torch.Generator().manual_seed(1))
    if steps == 1:
        assert float(chunk.square().mean().sqrt()) < 0.2
    else:
        assert float(chunk.std()) == pytest.approx(12**-0.5 * 2, abs=0.12)


def test_it_finds_the_best_action_of_a_bandit():
    """Reward -(a - target)^2, from scratch, K = 1: the executed action ends at the target."""
    policy = make_policy(1, chunk=1)
    target = np.array([0.5, -0.3], np.float32)
    prepare(policy, torch.randn(500, *policy.feature_shape), seed=0, action_noise=0.5)
    config = PPOFlowConfig(
        gamma=0.0, ratio_power=1.0, learning_rate=1e-3, max_learning_rate=3e-3, critic_warmup=0
    )
    config = replace(config, critic_hidden=32, critic_updates=5, minibatch=64)
    ppo = PPOFlow(policy, config, EXTRA)
    for iteration in range(30):
        segments = play(
            policy, 4, 64, iteration, iteration, lambda action: -((action - target) ** 2).sum(1)
        )
        ppo.update(segments, iteration)
    seen = {STATE: np.random.default_rng(0).normal(size=(200, DIM)).astype(np.float32)}
    action = policy.act(seen, "", torch.Generator().manual_seed(0), explore=False)[0]
    assert np.abs(action[:, 0].mean(0) - target).max() < 0.1
    assert ((action[:, 0] - target) ** 2).sum(1).mean() < 0.1


def test_resume_goes_on_bit_for_bit_on_features_and_in_the_values_own_unit():
    config = replace(PLAIN, critic="features", normalise_values=True, minibatch=8)
    first = PPOFlow(make_policy(1), config, EXTRA)
    first.update(play(first.policy, seed=0), version=0)
    policy, state = copy.deepcopy(first.policy), copy.deepcopy(first.state_dict())
    expected = first.update(play(first.policy, seed=1), version=0)
    second = PPOFlow(policy, config, EXTRA)
    second.load_state_dict(state)
    assert second.update(play(policy, seed=1), version=0) == pytest.approx(
        expected, abs=0, nan_ok=True
    )
    assert torch.equal(parameters_of(policy), parameters_of(first.policy))
