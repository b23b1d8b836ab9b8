"""Published pi0 weights: true names and shapes, every layout that is understood, and refusal of anything partial.

Names and shapes are written down from openpi's conversion script (examples/convert_jax_model_to_pytorch.py) and its
models_pytorch/pi0_pytorch.py, from LeRobot's policies/pi0 before and after 0.4, and from transformers' models/pi0.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from learner.checkpoint import load_checkpoint, restore_policy, save_checkpoint
from policies.pi0 import Pi0
from policies.pi0_layers import Pi0Sizes
from policies.pi0_weights import published_name, published_state
from policies.registry import make_policy
from policies.weights import WeightsError, load_arrays, published, to_arrays
from twinrl.core.errors import ResumeError

CAMERAS = ("side", "wrist")
SMALL = {
    "width": 24, "mlp": 40, "expert_width": 16, "expert_mlp": 24, "layers": 2, "heads": 4, "kv_heads": 2,
    "head_dim": 8, "vocabulary": 150, "vision_width": 20, "vision_mlp": 28, "vision_layers": 2, "vision_heads": 2,
    "image": 28, "padded": 9,
}  # fmt: skip
PALIGEMMA, EXPERT = "paligemma_with_expert.paligemma.", "paligemma_with_expert.gemma_expert."


def gemma_shapes(name, s, width, mlp):
    shapes = {f"{name}norm.weight": (width,)}
    for n in range(s.layers):
        layer = f"{name}layers.{n}."
        shapes |= {
            f"{layer}input_layernorm.weight": (width,),
            f"{layer}post_attention_layernorm.weight": (width,),
            f"{layer}self_attn.q_proj.weight": (s.heads * s.head_dim, width),
            f"{layer}self_attn.k_proj.weight": (s.kv_heads * s.head_dim, width),
            f"{layer}self_attn.v_proj.weight": (s.kv_heads * s.head_dim, width),
            f"{layer}self_attn.o_proj.weight": (width, s.heads * s.head_dim),
            f"{layer}mlp.gate_proj.weight": (mlp, width),
            f"{layer}mlp.up_proj.weight": (mlp, width),
            f"{layer}mlp.down_proj.weight": (width, mlp),
        }
    return shapes


def linear_shapes(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def true_shapes(s):
    """{name: shape} of openpi's PyTorch checkpoints, without the tables of words of either output layer."""
    model = PALIGEMMA + "model."
    tower, v, m = model + "vision_tower.vision_model.", s.vision_width, s.vision_mlp
    shapes = {
        f"{tower}embeddings.patch_embedding.weight": (v, 3, s.patch, s.patch),
        f"{tower}embeddings.patch_embedding.bias": (v,),
        f"{tower}embeddings.position_embedding.weight": ((s.image // s.patch) ** 2, v),
        f"{tower}post_layernorm.weight": (v,),
        f"{tower}post_layernorm.bias": (v,),
        **linear_shapes(model + "multi_modal_projector.linear", v, s.width),
        f"{model}language_model.embed_tokens.weight": (s.vocabulary, s.width),
        **gemma_shapes(model + "language_model.", s, s.width, s.mlp),
        **gemma_shapes(EXPERT + "model.", s, s.expert_width, s.expert_mlp),
        **linear_shapes("state_proj", s.padded, s.expert_width),
        **linear_shapes("action_in_proj", s.padded, s.expert_width),
        **linear_shapes("action_out_proj", s.expert_width, s.padded),
        **linear_shapes("action_time_mlp_in", 2 * s.expert_width, s.expert_width),
        **linear_shapes("action_time_mlp_out", s.expert_width, s.expert_width),
    }
    for n in range(s.vision_layers):
        layer = f"{tower}encoder.layers.{n}."
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}{norm}.weight": (v,), f"{layer}{norm}.bias": (v,)}
        shapes |= linear_shapes(layer + "mlp.fc1", v, m) | linear_shapes(layer + "mlp.fc2", m, v)
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= linear_shapes(f"{layer}self_attn.{part}", v, v)
    return shapes


def to_old_lerobot(name):
    """LeRobot 0.1 to 0.3 (transformers before 4.52): the output layer and the layers inside `language_model`."""
    for new, old in (
        (PALIGEMMA + "model.language_model.", PALIGEMMA + "language_model.model."),
        (PALIGEMMA + "lm_head.", PALIGEMMA + "language_model.lm_head."),
        (PALIGEMMA + "model.", PALIGEMMA),
    ):
        if name.startswith(new):
            return "model." + old + name.removeprefix(new)
    return "model." + name


def to_transformers(name):
    """PI0ForConditionalGeneration's state dict; transformers 5 has no `vision_model` level, 4 had one."""
    for theirs, own in (
        (PALIGEMMA + "model.vision_tower.vision_model.", "model.vlm.vision_tower."),
        (PALIGEMMA + "model.", "model.vlm."),
        (EXPERT + "model.", "model.dit."),
        ("action_out_proj", "action_out_proj"),
        ("", "embed_action_time."),
    ):
        if name.startswith(theirs):
            return own + name.removeprefix(theirs)
    raise AssertionError(name)


LAYOUTS = {
    "openpi": lambda name: name,
    "lerobot": lambda name: "model." + name,
    "lerobot before 0.4": to_old_lerobot,
    "transformers": to_transformers,
}


def make(weights="", **settings):
    defaults = {
        "sizes": SMALL, "tokenizer": "hashed", "prompt_tokens": 9, "lora_rank": 2, "critics": 0,
    }  # fmt: skip
    return Pi0(
        state_dim=5, cameras=CAMERAS, chunk=3, weights=str(weights), **{**defaults, **settings}
    ).eval()


@pytest.fixture(scope="module")
def source():
    """A policy whose weights are not those of another draw."""
    torch.manual_seed(3)
    return make()


@pytest.fixture(scope="module")
def tensors(source):
    """Its weights under openpi's names."""
    return published_state(source)


def write(folder, tensors, layout="openpi"):
    folder.mkdir(exist_ok=True)
    rename = LAYOUTS[layout]
    save_file(
        {rename(name): t.clone() for name, t in tensors.items()}, folder / "model.safetensors"
    )
    return folder


def same(policy, source):
    mine, theirs = policy.state_dict(), source.state_dict()
    return all(
        torch.equal(tensor.float(), theirs[name].float())
        for name, tensor in mine.items()
        if name.startswith(("trunk.", "flow."))
        and not {"lora_a", "lora_b", "noise"} & set(name.split("."))
    )


@pytest.mark.parametrize("layers", [1, 18])
def test_names_and_shapes_of_the_published_model(layers):
    """Full width, without memory: every parameter has its published name and shape, and none is left over."""
    sizes = Pi0Sizes(layers=layers, vision_layers=1 if layers == 1 else 27)
    with torch.device("meta"):
        policy = make(sizes={"layers": layers, "vision_layers": sizes.vision_layers}, lora_rank=0)
    found = {
        published_name(name): tuple(p.shape)
        for name, p in policy.named_parameters()
        if not name.startswith("flow.noise.")
    }
    assert found == true_shapes(sizes)
    if layers == 18:
        # 2.92 G of PaliGemma, 0.31 G of the expert.
        numbers = [
            sum(p.numel() for p in m.parameters()) for m in (policy.trunk, policy.flow.gemma)
        ]
        assert [round(n / 1e7) for n in numbers] == [292, 31]


def test_lora_of_rank_32_on_the_published_widths():
    """A layer from n to m gets 32 (n + m) numbers, in vision tower, projection and language model."""
    with torch.device("meta"):
        policy = make(sizes={"layers": 1, "vision_layers": 1}, lora_rank=32)
    gemma = 2 * (2048 + 2048) + 2 * (2048 + 256) + 3 * (2048 + 16384)
    siglip = 4 * (1152 + 1152) + 2 * (1152 + 4304)
    wanted = 32 * (gemma + siglip + 1152 + 2048)
    assert sum(p.numel() for p in policy.encoder_parameters()) == wanted
    assert all("lora" in n for n, p in policy.trunk.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads(tmp_path, source, tensors, layout):
    loaded = make(write(tmp_path / "weights", tensors, layout))
    assert same(loaded, source)
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))


