"""`twinrl train` as a user runs it: on the replay of a stopped run, in one process and in several, to the end and not."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from buffer_service.client import Writer
from buffer_service.testing import ServiceProcess
from deploy.run_folder import RunFolder
from learner.checkpoint import load_checkpoint, save_checkpoint
from policies.registry import make_policy
from tests.training import POLICY, POSE, SIZE, STATE, C, make_segments
from twinrl.config import Config, save_config
from twinrl.core.segment import Schema
from twinrl.main import main

pytestmark = pytest.mark.timeout(300)
ROOT = Path(__file__).parent.parent
SCHEMA = Schema(
    state_dim=STATE, privileged_dim=POSE, cameras=("side", "wrist"), image_size=SIZE, chunk=C
)
POLICY_OF_RUN = {**POLICY, "cameras": ["side", "wrist"], "chunk": C}
QUICK = ("learner.threads=1", "learner.device=cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of runs with one, `old`, that has stopped: demonstrations, the arm's episodes, and a checkpoint."""
    runs = tmp_path_factory.mktemp("runs")
    service = ServiceProcess(runs / "old", SCHEMA)
    for name, source, count in (("people", "demo", 14), ("arm", "real", 4)):
        with Writer(service.address, service.keys(), name, schema=SCHEMA) as writer:
            for header, columns in make_segments(count, source=source):
                writer.write(header, columns)
    plain = {**SCHEMA._asdict(), "cameras": list(SCHEMA.cameras)}
    settings = {
        "run_dir": str(runs / "old"),
        "address": service.address,
        "redis_url": "",
        "schema": plain,
        "limiter": {"samples_per_insert": None, "min_size": 0},
        "metrics_address": "tcp://127.0.0.1:9",
    }
    described = {
        "replay": service.address,
        "roles": {"replay": settings},
        "job": {"schema": plain, "instruction": "go", "policy": POLICY_OF_RUN},
    }
    (runs / "old" / "topology.json").write_text(json.dumps(described))
    save_config(Config(name="old"), runs / "old" / "config.yaml")
    torch.manual_seed(5)
    policy = make_policy(POLICY_OF_RUN)
    (runs / "old" / "checkpoints").mkdir()
    save_checkpoint(
        runs / "old" / "checkpoints" / "pretrained.pt",
        stage="pretrained",
        version=2,
        policy=policy,
        policy_config=POLICY_OF_RUN,
    )
    assert service.stop() == 0
    service.process.stdout.close()
    return runs


