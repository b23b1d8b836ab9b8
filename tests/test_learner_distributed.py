"""Two ranks on two processes: the same parameters as one process, the same decisions, and an end when one is lost."""

import multiprocessing
import os
import time
import traceback

import numpy as np
import pytest
import torch
from torch import nn

from learner import distributed
from learner.algorithms.ppoflow import PPOFlow, PPOFlowConfig
from learner.algorithms.pretrain import Pretrain, PretrainConfig
from learner.algorithms.sft import SFT, ImitationData, SFTConfig
from learner.optimiser import Optimiser
from learner.sharding import gathered, shard
from policies.experts import TransformerExpert
from policies.registry import make_policy
from tests.training import (
    POLICY,
    POSE,
    images,
    make_learner,
    make_rollouts,
    make_segments,
    make_windows,
)
from twinrl.core.errors import TwinRLError

DEADLINE = 400.0  # s for all that both ranks do
SETTINGS = {"steps": 6, "batch": 33, "warmup": 2, "validation": 0.3, "validate_every": 3}


def make(rank=0):
    """A policy; ranks differ until they are told rank 0's parameters."""
    torch.manual_seed(10 + rank)
    return make_policy(POLICY)


def run_sft(rank=0, **options):
    """What a few steps of SFT make of the policy, and what they measured."""
    policy, data = make(rank), make_windows(60)
    policy.fit_actions(data.action.reshape(-1, 7))
    sft = SFT(policy, SFTConfig(**{**SETTINGS, **options}), data, seed=3)
    measured = [sft.update() for _ in range(SETTINGS["steps"])]
    return {
        "policy": policy.state_dict(),
        "validation": measured[-1]["validation_loss"],
        "loss": [each["flow_loss"] for each in measured],
        "norm": [each["gradient_norm"] for each in measured],
    }


def run_pretrain(rank=0):
    """What a few steps make of the encoder."""
    policy, rng = make(rank), np.random.default_rng(0)
    seen = {**images(rng, 40), "observation.state": rng.normal(size=(40, 3)).astype(np.float32)}
    labels = rng.normal(size=(40, POSE)).astype(np.float32)
    algorithm = Pretrain(policy, PretrainConfig(steps=6, batch=15), seen, labels, "go", 3)
    for _ in range(6):
        algorithm.update()
    return policy.state_dict()


def run_ppo(rank=0):
    """What an iteration of PPOFlow makes of policy and critic, with an anchor, a lag, and minibatches of odd sizes."""
    policy = make()
    data = make_windows(30)
    policy.fit_states(data.state)
    policy.fit_actions(data.action.reshape(-1, 7))
    segments = make_rollouts(policy, 7)
    if rank:  # corrected by rank 0 before anything is computed
        torch.nn.init.zeros_(policy.flow.project.weight)
    distributed.broadcast(policy.state_dict().values())
    anchor = ImitationData(policy, data, {"demo": 1.0})
    settings = {"critic_warmup": 0, "minibatch": 20, "critic_updates": 5, "learning_rate": 2e-5}
    ppo = PPOFlow(policy, PPOFlowConfig(**settings), POSE, anchor, seed=2)
    metrics = ppo.update(segments, version=1)
    state = {**policy.state_dict(), **{f"value.{k}": v for k, v in ppo.value.state_dict().items()}}
    return {"policy": state, "kl": metrics["kl"], "updates": metrics["updates"]}


def run_refusal(rank):
    """Only rank 1's loss is no number, and only rank 0 uses the second parameter."""
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimiser = Optimiser([first, second], 0.1)
    bad = first.sum() * (float("nan") if rank else 1.0)
    optimiser.step(bad)
    skipped, kept = optimiser.skipped, first.detach().clone()
    loss = (first * (rank + 1.0)).sum() + (0.0 if rank else second.sum())
    norm = optimiser.step(loss)
    return {"skipped": skipped, "kept": kept, "norm": norm, "second": second.detach()}


def run_stage(rank, folder):
    """The stage as a job runs it; only rank 0 publishes and saves."""
    learner = make_learner(folder, make_segments(12), helper=rank > 0)
    told = distributed.agree(f"rank {rank}")
    options = {"steps": 4, "batch": 16, "validation": 0.3}
    summary = learner.run("sft", name="sft", sources=["demo"], options=options, start=None)
    found = {"version": learner._sink.version, "summary": summary["version"], "told": told}
    return {**found, "policy": learner.policy.state_dict()}


def run_expert(sharded):
    """What a few steps make of a transformer expert, whole or divided among ranks."""
    torch.manual_seed(4)
    flow = TransformerExpert(16, 5, 4, 7, width=32, layers=2, head_dim=16)
    if sharded:
        shard(flow)
    optimiser = Optimiser(flow.parameters(), 1e-3, clip=0.5)
    generator = torch.Generator().manual_seed(0)
    features, chunk = (torch.randn(shape, generator=generator) for shape in ((8, 6, 16), (8, 28)))
    share, norms = distributed.share, []
    for _ in range(4):
        t, eps = flow.matching_points(features, 2, generator)
        losses = flow.matching_loss(
            share(features),
            share(chunk),
            torch.ones_like(share(chunk)),
            points=(share(t), share(eps)),
        )
        norms.append(optimiser.step(losses.sum() * distributed.size() / len(chunk)))
    parts = {name: distributed.is_sharded(each) for name, each in flow.named_parameters()}
    return {"flow": gathered(flow), "norms": norms, "sharded": all(parts.values())}


