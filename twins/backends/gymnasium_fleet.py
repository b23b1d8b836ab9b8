"""N gymnasium environments that are reset and stepped one by one or together, however they reset themselves.

`GymnasiumEnv` resets explicitly, with a seed, and never steps an environment that has ended. So an autoreset only
matters in that it must not hide the last observation, and must not pass for a step:

    DISABLED    the last observation is what `step` returned.
    NEXT_STEP   the same; the reset would be the next step, which is never made with an action that counts.
    SAME_STEP   `step` returned the next episode's first observation; the last one is in `info`.

Python 3.8 and any gymnasium from 0.29 on.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import Any, Callable, NamedTuple, Sequence

import gymnasium
import numpy as np

from twins.backends.gymnasium_mapping import unknown

VERSION = tuple(int(part) for part in gymnasium.__version__.split(".")[:2] if part.isdigit())
MASKS = VERSION >= (1, 1)  # SyncVectorEnv and AsyncVectorEnv reset a part: options["reset_mask"]
DISABLED, NEXT_STEP, SAME_STEP = MODES = ("DISABLED", "NEXT_STEP", "SAME_STEP")
FINAL_OBSERVATION = ("final_obs", "final_observation")  # since 1.1, before 1.0


class AutoresetError(ValueError):
    """An environment does not reset itself as it says."""


class Raw(NamedTuple):
    """What one environment answered to an action, or to a reset."""

    observation: Any
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: dict[str, Any] = {}  # noqa: RUF012  (nobody writes into it)
    error: Exception | None = None  # it failed, and the rest says nothing


def find(name: str) -> Any:
    """gymnasium's record of the environment `name` ("CartPole-v1", "gym_hil:gym_hil/PandaPickCube-v0")."""
    module, _, key = name.rpartition(":")
    without_display()  # before anything that asks for it is imported
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"{name}: cannot import {module!r}: {error}") from None
    if key not in gymnasium.registry:
        raise unknown("gymnasium environment", key, gymnasium.registry)
    return gymnasium.spec(key)


def without_display() -> None:
    """Let MuJoCo and pygame draw where there is no screen; what the user has set stays."""
    if sys.platform.startswith("linux") and not (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    ):
        os.environ.setdefault("MUJOCO_GL", "egl")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")


def make_fleet(
    name: str,
    count: int,
    *,
    vectorization: str = "single",
    autoreset: str | None = None,
    render: bool = False,
    max_steps: int | None = None,
    global_seed: bool = False,
    kwargs: dict[str, Any] | None = None,
) -> Singles | Together:
    """`count` environments `name`.

    `vectorization`: "single" steps them in turn, "async" each in a process of its own, "vector" uses the class
    that the environment brings for many. `autoreset` (one of MODES) is for such a class that does not tell its own.
    `global_seed` also seeds NumPy's global generator at each reset, for environments that draw from that.
    """
    spec = find(name)
    arguments = dict(kwargs or {})
    if render:
        arguments["render_mode"] = "rgb_array"
    if max_steps is not None:
        arguments["max_episode_steps"] = max_steps
    if vectorization == "single" and spec.entry_point is None:
        vectorization = "vector"  # it knows no other way
    try:
        if vectorization == "single":
            envs = [_make(spec, arguments) for _ in range(count)]
            return Singles(envs, global_seed)
        if vectorization == "async":
            return _processes(spec, count, arguments)
        if vectorization == "vector":
            return _vector(spec, count, arguments, autoreset)
    except (gymnasium.error.Error, TypeError, ImportError) as error:
        raise ValueError(f"cannot make gymnasium environment {spec.id!r}: {error}") from error
    raise unknown("vectorization", vectorization, ("single", "async", "vector"))


def _make(spec: Any, arguments: dict[str, Any]) -> gymnasium.Env:
    return gymnasium.make(spec, disable_env_checker=True, **arguments)


def _processes(spec: Any, count: int, arguments: dict[str, Any]) -> Together:
    if not MASKS:
        raise ValueError(
            f"vectorization 'async' needs gymnasium 1.1, here is {gymnasium.__version__}; use 'single'"
        )
    from gymnasium.vector import AsyncVectorEnv, AutoresetMode

    one = _Maker(spec, arguments)

    def make() -> Any:
        return AsyncVectorEnv([one] * count, autoreset_mode=AutoresetMode.DISABLED)

    return Together(make(), DISABLED, make)


class _Maker:
    """Makes one environment; travels to a process."""

    def __init__(self, spec: Any, arguments: dict[str, Any]) -> None:
        self._spec, self._arguments = spec, arguments

    def __call__(self) -> gymnasium.Env:
        without_display()
        return _make(self._spec, self._arguments)


