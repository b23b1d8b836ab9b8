"""Imitation windows, executed windows, rollouts and advantages from segments."""

import numpy as np
import pytest

from learner.dataset import (
    GROUPS,
    concatenate,
    executed_windows,
    imitated_steps,
    source_probabilities,
    windows,
)
from learner.rollout import gae, rollout
from twinrl.core.segment import Segment

C, SIZE = 4, 8


def make_segment(steps, *, source="demo", episode="e", first=0, success=False, every=1, **columns):
    """A segment whose numbers say where they come from: action t is filled with first + t + 1."""
    t = np.arange(steps)
    frames = np.arange(0, steps + 1, every, dtype=np.int32)
    if frames[-1] != steps:
        frames = np.append(frames, np.int32(steps))
    values = {
        "action": np.repeat((first + t + 1)[:, None], 7, 1).astype(np.float32),
        "reward": np.where(t == steps - 1, float(success), 0).astype(np.float32),
        "terminated": (t == steps - 1) & success,
        "truncated": (t == steps - 1) & (not success),
        "success": (t == steps - 1) & success,
        "intervention": np.zeros(steps, bool),
        "policy_version": np.zeros(steps, np.int64),
        "observation.state": np.repeat(np.arange(steps + 1)[:, None], 3, 1).astype(np.float32),
        "privileged.state": np.arange(first, first + steps + 1)[:, None].astype(np.float32),
        "frame_step": frames,
        "observation.images.side": np.tile(
            frames[:, None, None, None].astype(np.uint8), (1, SIZE, SIZE, 3)
        ),
        "chunk_step": np.arange(0, steps, C, dtype=np.int32),
    }
    count = len(values["chunk_step"])
    values["policy.path"] = np.zeros((count, 3, 28), np.float32)
    values["policy.log_prob"] = np.arange(count, dtype=np.float32)
    header = {"source": source, "episode": episode, "first_step": first, "instruction": "go"}
    return Segment(header, {**values, **columns})


def test_windows_hold_the_chunk_from_each_frame_and_mask_the_tail():
    """Window t holds actions t+1 .. t+C; what lies beyond the episode is masked zeros."""
    data = windows([make_segment(6)], C)
    assert len(data) == 6
    np.testing.assert_array_equal(data.action[1, :, 0], [2, 3, 4, 5])
    np.testing.assert_array_equal(data.action[4, :, 0], [5, 6, 0, 0])
    np.testing.assert_array_equal(data.mask[4], [1, 1, 0, 0])
    np.testing.assert_array_equal(data.state[:, 0], range(6))
    np.testing.assert_array_equal(data.images["observation.images.side"][:, 0, 0, 0], range(6))
    assert data.instruction == ["go"] * 6


def test_windows_start_at_frames_only_and_prefer_the_clean_label():
    """A twin's frames lie at chunk boundaries; noisy execution is cloned by its clean label."""
    clean = np.full((8, 7), -3, np.float32)
    data = windows([make_segment(8, source="twin", success=True, every=4, label_action=clean)], C)
    np.testing.assert_array_equal(data.state[:, 0], [0, 4])
    assert (data.action == -3).all() and (data.source == 1).all()


def test_a_rescued_episode_lends_only_the_persons_steps():
    """The failing prefix of an episode that a person rescued is never cloned, across segments."""
    taken = np.arange(8) >= 5
    prefix = make_segment(8, source="real", truncated=np.zeros(8, bool))
    rescue = make_segment(8, source="real", first=8, success=True, intervention=taken)
    masks = imitated_steps([prefix, rescue])
    assert not masks[0].any()
    np.testing.assert_array_equal(masks[1], taken)
    data = windows([prefix, rescue], C)
    np.testing.assert_array_equal(data.state[:, 0], [5, 6, 7])
    assert data.action[data.mask > 0].min() > 8 + 5
    assert {GROUPS[source] for source in data.source} == {"takeover"}


def test_handing_back_ends_a_window():
    """A window never runs from a person's steps into the policy's."""
    taken = np.array([0, 1, 1, 0, 0, 1, 1, 1], bool)
    data = windows([make_segment(8, source="real", success=True, intervention=taken)], C)
    np.testing.assert_array_equal(data.mask.sum(1), [2, 1, 3, 2, 1])


def test_failures_lend_nothing_and_successes_everything():
    """Of episodes nobody touched, the successful ones are repeated."""
    good = make_segment(4, source="real", episode="a", success=True)
    bad = make_segment(4, source="real", episode="b")
    assert imitated_steps([good, bad])[0].all() and not imitated_steps([good, bad])[1].any()
    with pytest.raises(ValueError, match="none of 1"):
        windows([bad], C)


