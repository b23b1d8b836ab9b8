"""Simulators in processes of their own: what is served there looks here as if it were in this process.

`RemoteSimulation` stands for a Simulation that a worker holds, `RemoteEnv` for an Env. docs/simulators.md tells how
workers are started, watched and started again.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from twinrl.core.errors import ConfigError
from twinrl.env import ACTION_DIM, PRIVILEGED, STATE, ChunkStep, EnvSpec, Observation, image_key
from twins.backends.contract import Capabilities, SimulationLost
from twins.backends.remote_link import Link, Worker
from twins.snapshot import Snapshot
from twins.worker.served import ENV, SIMULATION

RESETS = 3  # that a reset tries with new workers before it gives up
Rows = dict[Any, np.ndarray]  # one array (n, ...) for each measured quantity


class RemoteSimulation:
    """A Simulation (`twins.backends.contract`) in a worker.

    A control step is one message there and one back: `step` brings the state after it along, and `hide` goes with
    the next message. After the worker's death each simulation is lost until it is configured again.
    """

    def __init__(
        self,
        task: Any,
        count: int,
        *,
        target: str,
        worker: dict[str, Any],
        cameras: tuple[str, ...] = (),
        image_size: int = 64,
        **options: Any,
    ) -> None:
        """`target` ("module:factory") makes it there, with `options`; `worker` is a `remote_link.Worker`.

        `task` is a task, or its scene as `twins.scene_description` tells it.
        """
        self.count, self.cameras, self.image_size = count, tuple(cameras), image_size
        opening = {
            "kind": SIMULATION,
            "task": task if isinstance(task, dict) else _scene(task, self.cameras),
            "count": count,
            "options": {"cameras": self.cameras, "image_size": image_size, **options},
        }
        self._link = Link(Worker.of(worker), target, opening)
        self._rows: Rows = {}
        self._known = np.zeros(count, bool)  # simulations whose present state `_rows` holds
        self._lost = np.zeros(count, bool)
        self._hidden: list[tuple[str, list[Any]]] = []  # calls that go with the next one
        self._revive()
        self.capabilities = Capabilities(*self._link.spec["capabilities"])

    def configure(self, ids: np.ndarray, configurations: list[dict[str, Any]]) -> None:
        """See the contract. The first one after the worker's death waits for the new worker."""
        ids = np.asarray(ids)
        if not self._link.connected:
            others = np.setdiff1d(np.flatnonzero(~self._lost), ids)
            self._lose()
            if len(others):  # their episodes end with the worker, and the caller must hear of it
                raise SimulationLost(
                    "the worker died, and with it the episodes of all environments"
                )
            self._revive()
        self._lost[ids] = False
        self._move(ids, ("configure", [ids, configurations]))

    def step(self, ids: np.ndarray, path: np.ndarray, gripper: np.ndarray) -> None:
        """See the contract."""
        ids = np.asarray(ids)
        self._check(ids)
        self._move(ids, ("step", [ids, np.asarray(path), np.asarray(gripper)]))

    def snapshot(self, ids: np.ndarray) -> Snapshot:
        """See the contract."""
        ids = np.asarray(ids)
        self._look(ids)
        rows = {key: array[ids] for key, array in self._rows.items()}
        return _snapshot(rows)

    def joints(self, ids: np.ndarray) -> np.ndarray:
        """(n, 7) measured joint angles, rad; the last known ones of a lost simulation."""
        ids = np.asarray(ids)
        self._look(ids)
        return self._rows["joints"][ids]

    def hide(self, ids: np.ndarray, hidden: dict[str, np.ndarray]) -> None:
        """See the contract."""
        ids = np.asarray(ids)
        self._check(ids)
        # Copied: they leave later, and a caller may use its arrays again.
        self._hidden.append(("hide", [ids.copy(), {k: np.array(v) for k, v in hidden.items()}]))

    def images(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """See the contract. Read-only; on one host they are views of memory that the worker has written."""
        ids = np.asarray(ids)
        self._check(ids)
        nbytes = len(ids) * len(self.cameras) * (self.image_size**2 * 3 + 64)
        return self._call(("images", [ids]), nbytes=nbytes)[0]

    def close(self) -> None:
        """Let the worker go."""
        self._link.close()

    def stats(self) -> dict[str, float]:
        """Restarts of the worker, and what the process border costs."""
        return self._link.stats()

    @property
    def pid(self) -> int | None:
        """The worker's process id, on its host."""
        return self._link.pid

    def _revive(self) -> None:
        self._link.connect()
        wanted = {"count": self.count, "cameras": self.cameras, "image_size": self.image_size}
        _compare({name: self._link.spec[name] for name in wanted}, wanted, self._link)

    def _move(self, ids: np.ndarray, call: tuple[str, list[Any]]) -> None:
        """Make a call that changes `ids` and remember what it led to."""
        self._known[ids] = False
        _, snapshot, joints = self._call(call, ("snapshot", [ids]), ("joints", [ids]))
        self._keep(ids, snapshot, joints)

    def _look(self, ids: np.ndarray) -> None:
        """Ask for the state of `ids` unless it is known."""
        if not self._known[ids].all():
            self._check(ids)
            self._keep(ids, *self._call(("snapshot", [ids]), ("joints", [ids])))

    def _keep(self, ids: np.ndarray, snapshot: Any, joints: np.ndarray) -> None:
        rows = _flat(Snapshot(*snapshot))
        rows["joints"] = joints
        for key, array in rows.items():
            if key not in self._rows:
                self._rows[key] = np.zeros((self.count, *array.shape[1:]), array.dtype)
            self._rows[key][ids] = array
        self._known[ids] = True

    def _call(self, *calls: tuple[str, list[Any]], nbytes: int = 0) -> list[Any]:
        calls, ahead = [*self._hidden, *calls], len(self._hidden)
        self._hidden = []
        try:
            return self._link.call(calls, nbytes)[ahead:]
        except SimulationLost:
            self._lose()
            raise

    def _lose(self) -> None:
        self._lost[:] = True
        self._hidden = []

    def _check(self, ids: np.ndarray) -> None:
        lost = ids[self._lost[ids]]
        if len(lost):
            raise SimulationLost(f"environments {lost.tolist()} went with their worker: reset them")


def _scene(task: Any, cameras: tuple[str, ...]) -> dict[str, Any]:
    # It compiles the task's scene: only where a worker is to be told of it.
    from twins.scene_description import describe_scene

    return describe_scene(task, cameras)


def _flat(snapshot: Snapshot) -> Rows:
    """Every array of a snapshot, by field, or by field and key."""
    rows: Rows = {}
    for field, value in snapshot._asdict().items():
        if isinstance(value, dict):
            rows.update({(field, key): np.asarray(array) for key, array in value.items()})
        else:
            rows[field] = np.asarray(value)
    return rows


def _snapshot(rows: Rows) -> Snapshot:
    """What `_flat` has taken apart."""
    dicts = {name: {} for name in ("position", "turn", "velocity", "contact", "memory")}
    for key, array in rows.items():
        if isinstance(key, tuple):
            dicts[key[0]][key[1]] = array
    return Snapshot(rows["tcp"], rows["tcp_turn"], rows["width"], **dicts)


def _compare(found: dict[str, Any], wanted: dict[str, Any], link: Link) -> None:
    for name, value in wanted.items():
        if found[name] != value:
            link.close()
            raise ConfigError(
                f"{link.target} made {name} {found[name]!r} where {value!r} was asked for: "
                f"set {name} to {found[name]!r}, or remove it from the worker's --options"
            )


class RemoteEnv(VectorEnv):
    """An Env (`twinrl.env`) in a worker.

    When the worker dies, its episodes end as `invalid` with the last good observation, and the next reset waits for
    the new worker.
    """

    metadata = {"autoreset_mode": AutoresetMode.DISABLED, "render_modes": []}  # noqa: RUF012
    _link: Link | None = None

    def __init__(
        self, task: str, num_envs: int, *, target: str, worker: dict[str, Any], **options: Any
    ) -> None:
        """`target` ("module:factory") makes it there with `task`, `num_envs` and `options`."""
        opening = {"kind": ENV, "task": task, "count": num_envs, "options": options}
        self._link = Link(Worker.of(worker), target, opening)
        self._link.connect()
        found = self._link.spec
        wanted = {k: options[k] for k in ("cameras", "image_size") if options.get(k) is not None}
        wanted = {key: tuple(v) if isinstance(v, list) else v for key, v in wanted.items()}
        _compare(found, {"num_envs": num_envs, **wanted}, self._link)
        self.num_envs = num_envs
        self.spec = EnvSpec(*found["spec"])
        self.cameras, self.image_size = found["cameras"], found["image_size"]
        self.state_dim, self.privileged_dim = found["state_dim"], found["privileged_dim"]
        self.privileged_names = self.spec.privileged_names
        self.instruction, self.max_steps = self.spec.instruction, self.spec.max_steps
        self.control_hz = self.spec.control_hz
        self._define_spaces(found)
        space = self.observation_space
        self._observation: Observation = {k: np.zeros(s.shape, s.dtype) for k, s in space.items()}
        self._configurations: list[dict[str, Any]] = [{} for _ in range(num_envs)]
        self._done = np.ones(num_envs, bool)
        self._void = np.zeros(num_envs, bool)  # ended with a worker; the caller has not heard of it
        self._ghosts = np.zeros(num_envs, bool)  # running in a new worker, though nobody reset them
        self.invalid_episodes = 0

    def _define_spaces(self, found: dict[str, Any]) -> None:
        box, pixels = gymnasium.spaces.Box, (self.image_size, self.image_size, 3)
        edge = np.full(ACTION_DIM, np.inf, np.float32)
        self.single_action_space = box(
            found.get("action_low", -edge), found.get("action_high", edge), dtype=np.float32
        )
        spaces = {
            STATE: box(-np.inf, np.inf, (self.state_dim,), np.float32),
            PRIVILEGED: box(-np.inf, np.inf, (self.privileged_dim,), np.float32),
        }
        spaces |= {image_key(name): box(0, 255, pixels, np.uint8) for name in self.cameras}
        self.single_observation_space = gymnasium.spaces.Dict(spaces)
        batch = gymnasium.vector.utils.batch_space
        self.action_space = batch(self.single_action_space, self.num_envs)
        self.observation_space = batch(self.single_observation_space, self.num_envs)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """See `twinrl.env.Env.reset`. A dead worker's place is taken first."""
        options = dict(options or {})
        mask = np.asarray(options.get("reset_mask", np.ones(self.num_envs)), bool)
        if mask.shape != (self.num_envs,):
            raise ValueError(f"reset_mask has shape {mask.shape} for {self.num_envs} environments")
        observation, info = self._reset(seed, options, mask)
        for key, last in self._observation.items():
            if self._ghosts.any():  # what a new worker has begun there is nobody's
                observation[key] = _merged(observation[key], last, self._ghosts)
        self._observation = observation
        return dict(observation), info

    def _reset(
        self, seed: int | None, options: dict[str, Any], mask: np.ndarray
    ) -> tuple[Observation, dict[str, Any]]:
        for _ in range(RESETS):
            new = not self._link.connected
            if new:
                self._lose()
                self._link.connect()
            # A new worker's environments must all begin.
            options["reset_mask"] = np.ones(self.num_envs, bool) if new else mask
            try:
                arguments = {"seed": seed, "options": options}
                found = self._link.call([("reset", [], arguments)])[0]
            except SimulationLost:
                continue
            if new:
                self._ghosts[:] = True
            for flags in (self._ghosts, self._void, self._done):
                flags[mask] = False
            self._configurations = list(found[1].get("configurations", self._configurations))
            return found
        raise SimulationLost(f"{self._link.target} was lost in {RESETS} resets one after the other")

    def step_chunk(self, actions: np.ndarray) -> ChunkStep:
        """See `twinrl.env.Env.step_chunk`."""
        actions = np.asarray(actions, np.float32)
        if actions.ndim != 3 or len(actions) != self.num_envs:
            raise ValueError(
                f"actions are {actions.shape}, expected ({self.num_envs}, C, {ACTION_DIM})"
            )
        if not np.isfinite(actions).all():
            broken = np.flatnonzero(~np.isfinite(actions).all(axis=(1, 2)))
            raise ValueError(f"actions of environments {broken.tolist()} are not finite")
        begun = ~self._done
        try:
            found = ChunkStep(*self._link.call([("step_chunk", [actions])])[0])
        except SimulationLost:
            self._lose()
            found = self._nothing(actions)
        if self._ghosts.any():
            found = _without(found, self._ghosts, self._observation)
        invalid = self._void if found.invalid is None else self._void | found.invalid & begun
        self._void = np.zeros(self.num_envs, bool)
        self._observation = found.observation
        found = found._replace(observation=dict(found.observation), invalid=invalid)
        self._done |= found.done
        self.invalid_episodes += int(invalid.sum())
        return found

    def step(
        self, actions: np.ndarray
    ) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One control step with images. Environments that are done stay as they are, with reward 0."""
        found = self.step_chunk(np.asarray(actions)[:, None])
        infos = {
            "success": found.success[:, 0],
            "action": found.action[:, 0],
            "invalid": found.invalid,
        }
        terminated, truncated = found.terminated[:, 0], found.truncated[:, 0] | found.invalid
        return found.observation, found.reward[:, 0], terminated, truncated, infos

    def configurations(self) -> list[dict[str, Any]]:
        """The configuration of each environment's present episode, the last known ones without a worker."""
        try:
            self._configurations = self._link.call([("configurations", [])])[0]
        except SimulationLost:
            self._lose()
        return list(self._configurations)

    def instructions(self) -> list[str]:
        """N, what the policy is told: an episode's own where its configuration has one."""
        return [c.get("instruction", self.instruction) for c in self._configurations]

    def expert(self, noise: float = 0.0) -> np.ndarray:
        """The scripted expert's actions (N, 7) float32, where the environment has one; zeros without a worker."""
        if not self.spec.expert:
            raise NotImplementedError(f"{self._link.target} has no scripted expert")
        try:
            return self._link.call([("expert", [noise])])[0]
        except SimulationLost:
            self._lose()
            return np.zeros((self.num_envs, ACTION_DIM), np.float32)

    def close_extras(self, **_: Any) -> None:
        """Let the worker go."""
        if self._link is not None:
            self._link.close()

    def stats(self) -> dict[str, float]:
        """Restarts of the worker, and what the process border costs."""
        return self._link.stats()

    @property
    def pid(self) -> int | None:
        """The worker's process id, on its host."""
        return self._link.pid

    def _lose(self) -> None:
        """Running episodes are void, and their environments done."""
        self._void |= ~self._done
        self._done[:] = True
        self._ghosts[:] = False

    def _nothing(self, actions: np.ndarray) -> ChunkStep:
        """A chunk of which no step was executed."""
        rows = actions.shape[:2]
        flags = np.zeros((4, *rows), bool)
        return ChunkStep(
            self._observation,
            np.zeros((*rows, self.state_dim), np.float32),
            np.zeros((*rows, self.privileged_dim), np.float32),
            np.zeros_like(actions),
            np.zeros(rows, np.float32),
            *flags,
        )


def _merged(found: np.ndarray, last: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """`found` with the rows `keep` of `last`."""
    merged = found.copy()
    merged[keep] = last[keep]
    return merged


def _without(found: ChunkStep, ghosts: np.ndarray, last: Observation) -> ChunkStep:
    """`found` as if the environments `ghosts` had not been stepped."""
    zero = {}
    for name, value in found._asdict().items():
        if isinstance(value, np.ndarray):
            zero[name] = _merged(value, np.zeros_like(value), ghosts)
    observation = {key: _merged(v, last[key], ghosts) for key, v in found.observation.items()}
    return found._replace(observation=observation, **zero)
