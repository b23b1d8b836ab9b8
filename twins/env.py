"""`TwinEnv`: a task played in N copies of its scene, in any simulator, behind the Env seam."""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from twinrl.env import ACTION_DIM, PRIVILEGED, STATE, ChunkStep, EnvSpec, Observation, image_key
from twins import kinematics, randomise, rotation, scene
from twins.backends.contract import Simulation, SimulationLost
from twins.control import FREE, Controller, seed_of
from twins.errands import ERRAND, complete_errand, draw_errand, errand_number, offered
from twins.kinematics import MAX_SHIFT, MAX_TURN
from twins.observe import STATE_NAMES, Poses, seed_of_thing
from twins.regions import ALL, check_region, draw, make_regions
from twins.snapshot import Snapshot
from twins.tasks.task import Task

log = logging.getLogger(__name__)

JOINT_NOISE = 0.06  # rad, standard deviation of the arm's start
SUCCESS = "success"  # the reward's sparse term
TOGGLE = "toggle"  # its term for each opening and closing of the gripper, a cost by its weight
ACTION_STREAM, STATE_STREAM = 0, 1  # of the noise
FARTHEST, FASTEST = 10.0, 1000.0  # m, m/s or rad/s: beyond these a simulation has diverged
MakeSimulation = Callable[..., Simulation]


def clip_action(action: np.ndarray) -> np.ndarray:
    """`action` (..., 7) within the limits of one control step, directions kept."""
    return np.concatenate(
        [
            rotation.clip_norm(action[..., :3], MAX_SHIFT),
            rotation.clip_norm(action[..., 3:6], MAX_TURN),
            np.clip(action[..., 6:], 0.0, 1.0),
        ],
        axis=-1,
    )


def spec_of(
    task: Task,
    cameras: tuple[str, ...],
    image_size: int,
    max_steps: int | None = None,
    observe: str = "images",
) -> EnvSpec:
    """What `TwinEnv` will be, without a simulator."""
    return EnvSpec(
        state_names=STATE_NAMES + Poses(task, observe).names,
        privileged_names=tuple(task.privileged_names),
        cameras=tuple(cameras),
        image_size=image_size,
        instruction=task.instructions[0],
        max_steps=max_steps or task.max_steps,
        control_hz=scene.CONTROL_HZ,
        expert=True,
        placed=task.grasped,
    )


