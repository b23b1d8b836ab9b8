"""Chunks of an old policy are refused, chunks that travelled slowly are not; how far the policy lags is told."""

import contextlib
import threading
import time

import numpy as np
import pytest

from benchmarks._network import BadLink
from tests.test_bridge_link import Stage
from twinrl.core.errors import DeadlineError
from twinrl.core.sockets import wait_until
from twinrl.weights_publisher import Publisher
from twinrl.weights_slots import slots_folder

pytestmark = pytest.mark.timeout(60)
ARRAYS = {"w": np.zeros(4, np.float32)}


class Serving:
    """A policy that acts `behind` versions before the newest; right after each chunk `then` versions are published."""

    def __init__(self, stage):
        self.stage, self.behind, self.then = stage, 0, 0
        self.publisher = Publisher(slots_folder(stage.folder))
        self.version = -1
        self.publish(30)
        self.given = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def publish(self, count):
        for _ in range(count):
            self.version += 1
            self.publisher.publish(self.version, ARRAYS)
        self.publisher.flush()

    def _run(self):
        while not self._stop.is_set():
            request = self.stage.link.take(0.2)
            if request is None:
                continue
            version = self.version - self.behind
            with contextlib.suppress(DeadlineError):
                self.stage.link.give(request, np.full((4, 7), 0.001, np.float32), {}, version)
            self.given += 1
            self.publish(self.then)

    def close(self):
        self._stop.set()
        self._thread.join(5)
        self.publisher.close(remove=True)


@pytest.fixture
def stage(tmp_path):
    stage = Stage(tmp_path)
    serving = Serving(stage)
    yield stage, serving
    serving.close()
    stage.close()


def test_a_chunk_that_travels_slowly_is_not_old(stage):
    """30 versions are published while each chunk is on its way: none is refused."""
    stage, serving = stage
    serving.then = 30
    network = BadLink(int(stage.url.rpartition(":")[2]))
    network.tell("delay 0.1 0")
    try:
        options = ["--robot-option", "steps=200", "--patience", "heartbeat_s=1.5"]
        stage.attach("--speed", "5", "--url", f"tcp://127.0.0.1:{network.port}", *options)
        row = wait_until(
            lambda: stage.row() if (stage.row() or {"last": {}})["last"].get("step", 0) > 20 else 0,
            20,
            "motion over a slow link",
        )
        assert serving.given >= 5 and serving.version > 150
        assert row["last"]["totals"]["stale_chunks"] == 0
        versions = stage.gateway._leases.robots["arm"].version
        assert serving.version - versions <= 2 * serving.then
    finally:
        network.close()


def test_a_policy_that_lags_is_told_and_refused_beyond_the_limit(stage):
    """25 behind: the arm holds and says so. 12 behind: it acts, and the figure says how far behind."""
    stage, serving = stage
    stage.attach("--speed", "5", "--give-up", "20", "--robot-option", "steps=500")

    def steps():
        return (stage.row() or {"last": {}})["last"].get("step", 0)

    wait_until(lambda: steps() > 3, 15, "motion")
    assert stage.row()["policy_lag"] == 0
    serving.behind = 25
    held = stage.wait_for("holding")
    assert "more than 20 behind" in held["reason"]
    assert held["policy_lag"] == 25 and stage.gateway.stats()["robot/arm/policy_lag"] == 25.0
    wait_until(lambda: stage.row()["last"]["totals"]["stale_chunks"] >= 1, 5, "the count")
    step = steps()
    time.sleep(0.3)
    assert steps() == step
    serving.behind = 12
    wait_until(lambda: steps() > step + 5, 15, "motion again")
    assert stage.row()["policy_lag"] == 12
    # Nobody answers while versions go on: the lag is that of who is asked.
    serving.behind = 0
    wait_until(lambda: stage.row()["policy_lag"] == 0, 5, "the newest version")
    serving._stop.set()
    serving._thread.join(5)
    version = stage.gateway._leases.robots["arm"].version
    serving.publish(15)
    wait_until(lambda: stage.row()["policy_lag"] == serving.version - version >= 15, 5, "the lag")
