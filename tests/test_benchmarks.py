"""Benchmarks run and write what they promise; the page of figures says what was measured."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks are no package of the distribution

from benchmarks import replay  # noqa: E402
from benchmarks.replay_bench import figures, processes, stored, workload  # noqa: E402
from benchmarks.replay_bench.frames import frames  # noqa: E402


@pytest.fixture(scope="module")
def docs():
    spec = importlib.util.spec_from_file_location(
        "benchmark_docs", ROOT / "scripts/benchmark_docs.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check(report):
    assert {"machine", "command", "figures", "rows"} <= set(report)
    assert {"system", "cpus", "python"} <= set(report["machine"])
    assert report["command"].startswith("python -m benchmarks.")
    assert all(isinstance(value, int | float) for value in report["figures"].values())
    assert report["rows"] and all(isinstance(row, dict) for row in report["rows"])


@pytest.mark.parametrize("group", replay.GROUPS)
def test_each_group_of_the_replay_benchmark_gives_its_figures(group, tmp_path):
    file = tmp_path / "replay.json"
    command = [sys.executable, "-m", "benchmarks.replay", "--tiny", "--rows", group]
    done = subprocess.run(
        [*command, "--json", str(file)], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(file.read_text())
    _check(report)
    assert {row["rows"] for row in report["rows"]} == {group}
    # Without peers and with few writers, those figures are missing that need them.
    wanted = {
        figure.key
        for figure in figures.FIGURES
        if figure.rows == group and "reverb" not in figure.key and "64" not in figure.key
    }
    assert wanted <= set(report["figures"])
    assert set(report["spread"]) == set(report["figures"])
    if group == "at_once":
        assert report["figures"]["ingested_vs_acked"] == 1.0


def test_a_resumed_run_keeps_the_groups_that_are_there(tmp_path):
    file = tmp_path / "replay.json"
    before = {"rows": [{"rows": "small", "system": "x", "round": 0}], "groups": {"small": {}}}
    file.write_text(json.dumps({**before, "figures": {}, "spread": {}}))
    replay.main(["--tiny", "--rows", "small", "--resume", "--json", str(file)])
    assert json.loads(file.read_text())["rows"] == before["rows"]


def test_an_unknown_group_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        replay.main(["--rows", "insrt"])
    assert "at_once" in capsys.readouterr().err


def test_transitions_have_the_sizes_of_the_workloads(tmp_path):
    """What is stored for us and what is stored for the peers has the same bytes a transition."""
    for each in (workload.W, workload.SMALL):
        small = each._replace(segments=1)
        workload.create(tmp_path / "w.npz", small)
        (columns,) = stored.load(str(tmp_path / "w.npz"))
        _, mine = workload.ours(columns, 0)
        theirs = sum(column[0].nbytes for column in columns.values())
        assert theirs == each.transition_bytes == (98_552 if each.image else 256)
        extra = ("policy_version", "chunk_id", "timestamp", "frame_step")  # only we have them
        own = sum(column[0].nbytes for name, column in mine.items() if name not in extra)
        # Of W's 4x7 actions a step holds its own 7; see workload.py.
        assert own == (theirs - 3 * 28 if each.image else theirs)


def test_frames_change_and_are_the_same_for_everybody():
    for moving in (False, True):
        first = frames(3, 32, seed=1, moving=moving)
        assert (first == frames(3, 32, seed=1, moving=moving)).all()
        assert (first[0] != first[1]).any() and len(set(first[0].ravel().tolist())) > 50


def test_the_page_cache_of_a_file_is_counted(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * (1 << 20))
    assert stored.cached_bytes(path) == 1 << 20
    empty = tmp_path / "sparse"
    with empty.open("wb") as file:
        os.truncate(file.fileno(), 1 << 20)
    assert stored.cached_bytes(empty) == 0
    assert stored.process_bytes(os.getpid()) > 1 << 20


def test_a_worker_that_ends_says_why(tmp_path):
    code = "import sys; sys.stderr.write('no such table')"
    worker = processes.Worker("mute", [sys.executable, "-c", code], tmp_path)
    with pytest.raises(processes.TwinRLError, match="no such table"):
        worker.ask("sample")
    worker.close()


def test_ratios_are_taken_round_by_round():
    rows = [
        {"rows": "x", "system": name, "round": number, "rate": rate}
        for name, rates in (("a", (2.0, 6.0, 9.0)), ("b", (1.0, 2.0)))
        for number, rate in enumerate(rates)
    ]
    assert figures.ratio("a", "b", "rate")(rows) == [2.0, 3.0]
    assert figures.plain("b", "rate")(rows) == [1.0, 2.0]


def test_every_peer_has_a_worker_and_says_what_it_needs():
    folders = [path for path in processes.PEERS.iterdir() if (path / "worker.py").exists()]
    assert {path.name for path in folders} == {kind.kind for kind in replay.PEER_SYSTEMS}
    for path in folders:
        assert (path / "requirements.txt").exists() == (path / "setup.sh").exists()


def test_the_page_of_benchmarks_is_current(docs):
    assert docs.PAGE.read_text(encoding="utf-8") == docs.page(), (
        "run: python scripts/benchmark_docs.py"
    )


def test_a_missed_goal_has_its_reason(docs):
    assert set(docs.missed()) <= set(docs.REASONS)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks/results").glob("*.json")), ids=lambda path: path.stem
)
def test_committed_results_have_the_common_shape(path):
    _check(json.loads(path.read_text(encoding="utf-8")))
