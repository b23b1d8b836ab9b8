"""Domain randomisation: what may differ between two episodes.

A draw is a plain dict inside the configuration, so an episode carries everything needed to repeat it. A scale
of 0 keeps the nominal value, 1 draws from the full range, and values between shrink the range towards the nominal.
Where things lie and how the arm starts are a task's reset distribution: they vary unless they are switched off.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from twins import scene
from twins.shapes import Thing

RESETS = ("poses", "joints")
CHANGES = (
    *RESETS,
    "latency",
    "friction",
    "mass",
    "servo",
    "light",
    "camera",
    "colour",
    "state_noise",
    "action_noise",
    "pose_noise",
)
PRESETS = {
    "none": {name: float(name in RESETS) for name in CHANGES},
    "full": dict.fromkeys(CHANGES, 1.0),
}
MAX_LATENCY = 2  # control steps between a command and its execution
FRICTION, MASS, SERVO, LIGHT = (0.5, 1.3), (0.5, 3.0), (0.6, 1.2), (0.35, 0.8)
CAMERA_SHIFT = {"side": 0.03, "wrist": 0.01}  # m; the wrist camera is bolted on
CAMERA_TURN = math.radians(3.0)
STATE_NOISE = 0.004  # m, standard deviation of a measured tool position
ACTION_NOISE = 0.003  # m, standard deviation of an unseen disturbance of each commanded step
POSE_NOISE = 0.004  # m, standard deviation of a measured pose of a thing, where poses are observed
LAMP_TILT = 0.25
# How far each colour channel may move; a task's things say it themselves.
COLOURS = {"table": 0.15, "floor": 0.15, "arm": 0.08}

TWIN: dict[str, Any] = {
    "latency": 0,
    "friction": 1.0,
    "mass": 1.0,
    "servo": 1.0,
    "light": scene.LIGHT,
    "lamp": [-0.3, 0.2],
    "cameras": {name: [0.0] * 6 for name in scene.CAMERAS},
    "colours": {name: [0.0] * 3 for name in COLOURS},
    "thing_colours": [[0.0] * 3],
    "state_noise": 0.0,
    "action_noise": 0.0,
    "pose_noise": 0.0,
}
# The stand-in for reality: wrong in every respect, and everywhere within the ranges above.
STANDIN: dict[str, Any] = {
    "latency": 1,
    "friction": 0.7,
    "mass": 2.4,
    "servo": 0.75,
    "light": 0.47,
    "lamp": [-0.15, 0.32],
    "cameras": {
        "side": [0.010, -0.012, 0.008, 0.022, -0.025, 0.018],
        "wrist": [0.004, -0.003, 0.004, -0.02, 0.02, 0.02],
    },
    "colours": {
        "table": [0.05, 0.04, 0.07],
        "floor": [-0.06, -0.05, -0.04],
        "arm": [-0.05, -0.05, -0.04],
    },
    "thing_colours": [[-0.05, -0.04, 0.03], [0.05, -0.05, -0.06]],  # of its things, in turn
    "state_noise": 0.003,
    "action_noise": 0.001,
    "pose_noise": 0.004,
}
VARIANTS = {"twin": TWIN, "standin": STANDIN}
REALITY = "reality-"  # a variant's name: this and a number
THING_COLOUR = 0.03  # how far a reality's things may be off in each colour channel; no task's range is narrower


def scales(
    randomisation: str | dict[str, float], full: dict[str, float] | None = None
) -> dict[str, float]:
    """The scale of every change: of a preset's name, or of a dict; what it leaves out is as in "none".

    `full` holds the scales that a task takes for 1 where its own range is narrower.
    """
    chosen = _chosen(randomisation)
    return {name: value * (full or {}).get(name, 1.0) for name, value in chosen.items()}


def _chosen(randomisation: str | dict[str, float]) -> dict[str, float]:
    if isinstance(randomisation, str):
        if randomisation not in PRESETS:
            hint = _nearest(randomisation, PRESETS)
            raise ValueError(
                f"randomisation is {randomisation!r}, not one of {sorted(PRESETS)}{hint}"
            )
        return dict(PRESETS[randomisation])
    for name in randomisation:
        if name not in CHANGES:
            raise ValueError(
                f"unknown change {name!r}, not one of {CHANGES}{_nearest(name, CHANGES)}"
            )
    chosen = PRESETS["none"] | {name: float(value) for name, value in randomisation.items()}
    for name, value in chosen.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"randomisation of {name} is {value:g}, must be from 0 to 1")
    return chosen


def nominal_of(variant: str) -> dict[str, Any]:
    """The nominal values of a variant: "twin", "standin", or "reality-N", the N-th of many other stand-ins.

    A reality is a draw from the full ranges, the same whenever it is asked for; within it every episode is alike.
    """
    if variant in VARIANTS:
        return VARIANTS[variant]
    number = variant[len(REALITY) :]
    if not variant.startswith(REALITY) or not number.isdigit():
        raise ValueError(
            f"variant is {variant!r}, not one of {sorted(VARIANTS)} or {REALITY}NUMBER"
        )
    rng = np.random.default_rng([int(number), 31])
    things = rng.uniform(-THING_COLOUR, THING_COLOUR, (2, 3)).tolist()
    return {**draw(rng, PRESETS["full"], TWIN), "thing_colours": things}


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def draw(
    rng: np.random.Generator,
    scale: dict[str, float],
    nominal: dict[str, Any],
    things: Sequence[Thing] = (),
) -> dict[str, Any]:
    """One episode's draw around `nominal`. Every call takes the same amount of randomness from `rng`."""
    centres, ranges = dict(nominal["colours"]), dict(COLOURS)
    for i, thing in enumerate(things):
        offered = nominal["thing_colours"]
        centres[thing.name] = offered[i % len(offered)]
        ranges[thing.name] = thing.colour_range

    # Plain numbers from few calls: thousands of environments on a GPU end and are drawn anew all the time.
    def ball(radius: float) -> list[float]:
        x, y, z = rng.standard_normal(3).tolist()
        length = radius * rng.random() / math.sqrt(x * x + y * y + z * z)
        return [x * length, y * length, z * length]

    longest = round(MAX_LATENCY * scale["latency"])
    lag = int(rng.random() * (longest + 1))
    cameras = {}
    for name in scene.CAMERAS:
        offsets = ball(CAMERA_SHIFT[name]) + ball(CAMERA_TURN)
        centre = nominal["cameras"][name]
        cameras[name] = [
            c + scale["camera"] * moved for c, moved in zip(centre, offsets, strict=True)
        ]
    numbers = iter(rng.random(3 * len(ranges) + 9).tolist())

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * next(numbers)

    def within(name: str, low: float, high: float, centre: float) -> float:
        return centre + scale[name] * (uniform(low, high) - centre)

    colours = {
        name: [c + scale["colour"] * uniform(-reach, reach) for c in centres[name]]
        for name, reach in ranges.items()
    }
    # Masses are drawn on a logarithmic scale: half as heavy is as likely as twice as heavy.
    lightest, heaviest = np.log(MASS).tolist()
    mass = within("mass", lightest, heaviest, centre=float(np.log(nominal["mass"])))
    return {
        "latency": lag if scale["latency"] else nominal["latency"],
        "friction": within("friction", *FRICTION, nominal["friction"]),
        "mass": float(np.exp(mass)),
        "servo": within("servo", *SERVO, nominal["servo"]),
        "light": within("light", *LIGHT, nominal["light"]),
        "lamp": [c + scale["light"] * LAMP_TILT * uniform(-1, 1) for c in nominal["lamp"]],
        "cameras": cameras,
        "colours": colours,
        "state_noise": within("state_noise", 0.0, STATE_NOISE, nominal["state_noise"]),
        "action_noise": within("action_noise", 0.0, ACTION_NOISE, nominal["action_noise"]),
        "pose_noise": within("pose_noise", 0.0, POSE_NOISE, nominal["pose_noise"]),
    }
