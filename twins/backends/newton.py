"""Newton with its MuJoCo solver: MuJoCo's contacts on warp, and ray-traced cameras, on a GPU or a CPU.

Runs in Newton's own Python, whose MuJoCo is older than ours, through `twins.worker`. docs/simulators.md says what has
been seen working.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from twins.backends.contract import Capabilities
from twins.backends.geometry import FORWARD, camera_pose, compose, matrix, quaternion
from twins.backends.lockstep import FINGERS, HAND, Body, Lockstep
from twins.export_urdf import arm_urdf

TIMESTEP = 0.002  # s; grasps slip from 4 ms on, as in our own MuJoCo
GAP = 0.002  # m, from which on contacts are looked for
FREE = 7  # coordinates of a free joint: position, quaternion with w last


class Newton(Lockstep):
    """N copies of a task's scene as worlds of one Newton model."""

    capabilities = Capabilities(
        repeatable=False, physics_draw=False, looks_draw=False, contact_pairs=False
    )

    def __init__(
        self,
        task: Any,
        count: int,
        *,
        cameras: Sequence[str] = (),
        image_size: int = 64,
        device: str = "cuda:0",
        use_mujoco_cpu: bool = False,
        contacts: int = 200,
    ) -> None:
        """`device` is "cuda:N" or "cpu"; with `use_mujoco_cpu` C MuJoCo steps a single world.

        `contacts` is the room for contacts of each world.
        """
        super().__init__(task, count, cameras, image_size)
        if use_mujoco_cpu and count > 1:
            raise ValueError(f"use_mujoco_cpu steps one world, not {count}")
        import newton
        import warp as wp

        self._newton, self._wp = newton, wp
        worlds = newton.ModelBuilder()
        worlds.replicate(self._build_world(), count)
        self._model = model = worlds.finalize(device=device)
        self._solver = newton.solvers.SolverMuJoCo(
            model,
            integrator="implicitfast",
            cone="elliptic",
            impratio=10.0,
            iterations=30,
            use_mujoco_cpu=use_mujoco_cpu,
            njmax=4 * contacts,
            nconmax=contacts,
        )
        self._state, self._next, self._control = model.state(), model.state(), model.control()
        self._steps = round(self.scene["control_seconds"] / TIMESTEP)
        if self.cameras:
            self._prepare_images()

    def _build_world(self) -> Any:
        newton = self._newton
        builder = newton.ModelBuilder()
        newton.solvers.SolverMuJoCo.register_custom_attributes(builder)
        builder.rigid_gap = GAP
        builder.add_urdf(arm_urdf(self.scene["arm"]), floating=False, enable_self_collisions=False)
        servos = [body["joint"] for body in self.scene["arm"]["bodies"] if body["joint"]]
        for row, servo in enumerate(servos):
            builder.joint_target_ke[row] = servo["stiffness"]
            builder.joint_target_kd[row] = servo["damping"]
            builder.joint_target_mode[row] = int(newton.JointTargetMode.POSITION)
            builder.joint_effort_limit[row] = servo["effort"]
            builder.joint_armature[row] = servo["armature"]
        floating = builder.custom_attributes["mujoco:gravcomp"]
        floating.values = {
            **(floating.values or {}),
            **dict.fromkeys(range(builder.body_count), 1.0),
        }
        arm = list(range(builder.shape_count))
        self._hand = builder.body_count - len(FINGERS) - 1
        self._bodies = builder.body_count  # of the arm, then one for each that can move
        links = [
            s
            for s in arm
            if builder.body_label[builder.shape_body[s]].split("/")[-1] not in (HAND, *FINGERS)
        ]
        for body in self.bodies:
            shapes = self._add_body(builder, body)
            if body.role != "table":
                for shape in shapes:
                    for link in links:
                        builder.add_shape_collision_filter_pair(link, shape)
        return builder

    def _add_body(self, builder: Any, body: Body) -> list[int]:
        newton, wp = self._newton, self._wp
        parent = -1
        if body.role != "table":
            # Newton's MuJoCo solver moves a kinematic body without mass as a mocap body, as we do.
            weight = {"is_kinematic": True}
            if body.role == "free":
                inertia = wp.mat33(np.asarray(body.inertia, np.float32))
                weight = {"mass": body.mass, "com": wp.vec3(*body.centre), "inertia": inertia}
            parent = builder.add_body(lock_inertia=True, label=body.name, **weight)
        adders = {
            "box": lambda size: (
                builder.add_shape_box,
                dict(zip(("hx", "hy", "hz"), size, strict=True)),
            ),
            "sphere": lambda size: (builder.add_shape_sphere, {"radius": size[0]}),
            "capsule": lambda size: (builder.add_shape_capsule, _long(size)),
            "cylinder": lambda size: (builder.add_shape_cylinder, _long(size)),
        }
        made = []
        for shape in body.shapes:
            add, size = adders[shape["kind"]](shape["size"])
            config = newton.ModelBuilder.ShapeConfig(
                density=0.0, mu=shape["friction"], has_shape_collision=shape["solid"]
            )
            w, x, y, z = shape["quaternion"]
            place = wp.transform(wp.vec3(*shape["position"]), wp.quat(x, y, z, w))
            made.append(add(parent, xform=place, cfg=config, color=wp.vec3(*shape["rgb"]), **size))
        return made

    # -- states ----------------------------------------------------------------------------------------------

    def _rows(self, array: Any) -> np.ndarray:
        """An array of the state as NumPy's, a row for each world."""
        return array.numpy().reshape(self.count, -1)

    def _write(self, ids: np.ndarray, dofs: np.ndarray, roots: np.ndarray) -> None:
        state, width = self._state, len(self._chain.joints)
        q, qd = self._rows(state.joint_q).copy(), self._rows(state.joint_qd).copy()
        q[ids, :width], qd[ids, :width] = dofs[..., 0], dofs[..., 1]
        poses = np.concatenate([roots[..., :3], roots[..., 4:7], roots[..., 3:4]], axis=-1)
        q[ids, width:] = poses.reshape(len(ids), -1)
        qd[ids, width:] = roots[..., 7:].reshape(len(ids), -1)
        state.joint_q.assign(q.ravel())
        state.joint_qd.assign(qd.ravel())
        self._newton.eval_fk(self._model, state.joint_q, state.joint_qd, state)

    def _simulate(self, steps: int) -> None:
        targets = self._rows(self._control.joint_target_q).copy()
        targets[:, : self._targets.shape[1]] = self._targets
        self._control.joint_target_q.assign(targets.ravel())
        for _ in range(steps):
            self._state.clear_forces()
            self._solver.step(self._state, self._next, self._control, None, TIMESTEP)
            self._state, self._next = self._next, self._state

    def _advance(self, targets: np.ndarray, steps: int) -> None:
        self._simulate(steps)

    def _tick(self) -> None:
        """Forward kinematics have been done already: nothing has to be advanced to be seen."""

    def _read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        q, qd = (self._rows(a).astype(float) for a in (self._state.joint_q, self._state.joint_qd))
        width = len(self._chain.joints)
        dofs = np.stack([q[:, :width], qd[:, :width]], axis=-1)
        poses = q[:, width:].reshape(self.count, -1, FREE)
        speeds = qd[:, width:].reshape(self.count, -1, 6)
        roots = np.concatenate([poses[..., :3], poses[..., 6:7], poses[..., 3:6], speeds], axis=-1)
        # Touch of the gripper is told by geometry alone.
        return dofs, roots, np.ones(self.count, bool)

    def _set_physics(self, ids: np.ndarray, draws: list[dict[str, Any]]) -> None:
        self._refuse(draws, ("friction", "mass", "servo"))

    def _set_looks(self, ids: np.ndarray, draws: list[dict[str, Any]]) -> None:
        self._refuse(draws, ("light", "lamp", "cameras", "colours"))

    # -- images ----------------------------------------------------------------------------------------------

    def _prepare_images(self) -> None:
        camera = self._newton.sensors.SensorCamera
        self._camera = camera(self._model)
        self._camera.create_default_light(
            direction=self._wp.vec3(*self.scene["light"]["direction"])
        )
        size, device = self.image_size, self._model.device
        self._rays = {
            name: camera.compute_camera_rays_pinhole(
                size, size, camera_fov=eye["fovy"], device=device
            )
            for name, eye in self.scene["cameras"].items()
        }
        self._pixels = self._camera.allocate_image_color(self.count, size, size)

    def _render(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        wp, images = self._wp, {}
        self._model.bvh_refit_shapes(self._state)
        bodies = self._state.body_q.numpy().reshape(self.count, -1, FREE)
        hand = bodies[:, self._hand]
        for name, eye in self.scene["cameras"].items():
            position, turn = camera_pose(eye)
            place = np.tile(position, (self.count, 1)), np.tile(turn, (self.count, 1, 1))
            if eye["body"] is not None:
                at = hand[:, :3].astype(float), matrix(hand[:, [6, 3, 4, 5]])
                place = compose(at, place)
            w_first = quaternion(place[1] @ FORWARD.T)  # it looks along -z, as MuJoCo's do
            poses = np.concatenate([place[0], w_first[:, 1:], w_first[:, :1]], axis=1)
            transforms = wp.array(
                poses.astype(np.float32), dtype=wp.transformf, device=self._model.device
            )
            self._camera.update(self._state, transforms, self._rays[name], color_image=self._pixels)
            size = self.image_size
            packed = self._pixels.numpy().view(np.uint8).reshape(self.count, size, size, 4)
            images[name] = packed[ids][..., :3].copy()
        return images

    def close(self) -> None:
        """Nothing is held that the garbage collector would not free."""


def _long(size: Sequence[float]) -> dict[str, float]:
    return {"radius": size[0], "half_height": size[1]}
