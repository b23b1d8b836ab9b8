"""Any gymnasium environment as an `Env`: by its id, with its keys and actions mapped.

Python 3.8 and any gymnasium from 0.29 on, so that a worker in an environment of its own can serve one. The classics
need nothing but the id; `OPTIONS` says what else can be told.
"""

from __future__ import annotations

from typing import Any, Sequence

import gymnasium
import numpy as np

from twinrl.env import (
    ACTION_DIM,
    PRIVILEGED,
    STATE,
    ChunkStep,
    EnvSpec,
    Observation,
    image_key,
)
from twins.backends import gymnasium_mapping as mapping
from twins.backends.gymnasium_fleet import Raw, find, make_fleet

OPTIONS = {
    "kwargs": "arguments of gymnasium.make",
    "vectorization": '"single" (default), "async" or "vector" (see gymnasium_fleet.make_fleet)',
    "autoreset": "how a vectorised environment resets itself, where its metadata does not say",
    "global_seed": "true: seed NumPy's global generator too, for environments that draw from it",
    "state": "keys that are observation.state; default: all numbers that are not privileged",
    "privileged": "keys that are privileged.state; default: none",
    "images": "{camera: key}; default: every picture, named by its key. `render` is render()",
    "action": "{dims, low, high} (see gymnasium_mapping.Actions)",
    "success": "{info: key} or {return: the least sum of rewards of an episode}",
    "regions": "{region: options of reset}; default: {id: {}}",
    "control_hz": "control steps a second; default: the metadata's render_fps, or 10",
}
UNLIMITED = 1000  # control steps, where neither the environment nor the caller sets a limit
BROKEN = (
    10  # episodes in a row that fail at their first step: not bad luck but a broken environment
)

_VECTOR = hasattr(gymnasium.vector, "AutoresetMode")


