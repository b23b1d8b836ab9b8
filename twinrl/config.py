"""Configuration: typed sections, one YAML file, `a.b=c` overrides. Unknown keys are refused with the nearest match."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from twinrl.core.codec import check_codec
from twinrl.core.errors import ConfigError
from twinrl.core.gripper import GripperKind


class Section(BaseModel):
    """A group of settings; immutable, and strict about names."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskConfig(Section):
    """What is learned."""

    name: str = Field("pick-and-place", description="task, one of `twins.TASKS`")
    cameras: tuple[str, ...] | None = Field(
        None,
        description="cameras of the observation; when absent side and wrist, or what a simulator's own task has",
    )
    observe: Literal["images", "state", "relative"] = Field(
        "images",
        description="how things are seen: by cameras, or without any by their measured poses, in the arm's frame or "
        "from the hand (privileged on a real arm, unless something measures them)",
    )
    image_size: int = Field(64, ge=16, le=512, description="height and width of each image, pixels")
    chunk: int = Field(4, ge=1, le=64, description="C, control steps in an action chunk")
    instruction: str | None = Field(
        None, description="what the policy is told; the task's own when absent"
    )
    errands: tuple[str, ...] | None = Field(
        None,
        description="those of the task's errands that episodes ask for; all when absent (docs/language.md)",
    )
    reward: dict[str, float] = Field(
        {},
        description="weights of the task's dense reward terms, beside success: 1 (docs/tasks.md)",
    )
    regions: dict[str, dict[str, dict[str, tuple[float, float]]]] = Field(
        {},
        description="further regions of resets: name: {thing: {x: [low, high], y: ..., yaw: ...}}, m and rad",
    )


class RedisConfig(Section):
    """Where the replay service keeps its index (docs/replay.md)."""

    url: str | None = Field(
        None,
        description="redis, rediss, unix, redis+sentinel or redis+cluster address; embedded when absent",
    )
    password_file: str | None = Field(
        None, description="file with the password, for a url without one"
    )
    tls_ca: str | None = Field(
        None, description="certificate of the server's authority, PEM; the system's when absent"
    )
    tls_certificate: str | None = Field(None, description="this client's own certificate, PEM")
    tls_key: str | None = Field(None, description="its key, PEM")
    shard_urls: tuple[str, ...] = Field(
        (),
        description="addresses for replay services 1, 2, ...; url, or one embedded in each, when absent",
    )
    adopt: bool = Field(
        False, description="with store redis: go on with a run whose folder, or host, is lost"
    )


class RayConfig(Section):
    """The cluster."""

    address: str | None = Field(None, description="a running cluster's address; local when absent")
    num_cpus: int | None = Field(None, ge=1, description="logical CPUs of a local cluster")
    object_store_mb: int = Field(800, ge=80, description="local cluster's object store, MB")


class ReplayConfig(Section):
    """The replay service (docs/replay.md)."""

    store: Literal["files", "redis"] = Field(
        "files",
        description="where payload lies: in segment files on the service's host, or in Redis with its index",
    )
    redis_memory_mb: int = Field(
        2048,
        ge=16,
        description="limit of the embedded Redis, MB: the index alone, or with store redis the payload too",
    )
    cache_mb: int = Field(
        4096, ge=8, description="with store redis: segment files kept for readers on the host, MB"
    )
    shards: int = Field(
        1,
        ge=1,
        le=64,
        description="services, each with an index in a Redis, or under keys, of its own (docs/shards.md); "
        "capacities and min_size are divided among them",
    )
    growable: bool = Field(
        False, description="look for services that are added while the job runs; so with shards > 1"
    )
    flush: Literal["everysec", "always", "never"] = Field(
        "everysec",
        description="when payloads are synced: an acknowledged segment survives every process in any case, and the "
        "machine but for its last second, always, or not",
    )
    samples_per_insert: float | None = Field(
        None,
        gt=0,
        description="batch transitions sampled for each one inserted; no limit when absent",
    )

    @field_validator("samples_per_insert")
    @classmethod
    def _counted_in_one_place(cls, value: float | None, info: ValidationInfo) -> float | None:
        several = info.data.get("shards", 1) > 1 or info.data.get("growable")
        if value is not None and several:
            raise ValueError(
                "one service counts its samples and inserts, so it needs shards 1 and growable false: each of "
                "several would see a part, and could hold writers that the others wait for"
            )
        return value

    min_size: int = Field(
        0, ge=0, description="transitions that must be there before any is sampled"
    )
    twin_capacity_mb: int = Field(
        600, ge=1, description="payload kept of source twin, MB; no source pushes out another"
    )
    real_capacity_mb: int | None = Field(
        None, ge=1, description="payload kept of source real, MB; everything when absent"
    )
    demo_capacity_mb: int | None = Field(
        None, ge=1, description="payload kept of source demo, MB; everything when absent"
    )
    remover: Literal["oldest", "lowest_priority"] = Field(
        "oldest", description="which segments of a full source go"
    )
    lease_seconds: float = Field(
        60.0,
        gt=0,
        description="silence after which a writer's open episodes are closed as truncated",
    )
    codec: str = Field(
        "raw",
        description="of camera images that cluster actors write, one of twinrl.core.codec.CODECS",
    )
    _codec = field_validator("codec")(check_codec)
    when_full: Literal["block", "drop_oldest"] = Field(
        "block", description="a writer's full queue waits, or drops its oldest unsent twin segments"
    )


