"""Sizes of the VLA by name: constructor arguments of policies/vla.py, of which single ones can be overruled."""

from __future__ import annotations

from typing import Any

from twinrl.core.errors import ConfigError

PRESETS: dict[str, dict[str, Any]] = {
    # Learns on one CPU core within minutes; the demo's.
    "tiny": {
        "stem": "keypoints",
        "trunk": "latent",
        "expert": "mlp",
        "latent": 128,
        "hidden": 256,
    },
    # A transformer from patches to actions, for one GPU.
    "small": {
        "stem": "patches",
        "width": 96,
        "patch": 8,
        "trunk": "transformer",
        "latent": 384,
        "trunk_layers": 8,
        "expert": "transformer",
        "hidden": 384,
        "expert_layers": 6,
        "head_dim": 64,
        "vocabulary": 4096,
        "word_dim": 64,
        "words": 32,
    },
    # The size of pi0's action expert and a vision tower together.
    "base": {
        "stem": "patches",
        "width": 128,
        "patch": 16,
        "trunk": "transformer",
        "latent": 1024,
        "trunk_layers": 20,
        "expert": "transformer",
        "hidden": 1024,
        "expert_layers": 16,
        "head_dim": 64,
        "vocabulary": 32_768,
        "word_dim": 256,
        "words": 64,
    },
}


def resolve(policy: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of `policy`, whose `preset` (if it names one) is overruled by its other keys.

    ConfigError for a preset that does not exist.
    """
    arguments = dict(policy)
    name = arguments.pop("preset", None)
    if name is None:
        return arguments
    if name not in PRESETS:
        raise ConfigError(f"policy.preset {name!r}: one of {', '.join(PRESETS)}")
    return {**PRESETS[name], **arguments}
