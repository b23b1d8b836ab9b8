"""What simulators have in common that advance all their environments at once, on tensors of their own.

The contract steps and resets any subset. So the true state is kept here, in NumPy: what a simulator made of
environments that were not meant is forgotten, and they are set back to their true state before it next advances.
That also keeps to what such simulators allow: one write of states before each advance, never two.

An adapter provides the methods that raise NotImplementedError here, and nothing else of the contract.
NumPy only and Python 3.8's syntax: this runs beside a simulator in the simulator's own Python.
"""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np

from twins.backends.geometry import Chain, Pose, Solid, matrix, quaternion, touching, turned
from twins.snapshot import Snapshot

FORMAT = 1  # of the scene descriptions that are understood
JOINTS = 7
TOUCH_GAP = 0.003  # m; solids that are closer touch
PRESSING = 0.02  # N; less on hand and fingers is not a touch
BURIED = -20.0  # m, the height of what is out of sight
TABLE_DEPTH = 0.04  # m
GRIPPER, ARM, TABLE = "gripper", "arm", "table"
# What a draw's entries are called in `twins.randomise.CHANGES`, where it is not the same.
CHANGES = {"lamp": "light", "cameras": "camera", "colours": "colour"}
HAND, FINGERS = "hand", ("finger_left", "finger_right")


class Body(NamedTuple):
    """A rigid body of the scene beside the arm, as a simulator is to make it."""

    name: str
    # "table", "placed" (stands where it is put), "free" (moves as physics has it), "mark" (only seen) or "frame"
    # (nothing but a pose: all its shapes are marks)
    role: str
    height: float  # m, of its origin at a reset
    shapes: List[Dict[str, Any]]
    mass: float = 0.0
    centre: Sequence[float] = (0.0, 0.0, 0.0)
    inertia: Sequence[Sequence[float]] = ((0.0,) * 3,) * 3
    on: str | None = None  # of a mark: the thing in whose frame its shape is given


def scene_bodies(scene: Dict[str, Any]) -> List[Body]:
    """Table, floor, things, and a body of its own for each shape that can go out of sight."""
    bodies = [_slab(scene, "table"), _slab(scene, "floor")]
    marks = []
    for thing in scene["things"]:
        hideable = [s for s in thing["shapes"] if s["name"] in scene["hideable"]]
        rest = [s for s in thing["shapes"] if s not in hideable]
        for shape in hideable:
            if thing["free"] or shape["solid"]:
                raise ValueError(
                    f"shape {shape['name']!r} can't be hidden here: it must not be solid, "
                    f"and {thing['name']!r} must not be free"
                )
            marks.append(Body(shape["name"], "mark", thing["height"], [shape], on=thing["name"]))
        bodies.append(
            Body(
                thing["name"],
                "free" if thing["free"] else "placed" if rest else "frame",
                thing["height"],
                rest,
                thing["mass"],
                thing["centre"],
                thing["inertia"],
            )
        )
    return bodies + marks


def _slab(scene: Dict[str, Any], name: str) -> Body:
    plane = scene[name]
    x, y, z = plane["centre"]
    shape = {
        "name": name,
        "kind": "box",
        "size": [*plane["half"], TABLE_DEPTH / 2],
        "position": [x, y, z - TABLE_DEPTH / 2],
        "quaternion": [1.0, 0.0, 0.0, 0.0],
        "rgb": plane["rgb"],
        "friction": plane["friction"],
        "solid": True,
    }
    return Body(name, "table", 0.0, [shape])


def describe(task: Any, cameras: Sequence[str]) -> Dict[str, Any]:
    """The description of a task's scene as `cameras` see it; a description passes through."""
    if not isinstance(task, dict):
        from twins.scene_description import describe_scene

        return describe_scene(task, tuple(cameras))
    if task.get("format") != FORMAT:
        raise ValueError(f"scene description of format {task.get('format')!r}, not {FORMAT}")
    for name in cameras:
        if name not in task["cameras"]:
            raise ValueError(f"unknown camera {name!r}, not one of {sorted(task['cameras'])}")
    return dict(task, cameras={name: task["cameras"][name] for name in cameras})


