"""What is drawn and how batches are made, without processes: windows, distributions, weights, the limiter's words."""

import gc
import threading

import numpy as np
import pytest

from buffer_service import record
from buffer_service.entry import CUT, OPEN, TERMINATED, Entry, describe
from buffer_service.gather import Batch, copy_rows, gather
from buffer_service.index import Index
from buffer_service.limiter import RateLimiter
from buffer_service.polls import Polls
from buffer_service.rows import gather_from, wanted
from buffer_service.sampler import Draw, discounted, draws, split, window_starts
from buffer_service.selectors import Ragged, SumTree, Table
from buffer_service.testing import SCHEMA, segment
from twinrl.core.codec import encode
from twinrl.core.errors import ConfigError, WireError
from twinrl.core.segment import IMAGE_PREFIX, Segment

CHUNK = 4
EVERYTHING = [Draw()]


class Shelf:
    """An index with its segments in memory, as a reader has them."""

    def __init__(self, schema=SCHEMA) -> None:
        self.index, self.segments, self.generator = Index(schema), {}, np.random.default_rng(0)

    def add(self, id: int, first: int = 0, steps: int = 8, codec: str = "raw", **options) -> Entry:
        """Values at step t of the segment are f(first + t)."""
        header, columns = segment(first, steps, **{"episode": f"episode {id}", **options})
        if codec != "raw":
            for name in [name for name in columns if name.startswith(IMAGE_PREFIX)]:
                columns[name] = encode(columns[name], codec)
        whole = Segment({**header, "writer": "w", "sequence": id}, columns)
        entry = describe(id, whole, 1, 64 * id, 64)
        self.segments[id] = whole
        self.index.put(entry)
        return entry

    def remove(self, id: int) -> None:
        self.index.remove(id)
        del self.segments[id]

    def records(self) -> dict[int, bytes]:
        """The segments as the service holds them."""
        return {id: b"".join(record.encode(*each)[0]) for id, each in self.segments.items()}

    def draw(self, count: int, parts=EVERYTHING, chunk: int = CHUNK, out=None) -> Batch:
        index = self.index
        chosen = index.choose(parts, count, chunk, self.generator)
        for row, id in zip(chosen.rows.tolist(), chosen.ids.tolist(), strict=True):
            index.places.put(row, index.entries[id], self.segments[id])
        addresses = index.places.addresses
        batch = gather(
            chosen.windows,
            index.places.fields,
            addresses[chosen.row],
            addresses[chosen.second_row],
            chunk,
            out,
            self.segments,
        )
        return {**batch, "weight": chosen.weight}


def chi_square(counts, expected) -> float:
    """How far counts are from what is expected, in standard deviations of the statistic."""
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    expected = expected * counts.sum() / expected.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = len(counts) - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)


def tally(batch: Batch, ids) -> np.ndarray:
    """How often each segment was drawn."""
    return np.array([(batch["segment"] == id).sum() for id in ids])


def assert_windows_are_whole(batch: Batch, first: np.ndarray, chunk: int = CHUNK) -> None:
    """Every column says f(t) of the window that begins at `first` (B,) and has `steps` steps."""
    offsets, lengths = np.arange(chunk), batch["steps"]
    mask = offsets < lengths[:, None]
    steps = first[:, None] + offsets
    assert (batch["step_mask"] == mask).all()
    assert (batch["action"][..., 3] == steps * mask).all()
    assert np.allclose(batch["reward"], steps * mask / 10)
    assert (batch["intervention"] == ((steps % 3 == 0) & mask)).all()
    for prefix, at in (("", first), ("next.", first + lengths)):
        assert (batch[prefix + "observation.state"] == at[:, None]).all()
        for camera in SCHEMA.cameras:
            images = batch[prefix + IMAGE_PREFIX + camera]
            assert (images == (at % 251)[:, None, None, None]).all()


