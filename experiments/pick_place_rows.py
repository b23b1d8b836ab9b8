"""What `experiments.pick_place` runs: jobs, each a `twinrl launch` of its own, and the rows that are read off them."""

from __future__ import annotations

from typing import NamedTuple

STATE_CONFIG, IMAGE_CONFIG = "configs/pick_place_state.yaml", "configs/demo.yaml"
LAST_SHARED = "eval-stage1"  # what a job that goes on from another has in common with it
NO_TWIN_RL = "twin_rl.steps=0"
NO_ARM = ("real_rl.robot_minutes=0", "real_rl.mining_episodes=0")
# Settings as in experiments/off_policy.py: where SFT fails nearly everywhere there is little to be anchored to.
FROM_SHOWN = (
    *("expansion.episodes=0", NO_TWIN_RL, "real_rl.mix={demo: 0.5, real: 0.5}"),
    *("real_rl.updates_per_step=1.0", "real_rl.batch_size=128"),
)
LEARNING = "offline_updates: 500, anchor: 0.0, actor_learning_rate: 0.001"


class Job(NamedTuple):
    """One run for each seed: `config` with `overrides`, from nothing, or on from the start that job `after` made."""

    name: str
    config: str
    overrides: tuple[str, ...]
    after: str | None = None
    redo: str = LAST_SHARED  # of the job that it goes on from, the last stage that is not done anew


class Row(NamedTuple):
    """A line of the table: what a job's checkpoint of `stage` reaches."""

    name: str
    text: str
    job: str
    stage: str
    privileged: str


STATE_JOBS = (
    Job("start", STATE_CONFIG, (NO_TWIN_RL, *NO_ARM)),
    Job("ppoflow", STATE_CONFIG, NO_ARM, "start"),
    Job("no_randomisation", STATE_CONFIG, ("twins.randomisation=none", *NO_ARM), "start"),
    Job(
        "self_imitation",
        STATE_CONFIG,
        ("twin_rl.algorithm=self_imitation", "twin_rl.options={}", *NO_ARM),
        "start",
    ),
    Job("k1", STATE_CONFIG, ("policy.integration_steps=1", *NO_ARM), "start"),
    Job(
        "k10",
        STATE_CONFIG,
        ("policy.integration_steps=10", "twin_rl.options.ratio_power=0.2", *NO_ARM),
        "start",
    ),
    Job(
        "expert",
        STATE_CONFIG,
        (
            "expansion.teacher=expert",
            "expansion.episodes=1500",
            "sft.steps=25000",
            NO_TWIN_RL,
            *NO_ARM,
        ),
    ),
    Job("relative", STATE_CONFIG, ("task.observe=relative", NO_TWIN_RL, *NO_ARM)),
    Job("shown", STATE_CONFIG, ("expansion.episodes=0", NO_TWIN_RL, *NO_ARM)),
    Job("offpolicy", STATE_CONFIG, (*FROM_SHOWN, f"real_rl.options={{{LEARNING}}}"), "shown"),
    Job(
        "dagger",
        STATE_CONFIG,
        (*FROM_SHOWN, f"real_rl.options={{improvement: none, {LEARNING}}}"),
        "shown",
    ),
    Job(
        "clone",
        STATE_CONFIG,
        (*FROM_SHOWN, "real_rl.algorithm=clone"),
        "offpolicy",
        "mining",
    ),
)
POSES = "poses (noisy)"  # instead of images
STATE_ROWS = (
    Row("sft", "SFT, 30 ID demonstrations", "start", "sft", POSES),
    Row("stage1", "+ re-targeted expansion", "start", "stage1", POSES),
    Row("ppoflow", "+ PPOFlow, K = 4", "ppoflow", "stage2", f"{POSES}; critic: true state"),
    Row(
        "no_randomisation",
        "+ PPOFlow, no randomisation",
        "no_randomisation",
        "stage2",
        f"{POSES}; critic: true state",
    ),
    Row("self_imitation", "+ self-imitation, equal steps", "self_imitation", "stage2", POSES),
    Row("k1", "+ PPOFlow, K = 1", "k1", "stage2", f"{POSES}; critic: true state"),
    Row("k10", "+ PPOFlow, K = 10", "k10", "stage2", f"{POSES}; critic: true state"),
    Row(
        "expert",
        "expert cloned everywhere",
        "expert",
        "stage1",
        f"{POSES}; expert in OOD",
    ),
    Row("relative_sft", "SFT, features from the hand", "relative", "sft", POSES),
    Row("relative", "+ re-targeted expansion", "relative", "stage1", POSES),
    Row("clone", "SFT + clone of off-policy's takeovers", "clone", "stage3", f"{POSES}; operator"),
    Row("dagger", "SFT + HG-DAgger, 40 takeovers", "dagger", "stage3", f"{POSES}; operator"),
    Row(
        "offpolicy",
        "SFT + off-policy RL, 40 takeovers",
        "offpolicy",
        "stage3",
        f"{POSES}; operator",
    ),
)

WORLDS = "evaluation.worlds=[twin, real, real-1, real-2, real-3]"
IMAGE_JOBS = (Job("image", IMAGE_CONFIG, (WORLDS, *NO_ARM)),)
LABELS = "encoder: twin labels"
IMAGE_ROWS = (
    Row("image_sft", "SFT, 30 ID demonstrations", "image", "sft", LABELS),
    Row("image_stage1", "+ re-targeted expansion", "image", "stage1", LABELS),
    Row("image", "+ PPOFlow", "image", "stage2", f"{LABELS}; critic: true state"),
)
PLANS = {"state": (STATE_JOBS, STATE_ROWS), "images": (IMAGE_JOBS, IMAGE_ROWS)}
# One of each kind, in miniature: a job, one that goes on from it, and the figures.
QUICK = (
    *("twins.envs=8", "demonstrations.episodes=6", "expansion.episodes=6", "sft.steps=30"),
    *("twin_rl.steps=600", "twin_rl.round_chunks=4", "evaluation.episodes=8"),
    *("pretrain.scenes=400", "pretrain.steps=20"),
    *("ray.object_store_mb=200", "evaluation.worlds=[twin]"),
)
QUICK_ROWS = ("sft", "stage1", "ppoflow")


def needed(jobs: tuple[Job, ...], rows: list[Row]) -> list[Job]:
    """The jobs that `rows` are read off, and those that these go on from, in order."""
    by_name = {job.name: job for job in jobs}
    wanted: set[str] = set()
    for row in rows:
        name: str | None = row.job
        while name is not None and name not in wanted:
            wanted.add(name)
            name = by_name[name].after
    return [job for job in jobs if job.name in wanted]


def chosen(rows: tuple[Row, ...], names: list[str] | None) -> list[Row]:
    """The rows called `names`, or all; ValueError names what there is."""
    if names is None:
        return list(rows)
    known = [row.name for row in rows]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown row {name!r}, not one of {known}")
    return [row for row in rows if row.name in names]
