"""What every driver must do, and that the stand-in is an arm of its own."""

import numpy as np
import pytest

from robot_bridge.driver import make_driver
from robot_bridge.protocol import differences, features_of, make_job
from robot_bridge.safety import SafetyFilter
from twinrl.core.segment import Schema

SCHEMAS = {
    "point": Schema(6, 0, ("side",), 16, 4),
    "sim": Schema(27, 14, ("side", "wrist"), 32, 4),
}
STAND = np.array([0, 0, 0, 0, 0, 0, 1], np.float32)


@pytest.fixture(params=sorted(SCHEMAS))
def driver(request):
    schema = SCHEMAS[request.param]
    job = {"run": "r", "task": "pick-and-place", "instruction": "i"}
    driver = make_driver(request.param)
    driver.connect(make_job(schema, job))
    driver.schema = schema
    yield driver
    driver.disconnect()


def test_contract(driver):
    """Features fit the job, observations fit the features, a hold moves nothing, an episode ends."""
    assert differences(driver.features, features_of(driver.schema)) == []
    configuration = driver.reset(None, "ood")
    assert configuration["region"] == "ood"
    for _ in range(3):
        observation = driver.read()
        assert observation["observation.state"].dtype == np.float32
        assert observation["observation.state"].shape == (driver.schema.state_dim,)
        for camera in driver.schema.cameras:
            image = observation[f"observation.images.{camera}"]
            assert image.dtype == np.uint8
            assert image.shape == (driver.schema.image_size, driver.schema.image_size, 3)
        assert driver.tool().shape == driver.target().shape == (3,)
        executed = driver.command(STAND)
        assert executed.shape == (7,) and executed.dtype == np.float32
        driver.hold()
    for _ in range(200):
        outcome = driver.judge()
        if outcome.terminated or outcome.truncated:
            break
        driver.command(STAND)
    assert outcome.truncated and not outcome.terminated and not outcome.success


def test_expert_succeeds_within_the_limits(driver):
    """The safety filter's defaults are not narrower than what the task needs."""
    safety = SafetyFilter()
    successes = 0
    for _ in range(3):
        driver.reset(None, "id")
        for _ in range(200):
            verdict = safety(driver.expert(0.0), driver.target(), driver.tool())
            driver.command(verdict.action)
            outcome = driver.judge()
            if outcome.terminated or outcome.truncated:
                break
        successes += outcome.success
    assert successes >= 2
    assert not safety.counts


def test_only_reality_decides_about_physics():
    """A twin's configuration places things on the stand-in; its physics, camera and light stay its own."""
    from twins import make_env

    twin = make_env("pick-and-place", 1, randomisation="full", render=False, seed=5)
    twin.reset(seed=5)
    (given,) = twin.configurations()
    twin.close()
    driver = make_driver("sim", seed=1)
    job = {"run": "r", "task": "pick-and-place", "instruction": "i"}
    driver.connect(make_job(SCHEMAS["sim"], job))
    own = driver.reset(None, "id")
    played = driver.reset(given, "id")
    assert played["object"] == given["object"] and played["basket"] == given["basket"]
    assert played["draw"] == own["draw"] != given["draw"]
    driver.disconnect()
