"""Segmenting and evaluation, on an environment whose every number tells where it came from."""

import numpy as np
import pytest

from actors.demonstrate import record_successes
from actors.evaluate import draw_configurations, evaluate
from actors.segmenter import Segmenter
from twinrl.core.segment import Schema, Segment, check
from twinrl.env import ChunkStep

N, C, S, P, SIZE = 3, 4, 2, 1, 2
SCHEMA = Schema(S, P, ("side",), SIZE, C)


class CountingEnv:
    """Observation = 1000 * episode + step. Environment i's episodes last `lengths[i]` steps, then end by success
    (even episodes) or time-out (odd ones)."""

    num_envs, cameras, image_size, state_dim, privileged_dim = N, ("side",), SIZE, S, P
    instruction, max_steps, control_hz = "count", 100, 10.0

    def __init__(self, lengths=(6, 8, 50)):
        self.lengths = np.array(lengths)
        self.episode = np.full(N, -1)
        self.t = np.zeros(N, int)
        self.over = np.ones(N, bool)
        self.drawn = 0
        self.given = [None] * N

    def value(self):
        return 1000 * self.episode + self.t

    def instructions(self):
        return [f"count episode {n}" for n in self.episode]

    def observation(self):
        value = self.value()
        images = np.broadcast_to((value % 251)[:, None, None, None], (N, SIZE, SIZE, 3))
        return {
            "observation.state": np.repeat(value[:, None], S, 1).astype("f4"),
            "privileged.state": -value[:, None].astype("f4"),
            "observation.images.side": images.astype("u1"),
        }

    def reset(self, *, seed=None, options=None):
        options = options or {}
        mask = options.get("reset_mask", np.ones(N, bool))
        given = options.get("configurations") or [None] * N
        for i in np.flatnonzero(mask):
            self.drawn += 1
            self.given[i] = given[i] or {"region": options.get("region", "id"), "n": self.drawn}
            self.episode[i] += 1
            self.t[i] = 0
            self.over[i] = False
        return self.observation(), {}

    def step_chunk(self, actions):
        chunk = actions.shape[1]
        states = np.zeros((N, chunk, S), "f4")
        privileged = np.zeros((N, chunk, P), "f4")
        flags = {
            k: np.zeros((N, chunk), bool) for k in ("terminated", "truncated", "success", "mask")
        }
        for k in range(chunk):
            live = ~self.over
            self.t[live] += 1
            states[live, k] = self.value()[live, None]
            privileged[live, k] = -self.value()[live, None]
            ended = live & (self.t >= self.lengths)
            good = ended & (self.episode % 2 == 0)
            flags["mask"][:, k] = live
            flags["success"][:, k] = flags["terminated"][:, k] = good
            flags["truncated"][:, k] = ended & ~good
            self.over |= ended
        return ChunkStep(
            observation=self.observation(),
            states=states,
            privileged=privileged,
            action=actions.copy(),
            reward=flags["success"].astype("f4"),
            **flags,
        )

    def configurations(self):
        return list(self.given)

    def close(self):
        pass


class Collector(list):
    """A sink that checks every segment against the schema."""

    def __call__(self, header, columns):
        header = {**header, "writer": "w", "sequence": len(self)}
        check(Segment(header, columns), SCHEMA)
        self.append(Segment(header, columns))


def play(rounds, round_chunks, lengths=(6, 8, 50)):
    env, sink = CountingEnv(lengths), Collector()
    segmenter = Segmenter(env, sink, source="twin", task="count", prefix="p")
    observation, _ = env.reset()
    everyone = np.ones(N, bool)
    segmenter.begin(observation, everyone)
    total = 0
    for number in range(rounds * round_chunks):
        actions = np.full((N, C, 7), number, "f4")
        info = {"log_prob": np.arange(N, dtype="f4") + number}
        step = env.step_chunk(actions)
        segmenter.add(step, version=number, info=info)
        total += int(step.mask.sum())
        if step.done.any():
            segmenter.cut(step.done)
            observation, _ = env.reset(options={"reset_mask": step.done})
            segmenter.begin(observation, step.done)
        if (number + 1) % round_chunks == 0:
            segmenter.cut(everyone)
    return sink, total


