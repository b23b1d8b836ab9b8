"""Zero-argument factories for roles: module-level functions, so that they travel to other machines."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from twinrl.config import Config
from twinrl.core.keys import Keys
from twinrl.core.metrics import Reporter
from twinrl.core.segment import Schema
from twinrl.env import STATE


def env_factory(config: Config) -> Callable[..., Any]:
    """make(num_envs, *, seed, **options) -> environments of the job's task."""
    return partial(
        _make_env,
        task=config.task.name,
        cameras=config.task.cameras,
        observe=config.task.observe,
        image_size=config.task.image_size,
        instruction=config.task.instruction,
        errands=config.task.errands,
        reward=config.task.reward,
        regions=config.task.regions,
        backend=config.twins.backend,
        options=config.twins.options,
        python=config.twins.python,
        gripper=config.twins.gripper.model_dump(exclude_defaults=True) or None,
        device=config.twins.device,
    )


def _make_env(num_envs: int, *, task: str, **options: Any) -> Any:
    import twins

    return twins.make_env(task, num_envs, **options)


def runner_factory(
    policy_config: dict[str, Any], seed: int, device: str = "cpu", threads: int = 1
) -> Callable[[], Any]:
    """make() -> a PolicyRunner; on one thread where rollout processes share the machine. `device` as torch names it, or
    "auto": a GPU if the process has one."""
    return partial(_make_runner, policy_config, seed, device, threads)


def _make_runner(policy_config: dict[str, Any], seed: int, device: str, threads: int) -> Any:
    import torch

    from policies.runner import PolicyRunner

    torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return PolicyRunner(policy_config, seed, device)


def remote_runner_factory(seed: int) -> Callable[[], Any]:
    """make() -> a runner whose policy is the inference actor's."""
    return partial(_make_remote_runner, seed)


def _make_remote_runner(seed: int) -> Any:
    from actors.remote_runner import RemoteRunner
    from deploy.ray_inference import RayInference

    return RemoteRunner(RayInference(), seed)


def writer_factory(
    topology: dict[str, Any], keys: Keys, schema: Schema, **options: Any
) -> Callable[[str], Any]:
    """make(name) -> a replay writer; `options` of its own."""
    return partial(_make_writer, topology["replay"], topology.get("shards"), keys, schema, options)


def _make_writer(
    address: str,
    shards: list[str] | None,
    keys: Keys,
    schema: Schema,
    options: dict[str, Any],
    name: str,
) -> Any:
    from buffer_service.client import ShardedWriter, Writer

    if shards is None:
        return Writer(address, keys, name, schema=schema, **options)
    return ShardedWriter([address, *shards], keys, name, schema=schema, **options)


def reader_factory(
    topology: dict[str, Any], keys: Keys, run_dir: str, schema: Schema
) -> Callable[[], Any]:
    """make() -> a replay reader; it maps the payload files where the run's folder is at hand."""
    return partial(_make_reader, topology["replay"], topology.get("shards"), keys, run_dir, schema)


def _make_reader(
    address: str, shards: list[str] | None, keys: Keys, run_dir: str, schema: Schema
) -> Any:
    from buffer_service.client import Reader, ShardedReader

    if shards is None:
        return Reader(address, keys, run_dir=run_dir, schema=schema)
    return ShardedReader([address, *shards], keys, run_dir=run_dir, schema=schema)


def reporter_factory(address: str, keys: Keys, role: str) -> Callable[..., Reporter]:
    """make(name, stats) -> a reporter to the collector."""
    return partial(_make_reporter, address, keys, role)


def _make_reporter(address: str, keys: Keys, role: str, name: str, stats: Any = None) -> Reporter:
    return Reporter(address, keys, role, name, stats)


def link_factory(address: str, keys: Keys) -> Callable[[], Any]:
    """make() -> the robot actor's link to the gateway."""
    return partial(_make_link, address, keys)


def _make_link(address: str, keys: Keys) -> Any:
    from robot_bridge.policy_link import PolicyLink

    return PolicyLink(address, keys)


def make_retargeter(env: Any, demonstrations: list[Any], rng: Any) -> Any:
    """What re-targets demonstrated segments to the environments' present placements."""
    from twins.retarget import Demonstration, Tracker

    shown = [
        Demonstration.of(
            segment.columns[STATE][1:], segment.columns["action"], segment.header["configuration"]
        )
        for segment in demonstrations
    ]
    return Tracker(env, shown, seed=int(rng.integers(2**31)))


def label_scenes(env: Any, count: int, rng: Any) -> Any:
    """`count` labelled renders."""
    from twins.labels import instructed_scenes

    return tuple(instructed_scenes(env, count, rng))
