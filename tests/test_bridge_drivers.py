"""What every driver must do, and that the stand-in is an arm of its own."""

import argparse
import json
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from robot_bridge import rig
from robot_bridge.camera_guard import RENDERED, USUAL
from robot_bridge.driver import Commanded, make_driver, state_vector
from robot_bridge.drivers import sim, sim_arm
from robot_bridge.limits import Limits, make_limits
from robot_bridge.motion import between
from robot_bridge.protocol import make_job
from robot_bridge.safety import SafetyFilter
from twinrl.core.errors import ConfigError, TwinRLError
from twinrl.core.segment import Schema
from twins.observe import STATE_NAMES
from twins.standin import PHYSICS, Reality, make_reality, split_reality

JOB = {"run": "r", "task": "pick-and-place", "instruction": "i"}
SCHEMAS = {
    "point": Schema(6, 0, ("side",), 16, 4),
    "sim": Schema(27, 14, ("side", "wrist"), 32, 4),
}
REST = np.array([0, 0, 0, 0, 0, 0, 1], np.float32)
# What the twins' actions may be, and the motion that comes of it.
TWIN = make_limits(
    {
        "speed": 0.3,
        "step_rad": 0.2,
        "turn_speed": 2.0,
        "lead_m": 0.15,
        "joint_speed": 6.0,
        "force_n": 60.0,
    }
)


def connect(kind, speed=50.0, observe="images", **options):
    schema = SCHEMAS[kind] if observe == "images" else Schema(34, 14, (), 32, 4)
    made = make_driver(kind, **options)
    made.connect(make_job(schema, {**JOB, "observe": observe}), speed)
    return made


@pytest.fixture(params=[("point", 50.0), ("point", 1.0), ("sim", 50.0), ("sim", 1.0)], ids=str)
def driver(request):
    made = connect(*request.param)
    yield made
    made.disconnect()


class Loop:
    """Control steps as the control loop makes them."""

    def __init__(self, driver, limits=TWIN):
        self.driver = driver
        self.period = 1.0 / driver.rate_hz
        self.ticks = round(0.1 / self.period)
        self.safety = SafetyFilter(limits, driver.rate_hz, 0.1, driver.joint_range)
        self.begin()

    def begin(self):
        self.safety.begin(self.driver.measure().pose, 1.0)
        self.newest = self.earlier = REST

    def step(self, action):
        start = self.safety.target.copy()
        verdict = self.safety.step(action, self.driver.measure())
        for k in range(1, self.ticks + 1):
            wanted = between(start, verdict.target, k / self.ticks)
            measured = self.driver.measure()
            self.driver.servo(self.safety.tick(wanted, measured), self.safety.gripper)
            if not self.driver.lockstep:
                time.sleep(self.period)
        self.earlier, self.newest = self.newest, verdict.action
        return verdict, self.driver.ended(verdict.action)

    def state(self):
        commanded = Commanded(self.safety.target, self.newest, self.earlier)
        return self.driver.state(self.driver.measure(), commanded)


def test_contract(driver):
    """What it says it has, it has; without motion nothing moves; an episode ends."""
    configuration = driver.reset(None, "ood")
    assert configuration["region"] == "ood"
    loop = Loop(driver)
    before = driver.measure()
    for _ in range(3):
        state = loop.state()
        assert state.dtype == np.float32 and state.shape == (len(driver.dimensions),)
        for camera in driver.cameras:
            frame = driver.frames()[camera]
            assert frame.image.dtype == np.uint8
            assert frame.image.shape == (driver.image_size, driver.image_size, 3)
            assert time.monotonic() - frame.time < 0.2
        verdict, outcome = loop.step(REST)
        assert not verdict.causes
    after = driver.measure()
    assert before.fault == after.fault == ""
    moved = np.abs(after.pose - before.pose)
    assert moved[:3].max() < 5e-3 and moved[3:].max() < 0.03  # the stand-in is never quite still
    assert after.joints.shape == (
        (0,) if driver.joint_range is None else driver.joint_range[0].shape
    )
    for _ in range(200 if driver.lockstep else 0):
        if outcome.terminated or outcome.truncated:
            break
        outcome = loop.step(REST)[1]
    assert not driver.lockstep or (outcome.truncated and not outcome.terminated)


