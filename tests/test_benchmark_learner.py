"""The benchmarks of learner and inference run and give the figures of their tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks are no package of the distribution

from benchmarks import inference  # noqa: E402


def run(name, file, *arguments):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--tiny", "--json", str(file)]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text())


@pytest.mark.timeout(300)
def test_inference_is_compared_in_real_actors(tmp_path):
    report = run("inference", tmp_path / "inference.json", "--rows", "batch")
    assert {row["where"] for row in report["rows"]} == set(inference.WHERE)
    wanted = {
        each.key for each in inference.FIGURES if each.rows == "batch" and each.key.endswith("k2")
    }
    assert wanted <= set(report["figures"]) == set(report["spread"])
    assert all(row["rows_per_s"] > 0 and row["p99_ms"] >= row["p50_ms"] for row in report["rows"])


def test_ratios_are_taken_within_a_round():
    def row(where, number, rate):
        known = {"rows": "batch", "where": where, "steps": 2, "round": number}
        return {**known, "rows_per_s": rate, "p50_ms": 1.0, "p99_ms": 2.0}

    rates = ((10.0, 20.0), (100.0, 50.0), (10.0, 30.0))
    rows = [
        row(where, number, rate)
        for number, pair in enumerate(rates)
        for where, rate in zip(("actor", "shared"), pair, strict=True)
    ]
    found, spread = inference.figures(rows)
    assert found["shared_vs_actor_k2"] == 2.0
    assert spread["shared_vs_actor_k2"] == [0.5, 3.0]


def test_an_unknown_group_of_rows_is_refused(capsys):
    with pytest.raises(SystemExit):
        inference.main(["--rows", "bach"])
    assert "batch" in capsys.readouterr().err
