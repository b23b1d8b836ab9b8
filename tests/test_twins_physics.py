"""Bodies move as their masses, frictions and servos say, lie still when left alone, and do not slip from the hand."""

import numpy as np
import pytest

import twins
from twins import kinematics, rotation
from twins.errands import errands_of
from twins.scene import SUBSTEPS, TIMESTEP
from twins.tasks import TASKS, make_task

TASK, THING = "pick-and-place", "object"
SCALES = np.array([0.5, 1.0, 2.0, 3.0])
STEP = TIMESTEP * SUBSTEPS  # s
GRAVITY = 9.81  # m/s^2
FAR = [0.4, 0.3, 0.3]  # m, in the air, out of the arm's way
ALL = np.arange(len(SCALES))


def drawn(**change):
    """Environments of one layout that differ in what `change` says: {name: (N,)}."""
    env = twins.make_env(TASK, len(SCALES), render=False)
    env.reset(seed=0)
    base = env.configurations()[0]
    configurations = [
        base | {"draw": base["draw"] | {name: float(values[i]) for name, values in change.items()}}
        for i in ALL
    ]
    env.reset(options={"configurations": configurations})
    return env


def stay(env):
    """One control step in which the hand is told to stay where it is."""
    env.step_chunk(np.tile([0, 0, 0, 0, 0, 0, 1], (len(ALL), 1, 1)).astype(np.float32))


def pulled(env, force, torque=(0.0, 0.0, 0.0)):
    """Pull every thing in the air with a force (N) and a torque (N m) for one step; velocities (N, 6) after it."""
    turn = np.tile(np.eye(3), (len(ALL), 1, 1))
    env.simulation.place(ALL, THING, np.tile(FAR, (len(ALL), 1)), turn)
    applied = env.simulation.batch.bind("xfrc_applied")
    applied[:, env.simulation.model.body(THING).id] = [*force, *torque]
    stay(env)
    return env.snapshot().velocity[THING]


def test_a_heavier_thing_is_slower_to_start():
    env = drawn(mass=SCALES)
    nominal = env.simulation.model.body(THING).mass[0]
    velocity = pulled(env, (0.0, 0.0, 3.0))
    expected = (3.0 / (nominal * SCALES) - GRAVITY) * STEP
    np.testing.assert_allclose(velocity[:, 2], expected, rtol=1e-3)


def test_a_heavier_thing_is_slower_to_turn():
    env = drawn(mass=SCALES)
    rate = rotation.norm(pulled(env, (0.0, 0.0, 0.0), (0.0, 0.0, 1e-5))[:, 3:])
    np.testing.assert_allclose(rate * SCALES, rate[1], rtol=1e-2)


def test_a_new_draw_replaces_the_old_one():
    env = drawn(mass=SCALES)
    before = pulled(env, (0.0, 0.0, 3.0))
    swapped = [env.configurations()[i] for i in ALL[::-1]]
    env.simulation.batch.bind("xfrc_applied")[:] = 0.0
    env.reset(options={"configurations": swapped})
    np.testing.assert_array_equal(pulled(env, (0.0, 0.0, 3.0)), before[::-1])


def test_rougher_things_slide_less_far():
    friction = np.array([0.5, 0.7, 1.0, 1.3])
    env = drawn(friction=friction)
    start = env.snapshot().position[THING]
    env.simulation.push(ALL, THING, np.tile([0.0, -0.5, 0.0], (len(ALL), 1)))
    for _ in range(5):
        stay(env)
    slid = rotation.norm((env.snapshot().position[THING] - start)[:, :2])
    assert (np.diff(slid) < 0).all() and slid[0] > 1.5 * slid[-1], slid


def test_weaker_servos_trail_further_under_a_load():
    servo = np.array([0.6, 0.8, 1.0, 1.2])
    env = drawn(servo=servo)
    pull = env.simulation.batch.bind("xfrc_applied")
    pull[:, env.simulation.model.body("hand").id, 2] = -30.0
    for _ in range(8):
        stay(env)
    commanded, _ = kinematics.forward(env.simulation.ctrl[:, :7])
    sag = commanded[:, 2] - env.snapshot().tcp[:, 2]
    # A servo is a spring: what it gives way by goes with one over its strength.
    np.testing.assert_allclose(sag * servo, sag[2], rtol=0.1)
    assert 0.001 < sag[2] < 0.01


def test_a_heavier_thing_pulls_the_hand_further_down():
    env = drawn(mass=SCALES)
    for _ in range(40):
        now = env.snapshot()
        lifted = env.task.held(now) & (now.position[THING][:, 2] > 0.06)
        action = env.expert()
        action[lifted] = 0.0  # hold still, fingers closed
        env.step_chunk(action[:, None])
    assert lifted.all()
    commanded, _ = kinematics.forward(env.simulation.ctrl[:, :7])
    sag = commanded[:, 2] - env.snapshot().tcp[:, 2]
    assert (np.diff(sag) > 0).all() and sag[-1] > 2 * sag[0], sag


@pytest.mark.parametrize("name", sorted(TASKS))
def test_things_lie_still_after_a_reset(name):
    env = twins.make_env(name, 64, render=False, randomisation="full")
    env.reset(seed=0, options={"region": "all"})
    before = env.snapshot()
    idle = np.zeros((64, 10, 7), np.float32)
    idle[..., 6] = 1.0
    assert not env.step_chunk(idle).done.any()
    now = env.snapshot()
    for thing in env.task.things:
        moved = rotation.norm(now.position[thing.name] - before.position[thing.name])
        turned = now.turn[thing.name] @ before.turn[thing.name].swapaxes(1, 2)
        assert moved.max() < 0.001 and rotation.norm(rotation.log(turned)).max() < 0.02, thing.name
        if thing.free:
            assert np.abs(now.velocity[thing.name]).max() < 0.02, thing.name


@pytest.mark.parametrize("name", sorted(TASKS))
def test_what_is_held_does_not_slip(name):
    only = [errand.name for errand in errands_of(make_task(name))[:1]]  # of the task's `grasped`
    env = twins.make_env(name, 8, render=False, errands=only or None)
    env.reset(seed=0)
    lift = np.zeros((8, 7), np.float32)
    for _ in range(60):
        now = env.snapshot()
        up = env.task.held(now) & (now.position[env.task.grasped][:, 2] > 0.06)
        action = np.where(up[:, None], lift, env.expert())
        env.step_chunk(action[:, None])
        if up.all():
            break
    assert up.all()

    def grip():
        now = env.snapshot()
        offset = now.position[env.task.grasped] - now.tcp
        return rotation.apply(now.tcp_turn.swapaxes(1, 2), offset)

    env.step_chunk(np.tile(lift[:, None], (1, 3, 1)))
    before = grip()
    result = env.step_chunk(np.tile(lift[:, None], (1, 20, 1)))
    assert not result.done.any() and env.task.held(env.snapshot()).all()
    assert rotation.norm(grip() - before).max() < 0.001  # m in 2 s
