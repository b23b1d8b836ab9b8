"""What a configuration means for the task's environments: schema, instruction, the policy's shapes."""

from __future__ import annotations

from typing import Any

from twinrl.config import Config
from twinrl.core.segment import Schema
from twins import describe


def make_schema(values: dict[str, Any]) -> Schema:
    """Schema from plain values, as the topology file holds them."""
    return Schema(**{**values, "cameras": tuple(values["cameras"])})


def describe_job(config: Config) -> dict[str, Any]:
    """Plain values that every role can be given: {"schema", "instruction", "control_hz", "policy"}."""
    spec = describe(
        config.task.name,
        cameras=tuple(config.task.cameras),
        image_size=config.task.image_size,
        backend=config.twins.backend,
        options=config.twins.options,
    )
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
        **config.policy,
    }
    return {
        "schema": {**schema._asdict(), "cameras": list(schema.cameras)},
        "instruction": config.task.instruction or spec.instruction,
        "control_hz": spec.control_hz,
        "placed": spec.placed,
        "policy": policy,
    }
