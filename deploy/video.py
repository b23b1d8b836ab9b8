"""A short video of the final policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from deploy import factories
from deploy.evaluation import WORLDS, load_runner
from deploy.mp4 import write_mp4
from deploy.run_folder import RunFolder
from twinrl.config import Config
from twinrl.env import image_key

EPISODES = ("id", "ood", "ood")
SIZE = 256  # pixels


def record_video(
    config: Config, run: RunFolder, job: dict[str, Any], checkpoint: str = "stage3"
) -> Path:
    """Play an episode in each of EPISODES' regions, on the stand-in where the job has one; returns video.mp4's path.

    `job` is what `describe_job` says.
    """
    runner = load_runner(run, checkpoint)
    make = factories.env_factory(config)
    world = WORLDS["real" if job["stand_in"] else "twin"]
    small = make(1, seed=config.evaluation.seed + 1, **world)
    camera = job["schema"]["cameras"][0]
    # Simulation repeats bit for bit: what the policy did on small images is played again with large ones.
    large = make(1, seed=0, image_size=SIZE, cameras=(camera,), **world)
    frames = []
    for region in (region for region in EPISODES if region in job["regions"]):
        observation, _ = small.reset(options={"region": region})
        starts = small.configurations()
        actions = []
        done = False
        while not done:
            chunk, _ = runner.infer(observation, small.instructions(), explore=False)
            step = small.step_chunk(chunk)
            observation, done = step.observation, bool(step.done[0])
            actions.append(step.action[0][step.mask[0]])
        observation, _ = large.reset(options={"configurations": starts})
        frames.append(observation[image_key(camera)][0].copy())
        for action in np.concatenate(actions):
            step = large.step_chunk(action[None, None])
            frames.append(step.observation[image_key(camera)][0].copy())
        frames += [frames[-1]] * 5
    small.close()
    large.close()
    path = run.path / "video.mp4"
    write_mp4(frames, path, rate=10)
    return path
