"""`twinrl tasks` and `twinrl play` as a user runs them."""

import contextlib
import io
import json
import sys
import types

import av
import mujoco
import numpy as np
import pytest
from PIL import Image

import twins
from deploy import play_command
from twinrl.main import main
from twins.tasks import TASKS

pytestmark = pytest.mark.timeout(120)
SIZE = 32


def twinrl(*words, fails=False):
    """What `twinrl WORDS` prints; with `fails` what it says why not."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            code = main([*map(str, words)])
        except SystemExit as end:  # of the command line's parser
            code = end.code
    assert (code != 0) == fails, out.getvalue() + error.getvalue()
    return error.getvalue() if fails else out.getvalue()


def play(folder, *words, task="pick-and-place", name="x.mp4", **kwargs):
    return twinrl(
        "play", *([task] if task else []), "--size", SIZE, "--out", folder / name, *words, **kwargs
    )


def frames(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def assert_same_video(first, second):
    """The pictures that went in are the same; an encoder with threads does not always make the same bytes of them."""
    one, other = np.array(frames(first), int), np.array(frames(second), int)
    assert one.shape == other.shape
    assert np.abs(one - other).mean() < 1.0 and np.abs(np.diff(one, axis=0)).mean() > 0.1


def test_tasks_lists_all_of_them_for_people_and_for_programs():
    told = twinrl("tasks")
    rows = json.loads(twinrl("tasks", "--json"))
    assert [row["name"] for row in rows] == list(TASKS)
    for row in rows:
        task = TASKS[row["name"]]()
        assert row["name"] in told and row["instructions"][0] in told
        assert row["max_steps"] == task.max_steps and row["terms"] == list(task.term_names)
        assert set(row["things"]) == {thing.name for thing in task.things}
        assert set(row["regions"]) == set(task.regions) and row["regions"]["id"]
        one = twinrl("tasks", row["name"])
        assert row["success"] in one and all(name in one for name in row["privileged"])


def test_tasks_names_what_a_simulator_can():
    rows = {row["name"]: row for row in json.loads(twinrl("tasks", "--simulators", "--json"))}
    assert rows["mujoco"]["capabilities"]["repeatable"] and rows["mujoco"]["our_tasks"]
    assert not rows["gymnasium"]["our_tasks"]
    assert "mujoco" in twinrl("tasks", "--simulators")


def test_a_wrong_task_gets_the_nearest():
    assert "did you mean 'erase-whiteboard'?" in twinrl("tasks", "erase-whiteborad", fails=True)
    assert "did you mean 'erase-whiteboard'?" in twinrl("play", "erase-whiteborad", fails=True)


def test_play_writes_a_video_and_the_configurations_that_repeat_it(tmp_path):
    words = ("--episodes", 2, "--region", "ood", "--randomisation", "full", "--seed", 3)
    told = play(tmp_path, *words, "--png", tmp_path / "x.png")
    assert told.count("success after") == 2 and str(tmp_path / "x.mp4") in told
    pictures = frames(tmp_path / "x.mp4")
    assert pictures[0].shape == (SIZE + play_command.CAPTION, 2 * SIZE, 3)
    assert Image.open(tmp_path / "x.png").size == (play_command.MOMENTS * SIZE, SIZE)
    configurations = json.loads((tmp_path / "x.json").read_text())
    assert [each["region"] for each in configurations] == ["ood", "ood"]
    again = play(tmp_path, "--configuration", tmp_path / "x.json", task=None, name="again.mp4")
    assert [line for line in told.splitlines() if "episode" in line] == [
        line for line in again.splitlines() if "episode" in line
    ]
    assert json.loads((tmp_path / "again.json").read_text()) == configurations
    assert_same_video(tmp_path / "again.mp4", tmp_path / "x.mp4")


def test_play_tells_what_is_asked_in_an_episode_and_repeats_it(tmp_path):
    words = ("--camera", "side", "--episodes", 1)
    told = play(tmp_path, *words, task="follow-instruction")
    (configuration,) = json.loads((tmp_path / "x.json").read_text())
    assert f'episode 1: "{configuration["instruction"]}"' in told and "success after" in told
    again = play(tmp_path, "--configuration", tmp_path / "x.json", task=None, name="again.mp4")
    assert configuration["instruction"] in again
    assert configuration["errand"] in twinrl("tasks", "follow-instruction")


def test_play_takes_what_replay_show_prints(tmp_path):
    env = twins.make_env(num_envs=1, render=False)
    env.reset(seed=5)
    told = {"episode": "e", "task": "pick-and-place", "configuration": env.configurations()[0]}
    (tmp_path / "story.json").write_text(json.dumps(told))
    play(tmp_path, "--configuration", tmp_path / "story.json", task=None)
    assert json.loads((tmp_path / "x.json").read_text()) == env.configurations()


def test_a_recorded_episode_is_played_again_step_by_step(tmp_path):
    env = twins.make_env("erase-whiteboard", 1, render=False, randomisation="full")
    env.reset(seed=2)
    configuration, actions = env.configurations()[0], []
    while not env.done.all():
        step = env.step_chunk(env.expert(noise=0.1)[:, None])
        actions.append(step.action[0, 0])
    header = {"first_step": 0, "task": "erase-whiteboard", "configuration": configuration}
    np.savez(tmp_path / "e.npz", header=np.array(json.dumps(header)), action=np.array(actions))
    told = play(tmp_path, "--actor", tmp_path / "e.npz", task=None)
    word = "success" if step.success.any() else "no success"
    assert f"episode 1: {word} after {len(actions)} of 120 steps" in told
    header["first_step"] = 4
    np.savez(tmp_path / "f.npz", header=np.array(json.dumps(header)), action=np.array(actions))
    assert "begins with step 4" in play(tmp_path, "--actor", tmp_path / "f.npz", fails=True)


def test_chance_plays_too_and_the_same_seed_plays_the_same(tmp_path):
    words = ("--actor", "random", "--episodes", 1, "--camera", "side")
    first = play(tmp_path, *words, task="insert-triple-column-block")
    assert "no success after 100 of 100 steps" in first
    play(tmp_path, *words, task="insert-triple-column-block", name="y.mp4")
    assert_same_video(tmp_path / "x.mp4", tmp_path / "y.mp4")
    assert frames(tmp_path / "x.mp4")[0].shape[1] == SIZE


def test_a_policy_plays_what_it_sees_in_its_own_size(tmp_path, monkeypatch):
    """A run's folder with a checkpoint of an untrained policy."""
    from deploy.run_folder import RunFolder
    from learner.checkpoint import save_checkpoint
    from policies.registry import make_policy
    from twinrl.config import make_config

    monkeypatch.chdir(tmp_path)
    config = make_config({"name": "baby", "task": {"image_size": 16, "cameras": ["wrist"]}})
    run = RunFolder.create(config)
    env = twins.make_env(num_envs=1, render=False)
    described = {
        "state_dim": env.state_dim,
        "pose_dim": env.privileged_dim,
        "cameras": ("wrist",),
        "image_size": 16,
    }
    policy = make_policy(described)
    save_checkpoint(
        run.checkpoints / "stage3.pt",
        stage="stage3",
        version=1,
        policy=policy,
        policy_config=described,
    )
    told = play(tmp_path, "--actor", "baby", "--episodes", 1)
    assert "of 64 steps" in told and len(frames(tmp_path / "x.mp4")) > 64
    assert "did you mean 'baby'?" in play(tmp_path, "--actor", "babi", fails=True)
    wrong = play(tmp_path, "--actor", "baby", task="erase-whiteboard", fails=True)
    assert "has learned 'pick-and-place', not 'erase-whiteboard'" in wrong


