"""A gymnasium environment of numbers that draws itself with NumPy: for what needs pictures and no window library."""

import gymnasium
import numpy as np

ID = "twinrl-test/Picture-v0"


class Picture(gymnasium.Env):
    """A spot on a plane, pushed about; leaving the plane ends the episode. Observes place, speed and secret wind."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012
    observation_space = gymnasium.spaces.Dict(
        {
            "place": gymnasium.spaces.Box(-2.0, 2.0, (2,), np.float64),
            "speed": gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64),
            "wind": gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64),
            "view": gymnasium.spaces.Box(0, 255, (24, 32, 3), np.uint8),
        }
    )
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        """A new place and wind."""
        super().reset(seed=seed)
        self.place, self.speed = self.np_random.uniform(-0.5, 0.5, 2), np.zeros(2)
        self.wind = self.np_random.normal(0, 0.1, 2)
        return self._see(), {}

    def step(self, action):
        """Push by `action` (2,)."""
        self.speed = 0.9 * self.speed + 0.2 * np.asarray(action, float) + self.wind
        self.place = self.place + 0.2 * self.speed
        distance = np.linalg.norm(self.place)
        return (
            self._see(),
            float(-distance),
            bool(distance > 2),
            False,
            {"is_success": distance < 0.1},
        )

    def _see(self):
        return {
            "place": self.place.copy(),
            "speed": self.speed.copy(),
            "wind": self.wind.copy(),
            "view": self.render()[::2, ::2],
        }

    def render(self):
        """(48, 64, 3) uint8."""
        rows, columns = np.mgrid[-2:2:48j, -2:2:64j]
        near = np.exp(-4 * ((rows - self.place[0]) ** 2 + (columns - self.place[1]) ** 2))
        return np.repeat((255 * near).astype(np.uint8)[..., None], 3, axis=2)


if ID not in gymnasium.registry:
    gymnasium.register(ID, Picture, max_episode_steps=100)
