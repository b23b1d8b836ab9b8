"""Weights for members outside the cluster, over real sockets: offers, differences, cuts, restarts, damage."""

import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest

import robot_bridge.weights_relay
from benchmarks._slow_link import SlowLink
from robot_bridge import protocol
from robot_bridge.gateway import Gateway
from robot_bridge.weights_relay import WeightsRelay
from twinrl.core.errors import DeadlineError, Rejected, RemoteError, TwinRLError
from twinrl.core.keys import Keys, create_keys
from twinrl.core.segment import Schema
from twinrl.core.sockets import Client, Server, free_port, wait_until
from twinrl.weights import checksum
from twinrl.weights_client import WeightClient
from twinrl.weights_delta import restore, round_weights
from twinrl.weights_publisher import Publisher
from twinrl.weights_slots import slots_folder

SCHEMA = Schema(state_dim=3, privileged_dim=0, cameras=(), image_size=16, chunk=2)
JOB = {"run": "outside", "task": "reach", "instruction": "go"}
VALUES = 1_500_000


def arrays(version, values=VALUES):
    """Values that say their version and still do not compress to nothing."""
    rng = np.random.default_rng(0)
    return {
        "weight": rng.normal(0, 0.02, values).astype(np.float32),
        "count": np.array(version, np.int64),
        "lora": np.full((40, 50), version, np.float32),
    }


class Outside:
    """A run's gateway and the learner's end; members dial in."""

    def __init__(self, folder):
        self.folder = folder
        create_keys(folder / "keys")
        self.port = free_port()
        self.publisher = Publisher(slots_folder(folder))
        self.members, self.links = [], []
        self.open_gateway()

    def open_gateway(self):
        made = protocol.make_job(SCHEMA, JOB)
        self.gateway = Gateway(
            self.folder, f"tcp://127.0.0.1:{self.port}", "", "tcp://127.0.0.1:1", made
        )
        self.gateway.start()

    def member(self, port=None, role="robot", **options):
        key = Keys.load(self.folder / "keys" / f"{role}.key")
        client = WeightClient(f"tcp://127.0.0.1:{port or self.port}", key, **options)
        self.members.append(client)
        return client

    def link(self, mbit_s, port=0):
        self.links.append(SlowLink(self.port, mbit_s, port))
        return self.links[-1]

    def publish(self, version, **changes):
        changes = {name: np.asarray(value) for name, value in changes.items()}
        self.publisher.publish(version, {**arrays(version), **changes})
        self.publisher.flush()

    def count(self, name):
        return self.gateway.stats()[f"gateway/weights_{name}"]

    def close(self):
        for client in self.members:
            client.close()
        for link in self.links:
            link.cut()
        self.gateway.close()
        self.publisher.close(remove=True)


@pytest.fixture
def outside(tmp_path):
    made = Outside(tmp_path)
    yield made
    made.close()


def expected(version, **changes):
    return restore(round_weights(version, {**arrays(version), **changes}))


def check(weights, version, **changes):
    assert weights.version == version
    assert weights.verified and weights.checksum == checksum(weights.arrays)
    assert weights.checksum == checksum(expected(version, **changes))


def test_a_member_gets_a_snapshot_then_what_changed(outside):
    outside.publish(0)
    member = outside.member()
    assert member.poll(5) is None
    check(member.wait(-1, 30), 0)
    first = member.stats()
    assert (first["weights/snapshots"], first["weights/differences"]) == (1, 0)
    assert first["weights/bytes"] > VALUES
    for version in (1, 2):
        outside.publish(version)
        check(member.wait(version - 1, 30), version)
    after = member.stats()
    assert (after["weights/snapshots"], after["weights/differences"]) == (1, 2)
    assert after["weights/bytes"] - first["weights/bytes"] < 2000  # `weight` is frozen: not sent
    outside.publish(3, weight=np.random.default_rng(3).normal(size=VALUES).astype(np.float32))
    assert member.wait(2, 30).version == 3  # all of it is new: the snapshot is smaller
    assert member.stats()["weights/snapshots"] == 2
    assert member.poll(3) is None


def test_exact_versions_and_those_that_are_gone(outside):
    for version in range(5):
        outside.publish(version)
    member = outside.member(role="cluster")
    check(member.wait(-1, 30), 4)
    check(member.get(3), 3)
    check(member.get(4), 4)
    with pytest.raises(TwinRLError, match=r"policy version 1; there are \[2, 3, 4\]"):
        member.get(1)
    with pytest.raises(DeadlineError, match="version above 4"):
        member.wait(4, 0.2)
    outside.publish(5)
    check(member.wait(4, 30), 5)