def _vector(
    spec: Any, count: int, arguments: dict[str, Any], autoreset: str | None
) -> Singles | Together:
    if spec.vector_entry_point is None:
        raise ValueError(f"{spec.id} brings no class for many; use vectorization 'single'")
    mode = "vector_entry_point" if VERSION >= (1, 0) else "custom"

    def make(size: int) -> Any:
        return gymnasium.make_vec(spec, size, vectorization_mode=mode, **arguments)

    first = make(1)
    if autoreset_mode(first, autoreset) == DISABLED:  # only then it can be told to reset a part
        first.close()
        return Together(make(count), DISABLED)
    every = [first] + [make(1) for _ in range(count - 1)]
    return Singles([Alone(env, autoreset_mode(env, autoreset)) for env in every])


def autoreset_mode(env: Any, given: str | None = None) -> str:
    """One of MODES: what a VectorEnv says of itself, or else `given`, or what its gymnasium always does."""
    told = (env.metadata or {}).get("autoreset_mode", given)
    if told is None and VERSION < (1, 1):
        return SAME_STEP if VERSION < (1, 0) else NEXT_STEP
    name = str(getattr(told, "name", told)).upper().replace("_", "")  # "SameStep", "same_step"
    for mode in MODES:
        if name == mode.replace("_", ""):
            return mode
    if told is None:
        raise ValueError(
            f"{env} does not tell how it resets itself (metadata['autoreset_mode']); "
            f"say it: autoreset, one of {', '.join(MODES)}"
        )
    raise unknown("autoreset mode", told, MODES)


class Singles:
    """Environments that are independent of each other: `gymnasium.Env`, or `Alone`."""

    def __init__(self, envs: Sequence[Any], global_seed: bool = False) -> None:
        self._envs, self._global_seed = list(envs), global_seed
        self.count = len(self._envs)
        first = self._envs[0]
        self.observation_space, self.action_space = first.observation_space, first.action_space
        self.metadata = first.metadata or {}
        self.shows_the_end = not isinstance(first, Alone) or first.shows_the_end

    def reset(
        self, ids: Sequence[int], seeds: Sequence[int], options: Sequence[dict[str, Any]]
    ) -> list[Raw]:
        """The first observations of new episodes of `ids`."""
        answers = []
        for i, seed, option in zip(ids, seeds, options):
            if self._global_seed:
                np.random.seed(seed)
            try:
                observation, _ = self._envs[i].reset(seed=seed, options=dict(option) or None)
                answers.append(Raw(observation))
            except Exception as error:  # as in `step`
                answers.append(Raw(None, error=error))
        return answers

    def step(self, ids: Sequence[int], actions: Sequence[Any]) -> list[Raw]:
        """One step of `ids`; one that fails does not keep the others from theirs."""
        answers = []
        for i, action in zip(ids, actions):
            try:
                answers.append(Raw(*self._envs[i].step(action)))
            except AutoresetError:
                raise
            except Exception as error:  # a simulator that diverges raises what it likes
                answers.append(Raw(None, error=error))
        return answers

    def render(self, ids: Sequence[int]) -> list[Any]:
        """Pictures of `ids` as they are now."""
        return [self._envs[i].render() for i in ids]

    def close(self) -> None:
        """Close all."""
        for env in self._envs:
            env.close()


