"""A whole simulation in plain NumPy, to read before writing an adapter and to try a worker without a simulator.

    python -m twins.worker --listen tcp://127.0.0.1:5600 --keys keys --serve twins.worker.example:ExampleSimulation

The arm goes to its joint targets at a limited speed, things fall onto the table, and a closed gripper carries what is
between its fingers. Pictures show the table from above, with a square for each thing. Nothing pushes anything.
"""

from __future__ import annotations

from typing import Any, Dict, List, Tuple

import numpy as np

from twins.backends.contract import Capabilities
from twins.backends.geometry import Chain, turned
from twins.snapshot import GRIPPER, TABLE, Snapshot

SPEED = 1.5  # rad/s, of every joint
FINGER_SPEED = 0.1  # m/s, of each finger
GRAVITY = 9.81  # m/s²
WITHIN = 0.03  # m from the tcp: what a closing gripper takes hold of
SHUT = 0.03  # m, of each finger's opening: less holds
VIEW = np.array([(0.2, 0.8), (-0.45, 0.45)])  # m, what pictures show


class ExampleSimulation:
    """`count` simulations of a described scene (`twins.backends.contract.Simulation`)."""

    capabilities = Capabilities(
        repeatable=True, physics_draw=False, looks_draw=False, contact_pairs=True
    )

    def __init__(
        self,
        scene: Dict[str, Any],
        count: int,
        *,
        cameras: Tuple[str, ...] = (),
        image_size: int = 64,
    ) -> None:
        """`scene` is what `twins.scene_description` tells of a task."""
        self.scene, self.count = scene, count
        self.cameras, self.image_size = tuple(cameras), image_size
        self._chain = Chain(scene["arm"])
        self._home, self._open = np.array(scene["arm"]["home"]), float(scene["arm"]["open"])
        self._joints = np.tile(np.append(self._home, [self._open] * 2), (count, 1))
        names = [thing["name"] for thing in scene["things"]]
        self._position = {name: np.zeros((count, 3)) for name in names}
        self._yaw = {name: np.zeros(count) for name in names}
        self._fall = {t["name"]: np.zeros(count) for t in scene["things"] if t["free"]}  # m/s, down
        self._held = {name: np.zeros(count, bool) for name in self._fall}
        self._rest = {thing["name"]: float(thing["height"]) for thing in scene["things"]}
        self._colour = {thing["name"]: thing["shapes"][0]["rgb"] for thing in scene["things"]}
        self._hidden = {name: np.zeros(count, bool) for name in scene["hideable"]}

    def configure(self, ids: np.ndarray, configurations: List[Dict[str, Any]]) -> None:
        """See the contract."""
        self._joints[ids, :7] = self._home + np.array([c["joints"] for c in configurations])
        self._joints[ids, 7:] = self._open
        for name, position in self._position.items():
            pose = np.array([[*c[name], 0.0][:3] for c in configurations])
            position[ids, :2], position[ids, 2] = pose[:, :2], self._rest[name]
            self._yaw[name][ids] = pose[:, 2]
        for name in self._fall:
            self._fall[name][ids], self._held[name][ids] = 0.0, False
        for hidden in self._hidden.values():
            hidden[ids] = False

    def step(self, ids: np.ndarray, path: np.ndarray, gripper: np.ndarray) -> None:
        """See the contract."""
        seconds = self.scene["control_seconds"]
        before, _ = self._tcp(ids)
        target = np.column_stack([path[:, -1], gripper * self._open, gripper * self._open])
        most = seconds * np.array([SPEED] * 7 + [FINGER_SPEED] * 2)
        self._joints[ids] += np.clip(target - self._joints[ids], -most, most)
        after, _ = self._tcp(ids)
        shut = self._joints[ids, 7] < SHUT
        for name, fall in self._fall.items():
            position = self._position[name]
            near = np.linalg.norm(position[ids] - before, axis=1) < WITHIN
            held = self._held[name][ids] = shut & near
            fall[ids] = np.where(held, 0.0, fall[ids] + GRAVITY * seconds)
            position[ids] += np.where(held[:, None], after - before, 0.0)
            position[ids, 2] -= fall[ids] * seconds
            landed = position[ids, 2] <= self._rest[name]
            position[ids[landed], 2], fall[ids[landed]] = self._rest[name], 0.0

    def snapshot(self, ids: np.ndarray) -> Snapshot:
        """See the contract."""
        tcp, tcp_turn = self._tcp(ids)
        axis = np.array([0.0, 0.0, 1.0])
        velocity = {name: np.zeros((len(ids), 6)) for name in self._fall}
        for name, fall in self._fall.items():
            velocity[name][:, 2] = -fall[ids]
        return Snapshot(
            tcp=tcp,
            tcp_turn=tcp_turn,
            width=self._joints[ids, 7:].sum(axis=1),
            position={name: position[ids] for name, position in self._position.items()},
            turn={name: turned(yaw[ids, None] * axis) for name, yaw in self._yaw.items()},
            velocity=velocity,
            contact={tuple(pair): self._touch(ids, *pair) for pair in self.scene["contacts"]},
            memory={},
        )

    def _touch(self, ids: np.ndarray, first: str, second: str) -> np.ndarray:
        if GRIPPER in (first, second):
            return self._held.get(
                first if second == GRIPPER else second, np.zeros(self.count, bool)
            )[ids]
        if TABLE in (first, second):
            name = first if second == TABLE else second
            return self._position[name][ids, 2] <= self._rest[name]
        if first in self._position and second in self._position:
            apart = self._position[first][ids, :2] - self._position[second][ids, :2]
            return np.linalg.norm(apart, axis=1) < WITHIN
        return np.zeros(len(ids), bool)

    def _tcp(self, ids: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        return self._chain.tool(self._chain.frames(self._joints[ids]))

    def joints(self, ids: np.ndarray) -> np.ndarray:
        """(n, 7) measured joint angles, rad."""
        return self._joints[ids, :7]

    def hide(self, ids: np.ndarray, hidden: Dict[str, np.ndarray]) -> None:
        """See the contract; these pictures show no single shapes."""
        for name, gone in hidden.items():
            self._hidden[name][ids] = gone

    def images(self, ids: np.ndarray, out: Any = None) -> Dict[str, np.ndarray]:
        """See the contract. `out` {camera: (n, H, W, 3) uint8}, where a worker gives it: shared memory."""
        size = self.image_size
        if out is None:
            out = {name: np.empty((len(ids), size, size, 3), np.uint8) for name in self.cameras}
        places = {
            name: self._pixels(position[ids, :2]) for name, position in self._position.items()
        }
        places["tcp"] = self._pixels(self._tcp(ids)[0][:, :2])
        for pictures in out.values():
            pictures[:] = 90
            for name, pixels in places.items():
                colour = 255.0 * np.array(self._colour.get(name, (0.9, 0.9, 0.9)))
                for picture, (row, column) in zip(pictures, pixels):
                    picture[max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3] = colour
        return out

    def _pixels(self, places: np.ndarray) -> np.ndarray:
        """Rows and columns (n, 2) of places (n, 2) in m."""
        share = (places - VIEW[:, 0]) / (VIEW[:, 1] - VIEW[:, 0])
        return np.clip(share * self.image_size, 0, self.image_size - 1).astype(int)

    def close(self) -> None:
        """Nothing is held that the garbage collector would not free."""
