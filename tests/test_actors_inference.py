"""Batched inference: whose rows share a batch changes no answer, and both runners keep one contract."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from actors.batching import Request, padded_rows
from actors.inference import InferenceActor
from actors.remote_runner import RemoteRunner, SingleInference
from policies.registry import make_policy
from policies.runner import PolicyRunner
from policies.streams import Streams, stream
from policies.weights import to_arrays
from twinrl.config import make_config
from twinrl.core.errors import ConfigError, DeadlineError, TwinRLError
from twinrl.weights import make_weights

CONFIG = {
    "name": "vla",
    "state_dim": 5,
    "pose_dim": 3,
    "cameras": ["side"],
    "image_size": 16,
    "integration_steps": 3,
    "hidden": 32,
    "latent": 16,
    "keypoints": 4,
    "width": 4,
    "critics": 3,
    "precision": "float32",
}
MAX_ROWS = 16


def weights(version, candidates=1):
    """A policy whose every version acts differently."""
    torch.manual_seed(version)
    policy = make_policy(CONFIG)
    policy.candidates.fill_(candidates)
    return make_weights(version, {k: a.copy() for k, a in to_arrays(policy).items()})


class Published:
    """A WeightSource of what was put into it."""

    def __init__(self, *versions):
        self.versions = {w.version: w for w in versions}

    def poll(self, newer_than):
        newest = max(self.versions, default=-1)
        return self.versions[newest] if newest > newer_than else None

    def wait(self, newer_than, timeout):
        found = self.poll(newer_than)
        if found is None:
            raise DeadlineError(f"no version above {newer_than}")
        return found

    def get(self, version):
        if version not in self.versions:
            raise TwinRLError(f"policy version {version} is gone")
        return self.versions[version]


class Service:
    """The inference actor in a loop of its own thread, as Ray runs it."""

    def __init__(self, source, **options):
        self.batches = []  # (rows with padding, version) of each
        runner = PolicyRunner(CONFIG)
        act = runner.act

        def noted(observation, *arguments):
            self.batches.append((len(observation["observation.state"]), runner.version))
            return act(observation, *arguments)

        runner.act = noted
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        options = {"max_rows": MAX_ROWS, "deadline": 0.05, **options}
        self.actor = InferenceActor(
            "inference",
            make_runner=lambda: runner,
            make_reporter=lambda *_: None,
            weights=source,
            **options,
        )

    def send(self, request):
        return asyncio.run_coroutine_threadsafe(self.actor.infer(request), self._loop)

    def ask(self, request):
        return self.send(request).result(20)

    def close(self):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


@pytest.fixture
def serve():
    services = []

    def start(source, **options):
        services.append(Service(source, **options))
        return services[-1]

    yield start
    for service in services:
        service.close()


def observe(rows, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "observation.images.side": rng.integers(0, 256, (rows, 16, 16, 3), dtype=np.uint8),
        "observation.state": rng.normal(size=(rows, 5)).astype("f4"),
        "privileged.state": np.zeros((rows, 3), "f4"),  # no policy looks at it
    }


def request(rows=3, seed=1, call=0, explore=True, **more):
    return Request(observe(rows, seed), "lift", explore, seed, call, **more)


def close(one, other):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


# -- the contract of both runners ---------------------------------------------------------------------------


@pytest.fixture(params=["local", "remote"])
def make(request, serve):
    """make(source) -> a function that gives runners by seed."""

    def of(source):
        if request.param == "local":
            return lambda seed: PolicyRunner(CONFIG, seed)
        service = serve(source, deadline=0.0)
        return lambda seed: RemoteRunner(service.ask, seed)

    return of


def test_a_runner_gives_chunks_and_says_which_version_acted(make):
    source = Published(weights(4))
    runner = make(source)(7)
    assert runner.version == -1
    with pytest.raises(RuntimeError, match="without a version never acts"):
        runner.infer(observe(3), "lift", True)
    runner.adopt(source.poll(-1))
    chunk, columns = runner.infer(observe(3), "lift", True)
    assert chunk.shape == (3, 4, 7) and chunk.dtype == np.float32
    assert columns["path"].shape == (3, 4, 28) and columns["log_prob"].shape == (3,)
    assert runner.version == 4
    assert runner.infer(observe(2), "lift", False)[1] == {}


def test_a_runner_repeats_itself_bit_for_bit_after_a_seed(make):
    source = Published(weights(1))
    runner = make(source)(7)
    runner.adopt(source.get(1), exactly=True)
    first = [runner.infer(observe(3), "lift", explore)[0] for explore in (True, False, True)]
    assert (first[0] != first[2]).any()
    runner.seed(7)
    again = [runner.infer(observe(3), "lift", explore)[0] for explore in (True, False, True)]
    np.testing.assert_array_equal(first, again)
    runner.seed(8)
    assert (runner.infer(observe(3), "lift", True)[0] != first[0]).any()


def test_a_runner_takes_one_instruction_or_one_for_each_row(make):
    source = Published(weights(1))
    runner = make(source)(7)
    runner.adopt(source.get(1))
    answers = []
    for told in ("lift", ["lift", "drop", "lift"], ["drop"] * 3):
        runner.seed(7)
        answers.append(runner.infer(observe(3), told, False)[0])
    same, mixed, other = answers
    close(mixed[[0, 2]], same[[0, 2]])
    close(mixed[1], other[1])
    assert np.abs(mixed[1] - same[1]).max() > 1e-4
    with pytest.raises(ValueError, match="2 instructions for 3"):
        runner.infer(observe(3), ["lift", "drop"], False)


def test_a_runner_acts_with_the_version_that_it_adopted(make):
    source = Published(weights(1))
    runner = make(source)(7)
    runner.adopt(source.get(1))
    old, _ = runner.infer(observe(3), "lift", False)
    source.versions[2] = weights(2)
    runner.adopt(source.get(2))
    runner.seed(7)
    new, _ = runner.infer(observe(3), "lift", False)
    assert runner.version == 2
    assert np.abs(old - new).max() > 1e-3
    runner.adopt(source.get(1), exactly=True)  # an evaluation of what was
    runner.seed(7)
    close(runner.infer(observe(3), "lift", False)[0], old)
    assert runner.version == 1


@pytest.mark.parametrize("candidates", [1, 4])
@pytest.mark.parametrize("explore", [True, False])
def test_both_runners_give_the_same(serve, explore, candidates):
    source = Published(weights(3, candidates))
    local, remote = PolicyRunner(CONFIG, 5), RemoteRunner(serve(source).ask, 5)
    for runner in (local, remote):
        runner.adopt(source.get(3))
    for rows in (1, 3, 5):
        (chunk, columns), (theirs, their_columns) = (
            runner.infer(observe(rows), "lift", explore) for runner in (local, remote)
        )
        close(chunk, theirs)
        assert columns.keys() == their_columns.keys()
        for key in columns:
            close(columns[key], their_columns[key])


# -- batches ------------------------------------------------------------------------------------------------


def test_who_shares_a_batch_changes_no_answer(serve):
    """Rows of five callers in one padded batch are what each of them gets alone."""
    source = Published(weights(0, candidates=3))
    alone, shared = serve(source, deadline=0.0), serve(source, deadline=5.0)
    for explore in (True, False):
        requests = [request(rows, seed, 9, explore) for seed, rows in enumerate((3, 1, 5, 2, 5))]
        expected = [alone.ask(each) for each in requests]
        futures = [shared.send(each) for each in requests]  # 16 rows: the batch is full
        for answer, future in zip(expected, futures, strict=True):
            close(answer.chunk, future.result(20).chunk)
    assert shared.batches == [(16, 0)] * 2
    assert [rows for rows, _ in alone.batches] == [4, 1, 8, 2, 8] * 2


def test_padding_influences_no_row(serve):
    """What an earlier batch has left in the padding rows is computed and never seen."""
    source = Published(weights(0))
    service = serve(source, deadline=0.0)
    first = service.ask(request(5))
    wild = observe(16)
    wild["observation.state"][:] = np.nan
    service.ask(Request(wild, "drop", True, 3, 0))
    again = service.ask(request(5))
    assert np.isfinite(again.chunk).all()
    np.testing.assert_array_equal(first.chunk, again.chunk)
    np.testing.assert_array_equal(first.columns["log_prob"], again.columns["log_prob"])


def test_batches_are_padded_to_few_sizes():
    assert [padded_rows(n, 256) for n in (1, 2, 3, 64, 65, 129, 256)] == [
        1,
        2,
        4,
        64,
        128,
        256,
        256,
    ]
    assert [padded_rows(n, 100) for n in (64, 65, 100)] == [64, 100, 100]


def test_a_batch_has_one_version_one_kind_and_no_more_rows_than_allowed(serve):
    source = Published(weights(0), weights(1))
    service = serve(source, deadline=0.3)
    requests = [
        *(request(6, seed, explore=True) for seed in range(3)),  # 18 rows: two batches
        request(4, 3, explore=False),
        request(4, 4, exactly=True, version=0),
        request(4, 5, exactly=True, version=0),  # evaluations share with nobody
    ]
    futures = [service.send(each) for each in requests]
    assert [future.result(20).version for future in futures] == [1, 1, 1, 1, 0, 0]
    assert sorted(service.batches) == [(4, 0), (4, 0), (4, 1), (8, 1), (16, 1)]
    assert service.ask(request(2)).version == 1  # back from the evaluation's


def test_a_batch_begins_when_it_is_full_or_its_deadline_is_over(serve):
    service = serve(Published(weights(0)), deadline=5.0)
    began = time.monotonic()
    futures = [service.send(request(8, seed)) for seed in range(2)]
    for future in futures:
        future.result(20)
    assert time.monotonic() - began < 4.0
    lone = serve(Published(weights(0)), deadline=0.2)
    began = time.monotonic()
    lone.ask(request(8))
    assert 0.2 <= time.monotonic() - began < 4.0


def test_an_arm_has_one_observation(serve):
    service = serve(Published(weights(2)))
    arm = SingleInference(service.ask, seed=3)
    single = {key: value[0] for key, value in observe(1).items()}
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: arm(single, "lift", True), range(4)))
    assert all(chunk.shape == (4, 7) and version == 2 for chunk, _, version in answers)
    assert answers[0][1]["path"].shape == (4, 28)
    assert len({chunk.tobytes() for chunk, _, _ in answers}) == 4  # each with noise of its own


# -- versions and failures ----------------------------------------------------------------------------------


def test_new_weights_are_adopted_between_batches(serve):
    source = Published(weights(0))
    service = serve(source, deadline=0.0)
    assert service.ask(request()).version == 0
    source.versions[1] = weights(1)
    assert service.ask(request()).version == 1
    assert service.actor.stats()["policy/version"] == 1


def test_who_asks_for_a_version_to_come_waits_for_it_alone(serve):
    source = Published(weights(0))
    service = serve(source, deadline=0.0)
    early = service.send(request(version=1))
    assert service.ask(request()).version == 0  # others are served meanwhile
    assert not early.done()
    source.versions[1] = weights(1)
    assert early.result(20).version == 1


def test_nothing_waits_for_ever(serve):
    service = serve(Published())
    with pytest.raises(DeadlineError, match=r"waited 0.2 s .* knows -1"):
        service.ask(request(patience=0.2))
    assert service.actor.stats()["inference/failed"] == 1


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (request(17), "17 rows; this inference actor takes 1 to 16"),
        (request()._replace(instruction=["a"]), "1 instructions for 3 rows"),
        (request()._replace(observation={"observation.state": np.zeros((3, 5), "f4")}), "looks at"),
        (request(exactly=True, version=77), "version 77 is gone"),
        (
            request()._replace(
                observation={**observe(3), "observation.state": np.zeros((3, 6), "f4")}
            ),
            "size of tensor",
        ),
    ],
)
def test_a_failing_request_fails_its_caller_only(serve, bad, words):
    service = serve(Published(weights(0)), deadline=0.3)
    future, good = service.send(bad), service.send(request())
    with pytest.raises(Exception, match=words):
        future.result(20)
    assert good.result(20).version == 0


def test_latency_and_occupancy_are_reported(serve):
    service = serve(Published(weights(0)), deadline=0.0)
    service.actor.stats()
    for _ in range(4):
        service.ask(request(3))
    found = service.actor.stats()
    assert (found["inference/answered"], found["inference/rows"]) == (4, 12)
    assert found["inference/batch_rows"] == 3
    assert found["inference/occupancy"] == 0.75
    assert 0 < found["inference/latency_p50_ms"] <= found["inference/latency_p99_ms"]
    assert found["inference/rows_per_s"] > 0
    assert service.actor.stats()["inference/rows_per_s"] == 0


# -- random numbers -----------------------------------------------------------------------------------------


def test_each_part_of_a_batch_draws_what_it_would_draw_alone():
    seeds = ((1, 3), (2, 1), (1, 4))
    batch = Streams([(stream(seed, 5), rows) for seed, rows in seeds], 10)
    alone = [stream(seed, 5) for seed, _ in seeds]
    for draw, times in ((torch.randn, 1), (torch.rand, 3), (torch.randn, 2)):
        drawn = batch.draw(draw, (10 * times, 6))
        parts = drawn.split([3 * times, times, 4 * times, 2 * times])
        for (_, rows), generator, part in zip(seeds, alone, parts, strict=False):
            assert torch.equal(part, draw((rows * times, 6), generator=generator))
        assert (parts[-1] == 0).all()
    with pytest.raises(ValueError, match="cannot draw 11 rows"):
        batch.draw(torch.randn, (11, 6))
    with pytest.raises(ValueError, match="in a batch of 2"):
        Streams([(stream(0, 0), 3)], 2)


def test_streams_of_calls_and_seeds_differ():
    drawn = {stream(s, c).initial_seed() & 0xFFFFFFFF for s in range(40) for c in range(40)}
    assert len(drawn) > 1598  # 32 bits are what torch's CPU generator uses


def test_a_batch_must_have_room_for_a_twin_actors_environments():
    with pytest.raises(ConfigError, match=r"twins.envs=64 at once, more than max_rows=32"):
        make_config({"inference": {"where": "shared", "max_rows": 32}})
    make_config({"inference": {"max_rows": 32}})
