"""The stand-in for a real arm: a simulated one that takes set-points tick by tick, as an arm's controller does.

What a twin's environment leaves out is here: time goes on whether or not somebody commands, set-points come late, gears
have play, a gripper is busy, contacts trip a reflex, and things lie a little off where they were said to be. Each part
is a number of a *reality*, which a file or a seed chooses (`Reality`).
"""

from __future__ import annotations

import collections
import difflib
from typing import Any, NamedTuple

import numpy as np

from twins import kinematics, make_env, randomise, rotation, scene
from twins.arm import FINGER_RANGE
from twins.env import TwinEnv, clip_action

RATE_HZ = 100.0  # of set-points
TICKS = round(RATE_HZ / scene.CONTROL_HZ)  # of a control step
ONE = np.zeros(1, np.intp)
# What a file may set of `randomise.draw`, as it usually is. (Colours of things are the task's.)
PHYSICS = {k: v for k, v in randomise.STANDIN.items() if k != "thing_colours"}
QUIETEST = 0.5  # image noise from which on no two images are alike
SAME = 1e-3  # openings that differ by less are one


class Reality(NamedTuple):
    """How a stand-in differs from the twin, beside its physics, camera and light (`twins.randomise.STANDIN`).

    The defaults are an arm without faults. `drawn` gives the ranges that a numbered reality is drawn from.
    """

    damping: float = 1.0  # of the joints, 1 = the twin's
    backlash: float = 0.0  # rad, play of each joint's gear
    gripper_s: float = 0.0  # for which a gripper that moves takes no other command
    reflex_n: float = 300.0  # force at the tool that makes the arm stop by itself
    misplaced: float = 0.0  # m, standard deviation of where things lie from where they were said to
    exposure: float = 1.0  # factor on what the cameras see
    image_noise: float = 0.5  # standard deviation of a pixel, of 255: no sensor is quiet
    dropout: float = 0.0  # probability that a camera's frame does not come

    @classmethod
    def drawn(cls, number: int) -> Reality:
        """The arm of reality `number`, the same whenever it is asked for."""
        rng = np.random.default_rng([number, 47])
        return cls(
            damping=float(rng.uniform(0.7, 2.0)),
            backlash=float(rng.uniform(0.0, 0.003)),
            misplaced=float(rng.uniform(0.0, 0.004)),
            exposure=float(rng.uniform(0.85, 1.15)),
            image_noise=float(rng.uniform(QUIETEST, 3.0)),
        )


