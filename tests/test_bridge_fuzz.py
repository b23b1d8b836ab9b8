"""Hostile requests at the gateway, with a robot's and the cluster's key: each is answered, and the run goes on."""

import copy
import json
import math
import os
import random
import time

import msgpack
import numpy as np
import pytest
import zmq

from robot_bridge import parts, protocol
from robot_bridge.gateway import Gateway
from robot_bridge.policy_link import PolicyLink
from twinrl.core import wire
from twinrl.core.keys import Keys, create_keys, secure_client
from twinrl.core.segment import Schema
from twinrl.core.sockets import Client, free_port

LONG = bool(os.environ.get("TWINRL_LONG"))
SEED = int(os.environ.get("TWINRL_SEED", "20260729"))
CASES = 20_000 if LONG else 600
SCHEMA = Schema(state_dim=6, privileged_dim=3, cameras=("side",), image_size=16, chunk=4)
JOB = {"run": "trial", "task": "reach", "instruction": "go there", "chunk": 4, "lease_s": 600.0}
WEIRD = (
    *(
        None,
        True,
        -1,
        0,
        1.5,
        math.nan,
        math.inf,
        1 << 63,
        (1 << 64) - 1,
        "",
        "x",
        "-1",
        "x-1",
        "x" * 5000,
    ),
    *(
        b"",
        b"\xff",
        [],
        {},
        [None],
        {"a": b"\xff"},
        {5: 5},
        [0] * 1000,
        msgpack.Timestamp(1, 1),
        "\0",
        "a/b",
    ),
)

pytestmark = pytest.mark.timeout(600 if LONG else 90)


class Stage:
    """A gateway with a robot attached, and a hostile connection for each key."""

    def __init__(self, folder) -> None:
        create_keys(folder / "keys")
        url, internal, replay = (f"tcp://127.0.0.1:{free_port()}" for _ in range(3))
        made = protocol.make_job(SCHEMA, JOB)
        self.path = folder / "gateway.json"
        self.gateway = Gateway(folder, url, internal, replay, made).start()
        keys = {role: Keys.load(folder / f"keys/{role}.key") for role in ("robot", "cluster")}
        self.honest = Client("the gateway", url, keys["robot"])
        self.link = PolicyLink(internal, keys["cluster"])
        self.context, self.sockets = zmq.Context(), {}
        for role, key in keys.items():
            socket = self.sockets[role] = self.context.socket(zmq.DEALER)
            secure_client(socket, key)
            socket.connect(url)
        self.attach("honest")

    def attach(self, name: str) -> None:
        features = protocol.features_of(SCHEMA)
        args = {"name": name, "session": "s", "kind": "point", "writer": f"{name}-1", "host": "h"}
        args |= {"features": [6, ["side"], 16], "digest": features.digest()}
        self.honest.call(
            "attach", {**args, "protocol": protocol.PROTOCOL, "software": protocol.SOFTWARE}
        )

    def ask(self, role: str, request, arrays) -> dict:
        frames = wire.pack({}, arrays)
        version, _, specs = msgpack.unpackb(frames[0])
        socket = self.sockets[role]
        socket.send_multipart([msgpack.packb([version, request, specs]), *frames[1:]])
        deadline = time.monotonic() + 60
        while socket.poll(max(deadline - time.monotonic(), 0) * 1000):
            header, _ = wire.unpack(socket.recv_multipart())
            if header["id"] in (request["id"], None):
                return header
        raise AssertionError(f"no answer to {request}")

    def close(self) -> None:
        self.context.destroy(0)
        self.honest.close()
        self.link.close()
        self.gateway.close()


@pytest.fixture
def stage(tmp_path):
    stage = Stage(tmp_path)
    yield stage
    stage.close()


