"""Does the policy read? Two blocks, two pads, and only the instruction says which goes where (docs/language.md).

    python -m experiments.language [--quick] [--seeds N] [--first SEED] [--episodes N] [--cells NAME,...] [--json FILE]
                                   [--with FILE ...] [section.option=value ...]

Each seed holds another of the four errands out, learns the other three in the wordings that resets draw, and is
evaluated on the same scenes in each cell: those errands and wordings, wordings that it never met, the errand that it
never met, the words of another errand than the one that is judged, and a policy that learned the same without words.
Learned from images: the encoder on labelled scenes, the flow by SFT on the scripted expert's episodes all over the table.
With task.observe=state, from measured poses instead. One thread; intervals are Wilson's, 95 %, over the episodes of all seeds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.demonstrate import record_successes
from actors.evaluate import draw_configurations, evaluate
from dashboard.statistics import wilson
from deploy.results import machine
from experiments.bookkeeping import Bookkeeping, overlaid
from experiments.stand_in import Runner, collect_into
from learner.algorithms.pretrain import Pretrain, PretrainConfig
from learner.algorithms.sft import SFT, SFTConfig
from learner.dataset import windows
from policies.registry import make_policy
from twinrl.core.segment import Segment
from twinrl.env import STATE, image_key
from twins import make_env
from twins.errands import ERRAND, INSTRUCTION, Errand, errands_of
from twins.labels import instructed_scenes
from twins.tasks import make_task

FILE = Path("experiments/results/language.json")
TASK = "follow-instruction"
SETTINGS: dict[str, dict[str, Any]] = {
    "task": {"observe": "images"},  # or state: poses instead of pictures, and no encoder to train
    "policy": {"integration_steps": 4, "critics": 0, "width": 32},
    "scenes": {"count": 12_000},
    "pretrain": {"steps": 4000},
    "demonstrations": {"episodes": 400, "noise": 0.2},
    "sft": {"steps": 9000},
}
QUICK: dict[str, dict[str, Any]] = {
    "scenes": {"count": 192},
    "pretrain": {"steps": 10},
    "demonstrations": {"episodes": 6},
    "sft": {"steps": 20},
}
EVALUATION_SEED = 777_000  # disjoint from every training seed
CELLS = ("success", "paraphrase", "combination", "swapped", "chance")
WORDLESS = "do it"  # what a policy without language is told, always


class Wordless(Runner):
    """A policy that is never told what is asked."""

    def infer(
        self, observation: dict, instruction: str | Sequence[str], explore: bool
    ) -> tuple[np.ndarray, dict]:
        """As Runner, with the same words in all episodes."""
        return super().infer(observation, WORDLESS, explore)


class Language(Bookkeeping):
    """One seed: its data, a policy with words and one without, and how often each does what was asked."""

    def __init__(
        self,
        settings: dict[str, dict[str, Any]],
        seed: int,
        episodes: int,
        wanted: Sequence[str] = CELLS,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.settings, self.seed, self.episodes = settings, seed, episodes
        self.wanted = wanted
        errands = errands_of(make_task(TASK))
        self.held_out = errands[seed % len(errands)]
        self.trained = [errand for errand in errands if errand != self.held_out]
        self.sees = settings["task"]["observe"] == "images"
        self.rows: list[dict[str, Any]] = []

    def run(self) -> list[dict[str, Any]]:
        """Learn and evaluate; a row for each cell."""
        self.scenes = self.render() if self.sees else None
        self.demonstrations = self.demonstrate()
        cells = self.cells()
        told = [cell for cell in cells if cell in self.wanted]
        if told:
            reads = self.learn("words")
            for cell in told:
                self.evaluate(cell, Runner(reads, 0), cells[cell])
        if "chance" in self.wanted:
            self.evaluate("chance", Wordless(self.learn("wordless"), 0), cells["success"])
        return self.rows

    def cells(self) -> dict[str, list[dict[str, Any]]]:
        """The configurations of each cell; placements are the same in all, and for all seeds."""
        starts = self.starts()
        rng = np.random.default_rng([self.seed, 7])
        names = {errand.name: errand for errand in self.trained}

        def told(errand: Errand, texts: Sequence[str]) -> dict[str, str]:
            return {ERRAND: errand.name, INSTRUCTION: str(rng.choice(texts))}

        own = [names[start[ERRAND]] for start in starts]
        others = [rng.choice([e.name for e in self.trained if e != errand]) for errand in own]
        changes = {
            "success": [{}] * len(starts),
            "paraphrase": [told(errand, errand.held_out) for errand in own],
            "combination": [told(self.held_out, self.held_out.instructions) for _ in starts],
            "swapped": [
                {INSTRUCTION: str(rng.choice(names[name].instructions))} for name in others
            ],
        }
        return {
            cell: [start | change for start, change in zip(starts, each, strict=True)]
            for cell, each in changes.items()
        }

    def render(self) -> dict[str, Any]:
        """Labelled scenes: what the instruction names, and where that is."""
        with self.clock("scenes"), self.env(1) as env:
            rng = np.random.default_rng([self.seed, 3])
            return instructed_scenes(env, self.settings["scenes"]["count"], rng)._asdict()

    def demonstrate(self) -> list[Segment]:
        """The scripted expert's episodes of the trained errands, in ID and OOD placements."""
        settings, segments = self.settings["demonstrations"], []
        with self.clock("demonstrations"), self.env(min(50, settings["episodes"])) as env:

            def teacher() -> tuple[np.ndarray, np.ndarray]:
                label = env.expert()
                return env.disturb(label, settings["noise"]).astype(np.float32), label

            record_successes(
                env,
                teacher,
                collect_into(env, "demo", segments),
                settings["episodes"],
                start=lambda mask: {"region": "all"},
                max_attempts=3 * settings["episodes"],
            )
        return segments

    def learn(self, name: str) -> Any:
        """A policy from the same data, with the instructions or (name "wordless") without."""
        with self.env(1) as env:
            shape = {
                "state_dim": env.state_dim,
                "pose_dim": env.privileged_dim,
                "cameras": env.cameras,
                "image_size": env.image_size,
            }
        torch.manual_seed(self.seed)
        policy = make_policy({**shape, **self.settings["policy"]})
        wordless = name == "wordless"
        with self.clock(f"{name}.pretrain"):
            pose_loss = self.pretrain(policy, wordless) if self.sees else None
        data = windows(self.demonstrations, policy.chunk)
        if wordless:
            data.instruction = [WORDLESS] * len(data)
        policy.fit_actions(data.action[data.mask > 0])
        with self.clock(f"{name}.sft"):
            # What no scenes have taught is learned here: without pictures, the words.
            config = SFTConfig(train_encoder=not self.sees, **self.settings["sft"])
            algorithm = SFT(policy, config, data, self.seed)
            while not algorithm.done:
                metrics = algorithm.update()
        self.report({"learned": name, "pose_loss": pose_loss, **metrics})
        return policy.eval()

    def pretrain(self, policy: Any, wordless: bool) -> float:
        """Teach the encoder where what is named lies; the last loss."""
        scenes = self.scenes
        observation = {image_key(camera): each for camera, each in scenes["images"].items()}
        algorithm = Pretrain(
            policy,
            PretrainConfig(**self.settings["pretrain"]),
            {**observation, STATE: scenes["state"]},
            scenes["labels"],
            WORDLESS if wordless else scenes["instruction"],
            self.seed,
        )
        while not algorithm.done:
            metrics = algorithm.update()
        return metrics["pose_loss"]

    def starts(self) -> list[dict[str, Any]]:
        """Configurations of the trained errands all over the table, the same for all seeds but for the errand."""
        with self.env(min(50, self.episodes)) as env:
            return draw_configurations(env, "all", self.episodes, EVALUATION_SEED)

    def evaluate(self, cell: str, runner: Runner, starts: list[dict[str, Any]]) -> None:
        """How often what the configurations' errands ask for was done; a wrong block or pad ends an episode early."""
        with self.clock("evaluation"), self.env(min(50, len(starts))) as env:
            outcome = evaluate(env, runner, starts)
            wrong = ~outcome.success & (outcome.steps < env.max_steps)
        row = {
            "cell": cell,
            "seed": self.seed,
            "held_out": self.held_out.name,
            "episodes": len(starts),
            "successes": int(outcome.success.sum()),
            "wrong": int(wrong.sum()),
        }
        self.rows.append(row)
        self.report(row)

    @contextmanager
    def env(self, num_envs: int) -> Iterator[Any]:
        """An environment that draws the trained errands, for the body."""
        names = [errand.name for errand in self.trained]
        env = make_env(TASK, num_envs, seed=self.seed, errands=names, **self.settings["task"])
        try:
            yield env
        finally:
            env.close()

    def report(self, row: dict[str, Any]) -> None:
        """Print one JSON line, with what all parts have cost so far."""
        spent = {part: round(seconds) for part, seconds in self.core_seconds.items()}
        super().report({**row, "core_s": spent})


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Figures over the episodes of all seeds: {"language_CELL": rate, ..."_low", "_high", "_n", "_wrong"}."""
    figures: dict[str, float] = {}
    for cell in dict.fromkeys(row["cell"] for row in rows):
        mine = [row for row in rows if row["cell"] == cell]
        total = sum(row["episodes"] for row in mine)
        rate = wilson(sum(row["successes"] for row in mine), total)
        figures |= {
            f"language_{cell}": rate.rate,
            f"language_{cell}_low": rate.low,
            f"language_{cell}_high": rate.high,
            f"language_{cell}_n": total,
            f"language_{cell}_wrong": sum(row["wrong"] for row in mine) / total,
        }
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    """Run the seeds, print a line for each cell, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny: does it run?")
    parser.add_argument("--seeds", type=int, help="how many; default 3, 1 with --quick")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--episodes", type=int, help="of each cell and seed; default 100")
    parser.add_argument("--cells", default=",".join(CELLS), help="some of %(default)s")
    parser.add_argument("--with", dest="earlier", type=Path, nargs="*", default=[], metavar="FILE")
    parser.add_argument("--json", type=Path, help=f"default: {FILE}, nothing with --quick")
    parser.add_argument("overrides", nargs="*", metavar="section.option=value")
    given = parser.parse_args(argv)
    wanted = given.cells.split(",")
    if unknown := set(wanted) - set(CELLS):
        parser.error(f"no cell {', '.join(sorted(unknown))}; there are {', '.join(CELLS)}")
    torch.set_num_threads(1)
    settings = overlaid(SETTINGS, QUICK if given.quick else {}, given.overrides)
    count = (1 if given.quick else 3) if given.seeds is None else given.seeds
    earlier = [json.loads(path.read_text()) for path in given.earlier]
    rows = [row for result in earlier for row in result["rows"]]
    commands = [result["command"] for result in earlier]
    episodes = given.episodes or (8 if given.quick else 100)
    for seed in range(given.first, given.first + count):
        began = time.perf_counter()
        rows += Language(settings, seed, episodes, wanted).run()
        print(f"seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
    figures = summarise(rows)
    for cell in dict.fromkeys(row["cell"] for row in rows):
        rate, low, high, n, wrong = (
            figures[f"language_{cell}{part}"] for part in ("", "_low", "_high", "_n", "_wrong")
        )
        print(
            f"{cell:12} {100 * rate:5.1f} % [{100 * low:.1f}, {100 * high:.1f}] of {n}, "
            f"{100 * wrong:.1f} % ended with a wrong block or pad"
        )
    target = given.json or (None if given.quick else FILE)
    if target:
        if count:
            seeds = f"--first {given.first} --seeds {count} --episodes {episodes}"
            if set(wanted) != set(CELLS):
                seeds += f" --cells {given.cells}"
            commands += [" ".join(["python -m experiments.language", seeds, *given.overrides])]
        result = {"machine": machine(), "command": "; ".join(commands), "settings": settings}
        target.write_text(json.dumps({**result, "figures": figures, "rows": rows}, indent=1))
        print(f"written to {target}")


if __name__ == "__main__":
    main()
