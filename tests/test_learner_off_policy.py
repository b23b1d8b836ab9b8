"""Off-policy RL on action chunks: returns and targets against brute force and tables, and each known trap's mechanism."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from experiments.off_policy import summarise
from experiments.stand_in import Replay
from learner.algorithms.chunk_critic import ChunkCritics, CriticConfig, Executed
from learner.algorithms.chunk_q import ChunkQ, ChunkQConfig
from learner.algorithms.improvement import ImprovementConfig, OneStep
from learner.algorithms.sft import ImitationData
from learner.dataset import Windows, executed_windows, imitated_steps, windows
from learner.features import FeatureCache
from policies.vla import VLA
from policies.weights import load_arrays, to_arrays
from twinrl.config import RealRlConfig
from twinrl.core.segment import SOURCES, Segment

C, STATE, ACTION = 4, 3, 7
WARM = {"actor_warmup": 0, "actor_every": 1}


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return VLA(
        state_dim=STATE,
        pose_dim=2,
        cameras=(),
        integration_steps=2,
        hidden=96,
        latent=16,
        critics=4,
        one_step=True,
    )


def make_batch(rows, seed=0, **columns):
    """An off-policy batch; its windows have 1 to C steps."""
    rng = np.random.default_rng(seed)
    steps = rng.integers(1, C + 1, rows)
    ended = rng.integers(0, 3, rows)
    return {
        "observation.state": rng.normal(size=(rows, STATE)).astype(np.float32),
        "next.observation.state": rng.normal(size=(rows, STATE)).astype(np.float32),
        "action": rng.normal(size=(rows, C, ACTION)).astype(np.float32),
        "reward": rng.random((rows, C)).astype(np.float32),
        "step_mask": np.arange(C) < steps[:, None],
        "steps": steps,
        "terminated": ended == 1,
        "truncated": ended == 2,
    } | columns


def make_windows(rows, seed=0):
    """Imitation windows whose action is a linear function of the state."""
    rng = np.random.default_rng(seed)
    state = rng.normal(size=(rows, STATE)).astype(np.float32)
    action = np.tile(state[:, None, :1], (1, C, ACTION)) * 0.5
    mask = np.ones((rows, C), np.float32)
    return Windows({}, state, action, mask, np.zeros(rows, np.int64), ["go"] * rows)


def make_segment(steps, *, seed=0, ending="terminated", taken_from=None, source="real"):
    """One episode as the bridge records it: policy chunks of C steps, perhaps a takeover from step `taken_from` on."""
    rng = np.random.default_rng(seed)
    last = np.arange(steps) == steps - 1
    taken = np.zeros(steps, bool)
    if taken_from is not None:
        taken[taken_from:] = True
    columns = {
        "action": rng.normal(size=(steps, ACTION)).astype(np.float32),
        "reward": rng.random(steps).astype(np.float32),
        "terminated": last & (ending == "terminated"),
        "truncated": last & (ending == "truncated"),
        "success": last & (ending == "terminated"),
        "intervention": taken,
        "chunk_id": (np.arange(steps) // C).astype(np.int32),
        "observation.state": np.arange(steps + 1, dtype=np.float32)[:, None].repeat(STATE, 1),
    }
    header = {"source": source, "episode": f"{source}{seed}", "instruction": "go"}
    return Segment(header, columns)


def make_algorithm(policy, **settings):
    return ChunkQ(policy, ChunkQConfig(**settings), FeatureCache(policy, "go"))


def y_of(critics, batch, continuation):
    """Targets where all critics say `continuation`."""
    executed = Executed.of(batch, critics.policy)
    return critics.targets(executed, torch.full((len(executed.steps),), continuation)).numpy()


class Table(nn.Module):
    """Critics of E tables (E, S, A): the state is the summary's first number, the action's sign says which of two."""

    def __init__(self, members, states):
        super().__init__()
        self.members = members
        self.values = nn.Parameter(torch.randn(members, states, 2) * 0.1)

    def forward(self, summary, chunk, mask, members=None):
        values = self.values if members is None else self.values[members]
        return values[:, summary[:, 0].round().long(), (chunk[:, 0, 0] > 0).long()]


# -- returns and targets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [C, 3 * C])
def test_discounts_and_returns_agree_with_brute_force(policy, horizon):
    """Chunk (H = C) and n-step (H = 3C) targets of whole episodes, from every step, against a loop over steps."""
    gamma, cost, after = 0.9, 0.02, 0.7
    config = CriticConfig(
        gamma=gamma, step_cost=cost, reward_bounds=(-np.inf, np.inf), timeout_is_terminal=False
    )
    critics = ChunkCritics(policy, config, torch.Generator())
    for ending in ("terminated", "truncated"):
        segment = make_segment(11, ending=ending)
        batch = executed_windows([segment], horizon)
        assert batch["steps"].tolist() == [min(horizon, 11 - t) for t in range(11)]
        expected = []
        for t in range(11):
            total, discount, alive = 0.0, 1.0, True
            for i in range(t, min(t + horizon, 11)):
                total += discount * (segment.columns["reward"][i] - cost)
                discount *= gamma
                alive &= not segment.columns["terminated"][i]
            expected.append(total + discount * after * alive)
        np.testing.assert_allclose(y_of(critics, batch, after), expected, rtol=1e-5)
        chunk = Executed.of(batch, policy)
        assert chunk.chunk.shape == (11, C, ACTION) and chunk.mask.shape == (11, C)


def test_masked_rewards_and_bounds(policy):
    """Rewards behind the mask do not count; an over-estimate is cut to what an episode can bring (trap 1)."""
    batch = make_batch(
        3,
        step_mask=np.array([[1, 1, 0, 0], [1] * 4, [1] * 4], bool),
        reward=np.array([[0, 0.5, 7, 7], [0] * 4, [0] * 4], np.float32),
        steps=np.array([2, 4, 4]),
        terminated=np.zeros(3, bool),
        truncated=np.array([0, 0, 1], bool),
    )
    critics = ChunkCritics(policy, CriticConfig(gamma=0.9), torch.Generator())
    np.testing.assert_allclose(
        y_of(critics, batch, 0.5), [0.45 + 0.81 * 0.5, 0.9**4 * 0.5, 0.0], rtol=1e-5
    )
    assert y_of(critics, batch, 50.0).max() == 1.0 and y_of(critics, batch, -50.0).min() == 0.0
    bootstrapping = CriticConfig(gamma=0.9, timeout_is_terminal=False, step_cost=0.01)
    critics = ChunkCritics(policy, bootstrapping, torch.Generator())
    assert y_of(critics, batch, -50.0).min() == pytest.approx(-0.1)


@pytest.mark.parametrize("terminal", [True, False])
def test_time_limits_do_not_feed_themselves(policy, terminal):
    """Trap 1: an arm that never succeeds. Each reading of a time-out ends at its closed form, not at optimism."""
    gamma, cost = 0.9, 0.0 if terminal else 0.01
    config = CriticConfig(
        gamma=gamma,
        timeout_is_terminal=terminal,
        step_cost=cost,
        critic_learning_rate=3e-2,
        tau=0.2,
    )
    policy.critic = Table(3, 1)
    nn.init.constant_(policy.critic.values, 0.8)
    critics = ChunkCritics(policy, config, torch.Generator())
    rows = 8
    batch = make_batch(
        rows,
        reward=np.zeros((rows, C), np.float32),
        step_mask=np.ones((rows, C), bool),
        steps=np.full(rows, C),
        terminated=np.zeros(rows, bool),
        truncated=np.ones(rows, bool),
    )
    executed, summary = Executed.of(batch, policy), torch.zeros(rows, 1)
    chunks = executed.chunk[:, None]
    for _ in range(300):
        critics.update(
            executed, summary, critics.targets(executed, critics.continuation(summary, chunks))
        )
    value = critics.continuation(summary, chunks)
    assert value.mean().item() == pytest.approx(0.0 if terminal else -cost / (1 - gamma), abs=0.01)


def two_state_batch():
    """All of a two-state MDP: in state 0, action 1 leads to state 1 and action 0 ends with 0.3; in state 1, action 1
    ends with 1 and action 0 leads to state 0."""
    state, action = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    reward = np.zeros((4, C), np.float32)
    reward[0, C - 1], reward[3, C - 1] = 0.3, 1.0
    batch = make_batch(
        4,
        action=np.tile(np.where(action > 0, 1.0, -1.0)[:, None, None], (1, C, ACTION)),
        reward=reward,
        step_mask=np.ones((4, C), bool),
        steps=np.full(4, C),
        terminated=np.array([1, 0, 0, 1], bool),
        truncated=np.zeros(4, bool),
    )
    following = torch.tensor([[0.0], [1.0], [0.0], [0.0]])
    return batch, torch.tensor(state, dtype=torch.float32)[:, None], following


def test_ensemble_targets_solve_a_two_state_mdp(policy):
    """Every member reaches the table of optimal values: best proposed chunk, minimum of two members, gamma^L."""
    gamma = 0.9
    policy.critic = Table(4, 2)
    config = CriticConfig(gamma=gamma, critic_learning_rate=1e-2, tau=0.1)
    critics = ChunkCritics(policy, config, torch.Generator().manual_seed(0))
    batch, summary, following = two_state_batch()
    executed = Executed.of(batch, policy)
    both = torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1).expand(4, 2, C, ACTION)
    for _ in range(900):
        y = critics.targets(executed, critics.continuation(following, both))
        critics.update(executed, summary, y)
    last, cut = gamma ** (C - 1), gamma**C
    best = [max(0.3 * last, cut * last), last]  # of states 0 and 1
    table = torch.tensor([[0.3 * last, cut * best[1]], [cut * best[0], best[1]]])
    torch.testing.assert_close(
        policy.critic.values.detach(), table.expand(4, -1, -1), atol=0.02, rtol=0
    )


def test_the_minimum_of_members_is_the_target(policy):
    """Of E = 3 tables that disagree, two random ones are asked and the smaller of the two continues."""
    policy.critic = Table(3, 1)
    policy.critic.values.data = torch.tensor([0.2, 0.5, 0.9]).view(3, 1, 1).repeat(1, 1, 2)
    critics = ChunkCritics(policy, CriticConfig(), torch.Generator().manual_seed(0))
    chunks = torch.zeros(1, 1, C, ACTION)
    drawn = [float(critics.continuation(torch.zeros(1, 1), chunks)) for _ in range(300)]
    assert sorted({round(v, 3) for v in drawn}) == [0.2, 0.5]
    assert np.mean([v < 0.3 for v in drawn]) == pytest.approx(2 / 3, abs=0.1)
    with pytest.raises(ValueError, match="target_members is 5"):
        ChunkCritics(policy, CriticConfig(target_members=5), torch.Generator())


# -- data: what is learned from what ------------------------------------------------------------------------


def test_windows_are_of_executed_steps_and_straddle_chunks(policy):
    """Trap 10: a window from every t, across the policy's chunks and a takeover; tails are masked, not invented."""
    segment = make_segment(10, taken_from=6)
    batch = executed_windows([segment], C)
    action, mask = batch["action"], batch["step_mask"]
    assert len(action) == 10
    for t in range(10):
        length = min(C, 10 - t)
        np.testing.assert_array_equal(action[t, :length], segment.columns["action"][t : t + length])
        assert mask[t].sum() == length and not action[t, length:].any()
        assert batch["next.observation.state"][t, 0] == t + length
    straddling = segment.columns["chunk_id"][3] != segment.columns["chunk_id"][4]
    assert straddling and mask[3].all()
    features = torch.randn(3, *policy.feature_shape)
    some = torch.tensor([[1.0, 1, 0, 0]]).repeat(3, 1)
    chunk = torch.randn(3, C, ACTION)
    other = chunk.clone()
    other[:, 2:] = 99.0
    torch.testing.assert_close(
        policy.critic(features, chunk, some), policy.critic(features, other, some)
    )


