"""The benchmarks of learner and inference run and give the figures of their tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks are no package of the distribution

from benchmarks import inference, learner  # noqa: E402
from benchmarks._learner_model import measure, peak  # noqa: E402


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


@pytest.mark.timeout(300)
def test_the_learner_is_fed_by_a_real_replay_service(tmp_path):
    report = run("learner", tmp_path / "learner.json", "--rows", "fed")
    assert {(row["algorithm"], row["way"]) for row in report["rows"]} == {
        (algorithm, way) for algorithm in learner.ALGORITHMS for way in learner.WAYS
    }
    wanted = {each.key for each in learner.FIGURES if each.rows == "fed"}
    found = report["figures"]
    assert wanted <= set(found) == set(report["spread"])
    least = min(found[f"updates_vs_bare_{algorithm}"] for algorithm in learner.ALGORITHMS)
    assert found["updates_vs_bare"] == least > 0


def test_a_policy_is_measured_with_and_without_an_optimiser():
    small = {"width": 4, "keypoints": 4, "latent": 16, "hidden": 32}
    whole = measure(small, 4, 0.05)
    passes = measure(small, 4, 0.05, optimised=False)
    assert whole["parameters"] == passes["parameters"] > 1000
    assert whole["gflop"] == passes["gflop"] > 0
    assert whole["updates_per_s"] * 4 == pytest.approx(whole["samples_per_s"])
    assert min(each["act_ms"] for each in (whole, passes)) > 0
    twice = measure(small, 8, 0.05)
    assert twice["gflop"] == pytest.approx(2 * whole["gflop"], rel=0.01)


def test_peaks_are_known_by_the_names_that_torch_gives():
    assert peak("NVIDIA H100 80GB HBM3") == 989e12
    assert peak("NVIDIA H100 PCIe") == 756e12
    assert peak("Some other device") is None


def test_learner_figures_come_from_pairs_of_turns():
    def row(way, number, rate):
        known = {"rows": "fed", "algorithm": "sft", "way": way, "round": number}
        return {**known, "updates_per_s": rate, "updates_per_cpu_s": 2 * rate}

    pairs = ((9.0, 10.0), (30.0, 20.0), (10.0, 20.0))
    rows = [
        row(way, number, rate)
        for number, pair in enumerate(pairs)
        for way, rate in zip(learner.WAYS, pair, strict=True)
    ]
    rows.append({"rows": "presets", "model": "tiny", "round": 0, "parameters": 12345678})
    found, spread = learner.figures(rows)
    assert found["updates_vs_bare"] == found["updates_vs_bare_sft"] == 0.9
    assert spread["updates_vs_bare_sft_cpu"] == [0.5, 1.5]
    assert found["sft_updates_per_s"] == 10.0
    assert found["tiny_parameters"] == 12345678


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


@pytest.mark.parametrize(("module", "known"), [(inference, "batch"), (learner, "presets")])
def test_an_unknown_group_of_rows_is_refused(module, known, capsys):
    with pytest.raises(SystemExit):
        module.main(["--rows", "bach"])
    assert known in capsys.readouterr().err