def test_many_members_share_what_is_encoded(outside):
    outside.publish(0)
    members = [outside.member() for _ in range(6)]
    for member in members:
        check(member.wait(-1, 30), 0)
    outside.publish(1)
    for member in members:
        check(member.wait(0, 30), 1)
    wait_until(lambda: outside.count("differences") == 1, 5, "one difference")
    assert outside.count("snapshots") == 1


def test_a_cut_connection_goes_on_where_it_was(outside):
    """The link is killed in the middle of a snapshot; nothing that had arrived is sent again."""
    link = outside.link(8)
    member = outside.member(link.port, stall=1.0)
    outside.publish(0)
    wait_until(lambda: member.stats()["weights/bytes"] > 600_000, 30, "a part of the snapshot")
    link.cut()
    before = member.stats()["weights/bytes"]
    assert member.poll(-1) is None
    with pytest.raises(DeadlineError, match=r"[1-9]\d* bytes of one are there"):
        member.wait(-1, 0.5)
    outside.link(200, link.port)
    check(member.wait(-1, 60), 0)
    after = member.stats()
    assert after["weights/resumed"] >= 1
    size = outside.gateway._weights._offers[(0, -1)]["bytes"]
    assert before > 600_000
    assert after["weights/bytes"] == size  # every byte was taken once


def test_a_gateway_that_was_killed_in_between(outside):
    """Another gateway knows neither the member nor what it was fetching: the same set has the same name."""
    link = outside.link(8)
    member = outside.member(link.port, stall=1.0)
    outside.publish(0)
    wait_until(lambda: member.stats()["weights/bytes"] > 600_000, 30, "a part of the snapshot")
    outside.gateway.close()
    outside.open_gateway()
    check(member.wait(-1, 60), 0)
    size = outside.gateway._weights._offers[(0, -1)]["bytes"]
    assert member.stats()["weights/bytes"] == size
    outside.gateway.close()
    outside.open_gateway()
    outside.publish(1)
    check(member.wait(0, 60), 1)  # the base is still in shared memory
    assert member.stats()["weights/differences"] == 1
    outside.gateway.close()
    for version in range(2, 6):
        outside.publish(version)
    outside.open_gateway()
    check(member.wait(1, 60), 5)  # now it is not
    assert member.stats()["weights/snapshots"] == 2


def test_the_last_n_versions_are_bases(outside, monkeypatch):
    relay = outside.gateway._weights
    relay._bases = 2
    have = []
    for version in range(6):
        outside.publish(version)
        offer = relay.offer({"newer_than": -1}).result(30)
        have.append([version, offer["checksum"]])
    for version, base in ((0, -1), (1, -1), (3, 3), (4, 4)):
        offer = relay.offer({"newer_than": version, "have": have[version]}).result(30)
        assert (offer["version"], offer["base"]) == (5, base)
    wrong = relay.offer({"newer_than": 4, "have": [4, have[3][1]]}).result(30)
    assert wrong["base"] == -1  # another run's version 4
    assert relay.offer({"newer_than": 5, "timeout": 0.1}).result(30) == {}
    with pytest.raises(Rejected, match="weights are gone"):
        relay.chunk({"etag": "7-6-1-0", "offset": 0, "bytes": 10})
    for offset, count in ((-1, 5), (10**9, 5), (0, 0)):
        with pytest.raises(Rejected, match="bytes at"):
            relay.chunk({"etag": wrong["etag"], "offset": offset, "bytes": count})