def test_a_rescued_prefix_is_never_cloned_and_bootstraps(policy):
    """Trap 3: only the person's steps are imitated; the steps before are the critics', with gamma^L and no cut."""
    segment = make_segment(12, taken_from=7)
    (imitated,) = imitated_steps([segment])
    np.testing.assert_array_equal(np.flatnonzero(imitated), np.arange(7, 12))
    cloned = windows([segment], C)
    assert cloned.state[:, 0].min() == 7
    batch = executed_windows([segment], C)
    critics = ChunkCritics(policy, CriticConfig(gamma=0.9), torch.Generator())
    batch["reward"][:] = 0.0
    y = y_of(critics, batch, 0.5)
    assert y[3] == pytest.approx(0.9**C * 0.5)  # its o' is where the person begins
    assert y[5] == pytest.approx(0.9**C * 0.5)  # the takeover begins inside this window


def test_twin_data_stay_in_the_mix():
    """Trap 13: by default a fifth or more of each batch is the twin's, however much the arm brings."""
    mix = RealRlConfig().mix
    assert mix["twin"] >= 0.2 and sum(mix.values()) == pytest.approx(1.0)
    replay = Replay(C, seed=0)
    for number, (source, count) in enumerate((("demo", 1), ("twin", 1), ("real", 12))):
        replay.add([make_segment(20, seed=100 * number + i, source=source) for i in range(count)])
    drawn = replay.sample(4000, tuple(mix[source] for source in SOURCES))["source"]
    share = np.bincount(drawn, minlength=3) / len(drawn)
    np.testing.assert_allclose(share, [mix[source] for source in SOURCES], atol=0.03)