class Alone:
    """A VectorEnv of one, as a `gymnasium.Env`: so it resets when it is told to, whatever its mode."""

    def __init__(self, env: Any, mode: str) -> None:
        self._env, self._mode = env, mode
        self.observation_space, self.action_space = (
            env.single_observation_space,
            env.single_action_space,
        )
        self.metadata = env.metadata
        self.shows_the_end = mode != SAME_STEP

    def reset(self, *, seed: int, options: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        """As gymnasium.Env.reset."""
        observation, infos = self._env.reset(seed=seed, options=options)
        return _row(observation, 0), _info_of(infos, 0)

    def step(self, action: Any) -> Raw:
        """As gymnasium.Env.step."""
        return _answer(self._env.step(_batch([action], self.action_space)), 0, self._mode)

    def render(self) -> Any:
        """A picture."""
        return self._env.render()[0]

    def close(self) -> None:
        """Close."""
        self._env.close()


class Together:
    """A VectorEnv that resets a part when it is told to (`options["reset_mask"]`).

    All step at once, so those that have ended go on meanwhile, with actions that mean nothing and answers nobody reads.
    """

    def __init__(
        self, env: Any, mode: str | None = None, make: Callable[[], Any] | None = None
    ) -> None:
        """`make()` gives another one like `env`, for the reset after it failed; without it a failure is an error."""
        self._env, self._mode, self._make = env, mode or autoreset_mode(env), make
        self.count = env.num_envs
        self.observation_space = env.single_observation_space
        self.action_space = env.single_action_space
        self.metadata = env.metadata or {}
        self.shows_the_end = self._mode != SAME_STEP
        self._ended = np.zeros(self.count, bool)
        self._begun = False
        self.neutral: Any = None  # an action for those that have ended; set by the owner

    def reset(
        self, ids: Sequence[int], seeds: Sequence[int], options: Sequence[dict[str, Any]]
    ) -> list[Raw]:
        """The first observations of new episodes of `ids`."""
        if self._env is None:
            self._env, self._begun = self._make(), False
            self._ended[:] = False
        if not self._begun:
            self._env.reset(seed=[0] * self.count)
            self._begun = True
        first: dict[int, Raw] = {}
        waiting = list(zip(ids, seeds, options))
        while waiting:  # one reset takes one set of options
            option = waiting[0][2]
            part = [(i, seed) for i, seed, own in waiting if own == option]
            waiting = [entry for entry in waiting if entry[2] != option]
            observation = self._reset(dict(part), option)
            first.update((i, Raw(_row(observation, i))) for i, _ in part)
        return [first[i] for i in ids]

    def _reset(self, seeds: dict[int, int | None], option: dict[str, Any]) -> Any:
        mask = np.zeros(self.count, bool)
        mask[list(seeds)] = True
        every = [None if seeds.get(i) is None else int(seeds[i]) for i in range(self.count)]
        observation, _ = self._env.reset(seed=every, options={**option, "reset_mask": mask})
        self._ended[mask] = False
        return observation

    def step(self, ids: Sequence[int], actions: Sequence[Any]) -> list[Raw]:
        """One step; the answers of `ids`."""
        if self._mode == DISABLED and self._ended.any():
            self._reset({int(i): None for i in np.flatnonzero(self._ended)}, {})
        every = [self.neutral] * self.count
        for i, action in zip(ids, actions):
            every[i] = action
        try:
            answer = self._env.step(_batch(every, self.action_space))
        except (
            Exception
        ) as error:  # one of its processes died, or told of what its environment raised
            if self._make is None:
                raise
            self.close()
            return [Raw(None, error=error) for _ in ids]
        self._ended = np.logical_or(answer[2], answer[3])
        return [_answer(answer, i, self._mode) for i in ids]

    def render(self, ids: Sequence[int]) -> list[Any]:
        """Pictures of `ids` as they are now."""
        frames = self._env.render()
        return [frames[i] for i in ids]

    def close(self) -> None:
        """Close all."""
        env, self._env = self._env, None
        if env is not None:
            with contextlib.suppress(OSError, EOFError):  # to processes that are gone
                env.close(**({"terminate": True} if hasattr(env, "processes") else {}))


def _batch(actions: Sequence[Any], space: Any) -> np.ndarray:
    return np.stack([np.asarray(action) for action in actions]).astype(space.dtype)


def _answer(answer: tuple, i: int, mode: str) -> Raw:
    """Environment i's part of what a VectorEnv's step returned, with the observation that its action led to."""
    observation, reward, terminated, truncated, infos = answer
    info, own = _info_of(infos, i), _row(observation, i)
    ended = bool(terminated[i]) or bool(truncated[i])
    if ended and mode == SAME_STEP:
        key = next((k for k in FINAL_OBSERVATION if info.get(k) is not None), None)
        if key is None:
            raise AutoresetError(
                "an environment that resets in the same step gave no last observation: "
                f"info has {sorted(info)}, and none of {', '.join(FINAL_OBSERVATION)}; "
                "use vectorization 'single'"
            )
        own, info = info[key], dict(info.get("final_info") or {})
    return Raw(own, float(reward[i]), bool(terminated[i]), bool(truncated[i]), info)


def _row(batch: Any, i: int) -> Any:
    if isinstance(batch, dict):
        return {key: _row(value, i) for key, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(_row(value, i) for value in batch)
    return np.array(batch[i])


def _info_of(infos: dict[str, Any], i: int) -> dict[str, Any]:
    """Environment i's own info: a VectorEnv keeps an array for each key, with a mask of who has it."""
    own = {}
    for key, value in infos.items():
        if key.startswith("_") and key[1:] in infos:
            continue
        mask = infos.get("_" + key)
        if mask is not None and not mask[i]:
            continue
        if isinstance(value, dict):
            own[key] = _info_of(value, i)
        else:
            own[key] = value[i] if np.ndim(value) else value
    return own
