"""The pick-and-place experiment: what is run for a row, how runs go on from copies, and what is said of the results."""

import json

import numpy as np
import pytest

from deploy.run_folder import RunFolder
from experiments import pick_place
from experiments.pick_place_rows import PLANS, STATE_JOBS, STATE_ROWS, Job, chosen, needed
from experiments.statistics import clustered, paired
from twinrl.config import load_config

CELLS = (*pick_place.CELLS, ("real-1", "id"))


def names(jobs):
    return [job.name for job in jobs]


def test_rows_need_their_jobs_and_those_they_go_on_from():
    """In the order in which they can be run; nothing that no row asks for."""
    rows = chosen(STATE_ROWS, ["ppoflow", "clone"])
    assert names(needed(STATE_JOBS, rows)) == ["start", "ppoflow", "shown", "offpolicy", "clone"]
    assert names(needed(STATE_JOBS, chosen(STATE_ROWS, ["sft"]))) == ["start"]
    with pytest.raises(ValueError, match=r"unknown row 'ppo'.*'ppoflow'"):
        chosen(STATE_ROWS, ["ppo"])


@pytest.mark.parametrize("observed", sorted(PLANS))
def test_every_job_has_a_configuration_that_loads_and_every_row_a_job(observed):
    """Rows have names of their own; a job that goes on from another has the same demonstrations."""
    jobs, rows = PLANS[observed]
    by_name = {job.name: job for job in jobs}
    assert len(by_name) == len(jobs) and len({row.name for row in rows}) == len(rows)
    assert {row.job for row in rows} <= set(by_name)
    for job in jobs:
        config = load_config(job.config, job.overrides)
        if job.after is not None:
            start = load_config(by_name[job.after].config, by_name[job.after].overrides)
            for section in ("task", "demonstrations", "expansion", "pretrain", "evaluation"):
                assert getattr(config, section) == getattr(start, section), (job.name, section)
            assert names(jobs).index(job.after) < names(jobs).index(job.name)


def test_intervals_know_seeds():
    """Whole seeds are drawn: what differs between seeds widens the interval; equal seeds are like one long list."""
    rng = np.random.default_rng(0)
    alike = rng.random((5, 200)) < 0.8
    apart = np.array([[p] * 200 for p in (0.6, 0.7, 0.8, 0.9, 1.0)]) > rng.random((5, 200))
    same, other = clustered(alike, 2000), clustered(apart, 2000)
    assert same.value == alike.mean() and same.low < 0.8 < same.high
    assert 0.03 < same.high - same.low < 0.08 and 0.15 < other.high - other.low < 0.35
    whole = clustered(np.ones((3, 50)), 100)
    assert whole == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="seeds, resets"):
        clustered(np.ones(7))


def test_gains_are_paired_by_seed_and_reset():
    """What makes a reset hard is in both and cancels; unequal shapes are refused."""
    rng = np.random.default_rng(1)
    theirs = rng.random((4, 300)) < 0.5
    ours = theirs | (rng.random((4, 300)) < 0.1)
    gain = paired(ours, theirs, 2000)
    assert gain.value == pytest.approx((ours & ~theirs).mean())
    assert gain.low > 0 and gain.high - gain.low < 0.04  # unpaired it would be 0.08
    with pytest.raises(ValueError, match="must be equal"):
        paired(ours, theirs[:3])


def test_an_interval_has_a_width_where_all_succeed():
    """A bootstrap of ones only is silent about what was not seen."""
    rate = pick_place.rate(np.ones((2, 100), bool))
    assert rate.value == rate.high == 1.0 and 0.975 < rate.low < 0.99


