"""A job in a gymnasium environment: from nothing but a configuration, without demonstrations, cameras or an arm."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.evaluate import draw_configurations, evaluate
from actors.segmenter import Segmenter
from deploy.description import describe_job
from learner.algorithms.ppoflow import PPOFlow, PPOFlowConfig
from learner.features import encode
from policies.runner import PolicyRunner
from twinrl.config import load_config
from twinrl.core.errors import ConfigError
from twinrl.core.segment import Segment, check
from twinrl.env import STATE
from twins import describe, make_env

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs/cartpole.yaml"


def test_the_job_follows_from_the_environment():
    job = describe_job(load_config(CONFIG))
    assert job["schema"]["state_dim"] == 4 and job["schema"]["privileged_dim"] == 0
    assert job["schema"]["cameras"] == [] and job["regions"] == ["id"] and not job["stand_in"]
    assert job["control_hz"] == 50 and job["instruction"] == "CartPole-v1" and job["placed"] is None
    ours = describe_job(load_config(ROOT / "configs/tiny.yaml"))
    assert ours["regions"] == ["id", "ood"] and ours["stand_in"]
    assert ours["schema"]["cameras"] == ["side", "wrist"]


def test_every_classic_needs_nothing_but_its_id():
    expected = {"CartPole-v1": 4, "Pendulum-v1": 3, "MountainCarContinuous-v0": 2, "Acrobot-v1": 6}
    for name, size in expected.items():
        assert len(describe(name, backend="gymnasium").state_names) == size
        env = make_env(name, 2, backend="gymnasium")
        env.reset(seed=0)
        assert env.step_chunk(np.zeros((2, 3, 7), np.float32)).mask.all()
        env.close()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.name=CartPol-v1", "did you mean 'CartPole-v1'"),
        ("task.cameras=[side]", "known: render"),
        ("twins.options={sucess: {info: x}}", "did you mean 'success'"),
        ("twins.backend=gymnasum", "did you mean 'gymnasium'"),
        ("demonstrations.episodes=3", "no expert, so set demonstrations.episodes: 0"),
        ("evaluation.worlds=[twin, real]", "set evaluation.worlds: [twin]"),
        ("real_rl.robot_minutes=1", "set real_rl.robot_minutes: 0"),
        ("task.reward={success: 2}", "leave task.reward out"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(override, message):
    with pytest.raises(ConfigError) as refused:
        describe_job(load_config(CONFIG, [override]))
    assert message in str(refused.value)


class Practice:
    """Stage 2 in one process."""

    def __init__(self, task, envs=16, noise=0.3):
        torch.manual_seed(0)
        torch.set_num_threads(1)
        self.env = make_env(task, envs, backend="gymnasium", seed=1)
        config = {"state_dim": self.env.state_dim, "pose_dim": 0, "cameras": [], "chunk": 1}
        self.runner = PolicyRunner({**config, "integration_steps": 1, "critics": 0})
        self.runner.version = 0
        policy, space = self.runner.policy, self.env.single_action_space
        states = self.play_at_random(40)
        policy.fit_begin(states, space.low, space.high)
        features = encode(policy, {STATE: states}, task)
        policy.flow.calibrate_noise(features[:512], 1, 0, noise)
        self.algorithm = PPOFlow(policy, PPOFlowConfig(critic_warmup=1), 0)
        self.segments = []

    def play_at_random(self, chunks):
        rng = np.random.default_rng(0)
        observation, _ = self.env.reset(seed=0)
        seen = [observation[STATE]]
        for _ in range(chunks):
            shape = (self.env.num_envs, 1, 7)
            step = self.env.step_chunk(rng.uniform(-1, 1, shape).astype(np.float32))
            seen.append(step.observation[STATE])
            if step.done.any():
                self.env.reset(options={"reset_mask": step.done})
        return np.concatenate(seen)

    def learn(self, iterations, chunks):
        """PPOFlow iterations; the number of control steps."""
        env, everyone = self.env, np.ones(self.env.num_envs, bool)
        sink = lambda header, columns: self.segments.append(Segment(header, columns))  # noqa: E731
        segmenter = Segmenter(env, sink, source="twin", task="CartPole-v1", prefix="practice")
        observation, _ = env.reset(seed=2, options={"region": "all"})
        segmenter.begin(observation, everyone)
        steps = 0
        for _ in range(iterations):
            for _ in range(chunks):
                actions, info = self.runner.infer(observation, env.instruction, explore=True)
                step = env.step_chunk(actions)
                segmenter.add(step, self.runner.version, info)
                observation, steps = step.observation, steps + int(step.mask.sum())
                if step.done.any():
                    segmenter.cut(step.done)
                    observation, _ = env.reset(options={"reset_mask": step.done, "region": "all"})
                    segmenter.begin(observation, step.done)
            segmenter.cut(everyone)
            for segment in self.segments:
                check(Segment({**segment.header, "writer": "w", "sequence": 0}, segment.columns))
            self.algorithm.update(self.segments, self.runner.version)
            self.runner.version += 1
            self.segments.clear()
        return steps

    def length(self):
        """Mean control steps of episodes without exploration."""
        starts = draw_configurations(self.env, "id", 32, 777)
        self.runner.seed(0)
        return evaluate(self.env, self.runner, starts).steps.mean()


def test_a_policy_without_images_learns_from_nothing():
    """Balances far longer than at the beginning; enough to see that states, rewards and ends are right."""
    practice = Practice("CartPole-v1")
    before = practice.length()
    practice.learn(16, 64)
    after = practice.length()
    assert before < 40
    assert after > 2.5 * before, (before, after)


@pytest.mark.timeout(400)
def test_a_job_from_a_configuration_alone(tmp_path):
    command = [sys.executable, "-m", "twinrl.main", "launch", str(CONFIG), "twin_rl.steps=4000"]
    command += [
        "evaluation.episodes=4",
        "dashboard.port=0",
        "twins.envs=8",
        "ray.object_store_mb=100",
    ]
    command += ["twins.options={regions: {id: {}, ood: {low: -0.1, high: 0.1}}}"]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), COLUMNS="200")
    ran = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=350
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    run = tmp_path / "runs/cartpole"
    report = json.loads((run / "report.json").read_text())
    for stage in ("stage1", "stage2"):
        for region in ("id", "ood"):
            assert 0 <= report["figures"][f"{stage}_twin_{region}"] <= 1
    state = json.loads((run / "state.json").read_text())
    assert state["summaries"]["stage2"]["transitions"] >= 4000
    assert not {"demonstrations", "pretrain", "sft"} & set(state["done"])
    evaluated = subprocess.run(
        [sys.executable, "-m", "twinrl.main", "eval", str(run), "--episodes", "3"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert evaluated.returncode == 0, evaluated.stderr[-2000:]
    assert "twin OOD" in evaluated.stdout and "real" not in evaluated.stdout
