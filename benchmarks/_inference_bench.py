"""The processes of the inference benchmark: callers with a policy of their own or a shared one, and what they act with."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import torch

from actors.inference import InferenceActor
from actors.remote_runner import RemoteRunner, Runner
from deploy.factories import runner_factory
from deploy.ray_inference import RayInference
from policies.registry import make_policy
from policies.weights import to_arrays
from twinrl.core.errors import DeadlineError
from twinrl.env import PRIVILEGED, STATE, image_key
from twinrl.weights import Weights, make_weights

CAMERAS = ("side", "wrist")
PIXELS, STATE_DIM, POSE_DIM = 64, 27, 14  # pick-and-place


def policy_config(steps: int, **policy: Any) -> dict[str, Any]:
    """A policy of the demo's shapes with `steps` integration steps; `policy` as in a job's configuration."""
    return {
        "state_dim": STATE_DIM,
        "pose_dim": POSE_DIM,
        "cameras": list(CAMERAS),
        "image_size": PIXELS,
        "chunk": 4,
        "integration_steps": steps,
        **policy,
    }


def observe(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """What `rows` environments might show."""
    rng = np.random.default_rng(seed)
    shape = (rows, PIXELS, PIXELS, 3)
    images = {image_key(camera): rng.integers(0, 256, shape, dtype=np.uint8) for camera in CAMERAS}
    state = rng.normal(size=(rows, STATE_DIM)).astype(np.float32)
    return {**images, STATE: state, PRIVILEGED: np.zeros((rows, POSE_DIM), np.float32)}


class OneVersion:
    """Weights that were published once: version 0 of a policy, as seed 0 makes it."""

    def __init__(self, config: dict[str, Any]) -> None:
        torch.manual_seed(0)
        arrays = to_arrays(make_policy(config))
        self._weights = make_weights(0, {key: array.copy() for key, array in arrays.items()})

    def poll(self, newer_than: int) -> Weights | None:
        """Nothing newer than version 0."""
        return self._weights if newer_than < 0 else None

    def wait(self, newer_than: int, timeout: float) -> Weights:
        """Version 0 at once, a later one never."""
        weights = self.poll(newer_than)
        if weights is None:
            raise DeadlineError(f"there is no version above {newer_than}")
        return weights

    def get(self, version: int) -> Weights:
        """Version 0."""
        return self._weights


class Caller:
    """In a rollout actor's place: asks for actions again and again, and plays nothing."""

    def __init__(self, seed: int, rows: int) -> None:
        self._seed, self._observation = seed, observe(rows, seed)
        self._runners: dict[str, Runner] = {}

    def prepare(self, config: dict[str, Any], names: dict[str, str]) -> None:
        """Be ready to ask a policy of its own ("actor"), and inference actors by their names."""
        weights = OneVersion(config).get(0)
        self._runners = {"actor": runner_factory(config, self._seed)()}
        for where, name in names.items():
            self._runners[where] = RemoteRunner(RayInference(name), self._seed)
        for runner in self._runners.values():
            runner.adopt(weights)
            for _ in range(3):  # whatever is done once
                runner.infer(self._observation, "pick up the block", True)

    def ask(self, where: str, seconds: float) -> dict[str, Any]:
        """Ask for `seconds` s -> rows answered, seconds, and each answer's time in s."""
        runner, times = self._runners[where], []
        rows = len(self._observation[STATE])
        began = time.perf_counter()
        while (start := time.perf_counter()) - began < seconds:
            runner.infer(self._observation, "pick up the block", True)
            times.append(time.perf_counter() - start)
        return {"rows": rows * len(times), "seconds": time.perf_counter() - began, "times": times}


class Silent:
    """A reporter to nobody."""

    def __init__(self, *_: Any) -> None:
        pass


def inference_actor(
    config: dict[str, Any], name: str, threads: int, max_rows: int, deadline: float
) -> Any:
    """A running inference actor; `threads` for torch."""
    make: Callable[[], Any] = runner_factory(config, 0, "cpu", threads)
    options = {"name": name, "num_cpus": 0, "max_concurrency": 1000}
    keywords = {"make_runner": make, "make_reporter": Silent, "weights": OneVersion(config)}
    return (
        ray.remote(_Inference)
        .options(**options)
        .remote(name, **keywords, max_rows=max_rows, deadline=deadline)
    )


class _Inference(InferenceActor):
    async def figures(self) -> dict[str, Any]:
        """Its statistics since the last call."""
        return self.stats()
