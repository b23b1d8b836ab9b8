"""The benchmark of environments runs and writes what it promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import envs

ROOT = Path(__file__).parent.parent
HERE = ("steps", "images", "randomised", "actor")  # in this process, without peers
APART = ("memory", "processes")  # in processes of their own


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    file = tmp_path_factory.mktemp("envs") / "envs.json"
    for rows in (HERE, APART):  # the second run keeps the rows of the first
        command = [sys.executable, "-m", "benchmarks.envs", "--tiny", "--rows", ",".join(rows)]
        done = subprocess.run(
            [*command, "--json", str(file)], cwd=ROOT, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text())


@pytest.mark.timeout(900)
def test_every_group_gives_its_rows_and_figures(report):
    assert {row["rows"] for row in report["rows"]} == {*HERE, *APART}
    assert set(report["groups"]) == {*HERE, *APART}
    assert report["command"].startswith("python -m benchmarks.envs")
    wanted = {f.key for f in envs.FIGURES if f.rows in (*HERE, *APART)}
    # Other sizes than the tiny form's are not there.
    left_out = {k for k in wanted if k.startswith("step_vs_raw") or "128px" in k}
    assert wanted - left_out <= set(report["figures"])
    assert set(report["figures"]) == set(report["spread"])
    for low, high in report["spread"].values():
        assert low <= high


def test_an_environment_repeats_its_bare_physics_bit_for_bit():
    """Both assert it themselves: what is compared does the same work."""
    from benchmarks import _envs_play as playing

    env = playing.make(5, image_size=16)
    recording = playing.record(env, 3)
    assert len(recording.actions) == len(recording.resets) == 3
    # Of environment i the episode ends after step i.
    assert [ended.tolist() for ended, _ in recording.resets] == [[0], [1], [2]]
    assert playing.play(env, recording).seconds > 0
    for tracer in (playing.OwnTracer, playing.MujocoWarp):
        assert playing.Bare(env, 1, tracer).play(recording).seconds > 0
    other = recording._replace(controls=recording.controls + 0.01)
    with pytest.raises(AssertionError, match="not the recorded"):
        playing.Bare(env, 1).play(other)


def test_ratios_are_medians_of_rounds_with_their_spread():
    rows = [
        {"rows": "steps", "envs": 64, "px": 0, "env_us": 2.0, "bare_us": 1.0, "ratio": r, "cpu": r}
        for r in (0.9, 0.5, 0.8)
    ]
    figures, spread = envs.figures(rows)
    assert figures["step_vs_raw_64"] == 0.8 and spread["step_vs_raw_64"] == [0.5, 0.9]
    assert figures["step_vs_raw_64_cpu"] == 0.8 and "step_vs_raw_512" not in figures


def test_single_environments_for_the_peer_do_what_ours_do():
    """The same scene under the same law: from the same start, the same actions lead to the same state."""
    script = """
import sys; sys.path[:0] = [sys.argv[1]]
import numpy as np
from benchmarks import _envs_play, _envs_worker
peer = _envs_worker.SingleEnv.__new__(_envs_worker.SingleEnv)
_envs_worker.SingleEnv.prepare(peer)
ours = _envs_play.make(1, render=False)
ours.reset(seed=0)
qpos = ours.simulation.qpos[0].copy()
peer.start(qpos)
for k in range(5):
    action = np.array([0.01, -0.01, -0.01, 0.0, 0.02, 0.05, k % 2], np.float32)
    state = ours.step(action[None])[0]["observation.state"][0]
    peer.advance(action)
    np.testing.assert_allclose(peer.state(), state, atol=1e-5)
print("same")
"""
    peers = str(ROOT / "benchmarks/peers")
    done = subprocess.run(
        [sys.executable, "-c", script, peers],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip().endswith("same"), done.stderr[-3000:]


def test_an_unknown_group_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        envs.main(["--rows", "stps"])
    assert "randomised" in capsys.readouterr().err


def test_episodes_that_end_are_spread_over_the_steps():
    from benchmarks import _envs_play as playing

    none = np.zeros(100, bool)
    ended = [playing.due(k, none, none) for k in range(playing.EPISODE)]
    assert (np.sum(ended, axis=0) == 1).all()