def test_an_interrupted_video_keeps_what_was_played(tmp_path, monkeypatch):
    told = play_command._told

    def interrupted(frames, limit):
        for number, frame in enumerate(told(frames, limit)):
            if number == 9:
                raise KeyboardInterrupt
            yield frame

    monkeypatch.setattr(play_command, "_told", interrupted)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(["play", "pick-and-place", "--size", "32", "--out", str(tmp_path / "x.mp4")])
    assert code == 130 and "interrupted" in out.getvalue()
    assert len(frames(tmp_path / "x.mp4")) == 9 and list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--region", "odd"), "region is 'odd'"),
        (("--randomisation", "colours=1"), "did you mean 'colour'?"),
        (("--randomisation", "colour=much"), "not of the form NAME=SCALE"),
        (("--camera", "top"), "unknown camera 'top'"),
        (("--backend", "mujoko"), "did you mean 'mujoco'?"),
        (("--episodes", "0"), "--episodes is 0, must be at least 1"),
        (("--size", "4"), "--size is 4, must be at least 16"),
        (("--out", "x.avi"), "must end in .mp4"),
        (("--configuration", "nowhere.json"), "cannot read --configuration nowhere.json"),
        (("--actor", "nobody"), "--actor is 'nobody'"),
        (("--actor", "nobody.npz"), "is no exported episode"),
        (("--backend-option", "x"), "not of the form KEY=VALUE"),
    ],
)
def test_bad_input_is_explained(tmp_path, monkeypatch, words, why):
    monkeypatch.chdir(tmp_path)
    assert why in twinrl("play", "pick-and-place", "--size", SIZE, *words, fails=True)
    assert list(tmp_path.iterdir()) == []


