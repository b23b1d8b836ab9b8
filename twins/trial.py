"""Try a simulator: does the scripted expert finish the tasks in it, how fast is it, what do its cameras see?

    python -m twins.trial --backend isaac-gym --python /opt/isaacgym/bin/python --out trial

prints a line for each task and writes `report.json` and pictures of what the cameras see.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import twins
from twinrl.env import image_key
from twins.tasks import TASKS

SHOWN = 4  # environments in a picture
UNVARIED = {
    "poses": 1.0,
    "joints": 1.0,
}  # where things lie and the arm's start; nothing else is drawn


def try_task(
    task: str, envs: int, episodes: int, folder: Path, cameras: tuple[str, ...], **simulator: Any
) -> dict[str, Any]:
    """Let the expert play `episodes` episodes of `task` (in whole rounds); figures, with pictures in `folder`."""
    started = time.perf_counter()
    env = twins.make_env(
        task, envs, cameras=cameras, randomisation=UNVARIED, image_size=128, seed=0, **simulator
    )
    figures: dict[str, Any] = {"task": task, "envs": envs, "start_s": time.perf_counter() - started}
    done = won = void = steps = 0
    try:
        began = time.perf_counter()
        while done < episodes:
            observation, _ = env.reset()
            if not done:
                _picture(observation, cameras, folder, f"{task}-reset")
            success, invalid = np.zeros(envs, bool), np.zeros(envs, bool)
            for _ in range(env.max_steps):
                result = env.step_chunk(env.expert()[:, None])
                steps += int(result.mask.sum())
                success |= result.success.any(axis=1)
                if result.invalid is not None:
                    invalid |= result.invalid
                if env.done.all():
                    break
            if not done:
                _picture(result.observation, cameras, folder, f"{task}-end")
            done, won, void = done + envs, won + int(success.sum()), void + int(invalid.sum())
        elapsed = time.perf_counter() - began
    finally:
        env.close()
    return figures | {
        "episodes": done,
        "success": won / done,
        "invalid": void,
        "env_steps_per_s": steps / elapsed,
    }


def _picture(observation: Any, cameras: tuple[str, ...], folder: Path, name: str) -> None:
    for camera in cameras:
        tiles = observation[image_key(camera)][:SHOWN]
        Image.fromarray(np.concatenate(list(tiles), axis=1)).save(folder / f"{name}-{camera}.png")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 1 where a task could not be played at all."""
    parser = argparse.ArgumentParser(
        prog="python -m twins.trial", description="Let the expert play our tasks in a simulator."
    )
    add = parser.add_argument
    add("--backend", default="mujoco", help="one of twins.backends.BACKENDS")
    add("--python", help="the simulator's own Python")
    add("--options", default="{}", metavar="JSON", help="of the backend")
    add("--task", action="append", choices=sorted(TASKS), help="all tasks unless given")
    add("--envs", type=int, default=16)
    add("--episodes", type=int, default=32, help="of each task")
    add("--no-images", action="store_true", help="for a simulator without a graphics device")
    add("--out", type=Path, default=Path("trial"), metavar="DIR")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    cameras = () if given.no_images else twins.CAMERAS
    rows = []
    for task in given.task or sorted(TASKS):
        simulator = {"backend": given.backend, "python": given.python}
        try:
            row = try_task(
                task,
                given.envs,
                given.episodes,
                given.out,
                cameras,
                options=json.loads(given.options),
                **simulator,
            )
            print(
                f"{task}: {row['success']:.0%} of {row['episodes']} episodes, {row['invalid']} invalid, "
                f"{row['env_steps_per_s']:.0f} environment steps/s, started in {row['start_s']:.1f} s",
                flush=True,
            )
        except Exception as error:  # the report says what went wrong, and the other tasks are tried
            traceback.print_exc()
            row = {"task": task, "error": f"{type(error).__name__}: {error}"}
        rows.append(row)
    report = {"command": sys.argv, "machine": platform.platform(), "rows": rows}
    (given.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
