"""`twinrl launch`: the whole topology on one page.

Redis, collector, replay service, gateway and dashboard are operating-system processes; learner, twin actors,
inference and robot actor are Ray actors; a robot dials in by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from dashboard.progress import Progress
from dashboard.server import make_token
from deploy import shards
from deploy.description import describe_job
from deploy.memory import Memory
from deploy.processes import Supervisor
from deploy.run_folder import RunFolder
from twinrl.config import Config, RedisConfig, ReplayConfig, load_config
from twinrl.core.errors import ConfigError, DeadlineError, RemoteError, TwinRLError
from twinrl.core.metrics import Reporter
from twinrl.core.sockets import free_port, wait_until
from twinrl.weights_slots import remove_abandoned, slots_folder


class Job:
    """Everything that runs for one job; `close` ends it all and leaves a run that can be resumed."""

    def __init__(self, config: Config, run: RunFolder) -> None:
        self.config, self.run = config, run
        self.topology = self._plan()
        self.progress = Progress(f"{self.topology['dashboard']}/?token={make_token(run.path)}")
        self.supervisor = Supervisor(run.logs, self._on_event)
        self.reporter: Reporter | None = None
        self.cluster: Any = None
        self.memory = Memory()
        self._link: Any = None
        self._looked, self._paused, self._checkpoints = 0.0, False, 0
        self._ray = False

    def start(self) -> None:
        """Start every process, in the order in which they need each other."""
        run, topology = self.run, self.topology
        remove_abandoned()
        shutil.rmtree(slots_folder(run.path), ignore_errors=True)  # of a launch that was killed
        self.progress.stage("starting", 6, "steps")
        self.supervisor.start("collector", "collector", "--run", str(run.path))
        self.progress.update(1)
        for name in ("replay", "gateway", "dashboard"):
            self.supervisor.start(name, name, "--run", str(run.path))
        beside = shards.local_numbers(topology)
        for number in beside:
            arguments = ("--run", str(run.path), "--shard", str(number))
            self.supervisor.start(shards.role_of(number), "replay", *arguments)
        self.reporter = Reporter(
            topology["metrics"], run.keys("cluster"), "run", "launch", self._stats
        )
        self._stage_name, self._stage_share = "starting", 0.0
        self.progress.update(2)
        self._wait_for("replay", topology["replay"], "info")
        for name in map(shards.role_of, beside):
            self._wait_for(name, topology["roles"][name]["address"], "info")
        self._wait_for("gateway", topology["gateway_internal"], "robots")
        self.progress.update(3)
        from deploy.cluster import Cluster, start_ray

        start_ray(self.config, run)
        handle_signals()  # Ray has put handlers of its own in place
        self._ray = True
        self.progress.update(4)
        self.cluster = Cluster(self.config, run, topology, topology["job"])
        self.cluster.wait_ready()
        self.progress.update(6)

    def attach_stand_in(self, seed: int) -> None:
        """Attach the simulated arm as an operating-system process of its own, over TCP like any robot."""
        stand_in = self.config.stand_in
        command = [
            *(
                sys.executable,
                "-m",
                "twinrl.main",
                "attach",
                "--robot",
                "sim",
                "--name",
                "stand-in",
            ),
            *("--url", self.topology["gateway"]),
            *("--key", str(self.run.keys_folder / "robot.key"), "--robot-option", "rearm_s=2"),
            *("--speed", f"{stand_in.speed:g}", "--operator", stand_in.operator),
            *("--spool", str(self.run.path / "spool"), "--seed", str(seed)),
        ]
        for limit, value in stand_in.limits.items():
            command += ["--limit", f"{limit}={value:g}"]
        if stand_in.operator == "scripted":
            settings = self.config.real_rl
            command += ["--takeovers", str(settings.takeovers)]
            command += ["--operator-option", f"slow_after={settings.slow_after}"]
        self.supervisor.run("stand-in", command, may_leave=True)

    def obey_page(self) -> None:
        """Hand on what people ask for on the page: pause, resume, a checkpoint. Looks once a second."""
        now = time.monotonic()
        if self.cluster is None or now - self._looked < 1.0:
            return
        self._looked = now
        if self._link is None:
            from robot_bridge.policy_link import PolicyLink

            self._link = PolicyLink(
                self.topology["gateway_internal"], self.run.keys("cluster"), timeout=2.0
            )
        with contextlib.suppress(DeadlineError, RemoteError):  # a gateway that restarts
            state = self._link.run_state()
            if state["paused"] != self._paused:
                self._paused = state["paused"]
                for actor in (self.cluster.learner, *self.cluster.twins):
                    actor.pause.remote(self._paused)
                self.event("info", "paused from the page" if self._paused else "going on")
            if state["checkpoints"] > self._checkpoints:
                self.cluster.learner.ask_checkpoint.remote()
                self.event("info", "a checkpoint was asked for on the page")
            self._checkpoints = state["checkpoints"]

    def event(self, level: str, text: str) -> None:
        """Tell everybody: the record, the page and the terminal."""
        self._on_event(level, text)

    def at(self, stage: str, share: float) -> None:
        """Which stage the job is in and how far the whole is (0..1)."""
        self._stage_name, self._stage_share = stage, share

    def close(self, failed: bool = False) -> None:
        """End everything within 10 s: actors first, then the processes they write to; the replay service ends its Redis."""
        if self.cluster is not None:
            import ray

            for actor in self.cluster.everyone:
                with contextlib.suppress(Exception):
                    actor.stop.remote()
            with contextlib.suppress(Exception):
                ray.wait([a.close.remote() for a in self.cluster.twins], timeout=1.5)
        if self._ray:
            import ray

            ray.shutdown()
            shutil.rmtree(slots_folder(self.run.path), ignore_errors=True)
        if self._link is not None:
            self._link.close()
        if self.reporter is not None:
            self.reporter.close()
        self.supervisor.close()
        self.progress.close(failed=failed)

    def _plan(self) -> dict[str, Any]:
        """Addresses and each role's plain values; ports of a run stay the same when it is resumed."""
        config, run = self.config, self.run
        with contextlib.suppress(ConfigError):
            topology = run.topology()
            topology["job"] = describe_job(config)
            return topology
        local = f"tcp://{config.services_host}"
        job = describe_job(config)
        metrics, query = f"{local}:{free_port()}", f"{local}:{free_port()}"
        replay, internal = f"{local}:{free_port()}", f"{local}:{free_port()}"
        gateway_port = config.gateway.port or free_port()
        gateway = f"tcp://{config.gateway.host}:{gateway_port}"
        page_port = config.dashboard.port or free_port()
        folder = str(run.path)
        topology = {
            "metrics": metrics,
            "query": query,
            "replay": replay,
            "gateway": gateway,
            "gateway_internal": internal,
            "dashboard": f"http://{config.dashboard.host}:{page_port}",
            "job": job,
            "command": sys.argv,
            "roles": {
                "collector": {
                    "run_dir": folder,
                    "metrics_address": metrics,
                    "query_address": query,
                },
                "replay": {
                    "run_dir": folder,
                    "address": replay,
                    "redis_url": config.redis.url or "",
                    "redis_access": _redis_access(config.redis),
                    "redis_memory_mb": config.replay.redis_memory_mb,
                    "store": config.replay.store,
                    "cache_mb": config.replay.cache_mb,
                    "adopt": config.redis.adopt,
                    "schema": job["schema"],
                    "flush": config.replay.flush,
                    "limiter": {
                        "samples_per_insert": config.replay.samples_per_insert,
                        "min_size": config.replay.min_size,
                        "largest_batch": config.real_rl.batch_size * config.task.chunk,
                    },
                    "capacity": _capacity(config.replay),
                    "remover": config.replay.remover,
                    "lease": config.replay.lease_seconds,
                    "metrics_address": metrics,
                },
                "gateway": {
                    "run_dir": folder,
                    "address": gateway,
                    "internal_address": internal,
                    "replay_address": replay,
                    "schema": job["schema"],
                    "job": {
                        "run": run.name,
                        "task": config.task.name,
                        "instruction": job["instruction"],
                        "observe": config.task.observe,
                        "control_hz": job["control_hz"],
                        "dimensions": job["dimensions"],
                        "toggle": config.task.reward.get("toggle", 0.0),
                        "step": job["step"],
                        "max_steps": config.real_rl.max_steps,
                    },
                    "metrics_address": metrics,
                },
                "dashboard": {
                    "run_dir": folder,
                    "host": config.dashboard.host,
                    "port": page_port,
                    "query_address": query,
                    "gateway_address": internal,
                },
            },
        }
        roles = topology["roles"]
        roles |= shards.divided(config, roles["replay"], local)
        if config.replay.shards > 1 or config.replay.growable:  # members look for further ones
            topology["shards"] = roles["replay"].get("shards", [])
        run.save_topology(topology)
        return topology

    def _wait_for(self, name: str, address: str, method: str) -> None:
        """Return when the service at `address` answers; its own last words if it cannot."""
        from twinrl.core.sockets import Client

        client = Client(name, address, self.run.keys("cluster"))
        try:

            def answers() -> bool:
                self.supervisor.check()
                future = client.submit(method)
                with contextlib.suppress(Exception):
                    future.result(1.0)
                    return True
                client.forget(future)
                return False

            wait_until(answers, 30.0, f"{name} to answer at {address}")
        except TwinRLError:
            self.supervisor.check()
            log = self.run.logs / f"{name}.log"
            words = log.read_text(errors="replace")[-2000:] if log.exists() else ""
            raise TwinRLError(f"{name} does not start; its last words ({log}):\n{words}") from None
        finally:
            client.close()

    def _stats(self) -> dict[str, Any]:
        return {
            "run/stage": self._stage_name,
            "run/progress": self._stage_share,
            "run/memory_mb": self.memory.measure(),
        }

    def _on_event(self, level: str, text: str) -> None:
        self.progress.line(f"{level}: {text}" if level != "info" else text)
        if self.reporter is not None:
            self.reporter.event(level, text)