def test_transformers_own_pi0_computes_the_same(tmp_path):
    """Another implementation, fed with the same weights, images and words, integrates to the same chunk."""
    from transformers import PI0Config, PI0ForConditionalGeneration

    gemma = {"model_type": "gemma", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 8, "vocab_size": 150, "bos_token_id": None, "eos_token_id": None}  # fmt: skip
    config = PI0Config(
        vlm_config={
            "model_type": "paligemma", "image_token_id": 149, "projection_dim": 24, "hidden_size": 24,
            "text_config": {**gemma, "hidden_size": 24, "intermediate_size": 40},
            "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 20, "intermediate_size": 28,
                              "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
                              "vision_use_head": False},
        },
        dit_config={**gemma, "hidden_size": 16, "intermediate_size": 24},
        chunk_size=3, max_state_dim=9, max_action_dim=9,
    )  # fmt: skip
    torch.manual_seed(4)
    theirs = PI0ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # as drawn, the prefix would hardly matter
            parameter.add_(0.2 * torch.randn_like(parameter))
    save_file(
        {n: t.clone() for n, t in theirs.state_dict().items()}, tmp_path / "model.safetensors"
    )
    policy = make(tmp_path, action_dim=9)
    rng = np.random.default_rng(5)
    images = {
        f"observation.images.{c}": rng.integers(0, 256, (1, 28, 28, 3)).astype(np.uint8)
        for c in CAMERAS
    }
    state = rng.normal(size=(1, 5)).astype(np.float32)
    noise = torch.randn(1, 27, generator=torch.Generator().manual_seed(6))
    pixels = [torch.from_numpy(i).permute(0, 3, 1, 2).float() / 127.5 - 1 for i in images.values()]
    prompt = policy.tokenizer.prompt("wipe")
    words = torch.tensor([[149] * 8 + prompt])  # 2 images of 4 tokens
    with torch.no_grad():
        observation = policy.to_tensors({"observation.state": state, **images})
        ours = policy.sample(policy.encode(observation, "wipe"), noise, 5)
        wanted = theirs.sample_actions(
            state=torch.nn.functional.pad(torch.from_numpy(state), (0, 4)),
            input_ids=words,
            pixel_values=torch.stack(pixels, dim=1),
            noise=noise.view(1, 3, 9),
            attention_mask=torch.ones_like(words),
            pixel_attention_mask=torch.ones(1, 2, dtype=torch.bool),
            num_steps=5,
        )
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)
    assert (ours - noise.view(1, 3, 9)).abs().max() > 0.1


