"""How windows are chosen: a sum tree over segments, and the windows within each.

A `Table` holds the windows of the segments that pass one filter, with one way to weigh them. Segments stand in
slots in the order in which they came; slots of segments that are gone are used up until half are, then all move
together. Taking a segment in or out touches its slot only, and drawing takes as many steps as the tree has levels,
for all windows of a batch together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

BY = ("uniform", "priority", "fresh")
_MIN_PRIORITY = 1e-6  # nothing that may be drawn has weight 0
_MAX_EXPONENT = 500.0  # of the freshness weights, before they are scaled anew
_BELOW_ONE = float(np.nextafter(1.0, 0.0))
_MIN_SCALE = 1e-290
_TOP = 1024  # leaves of the part of a sum tree that is searched by bisection
_BLOCK = 8192  # slots whose windows are summed together


class Drawn(NamedTuple):
    """B windows of a table."""

    row: np.ndarray  # (B,) int64, of the segment, as it was put
    start: np.ndarray  # (B,) int64, its step
    probability: np.ndarray  # (B,) float64, with which each was drawn
    windows: int  # among how many


class SumTree:
    """Weights >= 0 of numbered leaves; leaves are drawn in proportion. All operations take arrays."""

    def __init__(self, leaves: int = 64) -> None:
        self.leaves = 1 << max(int(leaves) - 1, 1).bit_length()
        self._tree = np.zeros(2 * self.leaves)

    @property
    def total(self) -> float:
        """The sum of all weights."""
        return float(self._tree[1])

    def __getitem__(self, leaf: np.ndarray) -> np.ndarray:
        return self._tree[self.leaves + leaf]

    def set(self, leaf: np.ndarray, weight: np.ndarray) -> None:
        """Change some weights. A sum is made from its parts, so no error adds up."""
        tree, node = self._tree, self.leaves + np.asarray(leaf)
        tree[node] = weight
        if len(node) > self.leaves // 16:
            node = np.arange(self.leaves, 2 * self.leaves)
        while node[0] > 1:
            node = node >> 1
            node = node[np.append(True, node[1:] != node[:-1])]  # neighbours share a parent
            tree[node] = tree[2 * node] + tree[2 * node + 1]

    def before(self, leaf: int) -> float:
        """The sum of the weights of all leaves below `leaf`."""
        node, total = self.leaves + leaf, 0.0
        while node > 1:
            if node & 1:
                total += self._tree[node - 1]
            node >>= 1
        return total

    def find(self, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For values in [0, total): the leaf in whose stretch each falls, and how far, as a share of its weight."""
        node, rest = self._descend(value, careful=False)
        weight = self._tree[node]
        if not weight.all():  # rounding carried a value past the end of its stretch
            node, rest = self._descend(value, careful=True)
            weight = self._tree[node]
        return node - self.leaves, np.clip(rest / weight, 0.0, _BELOW_ONE)

    def _descend(self, value: np.ndarray, careful: bool) -> tuple[np.ndarray, np.ndarray]:
        tree = self._tree
        top = min(self.leaves, _TOP)  # a level that is searched at once
        weight = tree[top : 2 * top]
        sums = np.cumsum(weight)
        node = np.searchsorted(sums, np.minimum(value, np.nextafter(sums[-1], 0.0)), side="right")
        rest = np.clip(value - (sums - weight)[node], 0.0, weight[node])
        node += top
        for _ in range(self.leaves.bit_length() - top.bit_length()):
            node <<= 1
            left = tree[node]
            right = rest >= left
            if careful:  # a leaf without weight is never reached
                right &= tree[node + 1] > 0
            rest -= left * right
            node += right
        return node, rest