# -- windows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "frames", "expected"),
    [
        ("", None, [0, 1, 2, 3, 4]),
        ("truncated", None, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("", [0, 4, 8], [0, 4]),
        ("", [0, 4], [0]),
        ("terminated", [0, 4], [0, 4]),
        ("terminated", [0, 4, 6], [0, 4, 6]),
        ("truncated", [0, 4, 6], [0]),
        ("", [2, 5], []),
    ],
)
def test_where_windows_start(end, frames, expected):
    entry = Shelf().add(1, end=end, frames=frames)
    assert list(window_starts(entry, None, CHUNK)) == expected


@pytest.mark.parametrize(
    ("frames", "steps", "end", "after", "expected"),
    [
        (None, 8, "", None, [0, 1, 2, 3, 4, 5, 6, 7]),
        (None, 2, "", None, [0, 1, 2, 3, 4, 5, 6]),
        (None, 2, "truncated", None, [0, 1, 2, 3, 4, 5, 6, 7]),
        ([0, 4, 6, 8], 8, "", [0, 2, 4], [0, 4, 6]),
        ([0, 4, 6, 8], 8, "", [0, 4], [0, 4]),
        ([0, 4, 6], 2, "terminated", [0], [0, 6]),
        (None, 8, "", [0, 2], [0, 1, 2, 3, 4, 6]),
    ],
)
def test_where_windows_start_that_go_on_in_the_next_segment(frames, steps, end, after, expected):
    shelf = Shelf()
    first = shelf.add(1, frames=frames)
    following = shelf.add(2, 8, steps, end=end, frames=after)
    assert list(window_starts(first, following, CHUNK)) == expected


def test_windows_carry_the_right_steps_and_masks():
    shelf = Shelf()
    cases = {1: {"end": "terminated"}, 2: {"end": "truncated"}, 3: {"frames": [0, 3, 4, 7, 8]}}
    for id, options in cases.items():
        shelf.add(id, 100 * id, **options)
    batch = shelf.draw(400)
    lengths = np.where(batch["segment"] == 3, 4, np.minimum(4, 8 - batch["step"]))
    assert (batch["steps"] == lengths).all()
    assert_windows_are_whole(batch, 100 * batch["segment"] + batch["step"])
    last = batch["step"] + lengths == 8
    assert (batch["terminated"] == (last & (batch["segment"] == 1))).all()
    assert (batch["truncated"] == (last & (batch["segment"] == 2))).all()
    pairs = set(zip(batch["segment"].tolist(), batch["step"].tolist(), strict=True))
    assert len(pairs) == 8 + 8 + 3, "every window is drawn some time"


@pytest.mark.parametrize("codec", ["raw", "zstd-delta"])
def test_windows_go_on_in_the_next_segment_of_their_episode(codec):
    shelf = Shelf()
    same = {"episode": "long", "codec": codec}
    for id in (1, 2, 3):
        first = 8 * (id - 1)
        shelf.add(id, first, first_step=first, end="truncated" if id == 3 else "", **same)
        shelf.add(10 + id, 100 * id, episode=f"other {id}", end="terminated", codec=codec)
    batch = shelf.draw(600)
    mine = batch["segment"] < 10
    first = np.where(mine, 8 * (batch["segment"] - 1), 100 * (batch["segment"] - 10))
    first += batch["step"]
    assert_windows_are_whole(batch, first)
    assert set(first[mine].tolist()) == set(range(24)), "no step is left out at a segment's end"
    assert (batch["steps"][mine] == np.minimum(4, 24 - first[mine])).all()
    assert (batch["truncated"] == (mine & (first + batch["steps"] == 24))).all()
    assert (batch["terminated"] == (~mine & (batch["step"] + batch["steps"] == 8))).all()


def test_windows_over_an_end_come_and_go_with_the_next_segment():
    shelf = Shelf()
    table = shelf.index.table(EVERYTHING[0], CHUNK)
    shelf.add(1, 0, episode="long")
    assert table.windows == 5
    shelf.add(2, 8, episode="long", first_step=8)
    assert table.windows == 8 + 5
    shelf.remove(2)
    assert table.windows == 5
    assert set(shelf.draw(200)["step"].tolist()) == {0, 1, 2, 3, 4}


