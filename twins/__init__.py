"""Simulated twin environments: tasks, scenes, simulators, randomisation, and the environment actors play in."""

# Nothing heavy is imported here: a simulator's worker imports `twins.worker` in a Python of its own.
from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from twinrl.env import Env, EnvSpec

__all__ = ["describe", "make_env"]
CAMERAS = ("side", "wrist")


def make_env(
    task: str = "pick-and-place",
    num_envs: int = 64,
    *,
    backend: str = "mujoco",
    options: dict[str, Any] | None = None,
    python: str | None = None,
    seed: int = 0,
    variant: str = "twin",
    randomisation: str | dict[str, float] = "none",
    reward: dict[str, float] | None = None,
    regions: dict[str, Any] | None = None,
    image_size: int = 64,
    cameras: tuple[str, ...] | None = None,
    threads: int = 1,
    device: str = "cpu",
    render: bool = True,
    region: str = "id",
    max_steps: int | None = None,
    instruction: str | None = None,
    errands: Sequence[str] | None = None,
    observe: str = "images",
    gripper: dict[str, Any] | None = None,
) -> Env:
    """`num_envs` environments of `task` in the simulator `backend`.

    `variant` is "twin", "standin" (a stand-in for the real robot: other physics, delay, cameras and light), or
    "reality-N", the N-th of many such, drawn from the full randomisation's ranges;
    `randomisation` is "none", "full", or the scale of each change (`twins.randomise.CHANGES`). `reward` gives
    weights to the task's dense terms, beside {"success": 1.0}. `region` is where resets draw from unless they say
    otherwise, one of the task's or of `regions`, {name: {thing: {"x": [low, high], "y": ..., "yaw": ...}}}.
    `errands` names those of the task's that resets draw, all when absent; `instruction` is what the policy is told in
    every episode, of a task with errands one of its own.
    `device` ("cpu" or "cuda") traces the images, and is where everything happens with the backend "mujoco-warp";
    `threads` are the physics' and the CPU tracer's. `render=False` leaves images out.
    `observe` says how things are seen: by "images", or by their measured poses in `observation.state`, in the base
    frame ("state") or from the hand ("relative"), without cameras (`twins.observe`).
    `gripper` says how the gripper takes commands, fields of `twinrl.core.gripper.GripperKind`: each at once when absent.
    `options` go to the backend; one that brings its own tasks decides about their reward, regions and randomisation
    itself. `cameras` are the task's when absent. `python` is the interpreter in which the simulator runs, as a
    process of its own; `options["worker"]` says more about that process, or where one was started by hand
    (`twins.backends.remote_link.Worker`).
    """
    from twins.backends import TWIN_ENV, find_backend

    found = find_backend(backend)
    options, worker = _split(options, python)
    if worker and found.is_simulation and found.environment != TWIN_ENV:
        raise ValueError(f"backend {backend!r} keeps its states on the device, in our own process")
    if found.is_simulation:
        cameras = _cameras(cameras, observe)
    common: dict[str, Any] = {
        "seed": seed,
        "image_size": image_size,
        "cameras": (cameras if cameras is None else tuple(cameras)) if render else (),
        "region": region,
        "max_steps": max_steps,
        "instruction": instruction,
    }
    if not found.is_simulation:
        _refuse(
            backend,
            variant=variant != "twin",
            reward=reward,
            regions=regions,
            errands=errands,
            observe=observe != "images",
            gripper=gripper,
        )
        return found.load(worker)(task, num_envs, device=device, **common, **options)

    from functools import partial

    from twins.tasks import make_task

    own: dict[str, dict[str, Any]] = {
        "mujoco": {"threads": threads, "device": device},
        "mujoco-warp": {"device": device},
    }
    return found.load_environment()(
        make_task(task),
        num_envs,
        partial(found.load(worker), **own.get(backend, {}), **options),
        variant=variant,
        randomisation=randomisation,
        reward=reward,
        regions=regions,
        errands=errands,
        observe=observe,
        gripper=gripper,
        **common,
    )


def describe(
    task: str,
    *,
    cameras: tuple[str, ...] | None = None,
    image_size: int = 64,
    backend: str = "mujoco",
    options: dict[str, Any] | None = None,
    python: str | None = None,
    observe: str = "images",
) -> EnvSpec:
    """What `make_env` would make, without making it where the task is ours."""
    from twins.backends import find_backend

    found = find_backend(backend)
    options, worker = _split(options, python)
    if not found.is_simulation:
        _refuse(backend, observe=observe != "images")
        env = found.load(worker)(task, 1, cameras=cameras, image_size=image_size, **options)
        try:
            return env.spec
        finally:
            env.close()

    from twins.env import spec_of
    from twins.tasks import make_task

    return spec_of(make_task(task), _cameras(cameras, observe), image_size, observe=observe)


def _cameras(cameras: tuple[str, ...] | None, observe: str) -> tuple[str, ...]:
    """The cameras of an environment of ours; poses are observed instead of images."""
    if observe == "images":
        return CAMERAS if cameras is None else tuple(cameras)
    if cameras:
        raise ValueError(
            f"observe is {observe!r}, which has no cameras, but cameras are {tuple(cameras)}"
        )
    return ()


def _split(
    options: dict[str, Any] | None, python: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options for the backend, and for the process that it runs in; none of the latter: our own."""
    options = dict(options or {})
    worker = dict(options.pop("worker", None) or {})
    return options, worker | ({"python": python} if python else {})


def _refuse(backend: str, **given: Any) -> None:
    """Say what a backend with tasks of its own cannot be told."""
    reasons = {
        "variant": "has no stand-in for a real robot (variant)",
        "reward": "decides about its reward itself (task.reward)",
        "errands": "has no errands (task.errands)",
        "regions": "has regions of its own (task.regions)",
        "observe": "decides about its observation itself (task.observe)",
        "gripper": "has a gripper of its own (twins.gripper)",
    }
    wrong = [reasons[name] for name, value in given.items() if value]
    if wrong:
        raise ValueError(f"backend {backend!r} {', and '.join(wrong)}")
