"""An arm that is not commanded: what the policy plans is shown, and the run does not notice."""

import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from benchmarks._robot_run import RobotRun
from deploy import real_rl
from robot_bridge.attach import main
from robot_bridge.driver import make_driver
from robot_bridge.drivers import sim_arm
from robot_bridge.drivers.point import HOME, PointDriver
from robot_bridge.leases import Robot
from robot_bridge.limits import Limits
from robot_bridge.motion import exp
from robot_bridge.planned import MOST_CAMERAS, MOST_POINTS, PlannedPath
from robot_bridge.projection import Camera
from robot_bridge.protocol import make_job
from robot_bridge.safety import Measured, SafetyFilter
from tests.test_bridge_link import Stage, finish
from twinrl.core.errors import WireError
from twinrl.core.segment import Schema
from twinrl.core.sockets import Client, wait_until

pytestmark = pytest.mark.timeout(120)
SIM = Schema(27, 14, ("side", "wrist"), 64, 4)
JOB = {"run": "r", "task": "pick-and-place", "instruction": "i"}


@pytest.fixture
def stage(tmp_path):
    stage = Stage(tmp_path)
    yield stage
    stage.close()


def make_filter():
    safety = SafetyFilter(Limits(), 100.0, 0.1)
    safety.begin(np.array([*HOME, 0, 0, 0]), 1.0)
    return safety


def test_what_is_shown_is_what_would_be_executed():
    """The preview is the filter's own steps, shortened as they are; nothing of the filter is changed by it."""
    rng = np.random.default_rng(3)
    actions = rng.normal(size=(40, 7)) * (0.04, 0.04, 0.04, 0.1, 0.1, 0.1, 1)
    safety = make_filter()
    points, causes = safety.preview(actions)
    np.testing.assert_array_equal(safety.target[:3], HOME)
    assert not safety.counts and safety.gripper == 1.0
    executed = []
    for action in actions:
        safety.step(action, Measured(0.0, safety.target, np.zeros(0), 0.0))
        executed.append(safety.target[:3].copy())
    np.testing.assert_array_equal(points, executed)
    assert causes == dict(safety.counts) and causes["step_m"] > 5
    assert np.linalg.norm(np.diff(points, axis=0), axis=1).max() < Limits().step_m + 1e-9


def test_what_rides_on_a_heartbeat_is_bounded():
    """However long the chunk and however many the cameras; beginning and end are kept. The gateway believes no more."""

    class Cameras(PointDriver):
        cameras = tuple(f"c{i}" for i in range(9))

        def project(self, points):
            pixels = np.array(points[:, :2]) * 100
            pixels[0] = np.nan
            return dict.fromkeys((*self.cameras, "unknown"), pixels)

    path = PlannedPath(Cameras(), make_filter())
    path.show(np.tile([0.0, 0.001, 0, 0, 0, 0, 1], (200, 1)))
    told = path.told
    assert len(told["points"]) == MOST_POINTS and len(told["pixels"]) == MOST_CAMERAS
    assert told["points"][0] == list(HOME) and told["points"][-1][1] == pytest.approx(0.2)
    assert "unknown" not in told["pixels"] and len(told["pixels"]["c0"]) == MOST_POINTS - 1
    robot = Robot("arm")
    robot.hear({"path": told})
    assert robot.describe()["last"]["path"] == told
    for wrong in (
        *([], {"points": []}, {**told, "points": told["points"] * 2}, {**told, "causes": [3]}),
        *({**told, "pixels": {"c0": [[1.0, float("nan")]]}}, {**told, "points": [[1.0, 2.0]]}),
    ):
        with pytest.raises(WireError):
            robot.hear({"path": wrong})
    path.clear()
    assert path.told == {}


def test_a_driver_that_cannot_show_it_does_no_harm(caplog):
    """A picture is no reason to fail, or to fill the log."""

    class Broken(PointDriver):
        def project(self, points):
            raise RuntimeError("no calibration")

    path = PlannedPath(Broken(), make_filter())
    for _ in range(3):
        path.show(np.zeros((4, 7)))
    assert path.told == {} and caplog.text.count("planned path is not shown") == 1


