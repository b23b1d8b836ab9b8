"""The benchmark of the robot's loop runs and gives its figures; what it reads from an arm's log is right."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks are no package of the distribution

from benchmarks import _arm_log as arm_log  # noqa: E402
from benchmarks import robot_loop  # noqa: E402
from robot_bridge.drivers import sim_arm  # noqa: E402
from robot_bridge.limits import Limits  # noqa: E402

# What the benchmark gives for each group, a plausible row of those that a test has no time to measure.
ROWS = [
    {"group": "pace", "period_error_p99_ms": 1.5, "lost": 0, "repeated": 0, "limits_exceeded": 1},
    {"group": "cut", "watchdog_ms": 256.0, "lost": 1, "repeated": 0, "limits_exceeded": 0},
    {"group": "long_cut", "watchdog_ms": 270.0, "stop_s": 2.1, "lost": 2, "repeated": 1},
]


def made_log(places, began=10.0):
    rows = np.zeros(len(places), sim_arm.LOG)
    rows["kind"], rows["time"] = sim_arm.SENT, began + 0.01 * np.arange(len(places))
    rows["setpoint"][:, :3] = places
    return rows


def line(speed, ticks=50):
    """Places of a straight way at `speed` m/s along x."""
    places = np.tile([0.3, 0.0, 0.2], (ticks, 1))
    places[:, 0] += speed * 0.01 * np.arange(ticks)
    return places


@pytest.mark.timeout(120)
def test_groups_are_measured_on_real_processes_and_kept(tmp_path, capfd):
    file = tmp_path / "robot_loop.json"
    wanted = ["--tiny", "--resume", "--rows", "attach,adversarial", "--json", str(file)]
    robot_loop.main(wanted)
    report = json.loads(file.read_text())
    assert [row["group"] for row in report["rows"]] == list(report["groups"])
    assert "attach  attaches 2  " in capfd.readouterr().out
    robot_loop.main(wanted)
    assert json.loads(file.read_text())["rows"] == report["rows"]
    assert "attaches" not in capfd.readouterr().out, "it is not measured again"
    found = report["figures"]
    wanted = {f.key for f in robot_loop.FIGURES if f.rows in ("attach", "adversarial")}
    assert wanted <= set(found)
    assert found["attach_attaches"] == 2 and found["attach_episodes_lost"] == 0
    assert 0 < found["attach_first_step_s"] <= found["attach_first_step_max_s"]
    assert (found["lost"], found["repeated"], found["limits_exceeded"]) == (0, 0, 0)
    assert found["adversarial_refused"] > 0 and found["adversarial_travelled_m"] > 0.5
    assert 0.9 < found["adversarial_share_speed"] <= 1 + 1e-6


def test_what_may_not_be_is_summed_over_the_groups():
    found = robot_loop.figures(ROWS)
    assert [found[key] for key in robot_loop.EACH] == [3, 1, 1]
    assert found["watchdog_ms"] == 270.0 and found["cut_watchdog_ms"] == 256.0
    assert found["period_error_p99_ms"] == 1.5 and found["long_cut_stop_s"] == 2.1


def test_the_page_shows_them_with_their_goals(tmp_path, monkeypatch):
    path = ROOT / "scripts/benchmark_docs.py"
    spec = importlib.util.spec_from_file_location("benchmark_docs", path)
    docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docs)
    groups = {"pace": {"at": "2026-01-01T00:00:00", "took_s": 60.0}}
    report = {"machine": robot_loop.machine(), "command": "python -m benchmarks.robot_loop"}
    report |= {"figures": robot_loop.figures(ROWS), "groups": groups, "rows": ROWS}
    (tmp_path / "robot_loop.json").write_text(json.dumps(report))
    monkeypatch.setattr(docs, "RESULTS", tmp_path)
    page = docs.page()
    assert "## Robots" in page and "How the robot's loop is measured" in page
    assert "| <= 300 | **270** | yes | `--rows cut,long_cut` |" in page
    assert {"lost", "repeated", "limits_exceeded"} == set(docs.missed())


def test_an_unknown_group_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        robot_loop.main(["--rows", "paces"])
    assert "bridge_killed" in capsys.readouterr().err


def test_every_figure_has_its_group():
    assert {group for each in robot_loop.FIGURES for group in each.rows.split(",")} == {
        *robot_loop.GROUPS,
        "all",
    }


def test_a_log_tells_what_was_exceeded_and_how_much_was_reached():
    allowed = made_log(line(Limits().speed))
    assert arm_log.exceeded(allowed) == 0
    shares = arm_log.reached(allowed)
    assert shares["speed"] == pytest.approx(1.0) and shares["jerk"] < 1e-6
    assert shares["step_m"] == pytest.approx(0.025 / 0.03)
    assert arm_log.exceeded(made_log(line(1.01 * Limits().speed))) == 49
    pillar = Limits(keep_out=(((0.35, -0.1, 0.0), (0.36, 0.1, 0.3)),))
    assert arm_log.exceeded(allowed, pillar) > 0
    low = line(0.1)
    low[1:, 2] = 0.002  # above the table
    anyhow = Limits(speed=1e9, acceleration=1e9, jerk=1e9)
    assert arm_log.exceeded(made_log(low), anyhow) == 49
    assert arm_log.travelled(allowed) == pytest.approx(0.25 * 0.49)


def test_a_log_tells_when_the_arm_rested_and_went_on():
    there, rest = line(0.2, 40), np.tile(line(0.2, 40)[-1], (20, 1))
    log = made_log(np.concatenate([there, rest, np.add(there, [0.1, 0.0, 0.0])]))
    assert arm_log.rest_ms(log, 10.1) == pytest.approx(290, abs=1)
    assert arm_log.pause_ms(log, 10.1) == pytest.approx(290, abs=1)
    assert arm_log.moves_at(log, 10.45) == pytest.approx(10.60)
    assert arm_log.rest_ms(made_log(there), 10.0) == float("inf")
    late = made_log(there)
    late["time"][20:] += 0.003
    assert arm_log.pace_errors(late).max() == pytest.approx(3.0)
    late["time"][30:] += 1.0  # a break is another episode, and ends motion
    assert len(arm_log.stretches(late)) == 1 and arm_log.pace_errors(late).max() < 4.0
    assert arm_log.pause_ms(late, 10.0) == pytest.approx(293, abs=1)


def test_what_an_arm_begins_anew_from_where_it_stood_is_no_jump():
    """After a fault the first set-point is where the arm stands; without a fault the same is a jump."""
    before, after = line(0.1), line(0.1)
    after[:, 1] += 0.02
    rows = made_log(np.concatenate([before, after]))
    assert arm_log.exceeded(rows) > 0
    rows["kind"][len(before)] = sim_arm.RECOVERED
    assert arm_log.exceeded(rows) == 0


def test_a_tool_that_begins_outside_may_come_back_but_go_no_deeper():
    """From 5 mm below the workspace: up and in, out again, or deeper first."""
    low = Limits().workspace[0][2]

    def count(*heights):
        places = np.tile([0.3, 0.0, 0.2], (len(heights), 1))
        places[:, 2] = low + np.array(heights)
        log = made_log(places)
        wide = Limits()._replace(jerk=1e9, acceleration=1e9, speed=1e9)
        return arm_log.exceeded(log, wide)

    back = [-0.005, -0.005, -0.004, -0.002, 0.0, 0.001, 0.002, 0.002, 0.002, 0.002, 0.002]
    assert count(*back) == 0
    assert count(*back, -0.001) == 1
    assert count(*back[:2], -0.0051, *back[2:]) == 1
    assert count(*[-0.005] * 12) == 0, "it may stay"