class TwinEnv(VectorEnv):
    """N environments of one task in one simulation (`twinrl.env.Env`).

    Actions move the commanded target pose, which differential inverse kinematics turns into joint targets. The
    state tells how far the target leads the measured pose and the last two actions: with a delay between command
    and motion the measured pose alone would not say what is under way.
    """

    metadata = {"autoreset_mode": AutoresetMode.DISABLED, "render_modes": []}  # noqa: RUF012

    control_hz = scene.CONTROL_HZ

    def __init__(
        self,
        task: Task,
        num_envs: int,
        make_simulation: MakeSimulation,
        *,
        seed: int = 0,
        variant: str = "twin",
        randomisation: str | dict[str, float] = "none",
        reward: Mapping[str, float] | None = None,
        regions: Mapping[str, Any] | None = None,
        image_size: int = 64,
        cameras: tuple[str, ...] = scene.CAMERAS,
        region: str = "id",
        max_steps: int | None = None,
        instruction: str | None = None,
        errands: Sequence[str] | None = None,
        observe: str = "images",
        gripper: Mapping[str, Any] | None = None,
    ):
        """`make_simulation(task, num_envs, cameras=, image_size=)` gives the simulator; see `twins.make_env`."""
        if num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}, must be at least 1")
        self._nominal = randomise.nominal_of(variant)
        for name in cameras:
            if name not in scene.CAMERAS:
                raise ValueError(f"unknown camera {name!r}, not one of {scene.CAMERAS}")
        self.task, self.num_envs = task, num_envs
        self.regions = make_regions(task, regions)
        self.region = check_region(region, self.regions)
        self.errands = offered(task, errands, instruction)  # that resets draw from
        self.reward = _checked_reward(task, reward)
        self.gripper = FREE._replace(**(gripper or {})).checked()
        self.variant = variant
        self.randomisation = randomise.scales(randomisation, task.randomisation)
        self.cameras, self.image_size = tuple(cameras), image_size
        self.spec = spec_of(task, self.cameras, image_size, max_steps, observe)
        self.poses, self.state_names = Poses(task, observe), self.spec.state_names
        self.state_dim = len(self.state_names)
        self.instruction, self.max_steps = instruction or self.spec.instruction, self.spec.max_steps
        self.privileged_names = task.privileged_names
        self.privileged_dim = len(task.privileged_names)
        self.simulation = make_simulation(
            task, num_envs, cameras=self.cameras, image_size=image_size
        )
        self.invalid_episodes = 0  # ended because their simulation failed
        self._define_spaces()
        self._rng = np.random.default_rng(seed)
        self._noise_rng = np.random.default_rng([seed, 1])
        self._allocate()

    def _define_spaces(self) -> None:
        low = np.array([*[-MAX_SHIFT] * 3, *[-MAX_TURN] * 3, 0.0], np.float32)
        high = np.array([*[MAX_SHIFT] * 3, *[MAX_TURN] * 3, 1.0], np.float32)
        box, pixels = gymnasium.spaces.Box, (self.image_size, self.image_size, 3)
        spaces = {
            STATE: box(-np.inf, np.inf, (self.state_dim,), np.float32),
            PRIVILEGED: box(-np.inf, np.inf, (self.privileged_dim,), np.float32),
        }
        spaces |= {image_key(name): box(0, 255, pixels, np.uint8) for name in self.cameras}
        self.single_action_space = box(low, high, dtype=np.float32)
        self.single_observation_space = gymnasium.spaces.Dict(spaces)

    @functools.cached_property
    def action_space(self) -> gymnasium.Space:
        """Of all environments together."""
        return gymnasium.vector.utils.batch_space(self.single_action_space, self.num_envs)

    @functools.cached_property
    def observation_space(self) -> gymnasium.Space:
        """Of all environments together. It holds four arrays of an observation's size: made when somebody asks."""
        return gymnasium.vector.utils.batch_space(self.single_observation_space, self.num_envs)

    def _allocate(self) -> None:
        count = self.num_envs
        self._configurations: list[dict[str, Any]] = [{} for _ in range(count)]
        self._controller = Controller(count, gripper=self.gripper)
        # Of each episode: where its noise comes from, and how strong it is.
        self._seeds = np.zeros(count, np.int32)
        self._state_noise, self._action_noise, self._pose_noise = np.zeros((3, count), np.float32)
        self._steps = np.zeros(count, np.int32)
        # Nothing can be stepped before its first reset.
        self._terminated, self._truncated = np.ones(count, bool), np.zeros(count, bool)
        self._success, self._invalid = np.zeros(count, bool), np.zeros(count, bool)
        self._void = np.zeros(count, bool)  # failed in a reset: the next step tells of it
        self._reward = np.zeros(count, np.float32)
        self._memory = {
            name: np.zeros((count, *m.shape), m.dtype) for name, m in self.task.memory.items()
        }
        spaces = self.single_observation_space.spaces
        self._observation = {key: np.zeros((count, *s.shape), s.dtype) for key, s in spaces.items()}

    # -- resets ----------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """See `twinrl.env.Env.reset`; `info` holds the configurations.

        A given configuration may be partial: keys that it leaves out are drawn.
        """
        options = options or {}
        unknown = set(options) - {"reset_mask", "configurations", "region"}
        if unknown:
            raise ValueError(f"unknown reset options {sorted(unknown)}")
        if seed is not None:
            self._rng = np.random.default_rng(seed)
            self._noise_rng = np.random.default_rng([seed, 1])
        mask = np.asarray(options.get("reset_mask", np.ones(self.num_envs)), bool)
        given = options.get("configurations") or [None] * self.num_envs
        for name, size in (("reset_mask", len(mask)), ("configurations", len(given))):
            if size != self.num_envs:
                raise ValueError(f"{name} has {size} entries for {self.num_envs} environments")
        region = check_region(options.get("region", self.region), self.regions)
        ids = np.flatnonzero(mask)
        if len(ids):
            for i in ids:
                self._configurations[i] = self._completed(given[i], region)
            try:
                self._begin(ids)
            except SimulationLost as error:
                for flags in (self._terminated, self._truncated, self._invalid):
                    flags[ids] = False
                self._fail(np.arange(self.num_envs), str(error))
        return self._observe(), {"configurations": self.configurations()}

    def draw(self, region: str, rng: np.random.Generator | None = None) -> dict[str, Any]:
        """A configuration from `region`, drawn with the environment's own generator unless one is given."""
        seed = int((rng or self._rng).integers(2**62))
        return self._drawn(check_region(region, self.regions), seed)

    def _drawn(self, region: str, seed: int) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        drawn = ("id", "ood")[rng.integers(2)]  # always, so that one seed means one layout
        region = drawn if region == ALL else region
        spread = JOINT_NOISE * self.randomisation["joints"]
        return {
            "task": self.task.name,
            "region": region,
            "seed": seed,
            **draw(rng, self.task, self.regions[region], self.randomisation["poses"]),
            "joints": (spread * rng.normal(size=kinematics.JOINTS)).tolist(),
            "draw": randomise.draw(rng, self.randomisation, self._nominal, self.task.things),
            **draw_errand(rng, self.errands),  # last: the scene must not depend on it
        }

    def _completed(self, given: dict[str, Any] | None, region: str) -> dict[str, Any]:
        """A whole configuration; what `given` leaves out is drawn (with its seed, if it has one).

        Without its "draw" a twin's configuration lays out the same scene on the stand-in.
        """
        if given is None:
            return self.draw(region)
        if given.get("task", self.task.name) != self.task.name:
            raise ValueError(f"configuration is of task {given['task']!r}, not {self.task.name!r}")
        seed = given.get("seed")
        seed = int(self._rng.integers(2**62)) if seed is None else seed
        drawn = self._drawn(check_region(given.get("region", region), self.regions), seed)
        unknown = set(given) - set(drawn)
        if unknown:
            raise ValueError(
                f"unknown configuration keys {sorted(unknown)}, not in {sorted(drawn)}"
            )
        return drawn | given | complete_errand(self.task, drawn, given)

    def _begin(self, ids: np.ndarray) -> None:
        """Start the episodes that the configurations of `ids` describe."""
        configurations = [self._configurations[i] for i in ids]
        self.simulation.configure(ids, configurations)
        draws = [configuration["draw"] for configuration in configurations]
        latency = [draw["latency"] for draw in draws]
        self._controller.begin(ids, self.simulation.joints(ids), latency)
        self._state_noise[ids] = [draw["state_noise"] for draw in draws]
        self._action_noise[ids] = [draw["action_noise"] for draw in draws]
        self._pose_noise[ids] = [draw.get("pose_noise", 0.0) for draw in draws]
        self._seeds[ids] = [seed_of(configuration["seed"]) for configuration in configurations]
        self._steps[ids] = 0
        for flags in (self._terminated, self._truncated, self._success, self._invalid):
            flags[ids] = False
        for memory in self._memory.values():
            memory[ids] = 0
        if ERRAND in self._memory:
            self._memory[ERRAND][ids] = [errand_number(self.task, c) for c in configurations]
        self._write_vectors(ids, self._look(ids))
        self._write_images(ids)

    def configurations(self) -> list[dict[str, Any]]:
        """The configuration of each environment's present episode; passing one to `reset` repeats it."""
        return list(self._configurations)

    def instructions(self) -> list[str]:
        """N, what the policy is told in each environment's present episode."""
        return [c.get("instruction", self.instruction) for c in self._configurations]

    # -- steps -----------------------------------------------------------------------------------------------

    def step(
        self, actions: np.ndarray
    ) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One control step with images. Environments that are done stay as they are, with reward 0."""
        result = self.step_chunk(np.asarray(actions)[:, None])
        infos = {
            "success": self._success.copy(),
            "action": result.action[:, 0],
            "invalid": self._invalid.copy(),
        }
        flags = self._terminated.copy(), self._truncated | self._invalid
        return result.observation, result.reward[:, 0], *flags, infos

    def step_chunk(self, actions: np.ndarray) -> ChunkStep:
        """See `twinrl.env.Env.step_chunk`."""
        actions = np.asarray(actions, np.float32)
        count, chunk = self.num_envs, actions.shape[1] if actions.ndim == 3 else 0
        if not chunk or actions.shape != (count, chunk, ACTION_DIM):
            raise ValueError(f"actions are {actions.shape}, expected ({count}, C, {ACTION_DIM})")
        if not np.isfinite(actions).all():
            raise ValueError(f"actions of environments {_broken(actions)} are not finite")
        states = np.zeros((count, chunk, self.state_dim), np.float32)
        privileged = np.zeros((count, chunk, self.privileged_dim), np.float32)
        executed = np.zeros((count, chunk, ACTION_DIM), np.float32)
        reward = np.zeros((count, chunk), np.float32)
        terminated, truncated, success, mask = np.zeros((4, count, chunk), bool)
        begun = ~self.done
        for k in range(chunk):
            ids = np.flatnonzero(~self.done)
            if not len(ids):
                break
            done, ids = self._advance(ids, actions[ids, k])
            executed[ids, k] = done
            reward[ids, k] = self._reward[ids]
            states[ids, k] = self._observation[STATE][ids]
            privileged[ids, k] = self._observation[PRIVILEGED][ids]
            terminated[ids, k], truncated[ids, k] = self._terminated[ids], self._truncated[ids]
            success[ids, k], mask[ids, k] = self._success[ids], True
        seen = np.flatnonzero(begun & ~self._invalid)
        if len(seen):
            self._write_images(seen)
        invalid = self._invalid & begun | self._void
        self._void[:] = False
        return ChunkStep(
            observation=self._observe(),
            states=states,
            privileged=privileged,
            action=executed,
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            success=success,
            mask=mask,
            invalid=invalid,
        )

    @property
    def done(self) -> np.ndarray:
        """(N,) bool: the episode has ended, or none was begun."""
        return self._terminated | self._truncated | self._invalid

    def _advance(self, ids: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Execute one control step of `ids` (n,).

        Returns the clipped actions (m, 7) of the m simulations that came through, and which they are.
        """
        unseen = self._noise(ids, self._action_noise, ACTION_STREAM)
        try:
            measured = self.simulation.joints(ids)
            actions, joints, opening = self._controller.command(ids, actions, measured, unseen)
            self.simulation.step(ids, joints, opening)
            return self._account(ids, actions)
        except SimulationLost as error:
            self._fail(np.arange(self.num_envs), str(error))
            return actions[:0], ids[:0]

    def _account(self, ids: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Observe and judge the control step that has just been simulated; what `_advance` returns."""
        now = self._look(ids)
        self._steps[ids] += 1
        good = _sound(now)
        if not good.all():
            self._fail(ids[~good], "its simulation diverged")
            ids, actions, now = ids[good], actions[good], now.rows(good)
        for name, value in self.task.remember(now).items():
            self._memory[name][ids] = value
            now.memory[name] = value
        self._write_vectors(ids, now)
        self._judge(ids, now, actions[:, 6])
        return actions, ids

    def _noise(self, ids: np.ndarray, spread: np.ndarray, stream: int) -> np.ndarray | None:
        """Noise (n, 6) of this step with the standard deviations `spread` (N,) m; None where there is none."""
        strength = spread[ids]
        if not strength.any():
            return None
        return self._controller.noise(self._seeds[ids], self._steps[ids], strength, stream)

    def _error(self, ids: np.ndarray, k: int) -> np.ndarray | None:
        """Noise (n, 6) of this step's measured pose of thing k; None where there is none."""
        strength = self._pose_noise[ids]
        if not strength.any():
            return None
        seeds = seed_of_thing(self._seeds[ids], k)
        return self._controller.noise(seeds, self._steps[ids], strength, STATE_STREAM)

    def _judge(self, ids: np.ndarray, now: Snapshot, gripper: np.ndarray) -> None:
        """Success, reward and ending of the step that led to `now`."""
        success = self.task.success(now, gripper)
        self._success[ids] = success
        self._terminated[ids] = success | self.task.lost(now)
        self._truncated[ids] = (self._steps[ids] >= self.max_steps) & ~self._terminated[ids]
        reward = self.reward[SUCCESS] * success.astype(np.float32)
        if len(self.reward) > 1:
            terms = {TOGGLE: self._controller.toggled(ids), **self.task.terms(now, gripper)}
            reward += sum(w * terms[name] for name, w in self.reward.items() if name != SUCCESS)
        self._reward[ids] = reward

    def _fail(self, ids: np.ndarray, why: str) -> None:
        """End the episodes of `ids` as void: nothing of them may be learned from, and the others go on."""
        running = ids[~self.done[ids]]
        self._invalid[ids] = self._void[running] = True
        self.invalid_episodes += len(running)
        log.warning("%s: episodes of environments %s are void: %s", self.task.name, running, why)

    # -- observations ----------------------------------------------------------------------------------------

    def _look(self, ids: np.ndarray) -> Snapshot:
        memory = {name: values[ids] for name, values in self._memory.items()}
        return self.simulation.snapshot(ids)._replace(memory=memory)

    def snapshot(self) -> Snapshot:
        """The true state of all environments, with what their tasks remember."""
        return self._look(np.arange(self.num_envs))

    def _write_vectors(self, ids: np.ndarray, now: Snapshot) -> None:
        unseen = self._noise(ids, self._state_noise, STATE_STREAM)
        state = self._controller.observe(ids, now.tcp, now.tcp_turn, now.width, unseen)
        self._observation[STATE][ids, : len(STATE_NAMES)] = state
        if self.poses.names:
            seen = self.poses.read(now, state[:, :3], lambda k: self._error(ids, k))
            self._observation[STATE][ids, len(STATE_NAMES) :] = seen
        self._observation[PRIVILEGED][ids] = self.task.privileged(now)

    def _write_images(self, ids: np.ndarray) -> None:
        if self.cameras:
            hidden = self.task.hidden({name: m[ids] for name, m in self._memory.items()})
            try:
                if hidden:
                    self.simulation.hide(ids, hidden)
                images = self.simulation.images(ids)
            except SimulationLost as error:
                self._fail(np.arange(self.num_envs), str(error))
                return
            for name, frames in images.items():
                self._observation[image_key(name)][ids] = frames

    def _observe(self) -> Observation:
        """Copies: a caller may keep an observation while the next one is written."""
        return {key: value.copy() for key, value in self._observation.items()}

    def targets(self) -> tuple[np.ndarray, np.ndarray]:
        """The commanded tcp positions (N, 3) in m and orientations (N, 3, 3)."""
        controller = self._controller
        return controller.target.numpy().astype(float), controller.turn.numpy().astype(float)

    def expert(self, noise: float = 0.0) -> np.ndarray:
        """The scripted expert's actions (N, 7) float32 for the present states.

        It keeps no memory: calling it changes nothing, and it takes over from a policy at any step. `noise` adds a
        disturbance with that fraction of the step limits as standard deviation; clean labels are a second call.
        """
        try:
            now = self.snapshot()
        except SimulationLost as error:  # the next step tells of it
            self._fail(np.arange(self.num_envs), str(error))
            return np.zeros((self.num_envs, ACTION_DIM), np.float32)
        action = clip_action(self.task.expert(now, *self.targets()))
        return self.disturb(action, noise).astype(np.float32)

    def disturb(self, actions: np.ndarray, noise: float) -> np.ndarray:
        """`actions` (N, 7) with motion noise of `noise` times the step limits; the gripper's part stays."""
        if not noise:
            return actions
        noise = noise * self.task.finish.noise  # a task that needs precision takes less
        spread = noise * np.repeat([MAX_SHIFT, MAX_TURN], 3)
        actions = actions.copy()
        actions[:, :6] += spread * self._noise_rng.normal(size=(self.num_envs, 6))
        return clip_action(actions)

    def stats(self) -> dict[str, float]:
        """What the simulator tells of itself: of one in another process, restarts and the border's cost."""
        return getattr(self.simulation, "stats", dict)()

    def close_extras(self, **kwargs: Any) -> None:
        """Free the simulator."""
        self.simulation.close()


def _checked_reward(task: Task, weights: Mapping[str, float] | None) -> dict[str, float]:
    known = (SUCCESS, TOGGLE, *task.term_names)
    for name in weights or {}:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1, cutoff=0.4)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{task.name} has no reward term {name!r}, only {known}{hint}")
    return {SUCCESS: 1.0} | {name: float(value) for name, value in (weights or {}).items()}


def _sound(now: Snapshot) -> np.ndarray:
    """(n,) bool: everything is finite and nothing is farther or faster than could be."""
    good = np.isfinite(now.tcp).all(axis=1) & np.isfinite(now.width)
    for position in now.position.values():
        good &= (np.abs(position) < FARTHEST).all(axis=1)
    for velocity in now.velocity.values():
        good &= (np.abs(velocity) < FASTEST).all(axis=1)
    for turn in now.turn.values():
        good &= np.isfinite(turn).all(axis=(1, 2))
    return good


def _broken(actions: np.ndarray) -> list[int]:
    return np.flatnonzero(~np.isfinite(actions).all(axis=(1, 2))).tolist()
