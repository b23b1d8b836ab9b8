"""Off-policy RL on the stand-in arm against imitation of the same help, state-based, in one process.

    python -m experiments.off_policy [--seeds 0 1 2 3 4] [--out FOLDER] [--quick] [--json FILE] [section.option=value ...]

Each seed: SFT of 30 ID demonstrations; rollouts of that policy in the twin; then, on the arm, with the same budget of
steps and takeovers of a scripted operator: `offpolicy` (ChunkQ), `dagger` (the same loop with imitation alone, HG-DAgger)
and `clone` (SFT anew on the demonstrations and the takeovers that `offpolicy` was given). All are measured on the same
resets of the arm. A seed's result is a file in --out; seeds that have one are not run again.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.demonstrate import record_successes
from actors.evaluate import draw_configurations, evaluate
from experiments.bookkeeping import overlaid
from experiments.stand_in import Replay, Runner, StandIn, collect_into
from experiments.statistics import paired
from learner.algorithms.chunk_q import ChunkQ, ChunkQConfig
from learner.algorithms.sft import SFT, ImitationData, SFTConfig
from learner.dataset import windows
from learner.features import FeatureCache
from policies.policy import Policy
from policies.registry import make_policy
from twinrl.core.segment import SOURCES, Segment
from twins import make_env

SETTINGS: dict[str, dict[str, Any]] = {
    "policy": {"integration_steps": 4, "hidden": 128},
    "demonstrations": {"episodes": 30, "noise": 0.2},
    "sft": {"steps": 1500},
    "twin": {"steps": 8_000, "envs": 32},
    "arm": {
        "steps": 20_000,
        "takeovers": 40,
        "slow_after": 45,
        "max_steps": 100,
        "reset_seconds": 5.0,
        "observe": "state",
    },
    "learning": {
        "updates_per_step": 1.0,
        "batch": 128,
        "mix": {"demo": 0.25, "twin": 0.25, "real": 0.5},
        "shares": {"demo": 0.25, "real": 0.25, "takeover": 0.5},
    },
    # Where the policy fails nearly everywhere there is little to be anchored to, and much to be learned.
    "chunk_q": {"offline_updates": 500, "anchor": 0.0, "actor_learning_rate": 1e-3},
    "dagger": {},
}
QUICK: dict[str, dict[str, Any]] = {
    "demonstrations": {"episodes": 4},
    "sft": {"steps": 30},
    "twin": {"steps": 600, "envs": 8},
    "arm": {"steps": 300, "takeovers": 2},
    "chunk_q": {"actor_warmup": 5, "offline_updates": 10},
}
EVALUATION_SEED = 777_000  # disjoint from every training seed
REGIONS = ("id", "ood")


class Comparison:
    """One seed's policies and data."""

    def __init__(self, settings: dict[str, dict[str, Any]], seed: int, episodes: int) -> None:
        torch.manual_seed(seed)
        self.settings, self.seed, self.episodes = settings, seed, episodes
        self.rows: dict[str, Any] = {}
        env = self._env(1)
        self.instruction = env.instruction
        self.policy_config = {
            "state_dim": env.state_dim,
            "pose_dim": env.privileged_dim,
            "cameras": (),
            **settings["policy"],
        }
        env.close()

    def run(self, arms: tuple[str, ...]) -> dict[str, Any]:
        """{name: {"id": [success], "ood": [...], ...}} of the arms of the comparison, and of where they start."""
        demonstrations = self.demonstrate()
        start = self.clone(demonstrations)
        self.measure("start", start)
        twin = self.play_twin(start)
        if "offpolicy" in arms:
            policy = deepcopy(start)
            segments = self.practise(
                "offpolicy", policy, demonstrations, twin, self.settings["chunk_q"]
            )
            self.measure("offpolicy", policy)
            if "clone" in arms:
                helped = [s for s in segments if s.columns["intervention"].any()]
                self.measure("clone", self.clone(demonstrations, helped))
        if "dagger" in arms:
            policy = deepcopy(start)
            imitation = {
                **self.settings["chunk_q"],
                "improvement": "none",
                **self.settings["dagger"],
            }
            self.practise("dagger", policy, demonstrations, twin, imitation)
            self.measure("dagger", policy)
        return self.rows

    def demonstrate(self) -> list[Segment]:
        """The scripted expert on the stand-in, ID region."""
        settings, segments = self.settings["demonstrations"], []
        env = self._env(16, variant="standin")

        def teacher() -> tuple[np.ndarray, np.ndarray]:
            label = env.expert(0.0)
            return env.disturb(label, settings["noise"]).astype(np.float32), label

        count = settings["episodes"]
        record_successes(
            env,
            teacher,
            collect_into(env, "demo", segments),
            count,
            start=lambda mask: {"region": "id"},
            max_attempts=5 * count,
        )
        env.close()
        return segments

    def clone(self, demonstrations: list[Segment], helped: list[Segment] | None = None) -> Policy:
        """A new policy by SFT on demonstrations, and on takeovers in the shares of the learning loop."""
        torch.manual_seed(self.seed)
        policy = make_policy(self.policy_config)
        data = windows(demonstrations, policy.chunk)
        policy.fit_actions(data.action[data.mask > 0])
        if helped:
            data = windows(demonstrations + helped, policy.chunk)
        shares = self.settings["learning"]["shares"]
        config = SFTConfig(**{"shares": shares, **self.settings["sft"]})
        algorithm = SFT(policy, config, data, self.seed)
        while not algorithm.done:
            algorithm.update()
        return policy

    def play_twin(self, policy: Policy) -> list[Segment]:
        """Rollouts of `policy` in randomised twins all over the table: failures and successes that cost no robot time."""
        settings, segments = self.settings["twin"], []
        if not settings["steps"]:
            return segments
        env = self._env(settings["envs"], randomisation="full")
        runner = Runner(policy, self.seed + 2)
        segmenter = collect_into(env, "twin", segments)
        everyone, taken = np.ones(settings["envs"], bool), 0
        observation, _ = env.reset(options={"region": "all"})
        segmenter.begin(observation, everyone)
        while taken < settings["steps"]:
            chunk, _ = runner.infer(observation, self.instruction, explore=False)
            step = env.step_chunk(chunk)
            segmenter.add(step, 0)
            observation, taken = step.observation, taken + int(step.mask.sum())
            if step.done.any():
                segmenter.cut(step.done)
                options = {"reset_mask": step.done, "region": "all"}
                observation, _ = env.reset(options=options)
                segmenter.begin(observation, step.done)
        env.close()
        return segments

    def practise(
        self,
        name: str,
        policy: Policy,
        demonstrations: list[Segment],
        twin: list[Segment],
        options: dict[str, Any],
    ) -> list[Segment]:
        """Stage 3 on the arm; -> what happened there."""
        settings, arm_settings = self.settings["learning"], self.settings["arm"]
        began = time.process_time()
        config = ChunkQConfig(**options)
        algorithm = ChunkQ(policy, config, FeatureCache(policy, self.instruction), self.seed)
        imitation = ImitationData(policy, windows(demonstrations, policy.chunk), settings["shares"])
        replay = Replay(algorithm.window, self.seed)
        replay.add(demonstrations + twin)
        mix = tuple(settings["mix"].get(source, 0.0) for source in SOURCES)
        if config.improvement != "none":
            for _ in range(config.offline_updates):
                algorithm.update(replay.sample(settings["batch"], mix))
        arm = StandIn(policy, arm_settings, self.seed)
        segments: list[Segment] = []
        steps, due, metrics = 0, 0.0, {}
        while steps < arm_settings["steps"]:
            segment = arm.episode(None)
            segments.append(segment)
            length = len(segment.columns["reward"])
            steps += length
            replay.add([segment])
            cloned = _fresh_windows(segment, policy.chunk, config.improvement == "none")
            if cloned is not None:
                imitation.extend(policy, cloned)
            due += settings["updates_per_step"] * length
            for _ in range(int(due)):
                metrics |= algorithm.update(replay.sample(settings["batch"], mix), imitation)
            due -= int(due)
            if arm.episodes % 25 == 0:
                shown = {key: round(value, 4) for key, value in metrics.items()}
                print(json.dumps({name: steps, **arm.stats(), **shown}), flush=True)
        seconds = time.process_time() - began
        self.rows[name] = {"steps": steps, **arm.stats(), "seconds": seconds}
        return segments

    def measure(self, name: str, policy: Policy) -> None:
        """Success of `policy` on the arm, noise off, on the same resets for all."""
        row: dict[str, Any] = {}
        for region in REGIONS:
            env = self._env(min(50, self.episodes), variant="standin")
            drawn = draw_configurations(env, region, self.episodes, EVALUATION_SEED)
            success = evaluate(env, Runner(policy, 0), drawn).success
            env.close()
            row[region] = [int(value) for value in success]
        self.rows[name] = {**self.rows.get(name, {}), **row}
        means = {region: round(float(np.mean(row[region])), 3) for region in REGIONS}
        print(json.dumps({"seed": self.seed, "measured": name, **means}), flush=True)

    def _env(self, num_envs: int, **options: Any) -> Any:
        return make_env(
            num_envs=num_envs,
            seed=self.seed,
            observe="state",
            max_steps=self.settings["arm"]["max_steps"],
            **options,
        )