def test_a_segment_whose_writer_died_ends_truncated():
    shelf = Shelf()
    entry = shelf.add(1, 0)
    table = shelf.index.table(EVERYTHING[0], CHUNK)
    assert entry.end == OPEN and table.windows == 5
    shelf.index.put(entry._replace(end=CUT, marked="lease"))
    assert table.windows == 8
    batch = shelf.draw(200)
    assert (batch["truncated"] == (batch["step"] + batch["steps"] == 8)).all()
    assert batch["truncated"].any() and not batch["terminated"].any()


def test_a_terminal_state_without_frame_shows_the_last_one():
    shelf = Shelf()
    shelf.add(1, 40, end="terminated", frames=[0, 4])
    shelf.add(2, 140, frames=[0, 4, 6], episode="long")
    shelf.add(3, 148, 2, end="terminated", frames=[], episode="long")
    batch = shelf.draw(200)
    tail = (batch["segment"] == 1) & (batch["step"] == 4)
    assert (batch["next.observation.images.front"][tail] == 44).all() and tail.any()
    assert (batch["next.observation.state"][tail] == 48).all() and batch["terminated"][tail].all()
    tail = (batch["segment"] == 2) & (batch["step"] == 6)
    assert (batch["next.observation.images.front"][tail] == 146).all() and tail.any()
    assert (batch["next.observation.state"][tail] == 150).all() and batch["terminated"][tail].all()


def test_n_step_returns_are_discounted_over_executed_steps_only():
    shelf = Shelf()
    shelf.add(1, 10, end="terminated")
    shelf.add(2, 110, end="truncated")
    batch = shelf.draw(100, chunk=5)
    returns, discounts = discounted(batch, 0.9)
    first = 100 * (batch["segment"] - 1) + 10 + batch["step"]
    for row in range(100):
        steps = batch["steps"][row]
        rewards = (first[row] + np.arange(steps)) / 10
        assert returns[row] == pytest.approx((0.9 ** np.arange(steps) * rewards).sum(), rel=1e-5)
        assert discounts[row] == pytest.approx(0.9**steps * (not batch["terminated"][row]))


# -- batches ---------------------------------------------------------------------------------------------


def test_a_given_batch_is_filled_in_place():
    shelf = Shelf()
    shelf.add(1)
    out = shelf.draw(30)
    again = shelf.draw(30, out=out)
    assert again["action"] is out["action"]
    assert_windows_are_whole(again, again["step"])
    wrong = {
        "action": np.zeros((30, 4, 7), np.float64),
        "reward": np.zeros((60, 4), np.float32)[::2],
    }
    again = shelf.draw(30, out=wrong)
    assert again["action"].dtype == np.float32 and again["reward"] is not wrong["reward"]
    assert_windows_are_whole(again, again["step"])


@pytest.mark.parametrize("shape", [(3, 50, 50, 3), (3, 128, 128, 3), (5,), (4, 2, 7), (0, 3)])
def test_rows_of_any_size_are_copied_from_anywhere(shape):
    rng = np.random.default_rng(0)
    source = rng.integers(0, 255, (9, *shape[1:]), np.uint8)
    target = np.zeros(shape, np.uint8)
    wanted_rows = rng.integers(0, 9, shape[0])
    addresses = source.ctypes.data + wanted_rows * source[0].nbytes
    copy_rows(target, addresses)
    assert (target == source[wanted_rows]).all()