def test_configurations_of_another_task_or_of_nothing_are_refused(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps([{"task": "erase-whiteboard", "seed": 1}]))
    told = play(tmp_path, "--configuration", tmp_path / "c.json", fails=True)
    assert "configuration is of task 'erase-whiteboard', not 'pick-and-place'" in told
    (tmp_path / "c.json").write_text("[]")
    assert "must hold" in play(tmp_path, "--configuration", tmp_path / "c.json", fails=True)
    (tmp_path / "c.json").write_text("{")
    assert "is not JSON" in play(tmp_path, "--configuration", tmp_path / "c.json", fails=True)


def test_a_window_needs_a_display(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert "needs a display" in twinrl("play", "pick-and-place", "--window", fails=True)


class Viewer:
    """Stands in for MuJoCo's window: it shows the state it is given, and is closed after some steps."""

    def __init__(self, model, data):
        self.model, self.data, self.shown = model, data, []
        self.cam = mujoco.MjvCamera()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def is_running(self):
        return len(self.shown) < 60

    def lock(self):
        return contextlib.nullcontext()

    def sync(self):
        hidden = int((self.model.geom_rgba[:, 3] == 0.0).sum())
        self.shown.append((self.data.qpos.copy(), self.data.body("ink").xpos.copy(), hidden))


def test_a_window_shows_the_arm_the_things_and_what_is_wiped(monkeypatch):
    viewers = []

    def launch_passive(model, data, *, show_left_ui, show_right_ui):
        viewers.append(Viewer(model, data))
        return viewers[0]

    monkeypatch.setenv("DISPLAY", ":0")
    module = types.ModuleType("mujoco.viewer")
    module.launch_passive = launch_passive
    monkeypatch.setitem(sys.modules, "mujoco.viewer", module)
    told = twinrl(
        "play", "erase-whiteboard", "--window", "--speed", 100, "--episodes", 1, "--region", "id"
    )
    assert "episode 1: success" in told
    first, last = viewers[0].shown[0], viewers[0].shown[-1]
    assert np.abs(last[0] - first[0]).max() > 0.1  # the arm has moved
    env = twins.make_env("erase-whiteboard", 1, render=False)
    env.reset(seed=0, options={"region": "id"})
    np.testing.assert_allclose(first[1], env.snapshot().position["ink"][0], atol=1e-12)
    assert first[2] == 0 and last[2] >= 19
