"""Who plays in `twinrl play`, and in what environment: the expert, chance, a run's policy, or what was recorded."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from twinrl.core.errors import ConfigError
from twinrl.env import ACTION_DIM

ACTORS = ("expert", "random")


def stage(
    arguments: argparse.Namespace, task: str, recorded: tuple[np.ndarray, dict[str, Any]] | None
) -> tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]:
    """make(**options) -> the environment; actor(env) -> act(observation) -> actions (1, C, 7); the options."""
    import twins
    from twins.backends import find_backend

    size, cameras = arguments.size, tuple(arguments.camera) if arguments.camera else None
    options: dict[str, Any] = {
        "backend": arguments.backend,
        "options": _backend_options(arguments.backend_option),
        "python": arguments.python,
        "seed": arguments.seed,
    }
    try:
        if find_backend(arguments.backend).is_simulation:
            options |= {"variant": arguments.variant, "region": arguments.region}
            options["randomisation"] = _randomisation(arguments.randomisation)
        elif cameras is None:
            cameras = ("render",)
    except ValueError as error:
        raise ConfigError(str(error)) from None

    def make(**chosen: Any) -> Any:
        wanted = {"image_size": size, "cameras": cameras, **chosen}
        try:
            return twins.make_env(task, 1, **wanted)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    if recorded is not None:
        return make, lambda env: _repeat(recorded[0]), options
    if arguments.actor == "random":
        return make, lambda env: _at_random(env, arguments.seed), options
    if arguments.actor == "expert":
        return make, lambda env: _expert(env, task, arguments), options
    return _policy(arguments, task, make, options)


def _backend_options(given: list[str]) -> dict[str, Any]:
    import yaml

    options = {}
    for each in given:
        key, equals, text = each.partition("=")
        if not equals:
            raise ConfigError(f"--backend-option {each!r} is not of the form KEY=VALUE")
        options[key] = yaml.safe_load(text)
    return options


def _randomisation(text: str) -> str | dict[str, float]:
    if "=" not in text:
        return text
    scales = {}
    for each in text.split(","):
        name, _, value = each.partition("=")
        try:
            scales[name.strip()] = float(value)
        except ValueError:
            raise ConfigError(f"--randomisation: {each!r} is not of the form NAME=SCALE") from None
    return scales


def _expert(env: Any, task: str, arguments: argparse.Namespace) -> Callable[..., np.ndarray]:
    if not getattr(env, "spec", None) or not env.spec.expert:
        raise ConfigError(
            f"{task} has no expert in {arguments.backend!r}; --actor random works everywhere"
        )
    return lambda observation: env.expert(arguments.noise)[:, None]


def _at_random(env: Any, seed: int) -> Callable[..., np.ndarray]:
    rng = np.random.default_rng(seed)
    space = env.single_action_space
    low, high = np.asarray(space.low, float), np.asarray(space.high, float)
    # A hand that changes its mind ten times a second goes nowhere: it keeps it for half a second.
    action = np.zeros((1, 1, ACTION_DIM), np.float32)
    steps = 0

    def act(observation: Any) -> np.ndarray:
        nonlocal action, steps
        if steps % 5 == 0:
            action = rng.uniform(low, high).astype(np.float32)[None, None]
        steps += 1
        return action

    return act


def _repeat(actions: np.ndarray) -> Callable[..., np.ndarray]:
    left = iter(actions)

    def act(observation: Any) -> np.ndarray | None:
        action = next(left, None)
        return None if action is None else np.asarray(action, np.float32)[None, None]

    return act


def _policy(
    arguments: argparse.Namespace, task: str, make: Callable[..., Any], options: dict[str, Any]
) -> tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]:
    """A run's policy. It sees pictures of the size it knows; what is shown is larger."""
    known = sorted(path.parent.name for path in Path("runs").glob("*/config.yaml"))
    if not any(
        (path / "config.yaml").exists()
        for path in (Path(arguments.actor), Path("runs") / arguments.actor)
    ):
        names = [*ACTORS, *known]
        close = difflib.get_close_matches(arguments.actor, names, 1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"--actor is {arguments.actor!r}, not one of {', '.join(names)}, nor a run's folder{hint}"
        )
    from deploy.evaluation import load_runner
    from deploy.run_folder import RunFolder

    run = RunFolder.open(arguments.actor)
    config = run.config()
    if config.task.name != task:
        raise ConfigError(f"run {run.name!r} has learned {config.task.name!r}, not {task!r}")
    runner = load_runner(run, arguments.checkpoint)
    options = options | {
        "regions": config.task.regions or None,
        "reward": config.task.reward or None,
        "instruction": config.task.instruction,
        "errands": config.task.errands,
        "gripper": config.twins.gripper.model_dump(exclude_defaults=True) or None,
    }

    def actor(large: Any) -> Callable[..., np.ndarray]:
        # The same episode runs a second time, with the policy's own cameras and size: what it does there is shown.
        seen = {"image_size": config.task.image_size, "cameras": config.task.cameras}
        small = make(**(options | seen))
        waiting: list[np.ndarray] = []
        state: dict[str, Any] = {"configuration": None, "observation": None}

        def act(observation: Any) -> np.ndarray:
            configuration = large.configurations()[0]
            if configuration is not state["configuration"]:
                state["configuration"] = configuration
                state["observation"], _ = small.reset(options={"configurations": [configuration]})
                waiting.clear()
            if not waiting:
                chunk, _ = runner.infer(state["observation"], small.instructions(), explore=False)
                step = small.step_chunk(chunk)
                state["observation"] = step.observation
                waiting.extend(step.action[0][step.mask[0]])
            return (
                waiting.pop(0)[None, None] if waiting else np.zeros((1, 1, ACTION_DIM), np.float32)
            )

        return act

    return make, actor, options
