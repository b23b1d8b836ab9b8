"""The simulated arm: the Franka Panda's kinematics, masses and limits, made of primitive shapes.

Primitives render several times faster than the robot's meshes and need no download; the kinematics are
the robot's own (`twins.kinematics`), so a policy's tool poses mean the same on both.
"""

from __future__ import annotations

import mujoco
import numpy as np

from twins import kinematics
from twins.rotation import SMALL

MASSES = (4.970684, 0.646926, 3.228604, 3.587895, 1.225946, 1.666555, 0.735522)  # kg, links 1 to 7
HAND_MASS, FINGER_MASS = 0.73, 0.015  # kg
TORQUES = (87.0, 87.0, 87.0, 87.0, 12.0, 12.0, 12.0)  # N m
STIFFNESS = (4500.0, 4500.0, 3500.0, 3500.0, 2000.0, 2000.0, 2000.0)  # N m / rad
LAG = 0.05  # s, damping over stiffness: how far the servos trail a moving target
FINGER_RANGE = 0.04  # m, travel of one finger; fully open is twice this
FINGER_STIFFNESS, FINGER_DAMPING, FINGER_FORCE = 1000.0, 40.0, 70.0
RADII = (0.06, 0.06, 0.055, 0.055, 0.05, 0.045, 0.045)  # m, of the links' capsules

# Collision bits: arm parts never meet each other, links meet only the table, the gripper meets everything.
TABLE, PLACED, OBJECT = 1, 2, 4
ARM_JOINTS = tuple(f"joint{i + 1}" for i in range(kinematics.JOINTS))
FINGERS = ("finger_left", "finger_right")
# Stiffer than MuJoCo's default, which lets fingers sink 4 mm into what they hold.
CONTACT = (0.006, 1.0)
WHITE, DARK, GREY = (0.88, 0.9, 0.92, 1.0), (0.2, 0.21, 0.24, 1.0), (0.45, 0.47, 0.5, 1.0)


def add_arm(spec: mujoco.MjSpec) -> None:
    """Add arm, gripper and position servos to `spec`; the base frame is the world's."""
    body = spec.worldbody.add_body(name="base")
    body.add_geom(
        name="base",
        type=mujoco.mjtGeom.mjGEOM_CYLINDER,
        fromto=[0, 0, 0, 0, 0, 0.24],
        size=[0.07, 0, 0],
        contype=0,
        conaffinity=0,
        rgba=WHITE,
    )
    for i in range(kinematics.JOINTS):
        body = _add_link(body, i)
    _add_hand(body)
    for i, joint in enumerate(ARM_JOINTS):
        servo = spec.add_actuator(name=joint, target=joint, trntype=mujoco.mjtTrn.mjTRN_JOINT)
        servo.set_to_position(kp=STIFFNESS[i], kv=STIFFNESS[i] * LAG)
        servo.forcerange = [-TORQUES[i], TORQUES[i]]
    for finger in FINGERS:
        servo = spec.add_actuator(name=finger, target=finger, trntype=mujoco.mjtTrn.mjTRN_JOINT)
        servo.set_to_position(kp=FINGER_STIFFNESS, kv=FINGER_DAMPING)
        servo.forcerange = [-FINGER_FORCE, FINGER_FORCE]


def _add_link(parent: mujoco.MjsBody, i: int) -> mujoco.MjsBody:
    a, alpha, d = kinematics.DH[i]
    body = parent.add_body(
        name=f"link{i + 1}",
        pos=[a, -np.sin(alpha) * d, np.cos(alpha) * d],
        quat=[np.cos(alpha / 2), np.sin(alpha / 2), 0, 0],
        gravcomp=1,
    )
    low, high = kinematics.LIMITS[i]
    body.add_joint(
        name=ARM_JOINTS[i],
        axis=[0, 0, 1],
        range=[low, high],
        limited=mujoco.mjtLimited.mjLIMITED_TRUE,
        armature=0.1,
        damping=1.0,
    )
    last = i == kinematics.JOINTS - 1
    a, alpha, d = (0.0, 0.0, kinematics.FLANGE) if last else kinematics.DH[i + 1]
    end = np.array([a, -np.sin(alpha) * d, np.cos(alpha) * d])
    common = {"contype": 0, "conaffinity": TABLE, "mass": MASSES[i], "name": f"link{i + 1}"}
    if np.linalg.norm(end) > SMALL:
        body.add_geom(
            type=mujoco.mjtGeom.mjGEOM_CAPSULE,
            fromto=[0, 0, 0, *end],
            size=[RADII[i], 0, 0],
            rgba=WHITE if i < 5 else GREY,
            **common,
        )
    else:
        # Two successive axes cross here (shoulder, wrist): the link is no more than the joint itself.
        body.add_geom(
            type=mujoco.mjtGeom.mjGEOM_SPHERE, size=[RADII[i] * 1.2, 0, 0], rgba=GREY, **common
        )
    return body


def _add_hand(flange: mujoco.MjsBody) -> None:
    touch = {"contype": 0, "conaffinity": TABLE | PLACED | OBJECT}
    yaw = kinematics.HAND_YAW
    hand = flange.add_body(
        name="hand",
        pos=[0, 0, kinematics.FLANGE],
        quat=[np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)],
        gravcomp=1,
    )
    hand.add_geom(
        name="hand",
        type=mujoco.mjtGeom.mjGEOM_BOX,
        size=[0.025, 0.1, 0.028],
        pos=[0, 0, 0.03],
        mass=HAND_MASS,
        rgba=WHITE,
        **touch,
    )
    hand.add_site(name="tcp", pos=[0, 0, kinematics.TCP])
    for side, name in ((1.0, FINGERS[0]), (-1.0, FINGERS[1])):
        finger = hand.add_body(name=name, pos=[0, 0, 0.0584], gravcomp=1)
        finger.add_joint(
            name=name,
            type=mujoco.mjtJoint.mjJNT_SLIDE,
            axis=[0, side, 0],
            range=[0, FINGER_RANGE],
            limited=mujoco.mjtLimited.mjLIMITED_TRUE,
            armature=0.1,
            damping=5.0,
        )
        # Torsional friction (condim 4) keeps a long object from swinging between two flat pads.
        finger.add_geom(
            name=name,
            type=mujoco.mjtGeom.mjGEOM_BOX,
            size=[0.01, 0.006, 0.027],
            pos=[0, side * 0.006, 0.027],
            mass=FINGER_MASS,
            condim=4,
            friction=[1.0, 0.01, 0.0001],
            solref=CONTACT,
            rgba=DARK,
            **touch,
        )
