"""Two arms of different kinds in one run: batched inference serves both, and neither notices how the other fares."""

from __future__ import annotations

import asyncio
import signal
import threading
import time

import numpy as np
import pytest

from actors.inference import InferenceActor
from actors.remote_runner import SingleInference
from actors.robot_actor import RobotActor
from robot_bridge.policy_link import PolicyLink
from tests.test_bridge_link import Stage, check_exactly_once, finish
from tests.test_bridge_registry import package  # noqa: F401
from tests.training import Events
from twinrl.core.sockets import wait_until
from twinrl.weights import make_weights

pytestmark = pytest.mark.timeout(90)
IMAGE, STATE = "observation.images.side", "observation.state"


class Newest:
    """A WeightSource whose newest version a test sets."""

    version = 3

    def poll(self, newer_than):
        return self.wait(newer_than, 0) if self.version > newer_than else None

    def wait(self, newer_than, timeout):
        return make_weights(self.version, {})


class Echo:
    """A policy that stands still and says what it saw: `policy.*` rows tell which arm's observation was answered."""

    keys = (IMAGE, STATE)

    def __init__(self):
        self.version, self.batches = -1, []

    def adopt(self, weights):
        self.version = weights.version

    def act(self, observation, instructions, explore, numbers):
        state, image = observation[STATE], observation[IMAGE]
        self.batches.append(len(np.unique(state, axis=0)))
        chunk = np.zeros((len(state), 4, 7), np.float32)
        chunk[..., 0], chunk[..., 6] = 0.002, 1.0
        # Copies: the next batch is assembled in the same memory.
        return chunk, {"state": state.copy(), "pixel": image[:, 0, 0, 0].astype(np.float32)}


class Cluster:
    """The inference actor in a loop of its own, as Ray runs it, and the robot actor that asks it."""

    def __init__(self, stage):
        self.policy, self.weights = Echo(), Newest()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.inference = InferenceActor(
            "inference",
            make_runner=lambda: self.policy,
            make_reporter=lambda *_: None,
            weights=self.weights,
            deadline=0.02,
        )
        self.events = Events()
        self.link = PolicyLink(stage.internal, stage.cluster)
        self.robots = RobotActor(
            "robots",
            make_link=lambda: self.link,
            make_reporter=lambda *_: self.events,
            infer=SingleInference(self._ask),
        )
        self._thread = threading.Thread(target=self.robots.run, daemon=True)
        self._thread.start()

    def _ask(self, request):
        return asyncio.run_coroutine_threadsafe(self.inference.infer(request), self._loop).result(
            20
        )

    def close(self):
        self.robots.stop()
        self._thread.join(5)
        self.link.close()
        self._loop.call_soon_threadsafe(self._loop.stop)


@pytest.fixture
def stage(tmp_path, package):  # noqa: F811
    stage = Stage(tmp_path)
    cluster = Cluster(stage)
    yield stage, cluster
    cluster.close()
    stage.close()


