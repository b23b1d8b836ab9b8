"""Optimiser steps, checkpoints in the background, what is kept of a failure, and where a learner computes."""

import json
import os
import threading

import numpy as np
import pytest
import torch
from torch import nn

from learner.algorithms.sft import SFTConfig
from learner.checkpoint import CheckpointWriter, load_checkpoint, save_checkpoint, snapshot
from learner.features import FeatureCache, encode, feature_bytes
from learner.learner import choose_device, uses_bfloat16
from learner.optimiser import NonFiniteLossError, Optimiser, one_cycle, warm_cosine
from learner.settings import make_settings
from learner.stages import STAGES
from policies.registry import make_policy
from tests.training import POLICY, STATE, images, make_learner
from twinrl.core.errors import ConfigError, DeadlineError, ResumeError, TwinRLError


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return make_policy(POLICY)


def content(policy, **algorithm):
    """What a checkpoint of the policy holds."""
    return {
        "stage": "sft",
        "version": 3,
        "policy": policy,
        "policy_config": POLICY,
        "algorithm": algorithm,
    }


# -- steps -----------------------------------------------------------------------------------------------


def test_a_batch_in_parts_is_the_batch():
    """Accumulated sums over the whole count give the same step as the mean."""
    data = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    results = []
    for parts in (1, 3):
        weight = nn.Parameter(torch.ones(5))
        optimiser = Optimiser([weight], 0.1, clip=0.5)
        for _ in range(4):
            pieces = data.chunk(parts)
            for piece in pieces[:-1]:
                optimiser.accumulate((piece @ weight).square().sum() / len(data))
            norm = optimiser.step((pieces[-1] @ weight).square().sum() / len(data))
        results.append((weight.detach().clone(), norm))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_what_is_no_number_changes_nothing_and_ends_after_patience(bad):
    weight = nn.Parameter(torch.zeros(2))
    optimiser = Optimiser([weight], 0.1, patience=3)

    def loss(good):
        if good:
            return (weight - 1).square().sum()
        # The square root's gradient is infinite at 0, where its value is finite.
        return weight.sum() * float("nan") if bad == "loss" else (weight * 0).sqrt().sum()

    for _ in range(2):
        optimiser.step(loss(good=False))
    assert optimiser.skipped == 2 and (weight == 0).all()
    optimiser.step(loss(good=True))  # the count in a row begins again
    weight.data.zero_()
    with pytest.raises(NonFiniteLossError, match="3 updates in a row") as raised:
        for _ in range(3):
            optimiser.step(loss(good=False), lambda: {"x": weight})
    assert raised.value.batch["x"] is weight and optimiser.skipped == 5


def test_a_failure_leaves_batch_and_norms(tmp_path, monkeypatch):
    """The error says where; the arrays are those of the last batch."""

    def stage(learner):
        optimiser = Optimiser(learner.policy.flow.parameters(), 0.1, patience=2)
        while True:
            total = sum(parameter.sum() for parameter in learner.policy.flow.parameters())
            optimiser.step(total * float("inf"), lambda: {"rows": np.arange(3), "t": torch.ones(2)})

    monkeypatch.setitem(STAGES, "fail", stage)
    learner = make_learner(tmp_path)
    with pytest.raises(TwinRLError, match="fail: 2 updates in a row") as raised:
        learner.run("fail")
    (folder,) = (tmp_path / "failures").iterdir()
    assert str(folder) in str(raised.value)
    held = np.load(folder / "batch.npz")
    np.testing.assert_array_equal(held["rows"], [0, 1, 2])
    norms = json.loads((folder / "norms.json").read_text())
    name, parameter = next(iter(learner.policy.flow.named_parameters()))
    assert norms[f"flow.{name}"]["norm"] == pytest.approx(float(parameter.detach().norm()))
    learner.close()


def test_schedules_have_their_corners():
    """Warm-up to 1, the middle of a cosine, and the end; a cycle's start, peak and end."""
    cosine = warm_cosine(100, 10)
    assert cosine(0) == pytest.approx(0.1) and cosine(9) == pytest.approx(0.98, abs=1e-3)
    assert cosine(50) == pytest.approx(0.5) and cosine(100) == pytest.approx(0.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0, momentum=0.9),
        1.0,
        total_steps=50,
        pct_start=0.1,
    )
    cycle = one_cycle(50)
    for step in range(50):
        assert cycle(step) == pytest.approx(reference.get_last_lr()[0], rel=1e-5, abs=1e-7)
        reference.optimizer.step()
        if step < 49:
            reference.step()


# -- checkpoints -----------------------------------------------------------------------------------------


@pytest.fixture
def slow_disk(monkeypatch):
    """The disk says that data are there only once `released` is set; `asked` says that it was asked to."""
    released, asked, sync = threading.Event(), threading.Event(), os.fsync

    def wait(file):
        asked.set()
        assert released.wait(20)
        sync(file)

    monkeypatch.setattr(os, "fsync", wait)
    return released, asked


