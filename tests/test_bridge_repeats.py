"""A client that says everything twice, late and in another order: nothing is lost, stored twice or played for nothing."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest

from robot_bridge import frames, protocol, recent
from tests.test_bridge_link import SCHEMA, Stage
from tests.test_bridge_recent import pictures, same, segment_of
from twinrl.core.errors import RemoteError
from twinrl.core.keys import Keys
from twinrl.core.sockets import Client

pytestmark = pytest.mark.timeout(60)
WRITER, SESSION = "arm-1", "s"


class Stutterer:
    """Sends each request up to three times at once and takes one of the answers."""

    def __init__(self, stage, seed):
        self.rng, self.stage = random.Random(seed), stage
        keys = Keys.load(stage.folder / "keys/robot.key")
        self.client = Client("the gateway", stage.url, keys)
        features = protocol.features_of(SCHEMA)
        versions = {"protocol": protocol.PROTOCOL, "software": protocol.SOFTWARE}
        self.say(
            "attach",
            {"kind": "point", "writer": WRITER, "host": "h", "features": [6, ["side"], 16]}
            | {"digest": features.digest(), **versions},
        )

    def say(self, method, args, arrays=None, pick=None):
        args = {"name": "arm", "session": SESSION, **args}
        futures = [
            self.client.submit(method, args, arrays) for _ in range(self.rng.choice((1, 2, 3)))
        ]
        answers = [future.result(10) for future in futures]
        return self.rng.choice(answers) if pick is None else answers[pick]

    def beat(self, **totals):
        self.say("heartbeat", {"state": {"doing": "running", "totals": totals}})

    def ask(self, seen, codec):
        """A question; where it is asked more than once the gateway answers the newest only."""
        args = {"episode": f"{WRITER}-0", "step": 0, "parameters": {}, "instruction": "i"}
        arrays = {"observation.state": np.zeros(6, "<f4"), **frames.pack([seen], codec)}
        answer, _ = self.say("observe", {**args, "codec": codec, "timeout": 5.0}, arrays, pick=-1)
        assert "version" in answer, answer

    def deliver(self, sequence, data, stale):
        """The pieces in any order and more than once, pieces of another segment among them, until it is acknowledged."""
        digest, size = recent.digest_of(data), self.rng.choice((700, 3000, 100_000))
        offsets = list(range(0, len(data), size))
        place = {"sequence": sequence, "total": len(data), "digest": digest}
        for _ in range(40 * len(offsets)):
            if stale and self.rng.random() < 0.05:
                with contextlib.suppress(RemoteError):
                    self.say(*self.rng.choice(stale))
            offset = self.rng.choice(offsets)
            piece = np.frombuffer(data, np.uint8)[offset : offset + size]
            answer, _ = self.say("segment", {**place, "offset": offset}, {"data": piece})
            held = len(self.stage.gateway._leases.robots["arm"].incoming._assembly._data)
            assert held <= len(data) + max((len(s[2]["data"]) for s in stale), default=0)
            if "acknowledged" in answer or "missing" in answer:
                stale.append(("segment", {**place, "offset": offset}, {"data": piece}))
                return answer
            offsets_left = [o for o in offsets if o >= answer["offset"]]
            if self.rng.random() < 0.7 and offsets_left:  # mostly what is wanted
                piece = np.frombuffer(data, np.uint8)[answer["offset"] :][:size]
                args = {**place, "offset": answer["offset"]}
                answer, _ = self.say("segment", args, {"data": piece}, pick=0)
                if "acknowledged" in answer or "missing" in answer:
                    return answer
        raise AssertionError(f"segment {sequence} is not through")


@pytest.fixture
def stage(tmp_path):
    made = Stage(tmp_path)
    made.act()
    yield made
    made.close()


@pytest.mark.parametrize("seed", range(3))
def test_segments_in_pieces_twice_and_in_any_order(stage, seed):
    robot = Stutterer(stage, seed)
    with contextlib.closing(robot.client):
        known, whole, stale = set(), [], []
        for sequence in range(4):
            codec = robot.rng.choice(frames.CODECS)
            seen = pictures(codec, seed=sequence)
            for step in (0, 4):
                robot.ask(seen[step], codec)
                known.add(recent.digest_of(recent._flat(seen[step]["observation.images.side"])))
            robot.beat(seconds=float(sequence))
            data = segment_of(seen, codec, sequence, WRITER)
            whole.append(data)
            thin = recent.thin(data, known)
            assert robot.deliver(sequence, thin, stale)["acknowledged"] == sequence
        assert len(stage.replay.segments) == 4
        for stored, data in zip(stage.replay.segments, whole, strict=True):
            assert same(stored, data)
        # All of it once more, from the start, and whole.
        for sequence, data in enumerate(whole):
            assert robot.deliver(sequence, data, stale)["repeated"]
        assert len(stage.replay.segments) == 4
        assert stage.row()["last"]["totals"] == {"seconds": 3.0}


@pytest.mark.parametrize("seed", range(3))
def test_each_start_is_played_though_everything_is_said_twice(stage, seed):
    """Starts that were given to a request whose answer nobody used are given again; results count once."""
    starts = [{"start": [0.5, 0.01 * i, 0.2]} for i in range(6)]
    stage.link.set_configurations(starts, "each")
    robot = Stutterer(stage, seed)
    with contextlib.closing(robot.client):
        finished, number = None, 0
        for _ in range(60):
            answer, _ = robot.say("episode", {"timeout": 0.5, "finished": finished})
            if "start" not in answer:
                if "has been played" in answer["wait"]:
                    break
                continue
            robot.beat(episodes=float(number))
            finished = {"episode": f"{WRITER}-{number}", "start": answer["start"]["id"]}
            finished.update(success=True, configuration=answer["start"]["configuration"])
            number += 1
        assert "has been played" in answer["wait"], answer
        results = stage.link.results()
        names = [result["episode"] for result in results]
        assert len(names) == len(set(names)) == number  # each told once
        played = [result["item"] for result in results if result["item"] >= 0]
        assert sorted(played) == list(range(6))  # and each start has its one result
        robot.client.call("detach", {"name": "arm", "session": SESSION, "finished": finished})
        assert len(stage.link.results()) == number


def test_a_repeated_question_is_answered_once(stage):
    """Of several the newest is answered; the others hear that; the policy's late answer is counted."""
    robot = Stutterer(stage, 0)
    with contextlib.closing(robot.client):
        args = {"name": "arm", "session": SESSION, "episode": "e-0", "step": 0, "codec": "raw"}
        (seen,) = pictures("raw", 1)
        arrays = {"observation.state": np.zeros(6, "<f4"), **frames.pack([seen], "raw")}
        stage.policy.quiet.set()
        futures = [
            robot.client.submit("observe", {**args, "timeout": 5.0, "step": step}, arrays)
            for step in (8, 4, 8)  # out of order: the gateway goes by what came last
        ]
        waits = [future.result(5)[0] for future in futures[:2]]
        assert all("newer" in wait["wait"] for wait in waits)
        stage.policy.quiet.clear()
        answer, arrays = futures[2].result(5)
        assert answer["version"] == 7 and arrays["policy.path"].ravel()[0] == 8
