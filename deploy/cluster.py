"""Ray: started on this machine or joined by address; the job's actors, named, restartable, with their resources."""

from __future__ import annotations

import logging
import math
import os
import socket
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.inference import InferenceActor
from actors.remote_runner import SingleInference
from actors.robot_actor import RobotActor
from actors.twin_actor import TwinActor
from deploy import factories
from deploy.description import make_schema
from deploy.ray_inference import INFERENCE, RayInference
from deploy.ray_learner import RayLearner
from deploy.ray_weights import STORE, RayWeightSink, RayWeightSource, WeightStore
from deploy.run_folder import RunFolder
from learner.silent import NoSink, silent_reporter
from twinrl.config import Config
from twinrl.core.errors import ConfigError

START_SECONDS = 120.0


def start_ray(config: Config, run: RunFolder) -> None:
    """Join `ray.address` or start Ray here; its namespace is the run's name."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    # Ray's workers are nice by 15: beside any other program a job would all but stop.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # A job that ends on one actor's error tells it once; the others' need no tracebacks of their own.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    common: dict[str, Any] = {
        "namespace": run.name,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    if config.ray.address:
        _probe(config.ray.address)
        try:
            ray.init(address=config.ray.address, **common)
        except Exception as error:  # Ray raises many kinds, from ValueError to ConnectionError
            raise ConfigError(_no_cluster(config.ray.address, error)) from None
        return
    # Logical CPUs: the learner, the robot's actors and the twins take turns more than they compete.
    logical = config.ray.num_cpus or max(
        os.cpu_count() or 1, config.twins.actors + 1 + config.learner.ranks
    )
    ray.init(
        num_cpus=logical,
        object_store_memory=config.ray.object_store_mb << 20,
        include_dashboard=False,
        **common,
    )


def _probe(address: str) -> None:
    """Ray retries an address where nobody listens for minutes: ask first."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in host:  # "auto", "ray://...": Ray knows better
        return
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
    except OSError as error:
        raise ConfigError(_no_cluster(address, error)) from None


def _no_cluster(address: str, error: Exception) -> str:
    return (
        f"cannot join the Ray cluster at {address!r}: {error}. "
        "Is `ray start --head` running there, with the same Python and Ray versions?"
    )


