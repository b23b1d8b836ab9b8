"""Spool, recorder, frames, operators, starts and clock, each by itself."""

import time

import numpy as np
import pytest

from robot_bridge import frames
from robot_bridge.clock import RobotClock
from robot_bridge.control import Executed, Plan
from robot_bridge.desk import Desk
from robot_bridge.driver import Outcome, make_driver
from robot_bridge.episodes import Episodes
from robot_bridge.leases import Robot
from robot_bridge.operator import Moment, make_operator
from robot_bridge.operators.scripted import ScriptedOperator
from robot_bridge.protocol import make_job
from robot_bridge.recorder import Recorder, Seen
from robot_bridge.spool import Spool
from robot_bridge.starts import Starts
from twinrl.core.codec import Encoded
from twinrl.core.codec_rows import Rows
from twinrl.core.errors import ConfigError, WireError
from twinrl.core.segment import Schema, Segment, check

SCHEMA = Schema(state_dim=2, privileged_dim=0, cameras=("side",), image_size=8, chunk=4)
JOB = {"run": "r", "task": "t", "instruction": "i"}
HEADER = {
    "source": "real",
    "task": "t",
    "instruction": "i",
    "region": "id",
    "configuration": {},
    "episode": "e",
    "writer": "w",
}


def seen(step):
    image = np.full((8, 8, 3), step, np.uint8)
    return Seen(np.full(2, step, np.float32), {"observation.images.side": image})


def executed(t, action, outcome, plan=None, index=-1, refused=False):
    return Executed(
        action=action,
        policy_action=action,
        intervention=plan is None,
        plan=plan,
        index=index,
        refused=refused,
        causes=(),
        timestamp=0.1 * (t + 1),
        outcome=outcome,
        view=None,
        skew=0.0,
    )


def record(steps, plan_of, outcome_of=None, refused=()):
    """An episode of `steps`; `plan_of(t)` gives (plan, index) or None where a person acted."""
    recorder = Recorder(HEADER, "raw")
    for t in range(steps):
        recorder.see(seen(200))  # replaced: nobody acted upon it
        recorder.see(seen(t))
        plan, index = plan_of(t) or (None, -1)
        action = np.full(7, t, np.float32)
        done = executed(
            t, action, outcome_of(t) if outcome_of else Outcome(), plan, index, t in refused
        )
        recorder.step(done)
    return recorder


def plans(length=4):
    made = {}

    def plan_of(t):
        number = t // length
        if number not in made:
            path = np.full((2, length, 7), number, np.float32)
            made[number] = Plan(np.zeros((length, 7), np.float32), 5, number, {"policy.path": path})
        return made[number], t % length

    return plan_of


def segments(recorder, last):
    recorder.see(seen(last))
    made = []
    for i, (header, columns) in enumerate(recorder.entries()):
        made.append(Segment(dict(header["header"], sequence=i), columns))
        check(made[-1], SCHEMA)
    return made


def test_long_episodes_split_at_chunks():
    """Segments of at most 64 steps join without a gap, and no chunk is cut in two."""
    recorder = record(150, plans(length=5))
    recorder.truncate()
    parts = segments(recorder, 150)
    assert [part.steps for part in parts] == [60, 60, 30]
    assert [part.header["first_step"] for part in parts] == [0, 60, 120]
    assert [part.header["last"] for part in parts] == [False, False, True]
    actions = np.concatenate([part.columns["action"][:, 0] for part in parts])
    np.testing.assert_array_equal(actions, np.arange(150))
    for part in parts:
        first = part.header["first_step"]
        shown = part.columns["observation.images.side"][:, 0, 0, 0]
        np.testing.assert_array_equal(shown, np.arange(first, first + part.steps + 1))
    chunks = np.concatenate([part.columns["policy.path"][:, 0, 0, 0] for part in parts])
    np.testing.assert_array_equal(chunks, np.arange(30))


