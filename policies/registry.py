"""Policies by name: one line for each."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

from policies.presets import resolve

POLICIES = {"vla": "policies.vla:VLA", "pi0": "policies.pi0:Pi0"}


def make_policy(config: dict[str, Any]) -> nn.Module:
    """Build `config["name"]` (a registered name or "module:Class") with the remaining keys as arguments.

    `config["preset"]` stands for the arguments of that name in policies/presets.py; other keys overrule it.
    """
    arguments = resolve(config)
    name = arguments.pop("name", "vla")
    target = POLICIES.get(name, name)
    if ":" not in target:
        raise ValueError(f"unknown policy {name!r}: one of {sorted(POLICIES)} or 'module:Class'")
    module, attribute = target.split(":")
    return getattr(import_module(module), attribute)(**arguments)
