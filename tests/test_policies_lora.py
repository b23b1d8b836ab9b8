"""LoRA: what it adds at the start, what it trains, what merging does."""

import pytest
import torch
from torch import nn

from policies.lora import LoRALinear, adapted_layers, apply_lora, merge, unmerge

RANK = 3


@pytest.fixture
def network():
    """Two linear layers called `first.q_proj` and `second`, and a norm."""
    torch.manual_seed(0)
    first = nn.ModuleDict({"q_proj": nn.Linear(7, 11)})
    return nn.ModuleDict({"first": first, "norm": nn.LayerNorm(11), "second": nn.Linear(11, 5)})


@pytest.fixture
def x():
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(1))


def run(network, x):
    return network["second"](network["norm"](network["first"]["q_proj"](x)))


def train(network, x, steps=5):
    """Some gradient steps on what may be trained, so that B is no longer zero."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, 0.05)
    for _ in range(steps):
        optimiser.zero_grad()
        run(network, x).square().sum().backward()
        optimiser.step()


def test_nothing_changes_at_the_start(network, x):
    """B is zero, so the adapted network is the frozen one."""
    before = run(network, x)
    names = apply_lora(network, RANK, alpha=RANK)
    assert names == ["first.q_proj", "second"]
    torch.testing.assert_close(run(network, x), before, rtol=0, atol=0)


def test_names_of_frozen_parameters_stay(network):
    """Published weights load with and without LoRA: it adds names and changes none."""
    before = set(network.state_dict())
    apply_lora(network, RANK, alpha=RANK)
    added = set(network.state_dict()) - before
    assert before <= set(network.state_dict())
    assert added == {
        f"{layer}.lora_{kind}" for layer in ("first.q_proj", "second") for kind in "ab"
    }


def test_only_a_and_b_get_gradients_and_change(network, x):
    apply_lora(network, RANK, alpha=RANK)
    frozen = {n: p.clone() for n, p in network.named_parameters() if not p.requires_grad}
    run(network, x).square().sum().backward()
    assert {n.rpartition(".")[2] for n, p in network.named_parameters() if p.grad is not None} == {
        "lora_a", "lora_b",
    }  # fmt: skip
    before = run(network, x)
    train(network, x)
    assert (run(network, x) - before).abs().max() > 0.01
    for name, value in frozen.items():
        torch.testing.assert_close(network.get_parameter(name), value, rtol=0, atol=0)


def test_output_is_the_formula(network, x):
    """y = W x + b + (alpha / r) B A x, written out."""
    apply_lora(network, RANK, alpha=12.0, suffixes=["q_proj"])
    train(network, x)
    layer = network["first"]["q_proj"]
    delta = 12.0 / RANK * layer.lora_b @ layer.lora_a
    torch.testing.assert_close(layer(x), x @ (layer.weight + delta).T + layer.bias)
    assert delta.abs().max() > 0.01


def test_merged_output_equals_unmerged_and_comes_back_bit_for_bit(network, x):
    apply_lora(network, RANK, alpha=2 * RANK)
    train(network, x)
    weights = {n: p.clone() for n, p in network.named_parameters()}
    before = run(network, x)
    merge(network)
    merge(network)  # twice is once
    torch.testing.assert_close(run(network, x), before)
    assert not torch.equal(network["second"].weight, weights["second.weight"])
    unmerge(network)
    unmerge(network)
    for name, value in weights.items():
        assert torch.equal(network.get_parameter(name), value)
    assert torch.equal(run(network, x), before)


def test_a_merged_network_is_not_saved(network, x):
    """Whoever loads it would add the product twice."""
    apply_lora(network, RANK, alpha=RANK)
    merge(network)
    with pytest.raises(RuntimeError, match=r"q_proj.weight is merged"):
        network.state_dict()
    unmerge(network)
    network.state_dict()


def test_layers_are_chosen_by_the_ends_of_their_names(network):
    assert apply_lora(network, RANK, alpha=1.0, suffixes=["q_proj"]) == ["first.q_proj"]
    assert [name for name, _ in adapted_layers(network)] == ["first.q_proj"]
    assert type(network["second"]) is nn.Linear
    assert not network["second"].weight.requires_grad  # frozen without LoRA, too


def test_a_wrong_name_or_rank_says_what_there_is(network):
    with pytest.raises(ValueError, match=r"ends in one of \['k_proj'\].*'q_proj', 'second'"):
        apply_lora(network, RANK, alpha=1.0, suffixes=["k_proj"])
    with pytest.raises(ValueError, match=r"rank of 8; of a layer from 7 to 11 it is 1 to 7"):
        LoRALinear(nn.Linear(7, 11), rank=8, alpha=8.0)


def test_a_bfloat16_layer_keeps_float32_matrices():
    """Small steps would vanish in bfloat16's eight bits."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(16, 16).to(torch.bfloat16), rank=4, alpha=4.0)
    assert layer.weight.dtype == torch.bfloat16 and layer.lora_a.dtype == torch.float32
    y = layer(torch.randn(3, 16, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.lora_b.grad.dtype == torch.float32