def test_columns_of_another_shape_are_never_copied_from():
    shelf = Shelf()
    entry = shelf.add(1)
    header, columns = shelf.segments[1]
    for name, wrong in (
        ("action", columns["action"][:-1]),
        ("observation.state", columns["observation.state"][:-1]),
        ("reward", columns["reward"].astype(np.float64)),
        (IMAGE_PREFIX + "front", columns[IMAGE_PREFIX + "front"][:, :4]),
    ):
        with pytest.raises(WireError, match=name):
            shelf.index.places.put(0, entry, Segment(header, {**columns, name: wrong}))
    packed = {**columns, "reward": encode(columns["reward"], "lz4")}
    with pytest.raises(WireError, match="only images"):
        shelf.index.places.put(0, entry, Segment(header, packed))
    del columns["intervention"]
    with pytest.raises(WireError, match="lacks 'intervention'"):
        shelf.index.places.put(0, entry, Segment(header, columns))


def test_the_service_gathers_what_a_reader_would():
    shelf = Shelf()
    shelf.add(1, 0, episode="long")
    shelf.add(2, 8, episode="long", first_step=8, end="terminated", codec="lz4")
    windows, chunk = wanted(
        {"windows": [[1, 0, 4, 0], [1, 6, 4, 2], [2, 5, 3, 0]], "chunk": CHUNK}, SCHEMA
    )
    batch, instructions = gather_from(windows, chunk, SCHEMA, shelf.index.entries, shelf.records())
    assert_windows_are_whole(batch, np.array([0, 6, 13]))
    assert batch["terminated"].tolist() == [False, False, True]
    assert instructions == ["lift the cube"] and batch["instruction"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ([1, 0, 5, 0], "5 steps"),
        ([1, -1, 4, 0], "from -1"),
        ([1, 5, 4, 0], "has no steps 5 to 9"),
        ([1, 8, 1, 0], "has no steps 8 to 9"),
        ([1, 6, 4, 3], "does not follow"),
        ([2, 6, 4, 1], "does not follow"),
        ([0, 0, 4, 0], "cannot be"),
        ([1, 0, 4], "no window"),
        ([1, 0, 4.0, 0], "no window"),
        ("x", "no window"),
    ],
)
def test_the_service_refuses_windows_that_are_none(window, message):
    shelf = Shelf()
    shelf.add(1, 0, episode="long")
    shelf.add(2, 8, episode="long", first_step=8)
    shelf.add(3, 16)
    with pytest.raises(WireError, match=message):
        windows, chunk = wanted({"windows": [window], "chunk": CHUNK}, SCHEMA)
        gather_from(windows, chunk, SCHEMA, shelf.index.entries, shelf.records())


def test_a_batch_that_fits_no_message_is_refused():
    with pytest.raises(WireError, match="at most"):
        wanted({"windows": [[1, 0, 1, 0]] * 1_000_000, "chunk": 64}, SCHEMA)
    with pytest.raises(WireError, match="chunk"):
        wanted({"windows": [[1, 0, 1, 0]], "chunk": 0}, SCHEMA)


# -- distributions ---------------------------------------------------------------------------------------


def test_every_window_is_equally_likely():
    shelf = Shelf()
    for id, steps in enumerate((4, 8, 20, 5, 13), 1):
        shelf.add(id, 100 * id, steps, end="truncated")
    batch = shelf.draw(50_000)
    key = 100 * batch["segment"] + batch["step"]
    counts = np.unique(key, return_counts=True)[1]
    assert len(counts) == 50 and abs(chi_square(counts, np.ones(50))) < 4
    assert (batch["weight"] == 1).all()


def test_shares_of_a_mix_are_kept():
    shelf = Shelf()
    for id in range(1, 31):
        source = ("demo", "twin", "real")[id % 3]
        shelf.add(id, 100 * id, source=source, end="truncated")
    mix = {"demo": 0.2, "twin": 0.3, "real": 0.5}
    counts = sum(
        np.bincount(shelf.draw(7, draws(mix, None, None, None, "uniform"))["source"], minlength=3)
        for _ in range(2000)
    )
    assert abs(counts / 14_000 - [0.2, 0.3, 0.5]).max() < 0.01