def test_expert_succeeds_within_the_limits(driver):
    """Through the whole filter, which does not interfere; in real time as well."""
    successes, tried = 0, 3 if driver.lockstep else 1
    loop = Loop(driver)
    for _ in range(tried):
        driver.reset(None, "id")
        loop.begin()
        for _ in range(150):
            _, outcome = loop.step(driver.expert(0.0, loop.safety.target))
            if outcome.terminated or outcome.truncated:
                break
        successes += outcome.success
    assert successes == tried
    assert not loop.safety.counts, loop.safety.counts


def test_the_state_is_the_twins():
    """The same numbers in the same order, of the same pose and commands."""
    driver = connect("sim")
    driver.reset(None, "id")
    loop = Loop(driver)
    for _ in range(3):
        loop.step(np.array([0.02, -0.01, -0.02, 0.05, 0, 0.1, 0.0]))
    measured = driver.measure()
    state = state_vector(measured, Commanded(loop.safety.target, loop.newest, loop.earlier))
    assert tuple(d.name for d in driver.dimensions) == STATE_NAMES
    named = dict(zip(STATE_NAMES, state, strict=True))
    np.testing.assert_allclose([named[f"tcp_{a}"] for a in "xyz"], measured.pose[:3], atol=1e-6)
    ahead = loop.safety.target[:3] - measured.pose[:3]
    np.testing.assert_allclose([named[f"lead_{a}"] for a in "xyz"], ahead, atol=1e-6)
    assert named["last_action_0"] == np.float32(0.02) and named["gripper_width"] < 0.08
    driver.disconnect()


def test_only_reality_decides_about_physics():
    """A twin's configuration places things on the stand-in; its physics, camera and light stay its own."""
    from twins import make_env

    twin = make_env("pick-and-place", 1, randomisation="full", render=False, seed=5)
    twin.reset(seed=5)
    (given,) = twin.configurations()
    twin.close()
    driver = connect("sim", seed=1)
    own = driver.reset(None, "id")
    played = driver.reset(given, "id")
    assert played["object"] == given["object"] and played["basket"] == given["basket"]
    assert played["draw"] == own["draw"] != given["draw"]
    driver.disconnect()


def test_poses_instead_of_cameras():
    """A job that observes poses gets them after the arm's own numbers, with units and frames."""
    driver = connect("sim", observe="state")
    driver.reset(None, "id")
    assert driver.cameras == () and driver.frames() == {}
    assert [str(d) for d in driver.dimensions[27:29]] == [
        "object_x [m, base]",
        "object_y [m, base]",
    ]
    assert Loop(driver).state().shape == (34,)
    driver.disconnect()