@pytest.mark.parametrize(
    ("ending", "rows"),
    [("success", [0, 4, 8]), ("time", [0, 4, 8]), ("cut", [0, 4])],
)
def test_chunk_rows_of_an_unfinished_chunk(ending, rows):
    """A chunk that the task's end cuts was executed as planned; one that a hold cuts was not."""
    ends = {"success": Outcome(1.0, True, False, True), "time": Outcome(truncated=True)}

    def outcome_of(t):
        return ends.get(ending, Outcome()) if t == 9 else Outcome()

    recorder = record(10, plans(), outcome_of)
    recorder.truncate()
    (part,) = segments(recorder, 10)
    assert part.columns["chunk_step"].tolist() == rows
    assert part.columns["truncated"][-1] == (ending != "success")


def test_chunks_with_a_person_or_a_refusal_have_no_row():
    """Only wholly executed chunks carry policy.* rows; the steps carry their version nevertheless."""
    plan_of = plans()
    recorder = record(16, lambda t: None if 5 <= t < 8 else plan_of(t), refused={9})
    recorder.truncate()
    parts = segments(recorder, 16)
    assert [part.steps for part in parts] == [5, 3, 8]  # cut where hands change
    starts = [part.columns.get("chunk_step", np.array([], int)).tolist() for part in parts]
    assert starts == [[0], [], [4]]
    versions = np.concatenate([part.columns["policy_version"] for part in parts])
    assert versions.tolist() == [5] * 5 + [-1] * 3 + [5] * 8


def entry(value):
    columns = {"action": np.full((3, 7), value, np.float32)}
    return {"header": {"writer": "w", "value": value}, "codec": "raw"}, columns


def test_spool_survives_and_numbers_go_on(tmp_path):
    """What was added comes back in order after a crash; numbers are never given twice."""
    spool = Spool(tmp_path, "arm")
    spool.open("run")
    assert [spool.next_episode(), spool.next_episode()] == [0, 1]
    spool.add([entry(0), entry(1)])
    spool.add([entry(2)])
    spool.remove(0)
    (spool.folder / "run/0000000009.tmp").write_bytes(b"half")
    identity = spool.id
    with pytest.raises(ConfigError, match="another --name or --spool"):
        Spool(tmp_path, "arm")
    spool.close()  # the lock goes with the process
    again = Spool(tmp_path, "arm")
    again.open("run", {"sequence": 2, "episode": 7})
    assert again.id == identity
    assert again.numbering == {"sequence": 3, "episode": 7}
    assert again.oldest(0) == 1
    header, arrays = again.read(1)
    assert header["header"] == {"writer": "w", "value": 1, "sequence": 1}
    np.testing.assert_array_equal(arrays["action"], 1)
    for sequence in (1, 2):
        again.remove(sequence)
    assert again.oldest(0) is None and again.wait_empty(0)
    again.open("other")
    assert again.numbering == {"sequence": 0, "episode": 0}
    again.close()


def test_spool_damage_and_bounds(tmp_path):
    """A damaged file is noticed and set aside; a full spool says so and drops nothing."""
    spool = Spool(tmp_path, "arm", max_bytes=100)
    spool.open("run")
    assert not spool.full
    spool.add([entry(0), entry(1)])
    assert spool.full
    path = spool.folder / "run/0000000000.seg"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(WireError, match="damaged"):
        spool.read(0)
    assert spool.set_aside(0).exists()
    assert spool.oldest(0) == 1
    spool.close()


SIDE = "observation.images.side"


@pytest.mark.parametrize("codec", frames.CODECS)
def test_frames_round_trip(codec):
    """Live and stored frames decode to the same bits, and are the same bytes."""
    rng = np.random.default_rng(0)
    observed = [{SIDE: rng.integers(0, 255, (8, 8, 3), np.uint8)} for _ in range(5)]
    encoded = [frames.encode(each, codec) for each in observed]
    packed = frames.pack(encoded, codec)
    stored = frames.check(packed, codec, 8)[SIDE]
    assert stored.shape == packed[SIDE].shape == (5, 8, 8, 3)
    for i, one in enumerate(encoded):
        single = frames.pack([one], codec)
        live = frames.check(single, codec, 8)[SIDE]
        np.testing.assert_array_equal(live[0], stored[i])
        kept = frames.split(single)[SIDE]
        if codec == "raw":
            np.testing.assert_array_equal(live[0], observed[i][SIDE])
            np.testing.assert_array_equal(kept, observed[i][SIDE])
        else:
            assert kept == one[SIDE] == bytes(Rows(packed[SIDE].data, 5)[i])
            np.testing.assert_array_equal(packed[SIDE].rows([i])[0], stored[i])


