"""`twinrl run`: a checkpoint's policy acts on this PC's arm, with neither learner nor network."""

import json

import numpy as np
import pytest
import torch

from deploy.description import describe_job
from deploy.run_command import command
from learner.checkpoint import save_checkpoint
from policies.registry import make_policy
from robot_bridge.drivers import sim_arm
from twinrl.config import Config, RealRlConfig, save_config

pytestmark = pytest.mark.timeout(120)
STEPS = 12
FRANKA = ("--robot", "franka", "--robot-option", "host=10.0.0.2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's folder with the checkpoint `stage3` of a policy that moves up by 1 cm a step."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    (folder / "checkpoints").mkdir(parents=True)
    config = Config(name="tiny", real_rl=RealRlConfig(max_steps=STEPS))
    save_config(config, folder / "config.yaml")
    described = describe_job(config)
    settings = {**described["policy"], "hidden": 32, "latent": 16, "width": 4, "keypoints": 4}
    torch.manual_seed(0)
    policy = make_policy({**settings, "integration_steps": 2})
    rng = np.random.default_rng(0)
    policy.fit_states(rng.normal(size=(64, described["schema"]["state_dim"])).astype(np.float32))
    up = np.array([0, 0, 0.01, 0, 0, 0, 1], np.float32)
    policy.fit_actions(up + rng.normal(size=(64, 7)).astype(np.float32) * 1e-4)
    save_checkpoint(
        folder / "checkpoints" / "stage3.pt",
        stage="stage3",
        version=5,
        policy=policy,
        policy_config={**settings, "integration_steps": 2},
    )
    return folder


def run(folder, tmp_path, *words):
    told = ["--robot", "sim", "--robot-option", "reset_seconds=0", "--seed", "3"]
    return command([str(folder), *told, "--spool", str(tmp_path / "spool"), *words])


def test_a_policy_plays_episodes_on_the_simulated_arm(folder, tmp_path, capsys):
    """Through the safety filter, to the end; the result is printed and written; nothing is kept."""
    log, out = tmp_path / "arm.log", tmp_path / "result.json"
    words = ["--speed", "50", "--episodes", "2", "--region", "ood", "--json", str(out)]
    assert run(folder, tmp_path, *words, "--robot-option", f"log={log}") == 0
    assert "stage3 on sim, OOD: success 0.0%" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["episodes"] == len(found["results"]) == 2 and found["rate"] == 0.0
    for episode in found["results"]:
        assert (episode["steps"], episode["version"], episode["region"]) == (STEPS, 5, "ood")
        assert episode["truncated"] and episode["interventions"] == 0
        assert not episode["parameters"]["record"] and not episode["parameters"]["explore"]
    rows = sim_arm.read_log(log)
    heights = rows["setpoint"][rows["kind"] == sim_arm.SENT][:, 2]
    assert np.ptp(heights) > 0.05, "the arm was commanded upwards"
    assert not list(tmp_path.rglob("*.seg"))


def test_a_person_may_take_over(folder, tmp_path, capsys):
    """A scripted operator here; what it did is in the result."""
    out = tmp_path / "result.json"
    words = ["--operator", "scripted", "--takeovers", "1", "--operator-option", "slow_after=5"]
    assert run(folder, tmp_path, "--speed", "50", "--once", "--json", str(out), *words) == 0
    (episode,) = json.loads(out.read_text())["results"]
    assert episode["takeovers"] == 1 and 0 < episode["interventions"] < episode["steps"]


def test_what_does_not_fit_is_refused_before_the_arm_moves(folder, tmp_path, capsys):
    """Numbers that mean something else, a checkpoint that is not there, a clock that a real arm does not have."""
    spool = ["--spool", str(tmp_path / "spool")]
    assert command([str(folder), "--robot", "point", "--once", *spool]) == 1
    said = capsys.readouterr().err
    assert "robot 'point' mean something else than the policy's" in said and "nothing" in said
    assert run(folder, tmp_path, "--checkpoint", "stage2") == 1
    assert "no checkpoint 'stage2' in 'tiny'; known: stage3" in capsys.readouterr().err
    assert command([str(folder), *FRANKA, "--speed", "5", *spool]) == 1
    assert "only a simulated robot runs faster" in capsys.readouterr().err
