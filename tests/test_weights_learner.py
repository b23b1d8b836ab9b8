"""The learner publishes a real policy, actors load it: whole versions, rising numbers, no error lost."""

import json
import threading

import numpy as np
import pytest
import torch

from learner.learner import Learner
from learner.stages import STAGES
from policies.runner import PolicyRunner
from policies.weights import WeightsError, to_arrays
from twinrl.core.errors import TwinRLError
from twinrl.weights import Weights, checksum
from twinrl.weights_publisher import Publisher
from twinrl.weights_slots import SlotReader

CONFIG = {
    "name": "vla",
    "state_dim": 9,
    "pose_dim": 5,
    "image_size": 32,
    "integration_steps": 2,
    "hidden": 32,
    "latent": 16,
    "keypoints": 4,
    "width": 4,
    "critics": 2,
}


class Quiet:
    """Stands where a reader and a reporter are not needed."""

    def event(self, *_):
        pass

    def close(self):
        pass


def make_learner(folder, sink):
    (folder / "checkpoints").mkdir(exist_ok=True)
    return Learner(
        policy_config=CONFIG,
        instruction="go",
        checkpoints=folder / "checkpoints",
        make_reader=Quiet,
        make_reporter=lambda name, stats: Quiet(),
        sink=sink,
        seed=0,
    )


def fill(policy, value):
    """Every number of the policy says the version, changed in place as an optimiser does."""
    with torch.no_grad():
        for tensor in policy.state_dict().values():
            tensor.fill_(value % 2 if tensor.dtype == torch.bool else value)


def versions_in(arrays):
    return {float(v) for a in arrays.values() if a.dtype != bool for v in np.unique(a)}


def test_actors_load_whole_versions_while_the_policy_is_trained(tmp_path):
    learner = make_learner(tmp_path, Publisher(tmp_path / "slots"))
    seen, stop = [], threading.Event()

    def act():
        source, runner = SlotReader(tmp_path / "slots"), PolicyRunner(CONFIG)
        while not stop.is_set():
            weights = source.poll(runner.version)
            if weights is not None:
                runner.load(weights.version, weights.arrays)
                seen.append((runner.version, versions_in(to_arrays(runner.policy))))

    thread = threading.Thread(target=act)
    thread.start()
    for version in range(40):
        fill(learner.policy, version)
        assert learner.publish() == version
    learner._sink.flush()
    stop.set()
    thread.join(30)
    assert seen and all(inside == {float(version)} for version, inside in seen)
    assert 0 <= learner.stats()["learner/publish_share"] < 1
    learner.close()


def test_a_learner_that_is_brought_back_counts_on(tmp_path):
    first = make_learner(tmp_path, Publisher(tmp_path / "slots"))
    for _ in range(3):
        first.publish()
    first.save("stage")
    first.publish()  # version 3 is in no checkpoint
    first.close()
    second = make_learner(tmp_path, Publisher(tmp_path / "slots"))
    assert second.republish("stage") == 4
    assert SlotReader(tmp_path / "slots").newest() == 4
    assert second.carry_over("stage", "next")["version"] == 5
    second.close()


@pytest.mark.parametrize("when", ["in the next publish", "at the end of the stage"])
def test_errors_in_the_background_end_the_stage(tmp_path, monkeypatch, when):
    heard = threading.Event()

    def announce(version, checksum, views):
        heard.set()
        raise OSError("no such store")

    def stage(learner):
        learner.publish()
        assert heard.wait(10)
        if when == "in the next publish":
            while True:
                learner.publish()

    monkeypatch.setitem(STAGES, "publish", stage)
    learner = make_learner(tmp_path, Publisher(tmp_path / "slots", announce=announce))
    with pytest.raises(
        TwinRLError, match=r"version \d+ was not handed out: OSError: no such store"
    ):
        learner.run("publish")


def test_a_runner_names_the_version_it_refuses():
    runner = PolicyRunner(CONFIG)
    arrays = {name: array.copy() for name, array in to_arrays(runner.policy).items()}
    published = checksum(arrays)
    runner.load(3, arrays, published)
    arrays["flow.project.weight"][0, 0] += 1
    with pytest.raises(WeightsError, match="version 4 are not loaded: their checksum is"):
        runner.load(4, arrays, published)
    with pytest.raises(TwinRLError, match="version 4 arrived damaged"):
        Weights(4, arrays, published).verify()
    assert runner.version == 3


@pytest.mark.timeout(600)
def test_the_benchmark_runs(tmp_path, capsys):
    from benchmarks import weights as benchmark

    file = tmp_path / "weights.json"
    benchmark.main(["--tiny", "--json", str(file)])
    report = json.loads(file.read_text())
    assert report["command"] and report["machine"]["cpus"] >= 1
    assert {row["rows"] for row in report["rows"]} == set(benchmark.GROUPS)
    keys = {"weights_vs_memcpy_1", "publish_stall", "delta_20mbit_s", "delta_ratio_3e-05"}
    assert keys <= report["figures"].keys()
    assert "delta_20mbit_s" in capsys.readouterr().out