class Ragged:
    """A stretch of values for each of some slots, in one array."""

    def __init__(self, dtype: type, slots: int = 64) -> None:
        self.values = np.zeros(256, dtype)
        self.offset = np.full(slots, -1, np.int64)  # -1: the slot has none
        self.length = np.zeros(slots, np.int64)
        self._used = self._dead = 0

    def grow(self, slots: int) -> None:
        """Make room for `slots` slots."""
        more = slots - len(self.offset)
        self.offset = np.append(self.offset, np.full(more, -1, np.int64))
        self.length = np.append(self.length, np.zeros(more, np.int64))

    def put(self, slot: int, values: Sequence | np.ndarray) -> None:
        """Set the stretch of a slot."""
        count = len(values)
        if self.offset[slot] < 0 or self.length[slot] != count:
            self.drop(slot)
            if self._used + count > len(self.values):
                self._make_room(count)
            self.offset[slot], self.length[slot] = self._used, count
            self._used += count
        start = self.offset[slot]
        self.values[start : start + count] = values

    def get(self, slot: int) -> np.ndarray | None:
        """The stretch of a slot, a view until the next change; None where there is none."""
        start = self.offset[slot]
        return None if start < 0 else self.values[start : start + self.length[slot]]

    def drop(self, slot: int) -> None:
        """Forget the stretch of a slot."""
        self._dead += int(self.length[slot])
        self.offset[slot], self.length[slot] = -1, 0

    def block(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(places, values, valid), (n, longest) each, of the stretches of `slots`."""
        offset, length = self.offset[slots], self.length[slots]
        column = np.arange(max(int(length.max(initial=0)), 1))
        valid = column < length[:, None]
        places = np.where(valid, offset[:, None] + column, 0)
        return places, self.values[places], valid

    def move(self, slots: np.ndarray) -> None:
        """Keep `slots` only, in this order, as 0, 1, ...; the number of slots stays."""
        offset, length = self.offset[slots], self.length[slots]
        self.offset[:], self.length[:] = -1, 0
        self.offset[: len(slots)], self.length[: len(slots)] = offset, length
        self._pack(len(self.values))

    def _make_room(self, count: int) -> None:
        size = len(self.values)
        if self._dead < size // 2:
            size = max(2 * size, 2 * (self._used + count))
        self._pack(max(size, 2 * (self._used - self._dead + count)))

    def _pack(self, size: int) -> None:
        """Put the live stretches one after the other in an array of `size`."""
        live = np.flatnonzero(self.offset >= 0)
        length = self.length[live]
        ends = np.cumsum(length)
        total = int(ends[-1]) if len(ends) else 0
        begins = ends - length
        source = np.repeat(self.offset[live] - begins, length) + np.arange(total)
        packed = np.zeros(max(size, 256), self.values.dtype)
        packed[:total] = self.values[source]
        self.values, self.offset[live] = packed, begins
        self._used, self._dead = total, 0


class Table:
    """The windows of some segments, drawn uniformly, by priority or by freshness."""

    def __init__(self, by: str = "uniform", exponent: float = 0.6, half_life: float = 0.0) -> None:
        """exponent: a window is drawn in proportion to its priority to this power. half_life: a segment's windows
        are half as likely once so many transitions came in after it."""
        self.by, self.exponent, self.half_life = by, exponent, half_life
        self.windows = 0
        self._slot: dict[int, int] = {}  # segment -> slot
        self._used, size = 0, 64
        self._id = np.zeros(size, np.int64)
        self._row = np.zeros(size, np.int64)
        self._count = np.zeros(size, np.int64)  # windows of each slot
        self._scale = np.ones(size)  # freshness
        self._starts = Ragged(np.int32, size)  # where they are not 0, 1, 2, ...
        self._priority = Ragged(np.float64, size)  # to the power `exponent`
        self._tree, self._stale = SumTree(size), set()
        self._position = self._reference = 0.0  # transitions that came in; where the weight is 1
        self._highest = 1.0  # priority, what a window has that was never drawn

    def __contains__(self, id: int) -> bool:
        return id in self._slot

    def put(
        self, id: int, row: int, steps: int, starts: Sequence[int], priority: float | None = None
    ) -> None:
        """Take in a segment of `steps` steps with windows at `starts`, or tell what its windows are now.

        row: what a draw of it gives. priority: of its windows, where it is known; else the highest there was.
        """
        slot, count = self._slot.get(id), len(starts)
        if slot is None:
            if not count:
                return
            slot = self._new(id, steps)
            self._row[slot] = row
        elif not count:
            self.remove(id)
            return
        before = int(self._count[slot])
        self.windows += count - before
        self._count[slot] = count
        if isinstance(starts, range):
            if self._starts.offset[slot] >= 0:
                self._starts.drop(slot)
        else:
            self._starts.put(slot, starts)
        if self.by == "priority" and count != before:
            # Windows come and go at the end only: those there were keep what they have.
            known = self._priority.get(slot)
            if known is not None or priority is None:
                priority = self._highest
            values = np.full(count, self._power(priority))
            if known is not None:
                values[: len(known)] = known[:count]
            self._priority.put(slot, values)
        self._stale.add(slot)

    def remove(self, id: int) -> None:
        """Forget a segment."""
        slot = self._slot.pop(id, None)
        if slot is None:
            return
        self.windows -= int(self._count[slot])
        self._count[slot] = 0
        for ragged in (self._starts, self._priority):
            if ragged.offset[slot] >= 0:
                ragged.drop(slot)
        self._stale.add(slot)

    def draw(self, count: int, generator: np.random.Generator, newest: int | None = None) -> Drawn:
        """`count` windows with repetition; of the `newest` segments only, when given. There must be one."""
        low, high, windows = self._stretch(newest)
        value = low + generator.random(count) * (high - low)
        slots, share = self._tree.find(np.minimum(value, np.nextafter(high, 0.0)))
        if self.by == "priority":
            _, weights, valid = self._priority.block(slots)
            sums = np.cumsum(weights * valid, axis=1)
            place = (sums <= (share * sums[:, -1])[:, None]).sum(axis=1)
            place = np.minimum(place, self._count[slots] - 1)
            weight = weights[np.arange(count), place]
        else:
            place = (share * self._count[slots]).astype(np.int64)
            weight = self._scale[slots] if self.by == "fresh" else np.ones(count)
        offset, start = self._starts.offset[slots], place
        listed = offset >= 0
        if listed.any():
            start = np.where(
                listed, self._starts.values[np.where(listed, offset + place, 0)], place
            )
        return Drawn(self._row[slots], start.astype(np.int64), weight / (high - low), windows)

    def set_priorities(
        self, ids: np.ndarray, steps: np.ndarray, values: np.ndarray
    ) -> dict[int, float]:
        """Set the priorities of the windows at `steps` of segments `ids`; those that are gone are passed over.

        Returns the priority of each segment touched: what all its windows would have for it to be drawn as often.
        """
        slots = np.array([self._slot.get(id, -1) for id in ids.tolist()], np.int64)
        here = slots >= 0
        slots, steps, values = slots[here], steps[here], values[here]
        if not len(slots):
            return {}
        self._highest = max(self._highest, float(values.max()))
        place = steps.copy()
        listed = self._starts.offset[slots] >= 0
        if listed.any():
            _, starts, valid = self._starts.block(slots[listed])
            hit = (starts == steps[listed, None]) & valid
            place[listed] = np.where(hit.any(axis=1), hit.argmax(axis=1), -1)
        good = (place >= 0) & (place < self._count[slots])
        slots, place, values = slots[good], place[good], values[good]
        self._priority.values[self._priority.offset[slots] + place] = self._power(values)
        touched = np.unique(slots)
        self._stale.update(touched.tolist())
        _, weights, valid = self._priority.block(touched)
        mean = (weights * valid).sum(axis=1) / self._count[touched]
        priority = mean ** (1 / self.exponent) if self.exponent else np.ones(len(mean))
        return dict(zip(self._id[touched].tolist(), priority.tolist(), strict=True))

    def weigh(self, newest: int | None = None) -> tuple[int, float]:
        """(windows, their total weight), of the `newest` segments only, when given.

        Of freshness, what comes in now would weigh 1.
        """
        low, high, windows = self._stretch(newest)
        now = 1.0
        if self.by == "fresh":
            now = 2.0 ** ((self._position - self._reference) / self.half_life)
        return windows, max(high - low, 0.0) / now if windows else 0.0

    def newest(self, number: int) -> np.ndarray:
        """The ids of the `number` newest segments with windows, oldest first."""
        first = self._nth_newest(number) if number < len(self._slot) else 0
        return self._id[first : self._used][self._count[first : self._used] > 0]

    def _stretch(self, newest: int | None) -> tuple[float, float, int]:
        """(begin, end, windows) of all segments, or of the `newest`, on the scale of the tree."""
        self._refresh()
        low, windows = 0.0, self.windows
        if newest is not None and newest < len(self._slot):
            first = self._nth_newest(newest)
            low = self._tree.before(first)
            windows = int(self._count[first : self._used].sum())
        return low, self._tree.total, windows

    def _power(self, priority: float | np.ndarray) -> np.ndarray:
        return np.maximum(priority, _MIN_PRIORITY) ** self.exponent

    def _new(self, id: int, steps: int) -> int:
        if self._used == len(self._id):
            self._make_room()
        slot = self._slot[id] = self._used
        self._used += 1
        self._id[slot], self._count[slot] = id, 0
        if self.by == "fresh":
            self._position += steps
            exponent = (self._position - self._reference) / self.half_life
            if exponent > _MAX_EXPONENT:  # rarely; and what is 1000 half-lives old fades to 0
                faded = self._scale[: self._used] * 2.0**-exponent
                self._scale[: self._used] = np.maximum(faded, _MIN_SCALE)
                self._stale.update(np.flatnonzero(self._count[: self._used]).tolist())
                self._reference, exponent = self._position, 0.0
            self._scale[slot] = 2.0**exponent
        return slot

    def _refresh(self) -> None:
        """Bring the tree up to date; only here, so that many changes cost one pass."""
        if not self._stale:
            return
        slots = np.fromiter(self._stale, np.int64, len(self._stale))
        slots.sort()
        self._stale.clear()
        if self.by == "priority":
            parts = []
            for part in np.array_split(slots, len(slots) // _BLOCK + 1):
                _, weights, valid = self._priority.block(part)
                parts.append((weights * valid).sum(axis=1))
            weight = np.concatenate(parts)
        else:
            weight = self._count[slots] * self._scale[slots]
        self._tree.set(slots, weight)

    def _nth_newest(self, number: int) -> int:
        """The slot of the segment that has number - 1 newer ones."""
        width = 2 * number
        while True:
            begin = max(self._used - width, 0)
            live = np.flatnonzero(self._count[begin : self._used])
            if len(live) >= number or not begin:
                return begin + int(live[-number])
            width *= 2

    def _make_room(self) -> None:
        live = np.flatnonzero(self._count[: self._used])
        size = len(self._id)
        if len(live) > size // 2:
            size *= 2
            for name in ("_id", "_row", "_count", "_scale"):
                array = getattr(self, name)
                setattr(self, name, np.append(array, np.ones(size - len(array), array.dtype)))
            self._starts.grow(size)
            self._priority.grow(size)
        for array in (self._id, self._row, self._count, self._scale):
            array[: len(live)] = array[live]
        self._count[len(live) :] = 0
        self._starts.move(live)
        self._priority.move(live)
        self._used = len(live)
        self._slot = {id: slot for slot, id in enumerate(self._id[: self._used].tolist())}
        self._tree, self._stale = SumTree(size), set(range(self._used))