def test_counts_of_a_mix_are_fixed_but_for_the_rest_and_empty_parts_give_to_the_others():
    generator = np.random.default_rng(0)
    shares, sizes = [0.25, 0.25, 0.5], [5, 100, 1]
    assert split(8, shares, sizes, generator) == [2, 2, 4]
    totals = np.sum([split(5, shares, sizes, generator) for _ in range(2000)], axis=0)
    assert totals.sum() == 10_000 and abs(totals - [2500, 2500, 5000]).max() < 100
    assert split(6, shares, [5, 100, 0], generator) == [3, 3, 0]


def test_parts_by_task_region_and_success():
    shelf = Shelf()
    for id in range(1, 41):
        entry = shelf.add(
            id,
            100 * id,
            task="lift" if id % 2 else "push",
            region="id" if id % 4 < 2 else "ood",
            end="truncated",
        )
        if id % 5 == 0:
            shelf.index.put(entry._replace(success=True))
    parts = [
        Draw(0.25, task="push"),
        Draw(0.25, region="ood", by="fresh"),
        Draw(0.25, success=True),
        Draw(0.25, success=False, task="lift"),
    ]
    ids = shelf.draw(400, parts)["segment"].reshape(4, 100)
    assert (ids[0] % 2 == 0).all() and (ids[1] % 4 >= 2).all() and (ids[2] % 5 == 0).all()
    assert (ids[3] % 5 != 0).all() and (ids[3] % 2 == 1).all()
    assert len(set(ids[2].tolist())) == 8


def test_success_belongs_to_the_episode():
    """A late success counts for all its segments; an episode that goes on has neither succeeded nor failed."""
    shelf = Shelf()
    good, bad = Draw(success=True), Draw(success=False)
    for id in (1, 2):
        shelf.add(id, 8 * id, episode="late", first_step=8 * (id - 1))
    shelf.add(3, 100, episode="fails")
    tables = [shelf.index.table(part, CHUNK) for part in (good, bad)]
    assert [table.windows for table in tables] == [0, 0]
    last = shelf.add(4, 24, episode="late", first_step=16, end="terminated")
    assert tables[1].windows == 24
    shelf.index.put(last._replace(success=True))
    assert [table.windows for table in tables] == [24, 0]
    assert set(shelf.draw(200, [good])["segment"].tolist()) == {1, 2, 4}
    shelf.add(5, 108, episode="fails", first_step=8, end="truncated")
    assert set(shelf.draw(200, [bad])["segment"].tolist()) == {3, 5}


def test_newest_segments_only():
    shelf = Shelf()
    for id in range(1, 200):
        shelf.add(id, 100 * id, end="truncated")
    for id in range(150, 196):
        shelf.remove(id)
    for by in ("uniform", "priority", "fresh"):
        batch = shelf.draw(4000, [Draw(newest=6, by=by)])
        assert set(batch["segment"].tolist()) == {148, 149, 196, 197, 198, 199}
        if by != "fresh":
            counts = tally(batch, [148, 149, 196, 197, 198, 199])
            assert abs(chi_square(counts, np.ones(6))) < 4


def test_fresh_transitions_halve_their_chance_with_age():
    """Also when the weights were scaled anew in between."""
    shelf = Shelf()
    part = [Draw(by="fresh", half_life=24.0)]
    for id in range(1, 3001):
        shelf.add(id, id, end="truncated")
        if id == 5:
            shelf.index.table(part[0], CHUNK)
        if id > 100:
            shelf.remove(id - 100)
    batch = shelf.draw(60_000, part)
    age = 3000 - batch["segment"]
    counts = np.bincount(age)[:30]
    assert abs(chi_square(counts, 0.5 ** (np.arange(30) * 8 / 24))) < 4


