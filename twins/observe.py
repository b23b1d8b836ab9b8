"""What a policy may know of the world: what `observation.state` holds, with or without the poses of a task's things.

    images    measured and commanded poses of the hand, and the last actions; things are seen by cameras alone
    state     no cameras: the poses of the things as well, measured with noise
    relative  as state, but where things are is told from the measured tool

A measured pose is as old as a camera's picture, which is to say that it is of the moment: delay lies between a command
and its execution (`latency`), for poses and pictures alike. Its noise (`pose_noise`) is drawn anew in each step.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

import numpy as np
from array_api_compat import array_namespace

from twinrl.env import ACTION_DIM
from twins import kinematics, rotation
from twins.snapshot import Array, Snapshot
from twins.tasks.task import Task

OBSERVE = ("images", "state", "relative")
STATE_NAMES = (
    *("tcp_x", "tcp_y", "tcp_z"),
    *("tcp_turn_x", "tcp_turn_y", "tcp_turn_z"),
    "gripper_width",
    *("lead_x", "lead_y", "lead_z", "lead_turn_x", "lead_turn_y", "lead_turn_z"),
    *(f"last_action_{i}" for i in range(ACTION_DIM)),
    *(f"earlier_action_{i}" for i in range(ACTION_DIM)),
)
PLACES, TURNS = ("x", "y", "z"), ("sin", "cos", "up")
SEED_STEP = 0x2545F491  # keeps the noise of one thing apart from that of the next


def state_vector(
    now: Snapshot, target: np.ndarray, turn: np.ndarray, actions: np.ndarray
) -> np.ndarray:
    """The first numbers of `observation.state` (n, S), of measured poses, commanded poses and the last two actions
    (n, 2, 7).

    Angles are rotation vectors in rad, `tcp_turn` from the hand pointing down; lengths are in m. In an episode
    the same is computed by `control.Controller.observe`.
    """
    columns = [
        now.tcp,
        rotation.log(now.tcp_turn @ kinematics.DOWN.T),
        now.width[:, None],
        target - now.tcp,
        rotation.log(turn @ now.tcp_turn.swapaxes(1, 2)),
        actions.reshape(len(actions), -1),
    ]
    return np.concatenate(columns, axis=1)


class Poses:
    """The poses of a task's things, as numbers that follow those of STATE_NAMES.

    They are those of the task's privileged numbers that tell a thing's place or turn ("object_x",
    "object_sin_2yaw"); velocities, contacts and what a task remembers stay privileged.
    """

    def __init__(self, task: Task, observe: str) -> None:
        if observe not in OBSERVE:
            close = difflib.get_close_matches(observe, OBSERVE, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"observe is {observe!r}, not one of {OBSERVE}{hint}")
        self._task = task
        self._columns: list[int] = []  # of the privileged numbers
        self._axes: list[int | None] = []  # which coordinate each is; None: part of a turn
        self.names: tuple[str, ...] = ()
        for i, name in enumerate(task.privileged_names if observe != "images" else ()):
            thing = next((t for t in self.things if name.startswith(f"{t}_")), name)
            kind = name[len(thing) + 1 :]
            placed = kind in PLACES
            if not placed and kind.partition("_")[0] not in TURNS:
                continue
            relative = observe == "relative" and placed
            self._columns.append(i)
            self._axes.append(PLACES.index(kind) if relative else None)
            self.names += (f"{thing}_from_hand_{kind}" if relative else name,)
        if observe != "images" and not self.names:
            raise ValueError(
                f"observe is {observe!r}, but no privileged number of {task.name!r} is a thing's pose "
                f"(THING_x, THING_sin_...): it has {tuple(task.privileged_names)}"
            )

    @property
    def things(self) -> tuple[str, ...]:
        """Whose poses they are, in the order in which `read` asks for noise."""
        return tuple(thing.name for thing in self._task.things)

    def read(self, now: Snapshot, tool: Array, noise: Callable[[int], Array | None]) -> Array:
        """The numbers (n, P) float32 of what `now` shows; `tool` (n, 3) is the measured tool position in m.

        `noise(k)` gives the measurement's error for thing k, (n, 6) in m and rad, or None where there is none.
        """
        position, turn = dict(now.position), dict(now.turn)
        xp = array_namespace(now.tcp)
        for k, name in enumerate(self.things):
            error = noise(k)
            if error is not None:
                error = xp.astype(error, now.tcp.dtype)
                position[name] = position[name] + error[:, :3]
                turn[name] = rotation.exp(error[:, 3:]) @ turn[name]
        seen = self._task.privileged(now._replace(position=position, turn=turn))
        columns = [
            seen[:, i] if axis is None else seen[:, i] - tool[:, axis]
            for i, axis in zip(self._columns, self._axes, strict=True)
        ]
        return xp.astype(xp.stack(columns, axis=1), xp.float32)


def seed_of_thing(seed: Array, k: int) -> Array:
    """The seeds (n,) int32, 31 bits, of the noise of thing k in episodes of seeds `seed`."""
    return seed ^ (SEED_STEP * (k + 1) & 0x7FFFFFFF)
