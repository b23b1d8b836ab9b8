"""`twinrl train ALGORITHM --data RUN`: an algorithm offline, on what the replay of a run holds."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from deploy.launch import handle_signals
from deploy.replay_run import find_run, open_replay, topology
from deploy.train_folder import TrainFolder, TrainReporter
from twinrl.config import LearnerConfig, make_config, parse_overrides
from twinrl.core.errors import ConfigError
from twinrl.core.segment import SOURCES
from twinrl.core.sockets import free_port
from twinrl.parent import PARENT

STEPS = 2000  # unless --steps says otherwise


class Algorithm(NamedTuple):
    """What can be trained offline."""

    stage: str  # of learner.stages.STAGES
    checkpoint: str  # that it leaves
    section: str  # of its settings
    settings: str  # "module:class" of these
    sources: tuple[str, ...]  # of data, unless --source says otherwise
    text: str


ALGORITHMS = {
    "pretrain": Algorithm(
        "offline_pretrain",
        "pretrained",
        "pretrain",
        "learner.algorithms.pretrain:PretrainConfig",
        ("demo", "twin"),
        "the vision encoder, on recorded frames and their privileged state",
    ),
    "sft": Algorithm(
        "sft",
        "sft",
        "sft",
        "learner.algorithms.sft:SFTConfig",
        SOURCES,
        "flow matching on demonstrations, successes, and what people did when they took over",
    ),
    "chunk-q": Algorithm(
        "offline_rl",
        "chunk-q",
        "chunk_q",
        "learner.algorithms.chunk_q:ChunkQConfig",
        SOURCES,
        "off-policy RL with chunk critics, on all that was executed",
    ),
}


def command(argv: list[str]) -> int:
    """The command `twinrl train`."""
    arguments = make_parser().parse_intermixed_args(argv)
    algorithm = _nearest(arguments.algorithm, ALGORITHMS, "algorithm")
    if arguments.steps is not None and arguments.steps < 1:
        raise ConfigError(f"--steps is {arguments.steps}, must be at least 1")
    if arguments.ranks < 1:
        raise ConfigError(f"--ranks is {arguments.ranks}, must be at least 1")
    run = find_run(arguments.data, arguments.runs)
    plan = make_plan(algorithm, run, arguments)
    out = Path(arguments.out) if arguments.out else Path(arguments.runs) / f"{run.name}-{algorithm}"
    return train(plan, run, TrainFolder(out.resolve()), argv, arguments.ranks)


def make_parser() -> argparse.ArgumentParser:
    """The command line of `twinrl train`."""
    algorithms = "\n".join(f"  {name:10} {each.text}" for name, each in ALGORITHMS.items())
    parser = argparse.ArgumentParser(
        prog="twinrl train",
        description="Train a policy offline on what the replay of a run holds; no actor is started. The run may be "
        "running. Ctrl-C leaves a folder that the same command goes on with.",
        epilog=f"algorithms:\n{algorithms}\n\n"
        "settings are SECTION.NAME=VALUE of the algorithm (sft.*, pretrain.*, chunk_q.*), the policy (policy.*), the\n"
        "learner (learner.device, learner.precision, learner.threads), and seed=N\n\n"
        "examples:\n"
        "  twinrl train sft --data demo\n"
        "  twinrl train sft --data demo --source demo --source real sft.time=beta --steps 5000\n"
        "  twinrl train sft --data demo --start none sft.train_encoder=true policy.hidden=512\n"
        "  twinrl train chunk-q --data demo --start stage1 chunk_q.horizon=2\n"
        "  twinrl train sft --data demo --policy small.yaml --ranks 2 --out runs/small\n"
        "  twinrl eval demo-sft --checkpoint sft",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("algorithm", metavar="ALGORITHM", help=", ".join(ALGORITHMS))
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings to change")
    parser.add_argument("--data", required=True, metavar="RUN", help="whose replay: name or folder")
    parser.add_argument("--runs", default="runs", help="folder of runs (%(default)s)")
    parser.add_argument(
        "--out", metavar="FOLDER", help="of checkpoints and figures (RUNS/RUN-ALGORITHM)"
    )
    parser.add_argument(
        "--policy", metavar="PRESET", help="a preset, or a YAML file with settings; else the run's"
    )
    parser.add_argument(
        "--start",
        metavar="CHECKPOINT",
        help="of the run, or a file; none: from scratch; else `pretrained` where the run has it and the policy is its",
    )
    parser.add_argument("--steps", type=int, metavar="N", help=f"gradient steps ({STEPS})")
    parser.add_argument(
        "--source", action="append", choices=SOURCES, help="of the data; may be given again"
    )
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes (%(default)s)")
    return parser


# -- what is to be done ----------------------------------------------------------------------------------


def make_plan(name: str, run: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Plain values that say all of a training; ConfigError for what does not exist, with the nearest match."""
    algorithm = ALGORITHMS[name]
    job = topology(run).get("job")
    if job is None:
        raise ConfigError(f"{run} was never launched: its topology.json does not say which policy")
    given = parse_overrides(arguments.settings)
    _check_names(given, ["seed", "policy", "learner", algorithm.section], "")
    options = dict(_section(given, algorithm.section))
    _check_names(options, _fields(algorithm, extra=name == "chunk-q"), f"{algorithm.section}.")
    learner = _section(given, "learner")
    _check_names(learner, list(LearnerConfig.model_fields), "learner.")
    config = make_config({"learner": learner, "seed": given.get("seed", 0)}, "settings")
    policy = _policy(job["policy"], arguments.policy, _section(given, "policy"))
    return {
        "algorithm": name,
        "data": str(run),
        "instruction": job["instruction"],
        "policy": policy,
        "start": _start(run, algorithm, policy == job["policy"], arguments.start),
        "steps": arguments.steps or options.pop("steps", STEPS),
        "sources": list(arguments.source or algorithm.sources),
        "options": options,
        "learner": config.learner.model_dump(),
        "seed": config.seed,
    }