class Liar:
    """A gateway that damages what the relay gives."""

    def __init__(self, folder, relay):
        self.relay, self.damage = relay, None
        keys = Keys.load(folder / "keys/server.key")
        robot = Keys.load(folder / "keys/robot.key")
        self.server = Server("liar", "tcp://127.0.0.1:*", keys, {robot.public: "robot"})
        self.server.bind("weights_offer", lambda request: self._offer(request.args))
        self.server.bind("weights_chunk", lambda request: self._chunk(request.args))
        self.server.start()
        self.port = int(self.server.address.rpartition(":")[2])

    def _offer(self, args):
        answer = Future()
        self.relay.offer(args).add_done_callback(
            lambda done: answer.set_result(self._damaged(done.result()))
        )
        return answer

    def _damaged(self, offer):
        found = {
            "offer": {"version": "seven"},
            "checksum": {**offer, "checksum": offer.get("checksum", 0) ^ 1},
            "huge": {**offer, "bytes": 1 << 60},
        }.get(self.damage if offer else "")
        if found is None:
            return offer
        self.damage = None
        return found

    def _chunk(self, args):
        header, pieces = self.relay.chunk(args)
        if self.damage not in ("flip", "short", "place", "none"):
            return header, pieces
        damage, self.damage = self.damage, None
        if damage == "flip":
            data = pieces["data"].copy()
            data[len(data) // 2] ^= 4
            pieces = {"data": data}
        elif damage == "short":
            pieces = {"data": pieces["data"][:-1]}
        elif damage == "place":
            header = {"offset": args["offset"] + 1}
        elif damage == "none":
            pieces = {}
        return header, pieces


@pytest.mark.parametrize(
    "damage", ["flip", "short", "place", "none", "offer", "checksum", "huge", "base"]
)
def test_what_arrives_damaged_is_not_loaded(outside, damage):
    """Whatever is wrong with a difference, the member keeps what it has and fetches a snapshot."""
    relay = WeightsRelay(slots_folder(outside.folder))
    liar = Liar(outside.folder, relay)
    try:
        outside.publish(0)
        member = outside.member(liar.port, stall=5.0)
        check(member.wait(-1, 30), 0)
        if damage == "base":  # what the member had is not what it was
            tensors = {**member._rounded.tensors, "count": np.array(99)}
            member._rounded = member._rounded._replace(tensors=tensors)
        liar.damage = damage
        outside.publish(1)
        _tick(relay, member)
        check(member.wait(0, 30), 1)
        stats = member.stats()
        if damage in ("flip", "checksum", "huge", "offer", "base"):
            assert stats["weights/refused"] == 1
            assert stats["weights/snapshots"] == 2
    finally:
        for client in outside.members:
            client.close()
        liar.server.close()
        relay.close()


def _tick(relay, member):
    stop = time.monotonic() + 30
    while member.poll(0) is None and time.monotonic() < stop:
        relay.tick()
        time.sleep(0.02)


def test_no_weights_without_a_key_of_the_run(outside, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    create_keys(other / "keys")
    outside.publish(0)
    foreign = Keys.load(other / "keys/robot.key")
    server = Keys.load(outside.folder / "keys/robot.key").server
    client = Client("gateway", f"tcp://127.0.0.1:{outside.port}", foreign._replace(server=server))
    with pytest.raises(DeadlineError):
        client.call("weights_offer", {"newer_than": -1}, timeout=1.0)
    client.close()


def test_bad_requests_are_refused_and_hurt_nobody(outside):
    outside.publish(0)
    client = Client(
        "gateway",
        f"tcp://127.0.0.1:{outside.port}",
        Keys.load(outside.folder / "keys/robot.key"),
    )
    for args in (
        {"newer_than": "x"},
        {"newer_than": None},
        {"exactly": [1]},
        {"exactly": 99},
        {"have": 5},
        {"have": ["a", "b"]},
        {"newer_than": -1, "have": [1]},
        {"newer_than": -1, "have": {"version": 1}},
        {"newer_than": 7, "timeout": "long"},
    ):
        with pytest.raises(RemoteError):
            client.call("weights_offer", args, timeout=30)
    for args in (
        {},
        {"etag": 1, "offset": 0, "bytes": 1},
        {"etag": "x", "offset": "y", "bytes": 1},
    ):
        with pytest.raises(RemoteError):
            client.call("weights_chunk", args, timeout=30)
    client.close()
    check(outside.member().wait(-1, 30), 0)


def test_waiting_members_are_bounded(outside, monkeypatch):
    monkeypatch.setattr(robot_bridge.weights_relay, "MAX_WAITING", 2)
    relay = outside.gateway._weights
    waiting = [relay.offer({"newer_than": 5, "timeout": 30}) for _ in range(2)]
    with pytest.raises(Rejected, match="2 members wait"):
        relay.offer({"newer_than": 5, "timeout": 30})
    outside.publish(6)
    assert [w.result(30)["version"] for w in waiting] == [6, 6]


def test_versions_never_mix_while_training_goes_on(outside):
    """Every value of what a member holds is of one version, whatever it skipped."""
    member = outside.member()
    stop, seen = threading.Event(), []

    def look():
        newest = -1
        while not stop.is_set():
            weights = member.poll(newest)
            if weights is not None:
                newest = weights.version
                seen.append((newest, set(weights.arrays["lora"].ravel().tolist())))
            time.sleep(0.005)

    thread = threading.Thread(target=look)
    thread.start()
    values = arrays(0)
    for version in range(40):
        outside.publisher.publish(version, values)
        values["lora"] += 1
        time.sleep(0.02)
    outside.publisher.flush()
    assert member.wait(38, 30).version == 39
    wait_until(lambda: seen and seen[-1][0] == 39, 10, "the last version")
    stop.set()
    thread.join(10)
    assert all(inside == {float(version)} for version, inside in seen)
    assert len(seen) > 2


def test_a_client_that_is_closed_lets_go(outside):
    before = threading.active_count()
    member = outside.member()
    began = time.monotonic()
    member.close()
    assert time.monotonic() - began < 5
    wait_until(lambda: threading.active_count() <= before, 10, "its threads to end")
