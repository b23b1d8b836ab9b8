"""Random numbers that are a function of who asks and how often: an answer can be repeated, and shared batches do not
mix what callers draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def stream(seed: int, call: int) -> torch.Generator:
    """The random numbers of call number `call` of a caller with `seed`; both at least 0."""
    mixed = np.random.SeedSequence((seed, call)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed[0]))


class Streams:
    """In a generator's place where a batch holds rows of several callers: each draws from a generator of its own.

    A caller gets the numbers that it would get alone, whoever is in the batch and wherever its rows are. Rows that
    belong to nobody (padding) get zeros.
    """

    device = torch.device("cpu")

    def __init__(self, parts: Sequence[tuple[torch.Generator, int]], rows: int) -> None:
        """`parts`: generator and number of rows of each caller, in the batch's order; `rows`: of the batch."""
        self._parts, self._rows = list(parts), rows
        if sum(count for _, count in self._parts) > rows:
            raise ValueError(f"parts of {[c for _, c in self._parts]} rows in a batch of {rows}")

    def draw(self, draw: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        """`draw(shape, generator=...)`, torch.rand or torch.randn, for a `shape` (m * rows, ...), float32."""
        times, rest = divmod(shape[0], self._rows)
        if rest:
            raise ValueError(f"cannot draw {shape[0]} rows for a batch of {self._rows}")
        drawn, start = torch.zeros(shape), 0
        for generator, count in self._parts:
            end = start + count * times
            drawn[start:end] = draw((end - start, *shape[1:]), generator=generator)
            start = end
        return drawn