def _policy(own: dict[str, Any], given: str | None, changed: dict[str, Any]) -> dict[str, Any]:
    """The run's policy, or another that sees and does the same."""
    if given is None:
        return {**own, **changed}
    shapes = {key: own[key] for key in ("state_dim", "pose_dim", "cameras", "image_size", "chunk")}
    if Path(given).suffix not in (".yaml", ".yml"):
        from policies.presets import PRESETS

        return {
            "name": own["name"],
            **shapes,
            "preset": _nearest(given, PRESETS, "preset"),
            **changed,
        }
    try:
        settings = yaml.safe_load(Path(given).read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--policy {given}: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"--policy {given} must hold `name: value`, not {settings!r}")
    return {"name": own["name"], **shapes, **settings.get("policy", settings), **changed}


def _start(run: Path, algorithm: Algorithm, own_policy: bool, given: str | None) -> str | None:
    """File of the checkpoint to start from; None for none."""
    folder = run / "checkpoints"
    if given is None:
        if algorithm.stage == "offline_pretrain" or not own_policy:
            return None
        path = folder / "pretrained.pt"
        return str(path) if path.exists() else None
    if given == "none":
        return None
    for path in (folder / f"{given}.pt", Path(given)):
        if path.is_file():
            return str(path.resolve())
    known = sorted(path.stem for path in folder.glob("*.pt"))
    raise ConfigError(
        f"--start {given!r} is no checkpoint of {run.name} ({', '.join(known) or 'it has none'}), no file, and not `none`"
    )


def _fields(algorithm: Algorithm, extra: bool) -> list[str]:
    """Names of an algorithm's settings."""
    import importlib

    module, kind = algorithm.settings.split(":")
    found = dataclasses.fields(getattr(importlib.import_module(module), kind))
    return [each.name for each in found] + (["batch_size"] if extra else [])


def _section(given: dict[str, Any], name: str) -> dict[str, Any]:
    section = given.get(name, {})
    if not isinstance(section, dict):
        raise ConfigError(f"{name} is a section: write {name}.SETTING=VALUE")
    return section


def _check_names(given: Any, known: Sequence[str], prefix: str) -> None:
    for name in given:
        _nearest(name, known, "setting", prefix)


def _nearest(name: str, known: Any, what: str, prefix: str = "") -> str:
    """`name` if it is known; otherwise ConfigError with the nearest that is."""
    if name in known:
        return name
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    hint = f"did you mean {prefix + close[0]!r}?" if close else f"known: {', '.join(known)}"
    raise ConfigError(f"unknown {what} {prefix + name!r}; {hint}")


# -- doing it --------------------------------------------------------------------------------------------


