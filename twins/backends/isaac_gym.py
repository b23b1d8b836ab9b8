"""Isaac Gym (Preview 4): PhysX with all environments in one scene on a GPU, states and images as tensors.

Runs in Isaac Gym's own Python, 3.8, through `twins.worker`. Written against the documented API; docs/isaac-gym.md
says what has been seen working and what has not.
"""

from __future__ import annotations

from typing import Any, Dict, List, Sequence, Tuple

import numpy as np

from twins.backends.contract import Capabilities
from twins.backends.geometry import camera_pose, quaternion
from twins.backends.isaac_gym_scene import Environments, parameters
from twins.backends.lockstep import FINGERS, HAND, PRESSING, Body, Lockstep

FRICTION_STEP = (
    0.01  # PhysX keeps every material and has room for 65,536: factors are rounded to this
)


class IsaacGym(Lockstep):
    """N copies of a task's scene in one Isaac Gym simulation."""

    capabilities = Capabilities(
        repeatable=False, physics_draw=True, looks_draw=True, contact_pairs=False
    )

    def __init__(
        self,
        task: Any,
        count: int,
        *,
        cameras: Sequence[str] = (),
        image_size: int = 64,
        device: str = "cuda:0",
        graphics_device: int = 0,
        pipeline: str = "gpu",
        physics_hz: float = 100.0,
        substeps: int = 2,
        iterations: int = 16,
    ) -> None:
        """`device` is "cuda:N" or "cpu", `pipeline` "gpu" or "cpu" (states in the host's memory).

        There are `physics_hz` simulation steps in a second, each of `substeps`, with `iterations` of the solver:
        more of these hold tighter and cost more.
        """
        if pipeline not in ("gpu", "cpu"):
            raise ValueError(f"pipeline is {pipeline!r}, not 'gpu' or 'cpu'")
        if pipeline == "gpu" and not device.startswith("cuda"):
            raise ValueError(f"pipeline 'gpu' needs a device 'cuda:N', not {device!r}")
        super().__init__(task, count, cameras, image_size)
        from isaacgym import gymapi, gymtorch  # isort: skip
        import torch  # isort: skip  # Isaac Gym wants to be imported before it

        self._gymapi, self._gymtorch, self._torch = gymapi, gymtorch, torch
        self._on_gpu = pipeline == "gpu"
        self._steps = max(1, round(self.scene["control_seconds"] * physics_hz))
        self.gym = gym = gymapi.acquire_gym()
        params = parameters(
            gymapi,
            seconds=self.scene["control_seconds"] / self._steps,
            substeps=substeps,
            iterations=iterations,
            gpu=device.startswith("cuda"),
            pipeline=self._on_gpu,
            count=count,
        )
        number = int(device.partition(":")[2] or 0)
        graphics = graphics_device if self.cameras else -1
        self.sim = gym.create_sim(number, graphics, gymapi.SIM_PHYSX, params)
        if self.sim is None:
            raise RuntimeError(f"Isaac Gym made no simulation on {device}, graphics {graphics}")
        self._scenes = Environments(
            gymapi, gym, self.sim, self.scene, self.bodies, count, image_size, self._on_gpu
        )
        self._drawn = [{"friction": 0.0, "servo": 0.0, "mass": 1.0} for _ in range(count)]
        plain = {"friction": 1.0, "servo": 1.0, "mass": 1.0}
        self._set_physics(np.arange(count), [plain] * count)
        self._painted = {}  # type: Dict[Tuple[int, str], Tuple[float, ...]]
        self._lights = [None] * count  # type: List[Any]
        if not gym.prepare_sim(self.sim):
            raise RuntimeError(
                "Isaac Gym could not prepare the simulation; its own output says why"
            )
        self._acquire()

    def _acquire(self) -> None:
        """Tensors over the simulator's own memory, and where each body and joint is in them."""
        gym, gymapi, wrap = self.gym, self._gymapi, self._gymtorch.wrap_tensor
        self._root = wrap(gym.acquire_actor_root_state_tensor(self.sim))
        self._device = self._root.device
        self._dof = wrap(gym.acquire_dof_state_tensor(self.sim)).view(self.count, -1, 2)
        self._force = wrap(gym.acquire_net_contact_force_tensor(self.sim))
        self._force = self._force.view(self.count, -1, 3)
        scenes = self._scenes
        rows = [
            [
                gym.get_actor_index(scenes.envs[i], scenes.actors[b.name][i], gymapi.DOMAIN_SIM)
                for b in self.movable
            ]
            for i in range(self.count)
        ]
        arms = [
            gym.get_actor_index(env, arm, gymapi.DOMAIN_SIM)
            for env, arm in zip(scenes.envs, scenes.arms)
        ]
        self._rows = self._tensor(rows, self._torch.long)  # (N, M) of `_root`
        self._arm_rows = self._tensor(arms, self._torch.int32)  # (N,)
        order = [scenes.dof_names.index(name) for name in self._chain.joints]
        self._order = self._tensor(order, self._torch.long)
        env, arm = scenes.envs[0], scenes.arms[0]
        hand = [
            gym.find_actor_rigid_body_index(env, arm, name, gymapi.DOMAIN_ENV)
            for name in (HAND, *FINGERS)
        ]
        self._hand_rows = self._tensor(hand, self._torch.long)
        self._target = self._torch.zeros(
            (self.count, len(order)), dtype=self._torch.float32, device=self._device
        )
        if self.cameras and self._on_gpu:
            self._pixels = {
                name: [
                    wrap(gym.get_camera_image_gpu_tensor(self.sim, env, handle, gymapi.IMAGE_COLOR))
                    for env, handle in zip(scenes.envs, handles)
                ]
                for name, handles in scenes.cameras.items()
            }

    def _tensor(self, values: Any, dtype: Any) -> Any:
        return self._torch.as_tensor(np.asarray(values), dtype=dtype, device=self._device)

    # -- states ----------------------------------------------------------------------------------------------

    def _write(self, ids: np.ndarray, dofs: np.ndarray, roots: np.ndarray) -> None:
        torch, unwrap = self._torch, self._gymtorch.unwrap_tensor
        which = self._tensor(ids, torch.long)
        rows = self._rows[which]
        roots = np.concatenate(
            [roots[..., :3], roots[..., 4:7], roots[..., 3:4], roots[..., 7:]], -1
        )
        self._root[rows] = self._tensor(roots, torch.float32)
        self._dof[which[:, None], self._order] = self._tensor(dofs, torch.float32)
        # The simulator reads indices when it next simulates: they must live until then.
        self._moved = rows.flatten().to(torch.int32)
        self._bent = self._arm_rows[which].contiguous()
        done = self.gym.set_actor_root_state_tensor_indexed(
            self.sim, unwrap(self._root), unwrap(self._moved), len(self._moved)
        )
        done &= self.gym.set_dof_state_tensor_indexed(
            self.sim, unwrap(self._dof), unwrap(self._bent), len(self._bent)
        )
        if not done:
            raise RuntimeError(f"Isaac Gym refused the states of environments {ids.tolist()}")

    def _simulate(self, steps: int) -> None:
        targets = self._tensor(self._targets, self._torch.float32)
        self._target[:, self._order] = targets
        self.gym.set_dof_position_target_tensor(
            self.sim, self._gymtorch.unwrap_tensor(self._target)
        )
        for _ in range(steps):
            self.gym.simulate(self.sim)
            if not self._on_gpu:
                self.gym.fetch_results(self.sim, True)

    def _advance(self, targets: np.ndarray, steps: int) -> None:
        self._simulate(steps)

    def _tick(self) -> None:
        self._simulate(1)

    def _read(self) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        self.gym.refresh_actor_root_state_tensor(self.sim)
        self.gym.refresh_dof_state_tensor(self.sim)
        self.gym.refresh_net_contact_force_tensor(self.sim)
        dofs = self._dof[:, self._order].cpu().numpy().astype(float)
        roots = self._root[self._rows].cpu().numpy().astype(float)
        roots = np.concatenate(
            [roots[..., :3], roots[..., 6:7], roots[..., 3:6], roots[..., 7:]], -1
        )
        forces = self._force[:, self._hand_rows].cpu().numpy()
        return dofs, roots, (np.linalg.norm(forces, axis=-1) > PRESSING).any(axis=1)

    # -- what differs between environments -------------------------------------------------------------------

    def _set_physics(self, ids: np.ndarray, draws: List[Dict[str, Any]]) -> None:
        for i, draw in zip(ids, draws):
            drawn, scenes = self._drawn[i], self._scenes
            friction = round(draw["friction"] / FRICTION_STEP) * FRICTION_STEP
            for name, value, change in (
                ("friction", friction, scenes.set_shapes),
                ("servo", draw["servo"], scenes.set_servos),
                ("mass", draw["mass"], scenes.set_masses),
            ):
                if drawn[name] != value:
                    change(int(i), value)
                    drawn[name] = value

    def _set_looks(self, ids: np.ndarray, draws: List[Dict[str, Any]]) -> None:
        for i, draw in zip(ids, draws):
            self._lights[i] = (draw["light"], *draw["lamp"])
            self._paint(int(i), draw["colours"])
            self._aim(int(i), draw["cameras"])
        self._set_light()

    def _set_light(self) -> None:
        """One lamp shines on all environments."""
        lights = {light for light in self._lights if light is not None}
        if len(lights) > 1:
            raise ValueError(
                "Isaac Gym has one lamp for all environments, but their lights were drawn differently; "
                "set the randomisation of 'light' to 0"
            )
        vector = self._gymapi.Vec3
        strength, x, y = lights.pop()
        ambient = vector(*self.scene["light"]["ambient"])
        # The direction is the one towards the lamp.
        self.gym.set_light_parameters(
            self.sim, 0, vector(*[strength] * 3), ambient, vector(-x, -y, 1.0)
        )

    def _paint(self, i: int, colours: Dict[str, Sequence[float]]) -> None:
        scenes = self._scenes
        for body in self.bodies:
            self._paint_body(i, scenes.actors[body.name][i], 0, body, colours[body.on or body.name])
        names = self.gym.get_actor_rigid_body_names(scenes.envs[i], scenes.arms[i])
        for link in self.scene["arm"]["bodies"]:
            body = Body(link["name"], "link", 0.0, link["shapes"])
            index = names.index(body.name)
            self._paint_body(i, scenes.arms[i], index, body, colours["arm"])

    def _paint_body(
        self, i: int, actor: int, index: int, body: Body, shift: Sequence[float]
    ) -> None:
        """Colour a body of one colour; one of several keeps its own."""
        own = {tuple(shape["rgb"]) for shape in body.shapes}
        if len(own) != 1:
            return
        rgb = tuple(np.clip(np.add(own.pop(), shift), 0.0, 1.0).tolist())
        if self._painted.get((i, body.name)) != rgb:
            self._painted[i, body.name] = rgb
            self.gym.set_rigid_body_color(
                self._scenes.envs[i],
                actor,
                index,
                self._gymapi.MESH_VISUAL,
                self._gymapi.Vec3(*rgb),
            )

    def _aim(self, i: int, offsets: Dict[str, Sequence[float]]) -> None:
        gym, gymapi, scenes = self.gym, self._gymapi, self._scenes
        env = scenes.envs[i]
        for name, camera in self.scene["cameras"].items():
            position, turn = camera_pose(camera, offsets[name])
            w, x, y, z = quaternion(turn).tolist()
            pose = gymapi.Transform(gymapi.Vec3(*position.tolist()), gymapi.Quat(x, y, z, w))
            handle = scenes.cameras[name][i]
            if camera["body"] is None:
                gym.set_camera_transform(handle, env, pose)
            else:
                body = gym.find_actor_rigid_body_handle(env, scenes.arms[i], camera["body"])
                gym.attach_camera_to_body(handle, env, body, pose, gymapi.FOLLOW_TRANSFORM)

    # -- images ----------------------------------------------------------------------------------------------

    def _render(self, ids: np.ndarray) -> Dict[str, np.ndarray]:
        gym, scenes = self.gym, self._scenes
        if self._on_gpu:
            gym.fetch_results(self.sim, True)
        gym.step_graphics(self.sim)
        gym.render_all_camera_sensors(self.sim)
        if not self._on_gpu:
            return {name: self._read_pixels(scenes.cameras[name], ids) for name in self.cameras}
        gym.start_access_image_tensors(self.sim)
        try:
            return {
                name: self._torch.stack([self._pixels[name][i][..., :3] for i in ids]).cpu().numpy()
                for name in self.cameras
            }
        finally:
            gym.end_access_image_tensors(self.sim)

    def _read_pixels(self, handles: List[int], ids: np.ndarray) -> np.ndarray:
        colour, shape = self._gymapi.IMAGE_COLOR, (self.image_size, self.image_size, 4)
        envs = self._scenes.envs
        images = [
            self.gym.get_camera_image(self.sim, envs[i], handles[i], colour).reshape(shape)[..., :3]
            for i in ids
        ]
        return np.stack(images)

    def close(self) -> None:
        """See the contract."""
        if self.sim is not None:
            self.gym.destroy_sim(self.sim)
            self.sim = None