def test_every_transition_once_and_in_order():
    sink, total = play(rounds=5, round_chunks=3)
    assert sum(segment.steps for segment in sink) == total
    episodes = {}
    for segment in sink:
        episodes.setdefault(segment.header["episode"], []).append(segment)
    for parts in episodes.values():
        states = np.concatenate([part.columns["observation.state"][1:, 0] for part in parts])
        base = states[0] - 1
        np.testing.assert_array_equal(states, base + 1 + np.arange(len(states)))
        at = 0
        for part in parts:
            assert part.header["first_step"] == at
            assert part.columns["observation.state"][0, 0] == base + at  # shared with the last one
            at += part.steps
        assert [part.header["last"] for part in parts[:-1]] == [False] * (len(parts) - 1)


def test_frames_and_chunks_lie_where_they_were_taken():
    sink, _ = play(rounds=4, round_chunks=3)
    for segment in sink:
        columns = segment.columns
        state = columns["observation.state"][columns["frame_step"], 0]
        frames = columns["observation.images.side"][:, 0, 0, 0]
        np.testing.assert_array_equal(frames, state % 251)
        for row, start in enumerate(columns["chunk_step"]):
            assert columns["action"][start, 0] == columns["policy_version"][start]
            assert columns["policy.log_prob"][row] >= columns["policy_version"][start]
        np.testing.assert_array_equal(
            columns["privileged.state"][:, 0], -columns["observation.state"][:, 0]
        )


def test_the_terminal_observation_is_kept_across_the_reset():
    sink, _ = play(rounds=4, round_chunks=3, lengths=(6, 6, 6))
    ends = [segment for segment in sink if segment.header["last"]]
    assert ends
    for segment in ends:
        assert segment.columns["observation.state"][-1, 0] % 1000 == 6
        even = segment.columns["observation.state"][-1, 0] // 1000 % 2 == 0
        assert segment.columns["terminated"][-1] == even
        assert segment.columns["truncated"][-1] == (not even)


def test_only_successes_are_recorded():
    env, sink = CountingEnv(lengths=(3, 4, 5)), Collector()
    segmenter = Segmenter(env, sink, source="demo", task="count", prefix="d")

    def teacher():
        label = np.tile(env.value()[:, None], (1, 7)).astype("f4")
        return label + 0.5, label

    recorded, attempted = record_successes(
        env, teacher, segmenter, 7, start=lambda mask: {"region": "id"}, max_attempts=50
    )
    assert recorded == 7 == len(sink)
    assert attempted > 7
    for segment in sink:
        columns = segment.columns
        assert columns["success"][-1]
        assert len(columns["frame_step"]) == segment.steps + 1  # every step is seen
        np.testing.assert_array_equal(columns["action"], columns["label_action"] + 0.5)
        np.testing.assert_array_equal(
            columns["label_action"][:, 0], columns["observation.state"][:-1, 0]
        )


def test_giving_up_on_demonstrations():
    env = CountingEnv()
    segmenter = Segmenter(env, Collector(), source="demo", task="count", prefix="d")
    recorded, attempted = record_successes(
        env,
        lambda: (np.zeros((N, 7), "f4"),) * 2,
        segmenter,
        100,
        start=lambda mask: {},
        max_attempts=5,
    )
    assert recorded < 100
    assert attempted >= 5


class Idle:
    """A policy that does nothing."""

    def infer(self, observation, instruction, explore):
        assert not explore
        return np.zeros((N, C, 7), "f4"), {}


@pytest.mark.parametrize("episodes", [1, 3, 10])
def test_evaluation_plays_each_configuration_once(episodes):
    env = CountingEnv(lengths=(6, 8, 5))
    starts = [{"region": "ood", "n": 100 + i} for i in range(episodes)]
    played = []
    original = env.reset

    def reset(*, seed=None, options=None):
        result = original(seed=seed, options=options)
        played.extend(c["n"] for c in options["configurations"] if c is not None)
        return result

    env.reset = reset
    outcome = evaluate(env, Idle(), starts)
    assert len(outcome.success) == episodes
    assert set(played) == {100 + i for i in range(episodes)}
    assert (outcome.steps >= 5).all()
    assert (outcome.steps <= 8).all()


def test_drawn_configurations():
    starts = draw_configurations(CountingEnv(), "ood", 7, seed=5)
    assert len(starts) == 7
    assert {start["region"] for start in starts} == {"ood"}
