"""Stand-in of SAPIEN 3: see the README beside."""

import numpy as np


class Pose:
    """A rigid transform; `q` has w first."""

    def __init__(self, p=(0.0, 0.0, 0.0), q=(1.0, 0.0, 0.0, 0.0)):
        self.p, self.q = np.asarray(p, np.float32), np.asarray(q, np.float32)
        assert self.p.shape == (3,) and self.q.shape == (4,), (self.p.shape, self.q.shape)
        assert abs(np.linalg.norm(self.q) - 1) < 1e-3, self.q
