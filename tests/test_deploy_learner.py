"""A job's learner as Ray actors: several ranks train what one learner does, and one that died takes part again."""

import os
from functools import partial
from pathlib import Path

import pytest
import ray
import torch

from deploy.ray_learner import RayLearner
from learner.checkpoint import load_checkpoint
from learner.silent import NoSink, silent_reporter
from tests.training import POLICY, Shelf, make_learner, make_segments

ROOT = Path(__file__).parent.parent
SECONDS = 200.0  # for an actor's start and a stage
STAGE = {"sources": ["demo"], "options": {"steps": 5, "batch": 17, "warmup": 2}, "start": None}


class Rank(RayLearner):
    """One that can be asked to die."""

    def end(self):
        """As a killed process does."""
        os._exit(1)


class Reader(Shelf):
    """As the replay's, with figures."""

    def stats(self):
        """Nothing to tell."""
        return {}


@pytest.fixture(scope="module")
def cluster():
    ray.init(
        num_cpus=2,
        object_store_memory=100 << 20,
        include_dashboard=False,
        log_to_driver=False,
        namespace="learners",
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    yield
    ray.shutdown()


def actor(name, folder, segments, **options):
    """A RayLearner; its reader and its reporter are at hand."""
    settings = {
        "policy_config": POLICY,
        "instruction": "go",
        "checkpoints": folder / "checkpoints",
        "make_reader": partial(Reader, segments),
        "make_reporter": silent_reporter,
        "sink": NoSink(),
        "seed": 0,
        "device": "cpu",
        **options,
    }
    placed = {"name": name, "num_cpus": 0, "max_concurrency": 3, "max_restarts": -1}
    return ray.remote(Rank).options(**placed).remote(**settings)


@pytest.mark.timeout(600)
def test_ranks_of_a_job_train_what_one_learner_does(cluster, tmp_path):
    segments = make_segments(3)
    alone = make_learner(tmp_path / "alone", segments)
    alone.run("sft", name="sft", **STAGE)
    (tmp_path / "job" / "checkpoints").mkdir(parents=True)
    helper = actor("learner-1", tmp_path / "job", segments, helper=True)
    learner = actor("learner", tmp_path / "job", segments, helpers=["learner-1"])
    for name in ("sft", "again"):
        summary = ray.get(learner.run.remote("sft", name=name, **STAGE), timeout=SECONDS)
        assert summary["steps"] == 5
        if name == "sft":
            trained = load_checkpoint(tmp_path / "job" / "checkpoints" / "sft.pt")["policy"]
            for key, tensor in alone.policy.state_dict().items():
                torch.testing.assert_close(trained[key], tensor, rtol=0, atol=1e-5, msg=key)
            with pytest.raises(ray.exceptions.RayActorError):
                ray.get(helper.end.remote(), timeout=SECONDS)
    alone.close()