def test_a_camera_sees_what_lies_before_it():
    """Right is right, down is down; what is behind has no place; one on the tool goes along."""
    camera = Camera(np.zeros(3), np.eye(3), 100.0, np.array([32.0, 32.0]))
    points = np.array([[0, 0, 1], [0.1, 0, 1], [0, 0.2, 2], [0, 0, -1.0]])
    pixels = camera.project(points, np.zeros(6))
    np.testing.assert_allclose(pixels[:3], [[32, 32], [42, 32], [32, 42]])
    assert np.isnan(pixels[3]).all()
    pose = np.array([0.3, -0.1, 0.2, 0.1, 0.4, -0.2])
    moved = points @ exp(pose[3:]).T + pose[:3]
    seen = camera._replace(on_tool=True).project(moved, pose)
    np.testing.assert_allclose(seen[:3], pixels[:3])


def test_the_simulated_arm_knows_its_cameras():
    """Where it says that the tool is in the picture, there the picture changes when the gripper does."""
    driver = make_driver("sim", seed=3, reset_seconds=0)
    driver.connect(make_job(SIM, JOB), 50.0)
    try:
        driver.reset(None, "id")
        pose = driver.measure().pose
        before = driver.frames()
        for _ in range(60):
            driver.servo(pose, 0.0)
        after = driver.frames()
        pixels = driver.project(driver.measure().pose[None, :3])
        # The wrist camera sees the fingers from above: the middle of what it sees of them is above their tips.
        for camera, near in (("side", 3.0), ("wrist", 7.0)):
            changed = np.abs(after[camera].image.astype(int) - before[camera].image).max(axis=2)
            rows, columns = np.nonzero(changed > 30)
            middle = np.array([columns.mean() + 0.5, rows.mean() + 0.5])
            assert np.linalg.norm(middle - pixels[camera][0]) < near, camera
    finally:
        driver.disconnect()


def test_in_shadow_the_arm_is_never_commanded(tmp_path):
    """By the simulated hardware's own log, and in real time: no set-point, no motion, no episode, nothing recorded."""
    run = RobotRun(tmp_path, SIM, chunk=SIM.chunk, lease_s=3.0)
    try:
        run.link.set_configurations([{"region": "id"}], "each")
        log = tmp_path / "arm.log"
        arm = run.attach("--robot", "sim", "--robot-option", f"log={log}", "--shadow")
        row = run.wait("a path", lambda row: row["last"].get("path"))
        assert row["shadow"] and row["state"] == "shadow" and row["start"] is None
        path = row["last"]["path"]
        points = np.array(path["points"])
        assert points.shape == (SIM.chunk + 1, 3) and path["causes"] == {}
        assert set(path["pixels"]) == {"side", "wrist"}
        assert np.array(path["pixels"]["side"]).shape == (SIM.chunk + 1, 2)
        began, chunks = time.monotonic(), row["last"]["totals"]["shadow_chunks"]
        time.sleep(3.0)
        row = run.row()
        asked = row["last"]["totals"]["shadow_chunks"] - chunks
        pace = (time.monotonic() - began) / (SIM.chunk / 10.0)
        assert 0.4 * pace < asked <= pace + 2, "as often as if the chunks were executed"
        arm.send_signal(signal.SIGTERM)
        assert arm.wait(30) == 0
        rows = sim_arm.read_log(log)
        assert len(rows) > 200 and not (rows["kind"] == sim_arm.SENT).any()
        np.testing.assert_allclose(rows["pose"][-1, :3], points[0], atol=5e-3)
        assert np.ptp(rows["pose"][:, :3], axis=0).max() < 5e-3
        assert row["episodes"] == row["minutes"] == 0 and run.link.results() == []
        assert run.stored() == []
        # The evaluation's only start is still there for an arm that plays it.
        told = ("--robot-option", "reset_seconds=0", "--speed", "20", "--once")
        played = run.attach("--robot", "sim", *told, "--limit", "step_m=0.02")
        result = wait_until(lambda: run.link.results(), 60, "the episode")
        assert result[0]["item"] == 0
        assert played.wait(30) == 0
    finally:
        run.close()


