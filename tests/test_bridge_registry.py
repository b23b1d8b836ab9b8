"""Robots and operators of other packages: installed, found by their entry points, and attached."""

import os
import sys

import numpy as np
import pytest

from robot_bridge import teleop
from robot_bridge.driver import make_driver
from robot_bridge.operator import Moment, make_operator
from tests.test_bridge_link import Stage, check_exactly_once, finish
from twinrl.core.errors import ConfigError

pytestmark = pytest.mark.timeout(60)
SOURCE = """
import numpy as np
from robot_bridge.drivers.point import PointDriver
from robot_bridge.operator import Operator


class Heavy(PointDriver):
    "Goes only a part of the way that it is told."

    kind = "heavy-point"

    def __init__(self, weight=1.0, **options):
        super().__init__(**options)
        self.weight = weight

    def servo(self, pose, gripper):
        super().servo(self._pose + (np.array(pose) - self._pose) / self.weight, gripper)


class Pusher(Operator):
    "Pushes in step FIRST of each episode, once."

    def __init__(self, first=3, length=0.01):
        super().__init__()
        if length > 0.03:
            raise ValueError(f"length {length} is more than a step")
        self.first, self.length = first, length

    def act(self, moment):
        return np.array([self.length, 0, 0, 0, 0, 0, 1], "f4") if moment.step == self.first else None

"""
ENTRIES = """[twinrl.robots]
heavy-point = my_cell.parts:Heavy
point = my_cell.parts:Heavy

[twinrl.operators]
pusher = my_cell.parts:Pusher
none = my_cell.parts:Pusher
absent = my_cell.nowhere:Absent
misspelt = my_cell.parts:Push
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A distribution `my-cell` as pip leaves it, for this process and for those that it starts."""
    place = tmp_path / "site"
    info = place / "my_cell-1.dist-info"
    for folder in (place / "my_cell", info):
        folder.mkdir(parents=True)
    (place / "my_cell/__init__.py").write_text("")
    (place / "my_cell/parts.py").write_text(SOURCE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-cell\nVersion: 1\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    monkeypatch.syspath_prepend(place)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(place), os.getcwd()]))
    yield place
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_cell"]:
        del sys.modules[name]


def test_a_package_brings_robots_and_operators(package, capsys):
    """By name, with their options; what is built in cannot be taken over; errors are as for the built-in."""
    driver = make_driver("heavy-point", weight=2.5)
    assert (driver.kind, driver.weight) == ("heavy-point", 2.5)
    assert make_driver("point").kind == "point"
    operator = make_operator("pusher", first=1, length=0.02)
    moments = [Moment(step, np.zeros(3), driver, np.zeros(6)) for step in range(3)]
    acted = [operator.act(moment) for moment in moments]
    assert [action is not None for action in acted] == [False, True, False]
    assert make_operator("none").act(moments[1]) is None
    for kind, options, text in (
        ("pushr", {}, "not one of none, scripted, .*, pusher; did you mean 'pusher'"),
        ("pusher", {"legs": 2}, "operator 'pusher': .*legs"),
        ("pusher", {"length": 1.0}, "operator 'pusher': length 1.0 is more than a step"),
        ("absent", {}, "operator 'absent' needs my_cell.nowhere, which is not installed"),
        ("misspelt", {}, "operator 'misspelt' cannot be loaded: .*Push"),
    ):
        with pytest.raises(ConfigError, match=text):
            make_operator(kind, **options)
    with pytest.raises(ConfigError, match=r"unknown robot 'heavy', .* did you mean 'heavy-point'"):
        make_driver("heavy")
    arguments = ["--operator", "pusher", "--operator-option", "first=0", "--seconds", "0.3"]
    assert teleop.main(arguments) == 0
    assert "+10.0" in capsys.readouterr().out


def test_they_attach_to_a_run(package, tmp_path):
    """The robot plays under its own kind, the operator's one step is flagged."""
    stage = Stage(tmp_path)
    try:
        stage.act()
        options = [
            "--operator",
            "pusher",
            "--operator-option",
            "first=8",
            "--speed",
            "50",
            "--once",
        ]
        more = ["--robot", "heavy-point", "--robot-option", "weight=3"]
        output = finish(stage.attach(*more, *options))
        assert "detached" in output and "Traceback" not in output, output
        (parts,) = check_exactly_once(stage.replay.segments).values()
        flags = np.concatenate([part.columns["intervention"] for part in parts])
        assert np.flatnonzero(flags).tolist() == [8]
        assert stage.row()["kind"] == "heavy-point"
    finally:
        stage.close()
