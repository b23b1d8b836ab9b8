"""`twinrl replay RUN ...`: what the replay of a run holds: list, summary, show, export, delete."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from buffer_service.client import Reader
from deploy.replay_episodes import (
    FAILURE,
    SUCCESS,
    UNFINISHED,
    Episode,
    Selection,
    ago,
    episodes,
    find,
    moment,
    size,
    version_range,
)
from deploy.replay_run import find_run, open_replay
from twinrl.core.errors import ConfigError
from twinrl.core.segment import SOURCES

ROWS = 30  # of a list, unless asked for more
DELETE_BATCH = 1000  # segments in one request
DELETE_SECONDS = 60.0
OUTCOMES = {SUCCESS: "green", FAILURE: "red", UNFINISHED: "yellow"}
FILTERS = """an episode must pass all filters; in them
  NAME in --task, --region, --writer and --episode may hold * and ?
  TIME is how long ago, 90s 10m 2h 3d, or when, 2026-11-21T15:30
  VERSIONS is 7, 3:7, 3:, :7 or none"""


def command(argv: list[str]) -> int:
    """The command `twinrl replay`."""
    arguments = make_parser().parse_args(argv)
    if arguments.serve is not None:
        return arguments.serve(arguments)
    run = find_run(arguments.run, arguments.runs)
    act: Callable[[Reader, Path, argparse.Namespace], int] = arguments.act
    with open_replay(run, arguments.deadline) as reader:
        return act(reader, run, arguments)


def make_parser() -> argparse.ArgumentParser:
    """The command line of `twinrl replay`; without a subcommand it is `summary`."""
    parser = argparse.ArgumentParser(
        prog="twinrl replay",
        description="List, summarise, show, export and delete what the replay of a run holds. The run may be "
        "running; of a stopped run the replay is served for as long as the command takes.",
        epilog="examples:\n"
        "  twinrl replay demo\n"
        "  twinrl replay demo list --source real --failure\n"
        "  twinrl replay demo show last --source real\n"
        "  twinrl replay demo export data/demo --success\n"
        "  twinrl replay demo delete --source twin --until 2h\n"
        "  twinrl replay demo add-shard\n"
        "`twinrl replay RUN COMMAND --help` has more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="name or folder")
    parser.add_argument("--runs", default="runs", help="folder of runs (%(default)s)")
    parser.add_argument(
        "--deadline", type=float, default=30.0, metavar="S", help="for the service to answer, 30"
    )
    parser.set_defaults(act=_summary, json=False, serve=None)
    commands = parser.add_subparsers(metavar="COMMAND")
    _add_list(commands)
    _add_summary(commands)
    _add_show(commands)
    _add_export(commands)
    _add_delete(commands)
    _add_add_shard(commands)
    return parser


def _add(commands: Any, name: str, act: Any, text: str, examples: list[str]) -> Any:
    lines = "\n".join(f"  twinrl replay {each}" for each in examples)
    parser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"{FILTERS}\n\nexamples:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(act=act)
    group = parser.add_argument_group("filters")
    group.add_argument("--source", action="append", choices=SOURCES, help="may be given again")
    for option in ("task", "region", "writer", "episode"):
        group.add_argument(f"--{option}", default="*", metavar="NAME")
    outcome = group.add_mutually_exclusive_group()
    for option, help_text in (
        (SUCCESS, "episodes that succeeded"),
        (FAILURE, "episodes that ended without success"),
        (UNFINISHED, "episodes that go on"),
    ):
        outcome.add_argument(
            f"--{option}", dest="outcome", action="store_const", const=option, help=help_text
        )
    group.add_argument("--since", metavar="TIME", help="came in since then")
    group.add_argument("--until", metavar="TIME", help="came in until then")
    group.add_argument("--version", metavar="VERSIONS", help="of the policy that acted")
    group.add_argument(
        "--marked", action="store_true", help="closed by the service: their writer was lost"
    )
    return parser


def selection(arguments: argparse.Namespace) -> Selection:
    """The filters of a command line; ConfigError says which value is wrong."""
    return Selection(
        source=tuple(arguments.source or ()),
        task=arguments.task,
        region=arguments.region,
        writer=arguments.writer,
        episode=arguments.episode,
        outcome=arguments.outcome or "",
        since=moment(arguments.since) if arguments.since else 0.0,
        until=moment(arguments.until) if arguments.until else float("inf"),
        versions=version_range(arguments.version) if arguments.version else None,
        marked=arguments.marked,
    )


def _selected(reader: Reader, arguments: argparse.Namespace) -> list[Episode]:
    wanted = selection(arguments)
    return [episode for episode in episodes(reader.entries()) if wanted.keeps(episode)]


def _add_list(commands: Any) -> None:
    parser = _add(
        commands,
        "list",
        _list,
        "the episodes, newest first, a line each",
        [
            "demo list",
            "demo list --source real --source demo --failure --limit 0",
            "demo list --since 10m --region ood --version 70:",
            "demo list --json | jq -r .episode",
        ],
    )
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help=f"so many of the newest; 0 for all ({ROWS}, with --json all)",
    )
    parser.add_argument("--json", action="store_true", help="a JSON object a line, for programs")


def _list(reader: Reader, run: Path, arguments: argparse.Namespace) -> int:
    found = sorted(_selected(reader, arguments), key=lambda each: each.time, reverse=True)
    limit = arguments.limit
    if limit is None:
        limit = 0 if arguments.json else ROWS
    if limit < 0:
        raise ConfigError(f"--limit is {limit}, must be at least 0")
    shown = found[:limit] if limit else found
    if arguments.json:
        for episode in shown:
            print(json.dumps(episode.row()))
        return 0
    steps, held = sum(e.steps for e in found), sum(e.bytes for e in found)
    count = f"{len(shown):,} of {len(found):,}" if len(shown) < len(found) else f"{len(found):,}"
    more = "; --limit 0 shows all" if len(shown) < len(found) else ""
    total = Text(f"{count} episodes{more}; {steps:,} transitions, {size(held)}", style="dim")
    say(_episode_table(shown), total)
    return 0


def say(*parts: RenderableType) -> None:
    """Print as wide as the terminal is; into a file or a pipe as wide as the content."""
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(*parts, sep="\n")
        return
    console = Console(highlight=False, width=10_000)
    with console.capture() as capture:
        console.print(*parts, sep="\n")
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _episode_table(found: list[Episode]) -> Table:
    """A row for each; on a narrow terminal without what can be done without, so that names stay whole."""
    now = time.time()
    columns: dict[str, list[Text]] = {
        "episode": [Text(e.name) for e in found],
        "source": [Text(e.entries[0].source) for e in found],
        "task": [Text(e.entries[0].task) for e in found],
        "region": [Text(e.entries[0].region) for e in found],
        "steps": [Text(f"{'' if e.whole else '*'}{e.steps:,}") for e in found],
        "outcome": [_outcome(e) for e in found],
        "policy": [Text(_versions(e)) for e in found],
        "writer": [Text(e.entries[0].writer) for e in found],
        "age": [Text(ago(now - e.time)) for e in found],
        "size": [Text(size(e.bytes)) for e in found],
    }
    widths = {
        name: max(len(each) for each in [Text(name), *cells]) for name, cells in columns.items()
    }
    console = Console()
    for name in ("writer", "task", "size") if console.is_terminal else ():
        if sum(widths[each] + 2 for each in columns) > console.width:
            del columns[name]
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for name in columns:
        justify: Any = "right" if name in ("steps", "age", "size") else "left"
        table.add_column(name, no_wrap=True, justify=justify)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    if any(not episode.whole for episode in found):
        table.caption = "* not from the first step on, or with a gap: the rest was evicted"
        table.caption_justify = "left"
    return table


def _outcome(episode: Episode) -> Text:
    outcome = Text(episode.outcome, style=OUTCOMES[episode.outcome])
    return outcome.append(f" ({episode.marked})", style="yellow") if episode.marked else outcome


def _versions(episode: Episode) -> str:
    if episode.versions is None:
        return "-"
    low, high = episode.versions
    return str(low) if low == high else f"{low}-{high}"


def _add_summary(commands: Any) -> None:
    parser = _add(
        commands,
        "summary",
        _summary,
        "what there is by source, task and region, what the service promises, and who waits",
        ["demo", "demo summary --since 1h", "demo summary --json"],
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def _summary(reader: Reader, run: Path, arguments: argparse.Namespace) -> int:
    from deploy.replay_summary import render, summarise

    chosen = _selected(reader, arguments) if hasattr(arguments, "source") else None
    told = summarise(reader, run, episodes(reader.entries()) if chosen is None else chosen)
    if arguments.json:
        print(json.dumps(told))
    else:
        say(render(told))
    return 0


def _add_show(commands: Any) -> None:
    parser = _add(
        commands,
        "show",
        _show,
        "an episode as a contact sheet (PNG) or a video, and where it comes from",
        [
            "demo show stand-in-fcac4faf-54",
            "demo show last --source real --failure",
            "demo show '#10662' --png episode.png --frames 24",
            "demo show last --video episode.mp4",
        ],
    )
    parser.add_argument(
        "wanted",
        metavar="EPISODE",
        help="name, a part of it that no other has, '#ID' of a segment, or: last",
    )
    parser.add_argument(
        "--png", type=Path, metavar="FILE", help="default: RUN/episodes/EPISODE.png"
    )
    parser.add_argument("--video", type=Path, metavar="FILE", help="an MP4 instead, or also")
    parser.add_argument("--frames", type=int, default=48, metavar="N", help="of the sheet, 48")
    parser.add_argument(
        "--fps", type=float, metavar="F", help="of the video; default: as fast as it was"
    )
    parser.add_argument("--json", action="store_true", help="print the story for programs")


def _show(reader: Reader, run: Path, arguments: argparse.Namespace) -> int:
    from deploy.replay_show import show

    for name, value, least in (("--frames", arguments.frames, 2), ("--fps", arguments.fps, 1)):
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}, must be at least {least}")
    show(
        reader,
        find(_selected(reader, arguments), arguments.wanted),
        run / "episodes",
        png=arguments.png,
        movie=arguments.video,
        frames=arguments.frames,
        rate=arguments.fps,
        as_json=arguments.json,
        say=say,
    )
    return 0


def _add_export(commands: Any) -> None:
    parser = _add(
        commands,
        "export",
        _export,
        "write the episodes into a folder, a file each; run it again to go on or to add new ones",
        [
            "demo export data/demo --success",
            "demo export data/real --source real --source demo --compress",
        ],
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--format",
        choices=["npz"],
        default="npz",
        help="npz: NumPy archives, which need no TwinRL to be read",
    )
    parser.add_argument("--compress", action="store_true", help="smaller and many times slower")


def _export(reader: Reader, run: Path, arguments: argparse.Namespace) -> int:
    from deploy.replay_export import export

    found = _selected(reader, arguments)
    if not found:
        raise ConfigError("no episode passes the filters")
    done = export(reader, found, arguments.folder, compress=arguments.compress)
    rest = f", {done.kept:,} were there already" if done.kept else ""
    rest += f", {done.gone:,} were evicted meanwhile" if done.gone else ""
    print(f"wrote {done.written:,} episodes to {arguments.folder} ({size(done.bytes)}){rest}")
    return 0


def _add_delete(commands: Any) -> None:
    parser = _add(
        commands,
        "delete",
        _delete,
        "delete episodes for good; without --yes it only says which",
        [
            "demo delete --source twin --until 2h",
            "demo delete --episode 'stand-in-fcac4faf-5*' --source real --yes",
            "demo delete --marked --yes",
            "demo delete --all --yes",
        ],
    )
    parser.add_argument("--all", action="store_true", help="needed where no filter is given")
    parser.add_argument("--yes", action="store_true", help="delete; else only tell")


def _delete(reader: Reader, run: Path, arguments: argparse.Namespace) -> int:
    if selection(arguments).everything and not arguments.all:
        raise ConfigError("say which episodes are to go: a filter, or --all")
    named = arguments.source or ["twin"]  # demo and real go only where they are named
    found, kept = [], 0
    for episode in _selected(reader, arguments):
        if episode.entries[0].source in named:
            found.append(episode)
        else:
            kept += 1
    if kept:
        print(
            f"{kept:,} episodes of people and robots stay: they go only with --source real or demo",
            file=sys.stderr,
        )
    ids = [entry.id for episode in found for entry in episode.entries]
    held = size(sum(episode.bytes for episode in found))
    what = f"{len(found):,} episodes ({len(ids):,} segments, {held})"
    if not arguments.yes:
        if found:
            say(_episode_table(found[-ROWS:][::-1]))
        tail = "; --yes deletes them for good" if found else ""
        print(f"would delete {what}{tail}")
        return 0
    deleted = 0
    for place in range(0, len(ids), DELETE_BATCH):
        batch = ids[place : place + DELETE_BATCH]
        deleted += reader.call("delete", {"ids": batch}, DELETE_SECONDS)["deleted"]
    print(f"deleted {what}")
    if deleted < len(ids):
        print(f"{len(ids) - deleted:,} of the segments were gone already", file=sys.stderr)
    return 0


def _add_add_shard(commands: Any) -> None:
    parser = commands.add_parser(
        "add-shard",
        help="serve one more part of a running job's replay from here",
        description="Serve one more part (shard) of a running job's replay from this machine, until Ctrl-C. Writers "
        "and readers take it in within seconds; run the command with the same --folder again and it goes on. On "
        "another host RUN is a folder with copies of the run's topology.json and keys/.",
        epilog="examples:\n"
        "  twinrl replay demo add-shard\n"
        "  twinrl replay demo add-shard --redis redis://:secret@store:6379/0\n"
        "  twinrl replay /data/demo add-shard --address 'tcp://10.0.0.7:*'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, metavar="DIR", help="its own; RUN/replay-N")
    parser.add_argument(
        "--address",
        default="",
        metavar="ADDRESS",
        help="where to listen, tcp://HOST:PORT or tcp://HOST:* for a free port; default: the interface towards "
        "the first service",
    )
    parser.add_argument(
        "--redis", metavar="URL", help="default: as the first service; '' for one of its own"
    )
    parser.set_defaults(serve=_add_shard)


def _add_shard(arguments: argparse.Namespace) -> int:
    from deploy.shards import add_shard

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    places = [Path(arguments.run), Path(arguments.runs) / arguments.run]
    run = next((place for place in places if (place / "topology.json").exists()), None)
    if run is None:
        raise ConfigError(
            f"no run {arguments.run!r} with a topology.json, in {arguments.runs}/ neither"
        )
    return add_shard(run.resolve(), arguments.folder, arguments.address, arguments.redis)