@pytest.mark.parametrize("kept", ["lm_head", "both"])
def test_the_table_of_words_may_have_its_other_name(tmp_path, source, tensors, kept):
    """openpi and LeRobot store the tied output layer's name; the expert's own tables are of no use."""
    words = PALIGEMMA + "model.language_model.embed_tokens.weight"
    saved = {**tensors, PALIGEMMA + "lm_head.weight": tensors[words]}
    saved[EXPERT + "lm_head.weight"] = torch.zeros(150, 16)
    saved[EXPERT + "model.embed_tokens.weight"] = torch.zeros(150, 16)
    if kept == "lm_head":
        del saved[words]
    for layout in ("openpi", "lerobot", "lerobot before 0.4"):
        assert same(make(write(tmp_path / layout, saved, layout)), source)


def test_what_is_not_whole_is_refused(tmp_path, tensors):
    """One name missing, one too many, one of another shape: the names are listed, and nothing is loaded."""
    some = EXPERT + "model.layers.1.mlp.up_proj.weight"
    other = PALIGEMMA + "model.multi_modal_projector.linear.bias"
    cut = {name: t for name, t in tensors.items() if name != some}
    for name, saved, message in (
        ("missing", cut, rf"not even in part. missing: {some}$"),
        ("surplus", {**tensors, "surprise.weight": torch.zeros(2)}, r"unknown: surprise.weight$"),
        ("shape", {**tensors, other: torch.zeros(3)}, rf"shapes: {other} \(3,\), should be \(24,\)$"),
        ("twice", {**tensors, "model." + some: tensors[some]}, "twice: .* and "),
        (
            "all", {**cut, other: torch.zeros(3), "b": torch.zeros(1)},
            rf"missing: {some}; unknown: b; shapes: {other}",
        ),
    ):  # fmt: skip
        with pytest.raises(WeightsError, match=message):
            make(write(tmp_path / name, saved))