def make_run(folder, success, stage="stage1", placements=None, transitions=0):
    """A finished run of `stage` that has `success` {cell: outcomes}."""
    run = RunFolder(folder)
    for path in (run.logs, run.checkpoints, folder / "replay", folder / "redis"):
        path.mkdir(parents=True)
    for name in ("pretrained", "sft", "stage1", "stage2", "stage3"):
        (run.checkpoints / f"{name}.pt").write_text(name)
    (folder / "replay" / "000001.seg").write_text("payload")
    (folder / "topology.json").write_text("{}")
    stages = ["sft", "stage1", "eval-stage1", "stage2", "eval-stage2", "mining", "stage3"]
    summaries = {"sft": {}, "stage1": {}, "stage2": {"transitions": transitions}, "stage3": {}}
    run.save_state(
        {
            "done": ["demonstrations", "pretrain", *stages, "eval-stage3", "video"],
            "versions": {"sft": 0, "stage1": 1, "stage2": 9, "stage3": 12},
            "summaries": summaries,
            "evaluation_starts": {"id-twin": [{"seed": 1}]},
            "failing": [{}],
            "takeovers": 3,
            "wall_s": 60.0,
        }
    )
    for (world, region), outcomes in success.items():
        row = {"world": world, "region": region, "successes": list(map(int, outcomes))}
        row |= {"placements": placements or [[0.1, 0.2]] * len(outcomes), "policy_version": 1}
        for name in {"sft", stage}:
            run.append_evaluation({"stage": name, "n": len(outcomes), **row})
    figures = {"core_s": 100.0, "wall_s": 60.0, "takeovers": 3}
    run.report.write_text(json.dumps({"figures": figures}))
    return run


def test_a_run_goes_on_from_a_copy(tmp_path):
    """Of the later stages nothing is left, the settings are the new job's, and resets and payload are the old one's."""
    success = {cell: [1, 0] for cell in CELLS}
    start = make_run(tmp_path / "start-3", success, stage="stage2")
    job = Job("ppoflow", "configs/pick_place_state.yaml", ("twin_rl.steps=777",), "start")
    overrides = [f"runs={tmp_path}", "name=ppoflow-3", "seed=3", *job.overrides]
    pick_place.fork(start.path, tmp_path / "ppoflow-3", job, overrides)
    run = RunFolder.open(tmp_path / "ppoflow-3")
    config, state = run.config(), run.state()
    assert (config.name, config.seed, config.twin_rl.steps) == ("ppoflow-3", 3, 777)
    assert config.task.observe == "state"
    assert state["done"][-1] == "eval-stage1" and "stage2" not in state["done"]
    assert state["versions"] == {"sft": 0, "stage1": 1} and set(state["summaries"]) == {
        "sft",
        "stage1",
    }
    assert state["evaluation_starts"] == start.state()["evaluation_starts"]
    assert "failing" not in state and "takeovers" not in state
    kept = {path.stem for path in run.checkpoints.glob("*.pt")}
    assert kept == {"pretrained", "sft", "stage1"}
    assert {row["stage"] for row in run.evaluation_rows()} == {"sft"}
    assert (run.path / "replay" / "000001.seg").read_text() == "payload"
    assert not (run.path / "topology.json").exists() and not run.report.exists()
    assert start.report.exists() and (start.checkpoints / "stage2.pt").exists()


def test_finished_jobs_are_not_run_again_and_others_are_resumed(tmp_path, monkeypatch):
    """Without a report there is something to do; a job that goes on from another waits for it."""
    launched = []
    monkeypatch.setattr(pick_place, "_launch", lambda *arguments: launched.append(arguments))
    jobs = {job.name: job for job in STATE_JOBS}
    make_run(tmp_path / "start-0", {cell: [1] for cell in CELLS})
    pick_place.run_job(jobs["start"], jobs, 0, tmp_path, [])
    assert launched == []
    pick_place.run_job(jobs["ppoflow"], jobs, 0, tmp_path, ["ray.object_store_mb=100"])
    assert launched == [("--resume", str(tmp_path / "ppoflow-0"))]
    assert RunFolder.open(tmp_path / "ppoflow-0").config().ray.object_store_mb == 100
    pick_place.run_job(jobs["ppoflow"], jobs, 0, tmp_path, [])
    assert launched[1] == launched[0]
    pick_place.run_job(jobs["start"], jobs, 1, tmp_path, ["evaluation.episodes=4"])
    config, *rest = launched[2]
    assert config == jobs["start"].config and {"name=start-1", "seed=1"} <= set(rest)
    assert {"twin_rl.steps=0", "evaluation.episodes=4"} <= set(rest)