def work(rank, folder):
    """All that a rank does; the result goes to a file."""
    torch.set_num_threads(1)
    result = {}
    try:
        with distributed.joined(f"file://{folder}/meeting", rank, 2, timeout=60):
            result["sft"] = run_sft(rank)
            result["encoder"] = run_sft(rank, train_encoder=True, accumulate=2)
            result["pretrain"] = run_pretrain(rank)
            result["ppo"] = run_ppo(rank)
            result["refusal"] = run_refusal(rank)
            result["stage"] = run_stage(rank, folder)
            result["expert"] = run_expert(sharded=True)
            result["mean"] = distributed.mean([rank, 2.0])
            torch.save(result, folder / f"rank{rank}.pt")
            if rank == 1:
                os._exit(0)  # without a word: the other must notice
            began = time.monotonic()
            distributed.agree(1), distributed.mean([1.0])
    except TwinRLError as error:
        torch.save({**result, "lost": str(error)}, folder / f"rank{rank}.pt")
        assert time.monotonic() - began < 30
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
        raise


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    ended = time.monotonic() + DEADLINE
    for process in processes:
        process.join(max(0.1, ended - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    errors = "\n".join(path.read_text() for path in folder.glob("error*"))
    assert [process.exitcode for process in processes] == [0, 0], errors
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def assert_same(first, second, tolerance):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("what", ["sft", "encoder"])
def test_two_ranks_train_like_one(ranks, what):
    """On the same global batch, which they share unevenly, to 1e-5; and exactly like one another."""
    alone = run_sft(**({"train_encoder": True} if what == "encoder" else {}))
    first, second = (found[what] for found in ranks)
    assert_same(first["policy"], second["policy"], 0.0)
    assert_same(first["policy"], alone["policy"], 1e-5)
    assert first["norm"] == pytest.approx(alone["norm"], rel=1e-4)
    assert first["validation"] == pytest.approx(alone["validation"], rel=1e-4)
    shares = np.mean([first["loss"], second["loss"]], axis=0)
    np.testing.assert_allclose(shares, alone["loss"], rtol=1e-4)


def test_pretraining_on_two_ranks_is_that_on_one(ranks):
    assert_same(ranks[0]["pretrain"], run_pretrain(), 1e-5)


def test_ppoflow_on_two_ranks_is_that_on_one(ranks):
    """Also where a minibatch has one row, and with the same stop by the KL."""
    alone = run_ppo()
    for found in (found["ppo"] for found in ranks):
        assert found["updates"] == alone["updates"] > 3
        assert found["kl"] == pytest.approx(alone["kl"], rel=1e-3, abs=1e-6)
        assert_same(found["policy"], alone["policy"], 1e-5)


def test_a_divided_expert_learns_like_a_whole_one(ranks):
    """FSDP2 on two processes: the same gradient norms and parameters, of which each rank kept a part."""
    whole = run_expert(sharded=False)
    for found in ranks:
        assert found["expert"]["sharded"] and not whole["sharded"]
        assert found["expert"]["norms"] == pytest.approx(whole["norms"], rel=1e-4)
        assert_same(found["expert"]["flow"], whole["flow"], 1e-4)


def test_ranks_skip_the_same_updates(ranks):
    """A loss that is no number on one rank changes nothing on any; what one rank did not use counts as zero."""
    for found in ranks:
        refusal = found["refusal"]
        assert refusal["skipped"] == 1 and (refusal["kept"] == 1).all()
        assert refusal["norm"] == pytest.approx(np.sqrt(3 * 1.5**2 + 2 * 0.5**2), rel=1e-5)
        assert (refusal["second"] < 1).all()


def test_only_rank_0_publishes_and_saves(ranks):
    assert ranks[0]["stage"]["version"] == 0 and ranks[1]["stage"]["version"] == -1
    assert [found["stage"]["summary"] for found in ranks] == [0, 0]
    assert [found["stage"]["told"] for found in ranks] == ["rank 0", "rank 0"]
    assert_same(ranks[0]["stage"]["policy"], ranks[1]["stage"]["policy"], 0.0)


def test_values_are_averaged(ranks):
    assert [found["mean"] for found in ranks] == [[0.5, 2.0]] * 2


def test_a_lost_rank_ends_the_others(ranks):
    assert "rank 0 of 2 lost another rank" in ranks[0]["lost"]


def test_alone_there_is_nothing_to_share():
    """Without others every helper is that of a single rank."""
    assert (distributed.rank(), distributed.size()) == (0, 1)
    assert distributed.share([1, 2, 3]) == [1, 2, 3] and distributed.agree("x") == "x"
    with distributed.joined("tcp://127.0.0.1:1", 0, 1):
        assert distributed.mean([2.0]) == [2.0]


def test_torchruns_environment_is_read_whole(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distributed.environment() is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(TwinRLError, match=r"MASTER_ADDR.*torchrun"):
        distributed.environment()
    for name, value in (("MASTER_ADDR", "h"), ("MASTER_PORT", "5"), ("RANK", "1")):
        monkeypatch.setenv(name, value)
    assert distributed.environment() == ("env://", 1, 2)
