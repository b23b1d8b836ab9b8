"""The documents say what is: settings, links, commands and paths in them exist."""

import argparse
import importlib.util
import os
import re
import shlex
from pathlib import Path

import pytest

from twinrl.config import load_config
from twinrl.main import COMMANDS, main

ROOT = Path(__file__).parent.parent
SKIPPED = {"runs", "build", "dist", "venv"}
PLACEHOLDER = re.compile(r"[A-Z]{3,}|[*{}<>]|\.\.\.")


def _pages():
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name[0] != "." and name not in SKIPPED]
        yield from (Path(folder) / name for name in files if name.endswith(".md"))


PAGES = sorted(_pages())
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
TOPS = {path.name for path in ROOT.iterdir()} - SKIPPED


def _prose_and_blocks(page):
    """The text outside fenced blocks, and the shell blocks' lines with continuations joined."""
    parts = re.split(r"^ *```", page.read_text(encoding="utf-8"), flags=re.M)
    blocks = [part.partition("\n") for part in parts[1::2]]
    shell = [body for kind, _, body in blocks if kind.strip() in ("sh", "bash", "console", "")]
    lines = "\n".join(shell).replace("\\\n", " ").splitlines()
    return "".join(parts[::2]), [line.strip() for line in lines]


def _spans(page):
    return re.findall(r"`([^`\n]+)`", _prose_and_blocks(page)[0])


def _slugs(page):
    """The anchors of a page's headings, as GitHub makes them."""
    for heading in re.findall(r"^#+ (.+)$", _prose_and_blocks(page)[0], flags=re.M):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_page_of_settings_is_current():
    spec = importlib.util.spec_from_file_location("config_docs", ROOT / "scripts/config_docs.py")
    config_docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(config_docs)
    written = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert written == config_docs.page(), "run: python scripts/config_docs.py"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_relative_links_lead_somewhere(page):
    prose, _ = _prose_and_blocks(page)
    for target in re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = page if not path else (page.parent / path).resolve()
        assert found.exists(), f"{target} does not exist"
        if anchor and found.suffix == ".md":
            assert anchor in set(_slugs(found)), f"{target}: no such heading"


class _Parsed(Exception):
    """The command line was understood; nothing is to be run."""


@pytest.fixture
def parse(monkeypatch):
    """parse(words, whole): SystemExit 2 where `twinrl WORDS` is wrong; a part may lack required options."""
    original = argparse.ArgumentParser.parse_args
    whole = True

    def only_parse(parser, argv=None, namespace=None, original=original):
        for action in () if whole else parser._actions:
            if action.option_strings:
                action.required = False
            elif action.nargs is None:
                action.nargs = "?"
        raise _Parsed(original(parser, argv, namespace))

    intermixed = argparse.ArgumentParser.parse_intermixed_args

    def only_intermixed(parser, argv=None, namespace=None):
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", original)  # it uses that itself
        only_parse(parser, argv, namespace, original=intermixed)

    def run(words, is_whole):
        nonlocal whole
        whole = is_whole
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
        try:
            code = main(words)
        except _Parsed as parsed:
            return parsed.args[0]
        except SystemExit as end:  # --help and --version end with 0
            code = end.code
        assert code == 0 or words == [], f"twinrl {shlex.join(words)} ends with {code}"
        return None

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_intermixed_args", only_intermixed)
    return run


def _commands(page):
    """Every `twinrl COMMAND ...` of a page: its words, and whether it stands in a block."""
    _, lines = _prose_and_blocks(page)
    for text, whole in [(s, False) for s in _spans(page)] + [(line, True) for line in lines]:
        match = re.match(r"(?:\$ )?(?:\S*/)?twinrl\s+(.*)", text)
        if match is None:
            continue
        words = shlex.split(match[1], comments=True)
        if "|" in words:
            words = words[: words.index("|")]
        words = [word for word in words if word != "&"]
        if words and words[0] != "COMMAND" and "..." not in words:
            yield words, whole


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_are_understood(page, parse):
    for words, whole in _commands(page):
        assert words[0].startswith("-") or words[0] in COMMANDS, f"no command {words[0]!r}"
        arguments = parse(words, whole)
        path = getattr(arguments, "config", None)
        if path:  # a reader's own file has no folder: its overrides are tried on an empty one
            load_config(ROOT / path if "/" in path else os.devnull, arguments.overrides)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_paths_of_the_repository_exist(page):
    for span in _spans(page):
        path = span.partition(":")[0].rstrip("/")
        first, slash, _ = path.partition("/")
        is_path = re.fullmatch(r"[\w.\-/]+", path) and (slash or path.endswith(".md"))
        if is_path and (first in TOPS or not slash) and not PLACEHOLDER.search(Path(path).stem):
            assert (ROOT / path).exists() or (page.parent / path).exists(), f"{span} does not exist"


def test_a_wrong_command_is_noticed(parse):
    with pytest.raises(AssertionError, match="ends with 2"):
        parse(["status", "--wach"], True)
    with pytest.raises(AssertionError, match="ends with 2"):
        parse(["attach", "--robot", "sim"], True)
    assert parse(["attach", "--robot", "sim"], False).robot == "sim"