def test_training_goes_on_while_a_checkpoint_is_written(policy, tmp_path, slow_disk):
    """The file holds what was true when it was asked for; of several that wait, the newest is written."""
    released, asked = slow_disk
    writer, path = CheckpointWriter(), tmp_path / "a.pt"
    for value in range(4):
        with torch.no_grad():
            policy.action_low.fill_(value)
        writer.save(path, snapshot(**content(policy, step=value)))
        assert asked.wait(20)
        assert not path.exists()
    with pytest.raises(DeadlineError, match=r"within 0\.1 s"):
        writer.flush(0.1)
    written = []
    replace = os.replace
    try:
        os.replace = lambda source, target: (written.append(target), replace(source, target))
        released.set()
        writer.close()
    finally:
        os.replace = replace
    state = load_checkpoint(path)
    assert state["algorithm"] == {"step": 3} and (state["policy"]["action_low"] == 3).all()
    assert written == [path, path]  # the first, and the last of the three that waited
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_disk_is_told_next(policy, tmp_path):
    writer = CheckpointWriter()
    writer.save(tmp_path / "missing" / "a.pt", snapshot(**content(policy)))
    with pytest.raises(TwinRLError, match=r"missing/a\.pt was not written: .*No such file"):
        writer.flush()
    writer.save(tmp_path / "a.pt", snapshot(**content(policy)))
    writer.close()
    assert load_checkpoint(tmp_path / "a.pt")["version"] == 3


def test_a_damaged_checkpoint_is_refused_in_a_sentence(policy, tmp_path):
    """Wherever a byte of the content is another, and wherever the file ends early."""
    path = tmp_path / "a.pt"
    average = torch.arange(1000, dtype=torch.float64)
    save_checkpoint(path, **content(policy, average=[average], step=1))
    whole = path.read_bytes()
    assert torch.equal(load_checkpoint(path)["algorithm"]["average"][0], average)
    for tensor in (average, policy.flow.project.weight.detach()):
        at = whole.index(tensor.numpy().tobytes())
        damaged = bytearray(whole)
        damaged[at + 100] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ResumeError, match=r"is damaged|cannot be read"):
            load_checkpoint(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ResumeError, match="cannot be read"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "state, text",
    [
        ([1], "is no checkpoint: it holds a list"),
        ({"format": 1}, "has the checkpoint format 1; this version reads 3"),
        ({"format": 3, "stage": "sft"}, "is no complete checkpoint: it lacks version"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, state, text):
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ResumeError, match=text):
        load_checkpoint(tmp_path / "a.pt")


def test_a_hash_covers_values_too(policy, tmp_path):
    """A number that is no tensor counts as well."""
    path = tmp_path / "a.pt"
    save_checkpoint(path, **content(policy, step=1))
    state = torch.load(path, weights_only=True)
    torch.save({**state, "version": 4}, path)
    with pytest.raises(ResumeError, match="is damaged"):
        load_checkpoint(path)


def test_a_restored_learner_draws_what_the_first_would_have(tmp_path):
    first = make_learner(tmp_path)
    torch.rand(3)
    first.save("a")
    wanted = torch.rand(3)
    first.close()
    second = make_learner(tmp_path)
    second.restore("a")
    assert torch.equal(torch.rand(3), wanted)
    second.close()


# -- the rest --------------------------------------------------------------------------------------------


def test_a_cache_keeps_to_its_memory_and_to_the_truth(policy):
    """Features are right however little is kept, and no more is kept than was allowed."""
    rng = np.random.default_rng(0)
    seen = {**images(rng, 12), "observation.state": rng.normal(size=(12, STATE))}
    seen["observation.state"] = seen["observation.state"].astype(np.float32)
    wanted = encode(policy, seen, "go")
    cache = FeatureCache(policy, "go", memory=5 * feature_bytes(policy))
    for _ in range(20):
        rows = rng.integers(0, 12, rng.integers(1, 9))
        batch = {key: value[rows] for key, value in seen.items()}
        torch.testing.assert_close(cache.lookup({**batch, "observation.id": rows}), wanted[rows])
        assert cache._table.shape[0] <= 5 and cache.stats()["entries"] <= 5


def test_devices_and_precisions_are_checked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == "cuda" and choose_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="'cuda:1': this process sees 1 GPUs"):
        choose_device("cuda:1")
    with pytest.raises(ConfigError, match="'gpu': one of auto, cpu, cuda"):
        choose_device("gpu")
    assert uses_bfloat16("auto", torch.device("cuda"))
    assert not uses_bfloat16("auto", torch.device("cpu"))
    assert uses_bfloat16("bfloat16", torch.device("cpu"))
    with pytest.raises(ConfigError, match="'half': one of auto"):
        uses_bfloat16("half", torch.device("cpu"))


def test_settings_name_the_nearest():
    assert make_settings(SFTConfig, {"steps": 5}, "sft.options").steps == 5
    with pytest.raises(
        ConfigError, match=r"sft\.options has no setting 'step'; did you mean 'steps'"
    ):
        make_settings(SFTConfig, {"step": 5}, "sft.options")
    with pytest.raises(ConfigError, match="time is 'normal': one of uniform, beta"):
        make_settings(SFTConfig, {"time": "normal"}, "sft.options")
