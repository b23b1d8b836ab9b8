"""What the robot PC and the gateway say to each other, and how they check that they mean the same.

Robot methods (role `robot`), each a request of the bridge; what the cluster wants rides on the answers:

    hello      {name, protocol, software, package}               -> job (see Job)
    attach     {name, kind, writer, session, host, features, dimensions, digest, ...} -> {job, numbering, time}
    heartbeat  {name, session, state}                            -> wishes: {hold, detach, estop, paused, policy}, time
    episode    {name, session, timeout, finished}                -> {start} or {wait: reason}     long poll
    observe    {name, session, episode, step, codec, timeout} + observation
                                                                 -> {version, newest, run} + action, policy.*
                                                                    long poll
                                                                    or {wait: reason}
    segment    {name, session, sequence, offset, total, digest} + data
                                                                 -> {offset}, or after the last piece
                                                                    {acknowledged, repeated}, the service's own,
                                                                    or {missing} (robot_bridge.recent)
    detach     {name, session, finished, state}                  -> {}

Cluster methods (role `cluster`), see `robot_bridge.policy_link` for all but the last three:

    policy_take, policy_give, set_configurations, results, robots, run_state, pause, resume
    command    {action, target}                                  -> {}; target: a robot, absent for the run's
    robot      {robot}                                           -> {robot: its row}
    camera     {robot, camera}                                   -> {time} + jpeg (n,) uint8

Weights, for holders of any key (robot_bridge.weights_relay; docs/weights.md): weights_offer, weights_chunk
"""

from __future__ import annotations

from typing import Any, NamedTuple, Sequence, Tuple

import twinrl
from twinrl.core.segment import Schema
from twinrl.core.spec import Dimension
from twinrl.installed import ROBOT, WHOLE

PROTOCOL = 2  # of the bridge; raised when a method changes its meaning
SOFTWARE = twinrl.__version__
NOT_ATTACHED = "not attached: "  # how a Rejected begins that attaching again mends
NAME_TAKEN = "name taken: "


class Job(NamedTuple):
    """What a robot must know of the run it joins."""

    run: str
    task: str
    instruction: str
    control_hz: float  # policy steps a second
    chunk: int  # C, steps in an action chunk
    max_steps: int  # control steps until truncation, 0 where the driver knows
    lease_s: float  # silence after which a robot counts as gone
    schema: Schema
    software: str
    observe: str  # how things are seen: "images", or "state" or "relative" by their measured poses
    # What each number of observation.state is; empty where the run does not say.
    dimensions: Tuple[Dimension, ...] = ()
    step: Tuple[float, float] = (0.0, 0.0)  # the longest that the policy may ask for, m and rad
    toggle: float = 0.0  # reward of a step that opens or closes the gripper

    def to_header(self) -> dict[str, Any]:
        """Plain values for the wire."""
        schema = [list(f) if isinstance(f, tuple) else f for f in self.schema]
        dimensions = [list(dimension) for dimension in self.dimensions]
        return dict(self._asdict(), schema=schema, dimensions=dimensions, step=list(self.step))

    @classmethod
    def from_header(cls, header: dict[str, Any]) -> Job:
        """The job that `to_header` described."""
        fields = {name: header[name] for name in cls._fields}
        return make_job(fields.pop("schema"), fields)


class Features(NamedTuple):
    """What a robot's observation consists of."""

    state_dim: int
    cameras: Sequence[str]
    image_size: int  # pixels, height = width

    def digest(self) -> str:
        """The robot's part of the schema's hash: it also covers the columns both sides know of."""
        return Schema(self.state_dim, 0, tuple(self.cameras), self.image_size, 0).digest()


def make_schema(values: Any) -> Schema:
    """Schema from a sequence or a dict, as it arrives over the wire or from a configuration."""
    if isinstance(values, dict):
        values = [values[name] for name in Schema._fields]
    state_dim, privileged_dim, cameras, image_size, chunk = values
    return Schema(int(state_dim), int(privileged_dim), tuple(cameras), int(image_size), int(chunk))


def make_job(schema: Schema | dict[str, Any] | list[Any], job: dict[str, Any]) -> Job:
    """Job from plain values: run, task and instruction; what else Job has, has defaults."""
    schema = make_schema(schema)
    defaults = {"control_hz": 10.0, "max_steps": 0, "lease_s": 5.0, "software": SOFTWARE}
    defaults.update(observe="images", dimensions=(), step=(0.0, 0.0), toggle=0.0)
    fields = {"chunk": schema.chunk, **defaults, **job, "schema": schema}
    fields["dimensions"] = tuple(Dimension(*map(str, d)) for d in fields["dimensions"])
    fields["step"] = tuple(float(limit) for limit in fields["step"])
    return Job(**{name: fields[name] for name in Job._fields})


def features_of(schema: Schema) -> Features:
    """What the job's schema asks of a robot."""
    return Features(schema.state_dim, tuple(schema.cameras), schema.image_size)


def differences(robot: Features, job: Features) -> list[str]:
    """One phrase for each field in which the two sides differ."""
    pairs = zip(Features._fields, robot, job)
    pairs = [
        (name, list(a) if name == "cameras" else a, list(b) if name == "cameras" else b)
        for name, a, b in pairs
    ]
    return [f"{name} is {a} on the robot, {b} in the run" for name, a, b in pairs if a != b]


def version_advice(args: dict[str, Any], run_software: str) -> str:
    """The line that mends a version mismatch of what a robot says of itself; empty when the versions fit."""
    protocol, software = args.get("protocol"), args.get("software")
    if protocol == PROTOCOL and _series(software) == _series(run_software):
        return ""
    return (
        f"this robot runs twinrl {software} (bridge protocol {protocol}), the run {run_software} "
        f"(protocol {PROTOCOL}): {update_advice(args, run_software)}"
    )


def update_advice(args: dict[str, Any], run_software: str) -> str:
    """How the robot of these `args` gets the run's version."""
    package = args.get("package") if args.get("package") in (WHOLE, ROBOT) else WHOLE
    return f"on the robot's PC run  pip install '{package}=={run_software}'"


def _series(version: Any) -> list[str]:
    return str(version).split(".")[:2]