def test_two_kinds_of_arms_share_a_run(stage):
    stage, cluster = stage
    kinds = {"left": "point", "right": "heavy-point"}

    def attach(name, *more):
        return stage.attach("--speed", "20", "--robot", kinds[name], *more, name=name)

    def episodes(name):
        return (stage.row(name) or {"episodes": 0})["episodes"]

    def leave(process):
        process.send_signal(signal.SIGINT)
        output = finish(process)
        assert "detached" in output and "Traceback" not in output, output

    left, right = attach("left"), attach("right", "--robot-option", "weight=2")
    wait_until(lambda: min(map(episodes, kinds)) >= 2, 20, "two episodes of each")
    assert max(cluster.policy.batches) == 2, "no batch had rows of both"
    assert {name: stage.row(name)["kind"] for name in kinds} == kinds

    # Another under a name that is taken: told why and what to do; whoever has the name goes on.
    stranger = stage.attach("--speed", "20", "--once", name="left", spool="elsewhere")
    refusal = finish(stranger)
    assert stranger.returncode == 1 and "Traceback" not in refusal
    assert "a robot called 'left' is attached from" in refusal and "--name, e.g. left-2" in refusal

    # One leaves, in the middle of an episode; the other does not miss a chunk.
    chunks = cluster.robots.stats()["robot_actor/chunks"]
    leave(right)
    row, before = stage.row("right"), episodes("left")
    assert row["state"] == "gone" and row["policy_lag"] == 0
    wait_until(lambda: episodes("left") >= before + 2, 20, "the other to go on")
    assert stage.row("left")["attached"] and stage.row("left")["last"]["totals"]["stops"] == 0
    assert cluster.robots.stats()["robot_actor/chunks"] > chunks
    cluster.weights.version = 8  # both get it, the one that is away when it is back

    # It comes back: numbers and totals go on.
    again = attach("right", "--robot-option", "weight=2")
    wait_until(lambda: stage.row("right")["attached"], 15, "its return")
    wait_until(lambda: episodes("right") >= row["episodes"] + 2, 20, "further episodes")
    assert stage.row("right")["minutes"] > row["minutes"]
    leave(left)
    leave(again)
    assert cluster.robots.stats()["robot_actor/failed"] == 0 and not cluster.events.events

    check(stage, kinds)


def check(stage, kinds):
    """Everything is stored once under its own writer, with what the policy answered to that arm."""
    by_name = {name: [] for name in kinds}
    check_exactly_once(stage.replay.segments)
    for segment in stage.replay.segments:
        name, writer = segment.header["robot"], segment.header["writer"]
        assert writer.rpartition("-")[0] == name and segment.header["episode"].startswith(writer)
        by_name[name].append(segment)
        columns = segment.columns
        if "chunk_step" not in columns:  # who leaves cuts a chunk
            assert columns["truncated"][-1] and segment.steps < 4
            continue
        rows, frames = columns["chunk_step"], columns[IMAGE].decode()
        np.testing.assert_array_equal(columns["policy.state"], columns[STATE][rows])
        np.testing.assert_array_equal(columns["policy.pixel"], frames[rows, 0, 0, 0])
    assert not {s.header["writer"] for s in by_name["left"]} & {
        s.header["writer"] for s in by_name["right"]
    }
    for segments in by_name.values():
        numbers = [segment.header["sequence"] for segment in segments]
        assert numbers == list(range(len(numbers)))
        versions = np.concatenate([segment.columns["policy_version"] for segment in segments])
        assert set(versions.tolist()) == {3, 8} and (np.diff(versions) >= 0).all()
    # The heavy one comes later: it is not the other's motion under its name.
    went = {
        name: max(np.ptp(s.columns[STATE][:, 0]) for s in found) for name, found in by_name.items()
    }
    assert went["left"] > 0.03 and went["right"] != went["left"]


def test_reconnection_restores_what_was_known(stage):
    """The gateway is started anew while both are attached: names, totals and numbers are as before."""
    stage, _ = stage
    stage.attach("--speed", "10", name="left")
    stage.attach("--speed", "10", "--robot", "heavy-point", name="right")
    wait_until(
        lambda: all((stage.row(n) or {"episodes": 0})["episodes"] for n in ("left", "right")),
        20,
        "an episode of each",
    )
    time.sleep(1.1)  # what a robot has done is saved once a second
    before = {name: stage.row(name) for name in ("left", "right")}
    stage.gateway.close()
    stage.open_gateway()
    for name, row in before.items():
        now = stage.row(name)
        assert now["attached"] and now["kind"] == row["kind"]
        assert now["episodes"] >= row["episodes"] and now["minutes"] >= row["minutes"]
    for name, row in before.items():
        wait_until(lambda n=name, r=row: stage.row(n)["episodes"] > r["episodes"], 20, "more")
    for process in stage.bridges:
        process.send_signal(signal.SIGINT)
        assert "detached" in finish(process)
    check_exactly_once(stage.replay.segments)
    for name in before:
        numbers = [s.header["sequence"] for s in stage.replay.segments if s.header["robot"] == name]
        assert numbers == list(range(len(numbers))) and len(numbers) >= 2
