"""What the inference actor is asked, and how rows of several callers become one batch of few possible sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from twinrl.env import Observation


class Request(NamedTuple):
    """A caller's question: what to do in N environments."""

    observation: Observation  # {key: (N, ...)}
    instruction: str | Sequence[str]  # one for all rows, or one for each
    explore: bool
    seed: int  # what is random in the answer is a function of these two: see policies.streams
    call: int
    version: int = 0  # of the policy: at least this one
    exactly: bool = False  # this version and no other
    patience: float = 60.0  # s until it is answered by a DeadlineError

    @property
    def rows(self) -> int:
        """N."""
        return len(next(iter(self.observation.values())))


class Answer(NamedTuple):
    """What a request's caller gets."""

    chunk: np.ndarray  # (N, C, 7) float32, physical units
    columns: dict[str, np.ndarray]  # `policy.*` columns, (N, ...)
    version: int  # of the policy that acted


Shape = tuple[tuple[str, tuple[int, ...], str], ...]


def shape_of(observation: Observation, keys: Sequence[str], rows: int) -> Shape:
    """Key, shape of a row and dtype of what the policy looks at; ValueError where that is not `rows` rows of it."""
    missing = [key for key in keys if key not in observation]
    if missing:
        raise ValueError(f"the policy looks at {missing}, and there are {sorted(observation)}")
    counts = {key: len(observation[key]) for key in keys}
    if set(counts.values()) != {rows}:
        raise ValueError(f"rows of an observation differ: {counts}")
    return tuple((key, observation[key].shape[1:], observation[key].dtype.str) for key in keys)


def padded_rows(rows: int, max_rows: int) -> int:
    """The size of a batch for `rows`: the next power of two, or `max_rows` where that is less."""
    return min(1 << max(rows - 1, 0).bit_length(), max_rows)


class Assembler:
    """Puts requests of one shape into arrays that are used again and again. Not thread-safe."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._shape: Shape = ()
        self._arrays: dict[str, np.ndarray] = {}

    def assemble(self, requests: Sequence[Request], shape: Shape) -> Mapping[str, np.ndarray]:
        """One request after the other, {key: (padded rows, ...)}, valid until the next call.

        Padding rows hold what was there before: they are computed and belong to nobody.
        """
        if shape != self._shape:
            self._shape = shape
            self._arrays = {
                key: np.zeros((self._max_rows, *row), dtype) for key, row, dtype in shape
            }
        rows = sum(request.rows for request in requests)
        for key, array in self._arrays.items():
            np.concatenate([request.observation[key] for request in requests], out=array[:rows])
        padded = padded_rows(rows, self._max_rows)
        return {key: array[:padded] for key, array in self._arrays.items()}


def instructions(requests: Sequence[Request], rows: int) -> str | list[str]:
    """What `rows` rows are told: one text where it is the same for all, which is cheaper."""
    told = [
        [request.instruction] * request.rows
        if isinstance(request.instruction, str)
        else list(request.instruction)
        for request in requests
    ]
    flat = [text for part in told for text in part]
    if len(set(flat)) == 1:
        return flat[0]
    return flat + flat[-1:] * (rows - len(flat))