def test_hostile_frames_are_refused():
    """Codecs, sizes and contents are checked before they are stored."""
    image = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    good = frames.pack([frames.encode({SIDE: image}, "jpeg")], "jpeg")
    data = good[SIDE].data
    for change in (
        Encoded("jpeg95", "|u1", (2, 8, 8, 3), data),
        Encoded("jpeg95", "|u1", (1, 8, 8, 3), data[:-9]),
        Encoded("jpeg95", "|u1", (1, 8, 8, 3), np.zeros_like(data)),
        Encoded("jpeg80", "|u1", (1, 8, 8, 3), data),
        Encoded("zstd", "|u1", (1, 8, 8, 3), data),
        image[None],
    ):
        with pytest.raises(WireError, match="side"):
            frames.check({SIDE: change}, "jpeg", 8)
    with pytest.raises(WireError, match="action"):
        frames.check({"action": good[SIDE]}, "jpeg", 8)
    with pytest.raises(WireError, match="should be 'raw'"):
        frames.check(good, "raw", 8)
    with pytest.raises(WireError, match="8 x 8, job's 16"):
        frames.check(good, "jpeg", 16)
    with pytest.raises(WireError, match="codec"):
        frames.check(good, "png", 8)
    assert frames.check(good, "jpeg", 8)[SIDE].shape == (1, 8, 8, 3)


def test_scripted_operator_steps_in_when_needed():
    """Slow or stuck: takes over until the episode's end, and not more often than it may."""
    driver = make_driver("point")
    driver.connect(make_job(SCHEMA, JOB), 1.0)
    driver.reset(None, "id")
    commanded = np.zeros(6)

    def first_step(operator, path):
        operator.begin()
        acted = [
            operator.act(Moment(t, np.array(place), driver, commanded)) is not None
            for t, place in enumerate(path)
        ]
        return acted.index(True) if True in acted else None

    moving = [(0.01 * t, 0.0, 0.0) for t in range(60)]
    still = [(0.0, 0.0, 0.0)] * 60
    operator = ScriptedOperator(slow_after=40, stuck_after=10, at_most=2)
    assert first_step(operator, moving[:39]) is None
    assert first_step(operator, moving) == 40
    assert first_step(operator, still) == 10
    assert first_step(operator, still) is None
    assert operator.takeovers == 2


def test_unknown_operator_and_option():
    """The message names what there is."""
    with pytest.raises(ConfigError, match="none, scripted, keyboard"):
        make_operator("ghost")
    with pytest.raises(ConfigError, match="legs"):
        make_operator("scripted", legs=2)


def test_starts_are_given_once_each():
    """A start whose robot left is given again, also after a restart of the gateway."""
    starts = Starts()
    assert starts.draw()["configuration"] is None
    starts.replace([{"object": [i]} for i in range(3)], "each", {"explore": False})
    first, second = starts.draw(), starts.draw()
    assert [first["item"], second["item"]] == [0, 1]
    assert first["configuration"] == {"object": [0]} and first["parameters"] == {"explore": False}
    assert starts.done(first["id"]) == 0
    again = Starts(starts.state())
    again.give_back(second["id"])
    assert [again.draw()["item"], again.draw()["item"]] == [1, 2]
    assert again.draw() is None
    version = again.version
    again.replace([{"configuration": None, "region": "ood"}], "random", {})
    assert again.version == version + 1
    assert {again.draw()["region"] for _ in range(5)} == {"ood"}
    with pytest.raises(WireError, match="random, each"):
        again.replace([], "backwards", {})


