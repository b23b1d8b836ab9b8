"""What the numbers of an observation mean: a robot and a run compare this before the first motion."""

from __future__ import annotations

from typing import NamedTuple, Sequence, Tuple

AXES = ("x", "y", "z")


class Dimension(NamedTuple):
    """One number of `observation.state`."""

    name: str
    unit: str  # m, rad, 1 (a share or a sine)
    frame: str  # base, or what else it is measured in; empty where it has none

    def __str__(self) -> str:
        what = ", ".join(part for part in (self.unit, self.frame) if part)
        return f"{self.name} [{what}]" if what else self.name


# The arm's own numbers, of which every state begins. Rotation vectors turn a tool that points straight down into the
# measured one, or the measured one into the commanded; an action's are deltas in the frame that the arm is told them in.
ARM: Tuple[Tuple[str, str, str], ...] = (
    *((f"tcp_{axis}", "m", "base") for axis in AXES),
    *((f"tcp_turn_{axis}", "rad", "base") for axis in AXES),
    ("gripper_width", "m", ""),
    *((f"lead_{axis}", "m", "base") for axis in AXES),
    *((f"lead_turn_{axis}", "rad", "base") for axis in AXES),
)


def arm_dimensions(frame: str = "base") -> Tuple[Dimension, ...]:
    """The state of an arm whose actions are deltas in `frame`: tool pose, gripper, lead of the command, last actions."""
    actions = [
        Dimension(
            f"{which}_action_{i}", "m" if i < 3 else "rad" if i < 6 else "1", frame if i < 6 else ""
        )
        for which in ("last", "earlier")
        for i in range(7)
    ]
    return (*(Dimension(*values) for values in ARM), *actions)


def dimensions_of(names: Sequence[str]) -> Tuple[Dimension, ...]:
    """What the numbers of a state are, by their names: the arm's own, and poses of things (THING_x, THING_sin_2yaw).

    A name that is neither has no unit and no frame.
    """
    own = {dimension.name: dimension for dimension in arm_dimensions()}
    return tuple(own.get(name) or _pose_dimension(name) for name in names)


def _pose_dimension(name: str) -> Dimension:
    thing, _, kind = name.rpartition("_")
    if thing and kind in AXES:
        return Dimension(name, "m", "base, from the tool" if "_from_hand_" in name else "base")
    turned = any(f"_{word}_" in name for word in ("sin", "cos", "up"))
    return Dimension(name, "1", "base") if turned else Dimension(name, "", "")


def differences(robot: Sequence[Dimension], run: Sequence[Dimension]) -> str:
    """A table of both sides where they differ, a line for each number that does; empty where they agree."""
    rows = []
    for i in range(max(len(robot), len(run))):
        own = str(robot[i]) if i < len(robot) else "nothing"
        other = str(run[i]) if i < len(run) else "nothing"
        if own != other:
            rows.append((str(i), own, other))
    if not rows:
        return ""
    rows.insert(0, ("", "robot", "run"))
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )
