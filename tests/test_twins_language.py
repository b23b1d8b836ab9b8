"""Instructions as a part of an episode, and the task in which only they say what is asked."""

import json

import numpy as np
import pytest

import twins
from twinrl.env import PRIVILEGED, image_key
from twins import errands
from twins.labels import instructed_scenes
from twins.retarget import Demonstration, Tracker
from twins.tasks import follow_instruction as task
from twins.tasks import make_task

NAME = "follow-instruction"
ERRANDS = {errand.name: errand for errand in task.FollowInstruction.errands}
UPRIGHT = np.eye(3)[None]


def make(count, **options):
    return twins.make_env(NAME, count, **{"render": False, **options})


def play(env, act=None):
    """Play to the end; (N,) success, and the steps' results."""
    history = []
    while not env.done.all():
        history.append(env.step_chunk((act or env.expert)()[:, None]))
    return np.concatenate([step.success for step in history], axis=1).any(axis=1), history


def idle(count, gripper=1.0):
    action = np.zeros((count, 1, 7), np.float32)
    action[..., 6] = gripper
    return action


@pytest.mark.parametrize(
    ("options", "region"),
    [({}, "id"), ({}, "ood"), ({"randomisation": "full"}, "all"), ({"variant": "standin"}, "all")],
)
def test_the_expert_does_each_errand(options, region):
    env = make(48, **options)
    names = list(ERRANDS) * 12
    env.reset(
        seed=3,
        options={"configurations": [{"errand": name, "region": region} for name in names]}
        if region != "all"
        else {"region": region},
    )
    success, _ = play(env)
    done = [c["errand"] for c, good in zip(env.configurations(), success, strict=True) if good]
    assert success.mean() >= 0.95
    assert set(done) == set(ERRANDS)


def test_a_wrong_block_in_the_hand_is_put_down_and_the_right_one_taken():
    env = make(24, max_steps=140)
    other = {"red-green": "blue-yellow", "blue-yellow": "red-green"}
    starts = [{"errand": name, "seed": seed} for seed in range(12) for name in other]
    env.reset(options={"configurations": starts})
    wrong = make(24, max_steps=140)
    wrong.reset(options={"configurations": [{**c, "errand": other[c["errand"]]} for c in starts]})
    while True:  # until all of them hold the other block in the air
        now = wrong.snapshot()
        high = wrong.task.held(now) & (now.tcp[:, 2] > 0.07)
        if high.all():
            break
        action = wrong.expert()
        action[high] = [*[0.0] * 6, 0.0]
        for each in (wrong, env):
            each.step_chunk(action[:, None])
    assert not env.task.held(env.snapshot()).any() and not env.done.any()
    success, _ = play(env)
    assert success.mean() >= 0.9


@pytest.mark.parametrize("name", ERRANDS)
def test_success_is_the_named_block_on_the_named_pad_and_cannot_be_faked(name):
    errand = ERRANDS[name]
    (other,) = {e.grasped for e in ERRANDS.values()} - {errand.grasped}
    (other_pad,) = {e.goal for e in ERRANDS.values()} - {errand.goal}
    on = np.array([0.0, 0.0, task.HEIGHT])
    beside, above = on + np.array([[0.07, 0.0, 0.0], [0.0, 0.0, 0.1]])
    cases = [  # what is put where, the gripper; success, the end
        ([(errand.grasped, errand.goal, on)], 1.0, True, True),
        ([(errand.grasped, errand.goal, on)], 0.0, False, False),
        ([(errand.grasped, errand.goal, above)], 1.0, False, False),
        ([(errand.grasped, errand.goal, beside)], 1.0, False, False),
        ([(errand.grasped, other_pad, on)], 1.0, False, True),
        ([(other, errand.goal, on)], 1.0, False, True),
        ([(other, other_pad, on)], 1.0, False, True),
        # Both blocks onto both pads is no answer either.
        ([(errand.grasped, errand.goal, on), (other, other_pad, on)], 1.0, False, True),
    ]
    env = make(1)
    for placed, gripper, success, ended in cases:
        env.reset(options={"configurations": [{"errand": name, "seed": 5}]})
        for thing, pad, offset in placed:
            where = env.snapshot().position[pad] * [1, 1, 0] + offset
            env.simulation.place(np.arange(1), thing, where, UPRIGHT)
        step = env.step_chunk(idle(1, gripper))
        found = bool(step.success[0, 0]), bool(step.terminated[0, 0])
        assert found == (success, ended), (placed, gripper)


