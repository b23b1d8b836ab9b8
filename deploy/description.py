"""What a configuration means for the task's environments: schema, instruction, the policy's shapes."""

from __future__ import annotations

from typing import Any

from policies.presets import resolve
from twinrl.config import Config
from twinrl.core.errors import ConfigError
from twinrl.core.segment import Schema
from twinrl.core.spec import dimensions_of
from twinrl.env import EnvSpec
from twins import describe
from twins.backends import find_backend
from twins.errands import offered
from twins.kinematics import MAX_SHIFT, MAX_TURN
from twins.tasks import make_task

EVALUATED = ("id", "ood")  # regions
WORLDS = {"twin": {}, "real": {"variant": "standin"}}
OTHER_REAL = (
    "real-"  # a world's name: this and the number of a reality (`twins.randomise.nominal_of`)
)


def make_schema(values: dict[str, Any]) -> Schema:
    """Schema from plain values, as the topology file holds them."""
    return Schema(**{**values, "cameras": tuple(values["cameras"])})


def world_options(world: str) -> dict[str, Any]:
    """How environments of a world are made: of twin, real (the stand-in), or real-N, another reality."""
    if world in WORLDS:
        return WORLDS[world]
    number = world[len(OTHER_REAL) :]
    if not world.startswith(OTHER_REAL) or not number.isdigit():
        raise ConfigError(
            f"unknown world {world!r}, not one of {sorted(WORLDS)} or {OTHER_REAL}NUMBER"
        )
    return {"variant": f"reality-{number}"}


def describe_job(config: Config) -> dict[str, Any]:
    """Plain values that every role can be given: {"schema", "instruction", "control_hz", "policy"}, and more.

    "regions" are those that are evaluated, "placed" is the key of what a map of results shows, and "stand_in" says
    whether the task can be played on a simulated real arm.
    """
    try:
        spec = describe(
            config.task.name,
            cameras=config.task.cameras,
            observe=config.task.observe,
            image_size=config.task.image_size,
            backend=config.twins.backend,
            options=config.twins.options,
            python=config.twins.python,
        )
        if find_backend(config.twins.backend).is_simulation:  # what is asked must be known
            offered(make_task(config.task.name), config.task.errands, config.task.instruction)
    except ValueError as error:  # a name that does not exist, an option that cannot be
        raise ConfigError(f"task and twins: {error}") from error
    for world in config.evaluation.worlds:
        world_options(world)
    _check(config, spec)
    schema = Schema(
        state_dim=len(spec.state_names),
        privileged_dim=len(spec.privileged_names),
        cameras=spec.cameras,
        image_size=spec.image_size,
        chunk=config.task.chunk,
    )
    policy = {
        "name": "vla",
        "state_dim": schema.state_dim,
        "pose_dim": schema.privileged_dim,
        "cameras": list(schema.cameras),
        "image_size": schema.image_size,
        "chunk": schema.chunk,
        **resolve(config.policy),  # what a preset means now is what a checkpoint keeps
    }
    return {
        "schema": {**schema._asdict(), "cameras": list(schema.cameras)},
        "instruction": config.task.instruction or spec.instruction,
        "control_hz": spec.control_hz,
        "dimensions": [list(dimension) for dimension in dimensions_of(spec.state_names)],
        "step": [MAX_SHIFT, MAX_TURN] if _has_stand_in(config) else [0.0, 0.0],
        "placed": spec.placed,
        "regions": [region for region in EVALUATED if region in spec.regions],
        "stand_in": _has_stand_in(config),
        "policy": policy,
    }


def _check(config: Config, spec: EnvSpec) -> None:
    """Refuse stages for which the environment has no expert or no stand-in."""
    name, problems = config.task.name, []
    if config.demonstrations.episodes and not spec.expert:
        problems.append("has no expert, so set demonstrations.episodes: 0")
    if config.real_rl.robot_minutes and not config.demonstrations.episodes:
        problems.append(
            "is practised on an arm from demonstrations, so set real_rl.robot_minutes: 0 or have some"
        )
    if not _has_stand_in(config):
        real = config.real_rl
        problems += [
            f"decides about its {key} itself, so leave task.{key} out"
            for key in ("reward", "regions")
            if getattr(config.task, key)
        ]
        if any(world != "twin" for world in config.evaluation.worlds):
            problems.append("has no stand-in for a real arm, so set evaluation.worlds: [twin]")
        if real.robot_minutes or real.mining_episodes:
            problems.append(
                "is played by no arm, so set real_rl.robot_minutes: 0 and real_rl.mining_episodes: 0"
            )
    if problems:
        raise ConfigError(f"{name} (backend {config.twins.backend}) {'; it '.join(problems)}")


def _has_stand_in(config: Config) -> bool:
    """The task is one of ours, so that it can be played on the stand-in too."""
    return find_backend(config.twins.backend).is_simulation