class GripperConfig(Section):
    """How the twins' gripper takes commands: as the arm's does (docs/robots.md)."""

    kind: Literal["binary", "continuous"] = Field(
        "continuous", description="binary: open or closed, with hysteresis"
    )
    close_below: float = Field(0.4, gt=0, lt=1, description="binary: closes when less is wanted")
    open_above: float = Field(0.6, gt=0, lt=1, description="binary: opens when more is wanted")
    step: float = Field(0.0, ge=0, le=1, description="continuous: smaller changes are no command")
    busy_s: float = Field(
        0.0, ge=0, lt=10, description="after a command the next one waits so long, s"
    )

    @model_validator(mode="after")
    def _check(self) -> GripperConfig:
        try:
            GripperKind(**self.model_dump()).checked()
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self


class TwinsConfig(Section):
    """Simulated twin environments."""

    actors: int = Field(2, ge=1, description="Ray actors that roll out")
    envs: int = Field(64, ge=1, description="environments in each actor")
    backend: str = Field(
        "mujoco", description="simulator, one of `twins.backends.BACKENDS` (docs/simulators.md)"
    )
    options: dict[str, Any] = Field({}, description="of the backend")
    python: str | None = Field(
        None,
        description="interpreter of another environment in which the simulator runs, as a process of its own",
    )
    randomisation: Literal["none", "full"] | dict[str, float] = Field(
        "full",
        description="domain randomisation in stage 2: none, full, or the scale of each change from 0 to 1",
    )
    gripper: GripperConfig = GripperConfig()
    device: str = Field(
        "cpu",
        description="cpu or cuda: where images are traced, and with backend mujoco-warp everything is computed; "
        "with cuda each twin actor gets a share of the cluster's GPUs",
    )


class DemonstrationsConfig(Section):
    """Demonstrations in the ID region."""

    episodes: int = Field(
        30,
        ge=0,
        description="successful episodes to collect; 0: no expansion, encoder or SFT either, stage 2 starts untrained",
    )
    noise: float = Field(0.2, ge=0, description="execution noise; labels stay clean")


class ExpansionConfig(Section):
    """Exploration-space expansion: demonstrations re-targeted to placements all over the table."""

    teacher: Literal["retarget", "expert"] = Field(
        "retarget",
        description="who plays them: the re-targeted demonstrations, or, as a control, the scripted expert of the twin",
    )
    episodes: int = Field(150, ge=0, description="successful re-targeted twin episodes to collect")
    noise: float = Field(0.2, ge=0, description="execution noise; labels stay clean")


class PretrainConfig(Section):
    """Vision encoder from labelled twin renders."""

    scenes: int = Field(20_000, ge=64, description="labelled renders")
    steps: int = Field(1500, ge=10, description="gradient steps")
    options: dict[str, Any] = Field({}, description="of learner.algorithms.pretrain")


class SftConfig(Section):
    """Stage 1, and the baseline before it."""

    steps: int = Field(1500, ge=1, description="gradient steps")
    validation: float = Field(
        0.05, ge=0, lt=1, description="share of episodes kept apart, to see overfitting; 0: none"
    )
    options: dict[str, Any] = Field({}, description="of learner.algorithms.sft")