def test_sources_are_drawn_in_the_ratio_of_their_shares():
    """Rows of a source share its share; an absent source gives its own away."""
    source = np.array([0, 0, 0, 1])
    np.testing.assert_allclose(
        source_probabilities(source, {"demo": 0.5, "twin": 0.5}), [1 / 6] * 3 + [0.5]
    )
    np.testing.assert_allclose(
        source_probabilities(source, {"real": 0.9, "demo": 0.1}), [1 / 3] * 3 + [0]
    )
    with pytest.raises(ValueError, match="real"):
        source_probabilities(source, {"real": 1.0})
    with pytest.raises(ValueError, match=r"\['rael'\], only by demo, twin, real, takeover"):
        source_probabilities(source, {"rael": 1.0})


def test_takeovers_may_have_a_share_of_their_own():
    """However many successes the policy has by itself, what people corrected is seen as often; or it counts as real."""
    source = np.array([GROUPS.index(name) for name in ("demo", "real", "real", "takeover")])
    shares = {"demo": 0.25, "real": 0.25, "takeover": 0.5}
    np.testing.assert_allclose(source_probabilities(source, shares), [0.25, 0.125, 0.125, 0.5])
    np.testing.assert_allclose(
        source_probabilities(source, {"demo": 0.25, "real": 0.75}), [0.25] * 4
    )


def test_concatenate_keeps_order():
    """Every window exactly once, in order."""
    data = concatenate([windows([make_segment(3)], C), windows([make_segment(5)], C)])
    np.testing.assert_array_equal(data.state[:, 0], [0, 1, 2, 0, 1, 2, 3, 4])


def test_executed_windows_straddle_chunks_and_mask_the_end():
    """Windows of executed actions start anywhere; the last one is short and knows how the episode ended."""
    batch = executed_windows([make_segment(6, source="real", success=True)], C)
    np.testing.assert_array_equal(batch["steps"], [4, 4, 4, 3, 2, 1])
    np.testing.assert_array_equal(batch["action"][1, :, 0], [2, 3, 4, 5])
    np.testing.assert_array_equal(batch["step_mask"].sum(1), batch["steps"])
    np.testing.assert_array_equal(batch["terminated"], [0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(batch["next.observation.state"][:, 0], [4, 5, 6, 6, 6, 6])
    np.testing.assert_array_equal(batch["next.frame"][:, 1], [4, 5, 6, 6, 6, 6])
    np.testing.assert_array_equal(batch["reward"].sum(1), [0, 0, 1, 1, 1, 1])


def test_rollout_discounts_within_chunks_and_chains_segments():
    """Rewards are discounted by their place in the chunk; the last chunk's discount has its length."""
    first = make_segment(8, truncated=np.zeros(8, bool))
    second = make_segment(6, first=8, success=True)
    other = make_segment(4, episode="f")
    data = rollout([first, second, other], 0.9)
    np.testing.assert_array_equal(data.chained, [1, 1, 1, 0, 0])
    np.testing.assert_allclose(data.discount, [0.9**4] * 3 + [0.9**2, 0.9**4], rtol=1e-6)
    np.testing.assert_allclose(data.reward, [0, 0, 0, 0.9, 0], rtol=1e-6)
    np.testing.assert_array_equal(data.critic[:, 0], [0, 4, 8, 12, 0])
    np.testing.assert_array_equal(data.next_critic[:, 0], [4, 8, 12, 14, 4])
    np.testing.assert_array_equal(data.terminated, [0, 0, 0, 1, 0])
    np.testing.assert_array_equal(data.log_prob, [0, 1, 0, 1, 0])


def test_rollout_refuses_a_chunk_without_frame():
    """A policy chunk whose observation was not stored cannot be trained on."""
    segment = make_segment(8, every=4, chunk_step=np.array([0, 3], np.int32))
    with pytest.raises(ValueError, match="without a frame"):
        rollout([segment], 0.9)


def test_gae_closed_forms():
    """lambda = 1 without critic is the discounted return; truncation bootstraps, termination does not."""
    zero, one = np.zeros(3, np.float32), np.ones(3, np.float32)
    discount = np.array([0.5, 0.25, 0.5], np.float32)
    chained = np.array([True, True, False])
    ended = np.array([False, False, True])
    np.testing.assert_allclose(
        gae(one, discount, zero, zero, ended, chained, 1.0), [1 + 0.5 * 1.25, 1.25, 1.0]
    )
    value, following = one * 2, one * 4
    terminated = gae(zero, discount, value, following, ended, chained, 0.0)
    truncated = gae(zero, discount, value, following, ended & False, chained, 0.0)
    np.testing.assert_allclose(terminated, [0.0, -1.0, -2.0])
    np.testing.assert_allclose(truncated, [0.0, -1.0, 0.0])


def test_gae_does_not_leak_between_episodes():
    """The advantage of one episode ignores what follows it in the batch."""
    rng = np.random.default_rng(0)
    reward, value, following = rng.normal(size=(3, 6)).astype(np.float32)
    ended = np.zeros(6, bool)
    chained = np.array([1, 1, 0, 1, 1, 0], bool)
    arguments = (np.full(6, 0.9, np.float32), value, following, ended, chained, 0.95)
    before = gae(reward, *arguments)
    reward[3:] += 10.0
    np.testing.assert_array_equal(gae(reward, *arguments)[:3], before[:3])