# -- actors -------------------------------------------------------------------------------------------------


def climb(policy, bc_weight, members):
    """How far a one-step actor leaves its flow where every critic likes large actions, and where it ends."""
    policy = copy.deepcopy(policy)
    policy.action_low.fill_(-3.0)
    policy.action_high.fill_(3.0)

    class Slope(nn.Module):
        def forward(self, summary, chunk, mask, members=None):
            return 1.0 + chunk.mean((1, 2)).expand(self.members, -1)

    policy.critic = Slope()
    policy.critic.members = members
    config = ImprovementConfig(bc_weight=bc_weight, one_step_learning_rate=3e-3)
    actor = OneStep(policy, config, torch.Generator().manual_seed(0))
    features = torch.randn(64, *policy.feature_shape, generator=torch.Generator().manual_seed(0))
    for _ in range(150):
        metrics = actor.update(features, warm=True)
    chunk = actor.propose(features)
    assert chunk.abs().max() <= 3.0  # what critics are asked about is what can be executed
    return metrics["one_step_distance"] ** 0.5 if bc_weight else chunk.mean().item()


def test_the_anchor_bounds_exploitation(policy):
    """Trap 2: critics that are wrong outside the data pull an actor to the limits; the distance to the flow holds it."""
    assert climb(policy, 0.0, 2) > 2.5
    assert climb(policy, 10.0, 2) < 0.6


