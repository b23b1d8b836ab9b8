"""A task's scene as files for other simulators.

    python -m twins.export pick-and-place --out scenes/pick-and-place

writes `scene.xml` (MJCF, everything), `arm.urdf`, a URDF for each body beside it, and `scene.json`, the description
that workers get (docs/simulators.md).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from twins import scene
from twins.backends.lockstep import scene_bodies
from twins.export_urdf import arm_urdf, body_urdf
from twins.scene_description import describe_scene
from twins.tasks import make_task
from twins.tasks.task import Task


def export(task: Task, folder: Path, *, capsules: bool = True) -> list[Path]:
    """Write the files of `task` into `folder`; without `capsules` URDF files keep to the standard's shapes."""
    description = describe_scene(task)
    spec = scene.build_scene(task)
    spec.compile()
    texts = {
        "scene.json": json.dumps(description, indent=1) + "\n",
        "scene.xml": spec.to_xml(),
        "arm.urdf": arm_urdf(description["arm"], capsules=capsules),
    }
    for body in scene_bodies(description):
        if body.shapes:
            texts[f"{body.name}.urdf"] = body_urdf(body, capsules=capsules)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [folder / name for name in texts]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 2 for a task that does not exist."""
    parser = argparse.ArgumentParser(
        prog="python -m twins.export", description="Write a task's scene as MJCF and URDF files."
    )
    parser.add_argument("task", metavar="TASK")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument(
        "--no-capsules",
        action="store_true",
        help="URDF with cylinders and balls instead of capsules, which the standard does not know",
    )
    given = parser.parse_args(arguments)
    try:
        task = make_task(given.task)
    except ValueError as error:
        print(f"twins.export: {error}", file=sys.stderr)
        return 2
    for path in export(task, given.out, capsules=not given.no_capsules):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
