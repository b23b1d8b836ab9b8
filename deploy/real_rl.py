"""Stage 3: arms practise on the cluster's policy while the learner learns from what the bridge records."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any

from robot_bridge.policy_link import PolicyLink
from twinrl.core.errors import DeadlineError, RemoteError, TwinRLError

if TYPE_CHECKING:
    from deploy.schedule import Schedule

ATTACH_SECONDS = 60.0  # for the stand-in; a person may take longer to attach a real arm
LEAVE_SECONDS = 20.0


def practise(schedule: Schedule) -> dict[str, Any]:
    """Let the arms practise until the budget of robot minutes is used; returns the learner's summary."""
    job, settings = schedule.job, schedule.config.real_rl
    cluster = schedule.cluster
    link = PolicyLink(job.topology["gateway_internal"], job.run.keys("cluster"))
    link.set_configurations(
        starts(schedule.state.get("failing", [])), parameters={"explore": settings.explore}
    )
    serving = schedule.start(lambda: cluster.robots.run.remote())
    learning = schedule.start(
        lambda: cluster.learner.run.remote(
            "real_rl",
            start="stage2",
            name="stage3",
            updates_per_step=settings.updates_per_step,
            publish_every=settings.publish_every,
            batch_size=settings.batch_size,
            mix=settings.mix,
            options=settings.options,
            max_lag=settings.max_lag,
        )
    )
    attached = _attach(schedule, link)
    try:
        rows = _watch(schedule, link, learning, serving)
        _send_away(job, link, rows)
        _account(schedule, _robots(link) or rows)  # the episode that was under way counts too
    finally:
        if attached:
            job.supervisor.stop("stand-in")
    schedule.stop_actors([cluster.learner])  # it still makes the updates that are due
    summary = schedule.follow([learning], also=[serving], learner_progress=False)[0]
    schedule.stop_actors([cluster.robots])
    schedule.follow([serving])
    link.close()
    return summary


def starts(failing: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Start states for the arm: what fails in the twin, and as many drawn from the whole table."""
    drawn = {"configuration": None, "region": "all"}
    failing = [{"configuration": c, "region": c.get("region", "all")} for c in failing]
    return [*failing, *[drawn] * max(1, len(failing))]


def _attach(schedule: Schedule, link: PolicyLink) -> bool:
    job, config = schedule.job, schedule.config
    if not config.stand_in.attach:
        job.event(
            "info",
            "waiting for a robot: twinrl attach --robot DRIVER --name NAME "
            f"--url {job.topology['gateway']} --key robot.key (copy {job.run.keys_folder}/robot.key)",
        )
        return False
    job.attach_stand_in(seed=config.seed + 31)
    deadline = time.monotonic() + ATTACH_SECONDS
    while _nobody(_robots(link)):
        job.supervisor.check()
        if time.monotonic() > deadline:
            log = job.run.logs / "stand-in.log"
            words = log.read_text(errors="replace")[-1500:] if log.exists() else ""
            raise DeadlineError(
                f"the stand-in did not attach within {ATTACH_SECONDS:g} s; its last words:\n{words}"
            )
        time.sleep(0.2)
    return True


def _watch(
    schedule: Schedule, link: PolicyLink, learning: dict[str, Any], serving: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return when the arms have used the budget; keeps minutes and takeovers in the schedule's state."""
    settings, job = schedule.config.real_rl, schedule.job
    rows: list[dict[str, Any]] = []
    saved = time.monotonic()
    idle, told, lag = 0.0, False, 0
    while True:
        schedule.poll([learning, serving])
        rows = _robots(link) or rows
        if _lag(rows) != lag:
            lag = _lag(rows)
            schedule.cluster.learner.hear_lag.remote(lag)  # nobody waits for it
        minutes = _account(schedule, rows)
        episodes = sum(row["episodes"] for row in rows)
        job.progress.update(
            min(1.0, minutes / settings.robot_minutes),
            minutes=round(minutes, 1),
            episodes=episodes,
            takeovers=schedule.state["takeovers"],
        )
        if minutes >= settings.robot_minutes:
            return rows
        if learning["done"]:  # it ends only when told to
            raise TwinRLError("the learner ended before the robot's budget was used")
        if _nobody(rows):
            idle = idle or time.monotonic()
            if time.monotonic() - idle > ATTACH_SECONDS and not told:
                told = True
                job.event("warning", "no robot is attached; the budget waits for one")
        else:
            idle, told = 0.0, False
        if time.monotonic() - saved > 10:
            saved = time.monotonic()
            schedule.save()
        time.sleep(0.25)


def _account(schedule: Schedule, rows: list[dict[str, Any]]) -> float:
    """Keep what the arms have used; returns the minutes."""
    minutes = sum(row["minutes"] for row in rows)
    schedule.state["robot_minutes"] = round(minutes, 2)
    schedule.state["takeovers"] = sum(row["takeovers"] for row in rows)
    schedule.state["intervention_minutes"] = round(sum(r["intervention_minutes"] for r in rows), 2)
    steps = sum(row["steps"] for row in rows)
    commanded = sum(row["interventions"] for row in rows)
    schedule.state["intervention_rate"] = round(commanded / steps, 4) if steps else 0.0
    return minutes


def _lag(rows: list[dict[str, Any]]) -> int:
    """Versions that the policy which acts for the arms is behind the newest, at the worst."""
    return max((row["policy_lag"] for row in rows if row["attached"]), default=0)


def _nobody(rows: list[dict[str, Any]]) -> bool:
    """No robot is attached that plays episodes."""
    return not any(row["attached"] and not row["shadow"] for row in rows)


def _send_away(job: Any, link: PolicyLink, rows: list[dict[str, Any]]) -> None:
    """Robots leave after their episode; what they recorded is acknowledged before they go."""
    for row in rows:
        with contextlib.suppress(TwinRLError):
            link.command(row["name"], "detach")
    deadline = time.monotonic() + LEAVE_SECONDS
    while time.monotonic() < deadline and any(row["attached"] for row in _robots(link)):
        time.sleep(0.2)


def _robots(link: PolicyLink) -> list[dict[str, Any]]:
    """The gateway's rows; none while it restarts."""
    try:
        return link.robots()[0]
    except (DeadlineError, RemoteError) as error:
        print(f"gateway: {error}", file=sys.stderr)
        return []