def split_reality(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of `settings` a `Reality` takes, and what is physics, camera and light; ValueError names what is neither."""
    known = (*Reality._fields, *PHYSICS)
    for name, value in settings.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"a reality has no {name!r}, only {', '.join(known)}{hint}")
        if name in PHYSICS:
            _check_like(name, value, PHYSICS[name])
    own = {name: value for name, value in settings.items() if name in Reality._fields}
    return own, {name: value for name, value in settings.items() if name not in own}


def _check_like(name: str, value: Any, usual: Any) -> None:
    """ValueError unless `value` is made as the usual one is: a number, so many of them, or such by names."""
    if isinstance(usual, dict):
        if not isinstance(value, dict) or not set(value) <= set(usual):
            raise ValueError(f"{name} of a reality is {value!r}, may have {', '.join(usual)}")
        for key, each in value.items():
            _check_like(f"{name}.{key}", each, usual[key])
    elif isinstance(usual, list):
        if not isinstance(value, list) or len(value) != len(usual):
            raise ValueError(f"{name} of a reality is {value!r}, must be a list of {len(usual)}")
        for each, like in zip(value, usual, strict=True):
            _check_like(name, each, like)
    elif isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise ValueError(f"{name} of a reality is {value!r}, must be a number")
    elif name == "latency" and (value != int(value) or value < 0):
        raise ValueError(f"latency of a reality is {value!r}, must be whole control steps")


def make_reality(settings: dict[str, Any], base: Reality | None = None) -> Reality:
    """`base` with `settings`, as `split_reality` gives them; ValueError where one is no number of 0 or more."""
    for name, value in settings.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
            raise ValueError(f"{name} of a reality is {value!r}, must be a number, 0 or more")
    return (base or Reality())._replace(**{k: float(v) for k, v in settings.items()})


class Felt(NamedTuple):
    """What the arm measures."""

    pose: np.ndarray  # (6,) of the tool: position, and rotation vector from pointing down
    joints: np.ndarray  # (7,) rad
    width: float  # m
    force: float  # N at the tool
    fault: str


class StandIn:
    """One arm, its cameras and what lies before it. `tick` moves it; nothing else does."""

    def __init__(
        self,
        task: str,
        *,
        variant: str = "standin",
        reality: Reality | None = None,
        physics: dict[str, Any] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        """`physics` overrules the variant's draw (friction, mass, servo, latency, light, ...); `options` are `make_env`'s."""
        self.reality = reality or Reality()
        env = make_env(task, 1, variant=variant, seed=seed, **options)
        assert isinstance(env, TwinEnv)
        self.env = env
        self._physics = dict(physics or {})
        self._rng = np.random.default_rng([seed, 53])
        self._seed, self._ticks = seed, 0
        batch = env.simulation.batch
        self._felt_torque = batch.bind("qfrc_constraint")
        damping = batch.expand("dof_damping")
        damping[:, : kinematics.JOINTS] *= self.reality.damping
        self.reset(None, "id")

    # -- episodes --------------------------------------------------------------------------------------------

    def reset(self, configuration: dict[str, Any] | None, region: str) -> dict[str, Any]:
        """Place things as `configuration` says, about. Only reality decides about physics, camera and light."""
        start = self.env.draw(region)
        own = dict(start["draw"])
        for name, value in self._physics.items():  # of what has names, those that are given
            own[name] = {**own[name], **value} if isinstance(value, dict) else value
        start = {**start, **(configuration or {}), "draw": own}
        placed = self._misplaced(start)
        self.env.reset(options={"configurations": [placed]})
        self._joints = self.env.simulation.joints(ONE)[0].astype(float)
        self._geared = self._joints.copy()
        self.gripper, self._asked, self._busy = 1.0, 1.0, 0
        self.fault = ""
        here = self.felt().pose
        self._late: collections.deque[tuple[np.ndarray, float]] = collections.deque(
            [(here, 1.0)] * (TICKS * int(own["latency"]))
        )
        self._offset, self._drift = (
            np.zeros(6),
            np.zeros(6),
        )  # of the servos from what they are told
        self.target = here
        return dict(start)

    def _misplaced(self, start: dict[str, Any]) -> dict[str, Any]:
        if not self.reality.misplaced:
            return start
        moved = dict(start)
        for thing in self.env.task.things:
            if thing.free:
                place = list(start[thing.name])
                place[:2] = np.add(place[:2], self._rng.normal(size=2) * self.reality.misplaced)
                moved[thing.name] = [float(x) for x in place]
        return moved

    def end_step(self, action: np.ndarray) -> dict[str, Any]:
        """A control step has ended, of which `action` (7,) is what was executed: how the task judges it."""
        env = self.env
        env._account(ONE, np.asarray(action, np.float32)[None])
        unseen = env._noise(ONE, env._action_noise, 0)
        if unseen is not None:
            self._drift = unseen[0].astype(float)
        return {
            "reward": float(env._reward[0]),
            "terminated": bool(env._terminated[0]),
            "truncated": bool(env._truncated[0] | env._invalid[0]),
            "success": bool(env._success[0]),
        }

    def seen(self) -> tuple[np.ndarray, np.ndarray]:
        """The error (6,) of the measured tool pose in this step, and the numbers (K,) that the state has beside the arm's."""
        env = self.env
        error = env._noise(ONE, env._state_noise, 1)
        found = np.zeros(6) if error is None else error[0].astype(float)
        if not env.poses.names:
            return found, np.zeros(0, np.float32)
        now = env.snapshot()
        tool = (now.tcp + found[None, :3]).astype(np.float32)
        return found, env.poses.read(now, tool, lambda k: env._error(ONE, k))[0]

    # -- time ------------------------------------------------------------------------------------------------

    def command(self, pose: np.ndarray, gripper: float) -> None:
        """A set-point: pose (6,) and opening; it reaches the servos as late as this reality is."""
        self.target = np.asarray(pose, float)
        self._asked = float(gripper)

    def tick(self) -> None:
        """A hundredth of a second goes by."""
        self._ticks += 1
        self._offset += (self._drift - self._offset) / TICKS
        self._late.append((self.target + self._offset, self._opening()))
        pose, opening = self._late.popleft()
        if not self.fault:
            turn = rotation.exp(pose[None, 3:]) @ kinematics.DOWN
            self._joints = kinematics.solve(self._joints[None], pose[None, :3], turn, iterations=1)[
                0
            ]
            play = self.reality.backlash / 2
            self._geared = np.clip(self._geared, self._joints - play, self._joints + play)
        simulation = self.env.simulation
        simulation.ctrl[0, : kinematics.JOINTS] = self._geared
        simulation.ctrl[0, kinematics.JOINTS :] = opening * FINGER_RANGE
        simulation.batch.step(ONE, nstep=scene.SUBSTEPS // TICKS)
        if not self.fault and self._force() > self.reality.reflex_n:
            self.fault = f"reflex: {self._force():.0f} N at the tool"

    def _opening(self) -> float:
        """What the gripper is told; while it moves it takes no other command."""
        if self._busy:
            self._busy -= 1
        elif abs(self._asked - self.gripper) > SAME:
            self.gripper = self._asked
            self._busy = round(self.reality.gripper_s * RATE_HZ)
        return self.gripper

    @property
    def opening(self) -> float | None:
        """What the fingers were last told, where that is not what is asked for: they are busy."""
        return None if abs(self._asked - self.gripper) <= SAME else self.gripper

    def recover(self) -> None:
        """Clear the fault; the arm takes set-points from where it stands."""
        self._joints = self.env.simulation.joints(ONE)[0].astype(float)
        self._geared = self._joints.copy()
        here = self.felt().pose
        self._late = collections.deque([(here, self.gripper)] * len(self._late))
        self.target, self.fault = here, ""

    # -- senses ----------------------------------------------------------------------------------------------

    def felt(self) -> Felt:
        """What the arm says of itself now."""
        simulation = self.env.simulation
        joints = simulation.joints(ONE).astype(float)
        tip, turn = kinematics.forward(joints)
        facing = rotation.log(turn @ kinematics.DOWN.T)[0]
        width = float(simulation.qpos[0, kinematics.JOINTS : kinematics.JOINTS + 2].sum())
        return Felt(np.concatenate([tip[0], facing]), joints[0], width, self._force(), self.fault)

    def _force(self) -> float:
        """At the tool, N, as an arm finds it: from the torques in its joints that its own motion does not explain."""
        torque = self._felt_torque[0, : kinematics.JOINTS]
        if not torque.any():
            return 0.0
        joints = self.env.simulation.joints(ONE).astype(float)
        origins, turns = kinematics.frames(joints)
        tip, _ = kinematics.forward(joints)
        axes = turns[0, :, :, 2]
        jacobian = np.empty((6, kinematics.JOINTS))
        jacobian[:3] = np.cross(axes, tip[0] - origins[0]).T
        jacobian[3:] = axes.T
        wrench = np.linalg.lstsq(jacobian.T, torque, rcond=None)[0]
        return float(np.linalg.norm(wrench[:3]))

    def images(self) -> dict[str, np.ndarray]:
        """What each camera sees; one whose frame does not come is left out."""
        reality = self.reality
        images = self.env.simulation.images(ONE) if self.env.cameras else {}
        # Of the moment, so that it does not matter how often somebody looks.
        noise = np.random.default_rng([self._seed, 59, self._ticks])
        found = {}
        for name, frames in images.items():
            if reality.dropout and noise.random() < reality.dropout:
                continue
            frame = frames[0]
            if reality.exposure != 1.0 or reality.image_noise:
                grain = noise.standard_normal(frame.shape, np.float32) * reality.image_noise
                seen = np.rint(frame * np.float32(reality.exposure) + grain)
                frame = np.clip(seen, 0.0, 255.0).astype(np.uint8)
            found[name] = frame.copy()
        return found

    def views(self) -> dict[str, dict[str, Any]]:
        """Where each camera is, as plain values for `robot_bridge.projection.Camera`; in the tool's frame if it is on the hand."""
        env = self.env
        model, size = env.simulation.model, env.image_size
        place, turn = (env.simulation.batch.bind(f)[0] for f in ("cam_xpos", "cam_xmat"))
        pose = self.felt().pose
        facing = rotation.exp(pose[None, 3:])[0]
        found = {}
        for name in env.cameras:
            camera = model.camera(name).id
            # MuJoCo's cameras look along -z with y up.
            position, axes = place[camera], turn[camera].reshape(3, 3) * (1.0, -1.0, -1.0)
            on_tool = bool(model.cam_bodyid[camera])
            if on_tool:
                position, axes = facing.T @ (position - pose[:3]), facing.T @ axes
            focal = size / 2 / np.tan(np.radians(model.cam_fovy[camera]) / 2)
            found[name] = {
                "position": position.tolist(),
                "turn": axes.tolist(),
                "focal": float(focal),
                "centre": [size / 2, size / 2],
                "on_tool": on_tool,
            }
        return found

    def expert(self, noise: float, commanded: np.ndarray) -> np.ndarray:
        """The task's scripted expert from the commanded pose (6,): an action (7,)."""
        env = self.env
        turn = rotation.exp(commanded[None, 3:]) @ kinematics.DOWN
        action = env.task.expert(env.snapshot(), commanded[None, :3], turn)
        return env.disturb(clip_action(action), noise)[0].astype(np.float32)

    def close(self) -> None:
        """Free the simulation."""
        self.env.close()
