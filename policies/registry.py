"""Policies by name: one line for each."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

POLICIES = {"vla": "policies.vla:VLA"}


def make_policy(config: dict[str, Any]) -> nn.Module:
    """Build `config["name"]` (a registered name or "module:Class") with the remaining keys as arguments."""
    arguments = dict(config)
    name = arguments.pop("name", "vla")
    target = POLICIES.get(name, name)
    if ":" not in target:
        raise ValueError(f"unknown policy {name!r}: one of {sorted(POLICIES)} or 'module:Class'")
    module, attribute = target.split(":")
    return getattr(import_module(module), attribute)(**arguments)
