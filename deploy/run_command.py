"""`twinrl run`: a policy acts on an arm of this PC, without a learner and without a network."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from dashboard.statistics import success_rate
from deploy.description import describe_job
from deploy.evaluation import load_runner
from deploy.local_link import LocalLink
from deploy.run_folder import RunFolder
from robot_bridge import rig
from robot_bridge.protocol import make_job
from robot_bridge.spool import Spool
from robot_bridge.terminal import Terminal
from twinrl.core.errors import ConfigError, TwinRLError
from twinrl.core.spec import differences

ALONE_S = 10.0  # of a stop without a terminal, which nobody can end
EXAMPLES = """examples:
  twinrl run demo --robot sim --episodes 10                  # on the stand-in
  twinrl run demo --checkpoint stage2 --robot sim --speed 6 --region ood --episodes 50
  twinrl run runs/demo --robot my-arm --operator keyboard --limits cell.json

Nothing is learned and nothing is kept. A stop in this program is not a safety function: have the arm's own stop button
at hand."""


def command(argv: list[str]) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="twinrl run",
        description="Let a policy act on this PC's robot, noise off, without a learner.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("policy", help="a run, by its name or folder")
    parser.add_argument("--checkpoint", default="stage3", help="of the run (%(default)s)")
    parser.add_argument("--region", choices=("id", "ood"), default="id", help="where starts lie")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    rig.add_arguments(parser)
    # A stop that nobody can end would last for ever.
    parser.set_defaults(episodes=10, alone_s=0.0 if Terminal.at_hand() else ALONE_S)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return 130
    except TwinRLError as error:
        print(f"twinrl run: {error}", file=sys.stderr, flush=True)
        return 1


def _run(arguments: argparse.Namespace) -> int:
    run = RunFolder.open(arguments.policy)
    config = run.config()
    described = describe_job(config)
    runner = load_runner(run, arguments.checkpoint)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(arguments.seed or 0)

    def infer(observation: dict[str, np.ndarray], instruction: str) -> tuple[np.ndarray, int]:
        chunks, _ = runner.act(observation, instruction, False, generator)
        return np.asarray(chunks)[0], max(0, int(runner.version))

    told = {key: described[key] for key in ("instruction", "control_hz", "dimensions", "step")}
    told.update(run=run.name, task=config.task.name, observe=config.task.observe)
    job = make_job(described["schema"], {**told, "max_steps": config.real_rl.max_steps})
    arm = rig.make_rig(arguments, linked=False)
    rig.listen(arm, arguments)
    link = LocalLink("arm", infer, job.schema.image_size, arguments.region, arguments.episodes)
    with tempfile.TemporaryDirectory(prefix="twinrl-run-") as folder:
        spool = Spool(Path(folder), "arm")
        spool.open(job.run)
        try:
            arm.driver.connect(job, arguments.speed)
            table = differences(arm.driver.dimensions, job.dimensions)
            if table:
                raise ConfigError(
                    f"the numbers of observation.state of robot {arm.driver.kind!r} mean something else than the "
                    f"policy's:\n{table}"
                )
            rig.make_bridge(arm, link, spool, job, arguments).run()
        finally:
            arm.operator.close()
            arm.driver.disconnect()
            spool.close()
    judged = link.judged
    if not judged:
        print("no episode was finished")
        return 0
    rate = success_rate(np.array([r["success"] for r in judged]))
    print(
        f"{arguments.checkpoint} on {arm.driver.kind}, {arguments.region.upper()}: success {rate.rate:.1%} "
        f"[{rate.low:.1%}, {rate.high:.1%}], n = {len(judged)}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({**rate._asdict(), "results": link.results}))
    return 0