def test_an_actor_at_its_limits_can_leave_them(policy):
    """A chunk far outside the limits still gets the critics' gradient, and is pulled back."""
    policy.action_low.fill_(-1.0)
    policy.action_high.fill_(1.0)
    with torch.no_grad():
        policy.one_step.network[-1].bias.fill_(8.0)

    class Down(nn.Module):
        members = 1

        def forward(self, summary, chunk, mask, members=None):
            return -chunk.mean((1, 2))[None]

    policy.critic = Down()
    config = ImprovementConfig(bc_weight=0.0, one_step_learning_rate=1e-2)
    actor = OneStep(policy, config, torch.Generator())
    features = torch.randn(32, *policy.feature_shape)
    for _ in range(150):
        actor.update(features, warm=True)
    assert actor.propose(features).mean() < -0.9


def test_the_one_step_actor_distils_its_flow(policy):
    """Before the critics are warm it copies the flow, noise for noise, and the flow acts."""
    config = ImprovementConfig(one_step_learning_rate=3e-3)
    actor = OneStep(policy, config, torch.Generator().manual_seed(0))
    features = torch.randn(64, *policy.feature_shape)
    first = actor.update(features, warm=False)["one_step_distance"]
    for _ in range(200):
        last = actor.update(features, warm=False)["one_step_distance"]
    assert last < 0.1 * first
    assert not policy.one_step.active
    metrics = actor.update(features, warm=True)
    assert policy.one_step.active and "one_step_value" in metrics


def test_the_one_step_actor_travels_and_acts(policy):
    """What acts, and its exploration, are part of the weights."""
    observation = {"observation.state": np.zeros((5, STATE), np.float32)}

    def act(actor, explore):
        return actor.act(observation, "go", torch.Generator().manual_seed(1), explore)

    by_flow, _ = act(policy, False)
    policy.one_step.active.fill_(True)
    policy.one_step.exploration.fill_(0.5)
    chunk, info = act(policy, False)
    noisy, noisy_info = act(policy, True)
    assert info == noisy_info == {} and chunk.shape == (5, C, ACTION)
    assert not np.allclose(chunk, by_flow)
    assert (noisy - chunk).std() == pytest.approx(0.5, rel=0.2)
    other = VLA(
        state_dim=STATE,
        pose_dim=2,
        cameras=(),
        integration_steps=2,
        hidden=96,
        latent=16,
        critics=4,
        one_step=True,
    )
    load_arrays(other, {name: array.copy() for name, array in to_arrays(policy).items()})
    np.testing.assert_array_equal(act(other, True)[0], noisy)


