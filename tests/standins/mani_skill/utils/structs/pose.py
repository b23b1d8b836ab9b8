"""Batched poses."""

import torch


class Pose:
    """Poses as one tensor (n, 7): position, quaternion with w first."""

    def __init__(self, raw_pose):
        self.raw_pose = raw_pose

    @classmethod
    def create(cls, pose):
        assert isinstance(pose, torch.Tensor) and pose.dtype == torch.float32, pose
        assert pose.ndim == 2 and pose.shape[1] == 7, pose.shape
        assert ((pose[:, 3:].norm(dim=1) - 1).abs() < 1e-3).all(), pose[:, 3:]
        return cls(pose)
