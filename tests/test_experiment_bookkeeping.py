"""Settings and costs of experiments."""

import json

import pytest

from experiments import stages
from experiments.bookkeeping import Bookkeeping, overlaid


def test_settings_come_from_defaults_changes_and_overrides():
    """Overrides win over changes, which win over the defaults; unknown sections are refused."""
    defaults = {"sft": {"steps": 10, "batch": 2}, "ppo": {}}
    settings = overlaid(defaults, {"sft": {"steps": 3}}, ["ppo.clip=0.1", "ppo.noise=sde"])
    assert settings == {"sft": {"steps": 3, "batch": 2}, "ppo": {"clip": 0.1, "noise": "sde"}}
    assert overlaid(defaults, {"sft": {"steps": 3}}, ["sft.steps=7"])["sft"]["steps"] == 7
    assert defaults["sft"]["steps"] == 10
    for wrong in ("stf.steps=7", "steps=7", "sft.steps", "sft.steps="):
        with pytest.raises(
            SystemExit, match=r"not section\.option=value with a section of sft, ppo"
        ):
            overlaid(defaults, {}, [wrong])


def test_quick_settings_are_about_known_sections():
    quick = overlaid(stages.SETTINGS, stages.QUICK, [])
    assert quick["twin_rl"]["steps"] < stages.SETTINGS["twin_rl"]["steps"]


def test_parts_are_counted_and_rows_are_lines_of_json(capsys):
    book = Bookkeeping()
    for _ in range(2):
        with book.clock("sum"):
            sum(range(100_000))
    assert list(book.core_seconds) == ["sum"] and book.core_seconds["sum"] > 0
    book.report({"stage": "sft", "loss": 0.123456})
    assert json.loads(capsys.readouterr().out) == {"stage": "sft", "loss": 0.1235}
