"""The CPU's tracer draws what mujoco-warp's does, on any number of threads and of any size."""

import mujoco
import numpy as np
import pytest

from twins import render, tracer

COUNT = 19  # more than a block, and no multiple of it
SHAPES = {
    "plane": (mujoco.mjtGeom.mjGEOM_PLANE, [0.6, 0.4, 0.01]),
    "ball": (mujoco.mjtGeom.mjGEOM_SPHERE, [0.12, 0, 0]),
    "pill": (mujoco.mjtGeom.mjGEOM_CAPSULE, [0.06, 0.15, 0]),
    "can": (mujoco.mjtGeom.mjGEOM_CYLINDER, [0.1, 0.07, 0]),
    "crate": (mujoco.mjtGeom.mjGEOM_BOX, [0.1, 0.05, 0.15]),
}


@pytest.fixture(scope="module")
def model():
    spec = mujoco.MjSpec()
    world = spec.worldbody
    world.add_light(type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL, dir=[-0.3, 0.2, -1])
    world.add_light(type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL, dir=[0.5, 0.1, -0.4])
    for camera, height, fovy in (("near", 0.9, 60.0), ("far", 2.0, 35.0)):
        world.add_camera(name=camera, pos=[0, 0, height], fovy=fovy)
    for name, (kind, size) in SHAPES.items():
        for n in range(1 if name == "plane" else 2):
            world.add_geom(name=f"{name}{n}", type=kind, size=size, rgba=[0.9, 0.5, 0.2, 1])
    return spec.compile()


@pytest.fixture(scope="module")
def scenes(model):
    """Poses and looks of worlds in which shapes lie anyhow, also through each other."""
    rng = np.random.default_rng(0)
    at = rng.uniform([-0.4, -0.4, 0.0], [0.4, 0.4, 0.4], size=(COUNT, model.ngeom, 3))
    turn = np.linalg.qr(rng.normal(size=(COUNT, model.ngeom, 3, 3)))[0]
    turn *= np.linalg.det(turn)[..., None, None]
    at[:, 0], turn[:, 0] = 0.0, np.eye(3)
    tilt = np.linalg.qr(np.eye(3) + rng.normal(0, 0.05, (COUNT, model.ncam, 3, 3)))[0]
    tilt *= np.sign(np.diagonal(tilt, axis1=2, axis2=3))[..., None, :]
    poses = {
        "geom_xpos": at,
        "geom_xmat": turn.reshape(COUNT, -1, 9),
        "cam_xpos": model.cam_pos + rng.normal(0, 0.02, (COUNT, model.ncam, 3)),
        "cam_xmat": tilt.reshape(COUNT, -1, 9),
    }
    lamps = rng.normal(0, 0.3, (COUNT, model.nlight, 3)) - [0, 0, 1]
    colours = rng.uniform(0, 1, (COUNT, model.ngeom, 4))
    colours[..., 3] = rng.uniform(size=colours.shape[:2]) < 0.9  # some are hidden
    looks = {
        "geom_rgba": colours,
        "light_diffuse": rng.uniform(0.1, 0.6, (COUNT, model.nlight, 3)),
        "light_xdir": lamps / np.linalg.norm(lamps, axis=2, keepdims=True),
    }
    return poses, looks


def reference(model, cameras, size):
    return render.Renderer(model, cameras, size, block=4, device="cpu")


@pytest.mark.parametrize("size", [64, 20])
def test_pictures_are_those_of_mujoco_warp(model, scenes, size):
    cameras, ids = ("far", "near"), np.arange(COUNT)
    ours = tracer.Tracer(model, cameras, size).render(*scenes, ids)
    theirs = reference(model, cameras, size).render(*scenes, ids)
    for camera in cameras:
        assert ours[camera].shape == (COUNT, size, size, 3) and ours[camera].dtype == np.uint8
        difference = np.abs(ours[camera].astype(int) - theirs[camera]).max(axis=-1)
        # Rounding decides who owns a pixel on an edge; nothing else may differ.
        assert (difference > 2).mean() < 2e-3, camera
        assert theirs[camera].std() > 30


def test_threads_and_other_worlds_change_no_picture(model, scenes):
    ids = np.arange(COUNT)
    one = tracer.Tracer(model, ("near",), 32).render(*scenes, ids)["near"]
    three = tracer.Tracer(model, ("near",), 32, threads=3)
    np.testing.assert_array_equal(three.render(*scenes, ids)["near"], one)
    some = np.array([17, 3, 4])
    np.testing.assert_array_equal(three.render(*scenes, some)["near"], one[some])
    assert three.render(*scenes, ids[:0])["near"].shape == (0, 32, 32, 3)


def test_a_camera_over_the_end_of_a_capsule_sees_the_end():
    spec = mujoco.MjSpec()
    spec.worldbody.add_light(type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL, dir=[0, 0, -1])
    spec.worldbody.add_camera(name="above", pos=[0, 0, 0.5], fovy=60)
    spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_CAPSULE, size=[0.1, 0.2, 0])
    model = spec.compile()
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    poses = {name: getattr(data, name)[None] for name in tracer.POSES}
    looks = {"geom_rgba": model.geom_rgba[None], "light_diffuse": model.light_diffuse[None]}
    looks["light_xdir"] = data.light_xdir[None]
    ids = np.zeros(1, int)
    ours = tracer.Tracer(model, ("above",), 32).render(poses, looks, ids)["above"]
    theirs = reference(model, ("above",), 32).render(poses, looks, ids)["above"]
    assert np.abs(ours.astype(int) - theirs).max() <= 2 and theirs[0, 16, 16].min() > 100


def test_what_it_cannot_draw_is_said():
    spec = mujoco.MjSpec()
    spec.worldbody.add_camera(name="c")
    spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_ELLIPSOID, size=[0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="ELLIPSOID"):
        tracer.Tracer(spec.compile(), ("c",), 16)
    spec = mujoco.MjSpec()
    spec.worldbody.add_camera(name="c")
    spec.worldbody.add_light(type=mujoco.mjtLightType.mjLIGHT_SPOT)
    with pytest.raises(ValueError, match="directional"):
        tracer.Tracer(spec.compile(), ("c",), 16)