class Cluster:
    """Handles of the job's Ray actors."""

    def __init__(
        self, config: Config, run: RunFolder, topology: dict[str, Any], job: dict[str, Any]
    ) -> None:
        schema = make_schema(job["schema"])
        keys = run.keys("cluster")
        policy_config = job["policy"]
        self.store = self._actor(
            WeightStore,
            STORE,
            str(run.path),
            config.learner.keep_versions,
            num_cpus=0,
            # Beside the gateway, which reads this host's shared memory.
            scheduling_strategy=NodeAffinitySchedulingStrategy(
                ray.get_runtime_context().get_node_id(), soft=True
            ),
        )
        source = RayWeightSource(str(run.path))
        reader = factories.reader_factory(topology, keys, str(run.path), schema)

        def reporter(role: str) -> Any:
            return factories.reporter_factory(topology["metrics"], keys, role)

        def runner(seed: int) -> Any:
            if config.inference.where == "shared":
                return factories.remote_runner_factory(seed)
            return factories.runner_factory(policy_config, seed)

        gpus, ranks = int(ray.cluster_resources().get("GPU", 0)), config.learner.ranks
        on_gpus = bool(gpus) and config.learner.device != "cpu"
        if on_gpus and gpus < ranks:
            raise ConfigError(
                f"learner.ranks is {ranks}, and the cluster has {gpus} GPUs; set learner.device=cpu or fewer ranks"
            )
        shares = gpu_shares(config, gpus - (ranks - 1) if on_gpus else gpus)
        of_learner, of_twin, of_inference = shares
        # A thread that has to share its core holds up the others at every operation.
        free = max(1, ((os.cpu_count() or 1) - config.twins.actors) // ranks)
        learning: dict[str, Any] = {
            "num_cpus": 1,
            "max_concurrency": 3,
            "policy_config": policy_config,
            "instruction": job["instruction"],
            "checkpoints": Path(run.checkpoints),
            "make_reader": reader,
            "seed": config.seed,
            "threads": config.learner.threads or free,
            "device": config.learner.device,
            "precision": config.learner.precision,
        }
        helpers = [
            self._actor(
                RayLearner,
                f"learner-{rank}",
                num_gpus=float(on_gpus),
                make_reporter=silent_reporter,
                sink=NoSink(),
                helper=True,
                **learning,
            )
            for rank in range(1, ranks)
        ]
        self.learner = self._actor(
            RayLearner,
            "learner",
            num_gpus=of_learner,
            make_reporter=reporter("learner"),
            sink=RayWeightSink(str(run.path)),
            helpers=[f"learner-{rank}" for rank in range(1, ranks)],
            **learning,
        )
        self.twins = [
            self._actor(
                TwinActor,
                f"twin-{i}",
                f"twin-{i}",
                num_cpus=1,
                num_gpus=of_twin,
                max_concurrency=3,
                seed=config.seed * 1000 + i,
                task=config.task.name,
                num_envs=config.twins.envs,
                make_env=factories.env_factory(config),
                make_runner=runner(config.seed * 1000 + i),
                make_writer=factories.writer_factory(
                    *(topology, keys, schema),
                    codec=config.replay.codec,
                    when_full=config.replay.when_full,
                ),
                make_reader=reader,
                make_reporter=reporter("actor"),
                weights=source,
                make_retargeter=factories.make_retargeter,
                label_scenes=factories.label_scenes,
            )
            for i in range(config.twins.actors)
        ]
        self.inference = self._actor(
            InferenceActor,
            INFERENCE,
            INFERENCE,
            num_cpus=0,
            num_gpus=of_inference,
            max_concurrency=1000,
            make_runner=factories.runner_factory(
                policy_config,
                config.seed,
                "auto" if of_inference else "cpu",
                config.inference.threads,
            ),
            make_reporter=reporter("inference"),
            weights=source,
            max_rows=config.inference.max_rows,
            deadline=config.inference.deadline_ms / 1e3,
        )
        self.robots = self._actor(
            RobotActor,
            "robots",
            "robots",
            num_cpus=0,
            max_concurrency=4,
            make_link=factories.link_factory(topology["gateway_internal"], keys),
            make_reporter=reporter("robot_actor"),
            infer=SingleInference(RayInference(), config.seed + 500),
        )
        self.everyone = [self.learner, *helpers, *self.twins, self.inference, self.robots]

    def wait_ready(self) -> None:
        """Return when every actor answers; DeadlineError names what is missing."""
        ray.get([actor.ping.remote() for actor in self.everyone], timeout=START_SECONDS)

    @staticmethod
    def _actor(
        kind: type,
        name: str,
        *arguments: Any,
        num_cpus: float,
        num_gpus: float = 0,
        max_concurrency: int = 1,
        scheduling_strategy: Any = "DEFAULT",
        **keywords: Any,
    ) -> Any:
        options = {
            "name": name,
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "max_restarts": -1,
            "max_concurrency": max_concurrency,
            "scheduling_strategy": scheduling_strategy,
        }
        return ray.remote(kind).options(**options).remote(*arguments, **keywords)


def gpu_shares(config: Config, gpus: int) -> tuple[float, float, float]:
    """What the learner, each twin actor, and the inference actor get of `gpus` GPUs.

    Ray hides every GPU from an actor that asks for none. A share below 1 lies on one GPU, so actors are dealt out to whole
    ones; a single GPU is halved between the learner and the others. Inference gets one only where it is shared.
    """
    learner = 1.0 if gpus and config.learner.device != "cpu" else 0.0
    twins = 0 if config.twins.device == "cpu" else config.twins.actors
    inference = int(gpus > 0 and config.inference.where == "shared")
    if twins and not gpus:
        raise ConfigError(
            f"twins.device is {config.twins.device!r}, and the cluster has no GPU; set twins.device=cpu"
        )
    if not twins + inference:
        return learner, 0.0, 0.0
    if learner and gpus == 1:
        learner, share = 0.5, math.floor(0.5 / (twins + inference) * 1e4) / 1e4
    else:
        share = math.floor(1e4 / math.ceil((twins + inference) / (gpus - int(learner)))) / 1e4
    return learner, share if twins else 0.0, share if inference else 0.0
