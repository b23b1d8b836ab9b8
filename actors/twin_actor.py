"""The twin actor: one process with many simulated environments, a policy and a writer.

It does what the job's schedule asks for, one thing at a time: demonstrate, expand, label scenes, collect, evaluate.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from actors.demonstrate import record_successes
from actors.evaluate import Outcome, draw_configurations, evaluate
from actors.remote_runner import Runner
from actors.retries import Retries
from actors.segmenter import Segmenter
from twinrl.core.errors import DeadlineError, TwinRLError
from twinrl.env import ChunkStep, Env
from twinrl.weights import WeightSource

SAMPLED_CHUNK = 2  # control steps between two observations of random play
WAIT_FOR_WEIGHTS = (
    120.0  # s; a learner that publishes nothing for so long is reported, not waited for
)
TELL_SECONDS = 30.0  # between two events about simulations that failed


class TwinActor:
    """Everything arrives as factories and plain values, so the same class runs in a test without Ray.

    `make_env(num_envs, **options)` builds environments, `make_runner()` a Runner, `make_writer(name)` a
    replay writer, `make_reader()` a replay reader, `make_reporter(name, stats)` a metrics reporter,
    `make_retargeter(env, demonstrations, rng)` what re-targets demonstrations, `label_scenes(env, count, rng)`
    labelled renders.
    """

    def __init__(
        self,
        name: str,
        *,
        seed: int,
        task: str,
        num_envs: int,
        make_env: Callable[..., Env],
        make_runner: Callable[[], Runner],
        make_writer: Callable[[str], Any],
        make_reader: Callable[[], Any],
        make_reporter: Callable[..., Any],
        weights: WeightSource,
        make_retargeter: Callable[..., Any] | None = None,
        label_scenes: Callable[..., Any] | None = None,
    ) -> None:
        self.name, self._seed, self._task, self._num_envs = name, seed, task, num_envs
        self._make_env, self._make_retargeter = make_env, make_retargeter
        self._label_scenes, self._make_reader = label_scenes, make_reader
        self._runner = make_runner()
        # A restarted actor is a new writer: the old one's unacknowledged segments are lost with it, and twins
        # make new ones; its numbering must not be confused with ours.
        self._writer = make_writer(f"{name}-{time.time_ns():x}")
        self._weights = weights
        self._stop, self._paused = threading.Event(), threading.Event()
        self._doing = "idle"
        self._steps = self._episodes = 0
        # Episodes whose simulation diverged or died, and their segments that were dropped whole.
        self._invalid = self._void_segments = 0
        self._told = -TELL_SECONDS
        self._env: Env | None = None
        self._recent: dict[str, list[bool]] = {"id": [], "ood": []}
        self._clock, self._clock_steps, self._lag = time.monotonic(), 0, 0
        self._waited = 0.0
        self._reporter = make_reporter(name, self.stats)
        self._reporter.event("info", f"{name} is ready")

    def ping(self) -> str:
        """The actor's name, once it is ready."""
        return self.name

    def stop(self) -> None:
        """End what is being done at the next chunk boundary."""
        self._stop.set()

    def pause(self, paused: bool) -> None:
        """Hold collection at the next chunk boundary, or go on."""
        self._paused.set() if paused else self._paused.clear()

    def close(self) -> None:
        """Hand over what is written and close."""
        self.stop()
        self._writer.close()
        self._reporter.close()

    def stats(self) -> dict[str, Any]:
        """Rates since the last call, totals, and what the actor is doing."""
        now, steps = time.monotonic(), self._steps
        rate = (steps - self._clock_steps) / max(now - self._clock, 1e-6)
        self._clock, self._clock_steps = now, steps
        data = {
            "actor/stage": "paused" if self._paused.is_set() else self._doing,
            "env/steps_per_s": rate,
            "env/steps": steps,
            "env/episodes": self._episodes,
            "env/invalid_episodes": self._invalid,
            "env/dropped_segments": self._void_segments,
            "policy/version": self._runner.version,
            "policy/lag": self._lag,
            "actor/waited_s": self._waited,
        }
        for region, results in self._recent.items():
            if results:
                data[f"env/success_{region}"] = float(np.mean(results[-200:]))
        data.update(self._writer.stats())
        data.update(getattr(self._env, "stats", dict)())
        return data

    def demonstrate(self, episodes: int, noise: float, **env_options: Any) -> tuple[int, int]:
        """Record `episodes` successes of the scripted expert in the ID region, source "demo"."""
        with self._task_of("demonstrations", min(episodes, self._num_envs), env_options) as env:

            def teacher() -> tuple[np.ndarray, np.ndarray]:
                label = env.expert()
                return env.disturb(label, noise).astype("<f4"), label

            return self._record(
                env, "demo", teacher, episodes, lambda mask: {"region": "id"}, episodes * 4
            )

    def sample(self, observations: int, **env_options: Any) -> dict[str, Any]:
        """What `observations` moments of random play look like, and the range of actions: {"observation",
        "action_low", "action_high"}; nothing is recorded."""
        with self._task_of("random play", self._num_envs, env_options) as env:
            low, high = env.single_action_space.low, env.single_action_space.high
            bounded = np.isfinite(low) & np.isfinite(high)
            bottom, top = np.where(bounded, low, -1.0), np.where(bounded, high, 1.0)
            observation, _ = env.reset(options={"region": "all"})
            seen = [observation]
            while len(seen) * env.num_envs < observations and not self._stop.is_set():
                shape = (env.num_envs, SAMPLED_CHUNK, len(low))
                step = env.step_chunk(self._rng.uniform(bottom, top, shape).astype("<f4"))
                observation = step.observation
                if step.done.any():
                    again = {"reset_mask": step.done, "region": "all"}
                    observation, _ = env.reset(options=again)
                seen.append(observation)
            joined = {key: np.concatenate([part[key] for part in seen]) for key in observation}
            return {"observation": joined, "action_low": low, "action_high": high}

    def expand(
        self, episodes: int, noise: float, teacher: str = "retarget", **env_options: Any
    ) -> tuple[int, int]:
        """Re-target the demonstrations to placements all over the table; record what succeeds, source "twin".

        With teacher "expert" the scripted expert plays instead.
        """
        # As many environments as episodes: of more, only those that finish first would be recorded.
        with self._task_of("expansion", min(episodes, self._num_envs), env_options) as env:
            reader = self._make_reader()
            reader.sync()
            demonstrations = list(reader.segments(source="demo"))
            retargeter = self._make_retargeter(env, demonstrations, self._rng)

            def follow() -> tuple[np.ndarray, np.ndarray]:
                label, executed = retargeter.actions(noise)
                return executed, label

            def show() -> tuple[np.ndarray, np.ndarray]:
                label = env.expert()
                return env.disturb(label, noise).astype("<f4"), label

            counts = self._record(
                env,
                "twin",
                follow if teacher == "retarget" else show,
                episodes,
                lambda mask: {"region": "all"},
                episodes * 5,
                on_begin=retargeter.begin if teacher == "retarget" else None,
            )
            reader.close()
            return counts

    def label(self, scenes: int, **env_options: Any) -> Any:
        """Labelled renders (images, state, labels) for pretraining the vision encoder."""
        with self._task_of("labelled scenes", self._num_envs, env_options) as env:
            return self._label_scenes(env, scenes, self._rng)

    def collect(
        self,
        *,
        start_version: int,
        steps: int,
        round_chunks: int,
        max_lag: int,
        region: str = "all",
        retry: float = 0.0,
        **env_options: Any,
    ) -> int:
        """Roll out with exploration, rounds of `round_chunks` chunks, until `steps` control steps or `stop`.

        Round k waits until the learner has published version start_version + k - max_lag, which bounds the
        policy lag without stopping the learner; new weights are adopted at every chunk boundary. `retry` is the share
        of resets that repeat a start from which the policy failed, while there are any.
        """
        with self._task_of("twin RL", self._num_envs, env_options) as env:
            retries = Retries(retry, env.num_envs, self._rng)
            self._runner.adopt(self._weights.wait(start_version - 1, WAIT_FOR_WEIGHTS))
            segmenter = self._segmenter(env, "twin")
            observation, _ = env.reset(
                seed=int(self._rng.integers(2**31)), options={"region": region}
            )
            segmenter.begin(observation, np.ones(env.num_envs, bool))
            acted = self._runner.version
            done_steps, round_number = 0, max(0, self._runner.version - start_version)
            while done_steps < steps and not self._stop.is_set():
                self._wait_for_version(start_version + round_number - max_lag)
                # By so much the oldest step of the round that was handed over is behind by now.
                self._lag, acted = self._runner.version - acted, self._runner.version
                for _ in range(round_chunks):
                    observation, executed = self._explore(
                        env, segmenter, observation, region, retries
                    )
                    done_steps += executed
                segmenter.cut(np.ones(env.num_envs, bool))
                round_number += 1
            self._writer.flush(60.0)
            return done_steps

    def evaluate(
        self, version: int, cells: list[tuple[dict[str, Any], list[dict[str, Any]]]]
    ) -> list[Outcome]:
        """Success of exactly version `version`, noise off, in each cell: (environment options, configurations)."""
        self._runner.adopt(self._weights.get(version), exactly=True)
        return [self._evaluate_cell(options, starts) for options, starts in cells]

    def _evaluate_cell(
        self, env_options: dict[str, Any], configurations: list[dict[str, Any]]
    ) -> Outcome:
        envs = min(self._num_envs, len(configurations))
        with self._task_of("evaluation", envs, env_options) as env:
            self._runner.seed(self._seed)
            return evaluate(env, self._runner, configurations)

    def draw(self, region: str, episodes: int, seed: int, **env_options: Any) -> list[dict]:
        """Reset configurations of a region, for evaluation or mining."""
        with self._task_of("drawing resets", min(self._num_envs, episodes), env_options) as env:
            return draw_configurations(env, region, episodes, seed)

    @contextmanager
    def _task_of(self, doing: str, num_envs: int, env_options: dict[str, Any]) -> Iterator[Env]:
        self._stop.clear()
        self._doing = doing
        # One generator a task, so that what is drawn does not depend on what ran before.
        self._rng = np.random.default_rng([self._seed, *doing.encode()])
        env = self._make_env(num_envs, seed=int(self._rng.integers(2**31)), **env_options)
        self._env = env
        try:
            yield env
        finally:
            self._doing, self._env = "idle", None
            env.close()

    def _segmenter(self, env: Env, source: str) -> Segmenter:
        prefix = f"{self.name}-{source}-{time.time_ns():x}"
        return Segmenter(env, self._write, source=source, task=self._task, prefix=prefix)

    def _write(self, header: dict[str, Any], columns: dict[str, np.ndarray]) -> None:
        self._writer.write(header, columns)
        self._steps += len(columns["action"])
        if header["last"]:
            self._episodes += 1

    def _record(
        self,
        env: Env,
        source: str,
        teacher: Callable[[], tuple[np.ndarray, np.ndarray]],
        episodes: int,
        start: Callable[[np.ndarray], dict[str, Any]],
        max_attempts: int,
        on_begin: Callable[[np.ndarray], None] | None = None,
    ) -> tuple[int, int]:
        recorded, attempted = record_successes(
            env,
            teacher,
            self._segmenter(env, source),
            episodes,
            start=start,
            max_attempts=max_attempts,
            on_begin=on_begin,
        )
        self._writer.flush(60.0)
        if recorded < episodes:
            raise TwinRLError(
                f"only {recorded} of {episodes} {self._doing} succeeded in {attempted} attempts"
            )
        return recorded, attempted

    def _explore(
        self,
        env: Env,
        segmenter: Segmenter,
        observation: dict[str, np.ndarray],
        region: str,
        retries: Retries,
    ) -> tuple[dict[str, np.ndarray], int]:
        while self._paused.is_set() and not self._stop.is_set():
            time.sleep(0.1)
        weights = self._weights.poll(self._runner.version)
        if weights is not None:
            self._runner.adopt(weights)
        actions, info = self._runner.infer(observation, env.instructions(), explore=True)
        step = env.step_chunk(actions)
        segmenter.add(step, self._runner.version, info)
        done = step.done
        observation = step.observation
        if done.any():
            if step.invalid is not None and step.invalid.any():
                self._drop(segmenter, step.invalid)
            segmenter.cut(done)
            self._count(env.configurations(), step, retries)
            starts = {"configurations": retries.starts(done), "reset_mask": done, "region": region}
            observation, _ = env.reset(options=starts)
            segmenter.begin(observation, done)
        return observation, int(step.mask.sum())

    def _count(
        self, configurations: list[dict[str, Any]], step: ChunkStep, retries: Retries
    ) -> None:
        """Note how the episodes that `step` ended went; the success that is told is that of fresh starts."""
        ended = step.done if step.invalid is None else step.done & ~step.invalid
        success = step.success[np.arange(len(ended)), step.mask.sum(1) - 1]
        retries.add(configurations, ended & ~success)
        for i in np.flatnonzero(ended & ~retries.trying):
            region = configurations[i].get("region", "id")  # as in the segment's header
            if region in self._recent:
                self._recent[region].append(bool(success[i]))

    def _drop(self, segmenter: Segmenter, invalid: np.ndarray) -> None:
        """Drop what was not sent of the episodes in `invalid` (N,), and say so."""
        episodes, segments = int(invalid.sum()), segmenter.drop(invalid)
        self._invalid += episodes
        self._void_segments += segments
        text = (
            f"{episodes} of {len(invalid)} simulations failed; their episodes are void, "
            f"{segments} unfinished segments were dropped"
        )
        now = time.monotonic()
        # A simulator that fails all the time is told of now and then.
        if now - self._told > TELL_SECONDS:
            self._told = now
            self._reporter.event("warning", text)

    def _wait_for_version(self, version: int) -> None:
        if self._runner.version >= version:
            return
        began = time.monotonic()
        deadline = began + WAIT_FOR_WEIGHTS
        while not self._stop.is_set():
            weights = self._weights.poll(version - 1)
            if weights is not None:
                self._runner.adopt(weights)
                break
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"{self.name} waited {WAIT_FOR_WEIGHTS:g} s for policy version {version}, "
                    f"has {self._runner.version}: does the learner still run?"
                )
            time.sleep(0.01)
        self._waited += time.monotonic() - began
