"""How a batch is divided among several services, so that it is drawn as if they were one.

A part of the batch (`Draw`) gets its windows as with one service: by shares, of the windows that all services have
together. Among the services they are drawn in proportion to the weight that the part has there: the number of its
windows, the sum of their priorities ** exponent, or of their freshness. Within a service the draw is its reader's.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from buffer_service.gather import Batch
from buffer_service.reader import Reader
from buffer_service.sampler import Draw, split
from buffer_service.shards import join_id


class Offer(NamedTuple):
    """What a part of a batch could draw in one service now."""

    part: Draw  # as it is there
    windows: int
    weight: float  # of all of them


class Share(NamedTuple):
    """What one service gives to a batch."""

    parts: list[Draw]  # `share` windows of each, in this order
    factors: list[
        float
    ]  # of each part: importance weights here, times this, are those over all services
    numbers: list[int]  # of each part in the batch

    @property
    def count(self) -> int:
        """Windows."""
        return int(sum(part.share for part in self.parts))


def divide(
    parts: Sequence[Draw],
    offers: Mapping[int, Sequence[Offer]],
    count: int,
    generator: np.random.Generator,
) -> dict[int, Share]:
    """The share of each service in a batch of `count` windows. offers: of each service, for each of `parts`.

    Some service must have a window.
    """
    services = list(offers)
    windows = np.array([[offer.windows for offer in offers[n]] for n in services])  # (S, parts)
    weights = np.array([[offer.weight for offer in offers[n]] for n in services])
    shares = {number: Share([], [], []) for number in services}
    counts = split(count, [part.share for part in parts], windows.sum(axis=0).tolist(), generator)
    for place, (part, wanted) in enumerate(zip(parts, counts, strict=True)):
        if not wanted:
            continue
        chance = weights[:, place] / weights[:, place].sum()
        drawn = generator.multinomial(wanted, chance)
        for row in np.flatnonzero(drawn).tolist():
            number = services[row]
            # The reader there takes (its windows * the chance among these) for (all windows * the chance at all).
            more = windows[:, place].sum() / windows[row, place] * chance[row]
            share, own = shares[number], offers[number][place].part
            share.parts.append(replace(own, share=float(drawn[row]), relative=False))
            share.factors.append(float(more**-part.importance) if part.by == "priority" else 1.0)
            share.numbers.append(place)
    return {number: share for number, share in shares.items() if share.parts}


def offer(
    wanted: Sequence[Draw], readers: Mapping[int, Reader], known: int, chunk: int
) -> dict[int, list[Offer]]:
    """What each of `readers` could give to each part; with their lock held. known: services, the lost ones included."""
    offers: dict[int, list[Offer]] = {number: [] for number in readers}
    for draw in wanted:
        if draw.by == "fresh":  # a service sees only its part of what comes in
            draw = replace(draw, half_life=draw.half_life / known)
        newest = dict.fromkeys(readers, draw.newest)
        if draw.newest is not None:
            times = {n: reader.newest_times(draw, chunk) for n, reader in readers.items()}
            newest = dict(newest_of_each(times, draw.newest))
        for number, reader in readers.items():
            if newest[number] == 0:
                offers[number].append(Offer(draw, 0, 0.0))
                continue
            own = replace(draw, newest=newest[number])
            offers[number].append(Offer(own, *reader.weigh(own, chunk)))
    return offers


def newest_of_each(times: Mapping[int, Sequence[float]], newest: int) -> dict[int, int]:
    """How many of the `newest` segments over all services are in each. times: of so many of each, rising."""
    merged = heapq.merge(
        *([(-time, number) for time in reversed(own)] for number, own in times.items())
    )
    found = dict.fromkeys(times, 0)
    for _, (_, number) in zip(range(newest), merged, strict=False):
        found[number] += 1
    return found


def slices(batch: Batch, shares: Mapping[int, Share]) -> Iterator[tuple[int, Share, Batch]]:
    """(service, its share, its rows of the batch)."""
    begin = 0
    for number, share in shares.items():
        end = begin + share.count
        yield number, share, {name: array[begin:end] for name, array in batch.items()}
        begin = end


def weigh(drawn: Sequence[tuple[Share, np.ndarray]]) -> np.ndarray:
    """The importance weights (B,) float32 of a batch, the largest of each part 1.

    drawn: the shares in the batch's order, with the weights that each service gave.
    """
    counts = [[int(part.share) for part in share.parts] for share, _ in drawn]
    part = np.concatenate(
        [np.repeat(share.numbers, n) for (share, _), n in zip(drawn, counts, strict=True)]
    )
    factor = np.concatenate(
        [np.repeat(share.factors, n) for (share, _), n in zip(drawn, counts, strict=True)]
    )
    weight = np.concatenate([given for _, given in drawn]) * factor
    for number in np.unique(part):
        weight[part == number] /= weight[part == number].max()
    return weight.astype(np.float32)


def join(
    batch: Batch, jobs: Sequence[tuple[int, Share, Batch]], drawn: Sequence[Batch | None]
) -> Batch | None:
    """The whole batch: `batch`, whose `slices` the services filled, with what they made beside. None if one failed."""
    if any(each is None for each in drawn):
        return None
    names = set(batch) & set.intersection(*(set(each) for each in drawn if each)) | {"shard"}
    for (number, _, rows), each in zip(jobs, drawn, strict=True):
        assert each is not None
        rows["shard"][:] = number
        for name in names - {"shard"}:
            if each[name] is not rows[name]:
                rows[name][...] = each[name]
        rows["segment"][:] = join_id(number, rows["segment"])
    batch = {name: array for name, array in batch.items() if name in names}
    given = [(share, each) for (_, share, _), each in zip(jobs, drawn, strict=True) if each]
    batch["weight"] = weigh([(share, each["weight"]) for share, each in given])
    batch["instruction"] = np.concatenate([each["instruction"] for _, each in given])
    return batch