def _fresh_windows(segment: Segment, chunk: int, interventions_only: bool) -> Any:
    """What of an episode may be cloned; HG-DAgger clones nothing that the policy did itself."""
    if interventions_only and not segment.columns["intervention"].any():
        return None
    try:
        return windows([segment], chunk)
    except ValueError:  # a failure that nobody rescued
        return None


def summarise(results: list[dict[str, Any]]) -> dict[str, float]:
    """The figures of all seeds together."""
    figures: dict[str, float] = {}
    names = [name for name in ("start", "clone", "dagger", "offpolicy") if name in results[0]]
    for name in names:
        for region in REGIONS:
            figures[f"{name}_{region}"] = float(np.mean([row[name][region] for row in results]))
    for other in ("clone", "dagger"):
        if "offpolicy" in names and other in names:
            ours, theirs = (
                np.array([np.concatenate([row[name][r] for r in REGIONS]) for row in results])
                for name in ("offpolicy", other)
            )  # (seeds, regions * resets)
            gain = paired(ours, theirs)
            figures |= {
                f"offpolicy_vs_{other}": gain.value,
                f"offpolicy_vs_{other}_low": gain.low,
                f"offpolicy_vs_{other}_high": gain.high,
            }
    return figures


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny: does it run?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--episodes", type=int, default=0, help="of each region (default 200)")
    parser.add_argument("--arms", nargs="+", default=["offpolicy", "clone", "dagger"])
    parser.add_argument("--out", type=Path, help="folder of the seeds' results")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("overrides", nargs="*", metavar="section.option=value")
    arguments = parser.parse_intermixed_args(argv)
    torch.set_num_threads(1)
    settings = overlaid(SETTINGS, QUICK if arguments.quick else {}, arguments.overrides)
    episodes = arguments.episodes or (8 if arguments.quick else 200)
    results = []
    for seed in arguments.seeds:
        kept = arguments.out / f"seed{seed}.json" if arguments.out else None
        if kept and kept.exists():
            results.append(json.loads(kept.read_text()))
            continue
        results.append(Comparison(settings, seed, episodes).run(tuple(arguments.arms)))
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(results[-1]))
    figures = summarise(results)
    for key, value in figures.items():
        print(f"{key:28} {value:+.3f}")
    if arguments.json:
        result = {
            "machine": {"system": platform.platform(), "processor": platform.processor()},
            "command": " ".join(["python -m experiments.off_policy", *sys.argv[1:]]),
            "figures": {key: round(value, 4) for key, value in figures.items()},
            "rows": [{"seed": s, **r} for s, r in zip(arguments.seeds, results, strict=True)],
        }
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