class GymnasiumEnv(gymnasium.vector.VectorEnv if _VECTOR else object):
    """N environments of one id (`twinrl.env.Env`); with gymnasium 1.1 or newer also a VectorEnv, autoreset DISABLED.

    Every episode starts from a seed of its own, so its configuration {"task", "region", "seed", "options"} repeats it,
    as far as the environment draws from its seed alone. An answer that is not finite, or an exception, voids the
    episode of that environment (`ChunkStep.invalid`); its last good observation stays until it is reset.
    """

    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.DISABLED} if _VECTOR else {}

    def __init__(
        self,
        task: str,
        num_envs: int,
        *,
        seed: int = 0,
        cameras: Sequence[str] | None = None,
        image_size: int = 64,
        max_steps: int | None = None,
        region: str = "id",
        instruction: str | None = None,
        device: str = "cpu",
        fleet: Any = None,
        **options: Any,
    ) -> None:
        """`task` is the id, `options` are OPTIONS. `cameras`: which pictures; default those of the observation.

        `device` says where TwinRL's own renderer works, and nothing here. `fleet` is what to play in instead of
        making it by `task`: a Singles or Together.
        """
        if num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}, must be at least 1")
        for name in options:
            if name not in OPTIONS:
                raise mapping.unknown("option of the gymnasium backend", name, OPTIONS)
        self.task, self.num_envs, self.render_mode, self.closed = task, num_envs, None, False
        registered = find(task)
        self.image_size = image_size
        self._regions = {str(k): dict(v or {}) for k, v in (options.get("regions") or {}).items()}
        self._regions = self._regions or {"id": {}}
        if "id" not in self._regions or "all" in self._regions:
            raise ValueError(
                f"regions are {sorted(self._regions)}; one must be 'id', and 'all' means any of them"
            )
        self.region = self._checked_region(region)
        self._fleet = fleet or make_fleet(
            task,
            num_envs,
            vectorization=options.get("vectorization", "single"),
            autoreset=options.get("autoreset"),
            render=mapping.RENDER in (cameras or ()),
            max_steps=max_steps,
            global_seed=options.get("global_seed", False),
            kwargs=options.get("kwargs"),
        )
        self._map(cameras, options)
        self.max_steps = max_steps or registered.max_episode_steps or UNLIMITED
        self.control_hz = float(
            options.get("control_hz") or self._fleet.metadata.get("render_fps") or 10.0
        )
        self.instruction = instruction or task
        self._succeeded = mapping.Success(options.get("success"), registered.reward_threshold)
        self.spec = EnvSpec(
            state_names=self.state_names,
            privileged_names=self.privileged_names,
            cameras=self.cameras,
            image_size=image_size,
            instruction=self.instruction,
            max_steps=self.max_steps,
            control_hz=self.control_hz,
            expert=False,
            regions=tuple(self._regions),
        )
        self._define_spaces()
        self._rng = np.random.default_rng(seed)
        self._allocate()

    def _map(self, cameras: Sequence[str] | None, options: dict[str, Any]) -> None:
        space = self._fleet.observation_space
        privileged = list(options.get("privileged") or [])
        hidden = set(mapping.Numbers(space, privileged, "privileged").keys)
        state = options.get("state")
        if state is None:
            state = [key for key in mapping.numeric_keys(space) if key not in hidden]
        self._state = mapping.Numbers(space, state, "state")
        self._privileged = mapping.Numbers(space, privileged, "privileged")
        self.state_names, self.state_dim = self._state.names, len(self._state.names)
        self.privileged_names = self._privileged.names
        self.privileged_dim = len(self._privileged.names)
        pictures = mapping.image_keys(space)
        for camera, key in (options.get("images") or {}).items():
            if key not in mapping.leaves(space):
                raise mapping.unknown("observation key of images", key, mapping.leaves(space))
            pictures[str(camera)] = key
        self.cameras = tuple(pictures) if cameras is None else tuple(cameras)
        known = [*pictures, mapping.RENDER]
        for camera in self.cameras:
            if camera not in known:
                raise mapping.unknown(f"camera of {self.task}", camera, known)
        if mapping.RENDER in self.cameras:
            if "rgb_array" not in self._fleet.metadata.get("render_modes", ["rgb_array"]):
                raise ValueError(f"{self.task} cannot render pictures, so has no camera 'render'")
            if not self._fleet.shows_the_end:
                raise ValueError(
                    f"{self.task} resets in the same step, so the camera 'render' would miss each "
                    "episode's end; use vectorization 'single'"
                )
            self._try_render()
        self._pictures = pictures
        self._actions = mapping.Actions(self._fleet.action_space, **(options.get("action") or {}))
        self._fleet.neutral = self._actions.neutral

    def _try_render(self) -> None:
        """Say now, and not in the middle of a job, what rendering lacks."""
        try:
            first = self._fleet.reset([0], [0], [{}])[0]
            if first.error is not None:
                raise first.error
            mapping.resized(self._fleet.render([0])[0], self.image_size)
        except Exception as error:  # each environment draws with something else
            raise ValueError(f"{self.task} cannot render: {error}") from error

    def _define_spaces(self) -> None:
        box, pixels = gymnasium.spaces.Box, (self.image_size, self.image_size, 3)
        spaces = {
            STATE: box(-np.inf, np.inf, (self.state_dim,), np.float32),
            PRIVILEGED: box(-np.inf, np.inf, (self.privileged_dim,), np.float32),
        }
        for camera in self.cameras:
            spaces[image_key(camera)] = box(0, 255, pixels, np.uint8)
        self.single_action_space = box(self._actions.low, self._actions.high, dtype=np.float32)
        self.single_observation_space = gymnasium.spaces.Dict(spaces)
        batch = gymnasium.vector.utils.batch_space
        self.action_space = batch(self.single_action_space, self.num_envs)
        self.observation_space = batch(self.single_observation_space, self.num_envs)

    def _allocate(self) -> None:
        count = self.num_envs
        self._configurations: list[dict[str, Any]] = [{} for _ in range(count)]
        self._raw: list[Any] = [
            None
        ] * count  # last good observations, as the environments gave them
        self._steps = np.zeros(count, int)
        self._returns = np.zeros(count)
        self._failures = np.zeros(count, int)  # in a row, at an episode's first step
        # Nothing can be stepped before its first reset.
        self._terminated, self._truncated = np.ones(count, bool), np.zeros(count, bool)
        self._invalid, self._success = np.zeros(count, bool), np.zeros(count, bool)
        self._observation = {
            key: np.zeros((count, *space.shape), space.dtype)
            for key, space in self.single_observation_space.spaces.items()
        }
        self._unheard = np.zeros(count, bool)  # failed in a reset: the next step tells of it
        self.invalid_episodes, self.last_failure = (
            0,
            "",
        )  # whose environment failed; how one did last

    # -- resets ----------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """See `twinrl.env.Env.reset`; `info` holds the configurations.

        A given configuration may be partial: what it leaves out is drawn.
        """
        options = options or {}
        for name in options:
            if name not in ("reset_mask", "configurations", "region"):
                raise mapping.unknown(
                    "reset option", name, ("reset_mask", "configurations", "region")
                )
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        mask = np.asarray(options.get("reset_mask", np.ones(self.num_envs)), bool)
        given = options.get("configurations") or [None] * self.num_envs
        for name, size in (("reset_mask", len(mask)), ("configurations", len(given))):
            if size != self.num_envs:
                raise ValueError(f"{name} has {size} entries for {self.num_envs} environments")
        region = self._checked_region(options.get("region", self.region))
        ids = np.flatnonzero(mask)
        if len(ids):
            drawn = [self._completed(given[i], region) for i in ids]
            self._begin(ids, drawn)
        return self._observe(), {"configurations": self.configurations()}

    def draw(self, region: str) -> dict[str, Any]:
        """A configuration from `region`, drawn with the environment's own generator."""
        return self._completed(None, self._checked_region(region))

    def _completed(self, given: dict[str, Any] | None, region: str) -> dict[str, Any]:
        given = dict(given or {})
        known = ("task", "region", "seed", "options")
        for name in given:
            if name not in known:
                raise mapping.unknown("configuration key", name, known)
        if given.get("task", self.task) != self.task:
            raise ValueError(f"configuration is of task {given['task']!r}, not {self.task!r}")
        # Drawn always, so that one seed of ours means one sequence of the rest.
        seed, pick = int(self._rng.integers(2**31)), int(self._rng.integers(len(self._regions)))
        region = self._checked_region(given.get("region", region))
        region = list(self._regions)[pick] if region == "all" else region
        drawn = {
            "task": self.task,
            "region": region,
            "seed": seed,
            "options": dict(self._regions[region]),
        }
        drawn.update(given)
        drawn["region"] = region
        return drawn

    def _begin(self, ids: np.ndarray, configurations: list[dict[str, Any]]) -> None:
        first = self._fleet.reset(
            ids, [c["seed"] for c in configurations], [c["options"] for c in configurations]
        )
        self._steps[ids], self._returns[ids] = 0, 0.0
        for flags in (self._terminated, self._truncated, self._invalid, self._success):
            flags[ids] = False
        for i, configuration, raw in zip(ids, configurations, first):
            self._configurations[i] = configuration
            self._unheard[i] = not self._see(i, raw)
        self._draw_pictures(ids)

    def configurations(self) -> list[dict[str, Any]]:
        """The configuration of each environment's present episode; passing one to `reset` repeats it."""
        return list(self._configurations)

    def instructions(self) -> list[str]:
        """N, what the policy is told: the same in all episodes."""
        return [self.instruction] * self.num_envs

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
        return (result.observation, result.reward[:, 0], *flags, infos)

    def step_chunk(self, actions: np.ndarray) -> ChunkStep:
        """See `twinrl.env.Env.step_chunk`; `reward` is the environment's own."""
        actions = np.asarray(actions, np.float32)
        count, chunk = self.num_envs, actions.shape[1] if actions.ndim == 3 else 0
        if not chunk or actions.shape != (count, chunk, ACTION_DIM):
            raise ValueError(f"actions are {actions.shape}, expected ({count}, C, {ACTION_DIM})")
        wrong = np.flatnonzero(~np.isfinite(actions).all(axis=(1, 2)))
        if len(wrong):
            raise ValueError(f"actions of environments {wrong.tolist()} are not finite")
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
            mapped = self._actions(actions[ids, k])
            answers = self._fleet.step(ids, mapped.own)
            for i, action, raw in zip(ids, mapped.executed, answers):
                if not self._take(i, raw):
                    continue
                executed[i, k], reward[i, k], mask[i, k] = action, raw.reward, True
                states[i, k] = self._observation[STATE][i]
                privileged[i, k] = self._observation[PRIVILEGED][i]
                terminated[i, k], truncated[i, k] = self._terminated[i], self._truncated[i]
                success[i, k] = self._success[i]
            ended = ids[self.done[ids]]
            self._draw_pictures(ended)  # now: environments that step together go on meanwhile
        self._draw_pictures(np.flatnonzero(begun & ~self.done))
        invalid = begun & self._invalid | self._unheard
        self._unheard[:] = False
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
        """(N,) bool: the episode has ended or is void, or none was begun."""
        return self._terminated | self._truncated | self._invalid

    def _take(self, i: int, raw: Raw) -> bool:
        """Take environment i's answer to an action; False: it is no answer, and the episode void."""
        if not self._see(i, raw):
            return False
        self._failures[i] = 0
        self._steps[i] += 1
        self._returns[i] += raw.reward
        self._terminated[i] = raw.terminated
        late = raw.truncated or self._steps[i] >= self.max_steps
        self._truncated[i] = late and not raw.terminated
        ended = raw.terminated or late
        self._success[i] = self._succeeded(raw.info, self._returns[i], ended)
        return True

    def _see(self, i: int, raw: Raw) -> bool:
        """Take what environment i shows; False: it shows nothing that makes sense."""
        problem = raw.error and f"{type(raw.error).__name__}: {raw.error}"
        if problem is None:
            state, privileged = self._state(raw.observation), self._privileged(raw.observation)
            # A sum in float64 is finite just if every float32 is, and quicker than looking at each.
            total = abs(raw.reward) + np.abs(state).sum(dtype=np.float64)
            total += np.abs(privileged).sum(dtype=np.float64)
            if not np.isfinite(total):
                numbers = {"state": state, "privileged state": privileged, "reward": raw.reward}
                broken = [name for name, value in numbers.items() if not np.isfinite(value).all()]
                problem = f"{' and '.join(broken)} not finite" if broken else None
        if problem is not None:
            self._void(i, problem, raw.error)
            return False
        self._observation[STATE][i], self._observation[PRIVILEGED][i] = state, privileged
        self._raw[i] = raw.observation
        return True

    def _void(self, i: int, problem: str, error: Exception | None) -> None:
        self._invalid[i] = True
        self.invalid_episodes += 1
        self.last_failure = f"environment {i}, after {self._steps[i]} steps: {problem}"
        self._failures[i] = self._failures[i] + 1 if self._steps[i] == 0 else 0
        if self._failures[i] >= BROKEN:
            raise RuntimeError(
                f"{self.task}: {BROKEN} episodes in a row failed at their first step; "
                f"the last, {self._configurations[i]}, in {self.last_failure}"
            ) from error

    # -- observations ----------------------------------------------------------------------------------------

    def _draw_pictures(self, ids: np.ndarray) -> None:
        """Write the images of `ids`; one whose episode is void keeps its last good ones."""
        ids = ids[~self._invalid[ids]]
        if not len(ids):
            return
        for camera in self.cameras:
            images = self._observation[image_key(camera)]
            if camera in self._pictures:
                for i in ids:
                    images[i] = mapping.picture(
                        self._raw[i], self._pictures[camera], self.image_size
                    )
            else:
                for i, frame in zip(ids, self._fleet.render(ids)):
                    images[i] = mapping.resized(frame, self.image_size)

    def _observe(self) -> Observation:
        """Copies: a caller may keep an observation while the next one is written."""
        return {key: value.copy() for key, value in self._observation.items()}

    def _checked_region(self, region: str) -> str:
        if region not in self._regions and region != "all":
            raise mapping.unknown(
                f"region of {self.task} (twins.options.regions)", region, [*self._regions, "all"]
            )
        return region

    def __repr__(self) -> str:
        return f"GymnasiumEnv({self.task}, num_envs={self.num_envs})"

    def close(self, **kwargs: Any) -> None:
        """Close the environments; again does nothing."""
        if not self.closed:
            self.closed = True
            self._fleet.close()