def test_an_episode_that_does_not_count_is_played_again():
    """A fault that was none of the policy's: no failure in the robot's success, and the start goes to whoever asks."""
    episodes = Episodes({}, lambda robot: "")
    episodes.starts.replace([{"object": [i]} for i in range(2)], "each", {})
    arm = Robot("arm")
    arm.attached = True

    def play(number, **result):
        start = episodes.ask(arm, 1.0).result(0)["start"]
        told = {"start": start["id"], "episode": f"arm-{number}", "success": False, **result}
        episodes.finish(arm, told)
        episodes.finish(arm, told)  # it may tell twice
        return start["item"]

    assert [play(0, invalid="camera 'side' is dark"), play(1, invalid="a reflex")] == [0, 0]
    assert arm.results == [] and arm.describe()["success"] is None
    assert [play(2, success=True, invalid=""), play(3)] == [0, 1]
    assert arm.results == [True, False]
    assert [r["item"] for r in episodes.results] == [0, 0, 0, 1]
    assert "each start" in episodes.ask(arm, -1.0).result(0)["wait"]


def test_bare_configurations_keep_their_region():
    """What Env.configurations() gives is taken as it is."""
    starts = Starts()
    starts.replace([{"task": "t", "region": "ood", "object": [1, 2, 3]}], "random", {})
    start = starts.draw()
    assert start["region"] == "ood"
    assert start["configuration"] == {"task": "t", "region": "ood", "object": [1, 2, 3]}


def test_desk_serves_the_newest_question():
    """A robot has one question; the first answer counts; late answers are counted, not used."""
    desk = Desk("boot")
    old = desk.ask("arm", {"step": 0}, {}, 5.0)
    new = desk.ask("arm", {"step": 4}, {}, 5.0)
    assert "newer" in old.result(0)[0]["wait"]
    taken = desk.take(8, 1.0).result(0)
    assert [question.header["step"] for question in taken] == [4]
    assert desk.give(taken[0].id, {"version": 1}, {}) and new.result(0)[0] == {"version": 1}
    assert not desk.give(taken[0].id, {"version": 2}, {})
    assert desk.late == 1


def test_desk_batches_and_hands_out_again():
    """Several arms go out together; what a dead server took is handed out once more."""
    desk = Desk("boot", patience=0.05)
    for name in ("a", "b", "c"):
        desk.ask(name, {}, {}, 5.0)
    assert [q.robot for q in desk.take(2, 1.0).result(0)] == ["a", "b"]
    assert [q.robot for q in desk.take(2, 1.0).result(0)] == ["c"]
    waiting = desk.take(3, 5.0)
    assert not waiting.done()
    time.sleep(0.06)
    desk.tick()
    assert [q.robot for q in waiting.result(0)] == ["a", "b", "c"]


def test_clock_counts_the_robots_own_time():
    """Motion and resets count what they stand for, at any speed; waits count as measured, less what is hidden."""
    clock = RobotClock(speed=100.0)
    began = time.monotonic()
    clock.spend("reset", 5.0)
    for _ in range(10):
        clock.spend("motion", 0.1)
    assert 0.05 <= time.monotonic() - began < 1.0
    time.sleep(0.03)
    clock.lapse("wait", hidden=0.1)
    assert clock.seconds == pytest.approx(6.0)
    time.sleep(0.05)
    clock.lapse("wait")
    assert 6.05 <= clock.seconds < 6.5
    clock.count("held", 100.0)
    assert clock.seconds < 6.5
    with pytest.raises(ValueError, match="speed"):
        RobotClock(0.0)


def test_each_opening_and_closing_of_the_gripper_costs_what_the_run_says():
    """From an open gripper: what was executed counts, and a person's verdict keeps it."""
    recorder = Recorder(HEADER, "raw", toggle=-0.5)
    for t, opening in enumerate([1.0, 0.9, 0.0, 0.2, 1.0]):
        recorder.see(seen(t))
        action = np.array([0, 0, 0, 0, 0, 0, opening], np.float32)
        recorder.step(executed(t, action, Outcome(reward=0.1)))
    recorder.see(seen(5))
    recorder.conclude(True)
    ((_, columns),) = recorder.entries()
    np.testing.assert_allclose(columns["reward"], [0.1, 0.1, -0.4, 0.1, 0.5], atol=1e-6)
