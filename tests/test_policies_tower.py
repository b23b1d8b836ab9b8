"""Pretrained vision encoders, as tiny random ones in a folder: what they are given, what comes out, what is trained."""

import builtins

import numpy as np
import pytest
import torch
import transformers

from policies.registry import make_policy
from policies.runner import PolicyRunner
from policies.tower import PretrainedEncoder
from policies.weights import WeightsError, to_arrays
from twinrl.weights import checksum

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
N = 3


def save(kind, folder, seed=0):
    """A random vision model of the kind, with what its image processor says."""
    torch.manual_seed(seed)
    if kind == "siglip":  # with its text half
        text = {"vocab_size": 20, "max_position_embeddings": 8, "projection_size": 16, **SIZES}
        config = transformers.SiglipConfig(text_config=text, vision_config=SIZES)
        model = transformers.SiglipModel(config)
    elif kind == "dinov2":
        sizes = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
        model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    elif kind == "clip":
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES))
    else:
        sizes = {**SIZES, "vocab_size": 20}
        model = transformers.BertModel(transformers.BertConfig(**sizes))
    model.save_pretrained(folder)
    if kind == "siglip":
        (folder / "preprocessor_config.json").write_text(
            '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}'
        )
    return model


def images(size=16):
    rng = np.random.default_rng(1)
    return torch.from_numpy(rng.integers(0, 256, (N, size, size, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["siglip", "dinov2", "clip"])
def test_tokens_are_patches_averaged_over_squares(kind, tmp_path):
    """At its own image size and one token a patch, the tower's last hidden states come out, without class tokens."""
    model = save(kind, tmp_path).eval()
    tower = PretrainedEncoder(str(tmp_path), 16, precision="float32").eval()
    pixels = images(32)
    mean, std = tower.mean, tower.std
    if kind == "siglip":
        assert (mean == 0.5).all() and (std == 0.25).all()
    vision = model.vision_model if kind == "siglip" else model
    with torch.no_grad():
        scaled = (pixels.permute(0, 3, 1, 2) / 255.0 - mean) / std
        expected = vision(pixel_values=scaled).last_hidden_state[:, -16:]
        torch.testing.assert_close(tower(pixels), expected, atol=1e-5, rtol=1e-4)
        tower.side = 2
        first = expected[:, [0, 1, 4, 5]].mean(1)  # of 4 x 4 patches, the upper left
        torch.testing.assert_close(tower(pixels)[:, 0], first, atol=1e-5, rtol=1e-4)
        assert tower(images(20)).shape == (N, 4, 16)  # any size is taken


@pytest.mark.parametrize(("frozen", "trunk"), [(True, "latent"), (False, "transformer")])
def test_a_policy_with_a_tower_trains_travels_and_acts(frozen, trunk, tmp_path):
    """A frozen tower is encoded without gradient, belongs to no optimiser, serves all cameras and is not published."""
    save("dinov2", tmp_path)
    config = {
        "state_dim": 9,
        "pose_dim": 5,
        "image_size": 32,
        "cameras": ["side", "wrist"],
        "stem": "pretrained",
        "vision_model": str(tmp_path),
        "vision_frozen": frozen,
        "trunk": trunk,
        "latent": 32,
        "hidden": 32,
        "head_dim": 16,
        "critics": 0,
    }
    policy = make_policy(config).train()
    tower = policy.vision["side"].network
    assert (policy.vision["wrist"].network is tower) == frozen
    assert tower.training != frozen
    learned = set(map(id, policy.encoder_parameters()))
    assert all((id(p) in learned) != frozen for p in tower.parameters())
    observation = {
        "observation.images.side": images(32).numpy(),
        "observation.images.wrist": 255 - images(32).numpy(),
        "observation.state": np.zeros((N, 9), np.float32),
    }
    features = policy.encode(policy.to_tensors(observation), "look")
    policy.predict_pose(features).square().sum().backward()
    moved = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in tower.parameters()]
    assert not any(moved) if frozen else sum(moved) > len(moved) / 2
    runner = PolicyRunner(config)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    arrays = {name: array.copy() for name, array in to_arrays(policy).items()}
    assert any(name.startswith("vision.") for name in arrays) != frozen
    runner.load(1, arrays, checksum(arrays))
    chunk, _ = runner.infer(observation, "look", explore=False)
    assert chunk.shape == (N, 4, 7) and np.isfinite(chunk).all()
    torch.testing.assert_close(runner.policy.state_dict(), policy.state_dict())
    if frozen:  # what was trained beside another tower is refused
        save("dinov2", tmp_path, seed=1)
        with pytest.raises(WeightsError, match="other frozen weights"):
            PolicyRunner(config).load(1, arrays, checksum(arrays))


@pytest.mark.parametrize(
    ("kind", "tokens", "complaint"),
    [
        ("siglip", 5, "a square, got 5"),
        ("siglip", 25, "4 x 4 patches, fewer than camera_tokens 25"),
        ("bert", 4, "not a transformer over image patches"),
    ],
)
def test_what_cannot_be_is_refused(kind, tokens, complaint, tmp_path):
    """Odd numbers of tokens, more tokens than patches, models that see nothing."""
    save(kind, tmp_path)
    with pytest.raises(ValueError, match=complaint):
        PretrainedEncoder(str(tmp_path), tokens)


def test_without_transformers_it_says_what_to_install(monkeypatch):
    """The small policy needs no transformers; who asks for a tower is told."""
    load = builtins.__import__

    def missing(name, *arguments, **keywords):
        if name == "transformers":
            raise ImportError(name)
        return load(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", missing)
    make_policy({"state_dim": 3, "pose_dim": 2})
    with pytest.raises(ImportError, match=r"twinrl\[vla\]"):
        PretrainedEncoder("somewhere")