def test_windows_are_drawn_by_priority_with_weights_that_undo_it():
    shelf = Shelf()
    part = [Draw(by="priority", exponent=0.5, importance=1.0)]
    for id in (1, 2, 3):
        shelf.add(id, 100 * id, end="truncated", frames=[0, 2, 4, 6, 8] if id == 3 else None)
    windows = np.array(
        [(id, step) for id in (1, 2) for step in range(8)] + [(3, s) for s in (0, 2, 4, 6)]
    )
    shelf.draw(10, part)
    priorities = np.random.default_rng(1).uniform(0.1, 9.0, len(windows))
    shelf.index.set_priorities(windows[:, 0], windows[:, 1], priorities)
    batch = shelf.draw(100_000, part)
    drawn = 10 * batch["segment"] + batch["step"]
    keys, counts = np.unique(drawn, return_counts=True)
    assert (keys == 10 * windows[:, 0] + windows[:, 1]).all()
    assert abs(chi_square(counts, priorities**0.5)) < 4
    weights = np.array([batch["weight"][drawn == key][0] for key in keys])
    assert weights.max() == 1 and np.allclose(weights * priorities**0.5, min(priorities) ** 0.5)
    undone = np.array([batch["weight"][drawn == key].sum() for key in keys])
    assert np.abs(undone / undone.mean() - 1).max() < 0.1, "weighted, the draw is uniform"


def test_new_windows_get_the_highest_priority_and_old_ones_keep_theirs():
    shelf = Shelf()
    part = [Draw(by="priority", exponent=1.0)]
    shelf.add(1, 0, episode="long")
    shelf.draw(1, part)
    shelf.index.set_priorities(np.full(5, 1), np.arange(5), np.array([1.0, 2.0, 3.0, 4.0, 20.0]))
    shelf.add(2, 8, episode="long", first_step=8, end="truncated")
    batch = shelf.draw(50_000, part)
    counts = [((batch["segment"] == 1) & (batch["step"] == step)).sum() for step in range(8)]
    counts += [((batch["segment"] == 2) & (batch["step"] == step)).sum() for step in range(8)]
    assert abs(chi_square(counts, [1, 2, 3, 4, 20, 20, 20, 20] + [20] * 8)) < 4


def test_a_segments_own_priority_stands_for_all_its_windows():
    shelf = Shelf()
    part = [Draw(by="priority", exponent=0.7)]
    for id in (1, 2):
        shelf.add(id, 100 * id, end="truncated")
    shelf.draw(1, part)
    values = np.array([0.3, 8.0, 2.0])
    told = shelf.index.set_priorities(np.array([1, 1, 1]), np.array([0, 3, 7]), values)
    mean = ((values**0.7).sum() + 5) / 8
    assert told == {1: pytest.approx(mean ** (1 / 0.7))}
    again = Shelf()
    again.index.priority = dict(told)
    for id in (1, 2):
        again.add(id, 100 * id, end="truncated")
    counts = [tally(each.draw(20_000, part), [1, 2]) for each in (shelf, again)]
    for each in counts:
        assert abs(chi_square(each, [mean, 8.0**0 if each is counts[1] else 1.0])) < 4


def test_priorities_of_segments_that_are_gone_are_passed_over():
    shelf = Shelf()
    for id in (1, 2):
        shelf.add(id, 100 * id, end="truncated")
    part = [Draw(by="priority")]
    batch = shelf.draw(50, part)
    shelf.remove(1)
    told = shelf.index.set_priorities(batch["segment"], batch["step"], np.full(50, 3.0))
    assert set(told) == {2}
    assert shelf.index.set_priorities(np.array([2]), np.array([99]), np.array([5.0])) == {}


# -- structures ------------------------------------------------------------------------------------------


