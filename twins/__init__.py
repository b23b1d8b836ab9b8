"""Simulated twin environments: tasks, scenes, randomisation, and the environment actors play in."""

from __future__ import annotations

from twins import scene
from twins.env import TwinEnv
from twins.tasks import TASKS, make_task

__all__ = ["TASKS", "TwinEnv", "make_env"]


def make_env(
    task: str = "pick-and-place",
    num_envs: int = 64,
    *,
    seed: int = 0,
    variant: str = "twin",
    randomisation: str | dict[str, float] = "none",
    image_size: int = 64,
    cameras: tuple[str, ...] = scene.CAMERAS,
    threads: int = 1,
    device: str = "cpu",
    render: bool = True,
    region: str = "id",
    max_steps: int | None = None,
) -> TwinEnv:
    """`num_envs` environments of `task`.

    `variant` is "twin" or "standin" (a stand-in for the real robot: other physics, delay, cameras and light);
    `randomisation` is "none", "full", or the scale of each change (`twins.randomise.CHANGES`). `region` is where
    resets draw from unless they say otherwise. `device` ("cpu" or "cuda") traces the images; physics always runs
    on the CPU, on `threads` threads. `render=False` leaves images out.
    """
    return TwinEnv(
        make_task(task),
        num_envs,
        seed=seed,
        variant=variant,
        randomisation=randomisation,
        image_size=image_size,
        cameras=tuple(cameras) if render else (),
        threads=threads,
        device=device,
        region=region,
        max_steps=max_steps,
    )