COUNTED = """
import sys
from robot_bridge.drivers.point import PointDriver
def refuse(self, *args):
    print("THE ARM WAS COMMANDED", flush=True)
PointDriver.servo = PointDriver.reset = PointDriver.ended = refuse
from deploy import real_rl
from robot_bridge.attach import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_shadow_obeys_and_leaves_the_run_alone(stage):
    """Hold, pause, stop and detach reach it; whatever comes, nothing is asked of the driver but to look."""
    policy = stage.act(action=(0.05, 0.0, 0.0))
    words = ["--robot", "point", "--name", "arm", "--url", stage.url, "--shadow"]
    words += ["--key", str(stage.folder / "keys/robot.key"), "--spool", str(stage.folder / "spool")]
    arm = subprocess.Popen(
        [sys.executable, "-c", COUNTED, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    stage.bridges.append(arm)
    page = Client("gateway", stage.internal, stage.cluster)
    row = wait_until(lambda: (r := stage.row()) and r["last"].get("path") and r, 10, "a path")
    told = page.call("robot", {"robot": "arm"}, timeout=5)[0]["robot"]
    page.close()
    assert told["shadow"] and told["last"]["path"]["pixels"] == {}
    # 0.05 m a step is more than may be: what is shown is what the filter would make of it.
    assert row["last"]["path"]["causes"] == {"step_m": 4}
    ends = [HOME[0] + 0.025 * k for k in range(5)]
    np.testing.assert_allclose([p[0] for p in row["last"]["path"]["points"]], ends, atol=2e-4)
    assert not policy.seen[-1].explore and not policy.seen[-1].parameters["record"]
    stage.link.command("arm", "hold")
    assert stage.wait_for("holding")["last"]["path"] == {}
    stage.link.command("arm", "release")
    stage.wait_for("shadow")
    stage.link.pause()
    assert "paused" in stage.wait_for("holding")["reason"]
    stage.link.resume()
    stage.wait_for("shadow")
    policy.quiet.set()
    assert "policy server" in stage.wait_for("holding")["reason"]
    policy.quiet.clear()
    stage.wait_for("shadow")
    stage.link.command("arm", "estop")
    stage.wait_for("stopped")
    stage.link.command("arm", "release")  # a latch is released at the robot
    time.sleep(0.4)
    assert stage.row()["state"] == "stopped"
    stage.link.command("arm", "detach")
    output = finish(arm)
    assert "detached" in output and "COMMANDED" not in output and "Traceback" not in output
    assert stage.replay.segments == [] and stage.link.results() == []
    assert stage.row()["minutes"] == 0


def test_what_means_nothing_in_shadow_is_refused(stage, capsys):
    """Whoever takes over, confirms or counts episodes wants the arm to move."""
    words = ["--robot", "point", "--name", "a", "--url", stage.url, "--shadow"]
    words += ["--key", str(stage.folder / "keys/robot.key")]
    for more in (["--operator", "scripted"], ["--confirm-each-chunk"], ["--once"]):
        assert main([*words, *more]) == 1
        said = capsys.readouterr().err
        assert more[0] in said and "is not commanded" in said


def test_a_stage_does_not_wait_for_a_shadow():
    """The budget of robot minutes waits for an arm that moves; one in shadow is none."""
    shadow, arm = {"attached": True, "shadow": True}, {"attached": True, "shadow": False}
    assert real_rl._nobody([shadow]) and not real_rl._nobody([shadow, arm])
    stage3 = types.SimpleNamespace(state={})
    counts = {"minutes": 2.0, "takeovers": 1, "intervention_minutes": 0.5}
    rows = [
        {**counts, "steps": 900, "interventions": 90},
        {**counts, "steps": 0, "interventions": 0},
    ]
    assert real_rl._account(stage3, rows) == 4.0
    assert stage3.state["intervention_rate"] == 0.1 and stage3.state["intervention_minutes"] == 1.0
