"""Weights on the wire: a version, named arrays and one checksum. A torn or wrong set is never loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np

from twinrl.core.checksum import digest
from twinrl.core.errors import WireError

# Bytes with a digest of their own: large against a call's cost, and still in the cache when read again.
BLOCK = 8 << 20
PARALLEL = 8  # blocks from which more threads pay
THREADS = min(4, os.cpu_count() or 1)


class Weights(NamedTuple):
    """One published set of a policy's parameters."""

    version: int  # raised by the learner with each publish
    arrays: dict[str, np.ndarray]
    checksum: int  # of `arrays`, see `checksum`
    # Whoever made this has compared the checksum, and nothing can have changed since.
    verified: bool = False

    def verify(self) -> None:
        """Raise WireError unless the arrays are the ones that were published."""
        if not self.verified:
            compare(self.version, checksum(self.arrays), self.checksum)


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

    def publish(self, version: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Take a copy of `arrays`, which may change as soon as this returns, and hand it out in the background.

        Raises TwinRLError when an earlier version could not be handed out.
        """

    def flush(self, timeout: float = 60.0) -> None:
        """Return when everything published is handed out, or raise why it could not be."""

    def newest(self) -> int:
        """The newest version that was ever handed out, -1 for none: a restarted learner counts on from it."""

    def close(self) -> None:
        """Hand out what was published and end."""


def checksum(arrays: Mapping[str, np.ndarray], forms: Mapping[str, str] | None = None) -> int:
    """XXH3-64 over each array's `label` and the XXH3-64 of each of its blocks as u64, in order of names.

    `forms` stand for the dtypes where those say too little. Large sets take several threads.
    """
    blocks = {name: list(_blocks(arrays[name])) for name in sorted(arrays)}
    digests = map_blocks(digest, [block for each in blocks.values() for block in each])
    covered: list[bytes] = []
    for name, each in blocks.items():
        array = np.asarray(arrays[name])
        covered.append(label(name, forms[name] if forms else array.dtype.str, array.shape))
        covered.extend(packed(next(digests)) for _ in each)
    return digest(*covered)


def map_blocks(work: Callable[[Any], int], blocks: Sequence[Any]) -> Iterator[int]:
    """`work` of each block, in order; many blocks in several threads."""
    if len(blocks) < PARALLEL:
        return map(work, blocks)
    with ThreadPoolExecutor(THREADS) as pool:
        return iter(list(pool.map(work, blocks)))


def label(name: str, form: str, shape: Iterable[int]) -> bytes:
    """What the checksum covers before an array's blocks: `name|form|shape|` in UTF-8, a shape like (3, 4) or (5,)."""
    return f"{name}|{form}|{tuple(shape)}|".encode()


def packed(block_digest: int) -> bytes:
    """A block's digest as the checksum covers it."""
    return block_digest.to_bytes(8, "little")


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for start in range(0, flat.size, BLOCK):
        yield flat[start : start + BLOCK]


def compare(version: int, found: int, published: int) -> None:
    """Raise WireError, which names the version, unless the checksums are one."""
    if found != published:
        raise WireError(
            f"weights of version {version} arrived damaged: "
            f"their checksum is {found:016x}, published was {published:016x}"
        )


def make_weights(version: int, arrays: dict[str, np.ndarray]) -> Weights:
    """Weights with their checksum."""
    return Weights(version, arrays, checksum(arrays))