def test_a_block_that_is_still_held_on_its_pad_is_no_success():
    env = make(2, max_steps=200)
    env.reset(seed=1)
    for _ in range(60):
        action = env.expert()
        now = env.snapshot()
        opening = env.task.held(now) & (action[:, 6] > 0.5)
        action[opening] = 0.0
        env.step_chunk(action[:, None])
        if opening.all():
            break
    held = env.step_chunk(np.repeat(idle(2, 0.0), 4, axis=1))
    assert opening.all() and not held.success.any() and not held.terminated.any()
    success, _ = play(env)
    assert success.all()


def test_where_things_lie_says_nothing_about_what_is_asked():
    """The same seed shows the same scene for each errand: what is seen cannot tell them apart."""
    env = make(4, render=True, image_size=32)
    first, _ = env.reset(
        options={"configurations": [{"seed": 9, "errand": name} for name in ERRANDS]}
    )
    for camera in env.cameras:
        images = first[image_key(camera)]
        assert (images == images[0]).all()
    assert (first["observation.state"] == first["observation.state"][0]).all()
    assert len(set(env.instructions())) == 4
    # What is privileged does: it tells the roles.
    assert len({row.tobytes() for row in first[PRIVILEGED]}) == 4


def test_poses_in_place_of_pictures_do_not_tell_what_is_asked_either():
    env = make(4, observe="state")
    first, _ = env.reset(
        options={"configurations": [{"seed": 9, "errand": name} for name in ERRANDS]}
    )
    assert {"red_block_x", "yellow_pad_y"} <= set(env.state_names)
    assert (first["observation.state"] == first["observation.state"][0]).all()


def test_every_errand_and_wording_is_drawn_and_none_that_is_held_out():
    env = make(64)
    seen = set()
    for seed in range(8):
        env.reset(seed=seed)
        seen |= {
            (c["errand"], text)
            for c, text in zip(env.configurations(), env.instructions(), strict=True)
        }
    told = {(name, text) for name, errand in ERRANDS.items() for text in errand.instructions}
    assert seen == told
    held_out = {text for errand in ERRANDS.values() for text in errand.held_out}
    assert held_out and not held_out & {text for _, text in told}
    some = make(32, errands=["red-yellow", "blue-green"])
    some.reset(seed=0)
    assert {c["errand"] for c in some.configurations()} == {"red-yellow", "blue-green"}


def test_a_configuration_repeats_the_instruction_and_may_name_it_in_part():
    env = make(3, errands=["red-green"])
    env.reset(seed=2)
    text = json.dumps(env.configurations())
    other = make(3, seed=77)
    other.reset(options={"configurations": json.loads(text)})
    assert other.instructions() == env.instructions()
    assert json.dumps(other.configurations()) == text

    unheard = ERRANDS["blue-yellow"].held_out[1]
    own = "shove the blue one yonder"
    other.reset(
        options={
            "configurations": [
                {"instruction": unheard},
                {"errand": "red-yellow"},
                {"errand": "blue-yellow", "instruction": own},
            ]
        }
    )
    named = [c["errand"] for c in other.configurations()]
    assert named == ["blue-yellow", "red-yellow", "blue-yellow"]
    told = other.instructions()
    assert told[0] == unheard and told[2] == own and told[1] in ERRANDS["red-yellow"].instructions
    with pytest.raises(ValueError, match="did you mean 'put the red block on the green pad'"):
        other.reset(options={"configurations": [{"instruction": "put the red block on green"}] * 3})
    with pytest.raises(ValueError, match="errand is 'green-red'"):
        other.reset(options={"configurations": [{"errand": "green-red"}] * 3})
    with pytest.raises(ValueError, match="must be some of follow-instruction's"):
        make(1, errands=["green-red"])


