"""`DeviceTwinEnv`: `TwinEnv` with everything on one device, for thousands of environments on a GPU.

Physics, images, inverse kinematics, reward and success are computed for all environments at once, and a mask says
who takes part. A control step never waits for the device: what the host has to know (who is done) it asks for.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
import warp as wp

from twinrl.core.gripper import TOGGLED
from twinrl.env import ACTION_DIM, PRIVILEGED, STATE, ChunkStep, Observation, image_key
from twins import control, rotation
from twins.device_worlds import DeviceWorlds
from twins.env import (
    ACTION_STREAM,
    MAX_SHIFT,
    MAX_TURN,
    STATE_STREAM,
    SUCCESS,
    TOGGLE,
    TwinEnv,
)
from twins.errands import ERRAND, errand_number
from twins.observe import seed_of_thing
from twins.snapshot import Snapshot

log = logging.getLogger(__name__)

Tensor = torch.Tensor
Array = np.ndarray | Tensor


class DeviceTwinEnv(TwinEnv):
    """N environments of one task on one device (`twinrl.env.Env`).

    With the backend's option `tensors` everything that it gives is a tensor of the device, and observations are its
    own buffers, written over by the next step or reset; otherwise it gives NumPy arrays like any other environment.
    """

    simulation: DeviceWorlds

    def _allocate(self) -> None:
        with self.simulation.here():
            self._allocate_here()

    def _allocate_here(self) -> None:
        worlds, count = self.simulation, self.num_envs
        self.tensors = worlds.tensors
        self.device = torch.device(wp.device_to_torch(worlds.device))

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros((count, *shape), dtype=dtype, device=self.device)

        self._configurations: list[dict[str, Any]] = [{} for _ in range(count)]
        self._controller = control.Controller(
            count, device=str(worlds.device), gripper=self.gripper
        )
        controller = self._controller
        self._target, self._turn = wp.to_torch(controller.target), wp.to_torch(controller.turn)
        self._executed, self._path = wp.to_torch(controller.executed), wp.to_torch(controller.path)
        self._opening = wp.to_torch(controller.opening)
        self._commanded = wp.to_torch(controller.actions)
        self._state_noise, self._action_noise, self._pose_noise = zeros(), zeros(), zeros()
        self._drawn_noise = zeros(6)
        self._seeds, self._steps = zeros(dtype=torch.int32), zeros(dtype=torch.int32)
        self._latency = zeros(dtype=torch.int32)
        # Nothing can be stepped before its first reset.
        self._terminated, self._truncated = zeros(dtype=torch.bool), zeros(dtype=torch.bool)
        self._success, self._invalid = zeros(dtype=torch.bool), zeros(dtype=torch.bool)
        self._terminated[:] = True
        self._waiting = np.ones(count, bool)  # `done`, as far as the host knows it
        self._told = np.zeros(count, bool)  # of the invalid ones
        self._refused = zeros(dtype=torch.bool)  # ended by actions that were not finite
        self._reward = zeros()
        self._memory = {
            name: zeros(*m.shape, dtype=getattr(torch, m.dtype))
            for name, m in self.task.memory.items()
        }
        pixels = self.image_size, self.image_size, 3
        self._images = {name: zeros(*pixels, dtype=torch.uint8) for name in self.cameras}
        self._measured = wp.to_torch(self._controller.state)
        buffers = {
            STATE: zeros(self.state_dim) if self.poses.names else self._measured,
            PRIVILEGED: zeros(self.privileged_dim),
            **{image_key(name): images for name, images in self._images.items()},
        }
        self._observation = {key: buffers[key] for key in self.single_observation_space}

    # -- resets ----------------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """See `TwinEnv.reset`; the mask may be a tensor. Configurations are drawn on the host, so it waits."""
        self.check()
        options = dict(options or {})
        if isinstance(options.get("reset_mask"), Tensor):
            options["reset_mask"] = options["reset_mask"].cpu().numpy()
        return super().reset(seed=seed, options=options)

    def _begin(self, ids: np.ndarray) -> None:
        configurations = [self._configurations[i] for i in ids]
        self.simulation.configure(ids, configurations)
        draws = [configuration["draw"] for configuration in configurations]
        whole = [
            ids,
            [draw["latency"] for draw in draws],
            [control.seed_of(configuration["seed"]) for configuration in configurations],
        ]
        whole = torch.from_numpy(np.array(whole, np.int64)).to(self.device)
        rows = whole[0]
        names = "state_noise", "action_noise", "pose_noise"
        spreads = [[draw.get(name, 0.0) for draw in draws] for name in names]
        spreads = torch.from_numpy(np.array(spreads, np.float32)).to(self.device)
        self._latency[rows], self._seeds[rows] = whole[1].int(), whole[2].int()
        for field, values in zip(
            (self._state_noise, self._action_noise, self._pose_noise), spreads, strict=True
        ):
            field[rows] = values
        self._steps[rows] = 0
        flags = self._terminated, self._truncated, self._success, self._invalid, self._refused
        for field in (*flags, *self._memory.values()):
            field[rows] = 0
        if ERRAND in self._memory:
            numbers = [errand_number(self.task, configuration) for configuration in configurations]
            self._memory[ERRAND][rows] = torch.tensor(numbers, dtype=torch.int32).to(self.device)
        self._waiting[ids] = self._told[ids] = False
        begun = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        begun[rows] = True
        with self.simulation.here():
            self._controller.begin_all(self.simulation.joints, self._latency, begun)
        self._write_vectors(begun, self._look())
        self._write_images(begun, ids)

    # -- steps -----------------------------------------------------------------------------------------------------

    def step(self, actions: Array) -> tuple[Observation, Array, Array, Array, dict[str, Any]]:
        """One control step with images. Environments that are done stay as they are, with reward 0."""
        result = self.step_chunk(actions[:, None])
        truncated = self._truncated | self._invalid
        infos = {
            "success": self._given(self._success),
            "action": result.action[:, 0],
            "invalid": self._given(self._invalid),
        }
        flags = self._given(self._terminated), self._given(truncated)
        return result.observation, result.reward[:, 0], *flags, infos

    def step_chunk(self, actions: Array) -> ChunkStep:
        """See `twinrl.env.Env.step_chunk`.

        With `tensors` it does not wait: an environment whose actions are not finite becomes invalid, and the next
        `reset` or `check` raises the error that is raised here otherwise.
        """
        count, chunk = self.num_envs, actions.shape[1] if actions.ndim == 3 else 0
        if not chunk or tuple(actions.shape) != (count, chunk, ACTION_DIM):
            shape = tuple(actions.shape)
            raise ValueError(f"actions are {shape}, expected ({count}, C, {ACTION_DIM})")
        actions = torch.as_tensor(actions, dtype=torch.float32).detach().to(self.device)
        finite = torch.isfinite(actions).flatten(1).all(dim=1)
        begun = ~self._ended
        if self.tensors:
            self._refused |= begun & ~finite
            self._invalid |= begun & ~finite
        elif not bool(finite.all()):
            broken = (~finite).nonzero()[:, 0].tolist()
            raise ValueError(f"actions of environments {broken} are not finite")
        asked = None if self.tensors else np.flatnonzero(~self._waiting)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros((count, chunk, *shape), dtype=dtype, device=self.device)

        states, privileged = zeros(self.state_dim), zeros(self.privileged_dim)
        executed, reward = zeros(ACTION_DIM), zeros()
        terminated, truncated, success, mask = (zeros(dtype=torch.bool) for _ in range(4))
        for k in range(chunk):
            went, done = self._advance(actions[:, k])
            mask[:, k] = went
            executed[:, k] = done * went[:, None]
            reward[:, k] = self._reward * went
            states[:, k] = self._observation[STATE] * went[:, None]
            privileged[:, k] = self._observation[PRIVILEGED] * went[:, None]
            for column, flags in (
                (terminated, self._terminated),
                (truncated, self._truncated),
                (success, self._success),
            ):
                column[:, k] = flags & went
        self._write_images(begun & ~self._invalid, asked)
        invalid = self._invalid & begun
        if not self.tensors:
            self.check()
        given = self._given
        return ChunkStep(
            observation=self._observe(),
            states=given(states),
            privileged=given(privileged),
            action=given(executed),
            reward=given(reward),
            terminated=given(terminated),
            truncated=given(truncated),
            success=given(success),
            mask=given(mask),
            invalid=given(invalid),
        )

    @property
    def _ended(self) -> Tensor:
        return self._terminated | self._truncated | self._invalid

    @property
    def done(self) -> Array:
        """(N,) bool: the episode has ended, or none was begun."""
        return self._given(self._ended)

    def _advance(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Execute one control step of all that are not done: who came through (N,), the clipped actions (N, 7)."""
        worlds, active = self.simulation, ~self._ended
        with worlds.here():
            unseen = self._noise(self._action_noise, ACTION_STREAM)
            self._controller.command_all(actions, worlds.joints, active, unseen)
        worlds.step(self._path, self._opening, active)
        went = active & ~worlds.diverged
        self._invalid |= active & worlds.diverged
        self._steps += went
        now = self._look()
        for name, value in self.task.remember(now).items():
            kept = self._memory[name]
            taken = went.reshape(-1, *[1] * (kept.ndim - 1))
            kept.copy_(torch.where(taken, value, kept))
            now.memory[name] = kept
        self._write_vectors(went, now)
        self._judge(went, now, self._executed[:, 6])
        return went, self._executed

    def _judge(self, went: Tensor, now: Snapshot, gripper: Tensor) -> None:
        """Success, reward and ending of the step that led to `now`, of those that took it."""
        success = self.task.success(now, gripper)
        terminated = success | self.task.lost(now)
        truncated = (self._steps >= self.max_steps) & ~terminated
        reward = self.reward[SUCCESS] * success.float()
        if len(self.reward) > 1:
            terms = {TOGGLE: self._toggled(), **self.task.terms(now, gripper)}
            reward += sum(w * terms[name] for name, w in self.reward.items() if name != SUCCESS)
        for kept, new in (
            (self._success, success),
            (self._terminated, terminated),
            (self._truncated, truncated),
            (self._reward, reward),
        ):
            kept.copy_(torch.where(went, new, kept))

    def _toggled(self) -> Tensor:
        """(N,) bool: the last step opened or closed the gripper."""
        newest, earlier = self._commanded[:, 0, 6], self._commanded[:, 1, 6]
        return (newest - earlier).abs() > TOGGLED

    def check(self) -> None:
        """Look at what went wrong: count and tell of invalid episodes, raise on a caller's or a setting's mistake.

        Waits for the device. Called by each reset, and by each step that gives NumPy arrays.
        """
        self._waiting = self._ended.cpu().numpy()
        invalid = self._invalid.cpu().numpy()
        failed = np.flatnonzero(invalid & ~self._told)
        self._told |= invalid
        if len(failed):
            self.invalid_episodes += len(failed)
            shown = failed[:20].tolist()
            log.warning("%s: %d episodes are void: %s", self.task.name, len(failed), shown)
        if self.tensors and bool(self._refused.any()):
            broken = self._refused.nonzero()[:, 0].tolist()
            self._refused[:] = False
            raise ValueError(f"actions of environments {broken} are not finite")
        self.simulation.check_waiting()

    # -- observations ----------------------------------------------------------------------------------------------

    def _look(self, ids: np.ndarray | None = None) -> Snapshot:
        return self.simulation.snapshot()._replace(memory=dict(self._memory))

    def snapshot(self) -> Snapshot:
        """The true state of all environments, with what their tasks remember."""
        return Snapshot(
            *(
                {name: self._given(value) for name, value in part.items()}
                if isinstance(part, dict)
                else self._given(part)
                for part in self._look()
            )
        )

    def _noise(self, spread: Tensor, stream: int) -> Tensor:
        seeds, steps, drawn = self._seeds, self._steps, self._drawn_noise
        control.noise(seeds, steps, spread, stream, drawn)
        return drawn

    def _error(self, k: int) -> Tensor:
        seeds = seed_of_thing(self._seeds, k)
        control.noise(seeds, self._steps, self._pose_noise, STATE_STREAM, self._drawn_noise)
        return self._drawn_noise

    def _write_vectors(self, who: Tensor, now: Snapshot) -> None:
        with self.simulation.here():
            unseen = self._noise(self._state_noise, STATE_STREAM)
            self._controller.observe_all(now.tcp, now.tcp_turn, now.width, who, unseen)
            if self.poses.names:
                seen = self.poses.read(now, self._measured[:, :3], self._error)
                whole = torch.cat([self._measured, seen], dim=1)
                kept = self._observation[STATE]
                kept.copy_(torch.where(who[:, None], whole, kept))
        known = self._observation[PRIVILEGED]
        known.copy_(torch.where(who[:, None], self.task.privileged(now), known))

    def _write_images(self, seen: Tensor, ids: np.ndarray | None) -> None:
        if self.cameras:
            self.simulation.hide(self.task.hidden(self._memory))
            self.simulation.images(self._images, seen, ids)

    def _given(self, value: Tensor) -> Array:
        """What leaves the environment: a copy, on the device or not."""
        if self.tensors:
            return value.clone()
        return value.to("cpu", copy=True).numpy()

    def _observe(self) -> Observation:
        if self.tensors:
            return dict(self._observation)
        return {key: self._given(value) for key, value in self._observation.items()}

    def targets(self) -> tuple[Array, Array]:
        """The commanded tcp positions (N, 3) in m and orientations (N, 3, 3)."""
        return self._given(self._target), self._given(self._turn)

    def expert(self, noise: float = 0.0) -> Array:
        """See `TwinEnv.expert`."""
        action = _clip(self.task.expert(self._look(), self._target, self._turn).float())
        return self._given(self._disturbed(action, noise))

    def disturb(self, actions: Array, noise: float) -> Array:
        """`actions` (N, 7) with motion noise of `noise` times the step limits; the gripper's part stays."""
        given = torch.as_tensor(actions, dtype=torch.float32, device=self.device)
        return self._given(self._disturbed(given, noise)) if noise else actions

    def _disturbed(self, actions: Tensor, noise: float) -> Tensor:
        if not noise:
            return actions
        noise = noise * self.task.finish.noise  # a task that needs precision takes less
        spread = noise * np.repeat([MAX_SHIFT, MAX_TURN], 3)
        drawn = spread * self._noise_rng.normal(size=(self.num_envs, 6))
        moved = actions[:, :6] + torch.from_numpy(drawn.astype(np.float32)).to(self.device)
        return _clip(torch.cat([moved, actions[:, 6:]], dim=1))


def _clip(action: Tensor) -> Tensor:
    """`twins.env.clip_action` of tensors (n, 7)."""
    shift = rotation.clip_norm(action[:, :3], MAX_SHIFT)
    turn = rotation.clip_norm(action[:, 3:6], MAX_TURN)
    return torch.cat([shift, turn, action[:, 6:].clip(0.0, 1.0)], dim=1)
