"""`twinrl play`: a task as a video or in a live window, played by its expert, at random, by a policy or as recorded."""

from __future__ import annotations

import argparse
import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deploy.mp4 import write_mp4
from deploy.play_actors import stage
from twinrl.core.errors import ConfigError, TwinRLError
from twinrl.env import image_key

CAPTION = 34  # pixels of height under the pictures
END_SECONDS = 1.0  # the last picture stays
GOOD, BAD, INK = "#0b9a80", "#d13438", "#151a21"
MOMENTS = 5  # of a PNG


class Frame(NamedTuple):
    """What there is to see after a step, or after a reset at step 0."""

    episode: int
    step: int
    images: dict[str, np.ndarray]  # {camera: (H, W, 3) uint8}
    reward: float  # of the episode so far
    ended: str  # "success", "failed", "void", or "" while it goes on


def command(argv: list[str]) -> int:
    """The command `twinrl play`."""
    arguments = make_parser().parse_args(argv)
    _check_numbers(arguments)
    configurations = _configurations(arguments)
    recorded = _recorded(arguments.actor) if arguments.actor.endswith(".npz") else None
    if recorded is not None:
        configurations = configurations or [recorded[1]]
    task = arguments.task or (configurations or [{}])[0].get("task")
    if not task:
        raise ConfigError("say which task: twinrl play TASK; `twinrl tasks` lists them")
    starts = configurations or [None] * arguments.episodes
    actor: Callable[..., Callable[..., np.ndarray]]
    make, actor, options = stage(arguments, task, recorded)
    played: list[dict[str, Any]] = []
    if arguments.window:
        from deploy.play_window import show

        return show(lambda: make(render=False, **options), actor, starts, arguments, print)
    env = make(**options)
    try:
        if not env.cameras:
            raise ConfigError(
                f"{task} has no camera here, so there is nothing to see; name one: --camera"
            )
        frames = _told(_play(env, actor(env), starts, arguments, played), env.max_steps)
        stem = (
            arguments.out.with_suffix("")
            if arguments.out
            else Path(f"{task}-{_label(arguments.actor)}")
        )
        path = arguments.out or stem.with_name(stem.name + ".mp4")
        shown = _Shown(frames, task, _label(arguments.actor), arguments)
        _whole(path, lambda part: write_mp4(shown, part, env.control_hz * arguments.speed))
    finally:
        env.close()
    record = path.with_suffix(".json")
    _whole(record, lambda part: part.write_text(json.dumps(played, indent=1)))
    print(f"{path}; its configurations: {record}")
    if arguments.png and shown.first:
        _whole(arguments.png, lambda part: _moments(shown.first).save(part, "PNG", optimize=True))
        print(arguments.png)
    return 130 if shown.interrupted else 0


