"""The method's stages in one process: no Ray, no Redis, no wire; for settings and for ablations.

    python -m experiments.stages [--quick] [--seed N] [--episodes N] [--json FILE] [section.option=value ...]

Demonstrations of the stand-in arm, encoder pretraining, SFT, SFT with expansion, PPOFlow in randomised twins, and
off-policy RL on the stand-in with takeovers. Prints a JSON line after each stage: success in ID and OOD on the twin
and on the stand-in, and the core-seconds of each part (one thread; evaluation apart).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.demonstrate import record_successes
from actors.evaluate import draw_configurations, evaluate
from dashboard.statistics import paired_gain
from experiments.bookkeeping import Bookkeeping, overlaid
from experiments.stand_in import Replay, Runner, StandIn, collect_into
from learner.algorithms.chunk_q import ChunkQ, ChunkQConfig
from learner.algorithms.ppoflow import PPOFlow, PPOFlowConfig
from learner.algorithms.pretrain import Pretrain, PretrainConfig
from learner.algorithms.sft import SFT, ImitationData, SFTConfig
from learner.dataset import CLONED_SHARES, windows
from learner.features import FeatureCache
from policies.registry import make_policy
from twinrl.core.segment import Segment
from twinrl.env import STATE, image_key
from twins import make_env
from twins.labels import labelled_scenes
from twins.retarget import Demonstration, Tracker

SETTINGS: dict[str, dict[str, Any]] = {
    "policy": {"integration_steps": 2},
    "demonstrations": {"episodes": 30, "noise": 0.2},
    "expansion": {"episodes": 40, "noise": 0.2},
    "pretrain": {"scenes": 12_000, "steps": 1000},
    "sft": {"steps": 1000},
    "ppo": {},
    "twin_rl": {"steps": 180_000, "envs": 64, "chunks": 16, "action_noise": 0.12},
    "chunk_q": {},
    "real_rl": {
        "minutes": 8.0,
        "reset_seconds": 5.0,
        "takeovers": 30,
        "slow_after": 45,
        "max_steps": 100,
        "updates_per_step": 0.5,
        "batch": 256,
        "shares": CLONED_SHARES,
        "offline_updates": 500,
        "twin_segments": 1500,
        "mining_episodes": 128,
    },
}
QUICK: dict[str, dict[str, Any]] = {
    "demonstrations": {"episodes": 4},
    "expansion": {"episodes": 4},
    "pretrain": {"scenes": 256, "steps": 20},
    "sft": {"steps": 40},
    "twin_rl": {"steps": 4000, "envs": 16, "chunks": 8},
    "chunk_q": {"actor_warmup": 10},
    "real_rl": {"minutes": 0.3, "offline_updates": 5, "mining_episodes": 8, "takeovers": 2},
}
CELLS = [(variant, region) for variant in ("twin", "standin") for region in ("id", "ood")]
EVALUATION_SEED = 777_000  # disjoint from every training seed


class Stages(Bookkeeping):
    """The whole method with its data in memory."""

    def __init__(self, settings: dict[str, dict[str, Any]], seed: int, episodes: int) -> None:
        torch.manual_seed(seed)
        self.settings, self.seed, self.episodes = settings, seed, episodes
        super().__init__()
        self.rows: list[dict[str, Any]] = []
        self.outcomes: dict[str, dict[str, np.ndarray]] = {}
        probe = make_env(num_envs=1, seed=seed)
        self.instruction, self.cameras = probe.instruction, probe.cameras
        self.privileged_dim = probe.privileged_dim
        self.policy = make_policy(
            {
                "state_dim": probe.state_dim,
                "pose_dim": probe.privileged_dim,
                "cameras": probe.cameras,
                "image_size": probe.image_size,
                **settings["policy"],
            }
        )
        probe.close()
        self.demonstrations: list[Segment] = []
        self.expansion: list[Segment] = []
        self.twin_segments: list[Segment] = []

    def run(self) -> None:
        """All stages in order."""
        self.collect_demonstrations()
        self.pretrain()
        pretrained = deepcopy(self.policy.state_dict())
        self.sft("sft", self.demonstrations)
        self.evaluate("sft")
        self.expand()
        self.policy.load_state_dict(pretrained)
        self.sft("stage1", self.demonstrations + self.expansion)
        self.evaluate("stage1")
        self.twin_rl()
        self.evaluate("stage2")
        self.real_rl()
        self.evaluate("stage3")
        self.policy.candidates.fill_(1)
        self.evaluate("stage3 without the critic's choice", CELLS[2:])

    # -- data and supervised stages ------------------------------------------------------------------------

    def collect_demonstrations(self) -> None:
        """The scripted expert on the stand-in, ID region."""
        settings = self.settings["demonstrations"]
        with self.clock("demonstrations"), self.env(16, variant="standin") as env:

            def teacher() -> tuple[np.ndarray, np.ndarray]:
                label = env.expert(0.0)
                return env.disturb(label, settings["noise"]).astype(np.float32), label

            self.demonstrations = self._record(env, "demo", teacher, settings["episodes"], "id")

    def expand(self) -> None:
        """Demonstrations re-targeted to placements all over the twin's table."""
        settings = self.settings["expansion"]
        with self.clock("expansion"), self.env(32) as env:
            shown = [
                Demonstration.of(
                    s.columns[STATE][1:], s.columns["action"], s.header["configuration"]
                )
                for s in self.demonstrations
            ]
            tracker = Tracker(env, shown, self.seed)

            def teacher() -> tuple[np.ndarray, np.ndarray]:
                label, executed = tracker.actions(settings["noise"])
                return executed, label

            self.expansion = self._record(
                env, "twin", teacher, settings["episodes"], "all", tracker.begin
            )

    def _record(
        self, env: Any, source: str, teacher: Any, episodes: int, region: str, begin: Any = None
    ) -> list[Segment]:
        segments: list[Segment] = []
        segmenter = collect_into(env, source, segments)
        recorded, attempted = record_successes(
            env,
            teacher,
            segmenter,
            episodes,
            start=lambda mask: {"region": region},
            max_attempts=5 * episodes,
            on_begin=begin,
        )
        self.report({"recorded": source, "episodes": recorded, "attempts": attempted})
        return segments

    def pretrain(self) -> None:
        """The encoder on labelled scenes of random looks."""
        options = dict(self.settings["pretrain"])
        count = options.pop("scenes")
        held_out = count // 16
        with self.clock("scenes"), self.env(1) as env:
            rng = np.random.default_rng([self.seed, 3])
            images, state, labels = labelled_scenes(env, count + held_out, rng)
        observation = {image_key(name): frames for name, frames in images.items()} | {STATE: state}
        test = {key: value[count:] for key, value in observation.items()}
        train = {key: value[:count] for key, value in observation.items()}
        with self.clock("pretrain"):
            config = PretrainConfig(**options)
            known = labels[:count]
            algorithm = Pretrain(self.policy, config, train, known, self.instruction, self.seed)
            while not algorithm.done:
                metrics = algorithm.update()
        errors = algorithm.errors(test, labels[count:])
        self.report(
            {"pretrain": metrics["pose_loss"], "rmse": [round(float(error), 4) for error in errors]}
        )

    def sft(self, name: str, segments: list[Segment]) -> None:
        """Flow matching on what was demonstrated."""
        data = windows(segments, self.policy.chunk)
        self.policy.fit_actions(data.action[data.mask > 0])
        with self.clock(name):
            algorithm = SFT(self.policy, SFTConfig(**self.settings["sft"]), data, self.seed)
            while not algorithm.done:
                metrics = algorithm.update()
        self.report({name: metrics["flow_loss"], "windows": len(data)})

    # -- reinforcement learning ----------------------------------------------------------------------------

    def twin_rl(self) -> None:
        """PPOFlow in randomised twins all over the table."""
        settings, policy = self.settings["twin_rl"], self.policy
        data = windows(self.demonstrations + self.expansion, policy.chunk)
        anchor = ImitationData(policy, data, {"demo": 0.5, "twin": 0.5})
        policy.flow.calibrate_noise(
            anchor.features[:512], policy.integration_steps, self.seed, settings["action_noise"]
        )
        algorithm = PPOFlow(
            policy,
            PPOFlowConfig(**self.settings["ppo"]),
            self.privileged_dim,
            anchor,
            self.seed,
        )
        runner, fresh = Runner(policy, self.seed), []
        taken, everyone = 0, np.ones(settings["envs"], bool)
        with self.env(settings["envs"], randomisation="full") as env:
            segmenter = collect_into(env, "twin", fresh)
            observation, _ = env.reset(options={"region": "all"})
            segmenter.begin(observation, everyone)
            while taken < settings["steps"]:
                with self.clock("twin_rl.collect"):
                    for _ in range(settings["chunks"]):
                        actions, info = runner.infer(observation, self.instruction, explore=True)
                        step = env.step_chunk(actions)
                        segmenter.add(step, algorithm.iteration, info)
                        observation, taken = step.observation, taken + int(step.mask.sum())
                        if step.done.any():
                            segmenter.cut(step.done)
                            options = {"reset_mask": step.done, "region": "all"}
                            observation, _ = env.reset(options=options)
                            segmenter.begin(observation, step.done)
                    segmenter.cut(everyone)
                with self.clock("twin_rl.update"):
                    metrics = algorithm.update(fresh, algorithm.iteration)
                ended = [s.columns["success"][-1] for s in fresh if s.header["last"]]
                self.twin_segments = (self.twin_segments + fresh)[
                    -self.settings["real_rl"]["twin_segments"] :
                ]
                fresh.clear()
                if algorithm.iteration % 10 == 0:
                    self.report({"twin_rl": taken, "success": float(np.mean(ended)), **metrics})

    def real_rl(self) -> None:
        """Off-policy RL on the stand-in, starting where the twin fails; a scripted person takes over."""
        settings, policy = self.settings["real_rl"], self.policy
        starts = self.mine()
        algorithm = ChunkQ(
            policy,
            ChunkQConfig(**self.settings["chunk_q"]),
            FeatureCache(policy, self.instruction),
            self.seed,
        )
        data = windows(self.demonstrations + self.expansion, policy.chunk)
        imitation = ImitationData(policy, data, settings["shares"])
        replay = Replay(algorithm.window, self.seed)
        replay.add(self.demonstrations + self.expansion + self.twin_segments)
        with self.clock("real_rl.update"):
            for _ in range(settings["offline_updates"]):
                metrics = algorithm.update(replay.sample(settings["batch"]))
        arm = StandIn(policy, settings, self.seed)
        rng = np.random.default_rng([self.seed, 4])
        while arm.minutes < settings["minutes"]:
            # Half where the twin fails, half anywhere: what was mastered is kept.
            start = starts[rng.integers(len(starts))] if starts and rng.random() < 0.5 else None
            with self.clock("real_rl.act"):
                segment = arm.episode(start)
            with self.clock("real_rl.update"):
                replay.add([segment])
                try:
                    imitation.extend(policy, windows([segment], policy.chunk))
                except ValueError:
                    pass  # a failure that nobody rescued
                for _ in range(
                    round(settings["updates_per_step"] * len(segment.columns["reward"]))
                ):
                    metrics |= algorithm.update(replay.sample(settings["batch"]), imitation)
            if arm.episodes % 10 == 0:
                self.report({"real_rl": arm.episodes, **arm.stats(), **metrics})
        self.report({"real_rl": arm.episodes, **arm.stats(), **metrics, "updates": algorithm.step})

    def mine(self) -> list[dict[str, Any]]:
        """Twin configurations that the policy fails."""
        with self.clock("mining"), self.env(32) as env:
            count = self.settings["real_rl"]["mining_episodes"]
            drawn = draw_configurations(env, "all", count, 5000 + self.seed)
            outcome = evaluate(env, Runner(self.policy, self.seed), drawn)
        return [c for c, good in zip(drawn, outcome.success, strict=True) if not good]

    # -- measuring -----------------------------------------------------------------------------------------

    def evaluate(self, stage: str, cells: list[tuple[str, str]] = CELLS) -> None:
        """Success of the present policy, noise off, on the same resets after every stage."""
        results: dict[str, np.ndarray] = {}
        with self.clock("evaluation"):
            for variant, region in cells:
                with self.env(min(50, self.episodes), variant=variant) as env:
                    drawn = draw_configurations(env, region, self.episodes, EVALUATION_SEED)
                    outcome = evaluate(env, Runner(self.policy, 0), drawn)
                results[f"{variant}/{region}"] = outcome.success
        self.outcomes[stage] = results
        row: dict[str, Any] = {"stage": stage}
        row |= {cell: float(success.mean()) for cell, success in results.items()}
        if stage == "stage2":
            real = [cell for cell in results if cell.startswith("standin")]
            before, after = (
                np.concatenate([outcomes[cell] for cell in real])
                for outcomes in (self.outcomes["stage1"], results)
            )
            row["gain"] = list(paired_gain(before, after)[:3])
        row["core_s"] = {part: round(seconds, 1) for part, seconds in self.core_seconds.items()}
        self.rows.append(row)
        self.report(row)

    @contextmanager
    def env(self, num_envs: int, **options: Any) -> Iterator[Any]:
        """An environment for the body."""
        env = make_env(num_envs=num_envs, seed=self.seed, **options)
        try:
            yield env
        finally:
            env.close()


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny: does it run?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=0, help="of each cell (default 200)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("overrides", nargs="*", metavar="section.option=value")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    episodes = arguments.episodes or (8 if arguments.quick else 200)
    settings = overlaid(SETTINGS, QUICK if arguments.quick else {}, arguments.overrides)
    stages = Stages(settings, arguments.seed, episodes)
    stages.run()
    figures = {
        f"{row['stage']}/{cell}": value
        for row in stages.rows
        for cell, value in row.items()
        if isinstance(value, float)
    }
    figures |= {f"core_s/{part}": round(s, 1) for part, s in stages.core_seconds.items()}
    result = {
        "machine": {"system": platform.platform(), "processor": platform.processor()},
        "command": " ".join(sys.argv),
        "figures": figures,
        "rows": stages.rows,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
