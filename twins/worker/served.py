"""The object that a worker serves: what may be called on it, and what the other side must know of it."""

from __future__ import annotations

import importlib
import inspect
from typing import Any, Callable, Dict, List

import numpy as np

from twinrl.core.errors import ConfigError, Rejected
from twins.worker.tree import Body

SIMULATION, ENV = "simulation", "env"
METHODS = {
    SIMULATION: ("configure", "step", "snapshot", "joints", "hide", "images"),
    ENV: ("reset", "step_chunk", "configurations", "expert"),
}
SPEC = {
    SIMULATION: ("count", "cameras", "image_size", "capabilities"),
    ENV: ("num_envs", "cameras", "image_size", "state_dim", "privileged_dim", "spec"),
}


def find_factory(target: str) -> Callable[..., Any]:
    """What `target`, "module:factory", names; ConfigError says which half is wrong."""
    module, _, name = target.partition(":")
    if not module or not name:
        raise ConfigError(f"--serve is {target!r}, must be MODULE:FACTORY")
    found = importlib.import_module(module)
    if not hasattr(found, name):
        raise ConfigError(f"--serve {target}: {found.__file__} has no {name!r}")
    return getattr(found, name)


class Served:
    """A Simulation (`twins.backends.contract`) or an Env (`twinrl.env`), and the calls that it answers."""

    def __init__(self, target: str, kind: str, opening: Dict[str, Any]) -> None:
        """Make the object. `opening` holds `task` (an Env's name, or a Simulation's scene as
        `twins.scene_description` tells it), `count` and `options`: the arguments of the factory."""
        if kind not in METHODS:
            raise Rejected(f"a worker serves a {' or an '.join(METHODS)}, not {kind!r}")
        self.kind = kind
        self.object = find_factory(target)(opening["task"], opening["count"], **opening["options"])
        self._images_out = "out" in _parameters(getattr(self.object, "images", None))

    def spec(self) -> Dict[str, Any]:
        """What the other side compares with what it asked for, and passes on as its own."""
        found = {name: getattr(self.object, name) for name in SPEC[self.kind]}
        found["cameras"] = tuple(found["cameras"])
        if self.kind == ENV:
            space = getattr(self.object, "single_action_space", None)
            if hasattr(space, "low"):
                found["action_low"], found["action_high"] = space.low, space.high
        return found

    def call(
        self,
        body: Body | None,
        method: str,
        arguments: List[Any],
        keywords: Dict[str, Any] | None = None,
    ) -> Any:
        """The result of `method`, with images in `body` where the object can write them there."""
        if method not in METHODS[self.kind]:
            raise Rejected(f"a {self.kind} has no method {method!r:.100} for others to call")
        if method == "images" and self._images_out and body is not None:
            out = self._room(body, len(arguments[0]))
            if out is not None:
                return self.object.images(*arguments, out=out)
        return getattr(self.object, method)(*arguments, **(keywords or {}))

    def _room(self, body: Body, count: int) -> Dict[str, np.ndarray] | None:
        size = self.object.image_size
        out = {}
        for camera in self.object.cameras:
            out[camera] = body.empty((count, size, size, 3), np.uint8)
            if out[camera] is None:
                return None
        return out

    def close(self) -> None:
        """Close the object."""
        self.object.close()


def _parameters(function: Any) -> Any:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return ()