def test_an_environment_may_be_told_one_instruction():
    text = ERRANDS["blue-green"].held_out[0]
    env = make(8, instruction=text)
    env.reset(seed=0)
    assert env.instruction == text and env.instructions() == [text] * 8
    assert {c["errand"] for c in env.configurations()} == {"blue-green"}
    with pytest.raises(ValueError, match="does not know the instruction"):
        make(1, instruction="do the dishes")


def test_a_task_of_one_instruction_gives_it_to_all_and_keeps_its_configurations():
    env = twins.make_env("erase-whiteboard", 2, render=False)
    env.reset(seed=0)
    assert env.instructions() == [env.instruction] * 2
    assert not {"errand", "instruction"} & set(env.configurations()[0])
    with pytest.raises(ValueError, match="it has none"):
        twins.make_env("erase-whiteboard", 1, render=False, errands=["x"])
    assert errands.roles(env.task, env.configurations()[0]) == ("eraser", "ink")


def test_labelled_scenes_are_told_and_labelled_by_role():
    env = make(1, render=True, image_size=64, errands=["red-green", "red-yellow", "blue-green"])
    images, state, labels, told = instructed_scenes(
        env, 120, np.random.default_rng(0), appearance="none"
    )
    at = env.privileged_names.index
    np.testing.assert_allclose(
        labels[:, :3] - state[:, :3], labels[:, at("block_from_tcp_x") :][:, :3], atol=1e-6
    )
    assert not any("blue" in text and "yellow" in text for text in told)
    assert 0.1 < (labels[:, at("held")] > 0.5).mean() < 0.5
    lying = labels[:, at("block_z")] < task.LYING
    for colour, seen in (("red", _red), ("blue", _blue)):
        rows = [i for i, text in enumerate(told) if colour in text and lying[i]]
        columns = np.array([seen(images["side"][i]) for i in rows])
        found = np.isfinite(columns)
        assert found.sum() > 15
        pairs = np.corrcoef(columns[found], labels[rows, at("block_y")][found])[0, 1]
        other = at("blue_block_y" if colour == "red" else "red_block_y")
        others = np.corrcoef(columns[found], labels[rows, other][found])[0, 1]
        assert pairs > 0.95 > abs(others), colour


def _middle(mask):
    _, columns = np.nonzero(mask)
    return columns.mean() if len(columns) else np.nan


def _red(image):
    red, green, blue = np.moveaxis(image.astype(int), -1, 0)
    return _middle((red > 3 * green) & (red > 3 * blue))


def _blue(image):
    red, green, blue = np.moveaxis(image.astype(int), -1, 0)
    return _middle((blue > 2.5 * red) & (blue > 2 * green))


def test_demonstrations_are_retargeted_to_errands_that_nobody_showed():
    shown = make(8, errands=["red-green"])
    shown.reset(seed=4)
    success, history = play(shown)
    states, actions, mask = (
        np.concatenate([getattr(step, part) for step in history], axis=1)
        for part in ("states", "action", "mask")
    )
    demonstrations = [
        Demonstration.of(states[i, mask[i]], actions[i, mask[i]], shown.configurations()[i])
        for i in np.flatnonzero(success)
    ]
    env = make(32, errands=["red-green", "blue-yellow"])
    env.reset(seed=6, options={"region": "ood"})
    tracker = Tracker(env, demonstrations)
    tracker.begin()
    good, _ = play(env, lambda: tracker.actions()[0])
    for name in ("red-green", "blue-yellow"):
        mine = [c["errand"] == name for c in env.configurations()]
        assert good[mine].mean() >= 0.6, name


def test_on_a_device_the_same_errand_is_played():
    starts = [{"seed": i, "errand": name} for i, name in enumerate(ERRANDS)]
    here, there = make(4), make(4, backend="mujoco-warp")
    ours, _ = here.reset(options={"configurations": starts})
    theirs, _ = there.reset(options={"configurations": starts})
    np.testing.assert_allclose(theirs[PRIVILEGED], ours[PRIVILEGED], atol=1e-3)
    assert there.instructions() == here.instructions()
    np.testing.assert_allclose(there.expert(), here.expert(), atol=1e-3)


def test_a_description_tells_the_tasks_general_text():
    spec = twins.describe(NAME)
    assert spec.instruction == make_task(NAME).instructions[0]
