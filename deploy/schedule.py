"""The method, stage by stage: demonstrations, SFT with expansion, twin RL, real RL with takeovers, and evaluation.

Every step is recorded when done, so that a resumed run goes on with the first that is not.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray

from deploy.description import world_options
from deploy.launch import Job
from deploy.results import cells_of, summarise, write_results
from twinrl.core.errors import TwinRLError

Call = Callable[[], Any]
RETRIES = 3  # of a call whose actor died; Ray brings the actor back
RESTART_SECONDS = 30.0  # within which an actor's death is one event
POLL = 0.25  # s
# Stages of the learner.
TWIN_STAGES = {
    "ppoflow": "twin_rl",
    "chunk_q": "twin_chunk_q",
    "self_imitation": "self_imitation",
}
STAND_IN = {"variant": "standin"}
BEGINNING = 512  # observations of random play, from which a policy without demonstrations begins


class Schedule:
    """Runs a job's stages in order. `began` is when the command was given (monotonic seconds)."""

    def __init__(self, job: Job, began: float) -> None:
        self.job, self.config, self.run_folder = job, job.config, job.run
        self.cluster = job.cluster
        self.state = job.run.state()
        self.state.setdefault("wall_s", 0.0)
        self._began, self._earlier = began, self.state["wall_s"]
        self._earlier_core_s = self.state.get("core_s", 0.0)
        self._versions: dict[str, int] = {}

    def run(self) -> None:
        """All stages, then the report."""
        shown: list[tuple[str, str, Callable[[], None]]] = [
            ("demonstrations", "demonstrations and labelled scenes", self._demonstrate),
            ("pretrain", "vision encoder and expansion", self._pretrain),
            ("sft", "SFT baseline", lambda: self._sft("sft", ["demo"])),
            ("stage1", "stage 1: SFT with expansion", self._stage1),
        ]
        untrained = [("stage1", "stage 1: an untrained policy", self._begin)]
        steps = [
            *(shown if self.config.demonstrations.episodes else untrained),
            ("eval-stage1", "evaluating stage 1", lambda: self._evaluate("stage1")),
            ("stage2", "stage 2: RL in twins", self._stage2),
            ("eval-stage2", "evaluating stage 2", lambda: self._evaluate("stage2")),
            ("mining", "mining failing starts", self._mine),
            ("stage3", "stage 3: RL on the arm", self._stage3),
            ("eval-stage3", "evaluating stage 3", lambda: self._evaluate("stage3")),
            ("video", "video", self._video),
        ]
        for i, (name, title, step) in enumerate(steps):
            if name in self.state["done"]:
                continue
            self.job.at(name, i / len(steps))
            self.job.progress.stage(title, 1.0, "")
            began = time.monotonic()
            step()
            self.job.progress.update(1.0)
            self.state["done"].append(name)
            self.state.setdefault("seconds", {})[name] = round(time.monotonic() - began, 1)
            self.save()
        self.job.at("done", 1.0)
        self._report()

    # -- stages ------------------------------------------------------------------------------------------

    def _demonstrate(self) -> None:
        settings, twins = self.config.demonstrations, self.cluster.twins
        expert = twins[0]
        recorded, attempted = self._all(
            [lambda: expert.demonstrate.remote(settings.episodes, settings.noise, **STAND_IN)]
        )[0]
        self.job.event("info", f"{recorded} demonstrations from {attempted} attempts")

    def _pretrain(self) -> None:
        """The learner's encoder while one twin actor after the other expands the demonstrations."""
        settings, expansion, twins = self.config.pretrain, self.config.expansion, self.cluster.twins
        scenes = self._labelled() if self._has_cameras else []
        part = -(-expansion.episodes // len(twins))
        options = {"steps": settings.steps, **settings.options}
        learner = self.cluster.learner
        calls: list[Call] = [lambda: learner.pretrain.remote(options, *scenes)]
        if expansion.episodes:
            calls += [
                (lambda actor=actor: actor.expand.remote(part, expansion.noise, expansion.teacher))
                for actor in twins
            ]
        summary, *expanded = self._all(calls, learner_progress=True)
        recorded, attempted = np.sum(expanded, axis=0) if expanded else (0, 0)
        encoder = f"encoder trained on {summary['scenes']} scenes in {summary['seconds']:.0f} s"
        self.job.event(
            "info",
            f"{encoder if scenes else 'no cameras, so no encoder'}; "
            f"{recorded} re-targeted episodes from {attempted} attempts",
        )

    @property
    def _has_cameras(self) -> bool:
        return bool(self.job.topology["job"]["schema"]["cameras"])

    def _labelled(self) -> list[Any]:
        """References of labelled scenes, a part from each twin actor."""
        twins, randomisation = self.cluster.twins, self.config.twins.randomisation
        share = -(-self.config.pretrain.scenes // len(twins))
        labelling = [
            self.start(
                lambda actor=actor: actor.label.remote(share, randomisation=randomisation),
                keep=True,
            )
            for actor in twins
        ]
        return self.follow(labelling)

    def _begin(self) -> None:
        """A policy that nothing was shown: it knows the range of states and actions, and explores."""
        samples = self._all([lambda: self.cluster.twins[0].sample.remote(BEGINNING)])[0]
        noise = self.config.twin_rl.action_noise
        self._published(
            "stage1", self._learn("begin", name="stage1", action_noise=noise, **samples)
        )

    def _sft(self, name: str, sources: list[str]) -> None:
        settings = self.config.sft
        held_out = {"steps": settings.steps, "validation": settings.validation}
        options = {**held_out, **settings.options}
        summary = self._learn("sft", name=name, sources=sources, options=options)
        self._published(name, summary)

    def _stage1(self) -> None:
        """SFT on the mixture while the twin actors evaluate the baseline."""
        evaluation = self._evaluation_calls("sft")
        self._sft("stage1", ["demo", "twin"])
        self._finish_evaluation("sft", evaluation)

    def _stage2(self) -> None:
        settings, twins = self.config.twin_rl, self.cluster.twins
        if not settings.steps:
            self._carry_over("stage1", "stage2")
            return
        learner = self.cluster.learner
        start_version = ray.get(learner.ping.remote(), timeout=60) + 1
        collecting = [
            self.start(
                lambda actor=actor: actor.collect.remote(
                    start_version=start_version,
                    steps=10 * settings.steps,  # the learner says when it is enough
                    round_chunks=settings.round_chunks,
                    max_lag=settings.max_lag,
                    retry=settings.retry,
                    randomisation=self.config.twins.randomisation,
                )
            )
            for actor in twins
        ]
        learning = self.start(
            lambda: learner.run.remote(
                TWIN_STAGES[settings.algorithm],
                start="stage1",
                name="stage2",
                privileged_dim=self.job.topology["job"]["schema"]["privileged_dim"],
                steps=settings.steps,
                segments=len(twins)
                * self.config.twins.envs,  # a round gives one an environment or more
                max_lag=settings.max_lag + 1,
                action_noise=settings.action_noise,
                options=settings.options,
            )
        )
        summary = self.follow([learning], also=collecting, learner_progress=True)[0]
        self.stop_actors(twins)
        self.follow(collecting)
        self._published("stage2", summary)
        self.job.event(
            "info",
            f"{summary['iterations']} iterations of {settings.algorithm} "
            f"on {summary['transitions']} steps",
        )

    def _carry_over(self, start: str, name: str) -> None:
        """A stage of no length: what was reached before is its result."""
        learner = self.cluster.learner
        summary = self._all([lambda: learner.carry_over.remote(start, name)])[0]
        self._published(name, {**summary, "carried": start})

    def _mine(self) -> None:
        """Starts from which stage 2 fails in randomised twins, for the arm to practise."""
        settings, twins = self.config.real_rl, self.cluster.twins
        if not settings.mining_episodes:
            return
        options = {"randomisation": self.config.twins.randomisation}
        starts = self._all(
            [
                lambda: twins[0].draw.remote(
                    "all",
                    settings.mining_episodes,
                    self.config.evaluation.seed + 500_000,
                    **options,
                )
            ]
        )[0]
        outcomes = self._in_parts("stage2", [(options, starts)])[0]
        failing = [c for c, good in zip(starts, outcomes, strict=True) if not good]
        self.state["failing"] = failing
        self.job.event("info", f"{len(failing)} of {len(starts)} starts fail in randomised twins")

    def _stage3(self) -> None:
        from deploy.real_rl import practise

        if not self.config.real_rl.robot_minutes:
            self._carry_over("stage2", "stage3")
            return
        if self.config.real_rl.algorithm == "clone":
            self._sft("stage3", ["demo", "twin", "real"])
            return
        self._published("stage3", practise(self))

    def _video(self) -> None:
        from deploy.video import record_video

        job = self.job.topology["job"]
        if not self._has_cameras:
            self.job.event("info", "no video: the observation has no camera")
            return
        record_video(self.config, self.run_folder, job)

    # -- evaluation --------------------------------------------------------------------------------------

    def _evaluate(self, stage: str) -> None:
        carried = self.state["summaries"][stage].get("carried")
        if carried is None:
            self._finish_evaluation(stage, self._evaluation_calls(stage))
            return
        for row in cells_of(self.run_folder.evaluation_rows()).values():  # the same weights
            if row["stage"] == carried:
                self.run_folder.append_evaluation({**row, "stage": stage})

    def _cells(self) -> list[tuple[str, str, dict[str, Any]]]:
        return [
            (world, region, world_options(world))
            for world in self.config.evaluation.worlds
            for region in self.job.topology["job"]["regions"]
        ]

    def _starts(self, region: str, options: dict[str, Any]) -> list[dict[str, Any]]:
        """The evaluation resets of a cell: drawn once, the same after every stage."""
        key = f"{region}-{options.get('variant', 'twin')}"
        starts = self.state.setdefault("evaluation_starts", {})
        if key not in starts:
            settings, actor = self.config.evaluation, self.cluster.twins[0]
            starts[key] = self._all(
                [lambda: actor.draw.remote(region, settings.episodes, settings.seed, **options)]
            )[0]
        return starts[key]

    def _evaluation_calls(self, stage: str) -> list[Any]:
        version = self._version(stage)
        ray.get(self.cluster.store.keep.remote(version, True), timeout=60)
        cells = [(options, self._starts(region, options)) for _, region, options in self._cells()]
        return self._parts(version, cells)

    def _parts(self, version: int, cells: list[Any]) -> list[Any]:
        """Each twin actor gets every n-th reset of each cell."""
        n = len(self.cluster.twins)
        return [
            self.start(
                lambda i=i, actor=actor: actor.evaluate.remote(
                    version, [(options, starts[i::n]) for options, starts in cells]
                )
            )
            for i, actor in enumerate(self.cluster.twins)
        ]

    def _merge(self, cells: int, parts: list[Any]) -> list[np.ndarray]:
        n = len(parts)
        merged = []
        for k in range(cells):
            outcomes = [part[k].success for part in parts]
            success = np.zeros(sum(map(len, outcomes)), bool)
            for i, outcome in enumerate(outcomes):
                success[i::n] = outcome
            merged.append(success)
        return merged

    def _in_parts(self, stage: str, cells: list[Any]) -> list[np.ndarray]:
        running = self._parts(self._version(stage), cells)
        return self._merge(len(cells), self.follow(running))

    def _finish_evaluation(self, stage: str, running: list[Any]) -> None:
        merged = self._merge(len(self._cells()), self.follow(running))
        version, placed = self._version(stage), self.job.topology["job"].get("placed")
        for (world, region, options), success in zip(self._cells(), merged, strict=True):
            starts = self._starts(region, options)
            self.run_folder.append_evaluation(
                {
                    "stage": stage,
                    "world": world,
                    "region": region,
                    "n": len(success),
                    "successes": success.astype(int).tolist(),
                    "placements": [start[placed][:2] for start in starts] if placed else [],
                    "policy_version": version,
                }
            )
        if stage != "stage2":  # mining still asks for stage 2
            ray.get(self.cluster.store.keep.remote(version, False), timeout=60)
        text, figures = summarise(stage, self.run_folder.evaluation_rows())
        self.job.event("info", text)
        self.job.reporter.stats(figures)

    # -- calls -------------------------------------------------------------------------------------------

    def _learn(self, stage: str, **arguments: Any) -> dict[str, Any]:
        learner = self.cluster.learner
        return self._all([lambda: learner.run.remote(stage, **arguments)], learner_progress=True)[0]

    def _published(self, name: str, summary: dict[str, Any]) -> None:
        self.state.setdefault("versions", {})[name] = summary["version"]
        self.state.setdefault("summaries", {})[name] = summary
        self._versions[name] = summary["version"]
        ray.get(self.cluster.store.keep.remote(summary["version"], True), timeout=60)
        self.save()

    def _version(self, stage: str) -> int:
        """The published version of a stage's policy; a resumed run publishes its checkpoint again."""
        if stage not in self._versions:
            learner = self.cluster.learner
            self._versions[stage] = ray.get(learner.republish.remote(stage), timeout=60)
            ray.get(self.cluster.store.keep.remote(self._versions[stage], True), timeout=60)
        return self._versions[stage]

    def stop_actors(self, actors: list[Any]) -> None:
        """Ask actors to end what they do."""
        ray.wait([actor.stop.remote() for actor in actors], num_returns=len(actors), timeout=10)

    def start(self, call: Call, keep: bool = False) -> dict[str, Any]:
        """Make a call, to be followed. `keep`: its result stays in the object store, as a reference."""
        return {
            "call": call,
            "ref": call(),
            "keep": keep,
            "done": False,
            "result": None,
            "failures": 0,
            "again_at": -RESTART_SECONDS,
        }

    def _all(self, calls: list[Call], learner_progress: bool = False) -> list[Any]:
        return self.follow([self.start(c) for c in calls], learner_progress=learner_progress)

    def follow(
        self,
        running: list[dict[str, Any]],
        also: list[dict[str, Any]] | None = None,
        learner_progress: bool = False,
    ) -> list[Any]:
        """Results of all `running` calls. A call whose actor died is made again, `also` is kept running."""
        calls = [*running, *(also or [])]
        while not all(call["done"] for call in running):
            self.poll(calls)
            waiting = [call["ref"] for call in calls if call["ref"] is not None]
            ray.wait(waiting, num_returns=1, timeout=POLL) if waiting else time.sleep(POLL)
            if learner_progress:
                share = self._learner_progress()
                if share is not None:
                    self.job.progress.update(share)
        return [call["result"] for call in running]

    def poll(self, calls: list[dict[str, Any]]) -> None:
        """Look after `calls` without waiting: take results, make calls again, hear what the page wants."""
        self.job.supervisor.check()
        self.job.obey_page()
        for call in calls:
            if call["done"]:
                continue
            if call["ref"] is None:
                if time.monotonic() > call["again_at"]:
                    call["ref"] = call["call"]()
                continue
            if not ray.wait([call["ref"]], timeout=0)[0]:
                continue
            try:
                value = ray.get(call["ref"])
            except ray.exceptions.RayActorError as error:
                self._again(call, error)
            except ray.exceptions.RayTaskError as error:
                raise TwinRLError(_plain(error)) from None
            else:
                call["result"] = call["ref"] if call["keep"] else value
                call["done"], call["ref"] = True, None

    def _again(self, call: dict[str, Any], error: Exception) -> None:
        """Make a call again a little later: Ray brings its actor back meanwhile."""
        now = time.monotonic()
        if now - call["again_at"] > RESTART_SECONDS:  # not just the same death, seen once more
            call["failures"] += 1
            self.job.event("warning", f"an actor died and is brought back: {_first_line(error)}")
        if call["failures"] > RETRIES:
            raise TwinRLError(f"an actor died {call['failures']} times in the same call: {error}")
        call["ref"], call["again_at"] = None, now + 1.0

    def _learner_progress(self) -> float | None:
        try:
            return ray.get(self.cluster.learner.progress.remote(), timeout=1.0)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            return None

    # -- the end -----------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the state to the run's folder."""
        self.state["wall_s"] = self._earlier + time.monotonic() - self._began
        peak = max(self.state.get("peak_memory_mb", 0.0), self.job.memory.peak)
        self.state["peak_memory_mb"] = round(peak)
        self.state["core_s"] = round(self._earlier_core_s + self.job.memory.core_seconds, 1)
        self.run_folder.save_state(self.state)

    def _report(self) -> None:
        from dashboard.report import write_report

        self.save()
        table = write_results(self.run_folder, self.state, self.job.topology["command"])
        path = write_report(self.run_folder.path)
        self.job.progress.close()
        print(f"\n{table}\n\nreport  {path}", flush=True)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def _plain(error: ray.exceptions.RayTaskError) -> str:
    """A deliberate error's sentence; otherwise the actor's own traceback, without the terminal's colours."""
    if isinstance(error.cause, TwinRLError):
        return str(error.cause)
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error))
