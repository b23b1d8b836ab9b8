"""What a simulator tells of its state, and what tasks decide by."""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any  # numpy.ndarray or torch.Tensor
GRIPPER, ARM, TABLE = "gripper", "arm", "table"  # parts that a contact pair may name beside things


class Snapshot(NamedTuple):
    """The true state of n simulations. Positions in m in the robot base frame, velocities in m/s and rad/s."""

    tcp: Array  # (n, 3)
    tcp_turn: Array  # (n, 3, 3)
    width: Array  # (n,) distance between the fingertips, 0 .. 0.08 m
    position: dict[str, Array]  # {thing: (n, 3)}, of all things
    turn: dict[str, Array]  # {thing: (n, 3, 3)}, of all things
    velocity: dict[str, Array]  # {thing: (n, 6)} linear, angular; of free things
    contact: dict[tuple[str, str], Array]  # {pair: (n,) bool} of the task's `contacts`
    memory: dict[str, Array]  # {name: (n, ...)}, what the task remembers of the episode

    def rows(self, mask: Array) -> Snapshot:
        """The snapshot of those simulations that `mask` (n,) names."""
        return Snapshot(
            *(
                {name: value[mask] for name, value in part.items()}
                if isinstance(part, dict)
                else part[mask]
                for part in self
            )
        )