def test_a_reality_of_ones_own(tmp_path):
    """By file or number; what it has not is refused with the nearest name."""
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps({"friction": 0.5, "latency": 2, "exposure": 0.5}))
    usual, dark = connect("sim"), connect("sim", reality=str(path))
    shown = [d.frames()["side"].image.mean() for d in (usual, dark) if d.reset(None, "id")]
    assert dark.reset(None, "id")["draw"]["friction"] == 0.5
    assert shown[1] < 0.7 * shown[0]
    drawn = [connect("sim", reality_seed=n).reset(None, "id")["draw"]["mass"] for n in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    path.write_text(json.dumps({"fricton": 0.5}))
    with pytest.raises(ConfigError, match="did you mean 'friction'"):
        connect("sim", reality=str(path))
    usual.disconnect(), dark.disconnect()


def test_a_reality_by_its_own_flags(tmp_path):
    """One seed is one reality, another is another; a file, in JSON or YAML, overrules it; only the stand-in has one."""
    parser = argparse.ArgumentParser()
    rig.add_arguments(parser)
    path = tmp_path / "cell.yaml"
    path.write_text("friction: 0.9\ncolours: {table: [0.1, 0.0, 0.0]}\nbacklash: 0.002\n")

    def drawn(*words):
        arm = rig.make_rig(parser.parse_args(["--robot", "sim", *words])).driver
        arm.connect(make_job(Schema(27, 14, (), 32, 4), JOB), 50.0)
        found = arm.reset(None, "id")["draw"]
        arm.disconnect()
        return found

    seven = drawn("--reality-seed", "7")
    assert seven == drawn("--reality-seed", "7") != drawn("--reality-seed", "8")
    assert Reality.drawn(7) == Reality.drawn(7) != Reality.drawn(8)
    own = drawn("--reality-seed", "7", "--reality", str(path))
    assert own["friction"] == 0.9 and own["colours"]["table"] == [0.1, 0.0, 0.0]
    assert {k: v for k, v in own.items() if k not in ("friction", "colours")} == {
        k: v for k, v in seven.items() if k not in ("friction", "colours")
    }
    assert own["colours"]["arm"] == seven["colours"]["arm"]
    with pytest.raises(ConfigError, match="only --robot sim has one, 'point' is as it is"):
        rig.make_rig(parser.parse_args(["--robot", "point", "--reality-seed", "7"]))
    with pytest.raises(ConfigError, match="give one of them"):
        drawn("--reality-seed", "7", "--robot-option", "reality_seed=8")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("backlsh: 0.1", "did you mean 'backlash'"),
        ("fricton: 0.1", "did you mean 'friction'"),
        ("friction: much", "friction of a reality is 'much', must be a number"),
        ("backlash: -1", "must be a number, 0 or more"),
        ("latency: 0.5", "must be whole control steps"),
        ("lamp: [0.1]", "must be a list of 2"),
        ("cameras: {front: [0, 0, 0, 0, 0, 0]}", "may have side, wrist"),
        ("[1, 2]", "holds no mapping"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_reality_that_cannot_be(tmp_path, text, error):
    """Said in words, with the nearest name."""
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=error):
        make_reality(split_reality(sim._read(str(path)))[0])


def test_no_two_images_of_the_stand_in_are_alike(tmp_path):
    """As of any sensor, so a frozen camera can be told; and of the same moment it is always the same image."""
    path = tmp_path / "quiet.json"
    path.write_text('{"image_noise": 0}')
    noisy, again, quiet = connect("sim"), connect("sim"), connect("sim", reality=str(path))
    assert (noisy.tolerance, quiet.tolerance) == (USUAL, RENDERED)
    seen = []
    for arm in (noisy, again, quiet):
        arm.reset(None, "id")
        pose, images = arm.measure().pose, []
        for _ in range(60):
            arm.servo(pose, 1.0)
        for _ in range(4):
            arm.servo(pose, 1.0)
            images.append([arm.frames()[name].image for name in arm.cameras])
            arm.frames()  # another look changes nothing
        seen.append(np.array(images))
        arm.disconnect()
    for camera in range(2):
        assert not any((a == b).all() for a, b in pairwise(seen[0][:, camera]))
    np.testing.assert_array_equal(seen[0], seen[1])
    assert np.abs(seen[0].astype(float) - seen[2]).mean() < 1.0


def test_each_number_of_a_reality_is_documented():
    """With its range."""
    text = (Path(__file__).parent.parent / "docs" / "robots.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    for name in (*Reality._fields, *PHYSICS):
        assert any(f"`{name}`" in row.split("|")[1] for row in rows), name


def test_without_a_yaml_reader(tmp_path, monkeypatch):
    """JSON needs none; YAML says what to install."""
    monkeypatch.setitem(sys.modules, "yaml", None)
    path = tmp_path / "cell.yaml"
    path.write_text("friction: 0.9")
    with pytest.raises(ConfigError, match=r"pip install pyyaml, or give a \.json file"):
        connect("sim", reality=str(path))
    path = tmp_path / "cell.json"
    path.write_text('{"friction": 0.9}')
    assert sim._read(str(path)) == {"friction": 0.9}


def test_a_reflex_stops_the_arm_until_it_recovers(tmp_path):
    """Pushed into the table it stops by itself, says why, and goes on from where it stands."""
    path = tmp_path / "reality.json"
    path.write_text(json.dumps({"reflex_n": 40.0}))
    driver = connect("sim", reality=str(path))
    driver.reset(None, "id")
    place = driver.measure().pose
    for _ in range(300):
        place = place - np.array([0, 0, 0.001, 0, 0, 0])
        driver.servo(place, 1.0)
        if driver.measure().fault:
            break
    fault = driver.measure().fault
    assert fault.startswith("reflex: ")
    driver.servo(place + np.array([0, 0, 0.2, 0, 0, 0]), 1.0)
    assert driver.measure().fault == fault
    driver.recover()
    assert driver.measure().fault == ""
    place = driver.measure().pose
    for k in range(100):
        driver.servo(place + np.array([0, 0, 0.001 * k, 0, 0, 0]), 1.0)
    assert driver.measure().pose[2] > place[2] + 0.05
    driver.disconnect()


def test_the_filter_backs_off_from_the_table(tmp_path):
    """With limits that let the tool touch, force makes it go back before the arm's own reflex."""
    box = [0.22, -0.45, -0.2, 0.81, 0.45, 0.55]
    limits = make_limits({"workspace": box, "keep_out": [], "speed": 0.05})
    path = tmp_path / "reality.json"
    path.write_text(json.dumps({"latency": 0, "reflex_n": 300.0}))
    driver = connect("sim", reality=str(path))
    driver.reset(None, "id")
    loop, felt = Loop(driver, limits), []
    for _ in range(80):
        loop.step(np.array([0, 0, -0.005, 0, 0, 0, 1.0]))
        felt.append(driver.measure().force)
    assert loop.safety.counts["force_n"] >= 1
    assert driver.measure().fault == "" and max(felt) < 200.0
    driver.disconnect()


def test_what_is_injected_happens_and_is_logged(tmp_path):
    """Frozen and missing cameras, a reflex, a blocked gripper; the hardware's own log has every tick."""
    inject, log = tmp_path / "inject", tmp_path / "arm.log"
    driver = connect("sim", speed=1.0, inject=str(inject), log=str(log))
    driver.reset(None, "id")
    time.sleep(0.3)

    def say(**what):
        with inject.open("a") as file:
            file.write(json.dumps(what) + "\n")
        time.sleep(0.2)

    say(missing_s=10.0)
    assert time.monotonic() - driver.frames()["side"].time > 0.1
    say(missing_s=0.0, frozen=True)
    time.sleep(0.2)
    assert time.monotonic() - driver.frames()["side"].time < 0.2
    say(reflex="hit a person")
    assert driver.measure().fault == "reflex: hit a person"
    driver.disconnect()
    rows = sim_arm.read_log(log)
    rows = rows[rows["kind"] == sim_arm.TICK]
    assert len(rows) > 50
    assert np.diff(rows["time"]).min() > 0 and np.median(np.diff(rows["time"])) < 0.012


def test_a_dead_arm_is_noticed():
    """Its process killed: an error that says so, at the next look."""
    driver = connect("sim", speed=1.0)
    driver.reset(None, "id")
    driver._process.kill()
    driver._process.wait()
    time.sleep(0.3)
    with pytest.raises(TwinRLError, match="process has ended"):
        driver.measure()
    driver.disconnect()


def test_defaults_are_narrower_than_a_twins_actions():
    """A real arm is slower by default than the twins' policies may ask for: a run says so when one is attached."""
    assert Limits().speed < 0.3 and Limits().step_rad < 0.2