def _redis_access(redis: RedisConfig) -> dict[str, str]:
    """How to get into a given Redis, beside its address; files by their full names."""
    names = ("password_file", "tls_ca", "tls_certificate", "tls_key")
    given = {name: getattr(redis, name) for name in names}
    return {name: str(Path(path).resolve()) for name, path in given.items() if path}


def _capacity(replay: ReplayConfig) -> dict[str, int]:
    """Bytes to keep of each source that has a limit."""
    given = {
        "twin": replay.twin_capacity_mb,
        "real": replay.real_capacity_mb,
        "demo": replay.demo_capacity_mb,
    }
    return {source: mb << 20 for source, mb in given.items() if mb is not None}


def command(argv: list[str]) -> int:
    """The command `twinrl launch`."""
    parser = argparse.ArgumentParser(
        prog="twinrl launch",
        description="Start a job from a configuration file, or go on with a run.",
        epilog="examples:\n"
        "  twinrl launch configs/demo.yaml\n"
        "  twinrl launch configs/demo.yaml seed=3 name=seed3 twin_rl.steps=100000\n"
        "  twinrl launch configs/demo.yaml --address ray-head:6379\n"
        "  twinrl launch --resume demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to change")
    parser.add_argument("--resume", metavar="RUN", help="go on with this run (name or folder)")
    parser.add_argument("--address", help="join this Ray cluster instead of starting one")
    parser.add_argument("--dry-run", action="store_true", help="check the configuration and stop")
    arguments = parser.parse_intermixed_args(argv)
    if bool(arguments.config) == bool(arguments.resume):
        parser.error("give a configuration file or --resume RUN")
    if arguments.resume:
        run = RunFolder.open(arguments.resume)
        config = run.config()
        if arguments.overrides:
            raise ConfigError("a resumed run keeps its configuration; overrides are for new runs")
    else:
        overrides = list(arguments.overrides)
        if arguments.address:
            overrides.append(f"ray.address={arguments.address}")
        config = load_config(arguments.config, overrides)
        if arguments.dry_run:
            if config.twins.python is None:  # otherwise only that interpreter knows
                describe_job(config)
            print(f"{arguments.config} is fine: run {config.name!r}, task {config.task.name!r}")
            return 0
        run = RunFolder.create(config)
    return run_job(config, run)


def run_job(config: Config, run: RunFolder) -> int:
    """Start, follow the schedule, report; Ctrl-C and SIGTERM end everything and leave a resumable run."""
    from deploy.schedule import Schedule

    handle_signals()
    began = time.monotonic()
    job = Job(config, run)
    job.event("info", f"run folder: {_short(run.path)}")
    finished = False
    try:
        job.start()
        Schedule(job, began).run()
        finished = True
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough; the end is at most 10 s away
        job.event("warning", f"interrupted; go on with: twinrl launch --resume {run.name}")
        return 130
    except TwinRLError as error:
        job.event("error", str(error))
        job.event(
            "info", f"logs are in {_short(run.logs)}; go on with: twinrl launch --resume {run.name}"
        )
        return 1
    finally:
        job.close(failed=not finished)
    return 0


def handle_signals() -> None:
    """SIGTERM, as from a batch system, ends a job like Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _short(path: Path) -> str:
    with contextlib.suppress(ValueError):
        return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    return str(path)
