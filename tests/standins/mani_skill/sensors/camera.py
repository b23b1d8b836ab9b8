"""Settings of cameras."""

from dataclasses import dataclass
from typing import Any

import sapien


@dataclass
class CameraConfig:
    """A camera that looks along x with z up; `fov` is vertical, in rad."""

    uid: str
    pose: Any
    width: int
    height: int
    fov: float = None
    near: float = 0.01
    far: float = 100
    mount: Any = None

    def __post_init__(self):
        assert isinstance(self.uid, str) and isinstance(self.pose, sapien.Pose), self
        assert isinstance(self.width, int) and isinstance(self.height, int), self
        assert 0 < self.fov < 3.14 and 0 < self.near < self.far, self
