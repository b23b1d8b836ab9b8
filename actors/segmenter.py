"""Turns executed chunks of N environments into segments, one per environment and stretch of an episode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from twinrl.env import IMAGE_PREFIX, PRIVILEGED, STATE, ChunkStep, Env, Observation

Sink = Callable[[dict[str, Any], dict[str, np.ndarray]], None]


class _Entry(NamedTuple):
    """One executed chunk of all environments."""

    step: ChunkStep
    version: int
    info: dict[str, np.ndarray]  # policy.* columns, (N, ...)
    extras: dict[str, np.ndarray]  # further step columns, (N, C, ...)


class Segmenter:
    """Collects chunks and hands out segments.

    `begin` starts episodes, `add` takes an executed chunk, `cut` emits what was collected since the last cut.
    An observation is stored once: a segment that continues an episode begins with the one that ended the last.
    """

    def __init__(self, env: Env, sink: Sink, *, source: str, task: str, prefix: str) -> None:
        self._env, self._sink = env, sink
        self._source, self._task, self._prefix = source, task, prefix
        self._log: list[_Entry] = []
        n = env.num_envs
        self._start = np.zeros(n, int)  # index in the log of the segment's first chunk
        self._first: list[Observation] = [{} for _ in range(n)]  # each segment's first observation
        self._first_step = np.zeros(n, int)
        self._chunks = np.zeros(n, int)  # policy chunks before this segment in the episode
        self._episode = [""] * n
        self._configurations: list[dict[str, Any]] = [{} for _ in range(n)]
        self._instructions = [env.instruction] * n
        self._episodes = 0

    def begin(self, observation: Observation, mask: np.ndarray) -> None:
        """New episodes start in `mask` (N,) with `observation` {key: (N, ...)}."""
        configurations, instructions = self._env.configurations(), self._env.instructions()
        for i in np.flatnonzero(mask):
            self._first[i] = {key: value[i].copy() for key, value in observation.items()}
            self._start[i] = len(self._log)
            self._first_step[i] = self._chunks[i] = 0
            self._episode[i] = f"{self._prefix}-{self._episodes}"
            self._episodes += 1
            self._configurations[i], self._instructions[i] = configurations[i], instructions[i]

    def add(
        self,
        step: ChunkStep,
        version: int = -1,
        info: dict[str, np.ndarray] | None = None,
        extras: dict[str, np.ndarray] | None = None,
    ) -> None:
        """An executed chunk, the version of the policy that acted and its `policy.*` columns (N, ...)."""
        self._log.append(_Entry(step, version, info or {}, extras or {}))

    def cut(self, mask: np.ndarray) -> int:
        """Emit the segments of the environments in `mask`; returns their number of transitions."""
        steps = sum(self._emit(i) for i in np.flatnonzero(mask))
        if (self._start == len(self._log)).all():
            self._log.clear()
            self._start[:] = 0
        return steps

    def drop(self, mask: np.ndarray) -> int:
        """Forget what was collected in `mask`, an episode that nobody wants; returns how many segments that was."""
        begun = sum(
            any(e.step.mask[i].any() for e in self._log[self._start[i] :])
            for i in np.flatnonzero(mask)
        )
        self._start[mask] = len(self._log)
        return begun

    def _emit(self, i: int) -> int:
        entries = [e for e in self._log[self._start[i] :] if e.step.mask[i].any()]
        self._start[i] = len(self._log)
        if not entries:
            return 0
        columns = self._columns(i, entries)
        steps = len(columns["action"])
        last = bool(columns["terminated"][-1] | columns["truncated"][-1])
        header = {
            "source": self._source,
            "task": self._task,
            "instruction": self._instructions[i],
            "region": str(self._configurations[i].get("region", "id")),
            "configuration": self._configurations[i],
            "episode": self._episode[i],
            "first_step": int(self._first_step[i]),
            "last": last,
        }
        self._sink(header, columns)
        final = entries[-1].step.observation
        self._first[i] = {key: value[i].copy() for key, value in final.items()}
        self._first_step[i] += steps
        self._chunks[i] += len(entries)
        return steps

    def _columns(self, i: int, entries: list[_Entry]) -> dict[str, np.ndarray]:
        masks = [e.step.mask[i] for e in entries]
        lengths = np.array([int(mask.sum()) for mask in masks])
        steps = int(lengths.sum())

        def rows(values: list[np.ndarray], dtype: str) -> np.ndarray:
            return np.concatenate(values).astype(dtype, copy=False)

        def executed(name: str, dtype: str) -> np.ndarray:
            return rows(
                [getattr(e.step, name)[i][m] for e, m in zip(entries, masks, strict=True)], dtype
            )

        first = self._first[i]
        chunk = np.arange(len(entries)) + self._chunks[i]
        acted = entries[0].version >= 0
        columns = {
            "action": executed("action", "<f4"),
            "reward": executed("reward", "<f4"),
            "terminated": executed("terminated", "|b1"),
            "truncated": executed("truncated", "|b1"),
            "success": executed("success", "|b1"),
            "intervention": np.zeros(steps, bool),
            "policy_version": np.repeat([e.version for e in entries], lengths).astype("<i8"),
            "chunk_id": (np.repeat(chunk, lengths) if acted else np.full(steps, -1)).astype("<i4"),
            "timestamp": (self._first_step[i] + 1.0 + np.arange(steps)) / self._env.control_hz,
            STATE: np.concatenate([first[STATE][None], executed("states", "<f4")]),
        }
        if entries[0].step.privileged is not None:
            columns[PRIVILEGED] = np.concatenate(
                [first[PRIVILEGED][None], executed("privileged", "<f4")]
            )
        boundaries = np.concatenate([[0], np.cumsum(lengths)])
        cameras = [key for key in first if key.startswith(IMAGE_PREFIX)]
        if cameras:
            columns["frame_step"] = boundaries.astype("<i4")
        for key in cameras:
            frames = [first[key], *(e.step.observation[key][i] for e in entries)]
            columns[key] = np.stack(frames)
        if entries[0].info:
            columns["chunk_step"] = boundaries[:-1].astype("<i4")
        for key in entries[0].info:
            columns[f"policy.{key}"] = np.stack([e.info[key][i] for e in entries])
        for key in entries[0].extras:
            columns[key] = rows(
                [e.extras[key][i][m] for e, m in zip(entries, masks, strict=True)], "<f4"
            )
        return columns