def test_the_tables_agree_with_a_naive_account_of_what_came_and_went():
    """Thousands of insertions and removals in random order, with every way to draw."""
    shelf, rng = Shelf(), np.random.default_rng(3)
    parts = [Draw(by=by, source="twin") for by in ("uniform", "priority", "fresh")]
    tables = [shelf.index.table(part, CHUNK) for part in parts]
    alive: dict[int, int] = {}
    plain = describe(
        1, Segment({**segment()[0], "writer": "w", "sequence": 0}, segment()[1]), 1, 0, 1
    )
    for id in range(1, 5001):
        steps = int(rng.integers(1, 12))
        frames = None if id % 3 else list(range(0, steps + 1, 2))
        source = "twin" if id % 5 else "demo"
        entry = plain._replace(
            id=id, source=source, episode=str(id), steps=steps, frame_step=frames, end=TERMINATED
        )
        shelf.index.put(entry)
        if source == "twin":
            alive[id] = len(window_starts(entry, None, CHUNK))
        if rng.random() < 0.48:
            victim = int(rng.choice(list(alive))) if alive else id
            shelf.index.remove(victim)
            alive.pop(victim, None)
    for table in tables:
        assert table.windows == sum(alive.values())
        chosen = table.draw(5000, rng)
        ids = shelf.index._id[chosen.row]
        assert set(ids.tolist()) <= set(alive)
    chosen = tables[0].draw(60_000, rng)
    ids = shelf.index._id[chosen.row]
    counts = np.bincount(ids, minlength=5001)[list(alive)]
    assert abs(chi_square(counts, list(alive.values()))) < 4
    assert shelf.index.count["twin"] == len(alive)


def test_a_sum_tree_finds_the_leaf_of_every_value():
    rng = np.random.default_rng(0)
    tree, weights = SumTree(1000), np.zeros(1024)
    for _ in range(50):
        leaves = np.unique(rng.integers(0, 1000, rng.integers(1, 300)))
        weights[leaves] = rng.uniform(0, 1, len(leaves)) * (rng.random(len(leaves)) < 0.7)
        tree.set(leaves, weights[leaves])
    assert tree.total == pytest.approx(weights.sum())
    assert tree.before(321) == pytest.approx(weights[:321].sum())
    values = rng.random(10_000) * tree.total
    found, share = tree.find(values)
    assert (weights[found] > 0).all() and (share >= 0).all() and (share < 1).all()
    back = np.concatenate([[0], np.cumsum(weights)])[found] + share * weights[found]
    assert np.allclose(back, values)
    edge, _ = tree.find(np.full(3, np.nextafter(tree.total, np.inf)))
    assert (weights[edge] > 0).all(), (
        "not even a value beyond the end reaches a leaf without weight"
    )


def test_ragged_stretches_survive_growth_and_packing():
    rng, ragged, mine = np.random.default_rng(0), Ragged(np.int32, 50), {}
    for turn in range(3000):
        slot = int(rng.integers(0, 50))
        if rng.random() < 0.3:
            ragged.drop(slot)
            mine.pop(slot, None)
        else:
            mine[slot] = rng.integers(0, 1000, rng.integers(0, 30))
            ragged.put(slot, mine[slot])
        if turn % 500 == 499:
            live = np.array(sorted(mine))
            ragged.move(live)
            mine = {new: mine[old] for new, old in enumerate(live.tolist())}
    for slot in range(50):
        found = ragged.get(slot)
        assert (found is None) == (slot not in mine)
        assert found is None or found.tolist() == mine[slot].tolist()
    assert len(ragged.values) < 5000