def requests(name: str):
    """method: (role, args, arrays) in order, of the robot `name`."""
    me, writer = {"name": name, "session": "s"}, f"{name}-1"
    image = np.zeros((1, 16, 16, 3), np.uint8)
    seen = {"observation.state": np.zeros((1, 6), np.float32), "observation.images.side": image}
    finished = {"episode": f"{writer}-0", "start": "1.1", "success": True, "discarded": False}
    chunk = {"action": np.zeros((4, 7), np.float32)}
    versions = {"protocol": protocol.PROTOCOL, "software": protocol.SOFTWARE}
    features = {"features": [6, ["side"], 16], "digest": protocol.features_of(SCHEMA).digest()}
    who = {**me, "kind": "point", "writer": writer, "host": "h"}
    state = {"doing": "idle", "totals": {"seconds": 1.0}, "estop_seen": 0}
    kept = {"header": {"writer": writer, "sequence": 0}, "codec": "raw"}
    data = np.frombuffer(parts.join(wire.pack(kept, {})), np.uint8)
    segment = {"sequence": 0, "offset": 0, "total": len(data), "digest": bytes(16)}
    observe = {
        "episode": f"{writer}-0",
        "step": 0,
        "codec": "raw",
        "timeout": 0.0,
        "parameters": {},
    }
    configuration = {"configurations": [{"region": "id", "configuration": {}}], "order": "random"}
    return {
        "hello": ("robot", {"name": name, **versions}, {}),
        "attach": ("robot", {**who, **versions, **features}, {}),
        "heartbeat": ("robot", {**me, "state": state}, {}),
        "episode": ("robot", {**me, "timeout": 0.0, "finished": finished}, {}),
        "observe": ("robot", {**me, **observe}, seen),
        "segment": ("robot", {**me, **segment}, {"data": data}),
        "detach": ("robot", {**me, "state": state, "finished": finished}, {}),
        "weights_offer": ("robot", {"newer_than": -1, "have": [1, 2], "timeout": 0.0}, {}),
        "weights_chunk": ("robot", {"etag": "x", "offset": 0, "bytes": 10}, {}),
        "policy_take": ("cluster", {"timeout": 0.0, "limit": 1}, {}),
        "policy_give": ("cluster", {"request": "x.1", "version": 1}, chunk),
        "set_configurations": ("cluster", {**configuration, "parameters": {"trial": 1}}, {}),
        "results": ("cluster", {"since": 0}, {}),
        "camera": ("cluster", {"robot": name, "camera": "side"}, {}),
        "command": ("cluster", {"action": "hold", "target": name}, {}),
        "robots": ("cluster", {}, {}),
        "run_state": ("cluster", {}, {}),
    }


def mutated(rng, value):
    """`value` with one thing in it replaced, dropped or added."""
    places, pile = [], [(value, None)]
    while pile:
        tree, _ = pile.pop()
        for key, each in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
            places.append((tree, key))
            if isinstance(each, (dict, list)):
                pile.append((each, key))
    if not places:
        return value
    tree, key = rng.choice(places)
    if rng.random() < 0.15:
        del tree[key]
    else:
        tree[key] = copy.deepcopy(rng.choice(WEIRD))
    return value


def test_whatever_is_sent_is_answered_and_the_run_goes_on(stage):
    for case in range(CASES):
        if case % 50 == 0:  # a mutated request may have taken the name of the one before
            robot = f"fuzz{case // 50}"
            good = requests(robot)
            stage.attach(robot)
        rng = random.Random(f"{SEED}/{case}")
        method = rng.choice(list(good))
        role, args, arrays = copy.deepcopy(good[method])
        for _ in range(rng.choice((1, 1, 1, 2))):
            args = mutated(rng, args)
        if rng.random() < 0.1:
            role = rng.choice(("robot", "cluster"))
        if arrays and rng.random() < 0.5:
            name = rng.choice(list(arrays))
            shape = rng.choice(((), (0,), (1,), (1, 0), (2, 6), (1, 16, 16, 3), (4, 7, 1)))
            arrays[name] = np.zeros(shape, rng.choice(("<f4", "|u1", "<i8", "|b1", "|S5", ">f4")))
        for name in ("timeout",):  # so that no case waits for long
            if type(args.get(name)) in (int, float) and args[name] == args[name]:
                args[name] = 0
        story = f"seed {SEED}, case {case}: {role} asks {method} {args!r:.300}"
        stage.ask(role, {"id": case, "method": method, "args": args}, arrays)
        if case % 50 == 0:
            check(stage, story)
    check(stage, story)
    stage.gateway.close()
    kept = json.loads(stage.path.read_text())
    assert kept["robots"]["honest"]["writer"] == "honest-1"
    protocol_job = protocol.make_job(SCHEMA, JOB)
    again = Gateway(
        stage.path.parent, f"tcp://127.0.0.1:{free_port()}", "", "tcp://127.0.0.1:1", protocol_job
    )
    again.start()  # with what it was made to keep
    again.close()


def check(stage, story: str) -> None:
    """The honest robot and the cluster get their answers."""
    me = {"name": "honest", "session": "s"}
    state = {"doing": "idle", "totals": {"seconds": 1.0}}
    wishes, _ = stage.honest.call("heartbeat", {**me, "state": state}, timeout=10)
    assert wishes["detach"] is False, story
    start, _ = stage.honest.call("episode", {**me, "timeout": 0.0}, timeout=10)
    assert start.keys() & {"start", "wait"}, story
    rows, _ = stage.link._client.call("robots", timeout=10)
    assert "honest" in {row["name"] for row in rows["robots"]}, story
    assert stage.gateway.stats()["gateway/robots"] >= 1, story
    assert stage.gateway._ticker.is_alive(), story
