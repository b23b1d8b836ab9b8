"""Several replay services as one: nothing twice, nothing lost, drawn as from one, with one of them dead or new.

TWINRL_LONG=1 kills for 3 minutes instead of 8 s; TWINRL_SEED is the kills' order.
"""

import contextlib
import itertools
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from buffer_service.client import Draw, Prefetcher, ShardedReader, ShardedWriter, Writer
from buffer_service.shards import join_id, split_id
from buffer_service.testing import SCHEMA, ServiceProcess, segment
from twinrl.core.errors import DeadlineError, Rejected, TwinRLError
from twinrl.core.keys import Keys, create_keys
from twinrl.core.sockets import Client, wait_until

SECONDS = 180 if os.environ.get("TWINRL_LONG") else 8
pytestmark = pytest.mark.timeout(SECONDS + 150)
STEPS = 8
PER_EPISODE = 3  # segments


class Shards:
    """Services of one run, with writers and readers of all."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.services: list[ServiceProcess] = []
        self.closing = []

    def start(self, count: int, **options) -> list[str]:
        """Start services; returns the addresses of all."""
        create_keys(self.folder / "keys")

        def begin(number: int) -> ServiceProcess:
            keys = str(self.folder / "keys")
            return ServiceProcess(self.folder / str(number), keys=keys, **options)

        first = len(self.services)
        with ThreadPoolExecutor(count) as pool:
            self.services += pool.map(begin, range(first, first + count))
        return self.addresses

    @property
    def addresses(self) -> list[str]:
        return [service.address for service in self.services]

    @property
    def keys(self):
        return Keys.load(self.folder / "keys" / "cluster.key")

    def writer(self, name: str = "w", known: int | None = None, **options) -> ShardedWriter:
        options = {"schema": SCHEMA, "deadline": 30.0, "lost_after": 2.0} | options
        writer = ShardedWriter(self.addresses[:known], self.keys, name, **options)
        self.closing.append(lambda: writer.close(0.0))
        return writer

    def reader(self, known: int | None = None, **options) -> ShardedReader:
        options = {"deadline": 30.0, "lost_after": 1.0} | options
        reader = ShardedReader(self.addresses[:known], self.keys, **options)
        self.closing.append(reader.close)
        return reader

    def client(self, number: int = 0) -> Client:
        client = Client("replay", self.addresses[number], self.keys, timeout=20)
        self.closing.append(client.close)
        return client

    def add(self, **options) -> int:
        """One more service, told to the first; returns its number."""
        self.start(1, **options)
        answer = self.client().call("shard_add", {"address": self.addresses[-1]})[0]
        return answer["number"]

    def close(self) -> None:
        for close in self.closing[::-1]:
            try:
                close()
            except TwinRLError:  # a test leaves things unacknowledged on purpose
                pass
        for service in self.services:
            service.kill()
            service.process.stdout.close()


@pytest.fixture
def shards(tmp_path):
    shards = Shards(tmp_path)
    yield shards
    shards.close()


def write(writer, episodes: range, per_episode: int = PER_EPISODE, **options) -> None:
    """Episodes whose segments follow each other: episode e has the steps from 1000 e on."""
    for episode in episodes:
        for place in range(per_episode):
            header, columns = segment(
                1000 * episode + STEPS * place,
                STEPS,
                end="truncated" if place == per_episode - 1 else "",
                **options,
            )
            header |= {"episode": f"e{episode}", "first_step": STEPS * place}
            writer.write(header, columns)


def names(segments) -> list[tuple[str, int]]:
    """(episode, first step) of each."""
    return [(each.header["episode"], each.header["first_step"]) for each in segments]


def expected(episodes: range, per_episode: int = PER_EPISODE) -> list[tuple[str, int]]:
    return [(f"e{e}", STEPS * place) for e in episodes for place in range(per_episode)]


def test_ids_of_the_first_service_are_its_own():
    assert join_id(0, 17) == 17
    ids = np.array([join_id(shard, 5_000_000_000) for shard in range(64)])
    shard, local = split_id(ids)
    assert shard.tolist() == list(range(64)) and set(local.tolist()) == {5_000_000_000}
    assert ((ids << 20) > 0).all()  # the learner counts steps in the bits below


def test_an_episode_is_in_one_shard_and_everything_once(shards):
    shards.start(3)
    writer, reader = shards.writer(), shards.reader()
    write(writer, range(30))
    writer.flush()
    reader.sync()
    entries = reader.entries()
    assert sorted((e.episode, e.first_step) for e in entries) == sorted(expected(range(30)))
    assert len({e.id for e in entries}) == 90
    shard_of = {}
    for entry in entries:
        shard_of.setdefault(entry.episode, set()).add(split_id(entry.id)[0])
    assert all(len(found) == 1 for found in shard_of.values())
    sizes = np.bincount([found.pop() for found in shard_of.values()])
    assert sizes.tolist() == [10, 10, 10]
    assert sorted(names(reader.segments())) == sorted(expected(range(30)))
    for trajectory in reader.trajectories():
        episode = int(trajectory[0].header["episode"][1:])
        assert names(trajectory) == expected(range(episode, episode + 1))
    assert len(list(reader.trajectories())) == 30
    for each, entry in zip(reader.load(entries), entries, strict=True):
        assert each.header["episode"] == entry.episode
        assert each.columns["action"][0, 0] == int(entry.episode[1:]) * 1000 + entry.first_step
    info = reader.info()
    assert info["sizes"]["twin/lift/id"] == {
        "segments": 90,
        "transitions": 720,
        "bytes": sum(e.length for e in entries),
    }
    assert len(info["shards"]) == 3 and info["writers"] == {"w": 89}
    gone = [entry.id for entry in entries[:40]]
    assert reader.call("delete", {"ids": gone}, 20.0) == {"deleted": 40}
    wait_until(lambda: len(reader.entries()) == 50, 20, "the deletions")


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """In standard deviations: (chi2 - dof) / sqrt(2 dof)."""
    expected = expected / expected.sum() * counts.sum()
    assert expected.min() > 5
    freedom = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def uneven(shards, sources=("twin",)) -> None:
    """Shards that hold 4, 8 and 24 episodes of each source; episode numbers say which."""
    shards.start(3)
    for shard, count in enumerate((4, 8, 24)):
        with Writer(shards.addresses[shard], shards.keys, "direct", schema=SCHEMA) as writer:
            for place, source in enumerate(sources):
                first = 100 * place + 30 * shard
                write(writer, range(first, first + count), source=source)


def drawn(batches) -> np.ndarray:
    """The first step of each window: 1000 * episode + step."""
    return np.concatenate([batch["action"][:, 0, 0].astype(int) for batch in batches])


@pytest.mark.parametrize("mapped", [True, False])
def test_draws_are_distributed_as_those_of_one_replay(shards, mapped, monkeypatch):
    if not mapped:  # as on another host
        monkeypatch.setattr("buffer_service.reader.identity", lambda folder: {})
    uneven(shards, ("twin", "demo"))
    reader = shards.reader(seed=3, cache_bytes=1 << (30 if mapped else 10))
    reader.sync()
    assert reader.mapped == mapped
    out, values = {}, []
    for _ in range(60):
        out = reader.sample(256, chunk=4, out=out)
        values.append(out["action"][:, 0, 0].astype(int))
        assert (out["observation.images.front"][:, 0, 0, 0] == values[-1] % 251).all()
        assert (out["observation.state"][:, 0] == values[-1]).all()
        assert (out["weight"] == 1).all() and out["instruction"][0] == "lift the cube"
        shard, id = split_id(out["segment"])
        assert (shard == out["shard"]).all() and (id > 0).all()
        assert (values[-1] // 1000 % 100 // 30 == shard).all()
        assert (values[-1] % 1000 % STEPS == out["step"]).all()
    found, counts = np.unique(np.concatenate(values), return_counts=True)
    assert len(found) == 2 * 36 * PER_EPISODE * STEPS
    assert abs(chi_square(counts, np.ones(len(found)))) < 4
    twin = [reader.sample(256, chunk=4, mix={"twin": 0.75, "demo": 0.25}) for _ in range(20)]
    found, counts = np.unique(drawn(twin) // 1000, return_counts=True)
    share = np.where(found < 100, 0.75, 0.25)
    assert counts[found < 100].sum() == 20 * 192  # to the window
    assert abs(chi_square(counts, share)) < 4
    recent = [reader.sample(64, chunk=4, newest=30) for _ in range(10)]
    newest = {(e.episode, e.first_step) for e in reader.entries()[-30:]}
    numbers = drawn(recent)
    assert {(f"e{n // 1000}", n % 1000 // STEPS * STEPS) for n in numbers.tolist()} == newest
    if mapped:
        again = reader.sample(256, chunk=4, out=out)
        assert again["observation.images.front"] is out["observation.images.front"]
        assert again["shard"] is out["shard"]


def test_priorities_over_shards(shards):
    uneven(shards)
    reader = shards.reader(seed=4)
    reader.sync()
    part = [Draw(by="priority", exponent=0.5, importance=1.0)]
    for _ in range(60):  # until every window was drawn
        batch = reader.sample(256, mix=part, chunk=4)
        priority = 1.0 + batch["action"][:, 0, 0].astype(int) // 1000 % 4
        reader.update_priorities(batch, priority)
    batches = [reader.sample(256, mix=part, chunk=4) for _ in range(40)]
    found, counts = np.unique(drawn(batches), return_counts=True)
    assert len(found) == 36 * PER_EPISODE * STEPS
    assert abs(chi_square(counts, np.sqrt(1.0 + found // 1000 % 4))) < 4
    for batch in batches:  # weights undo the priorities, whatever the shard
        chance = np.sqrt(1.0 + batch["action"][:, 0, 0].astype(int) // 1000 % 4)
        assert np.allclose(batch["weight"] * chance, chance.min(), rtol=1e-4)
        assert batch["weight"].max() == pytest.approx(1)
    reader.flush_priorities()
    fresh = reader.sample(256, mix=[Draw(by="fresh", half_life=50.0)], chunk=4)
    assert len(np.unique(fresh["shard"])) == 3  # each shard's newest are the newest


def test_a_prefetcher_draws_from_shards(shards):
    uneven(shards)
    reader = shards.reader()
    with Prefetcher(reader, 32, chunk=4, depth=2) as batches:
        for _ in range(10):
            batch = next(batches)
            assert (batch["observation.state"][:, 0] == batch["action"][:, 0, 0]).all()


def test_a_lost_shard_is_reported_and_comes_back(shards):
    shards.start(3)
    writer, reader = shards.writer(), shards.reader()
    write(writer, range(9))
    for episode in (100, 101, 102):  # one in each shard, under way
        header, columns = segment(1000 * episode, STEPS)
        writer.write(header | {"episode": f"e{episode}", "first_step": 0}, columns)
    writer.flush()
    reader.sync()
    victim = shards.services[1]
    victim.kill()
    for episode in (100, 101, 102):  # go on where they are
        header, columns = segment(1000 * episode + STEPS, STEPS, end="truncated")
        writer.write(header | {"episode": f"e{episode}", "first_step": STEPS}, columns)
    write(writer, range(9, 18))
    wait_until(lambda: writer.stats()["writer/shards_lost"] == 1, 30, "the writer to notice")
    wait_until(lambda: reader.stats()["reader/shards_lost"] == 1, 30, "the reader to notice")
    stats = writer.stats()
    assert f"shard 1 at {victim.address} acknowledged nothing" in stats["writer/waiting_for"]
    waiting = stats["writer/queued_segments"]
    assert 1 <= waiting <= 1 + 9
    assert f"shard 1 at {victim.address} is away" in reader.stats()["reader/trouble"]
    write(writer, range(18, 30))
    writer.flush()  # passes it over
    assert writer.stats()["writer/queued_segments"] == waiting  # no new episode went there
    with pytest.raises(DeadlineError, match=r"shard 1: .*not acknowledged"):
        writer._flush(0.0, passing=False)  # as `close` does
    reader.sync()
    there = {e.episode for e in reader.entries()}
    assert {f"e{episode}" for episode in range(18, 30)} <= there
    assert set(reader.sample(256)["shard"].tolist()) == {0, 2}
    assert [s.header["episode"] in there for s in reader.segments(newest=20)] == [True] * 20
    assert reader.info()["lost"] and set(reader.info()["shards"]) == {0, 2}
    victim.start()
    wait_until(lambda: writer.stats()["writer/shards_lost"] == 0, 60, "the shard to be used again")
    writer.flush()
    wait_until(lambda: reader.stats()["reader/shards_lost"] == 0, 60, "the shard to be read again")
    reader.sync()
    everything = expected(range(30)) + [(f"e{e}", s) for e in (100, 101, 102) for s in (0, STEPS)]
    assert sorted((e.episode, e.first_step) for e in reader.entries()) == sorted(everything)
    assert set(reader.sample(256)["shard"].tolist()) == {0, 1, 2}
    write(writer, range(30, 33))
    writer.flush()
    assert writer.stats()["writer/waiting_for"] == ""


def test_some_shards_are_enough_to_begin_with(shards):
    shards.start(2)
    shards.services[1].kill()
    with ThreadPoolExecutor(2) as pool:  # each waits 5 s for the other service
        making = [pool.submit(make) for make in (shards.writer, shards.reader)]
    writer, reader = (each.result() for each in making)
    write(writer, range(3))
    writer.flush()
    reader.sync()
    assert names(reader.segments()) == expected(range(3))
    assert "shard 1 at" in reader.stats()["reader/trouble"]
    assert "shard 1 at" in writer.stats()["writer/waiting_for"]
    shards.services[1].start()
    wait_until(lambda: reader.stats()["reader/shards_lost"] == 0, 30, "the second shard")
    wait_until(lambda: writer.stats()["writer/shards_lost"] == 0, 30, "the second shard")
    write(writer, range(3, 7))
    writer.flush()
    reader.sync()
    assert {split_id(e.id)[0] for e in reader.entries()} == {0, 1}
    assert sorted(names(reader.segments())) == sorted(expected(range(7)))


def test_a_shard_is_added_while_everybody_works(shards):
    shards.start(1)
    writer, reader = shards.writer(), shards.reader()
    stop, failures, episodes = threading.Event(), [], [0]

    def write_on() -> None:
        try:
            while not stop.wait(0.005):
                write(writer, range(episodes[0], episodes[0] + 1))
                episodes[0] += 1
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=write_on)
    thread.start()
    try:
        batch = reader.sample(64, chunk=4)
        assert set(batch["shard"].tolist()) == {0}
        before = reader.entries()[0]
        assert shards.add() == 1

        def taken_in() -> bool:
            batch = reader.sample(64, chunk=4)
            assert (batch["observation.state"][:, 0] == batch["action"][:, 0, 0]).all()
            return 1 in batch["shard"]

        wait_until(taken_in, 30, "batches with windows of the new shard")
    finally:
        stop.set()
        thread.join()
    assert not failures
    writer.flush()
    reader.sync()
    entries = reader.entries()
    everything = expected(range(episodes[0]))
    assert sorted((e.episode, e.first_step) for e in entries) == sorted(everything)
    assert entries[0] == before  # ids stay what they were
    late = shards.writer("late", known=1)  # one who knows the first only hears of the other
    wait_until(lambda: late.stats()["writer/shards"] == 2, 10, "the other shard to be heard of")


def test_the_first_service_keeps_the_list(shards, tmp_path):
    shards.start(2)
    client, first, second = shards.client(), *shards.addresses
    other = ServiceProcess(
        tmp_path / "other", schema=SCHEMA._replace(state_dim=7), keys=str(tmp_path / "keys")
    )
    try:
        for address, why in (
            ("nonsense", "is no address"),
            ("tcp://[::1", "is no address"),
            ("tcp://127.0.0.1:70000", "is no address"),
            (5, "should be a string"),
            ("tcp://127.0.0.1:1", "no replay service answered"),
            (first, "is shard 0 already"),
            (other.address, "schema"),
        ):
            with pytest.raises(Rejected, match=why):
                client.call("shard_add", {"address": address})
    finally:
        other.stop()
        other.process.stdout.close()
    for _ in range(2):  # again is no error
        answer = client.call("shard_add", {"address": second})[0]
        assert answer == {"number": 1, "addresses": [second]}
    with pytest.raises(Rejected, match="is shard 1 already"):
        client.call("shard_add", {"address": second.replace("127.0.0.1", "localhost")})
    shards.services[0].kill()
    shards.services[0].start()
    assert client.call("shards")[0] == {"addresses": [second]}


def test_a_cursor_takes_each_segment_once_over_restarts_and_losses(shards):
    shards.start(3)
    writer = shards.writer()
    write(writer, range(12))
    writer.flush()
    with ShardedReader(shards.addresses, shards.keys, lost_after=1.0) as reader:
        cursor = reader.cursor("ppo")
        taken = names(cursor.take(min_segments=36, max_transitions=15 * STEPS))
        assert len(taken) == 15
        cursor.commit()
        uncommitted = names(cursor.take(max_transitions=5 * STEPS))
    for service in shards.services:
        service.kill()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda service: service.start(), shards.services))
    reader = shards.reader()
    reader.sync()
    cursor = reader.cursor("ppo")
    again = names(cursor.take(min_segments=5, max_transitions=5 * STEPS))
    assert again == uncommitted  # goes on behind the commit
    taken += again
    position = cursor.position
    shards.services[2].kill()
    wait_until(lambda: reader.stats()["reader/shards_lost"] == 1, 30, "the loss to be seen")
    write(writer, range(12, 15))
    taken += names(cursor.take(min_segments=1))
    with pytest.raises(DeadlineError, match="1000 segments"):
        taken += names(cursor.take(min_segments=1000, timeout=2.0))
    cursor.commit()
    shards.services[2].start()
    wait_until(lambda: reader.stats()["reader/shards_lost"] == 0, 30, "the shard to be back")
    writer.flush()
    wait_until(lambda: writer.stats()["writer/queued_segments"] == 0, 30, "acknowledgements")
    reader.sync()
    while len(taken) < 45:
        taken += names(cursor.take())
    assert sorted(taken) == sorted(expected(range(15)))  # once each
    for episode in range(15):
        steps = [step for name, step in taken if name == f"e{episode}"]
        assert steps == sorted(steps)
    replayed = reader.cursor("ppo", position=position)  # a checkpoint's record
    assert len(names(replayed.take(min_segments=25))) == 25
    one = reader.cursor("of one service", position=0)
    one.pass_by()
    with pytest.raises(DeadlineError):
        one.take(timeout=0.2)


class Worker(threading.Thread):
    """Does something again and again until it is told to stop; `finish` raises what went wrong."""

    def __init__(self, pause: float, action) -> None:
        super().__init__(daemon=True)
        self._pause, self._action = pause, action
        self._stop_it, self._failure = threading.Event(), None
        self.start()

    def run(self) -> None:
        try:
            while not self._stop_it.wait(self._pause):
                self._action()
        except Exception as error:
            self._failure = error

    def finish(self) -> None:
        self._stop_it.set()
        self.join(60)
        if self._failure is not None:
            raise self._failure


def test_kills_in_random_order_lose_and_repeat_nothing(shards):
    seed = int(os.environ.get("TWINRL_SEED", "7"))
    print(f"TWINRL_SEED={seed}")
    chance = random.Random(seed)
    shards.start(3)
    writers = [shards.writer(f"w{number}", direct=bool(number)) for number in range(2)]
    reader = shards.reader()
    cursor = reader.cursor("all", source=None)
    episodes, taken = [itertools.count(0, 2), itertools.count(1, 2)], []
    written: list[int] = []

    def write_one(number: int) -> None:
        episode = next(episodes[number])
        write(writers[number], range(episode, episode + 1))
        written.append(episode)

    def draw() -> None:
        batch = reader.sample(64, chunk=4)
        first = batch["action"][:, 0, 0].astype(int)
        assert (batch["observation.state"][:, 0] == first).all()
        assert (batch["observation.images.front"][:, 0, 0, 0] == first % 251).all()

    def take() -> None:
        with contextlib.suppress(DeadlineError):
            taken.extend(names(cursor.take(timeout=0.5)))

    workers = [Worker(0.02, lambda number=number: write_one(number)) for number in range(2)]
    workers += [Worker(0.05, draw), Worker(0.05, take)]
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        victim = chance.choice(shards.services)
        if chance.random() < 0.3:
            victim.kill_redis()
        else:
            victim.kill()
            time.sleep(chance.uniform(0, 6))  # long enough to be lost, or not
            victim.start()
        time.sleep(chance.uniform(0, 2))
    for worker in workers:
        worker.finish()
    for writer in writers:
        writer._flush(time.monotonic() + 60, passing=False)
    wait_until(lambda: reader.stats()["reader/shards_lost"] == 0, 60, "all shards to be read")
    reader.sync()
    everything = sorted(name for e in written for name in expected(range(e, e + 1)))
    assert sorted((e.episode, e.first_step) for e in reader.entries()) == everything
    while len(taken) < len(everything):
        taken += names(cursor.take())
    assert sorted(taken) == everything
    shard_of = {(e.episode, split_id(e.id)[0]) for e in reader.entries()}
    assert len(shard_of) == len(written)  # every episode in one