def test_the_actor_waits_then_follows_imitation(policy):
    """The acting flow moves only after the critics' warm-up, and candidates are switched on."""
    data = ImitationData(policy, make_windows(40), {"demo": 1.0})
    algorithm = make_algorithm(policy, improvement="best_of_n", actor_warmup=2, actor_every=1)
    assert int(policy.candidates) == 1
    before = [parameter.clone() for parameter in policy.flow.parameters()]
    algorithm.update(make_batch(8), data)
    algorithm.update(make_batch(8), data)
    assert all(map(torch.equal, before, policy.flow.parameters()))
    metrics = algorithm.update(make_batch(8), data)
    assert "imitation_loss" in metrics and metrics["drift"] < 1e-9
    assert int(policy.candidates) == 4
    assert not all(map(torch.equal, before, policy.flow.parameters()))


def test_the_flow_is_anchored_where_nobody_corrected_it(policy):
    """With the anchor the policy drifts less from where it started; a person's windows do not hold it."""
    data = ImitationData(policy, make_windows(40), {"demo": 1.0})
    drifts = {}
    for name, anchor, taken in (("free", 0.0, 0), ("anchored", 30.0, 0), ("person", 30.0, 1)):
        algorithm = make_algorithm(
            copy.deepcopy(policy), anchor=anchor, actor_learning_rate=1e-3, **WARM
        )
        batch = make_batch(16, intervention=np.full((16, C), taken, bool))
        for _ in range(40):
            algorithm.update(batch, data)
        features = algorithm.cache.lookup(batch)
        noise = torch.randn(16, 28, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            flow = algorithm.flow
            moved = flow.student.integrate(features, noise, 2)
            drifts[name] = float((moved - flow.reference.integrate(features, noise, 2)).std())
    assert drifts["anchored"] < 0.6 * drifts["free"]
    assert drifts["person"] == pytest.approx(drifts["free"], rel=0.5)


def test_imitation_alone_has_no_critics(policy):
    """HG-DAgger: the same stage without critics follows what people did, and nothing else moves."""
    data = ImitationData(policy, make_windows(40), {"demo": 1.0})
    critics = copy.deepcopy(policy.critic.state_dict())
    algorithm = make_algorithm(
        policy, improvement="none", anchor=0.0, actor_every=1, actor_learning_rate=3e-3, ema=0.5
    )
    losses = [algorithm.update(make_batch(8), data)["imitation_loss"] for _ in range(150)]
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:20])
    assert all(map(torch.equal, critics.values(), policy.critic.state_dict().values()))
    assert int(policy.candidates) == 1 and not policy.one_step.active
    with pytest.raises(ValueError, match="improvement is 'two_step'"):
        ChunkQConfig(improvement="two_step")


@pytest.mark.parametrize(
    "settings",
    [
        {"improvement": "best_of_n", "target_candidates": 2},
        {"improvement": "one_step"},
        {"improvement": "none"},
    ],
    ids=lambda settings: settings["improvement"],
)
def test_resume_repeats_the_run_bit_for_bit(policy, settings):
    """State saved after one update and loaded into a new object continues identically."""

    def step(algorithm, number):
        data = ImitationData(algorithm.policy, make_windows(20), {"demo": 1.0})
        return algorithm.update(make_batch(8, seed=number), data)

    first = make_algorithm(policy, **WARM, **settings)
    step(first, 0)
    twin, state = copy.deepcopy(policy), copy.deepcopy(first.state_dict())
    expected = step(first, 1)
    second = make_algorithm(twin, **WARM, **settings)
    second.load_state_dict(state)
    assert step(second, 1) == pytest.approx(expected, abs=0)
    for mine, theirs in zip(policy.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


# -- the experiment -----------------------------------------------------------------------------------------


def test_gains_are_paired_and_clustered_by_seed():
    """Ten more points on the same resets in all seeds are a clear gain; in one seed of three they are none."""
    resets = np.arange(100)
    worse = {region: (resets < 60).tolist() for region in ("id", "ood")}
    better = {region: (resets < 70).tolist() for region in ("id", "ood")}
    figures = summarise([{"start": worse, "offpolicy": better, "clone": worse}] * 2)
    assert figures["offpolicy_ood"] == 0.7 and figures["offpolicy_vs_clone_low"] > 0.0
    same, other = ({"offpolicy": x, "clone": worse} for x in (worse, better))
    figures = summarise([other] * 3)
    assert figures["offpolicy_vs_clone"] == pytest.approx(0.1)
    low, high = figures["offpolicy_vs_clone_low"], figures["offpolicy_vs_clone_high"]
    assert 0.04 < low < 0.1 < high < 0.16
    figures = summarise([other, same, {"offpolicy": worse, "clone": better}])
    assert figures["offpolicy_vs_clone"] == pytest.approx(0.0)
    assert figures["offpolicy_vs_clone_low"] < -0.05 and figures["offpolicy_vs_clone_high"] > 0.05
