"""The stand-in for reality: a simulated arm whose physics, latency, camera and light differ from the twin's."""

from __future__ import annotations

from typing import Any

import numpy as np

from robot_bridge.driver import Driver, Observation, Outcome
from robot_bridge.protocol import Job
from twinrl.core.errors import ConfigError

STATE = "observation.state"
IMAGE_PREFIX = "observation.images."
TOOL, LEAD = ("tcp_x", "tcp_y", "tcp_z"), ("lead_x", "lead_y", "lead_z")


class SimDriver(Driver):
    """One environment of `twins.make_env(..., variant="standin")`, a control step at a time."""

    kind = "sim"

    def __init__(
        self, task: str = "", seed: int = 0, reset_seconds: float = 5.0, threads: int = 1
    ) -> None:
        self._task, self._seed, self._threads = task, int(seed), int(threads)
        self.reset_seconds = float(reset_seconds)
        self._env: Any = None

    def connect(self, job: Job) -> None:
        """Build the simulation with the job's cameras, or without any where the job observes poses."""
        try:
            from twins import make_env
        except ImportError as error:
            raise ConfigError(
                f"--robot sim needs the simulator on this PC ({error}): pip install 'twinrl[sim]'"
            ) from None
        self._env = make_env(
            self._task or job.task,
            1,
            variant="standin",
            seed=self._seed,
            image_size=job.schema.image_size,
            cameras=tuple(job.schema.cameras),
            observe=job.observe,
            threads=self._threads,
            max_steps=job.max_steps or None,
        )
        self.cameras, self.image_size = tuple(self._env.cameras), self._env.image_size
        self.state_names = tuple(self._env.state_names)
        self._tool = [self.state_names.index(name) for name in TOOL]
        self._lead = [self.state_names.index(name) for name in LEAD]

    def disconnect(self) -> None:
        """Free the simulation."""
        if self._env is not None:
            self._env.close()
            self._env = None

    def reset(self, configuration: dict[str, Any] | None, region: str) -> dict[str, Any]:
        """Place things as `configuration` says. Only reality decides about physics, camera and light."""
        start = self._env.draw(region)
        if configuration is not None:
            start = {**start, **configuration, "draw": start["draw"]}
        observation, _ = self._env.reset(options={"configurations": [start]})
        self._keep(observation)
        self._outcome = Outcome()
        return dict(self._env.configurations()[0])

    def read(self) -> Observation:
        """What arm and cameras see."""
        return self._observation

    def command(self, action: np.ndarray) -> np.ndarray:
        """Simulate one control step."""
        observation, reward, terminated, truncated, info = self._env.step(action[None])
        self._keep(observation)
        flags = bool(terminated[0]), bool(truncated[0]), bool(info["success"][0])
        self._outcome = Outcome(float(reward[0]), *flags)
        return np.asarray(info["action"][0], np.float32)

    def judge(self) -> Outcome:
        """The task's reward and ending."""
        return self._outcome

    def tool(self) -> np.ndarray:
        """The measured tool position."""
        return self._observation[STATE][self._tool].astype(float)

    def target(self) -> np.ndarray:
        """The commanded tool position."""
        return self.tool() + self._observation[STATE][self._lead]

    def expert(self, noise: float) -> np.ndarray:
        """The task's scripted expert."""
        return np.asarray(self._env.expert(noise)[0], np.float32)

    def _keep(self, observation: Observation) -> None:
        self._observation = {
            key: value[0]
            for key, value in observation.items()
            if key == STATE or key.startswith(IMAGE_PREFIX)
        }