class TwinRlConfig(Section):
    """Stage 2, RL in randomised twins."""

    algorithm: Literal["ppoflow", "chunk_q", "self_imitation"] = Field(
        "ppoflow",
        description="PPOFlow where steps are cheap, off-policy RL where they are dear, or, as a control, SFT on the "
        "policy's own successes",
    )
    steps: int = Field(300_000, ge=0, description="control steps in all twins together")
    round_chunks: int = Field(8, ge=1, description="chunks each environment runs for one update")
    max_lag: int = Field(1, ge=0, description="policy versions that collection may run ahead")
    retry: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of resets that repeat a start from which the policy failed, while there are any",
    )
    action_noise: float = Field(
        0.14, gt=0, description="rms of the exploration in normalised actions, whatever K is"
    )
    options: dict[str, Any] = Field(
        {},
        description="of learner.algorithms.ppoflow, learner.stages.twin_chunk_q or learner.stages.self_imitation",
    )


class RealRlConfig(Section):
    """Stage 3, off-policy RL on the arm with takeovers."""

    algorithm: Literal["chunk_q", "clone"] = Field(
        "chunk_q",
        description="off-policy RL, or, as a control, SFT anew with the takeovers that the run already has",
    )
    robot_minutes: float = Field(8.0, ge=0, description="budget, in the robot's own time")
    takeovers: int = Field(30, ge=0, description="takeovers a scripted operator may make")
    updates_per_step: float = Field(0.5, gt=0, description="updates for each real control step")
    publish_every: int = Field(50, ge=1, description="updates between published versions")
    max_lag: int = Field(
        10,
        ge=0,
        description="versions that the policy acting for the arms may be behind before the next one waits, 10 s at most; "
        "below the arms' `--max-lag`",
    )
    mix: dict[str, float] = Field(
        {"demo": 0.25, "twin": 0.25, "real": 0.5}, description="batch shares by source"
    )
    mining_episodes: int = Field(128, ge=0, description="twin episodes that find failing starts")
    batch_size: int = Field(256, ge=1, description="windows in a batch")
    explore: bool = Field(False, description="add the noise head's exploration on the arm")
    max_steps: int = Field(100, ge=1, description="control steps of an episode, takeover included")
    slow_after: int = Field(45, ge=1, description="steps after which the operator takes over")
    options: dict[str, Any] = Field({}, description="of learner.algorithms.chunk_q")


class EvaluationConfig(Section):
    """Evaluation: the same resets after every stage."""

    episodes: int = Field(200, ge=1, description="resets in each region and world")
    worlds: tuple[str, ...] = Field(
        ("twin", "real"), description="twin, real (the stand-in), real-N (other realities)"
    )
    seed: int = Field(777_000, description="draws the resets; disjoint from training")


class InferenceConfig(Section):
    """Where twin actors get their actions from (docs/inference.md). Arms always ask the inference actor."""

    where: Literal["actor", "shared"] = Field(
        "actor",
        description="actor: each twin actor has the policy in its own process; shared: the inference actor has it, on "
        "a GPU if the cluster has one",
    )
    max_rows: int = Field(
        256, ge=1, le=65536, description="observations in a batch of the inference actor"
    )
    deadline_ms: float = Field(
        2.0, ge=0, description="how long a batch's first request waits for others, ms"
    )
    threads: int = Field(
        1, ge=1, description="torch threads of the inference actor, for free cores of a CPU"
    )


class GatewayConfig(Section):
    """What outside members dial."""

    host: str = Field("127.0.0.1", description="interface to listen on")
    port: int = Field(0, ge=0, le=65535, description="TCP port, 0 picks a free one")


class StandInConfig(Section):
    """The simulated arm that stands in for a real one."""

    attach: bool = Field(True, description="attach one from this machine in stage 3")
    speed: float = Field(6.0, gt=0, description="its clock, 1 = real time")
    operator: Literal["scripted", "none"] = Field("scripted", description="who takes over")
    limits: dict[str, float] = Field(
        default={
            "speed": 0.3,
            "step_rad": 0.2,
            "turn_speed": 2.0,
            "lead_m": 0.15,
            "joint_speed": 6.0,
            "force_n": 60.0,
        },
        description="of its safety filter, where they differ from a real arm's: as fast as the twins' actions are",
    )


