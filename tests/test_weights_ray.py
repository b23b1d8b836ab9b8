"""The weight channel in a cluster: the learner's process, the store, actors on this host and on others."""

import os

import numpy as np
import pytest
import ray

from deploy.ray_weights import STORE, RayWeightSink, RayWeightSource, WeightStore
from twinrl.core.errors import DeadlineError, TwinRLError, WireError
from twinrl.core.sockets import wait_until
from twinrl.weights_slots import SlotReader

VALUES = 100_000


def numbered(version):
    return {
        "weight": np.full((VALUES // 10, 10), version, np.float32),
        "count": np.array(version, np.int64),
    }


@ray.remote(num_cpus=0)
class Member:
    """Any process of the cluster that holds one end of the channel."""

    def __init__(self, end):
        self._end = end

    def publish(self, *versions):
        arrays = numbered(versions[0])
        for version in versions:
            arrays["weight"][:] = version
            arrays["count"][...] = version
            self._end.publish(version, arrays)
        self._end.flush()
        return self._end.newest()

    def look(self, newer_than, timeout=30.0):
        weights = self._end.wait(newer_than, timeout)
        inside = {int(v) for array in weights.arrays.values() for v in np.unique(array)}
        return weights.version, inside, weights.verified

    def get(self, version):
        weights = self._end.get(version)
        return weights.version, float(weights.arrays["weight"].mean())


@pytest.fixture(scope="module")
def cluster():
    ray.init(
        num_cpus=2,
        object_store_memory=100 << 20,
        include_dashboard=False,
        log_to_driver=False,
        namespace="weights",
    )
    yield
    ray.shutdown()


@pytest.fixture
def run(cluster, tmp_path):
    """start(folder of the store's host) -> the store; all of it ends with the test."""
    actors = []

    def start(store_folder=""):
        store = (
            ray.remote(WeightStore)
            .options(name=STORE, num_cpus=0, max_restarts=-1)
            .remote(str(tmp_path), 3, str(store_folder))
        )
        actors.append(store)
        ray.get(store.last.remote(), timeout=60)
        return store

    start.member = lambda end: actors.append(Member.remote(end)) or actors[-1]
    yield start
    for actor in actors:
        ray.kill(actor)
    wait_until(lambda: not _exists(), 30, "the store's name to be free")


def _exists():
    try:
        ray.get_actor(STORE)
    except ValueError:
        return False
    return True


def test_actors_of_the_learners_host_and_of_another(run, tmp_path):
    """Both get every version whole; exact ones as long as they are kept; the other host through Ray's store."""
    here, elsewhere = str(tmp_path / "here"), str(tmp_path / "elsewhere")
    store = run(here)
    learner = run.member(RayWeightSink(str(tmp_path), here))
    near = run.member(RayWeightSource(str(tmp_path), here))
    far = run.member(RayWeightSource(str(tmp_path), elsewhere))
    waiting = [near.look.remote(-1), far.look.remote(-1)]
    assert ray.get(learner.publish.remote(0), timeout=60) == 0
    assert ray.get(waiting, timeout=60) == [(0, {0}, True)] * 2
    ray.get(store.keep.remote(0, True), timeout=60)
    assert ray.get(learner.publish.remote(*range(1, 8)), timeout=60) == 7
    for member in (near, far):
        assert ray.get(member.look.remote(3), timeout=60) == (7, {7}, True)
        assert ray.get(member.get.remote(6), timeout=60) == (6, 6.0)
        assert ray.get(member.get.remote(0), timeout=60) == (0, 0.0)  # it was kept
        with pytest.raises(TwinRLError, match=r"version 3 is gone; there are \[0, 5, 6, 7\]"):
            ray.get(member.get.remote(3), timeout=60)
        with pytest.raises(DeadlineError, match="above 7"):
            ray.get(member.look.remote(7, 0.1), timeout=60)
    ray.get(store.keep.remote(0, False), timeout=60)
    assert ray.get(learner.publish.remote(8), timeout=60) == 8
    assert SlotReader(tmp_path / "here").versions() == [6, 7, 8]


def test_a_learner_on_another_host_than_the_store(run, tmp_path):
    """The store writes to its own host's memory what came through Ray: the gateway and the actors there read that."""
    run(tmp_path / "stores")
    learner = run.member(RayWeightSink(str(tmp_path), str(tmp_path / "learners")))
    beside_store = run.member(RayWeightSource(str(tmp_path), str(tmp_path / "stores")))
    beside_learner = run.member(RayWeightSource(str(tmp_path), str(tmp_path / "learners")))
    third = run.member(RayWeightSource(str(tmp_path), str(tmp_path / "third")))
    ray.get(learner.publish.remote(*range(5)), timeout=60)
    for member in (beside_store, beside_learner, third):
        assert ray.get(member.look.remote(3), timeout=60) == (4, {4}, True)
        assert ray.get(member.get.remote(3), timeout=60) == (3, 3.0)
    gateways = SlotReader(tmp_path / "stores")
    wait_until(lambda: gateways.versions() == [2, 3, 4], 30, "the store's copies")


def test_everybody_may_be_killed(run, tmp_path):
    """A store that is brought back knows the versions; a new learner counts on, also when memory is empty."""
    folder = str(tmp_path / "here")
    store = run(folder)
    learner = run.member(RayWeightSink(str(tmp_path), folder))
    actor = run.member(RayWeightSource(str(tmp_path), folder))
    ray.get(learner.publish.remote(0, 1, 2), timeout=60)
    ray.get(store.keep.remote(1, True), timeout=60)
    before = _process(store)
    ray.kill(store, no_restart=False)
    # It may answer once more before it ends.
    wait_until(lambda: _process(store) not in (None, before), 60, "the store to be back")
    assert ray.get(store.newest.remote(0), timeout=60)[0] == 2
    assert ray.get(learner.publish.remote(3, 4, 5, 6), timeout=60) == 6
    assert ray.get(actor.get.remote(1), timeout=60) == (1, 1.0)  # still kept
    ray.kill(learner)
    second = run.member(RayWeightSink(str(tmp_path), folder))
    assert ray.get(second.publish.remote(7), timeout=60) == 7
    assert ray.get(actor.look.remote(6), timeout=60) == (7, {7}, True)
    assert ray.get(actor.get.remote(1), timeout=60) == (1, 1.0)
    fresh = WeightStore(str(tmp_path), 3, str(tmp_path / "another-day"))  # a resumed run
    assert fresh.last() == 7
    assert fresh.newest(-1) is None


def _process(store):
    try:
        return ray.get(store.__ray_call__.remote(lambda _: os.getpid()), timeout=5)
    except ray.exceptions.RayError:
        return None


def test_what_ray_carries_is_checked_too(run, tmp_path):
    """An object that is not what was announced is loaded by nobody."""
    store = run(tmp_path / "stores")
    ray.get(store.publish.remote(3, 12345), timeout=60)
    with pytest.raises(WireError, match="version 3 arrived damaged"):
        ray.get(store.attach.remote(3, [ray.put(numbered(3))]), timeout=60)
    with pytest.raises(TwinRLError, match="version 3"):
        RayWeightSource(str(tmp_path), str(tmp_path / "third")).get(3)
