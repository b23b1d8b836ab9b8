"""Robot PC, gateway, policy server and replay service together: real sockets, real processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import robot_bridge
from robot_bridge import attach as attach_module
from robot_bridge import protocol
from robot_bridge.gateway import Gateway
from robot_bridge.link import Link
from robot_bridge.policy_link import PolicyLink
from robot_bridge.unit import NOT_REACHED
from twinrl.core import segment
from twinrl.core.errors import DeadlineError, Rejected, RemoteError
from twinrl.core.keys import Keys, allowed_publics, create_keys
from twinrl.core.segment import Schema, Segment
from twinrl.core.sockets import Client, Server, free_port, wait_until

pytestmark = pytest.mark.timeout(60)
HOME = Path(robot_bridge.__file__).resolve().parent.parent
SCHEMA = Schema(state_dim=6, privileged_dim=3, cameras=("side",), image_size=16, chunk=4)
JOB = {"run": "trial", "task": "reach", "instruction": "go there", "chunk": 4, "lease_s": 1.5}
VERSION = 7


class Replay:
    """An honest stand-in for the replay service: checks, records, drops repeats."""

    def __init__(self, run: Path, address: str) -> None:
        keys = run / "keys"
        allowed = dict.fromkeys(allowed_publics(keys, ["cluster"]), "cluster")
        self.segments: list[Segment] = []
        self.repeated = 0
        self.silent = False  # takes and keeps, but its acknowledgements get lost
        self._last: dict[str, int] = {}
        self._server = Server("replay", address, Keys.load(keys / "server.key"), allowed)
        self._server.bind("insert", self._insert)
        self._server.start()

    def _insert(self, request):
        header = request.args["header"]
        columns = dict(request.arrays)
        segment.check(Segment(header, columns), SCHEMA)
        writer, sequence = header["writer"], header["sequence"]
        repeated = sequence <= self._last.get(writer, -1)
        if repeated:
            self.repeated += 1
        else:
            self.segments.append(Segment(header, columns))
            self._last[writer] = sequence
        if self.silent:
            raise RemoteError("the acknowledgement got lost")
        return {"acknowledged": self._last[writer], "repeated": repeated}

    def close(self):
        self._server.close()


class Policy:
    """Gives chunks from a thread: action and path rows tell the step they were given for."""

    def __init__(self, link: PolicyLink, action=(0.0, 0.0, 0.0)) -> None:
        self.link, self.action = link, action
        self.seen = []
        self.quiet, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while not self._stop.is_set():
            if self.quiet.is_set():
                time.sleep(0.01)
                continue
            request = self.link.take(0.2)
            if request is None or self.quiet.is_set():
                continue
            self.seen.append(request)
            actions = np.zeros((4, 7), np.float32)
            actions[:, :3], actions[:, 6] = self.action, 0.5
            path = np.full((3, 4, 7), request.step, np.float32)
            with contextlib.suppress(DeadlineError):
                self.link.give(
                    request, actions, {"path": path, "log_prob": np.float32(-1)}, VERSION
                )

    def close(self):
        self._stop.set()
        self._thread.join(5)


class Stage:
    """A run with everything but Ray."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        create_keys(folder / "keys")
        ports = [f"tcp://127.0.0.1:{free_port()}" for _ in range(3)]
        self.url, self.internal, self.replay_address = ports
        self.replay = Replay(folder, self.replay_address)
        self.open_gateway()
        self.cluster = Keys.load(folder / "keys/cluster.key")
        self.link = PolicyLink(self.internal, self.cluster)
        self.policy: Policy | None = None
        self.bridges: list[subprocess.Popen] = []

    def open_gateway(self, **job):
        made = protocol.make_job(SCHEMA, {**JOB, **job})
        self.gateway = Gateway(self.folder, self.url, self.internal, self.replay_address, made)
        self.gateway.start()

    def act(self, **options) -> Policy:
        self.policy = Policy(self.link, **options)
        return self.policy

    def attach(self, *arguments: str, name: str = "arm", spool: str = "spool") -> subprocess.Popen:
        """`twinrl attach` as a process."""
        command = [
            *(sys.executable, "-m", "robot_bridge.attach", "--robot", "point", "--name", name),
            *("--url", self.url, "--key", str(self.folder / "keys/robot.key"), "--wait", "8"),
            *("--spool", str(self.folder / spool), "--robot-option", "reset_seconds=0.1"),
            *arguments,
        ]
        process = subprocess.Popen(
            command, cwd=HOME, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.bridges.append(process)
        return process

    def row(self, name: str = "arm"):
        return next((r for r in self.link.robots()[0] if r["name"] == name), None)

    def wait_for(self, state: str, name: str = "arm", seconds: float = 8.0):
        def there():
            row = self.row(name)
            return row if row and row["state"] == state else None

        return wait_until(there, seconds, f"{name} to be {state}, is {self.row(name)}")

    def close(self):
        if self.policy:
            self.policy.close()
        for process in self.bridges:
            if process.poll() is None:
                process.kill()
            process.communicate()
        self.link.close()
        self.gateway.close()
        self.replay.close()


@pytest.fixture
def stage(tmp_path):
    stage = Stage(tmp_path)
    yield stage
    stage.close()


def finish(process: subprocess.Popen, seconds: float = 20.0) -> str:
    output, _ = process.communicate(timeout=seconds)
    return output


def check_exactly_once(segments: list[Segment]) -> dict[str, list[Segment]]:
    """Sequence numbers rise without a repeat; each episode's segments join without a gap; by episode."""
    numbers: dict[str, list[int]] = {}
    episodes: dict[str, list[Segment]] = {}
    for each in segments:
        numbers.setdefault(each.header["writer"], []).append(each.header["sequence"])
        episodes.setdefault(each.header["episode"], []).append(each)
    for sequence in numbers.values():
        assert sequence == sorted(set(sequence))
    for parts in episodes.values():
        steps = 0
        for part in parts:
            assert part.header["first_step"] == steps
            steps += part.steps
        assert [part.header["last"] for part in parts] == [False] * (len(parts) - 1) + [True]
    return episodes


@pytest.mark.parametrize("codec", ["raw", "jpeg"])
def test_round_trip(stage, codec):
    """Attach, act, record: every step once, every frame the one that the policy saw."""
    policy = stage.act()
    output = finish(stage.attach("--speed", "50", "--episodes", "3", "--codec", codec))
    assert "detached" in output and "Traceback" not in output
    episodes = check_exactly_once(stage.replay.segments)
    assert len(episodes) == 3
    seen = {(request.episode, request.step): request.observation for request in policy.seen}
    for name, (part,) in episodes.items():
        columns = part.columns
        assert part.steps == 24 and part.header["source"] == "real"
        # Both sides have the same clock here: it is found, as well as the header says.
        off, give_or_take = part.header["clock_offset_s"], part.header["clock_uncertainty_s"]
        assert abs(off) <= give_or_take + 1e-4 and give_or_take < 0.1
        assert columns["truncated"].tolist() == [False] * 23 + [True]
        np.testing.assert_array_equal(columns["observation.state"][:, 4], np.arange(25))
        assert columns["policy_version"].tolist() == [VERSION] * 24
        assert columns["chunk_id"].tolist() == np.repeat(np.arange(6), 4).tolist()
        assert columns["chunk_step"].tolist() == list(range(0, 24, 4))
        assert columns["policy.path"].shape == (6, 3, 4, 7)
        assert columns["policy.log_prob"].shape == (6,)
        np.testing.assert_array_equal(columns["policy.path"][:, 0, 0, 0], np.arange(0, 24, 4))
        assert not columns["intervention"].any()
        np.testing.assert_array_equal(columns["policy_action"], columns["action"])
        assert (np.diff(columns["timestamp"]) >= 0.0999).all()
        frames = columns["observation.images.side"]
        if codec == "jpeg":  # stored as the bytes that the robot sent
            assert frames.codec == "jpeg95"
            frames = frames.decode()
        assert frames.shape == (25, 16, 16, 3)
        for step in range(0, 24, 4):
            observed = seen[name, step]
            np.testing.assert_array_equal(observed["observation.images.side"], frames[step])
            np.testing.assert_array_equal(
                observed["observation.state"], columns["observation.state"][step]
            )
        if codec == "raw":
            np.testing.assert_array_equal(frames[:, 0, 0, 0], np.arange(25))
    row = stage.row()
    assert row["state"] == "gone" and row["episodes"] == 3
    # 24 steps of 0.1 s and 0.1 s of reset, three times; waits for chunks hide behind the motion.
    assert row["minutes"] * 60 == pytest.approx(3 * 2.5, abs=1.0)


def test_starts_results_and_parameters(stage):
    """Each start is played once; results name it; what need not be recorded is not."""
    stage.act(action=(0.03, 0.03, -0.03))
    starts = [{"start": [0.5, 0.02 * i, 0.2], "region": "ood"} for i in range(4)]
    parameters = {"explore": False, "record": False, "trial": 5}
    assert stage.link.set_configurations(starts, "each", parameters) == 1
    stage.attach("--speed", "50")
    results = wait_until(
        lambda: stage.link.results() if len(stage.link.results()) == 4 else None, 15, "4 results"
    )
    assert sorted(result["item"] for result in results) == [0, 1, 2, 3]
    assert [result["number"] for result in results] == [1, 2, 3, 4]
    for result in results:
        assert result["parameters"] == parameters and result["version"] == VERSION
        assert result["region"] == "ood"
        assert result["configuration"]["start"] == starts[result["item"]]["start"]
    assert stage.link.results(since=3) == results[3:]
    assert all(not request.explore for request in stage.policy.seen)
    assert stage.replay.segments == []
    row = wait_until(
        lambda: stage.row() if "has been played" in stage.row()["reason"] else None, 5, "idling"
    )
    assert row["state"] == "idle"
    stage.link.set_configurations([], parameters={"explore": True})
    wait_until(lambda: stage.replay.segments, 10, "practice that is recorded")


def test_an_episode_may_ask_for_something_of_its_own(stage):
    """What a start's configuration asks for reaches policy and record; without, the job's text does."""
    stage.act(action=(0.03, 0.03, -0.03))
    starts = [{"start": [0.5, 0.0, 0.2], "instruction": "go left"}, {"start": [0.5, 0.1, 0.2]}]
    stage.link.set_configurations(starts, "each")
    stage.attach("--speed", "50")
    segments = wait_until(
        lambda: stage.replay.segments if len(stage.replay.segments) >= 2 else None, 15, "2 episodes"
    )
    told = {segment.header["episode"]: segment.header["instruction"] for segment in segments}
    assert sorted(told.values()) == ["go left", "go there"]
    for request in stage.policy.seen:
        assert request.instruction == told.get(request.episode, request.instruction)
    assert {request.instruction for request in stage.policy.seen} == {"go left", "go there"}


def test_takeover_is_flagged(stage):
    """The operator's steps are marked, the policy's wish is kept beside them, and its chunk is not called whole."""
    stage.act()
    options = ["--operator", "scripted", "--takeovers", "1", "--operator-option", "stuck_after=5"]
    finish(stage.attach("--speed", "50", "--episodes", "2", *options))
    first, second = check_exactly_once(stage.replay.segments).values()
    before, after = (part.columns for part in first)  # cut where the person took over
    assert not before["intervention"].any() and after["intervention"].all()
    assert len(before["action"]) == 5
    assert after["success"][-1] and after["terminated"][-1]
    np.testing.assert_array_equal(after["policy_action"][:, :3], 0)
    assert (np.linalg.norm(after["action"][:, :3], axis=1) > 0).all()
    assert (after["policy_version"] == -1).all() and (after["chunk_id"] == -1).all()
    assert before["chunk_step"].tolist() == [0]  # the second chunk was cut by the person
    assert "chunk_step" not in after
    assert len(second) == 1 and not second[0].columns["intervention"].any()
    row = stage.row()
    assert row["takeovers"] == 1 and row["episodes"] == 2


def test_rejections_carry_the_cure(stage):
    """A robot that does not fit is told what to do, by one line, and nothing breaks."""
    stage.act()
    keys = Keys.load(stage.folder / "keys/robot.key")
    features = protocol.features_of(SCHEMA)
    good = {
        "kind": "point",
        "writer": "w",
        "features": [features.state_dim, list(features.cameras), features.image_size],
        "digest": features.digest(),
    }
    link = Link(stage.url, keys, "arm")
    link.attach(5, **good)
    stranger = Link(stage.url, keys, "arm")
    try:
        with pytest.raises(Rejected, match=r"attach with another --name, e\.g\. arm-2"):
            stranger.attach(5, **{**good, "writer": "other"})
        with pytest.raises(Rejected, match="image_size is 32 on the robot, 16 in the run"):
            stranger.attach(5, **{**good, "features": [6, ["side"], 32]})
        with pytest.raises(Rejected, match="pip install 'twinrl=="):
            stranger.attach(5, **{**good, "digest": "other"})
        for change in ({"protocol": 99}, {"software": "9.9.0"}):
            args = {**good, "name": "b", "session": "s", "host": "h"}
            args |= {"protocol": protocol.PROTOCOL, "software": protocol.SOFTWARE, **change}
            with pytest.raises(Rejected, match="pip install 'twinrl=="):
                stranger._live.call("attach", args, timeout=5)
        # A robot's key opens the robot's methods only, and the other way round.
        with pytest.raises(Rejected, match="cluster key"):
            stranger._live.call("command", {"action": "estop", "target": "arm"}, timeout=5)
        cluster = Client("gateway", stage.url, stage.cluster)
        with pytest.raises(Rejected, match="robot key"):
            cluster.call("attach", good, timeout=5)
        cluster.close()
    finally:
        link.close()
        stranger.close()
    output = finish(stage.attach("--episodes", "1", "--speed", "50"))  # the name is free again
    assert "detached" in output


def test_wrong_key_never_gets_in(stage, tmp_path):
    """A stranger's key: no answer, and after the deadline a line that says what to look at."""
    create_keys(tmp_path / "other")
    arguments = ["--robot", "point", "--name", "arm", "--url", stage.url, "--wait", "1"]
    arguments += ["--spool", str(tmp_path / "spool"), "--key", str(tmp_path / "other/robot.key")]
    process = subprocess.run(
        [sys.executable, "-m", "robot_bridge.attach", *arguments],
        cwd=HOME,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert process.returncode == NOT_REACHED
    assert "robot.key" in process.stderr and "Traceback" not in process.stderr
    assert stage.link.robots()[0] == []


def test_unknown_names_are_suggested(keys, tmp_path, capsys):
    """A typing error gets the nearest name or the allowed values, not a traceback."""
    arguments = ["--name", "a", "--url", "tcp://127.0.0.1:1", "--spool", str(tmp_path)]
    key = ["--key", str(tmp_path / "keys/robot.key")]
    for more, message in (
        (["--robot", "poiint", *key], "did you mean 'point'?"),
        (["--robot", "point", "--key", "nowhere"], "no key file nowhere"),
        (["--robot", "point", *key, "--robot-option", "legs=4"], "legs"),
        (["--robot", "point", *key, "--limit", "step=1"], "step_m"),
        (["--robot", "point", *key, "--name", "../up"], "letters, digits"),
        (["--robot", "point", *key, "--wait", "0.3"], "no answer from tcp://127.0.0.1:1"),
    ):
        assert attach_module.main([*arguments, *more]) in (1, NOT_REACHED)
        assert message in capsys.readouterr().err


def test_killed_bridge_resends(stage):
    """kill -9 with unacknowledged segments: the next attach sends them once, and numbers go on."""
    stage.act()
    stage.replay.silent = True
    first = stage.attach("--speed", "50")
    wait_until(lambda: stage.row() and stage.row()["episodes"] >= 3, 15, "3 episodes")
    first.kill()
    first.wait()
    kept = sorted((stage.folder / "spool/arm/trial").glob("*.seg"))
    assert len(kept) >= 2 and len(stage.replay.segments) == 1
    stage.replay.silent = False
    finish(
        stage.attach("--speed", "50", "--episodes", "2")
    )  # no wait for the lease: the same spool
    episodes = check_exactly_once(stage.replay.segments)
    assert stage.replay.repeated >= 1
    numbers = [s.header["sequence"] for s in stage.replay.segments]
    assert numbers == list(range(len(kept) + 2))
    assert len({s.header["writer"] for s in stage.replay.segments}) == 1
    assert len(episodes) == len(kept) + 2
    assert not list((stage.folder / "spool/arm/trial").glob("*.seg"))
    assert stage.row()["episodes"] >= 5


def test_gateway_restart(stage):
    """The arm holds while the gateway is away, comes back by itself, and loses nothing."""
    policy = stage.act()
    stage.attach("--speed", "8", "--codec", "raw")
    wait_until(lambda: len(stage.replay.segments) >= 1, 15, "a first episode")
    minutes = stage.row()["minutes"]
    stage.gateway.close()
    time.sleep(1.0)
    stage.open_gateway()
    count = len(stage.replay.segments)
    wait_until(lambda: len(stage.replay.segments) >= count + 2, 20, "further episodes")
    row = stage.row()
    assert row["attached"] and row["minutes"] > minutes and row["holds"] >= 1
    process = stage.bridges[0]
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert "holding: " in output and "Traceback" not in output
    episodes = check_exactly_once(stage.replay.segments)
    for parts in episodes.values():
        states = parts[0].columns["observation.state"]
        np.testing.assert_array_equal(states[:, 4], np.arange(len(states)))
    assert len(policy.seen) > 0


def test_silent_policy_holds_and_recovers(stage):
    """No chunk: the arm stands still; a chunk again: the same episode goes on; silence for long: truncated."""
    policy = stage.act()
    options = ["--give-up", "2.5", "--robot-option", "steps=60"]
    process = stage.attach("--speed", "5", *options)

    def playing(number: int) -> bool:
        last = (stage.row() or {"last": {}})["last"]
        return last.get("step", 0) >= 4 and last["episode"].endswith(f"-{number}")

    wait_until(lambda: playing(0), 10, "a step of the first episode")
    policy.quiet.set()
    held = stage.wait_for("holding")
    assert "policy server" in held["reason"]
    step = stage.row()["last"]["step"]
    time.sleep(0.5)
    assert stage.row()["last"]["step"] == step
    policy.quiet.clear()
    stage.wait_for("running")
    wait_until(lambda: stage.replay.segments, 15, "the episode's end")
    whole = stage.replay.segments[0]
    assert whole.steps == 60 and whole.columns["truncated"][-1]
    waited = np.diff(whole.columns["timestamp"]).max()
    assert waited > 0.5  # robot time, with the hold in it
    wait_until(lambda: playing(1), 10, "a step of the second episode")
    policy.quiet.set()
    wait_until(lambda: len(stage.replay.segments) >= 2, 15, "the closed episode")
    cut = stage.replay.segments[1]
    assert cut.steps < 60 and cut.columns["truncated"][-1] and not cut.columns["terminated"].any()
    assert cut.header["last"]
    policy.quiet.clear()
    wait_until(lambda: len(stage.replay.segments) >= 3, 15, "a new episode")
    process.send_signal(signal.SIGINT)
    assert "detached" in finish(process)


def test_leave_and_come_back(stage):
    """A robot that falls silent frees its name; others go on; it comes back and continues its numbers."""
    stage.act()
    first = stage.attach("--speed", "50")
    stage.attach("--speed", "50", name="other")
    wait_until(lambda: stage.row() and stage.row()["episodes"] >= 1, 15, "an episode")
    os.kill(first.pid, signal.SIGSTOP)
    stage.wait_for("gone", seconds=5)
    before = stage.row("other")["episodes"]
    wait_until(lambda: stage.row("other")["episodes"] >= before + 2, 15, "the other to go on")
    os.kill(first.pid, signal.SIGCONT)
    wait_until(lambda: stage.row()["attached"], 5, "its return")
    episodes = stage.row()["episodes"]
    wait_until(lambda: stage.row()["episodes"] >= episodes + 2, 15, "further episodes")
    for process in stage.bridges:
        process.send_signal(signal.SIGINT)
    for process in stage.bridges:
        assert "detached" in finish(process)
    check_exactly_once(stage.replay.segments)
    assert {s.header["robot"] for s in stage.replay.segments} == {"arm", "other"}


def test_commands(stage):
    """Hold, release, pause, resume, emergency stop and detach reach the arm."""
    stage.act()
    process = stage.attach("--speed", "8", "--codec", "jpeg")
    stage.wait_for("running")
    stage.link.command("arm", "hold")
    assert "held from the cluster" in stage.wait_for("holding")["reason"]
    stage.link.command("arm", "release")
    stage.wait_for("running")
    stage.link.pause()
    assert stage.link.run_state() == {"paused": True, "checkpoints": 0}
    stage.wait_for("holding")
    stage.link.resume()
    stage.wait_for("running")
    _, frames = stage.link.robots()
    assert frames["arm/side"][:2] == b"\xff\xd8"
    page = Client("gateway", stage.internal, stage.cluster)
    _, arrays = page.call("camera", {"robot": "arm", "camera": "side"}, timeout=5)
    assert arrays["jpeg"].tobytes()[:2] == b"\xff\xd8"
    page.call("command", {"action": "checkpoint"}, timeout=5)
    assert stage.link.run_state()["checkpoints"] == 1
    with pytest.raises(Rejected, match="known: pause, resume"):
        page.call("command", {"action": "dance", "target": "arm"}, timeout=5)
    page.close()
    stage.link.command("arm", "estop")
    stage.wait_for("stopped")
    stage.link.command("arm", "release")  # releases a hold, never the latch
    time.sleep(0.3)
    assert stage.row()["state"] == "stopped"
    stage.link.command("arm", "detach")
    assert "detached" in finish(process)
    stage.attach("--speed", "50", "--episodes", "1")  # started by a person at the robot: released
    wait_until(
        lambda: stage.row()["episodes"] >= 1 and not stage.row()["attached"], 10, "an episode"
    )


def test_policy_server_that_dies_with_a_question(stage):
    """An observation that was taken and never answered is handed to the next taker."""
    stage.link.take_batch(0.0, 1)  # somebody is there: episodes begin
    stage.attach("--speed", "50", "--episodes", "1", "--give-up", "20")
    wait_until(lambda: stage.link.take(0.5), 10, "a question that is never answered")
    stage.act()
    wait_until(lambda: stage.replay.segments, 15, "the episode")
    assert stage.replay.segments[0].steps == 24


def test_core_is_light():
    """What a robot PC runs loads neither torch nor ray nor mujoco, and starts quickly."""
    code = (
        "import sys, json, robot_bridge.attach, robot_bridge.drivers.point, robot_bridge.gateway;"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=HOME, capture_output=True, text=True, check=True
    ).stdout
    loaded = set(json.loads(output))
    heavy = {"torch", "ray", "mujoco", "gymnasium", "pydantic", "twins", "redis", "yaml"}
    assert not loaded & heavy
    assert {"numpy", "msgpack", "zmq"} <= loaded