def test_insertion_does_not_cost_more_when_there_is_more():
    """A table of 100,000 segments takes in, gives up and draws in about the time of a small one."""
    rng = np.random.default_rng(0)
    table = Table()
    for id in range(100_000):
        table.put(id, id, 50, range(47))
    table.draw(256, rng)
    gc.collect()
    visited = table._used
    for id in range(100_000, 100_500):
        table.put(id, id, 50, range(47))
        table.remove(id - 100_000)
        assert len(table._stale) == 2, "only what changed is looked at"
        table.draw(8, rng)
    assert table._used == visited + 500 and table.windows == 100_000 * 47


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "moon"}, "sources are demo, twin, real"),
        ({"by": "colour"}, "uniform, priority, fresh"),
        ({"share": -1}, "share"),
        ({"newest": 0}, "newest"),
        ({"half_life": 0.0}, "half_life"),
        ({"exponent": -0.5}, "exponent"),
    ],
)
def test_a_draw_refuses_what_makes_no_sense(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Draw(**arguments)


def test_a_mix_refuses_what_makes_no_sense():
    with pytest.raises(ConfigError, match="share of 0"):
        draws({"twin": 0.0}, None, None, None, "uniform")
    with pytest.raises(ConfigError, match="task belong into the parts"):
        draws([Draw()], "lift", None, None, "uniform")
    with pytest.raises(ConfigError, match="sources are"):
        draws({"dream": 1.0}, None, None, None, "uniform")


# -- who waits -------------------------------------------------------------------------------------------


def test_waits_are_told_and_counted_over_repeated_questions(monkeypatch):
    """A client asks for a second at a time: what it is told and what is counted runs from its first question."""
    now = [100.0]
    monkeypatch.setattr("buffer_service.polls.time.monotonic", lambda: now[0])
    polls, may = Polls(threading.RLock()), []

    def ready(late):
        return {"granted": bool(may)} if may or late else None

    for _ in range(4):
        future = polls.add(ready, 1.0, "learner", lambda: "" if may else "too few inserts")
        now[0] += 1.0
        assert polls.waiting() == [f"learner waits {now[0] - 100:.1f} s: too few inserts"]
        assert polls.waited() == {"learner": pytest.approx(now[0] - 100)}
        polls.answer()
        assert future.result(0) == {"granted": False}
    future = polls.add(ready, 1.0, "learner", lambda: "" if may else "too few inserts")
    now[0] += 0.5
    may.append(True)
    polls.answer()
    assert future.result(0) == {"granted": True}
    now[0] += 50
    assert polls.waiting() == [] and polls.waited() == {"learner": pytest.approx(4.5)}
    may.clear()
    polls.add(ready, 1.0, "writer w", lambda: "too few samples")
    now[0] += 2.0
    polls.answer()
    now[0] += 60.0
    assert polls.waited() == {"learner": pytest.approx(4.5), "writer w": pytest.approx(2.0)}
    polls.add(ready, 1.0, "learner", lambda: "too few inserts")
    assert polls.waited()["learner"] == pytest.approx(4.5), "a new wait begins with nothing"


@pytest.mark.parametrize("ratio", [0.01, 0.5, 1.0, 3.0, 64.0])
@pytest.mark.parametrize("batch", [0, 1, 64, 1000])
@pytest.mark.parametrize("inserted", [1, 50, 400])
def test_the_narrowest_bounds_that_are_taken_let_one_side_go_on(ratio, batch, inserted):
    """At the least error that is not refused; one insert may bring any number of steps, also before min_size."""
    least = max(batch / 2, ratio)
    with pytest.raises(ConfigError, match="can deadlock"):
        RateLimiter(ratio, min_size=10, error=least * 0.99, largest_batch=batch)
    limiter = RateLimiter(ratio, min_size=10, error=least, largest_batch=batch)
    size, generator = max(batch, 1), np.random.default_rng(0)
    for _ in range(500):
        may_insert = not limiter.why_not_insert()
        may_sample = size <= 2 * least and not limiter.why_not_sample(size)
        assert may_insert or may_sample or size > 2 * least
        if may_insert and (not may_sample or generator.random() < 0.5):
            limiter.inserted += inserted
        elif may_sample:
            limiter.sampled += size
        else:
            break


def test_a_limiter_names_every_setting_that_cannot_be():
    with pytest.raises(ConfigError, match="must not be negative"):
        RateLimiter(min_size=-1)
    for ratio in (0.0, -2.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="samples_per_insert"):
            RateLimiter(samples_per_insert=ratio)
    with pytest.raises(ConfigError, match="error"):
        RateLimiter(1.0, error=float("nan"))
    with pytest.raises(ConfigError, match="largest_batch"):
        RateLimiter(1.0, largest_batch=-5)
    assert RateLimiter(min_size=5).why_not_sample(10) and not RateLimiter().why_not_sample(10)