def make_parser() -> argparse.ArgumentParser:
    """The command line of `twinrl play`."""
    parser = argparse.ArgumentParser(
        prog="twinrl play",
        description="Show a task: writes a video (MP4) and the configurations that were played (JSON), or opens a "
        "window.",
        epilog="examples:\n"
        "  twinrl play erase-whiteboard\n"
        "  twinrl play pick-and-place --region ood --randomisation full --episodes 4\n"
        "  twinrl play pick-and-place --actor demo --variant standin\n"
        "  twinrl play --configuration pick-and-place-expert.json\n"
        "  twinrl play --actor data/demo/stand-in-fcac4faf-54.npz\n"
        "  twinrl play insert-hexagon-block --window\n"
        "`twinrl tasks` lists the tasks; `twinrl replay RUN export` writes episodes as NPZ files.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("task", nargs="?", metavar="TASK", help="default: that of the configuration or the episode")
    add(
        "--actor",
        default="expert",
        metavar="WHO",
        help="expert, random, the name or folder of a run for its policy, or an exported episode (NPZ): expert",
    )
    add("--checkpoint", default="stage3", help="of the run; default: stage3")
    add("--episodes", type=int, default=3, metavar="N", help="3")
    add("--region", default="all", help="where the things lie: id, ood or all (%(default)s)")
    add(
        "--randomisation",
        default="none",
        metavar="WHICH",
        help="none, full, or scales: colour=1,camera=0.5",
    )
    add("--variant", choices=["twin", "standin"], default="twin", help="default: twin")
    add("--seed", type=int, default=0, metavar="N", help="of what is drawn, 0")
    add(
        "--configuration",
        type=Path,
        metavar="FILE",
        help="play exactly this: a configuration, a list of them, or what `twinrl replay RUN show --json` prints",
    )
    add(
        "--backend",
        default="mujoco",
        metavar="NAME",
        help="simulator, see `twinrl tasks --simulators`",
    )
    add(
        "--backend-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the simulator",
    )
    add(
        "--python",
        metavar="FILE",
        help="interpreter of another environment in which the simulator runs",
    )
    add("--noise", type=float, default=0.0, metavar="X", help="disturbance of the expert, 0")
    add("--out", type=Path, metavar="FILE", help="the video; default: TASK-WHO.mp4")
    add("--png", type=Path, metavar="FILE", help="also moments of the first episode as a picture")
    add(
        "--size", type=int, default=256, metavar="PIXELS", help="height and width of a picture, 256"
    )
    add("--camera", action="append", metavar="NAME", help="default: all; may be given again")
    add("--speed", type=float, default=1.0, metavar="X", help="1 is real time")
    add("--window", action="store_true", help="a live window (MuJoCo's viewer) instead of a video")
    return parser


def _check_numbers(arguments: argparse.Namespace) -> None:
    for name, least in (("episodes", 1), ("size", 16), ("speed", 0.01), ("noise", 0.0)):
        value = getattr(arguments, name)
        if value < least:
            raise ConfigError(f"--{name} is {value:g}, must be at least {least:g}")
    if arguments.out and arguments.out.suffix != ".mp4":
        raise ConfigError(f"--out is {arguments.out}, must end in .mp4")


def _configurations(arguments: argparse.Namespace) -> list[dict[str, Any]] | None:
    """The given configurations, or None."""
    path = arguments.configuration
    if path is None:
        return None
    try:
        given = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read --configuration {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"--configuration {path} is not JSON: {error}") from None
    found = [
        each["configuration"] if isinstance(each, dict) and "configuration" in each else each
        for each in (given if isinstance(given, list) else [given])
    ]
    if not found or not all(isinstance(each, dict) for each in found):
        raise ConfigError(
            f"--configuration {path} must hold {{...}} or a list of those, as `twinrl play` writes it"
        )
    return found


def _recorded(path: str) -> tuple[np.ndarray, dict[str, Any]]:
    """The actions (T, 7) of an exported episode, and its configuration."""
    try:
        with np.load(path) as file:
            header = json.loads(str(file["header"]))
            actions = file["action"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--actor {path} is no exported episode: {error}") from None
    if header["first_step"]:
        raise ConfigError(
            f"{path} begins with step {header['first_step']}: what was before it is not known"
        )
    return actions, header["configuration"]


def _label(actor: str) -> str:
    return Path(actor).stem if actor.endswith(".npz") else Path(actor).name


def _play(
    env: Any,
    act: Callable[..., np.ndarray],
    starts: list[dict[str, Any] | None],
    arguments: argparse.Namespace,
    played: list[dict[str, Any]],
) -> Iterator[Frame]:
    """The frames of an episode from each start; `played` gets their configurations."""
    for number, start in enumerate(starts):
        options: dict[str, Any] = {} if start is None else {"configurations": [start]}
        try:
            observation, _ = env.reset(
                seed=arguments.seed if number == 0 else None, options=options
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None
        played.append(env.configurations()[0])
        if env.instructions()[0] != env.instruction:  # asked in this episode alone
            print(f'episode {number + 1}: "{env.instructions()[0]}"', flush=True)
        total, step, ended = 0.0, 0, ""
        yield Frame(number, 0, _pictures(env, observation), 0.0, "")
        while not ended:
            action = act(observation)
            if action is None:  # a recorded episode is over
                break
            result = env.step_chunk(action)
            observation, step = result.observation, step + int(result.mask.sum())
            total += float(result.reward.sum())
            if result.done[0]:
                ended = "success" if result.success.any() else "failed"
                if result.invalid is not None and result.invalid[0]:
                    ended = "void"
            yield Frame(number, step, _pictures(env, observation), total, ended)


def _pictures(env: Any, observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: observation[image_key(name)][0] for name in env.cameras}


def _told(frames: Iterator[Frame], limit: int) -> Iterator[Frame]:
    """The frames; how each episode ended is printed."""
    words = {"success": "success", "failed": "no success", "void": "void: its simulation failed"}
    for frame in frames:
        if frame.ended:
            print(
                f"episode {frame.episode + 1}: {words[frame.ended]} after {frame.step} of {limit} steps, "
                f"return {frame.reward:.2f}",
                flush=True,
            )
        yield frame


class _Shown:
    """The frames as pictures of a video; Ctrl-C ends it early and leaves what there is."""

    def __init__(
        self, frames: Iterator[Frame], task: str, actor: str, arguments: argparse.Namespace
    ) -> None:
        self.frames, self.title = frames, f"{task}, {actor}"
        self.still = max(round(END_SECONDS * 10), 1)
        self.interrupted = False
        self.first: list[Frame] = []  # the first episode's, where a PNG is wanted
        self.keep = arguments.png is not None

    def __iter__(self) -> Iterator[np.ndarray]:
        try:
            for frame in self.frames:
                if self.keep and frame.episode == 0:
                    self.first.append(frame)
                picture = captioned(frame, self.title)
                yield picture
                for _ in range(self.still if frame.ended else 0):
                    yield picture
        except KeyboardInterrupt:
            self.interrupted = True
            print("interrupted; the video ends here", flush=True)


def captioned(frame: Frame, title: str) -> np.ndarray:
    """(H, W, 3) uint8, H and W even: the cameras side by side and a line of words."""
    beside = np.concatenate(list(frame.images.values()), axis=1)
    high, wide = beside.shape[:2]
    canvas = Image.new("RGB", (wide + wide % 2, high + CAPTION + (high + CAPTION) % 2), "white")
    canvas.paste(Image.fromarray(beside), (0, 0))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    colour = {"": INK, "success": GOOD}.get(frame.ended, BAD)
    if frame.ended:
        draw.rectangle((0, 0, wide - 1, high - 1), outline=colour, width=3)
    right = frame.ended or f"step {frame.step}"
    if wide > 400:  # else there is no room for both
        draw.text((8, high + 9), title, INK, font)
    draw.text(
        (wide - 8, high + 9), f"{right}   return {frame.reward:.2f}", colour, font, anchor="ra"
    )
    return np.asarray(canvas)


def _moments(frames: list[Frame]) -> Image.Image:
    """MOMENTS pictures of the first camera, from the beginning to the end."""
    chosen = [frames[i] for i in np.linspace(0, len(frames) - 1, MOMENTS).round().astype(int)]
    return Image.fromarray(np.concatenate([next(iter(f.images.values())) for f in chosen], axis=1))


def _whole(path: Path, write: Callable[[Path], Any]) -> None:
    """A whole file or none: written beside the target, which is then replaced."""
    part = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except OSError as error:
        raise TwinRLError(f"cannot write {path}: {error}") from None
    finally:
        part.unlink(missing_ok=True)