def test_what_is_said_of_the_results(tmp_path):
    """Rates of each cell, the mean of the arm's two, paired gains, costs; a picture; other resets are refused."""
    rows = chosen(STATE_ROWS, ["stage1", "ppoflow"])
    for seed in (0, 1):
        worse = {cell: [1, 0] * 50 for cell in CELLS} | {("real-1", "id"): [1] * 100}
        better = {cell: [1, 1, 1, 0] * 25 for cell in CELLS}
        make_run(tmp_path / f"start-{seed}", worse)
        make_run(tmp_path / f"ppoflow-{seed}", better, stage="stage2", transitions=5000 + seed)
    results = {row.name: pick_place.measured(row, [0, 1], tmp_path) for row in rows}
    pick_place.check_resets(results)
    figures = pick_place.summarise(results)
    assert figures["stage1_id"] == 0.5 and figures["ppoflow_ood"] == 0.75
    assert figures["stage1_real"] == pytest.approx(2 / 3) and figures["stage1_real_1_id"] == 1.0
    assert figures["ppoflow_real"] == 0.75 and figures["ppoflow_real_id"] == 0.75
    assert pick_place.key_of("image", "real-2", "ood") == "image_real_2_ood"
    assert figures["ppoflow_id_low"] < 0.75 < figures["ppoflow_id_high"]
    assert figures["ppoflow_vs_stage1"] == 0.25 and figures["ppoflow_vs_stage1_low"] > 0.1
    assert results["ppoflow"]["twin_steps"] == [5000, 5001] and results["stage1"]["twin_steps"] == [
        0,
        0,
    ]
    text = pick_place.table(rows, results, figures)
    assert "2 seeds, the same 100 resets" in text and "critic: true state" in text
    assert "75 [" in text and "+25.0 points" in text
    picture = tmp_path / "rows.png"
    pick_place.plot(rows, figures, picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    elsewhere = [[0.3, 0.3]] * 100
    make_run(tmp_path / "ppoflow-2", better, stage="stage2", placements=elsewhere)
    results["ppoflow"] = pick_place.measured(rows[1], [2], tmp_path)
    with pytest.raises(ValueError, match="other resets than stage1 in twin/id"):
        pick_place.check_resets(results)


@pytest.mark.timeout(900)
def test_two_real_jobs_the_second_on_from_the_first(tmp_path, capfd):
    """The whole command in miniature: launch, go on from a copy, measure both on the same resets, write."""
    file = tmp_path / "result.json"
    arguments = ["--obs", "state", "--quick", "--rows", "stage1", "ppoflow"]
    arguments += [
        "--out",
        str(tmp_path),
        "--json",
        str(file),
        "evaluation.episodes=4",
        "twins.envs=4",
    ]
    pick_place.main(arguments)
    written = json.loads(file.read_text())
    start, trained = written["rows"]
    assert len(start["twin_id"][0]) == len(trained["twin_ood"][0]) == 4
    assert start["twin_steps"] == [0] and trained["twin_steps"][0] >= 600
    assert trained["core_s"][0] > start["core_s"][0] > 5
    assert written["figures"]["ppoflow_id_high"] <= 1.0
    first = RunFolder.open(tmp_path / "start-0").state()
    second = RunFolder.open(tmp_path / "ppoflow-0").state()
    assert first["evaluation_starts"] == second["evaluation_starts"]
    assert first["summaries"]["stage1"] == second["summaries"]["stage1"]
    rows = RunFolder.open(tmp_path / "start-0").evaluation_rows()
    measured = {(row["stage"], row["region"]): row["successes"] for row in rows}
    assert measured["stage2", "id"] == measured["stage1", "id"]  # no RL: the same weights
    assert "ppoflow_vs_stage1" in capfd.readouterr().out
