"""Simulators by name.

A simulation backend is a factory `f(task, count, *, cameras, image_size, **options) -> Simulation`, which `TwinEnv`
plays in; an environment backend `f(task_name, num_envs, **everything) -> Env` brings its own tasks.
Another package adds one by an entry point in the group `twinrl.backends`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
from importlib.metadata import entry_points
from typing import Any, NamedTuple

GROUP = "twinrl.backends"
TWIN_ENV = "twins.env:TwinEnv"


class Backend(NamedTuple):
    """How to reach a backend; loading waits until it is used."""

    target: str  # "module:factory"
    is_simulation: bool  # False: it makes whole environments
    environment: str = TWIN_ENV  # "module:class", plays our tasks in a simulation

    def load(self, worker: dict[str, Any] | None = None) -> Any:
        """The factory. With `worker` (`twins.backends.remote_link.Worker`) what it makes is in another process."""
        if not worker:
            return _load(self.target)
        from twins.backends import remote

        kind = remote.RemoteSimulation if self.is_simulation else remote.RemoteEnv
        return functools.partial(kind, target=self.target, worker=worker)

    def load_environment(self) -> Any:
        """The class of environments that play in the simulation."""
        return _load(self.environment)


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


BACKENDS: dict[str, Backend] = {
    "mujoco": Backend("twins.backends.mujoco_cpu:MujocoSimulation", True),
    "mujoco-warp": Backend(
        "twins.device_worlds:DeviceWorlds", True, "twins.device_env:DeviceTwinEnv"
    ),
    "gymnasium": Backend("twins.backends.gymnasium_env:GymnasiumEnv", False),
    "isaac-gym": Backend("twins.backends.isaac_gym:IsaacGym", True),
    "isaac-lab": Backend("twins.backends.isaac_lab:IsaacLab", True),
    "maniskill": Backend("twins.backends.maniskill:ManiSkill", True),
    "newton": Backend("twins.backends.newton:Newton", True),
}


def backend_names() -> list[str]:
    """All backends: the built-in ones, then other packages'."""
    return [*BACKENDS, *sorted({entry.name for entry in entry_points(group=GROUP)} - set(BACKENDS))]


def find_backend(name: str) -> Backend:
    """The backend called `name`, built in or another package's."""
    if name in BACKENDS:
        return BACKENDS[name]
    others = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name in others:
        factory = others[name].load()
        return Backend(others[name].value, getattr(factory, "is_simulation", True))
    known = sorted({*BACKENDS, *others})
    close = difflib.get_close_matches(name, known, 1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown backend {name!r}, not one of {known}{hint}")
