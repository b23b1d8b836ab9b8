"""Several replay services as one: nothing twice, nothing lost, drawn as from one, with one of them dead or new."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from buffer_service.client import ShardedReader, ShardedWriter
from buffer_service.shards import join_id, split_id
from buffer_service.testing import SCHEMA, ServiceProcess, segment
from twinrl.core.errors import TwinRLError
from twinrl.core.keys import Keys, create_keys
from twinrl.core.sockets import Client, wait_until

pytestmark = pytest.mark.timeout(120)
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
            if service.process.poll() is None:
                service.process.terminate()
        for service in self.services:
            service.process.wait(30)
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