class Lockstep:
    """N simulations of a described scene (`twins.backends.contract.Simulation`)."""

    def __init__(self, task: Any, count: int, cameras: Sequence[str], image_size: int) -> None:
        """`task` is a task, or its scene as `twins.scene_description` describes it."""
        if count < 1:
            raise ValueError(f"count is {count}, must be at least 1")
        self.scene = scene = describe(task, cameras)
        self.count, self.image_size = count, image_size
        self.cameras = tuple(cameras)
        bodies = scene_bodies(scene)
        frames = [body for body in bodies if body.role == "frame"]
        self.bodies = [body for body in bodies if body.role != "frame"]  # that a simulator makes
        self.movable = [body for body in self.bodies if body.role != "table"]
        self._kept = self.movable + frames  # whose states are kept
        self._chain = Chain(scene["arm"])
        self._index = {body.name: i for i, body in enumerate(self._kept)}
        self._solids = {body.name: Solid(body.shapes) for body in bodies}
        self._links = {body["name"]: Solid(body["shapes"]) for body in scene["arm"]["bodies"]}
        self._home = np.asarray(scene["arm"]["home"], float)
        self._open = float(scene["arm"]["open"])
        count_dofs = len(self._chain.joints)
        self._dofs = np.zeros((count, count_dofs, 2))  # rad and rad/s, of fingers m and m/s
        self._dofs[:, :, 0] = np.append(self._home, [self._open] * (count_dofs - JOINTS))
        # Position, quaternion (w first), velocity, angular velocity.
        self._roots = np.zeros((count, len(self._kept), 13))
        self._roots[..., 3] = 1.0
        self._targets = self._dofs[:, :, 0].copy()
        self._pressing = np.zeros(count, bool)  # something presses on hand or fingers
        self._stale = np.ones(count, bool)  # the simulator holds another state than the true one
        self._hidden = {b.name: np.zeros(count, bool) for b in self.movable if b.role == "mark"}
        for i, body in enumerate(self._kept):
            # Until a reset says otherwise things are out of each other's way.
            self._place(np.arange(count), body, np.tile([2.0 + 0.5 * i, 0.0, 0.0], (count, 1)))

    # -- what an adapter provides ----------------------------------------------------------------------------

    def _write(self, ids: np.ndarray, dofs: np.ndarray, roots: np.ndarray) -> None:
        """Set the simulator's state of `ids`: dofs (n, J, 2) and poses and velocities of `movable` (n, M, 13)."""
        raise NotImplementedError

    _steps = 1  # physics steps of a control step

    def _advance(self, targets: np.ndarray, steps: int) -> None:
        """So many physics steps of all environments towards joint targets (N, J)."""
        raise NotImplementedError

    def _tick(self) -> None:
        """The shortest step of all environments, after which links and cameras are where joints say."""
        raise NotImplementedError

    def _read(self) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All dofs (N, J, 2), roots (N, M, 13), and whether anything presses on hand or fingers (N,) bool."""
        raise NotImplementedError

    def _set_physics(self, ids: np.ndarray, draws: List[Dict[str, Any]]) -> None:
        """Give `ids` the friction, mass and servo strength of their draws."""
        raise NotImplementedError

    def _set_looks(self, ids: np.ndarray, draws: List[Dict[str, Any]]) -> None:
        """Give `ids` the colours, light and camera poses of their draws."""
        raise NotImplementedError

    def _render(self, ids: np.ndarray) -> Dict[str, np.ndarray]:
        """Images {camera: (n, H, W, 3) uint8} of what the simulator holds."""
        raise NotImplementedError

    def close(self) -> None:
        """Free what is held."""
        raise NotImplementedError

    def _refuse(self, draws: List[Dict[str, Any]], names: Sequence[str]) -> None:
        """Say which of the draws' `names` this simulator cannot vary, if any of them is not the nominal one."""
        x, y, z = self.scene["light"]["direction"]
        nominal = {"light": self.scene["light"]["diffuse"][0], "lamp": [-x / z, -y / z]}
        nominal.update(dict.fromkeys(("friction", "mass", "servo"), 1.0))
        found = set()
        for draw in draws:
            for name in names:
                values = draw[name].values() if isinstance(draw[name], dict) else [draw[name]]
                if not all(np.allclose(v, nominal.get(name, 0.0), atol=1e-6) for v in values):
                    found.add(CHANGES.get(name, name))
        if found:
            raise ValueError(
                f"{type(self).__name__} can't draw {', '.join(sorted(found))} for each environment; "
                "set the randomisation of each of them to 0"
            )

    # -- the contract ----------------------------------------------------------------------------------------

    def configure(self, ids: np.ndarray, configurations: List[Dict[str, Any]]) -> None:
        """See the contract."""
        ids = np.asarray(ids)
        draws = [configuration["draw"] for configuration in configurations]
        self._set_physics(ids, draws)
        if self.cameras:
            self._set_looks(ids, draws)
        self._dofs[ids] = 0.0
        self._dofs[ids, :JOINTS, 0] = self._home + np.array([c["joints"] for c in configurations])
        self._dofs[ids, JOINTS:, 0] = self._open
        self._targets[ids] = self._dofs[ids, :, 0]
        for hidden in self._hidden.values():
            hidden[ids] = False
        for body in self._kept:
            name = body.on or body.name
            self._place(ids, body, np.array([[*c[name], 0.0][:3] for c in configurations], float))
        self._pressing[ids] = False
        self._stale[ids] = True

    def _place(self, ids: np.ndarray, body: Body, at: np.ndarray) -> None:
        """Put a body at rest at `at` (n, 3): x, y in m and yaw in rad."""
        yaw = np.zeros((len(ids), 3))
        yaw[:, 2] = at[:, 2]
        row = self._index[body.name]
        self._roots[ids, row] = 0.0
        self._roots[ids, row, :2], self._roots[ids, row, 2] = at[:, :2], body.height
        self._roots[ids, row, 3:7] = quaternion(turned(yaw))

    def step(self, ids: np.ndarray, path: np.ndarray, gripper: np.ndarray) -> None:
        """See the contract."""
        ids = np.asarray(ids)
        self._targets[ids, JOINTS:] = np.asarray(gripper)[:, None] * self._open
        self._refresh()
        done, parts = 0, path.shape[1]
        for k in range(parts):
            steps = round((k + 1) * self._steps / parts) - done
            if steps:  # a simulator whose steps are longer takes the later set-points only
                self._targets[ids, :JOINTS] = path[:, k]
                self._advance(self._targets, steps)
                done += steps
        dofs, roots, pressing = self._read()
        self._dofs[ids], self._pressing[ids] = dofs[ids], pressing[ids]
        moves = [i for i, body in enumerate(self.movable) if body.role == "free"]
        self._roots[np.ix_(ids, moves)] = roots[np.ix_(ids, moves)]
        self._stale[:] = True
        self._stale[ids] = False

    def _refresh(self) -> None:
        """Write what the simulator holds wrongly; what isn't finite goes back to a state that it can advance."""
        ids = np.flatnonzero(self._stale)
        if len(ids):
            dofs, roots = self._dofs[ids].copy(), self._roots[ids, : len(self.movable)].copy()
            lost = ~(np.isfinite(dofs).all(axis=(1, 2)) & np.isfinite(roots).all(axis=(1, 2)))
            if lost.any():
                dofs[lost] = 0.0
                dofs[lost, :JOINTS, 0] = self._home
                roots[lost] = 0.0
                roots[lost, :, 2], roots[lost, :, 3] = BURIED, 1.0
            for name, hidden in self._hidden.items():
                roots[hidden[ids], self._index[name], 2] = BURIED
            self._write(ids, dofs, roots)
        self._stale[:] = False

    def snapshot(self, ids: np.ndarray) -> Snapshot:
        """See the contract."""
        ids = np.asarray(ids)
        dofs, roots = self._dofs[ids], self._roots[ids]
        frames = self._chain.frames(dofs[:, :, 0])
        tcp, tcp_turn = self._chain.tool(frames)
        things = [body for body in self._kept if body.role != "mark"]
        poses = {b.name: _pose(roots[:, self._index[b.name]]) for b in things}
        free = [body.name for body in things if body.role == "free"]
        return Snapshot(
            tcp=tcp,
            tcp_turn=tcp_turn,
            width=dofs[:, JOINTS:, 0].sum(axis=1),
            position={name: pose[0] for name, pose in poses.items()},
            turn={name: pose[1] for name, pose in poses.items()},
            velocity={name: roots[:, self._index[name], 7:] for name in free},
            contact=self._contacts(ids, frames, poses),
            memory={},
        )

    def _contacts(
        self, ids: np.ndarray, frames: Dict[str, Pose], poses: Dict[str, Pose]
    ) -> Dict[Tuple[str, str], np.ndarray]:
        """{pair: (n,) bool}: solids that come within a hair of each other; the gripper must be pressed, too.

        Simulators of this kind report one net force for each body; which other body it comes from, poses tell.
        """
        still = np.zeros((len(ids), 3)), np.broadcast_to(np.eye(3), (len(ids), 3, 3))
        parts = {name: [(self._solids[name], pose)] for name, pose in poses.items()}
        parts[TABLE] = [(self._solids[TABLE], still)]
        parts[GRIPPER] = [(self._links[name], frames[name]) for name in (HAND, *FINGERS)]
        others = [name for name in self._links if name not in (HAND, *FINGERS, "base")]
        parts[ARM] = [(self._links[name], frames[name]) for name in others]
        result = {}
        for pair in self.scene["contacts"]:
            near = np.zeros(len(ids), bool)
            # What nothing presses on touches nothing: most of the time that settles it.
            asked = np.flatnonzero(self._pressing[ids]) if GRIPPER in pair else np.arange(len(ids))
            for first, at in parts[pair[0]]:
                for second, there in parts[pair[1]]:
                    here, other = (at[0][asked], at[1][asked]), (there[0][asked], there[1][asked])
                    near[asked] |= touching(first, here, second, other, TOUCH_GAP)
            result[tuple(pair)] = near
        return result

    def joints(self, ids: np.ndarray) -> np.ndarray:
        """(n, 7) measured joint angles, rad."""
        return self._dofs[np.asarray(ids), :JOINTS, 0]

    def hide(self, ids: np.ndarray, hidden: Dict[str, np.ndarray]) -> None:
        """See the contract."""
        ids = np.asarray(ids)
        for name, gone in hidden.items():
            changed = ids[self._hidden[name][ids] != gone]
            self._hidden[name][ids] = gone
            self._stale[changed] = True

    def images(self, ids: np.ndarray) -> Dict[str, np.ndarray]:
        """See the contract. What was set since the last step is advanced by a tick to be seen, and set back after."""
        ids = np.asarray(ids)
        if self._stale[ids].any():
            self._refresh()
            self._tick()
            self._stale[:] = True
        return self._render(ids)


def _pose(roots: np.ndarray) -> Pose:
    with np.errstate(invalid="ignore"):  # of a simulation that has diverged
        return roots[:, :3], matrix(roots[:, 3:7])