def test_other_networks_and_broken_files_are_named(tmp_path, tensors):
    pi05 = {**tensors, "time_mlp_in.weight": torch.zeros(16, 16)}
    with pytest.raises(WeightsError, match=r"holds a pi0.5, .*time_mlp_in"):
        make(write(tmp_path / "pi05", pi05))
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"model.safetensors'\] are missing"):
        make(tmp_path / "empty")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        make(tmp_path / "torn")
    with pytest.raises(WeightsError, match=r"missing: .*layers\.1\d\..* and \d+ more"):
        make(write(tmp_path / "shallow", tensors), sizes={**SMALL, "layers": 30})


def test_one_file_a_folder_or_shards(tmp_path, source, tensors):
    whole = write(tmp_path / "whole", tensors)
    assert same(make(whole / "model.safetensors"), source)
    folder = tmp_path / "shards"
    folder.mkdir()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name].clone() for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(make(folder), source)
    (folder / "b.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"b.safetensors'\] are missing"):
        make(folder)


def test_weights_go_back_as_they_came_with_lora_merged(tmp_path, source, tensors):
    """A fine-tuned policy is exported for openpi and LeRobot, and acts the same without LoRA."""
    tuned = make(write(tmp_path / "source", tensors))
    with torch.no_grad():
        for parameter in tuned.encoder_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    exported = published_state(tuned)
    assert exported.keys() == tensors.keys()
    plain = make(write(tmp_path / "tuned", exported), lora_rank=0)
    images = {
        f"observation.images.{c}": torch.zeros(1, 28, 28, 3, dtype=torch.uint8) for c in CAMERAS
    }
    observation = {"observation.state": torch.ones(1, 5), **images}
    with torch.no_grad():
        features = tuned.encode(observation, "go")
        assert not torch.allclose(features, source.encode(observation, "go"), atol=1e-3)
        torch.testing.assert_close(plain.encode(observation, "go"), features, atol=1e-5, rtol=1e-5)


def test_frozen_weights_are_not_published_and_must_be_the_same_everywhere(tmp_path, tensors):
    """LoRA, expert and statistics travel; who loaded other frozen weights refuses them."""
    folder = write(tmp_path / "weights", tensors)
    learner, actor = make(folder), make(folder)
    with torch.no_grad():
        for parameter in (*learner.encoder_parameters(), *learner.flow.parameters()):
            parameter.add_(0.1)
    arrays = {name: array.copy() for name, array in to_arrays(learner).items()}
    assert not any(n.startswith("trunk.") and "lora" not in n for n in arrays)
    assert set(arrays) == set(published(learner))
    load_arrays(actor, arrays)
    assert all(
        torch.equal(a, b) for a, b in zip(learner.parameters(), actor.parameters(), strict=True)
    )
    others = {**tensors, PALIGEMMA + "model.language_model.norm.weight": torch.ones(24)}
    stranger = make(write(tmp_path / "others", others))
    before = stranger.flow.action_in_proj.weight.clone()
    with pytest.raises(
        WeightsError, match=r"beside other frozen weights \(base -?\d+, here -?\d+\)"
    ):
        load_arrays(stranger, arrays)
    assert torch.equal(stranger.flow.action_in_proj.weight, before)


def test_checkpoints_hold_what_is_trained(tmp_path, tensors):
    """Frozen weights stay where they were loaded from; a checkpoint beside others is refused."""
    folder = write(tmp_path / "weights", tensors)
    learner, resumed = make(folder), make(folder)
    with torch.no_grad():
        for parameter in (*learner.encoder_parameters(), *learner.flow.parameters()):
            parameter.add_(0.1)
    path = tmp_path / "stage1.pt"
    save_checkpoint(path, stage="sft", version=3, policy=learner, policy_config={})
    state = load_checkpoint(path)
    assert state["policy"].keys() == published(learner).keys()
    restore_policy(resumed, state, path)
    assert all(
        torch.equal(a, b) for a, b in zip(learner.parameters(), resumed.parameters(), strict=True)
    )
    others = {**tensors, PALIGEMMA + "model.language_model.norm.weight": torch.ones(24)}
    with pytest.raises(ResumeError, match="beside other frozen weights"):
        restore_policy(make(write(tmp_path / "others", others)), state, path)


def test_random_weights_are_published_whole(source):
    """Without a place to load them from, every process would draw its own."""
    arrays = {name: array.copy() for name, array in to_arrays(source).items()}
    torch.manual_seed(9)
    actor = make()
    assert not same(actor, source)
    load_arrays(actor, arrays)
    assert same(actor, source)


def write_statistics(folder, form, tensors, state=5, deviation=0.5):
    """Beside weights, in one of three forms: state 0 .. and 1 .., action 10 .. and 0.5 ..."""
    values = {
        "state": {"mean": np.arange(state) * 1.0, "std": np.arange(state) + 1.0},
        "actions": {"mean": np.arange(7) + 10.0, "std": np.arange(7) + deviation},
    }
    t = {
        k: {p: torch.tensor(v, dtype=torch.float32) for p, v in d.items()}
        for k, d in values.items()
    }
    if form == "openpi":
        path = folder / "assets" / "arm" / "norm_stats.json"
        path.parent.mkdir(parents=True)
        lists = {k: {p: v.tolist() for p, v in d.items()} for k, d in values.items()}
        path.write_text(json.dumps({"norm_stats": lists}))
    elif form == "lerobot":
        flat = {f"observation.state.{p}": v for p, v in t["state"].items()}
        flat |= {f"action.{p}": v for p, v in t["actions"].items()}
        save_file(flat, folder / "policy_preprocessor_step_5_normalizer_processor.safetensors")
    else:
        flat = {f"normalize_inputs.buffer_observation_state.{p}": v for p, v in t["state"].items()}
        for where in ("normalize_targets", "unnormalize_outputs"):
            flat |= {f"{where}.buffer_action.{p}": v.clone() for p, v in t["actions"].items()}
        save_file(
            {**{to_old_lerobot(n): w.clone() for n, w in tensors.items()}, **flat},
            folder / "model.safetensors",
        )


@pytest.mark.parametrize("form", ["openpi", "lerobot", "buffers"])
def test_statistics_are_loaded_where_they_fit(tmp_path, tensors, form, caplog):
    folder = write(tmp_path / "weights", tensors)
    write_statistics(folder, form, tensors)
    policy = make(folder)
    torch.testing.assert_close(policy.state_normaliser.centre, torch.arange(5.0))
    torch.testing.assert_close(policy.state_normaliser.scale, torch.arange(5.0) + 1)
    torch.testing.assert_close(policy.action_normaliser.centre, torch.arange(7.0) + 10)
    torch.testing.assert_close(policy.action_normaliser.scale, torch.arange(7.0) + 0.5)
    assert not caplog.records


def test_statistics_of_another_robot_or_kind_are_left_alone(tmp_path, tensors, caplog):
    folder = write(tmp_path / "weights", tensors)
    write_statistics(folder, "openpi", tensors, state=8)
    policy = make(folder)
    assert torch.equal(policy.state_normaliser.scale, torch.ones(5))
    assert torch.equal(policy.action_normaliser.scale, torch.ones(7))
    assert "0 of 1 statistics (assets/arm/norm_stats.json) fit 5 numbers of state" in caplog.text
    unknown = write(tmp_path / "unknown", tensors)
    write_statistics(unknown, "lerobot", tensors, deviation=np.inf)
    assert torch.equal(make(unknown).action_normaliser.scale, torch.ones(7))
    quantiles = write(tmp_path / "quantiles", tensors)
    write_statistics(quantiles, "lerobot", tensors)
    step = {"config": {"norm_map": {"STATE": "QUANTILES", "ACTION": "QUANTILES"}}}
    (quantiles / "policy_preprocessor.json").write_text(json.dumps({"steps": [step]}))
    assert torch.equal(make(quantiles).state_normaliser.scale, torch.ones(5))


def test_the_registry_makes_a_pi0():
    """With the arguments that a job passes to every policy."""
    policy = make_policy(
        {"name": "pi0", "sizes": "tiny", "tokenizer": "hashed", "lora_rank": 4, "state_dim": 27, "pose_dim": 7,
         "cameras": ["side", "wrist"], "image_size": 64, "chunk": 4}
    )  # fmt: skip
    images = {f"observation.images.{c}": np.zeros((2, 64, 64, 3), np.uint8) for c in CAMERAS}
    observation = {"observation.state": np.zeros((2, 27), np.float32), **images}
    chunk, _ = policy.act(observation, "go", torch.Generator().manual_seed(0), explore=False)
    assert chunk.shape == (2, 4, 7)