def train(
    plan: dict[str, Any], run: Path, folder: TrainFolder, argv: Sequence[str], ranks: int
) -> int:
    """Run a plan in `folder`; the exit code. Of several ranks this is the first, or the one that torchrun says."""
    from learner import distributed

    algorithm = ALGORITHMS[plan["algorithm"]]
    place = distributed.environment()
    if place is None and ranks > 1:
        place = (f"tcp://127.0.0.1:{free_port()}", 0, ranks)
    address, rank, size = place or ("", 0, 1)
    handle_signals()
    with contextlib.ExitStack() as stack:
        if rank == 0:
            if not folder.begin(plan, algorithm.checkpoint, run):
                print(f"{folder.path} holds the result already; give another --out to train again")
                return 0
            if ranks > 1 and distributed.environment() is None:
                stack.enter_context(_helpers(argv, address, size))
        device = _device(plan, rank)
        stack.enter_context(distributed.joined(address, rank, size, device))
        reader = stack.enter_context(_shared_reader(run, rank))
        learner = stack.enter_context(_learner(plan, folder, reader, device, rank))
        arguments: dict[str, Any] = {
            "sources": _there(reader, plan["sources"]),
            "options": dict(plan["options"]),
            "start": "start" if plan["start"] else None,
        }
        if algorithm.stage == "offline_rl":
            arguments["batch_size"] = arguments["options"].pop("batch_size", 256)
            arguments["steps"] = plan["steps"]
        else:
            arguments["options"]["steps"] = plan["steps"]
        if algorithm.stage != "offline_pretrain":
            arguments["name"] = algorithm.checkpoint
        summary = learner.run(algorithm.stage, **arguments)
        finished = distributed.agree(learner.has(algorithm.checkpoint))
        if rank == 0:
            text = "interrupted; the same command goes on from here"
            if finished:
                figures = ", ".join(f"{key} {_short(value)}" for key, value in summary.items())
                text = f"{algorithm.checkpoint} is in {folder.place()}/checkpoints: {figures}"
            learner.reporter.finish(learner.losses(), finished, text)
    return 0 if finished else 130


@contextlib.contextmanager
def _learner(
    plan: dict[str, Any], folder: TrainFolder, reader: Any, device: str, rank: int
) -> Iterator[Any]:
    """A learner of this process, which Ctrl-C asks to end; the second time it ends at once."""
    from learner import distributed
    from learner.learner import Learner
    from learner.silent import NoSink, silent_reporter

    settings = plan["learner"]

    def make_reporter(name: str, stats: Any) -> Any:
        return silent_reporter(name, stats) if rank else TrainReporter(folder, plan, stats)

    learner = Learner(
        policy_config=plan["policy"],
        instruction=plan["instruction"],
        checkpoints=folder.checkpoints,
        make_reader=lambda: reader,
        make_reporter=make_reporter,
        sink=NoSink(),
        seed=plan["seed"],
        threads=settings["threads"] or max(1, (os.cpu_count() or 1) // distributed.size()),
        device=device,
        precision=settings["precision"],
        helper=rank > 0,
    )

    def interrupted(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        learner.stop()

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield learner
    finally:
        signal.signal(signal.SIGINT, before)
        learner.close()


@contextlib.contextmanager
def _shared_reader(run: Path, rank: int) -> Iterator[Any]:
    """A reader of the run's replay; of a stopped run, rank 0 serves it for all."""
    from buffer_service.client import Reader
    from learner import distributed
    from twinrl.core.keys import Keys

    if rank == 0:
        with open_replay(run) as reader:
            distributed.agree(getattr(reader, "address", ""))
            yield reader
        return
    address = distributed.agree("")
    if not address:  # shards: all of them are running
        with open_replay(run) as reader:
            yield reader
        return
    with Reader(address, Keys.load(run / "keys" / "cluster.key"), run) as reader:
        reader.sync()
        yield reader


@contextlib.contextmanager
def _helpers(argv: Sequence[str], address: str, size: int) -> Iterator[None]:
    """The other ranks as children that are given the same words; they end with this process."""
    host, port = address.removeprefix("tcp://").rsplit(":", 1)
    children = []
    for rank in range(1, size):
        told = {"MASTER_ADDR": host, "MASTER_PORT": port, "RANK": str(rank)}
        environment = {**os.environ, **told, "WORLD_SIZE": str(size), PARENT: str(os.getpid())}
        command = [sys.executable, "-m", "twinrl.main", "train", *argv]
        children.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
            )
        )
    try:
        yield
    finally:
        for child in children:
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _there(reader: Any, sources: Sequence[str]) -> list[str]:
    """Those of `sources` of which the replay holds something."""
    found = [source for source in sources if reader.count(source)]
    if not found:
        raise ConfigError(f"the replay holds nothing of {', '.join(sources)}")
    return found


def _device(plan: dict[str, Any], rank: int) -> str:
    """The device of a rank: on a machine with several GPUs, one each."""
    import torch

    name = plan["learner"]["device"]
    if name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name if name != "auto" else "cpu"
    own = int(os.environ.get("LOCAL_RANK", rank))  # of torchrun: the rank on this host
    return f"cuda:{own % torch.cuda.device_count()}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return str(value)
