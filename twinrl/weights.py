"""Weights on the wire: a version, named arrays and a checksum. A torn or partial set is never loaded."""

from __future__ import annotations

import zlib
from typing import NamedTuple, Protocol

import numpy as np

from twinrl.core.errors import WireError


class Weights(NamedTuple):
    """One published set of a policy's parameters."""

    version: int  # raised by the learner with each publish
    arrays: dict[str, np.ndarray]
    checksum: int

    def verify(self) -> None:
        """Raise WireError unless the arrays are the ones that were published."""
        if checksum(self.arrays) != self.checksum:
            raise WireError(f"weights of version {self.version} arrived damaged")


class WeightSource(Protocol):
    """Where an actor gets weights from."""

    def poll(self, newer_than: int) -> Weights | None:
        """The newest weights if their version is above `newer_than`; never waits."""

    def wait(self, newer_than: int, timeout: float) -> Weights:
        """The newest weights above `newer_than`; DeadlineError after `timeout` seconds."""

    def get(self, version: int) -> Weights:
        """Exactly `version`, one of the last few; TwinRLError when it is gone."""


class WeightSink(Protocol):
    """Where the learner publishes weights."""

    def publish(self, weights: Weights) -> None:
        """Hand out `weights`; their arrays must not change afterwards."""

    def newest(self) -> int:
        """The newest version that was handed out, -1 for none: a restarted learner counts on from it."""


def checksum(arrays: dict[str, np.ndarray]) -> int:
    """CRC-32 over names, dtypes, shapes and bytes, in order of names."""
    value = 0
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        value = zlib.crc32(f"{name}{array.dtype.str}{array.shape}".encode(), value)
        value = zlib.crc32(array.reshape(-1).view(np.uint8), value) if array.size else value
    return value


def make_weights(version: int, arrays: dict[str, np.ndarray]) -> Weights:
    """Weights with their checksum."""
    return Weights(version, arrays, checksum(arrays))