def train(runs, *words, code=0):
    """What `twinrl train WORDS` says."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            found = main(["train", *map(str, words), "--runs", str(runs)])
        except SystemExit as end:  # of the command line's parser
            found = end.code
    assert found == code, out.getvalue() + error.getvalue()
    return out.getvalue() + error.getvalue()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sft_on_a_stopped_run(runs):
    """From the run's encoder, with figures and events as a run's folder has them; the result can be evaluated."""
    said = train(
        runs, "sft", "--data", "old", "--steps", 6, "sft.batch=16", "sft.validation=0.3", *QUICK
    )
    out = runs / "old-sft"
    assert "old is not running" in said and "sft is in" in said and "validation_windows" in said
    state = load_checkpoint(out / "checkpoints" / "sft.pt")
    assert state["policy_config"] == POLICY_OF_RUN and state["stage"] == "sft"
    start = load_checkpoint(runs / "old" / "checkpoints" / "pretrained.pt")["policy"]
    trained = {n for n in start if not torch.equal(start[n], state["policy"][n])}
    assert any(name.startswith("flow.") for name in trained)
    assert not any(name.startswith("vision.") for name in trained)
    figures = [line["data"] for line in lines(out / "metrics.jsonl")]
    assert figures[-1]["learner/progress"] == 1.0 and "loss/flow_loss" in figures[-1]
    assert any("sft is in" in line["data"]["text"] for line in lines(out / "events.jsonl"))
    assert RunFolder.open(out).config().name == "old"
    assert "holds the result already" in train(
        runs, "sft", "--data", "old", "--steps", 6, "sft.batch=16", "sft.validation=0.3", *QUICK
    )
    other = ("sft", "--data", "old", "--steps", 7, "sft.batch=16", *QUICK)
    assert "other values of options, steps; give another --out" in train(runs, *other, code=1)


def test_two_processes_train_what_one_does(runs):
    """`--ranks 2` gives the parameters of one process."""
    words = ("sft", "--data", "old", "--steps", 5, "sft.batch=17", "--source", "demo", *QUICK)
    train(runs, *words, "--out", runs / "one")
    train(runs, *words, "--out", runs / "two", "--ranks", 2)
    one, two = (
        load_checkpoint(runs / name / "checkpoints" / "sft.pt")["policy"] for name in ("one", "two")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=1e-5)


def test_a_chain_of_algorithms(runs):
    """An encoder from recorded frames, then off-policy RL from it, from a file of weights."""
    train(runs, "pretrain", "--data", "old", "--steps", 4, "pretrain.batch=8", *QUICK)
    encoder = runs / "old-pretrain" / "checkpoints" / "pretrained.pt"
    words = ("chunk-q", "--data", "old", "--start", encoder, "--steps", 4, "chunk_q.batch_size=8")
    words += ("chunk_q.horizon=2",)  # windows of another length are refused
    said = train(runs, *words, "chunk_q.actor_warmup=0", "chunk_q.target_members=1", *QUICK)
    assert "updates 4, segments 18, windows_cloned 144" in said
    first, then = (
        load_checkpoint(path)["policy"]
        for path in (encoder, runs / "old-chunk-q" / "checkpoints" / "chunk-q.pt")
    )
    changed = {name.partition(".")[0] for name in first if not torch.equal(first[name], then[name])}
    assert {"critic", "flow"} <= changed


def test_an_interrupted_training_goes_on(runs):
    """Ctrl-C leaves a folder that the same command finishes, as if it had not been interrupted."""
    words = ["sft", "--data", "old", "--steps", "1500", "sft.batch=16", "--runs", str(runs), *QUICK]
    assert main(["train", *words, "--out", str(runs / "whole")]) == 0
    command = [sys.executable, "-m", "twinrl.main", "train", *words, "--out", str(runs / "parts")]
    child = subprocess.Popen(
        command, env=dict(os.environ, PYTHONPATH=str(ROOT)), stdout=subprocess.PIPE, text=True
    )
    metrics, ended = runs / "parts" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and '"loss/flow_loss"' in metrics.read_text()):
        assert child.poll() is None and time.monotonic() < ended
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    said, _ = child.communicate(timeout=60)
    if child.returncode == 130:  # 0: it was quicker than the signal
        assert "the same command goes on" in said
        assert (runs / "parts" / "checkpoints" / "sft-running.pt").exists()
        assert main(["train", *words, "--out", str(runs / "parts")]) == 0
    assert not (runs / "parts" / "checkpoints" / "sft-running.pt").exists()
    whole, parts = (
        load_checkpoint(runs / name / "checkpoints" / "sft.pt")["policy"]
        for name in ("whole", "parts")
    )
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


@pytest.mark.parametrize(
    "words, text",
    [
        (["stf", "--data", "old"], "unknown algorithm 'stf'; did you mean 'sft'?"),
        (["sft", "--data", "odl"], "no run 'odl' with a replay; in .* there are: old"),
        (["sft", "--data", "old", "sft.batches=3"], "unknown setting 'sft.batches'; did you mean 'sft.batch'?"),
        (["sft", "--data", "old", "stf.batch=3"], "unknown setting 'stf'; did you mean 'sft'?"),
        (["sft", "--data", "old", "learner.devise=cpu"], "did you mean 'learner.device'?"),
        (["sft", "--data", "old", "--policy", "smal"], "unknown preset 'smal'; did you mean 'small'?"),
        (["sft", "--data", "old", "--start", "sft"], r"no checkpoint of old \(pretrained\)"),
        (["sft", "--data", "old", "--steps", "0"], "--steps is 0, must be at least 1"),
        (["sft", "--data", "old", "--source", "twin"], "the replay holds nothing of twin"),
        (["sft", "--data", "old", "sft"], "not of the form section.key=value"),
    ],
)  # fmt: skip
def test_what_does_not_exist_is_refused_with_the_nearest(runs, tmp_path, words, text):
    import re

    said = train(runs, *words, "--out", tmp_path / "out", code=1)
    assert re.search(text, said), said
    assert "Traceback" not in said


def test_the_help_has_examples(runs):
    said = train(runs, "--help")
    assert "twinrl train sft --data demo" in said and "chunk-q" in said and "--ranks" in said