class DashboardConfig(Section):
    """The page."""

    host: str = Field("127.0.0.1", description="interface to listen on")
    port: int = Field(8265, ge=0, le=65535, description="TCP port, 0 picks a free one")


class LearnerConfig(Section):
    """The learner's process."""

    device: str = Field(
        "auto",
        description="where the policy is trained: auto takes a GPU where the cluster has one; cpu, cuda",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="of pretraining and SFT: auto is bfloat16 on a GPU; RL computes in float32",
    )
    ranks: int = Field(
        1,
        ge=1,
        description="processes that share pretraining's and SFT's batches (docs/training.md)",
    )
    threads: int = Field(
        0, ge=0, description="torch threads, 0 = the cores that the twin actors leave"
    )
    keep_versions: int = Field(
        3, ge=2, description="newest policy versions that stay in shared memory"
    )


class Config(Section):
    """A job."""

    name: str = Field("demo", pattern=r"^[A-Za-z0-9._-]+$", description="the run's name")
    seed: int = Field(0, ge=0, description="of everything drawn")
    runs: str = Field("runs", description="folder of runs; shared by all hosts of a cluster")
    services_host: str = Field(
        "127.0.0.1", description="this machine's address for actors on other hosts of a cluster"
    )
    task: TaskConfig = TaskConfig()
    redis: RedisConfig = RedisConfig()
    ray: RayConfig = RayConfig()
    replay: ReplayConfig = ReplayConfig()
    twins: TwinsConfig = TwinsConfig()
    policy: dict[str, Any] = Field({}, description="of policies.registry.make_policy")
    inference: InferenceConfig = InferenceConfig()
    learner: LearnerConfig = LearnerConfig()
    demonstrations: DemonstrationsConfig = DemonstrationsConfig()
    expansion: ExpansionConfig = ExpansionConfig()
    pretrain: PretrainConfig = PretrainConfig()
    sft: SftConfig = SftConfig()
    twin_rl: TwinRlConfig = TwinRlConfig()
    real_rl: RealRlConfig = RealRlConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    gateway: GatewayConfig = GatewayConfig()
    stand_in: StandInConfig = StandInConfig()
    dashboard: DashboardConfig = DashboardConfig()

    @field_validator("inference")
    @classmethod
    def _fits_a_batch(cls, value: InferenceConfig, info: ValidationInfo) -> InferenceConfig:
        envs = info.data["twins"].envs if "twins" in info.data else 0
        if value.where == "shared" and envs > value.max_rows:
            raise ValueError(
                f"a twin actor asks for all of its twins.envs={envs} at once, more than max_rows={value.max_rows}"
            )
        return value


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path` and apply `section.key=value` overrides (values are YAML)."""
    try:
        data = yaml.safe_load(Path(path).read_text()) or {}
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {path}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path} must hold settings as `section: ...`, not a {type(data).__name__}"
        )
    for override in overrides:
        _apply(data, override)
    return make_config(data, str(path))


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Nested dicts from `section.key=value` words (values are YAML)."""
    data: dict[str, Any] = {}
    for override in overrides:
        _apply(data, override)
    return data


def make_config(data: dict[str, Any], origin: str = "configuration") -> Config:
    """Config from nested dicts; ConfigError lists every problem at once."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        problems = [_explain(problem) for problem in error.errors()]
    raise ConfigError(f"{origin}: " + "; ".join(problems))


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    *parents, last = key.split(".")
    node = data
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {parent!r} holds a value, not a section")
    node[last] = yaml.safe_load(text)


def _explain(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        return f"{where}: {problem['msg'].removeprefix('Value error, ')} (got {problem.get('input')!r})"
    *parents, name = problem["loc"]
    names = _known_names(parents)
    nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean {'.'.join([*map(str, parents), nearest[0]])!r}?" if nearest else ""
    return f"unknown key {where!r}; {hint or 'known: ' + ', '.join(names)}"


def _known_names(parents: Sequence[Any]) -> list[str]:
    model: Any = Config
    for parent in parents:
        annotation = model.model_fields[parent].annotation
        model = next((t for t in (annotation, *get_args(annotation)) if isinstance(t, type)), model)
    return list(model.model_fields)
