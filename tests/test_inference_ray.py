"""The inference actor in a cluster: asked from other processes, killed, brought back."""

import os
import signal
import threading

import numpy as np
import pytest
import ray
import torch

from actors.batching import Request
from actors.inference import InferenceActor
from actors.remote_runner import RemoteRunner
from deploy.factories import runner_factory
from deploy.ray_inference import INFERENCE, RayInference
from policies.registry import make_policy
from policies.weights import to_arrays
from twinrl.core.errors import DeadlineError
from twinrl.weights import make_weights

CONFIG = {
    "state_dim": 5,
    "pose_dim": 3,
    "cameras": ["side"],
    "image_size": 16,
    "integration_steps": 2,
    "hidden": 32,
    "latent": 16,
    "keypoints": 4,
    "width": 4,
    "critics": 0,
    "precision": "float32",
}


class OneVersion:
    """Version 0, published once."""

    def __init__(self):
        torch.manual_seed(0)
        arrays = to_arrays(make_policy(CONFIG))
        self.weights = make_weights(0, {key: array.copy() for key, array in arrays.items()})

    def poll(self, newer_than):
        return self.weights if newer_than < 0 else None

    def get(self, version):
        return self.weights


class Silent:
    def __init__(self, *_):
        pass


class Killable(InferenceActor):
    async def pid(self):
        return os.getpid()


@pytest.fixture(scope="module")
def actor():
    ray.init(
        num_cpus=2,
        object_store_memory=100 << 20,
        include_dashboard=False,
        log_to_driver=False,
        namespace="inference",
    )
    options = {"name": INFERENCE, "num_cpus": 0, "max_restarts": -1, "max_concurrency": 100}
    yield (
        ray.remote(Killable)
        .options(**options)
        .remote(
            INFERENCE,
            make_runner=runner_factory(CONFIG, 0),
            make_reporter=Silent,
            weights=OneVersion(),
        )
    )
    ray.shutdown()


def observe(rows, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "observation.images.side": rng.integers(0, 256, (rows, 16, 16, 3), dtype=np.uint8),
        "observation.state": rng.normal(size=(rows, 5)).astype("f4"),
    }


def test_actors_of_a_cluster_share_a_policy(actor):
    source = OneVersion()
    local, remote = runner_factory(CONFIG, 7)(), RemoteRunner(RayInference(), 7)
    for runner in (local, remote):
        runner.adopt(source.poll(-1))
    for rows in (1, 64):
        (chunk, columns), (theirs, their_columns) = (
            runner.infer(observe(rows), "lift", True) for runner in (local, remote)
        )
        np.testing.assert_allclose(chunk, theirs, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(columns["path"], their_columns["path"], rtol=1e-4, atol=1e-5)
    assert remote.version == 0


def test_errors_keep_their_kind_on_the_way(actor):
    ask = RayInference()
    with pytest.raises(DeadlineError, match=r"waited 0.3 s for an answer by policy version 99"):
        ask(Request(observe(2), "lift", True, 0, 0, version=99, patience=0.3))
    with pytest.raises(ValueError, match="1 instructions for 2 rows"):
        ask(Request(observe(2), ["lift"], True, 0, 0))


def test_an_actor_that_dies_is_asked_again_and_answers_the_same(actor):
    ask, asked = RayInference(), Request(observe(3), "lift", True, 5, 2)
    before = ask(asked)
    victim = ray.get(actor.pid.remote(), timeout=60)
    answers = []
    # Its version never comes: it waits in the actor when that is killed.
    lost = asked._replace(version=99, patience=1.0)

    def wait():
        try:
            answers.append(ask(lost))
        except DeadlineError as error:
            answers.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    os.kill(victim, signal.SIGKILL)
    after = ask(asked)
    np.testing.assert_array_equal(before.chunk, after.chunk)
    assert ray.get(actor.pid.remote(), timeout=60) != victim
    waiting.join(60)
    assert isinstance(answers[0], DeadlineError)
