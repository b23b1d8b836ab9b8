"""Erase-Whiteboard: the expert wipes the board, and nothing but sliding felt on the board takes ink away."""

import numpy as np
import pytest
import torch

import twins
from twinrl.env import image_key
from twins import kinematics, regions, rotation
from twins.env import MAX_SHIFT
from twins.shapes import Shape
from twins.snapshot import Snapshot
from twins.tasks import erase_whiteboard as task
from twins.tasks.erase_whiteboard import BOARD, CELLS, ENOUGH, ERASER, EraseWhiteboard

NAME = "erase-whiteboard"
ON_BOARD = 2 * BOARD[2] + ERASER[2]  # m, height of the eraser's middle when it lies there


def make(count=2, **options):
    return twins.make_env(NAME, num_envs=count, **({"render": False} | options))


def play(env, act, steps=task.EraseWhiteboard.max_steps):
    """Play to the end, or for `steps`; returns success (N,) and the transitions."""
    history = []
    for _ in range(steps):
        if env.done.all():
            break
        history.append(env.step_chunk(act()[:, None]))
    return np.concatenate([h.success for h in history], axis=1).any(axis=1), history


def wiped(env):
    """(N,) how many cells have lost their ink."""
    return env.task.wiped(env.snapshot().memory).sum(axis=1)


def put(env, across, along, height=ON_BOARD, roll=0.0):
    """Place the erasers beside the middle of the stroke, `across` and `along` it (m), long side across."""
    now, everyone = env.snapshot(), np.arange(env.num_envs)
    ink = rotation.about_z(rotation.yaw(now.turn["ink"]))
    offset = np.tile([across, along, 0.0], (env.num_envs, 1))
    position = now.position["ink"] + rotation.apply(ink, offset)
    position[:, 2] = height
    env.simulation.place(everyone, "eraser", position, ink @ rotation.exp(np.array([roll, 0, 0])))


def push(env, speed):
    """Give the erasers a speed along the stroke (m/s)."""
    ink = rotation.about_z(rotation.yaw(env.snapshot().turn["ink"]))
    along = rotation.apply(ink, np.tile([0.0, speed, 0.0], (env.num_envs, 1)))
    env.simulation.push(np.arange(env.num_envs), "eraser", along)


def idle(env, steps=1):
    """Let time pass with the hand where it is, open."""
    action = np.zeros((env.num_envs, steps, 7), np.float32)
    action[..., 6] = 1.0
    return env.step_chunk(action)


# -- the expert ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "region", "least"),
    [
        ({}, "id", 0.95),
        ({}, "ood", 0.95),
        ({"randomisation": "full"}, "all", 0.95),
        ({"variant": "standin"}, "all", 0.9),
    ],
)
def test_the_expert_wipes_the_board(options, region, least):
    env = make(32, **options)
    env.reset(seed=11, options={"region": region})
    success, history = play(env, env.expert)
    assert success.mean() >= least and not env.invalid_episodes
    lengths = np.concatenate([h.mask for h in history], axis=1).sum(axis=1)
    assert np.median(lengths) < 60


def test_the_expert_is_a_function_of_state_and_memory_and_takes_over_anywhere():
    env = make(24, max_steps=200)
    env.reset(seed=1, options={"region": "all"})
    rng = np.random.default_rng(0)
    reached = np.zeros(24, bool)
    for steps in (3, 9, 6):  # a policy that disturbs the approach, the grasp and the wiping
        wild = env.step_chunk(rng.normal(0, 0.03, (24, steps, 7)).astype(np.float32))
        np.testing.assert_array_equal(env.expert(), env.expert())
        reached |= wild.success.any(axis=1) | play(env, env.expert, 10)[0]
    reached |= play(env, lambda: env.expert(noise=0.2), 200)[0]
    assert reached.mean() >= 0.85  # some erasers were thrown over


def test_an_episode_repeats_bit_for_bit_with_its_memory():
    env, other = make(4, randomisation="full"), make(4)
    env.reset(seed=3, options={"region": "all"})
    other.reset(options={"configurations": env.configurations()})
    for _ in range(45):
        first, second = (e.step_chunk(e.expert()[:, None]) for e in (env, other))
        np.testing.assert_array_equal(first.states, second.states)
        np.testing.assert_array_equal(first.privileged, second.privileged)
    memory, again = env.snapshot().memory, other.snapshot().memory
    assert wiped(env).any()
    for name in EraseWhiteboard.memory:
        np.testing.assert_array_equal(memory[name], again[name], name)
    env.reset()
    assert not any(value.any() for value in env.snapshot().memory.values())


# -- resets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("region", "side"), [("id", -1), ("ood", 1)])
def test_ink_is_on_the_board_and_the_eraser_beside_it(region, side):
    rng, erase = np.random.default_rng(0), EraseWhiteboard()
    for _ in range(100):
        placement = regions.draw(rng, erase, erase.regions[region])
        assert side * placement["eraser"][1] > 0
        board, ink = (_frame(placement[name]) for name in ("board", "ink"))
        corners = np.array([(a * task.CELL[0], b * task.CELL[1]) for a in (-1, 1) for b in (-1, 1)])
        for x, y, yaw in task.PLACES:
            cell = corners @ rotation.about_z(yaw)[:2, :2].T + [x, y]
            on_board = (cell @ ink[0].T + ink[1] - board[1]) @ board[0]
            assert (np.abs(on_board) < np.array(BOARD[:2]) - 0.003).all()
        eraser = _frame(placement["eraser"])
        edge = np.linspace(-1, 1, 9)[:, None] * [ERASER[0], ERASER[1]]
        for corner in (edge, edge * [1, -1]):
            off = (corner @ eraser[0].T + eraser[1] - board[1]) @ board[0]
            assert (np.abs(off) > BOARD[:2]).any(axis=1).all()


def _frame(pose):
    return rotation.about_z(pose[2])[:2, :2], np.array(pose[:2])


def test_a_custom_region_without_room_for_the_ink_is_refused():
    env = make(regions={"far": {"ink": {"x": [0.3, 0.31]}}})
    with pytest.raises(ValueError, match="found no room for eraser, board, ink"):
        env.reset(options={"region": "far"})


# -- what wipes ------------------------------------------------------------------------------------------------


def test_a_pushed_eraser_wipes_what_it_slides_over_and_no_more():
    env = make()
    env.reset(seed=0)
    put(env, 0.0, 0.0)
    idle(env)
    push(env, 0.4)
    idle(env, 4)
    now = env.snapshot()
    gone, slid = env.task.wiped(now.memory), now.memory["slid"]
    assert gone.any(axis=1).all()
    # Felt that moved 2 cm from the stroke's middle has touched nothing 5 cm away from there.
    far = np.abs([y for _, y, _ in task.PLACES]) > 0.05
    assert not slid[:, far].any()


def test_half_a_centimetre_of_rubbing_is_not_enough_but_twice_as_much_is():
    env = make()
    env.reset(seed=0)
    put(env, 0.0, 0.0)
    idle(env)
    for enough in (False, True):
        push(env, 0.2)
        idle(env, 4)
        slid = env.snapshot().memory["slid"].max(axis=1)
        assert ((slid > 0.6 * task.RUB) & ((slid >= task.RUB) == enough)).all(), slid
        assert (wiped(env) > 0).tolist() == [enough] * 2


def test_an_eraser_that_is_set_down_wipes_nothing():
    env = make()
    env.reset(seed=0)
    put(env, 0.0, 0.0, height=ON_BOARD + 0.05)
    idle(env, 8)
    assert env.snapshot().memory["pressed"].all() and not wiped(env).any()


def test_an_eraser_set_down_here_and_then_there_wipes_nothing():
    env = make()
    env.reset(seed=0)
    for along in (-0.07, 0.0, 0.07, 0.0, -0.07, 0.07):
        put(env, 0.0, along)
        idle(env)
        assert env.snapshot().memory["pressed"].all()
    assert not wiped(env).any()


@pytest.mark.parametrize("speed", [1.0, 2.0, 4.0])
def test_an_eraser_thrown_across_the_board_is_no_success(speed):
    env = make()
    env.reset(seed=0)
    put(env, 0.0, -0.1, height=ON_BOARD + 0.01)
    push(env, speed)
    assert not idle(env, 8).success.any()
    # Where it touched down and came to rest it has slid a little, as an eraser would.
    assert (wiped(env) <= CELLS // 2).all()


def test_an_eraser_on_its_back_wipes_nothing():
    env = make()
    env.reset(seed=0)
    put(env, 0.0, 0.0, roll=np.pi)
    assert not env.task.pressed(env.snapshot()).any()
    result = idle(env)
    now = env.snapshot()
    assert now.contact[task.RUBS].all() and not env.task.pressed(now).any()
    assert result.terminated.all() and not result.success.any()


def test_an_eraser_swept_3_mm_above_the_board_wipes_nothing(monkeypatch):
    monkeypatch.setattr(task, "PRESS", -0.003)
    env = make(4)
    env.reset(seed=0)
    low = np.full(4, np.inf)
    for _ in range(60):
        env.step_chunk(env.expert()[:, None])
        now = env.snapshot()
        over = np.abs(now.position["eraser"] - now.position["ink"])[:, :2].max(axis=1) < 0.05
        low = np.where(over, np.minimum(low, env.task._clearance(now)), low)
    assert (low < 0.005).all() and not wiped(env).any()


def test_wiping_where_the_board_has_been_taken_away_wipes_nothing():
    env = make(4)
    env.reset(seed=0)
    for _ in range(80):
        now, everyone = env.snapshot(), np.arange(4)
        away = now.position["board"] * [1, 0, 1] + [0, 0.35, 0]
        env.simulation.place(everyone, "board", away, now.turn["board"])
        env.step_chunk(env.expert()[:, None])
    assert not wiped(env).any() and not env.snapshot().memory["slid"].any()


def test_bare_fingers_wipe_nothing():
    env = make()
    env.reset(seed=0)
    ink = env.snapshot().position["ink"]
    sweep = np.array([0.0, 0.07, 0.0])
    lowest = np.full(2, np.inf)
    for k in range(60):
        goal = ink + np.sin(0.4 * k) * sweep
        target, turn = env.targets()
        action = np.zeros((2, 7), np.float32)
        action[:, :3] = rotation.clip_norm(goal - target, MAX_SHIFT)
        action[:, 3:6] = rotation.log(kinematics.DOWN @ turn.swapaxes(1, 2))
        env.step_chunk(action[:, None])
        lowest = np.minimum(lowest, env.snapshot().tcp[:, 2])
    assert (lowest < 0.025).all(), "the fingers never came down to the board"
    assert not env.snapshot().memory["slid"].any()


def test_success_asks_for_95_percent_of_the_area():
    env = make()
    env.reset(seed=0)
    now = env.snapshot()
    for count in range(CELLS + 1):
        slid = np.zeros((2, CELLS), np.float32)
        slid[:, :count] = task.RUB
        reached = env.task.success(now._replace(memory=now.memory | {"slid": slid}), np.ones(2))
        assert reached.tolist() == [count / CELLS >= ENOUGH] * 2, count


def test_cells_are_of_one_size_and_do_not_touch_anything():
    cells = [shape for shape in EraseWhiteboard.things[2].shapes if isinstance(shape, Shape)]
    assert len(cells) == CELLS and len({cell.size for cell in cells}) == 1
    assert not any(cell.solid or cell.mass for cell in cells)


def test_an_eraser_off_the_table_or_on_its_side_ends_the_episode_as_a_failure():
    env = make(3)
    env.reset(seed=0)
    for i, place, roll in ((0, [0.5, 0.7, ERASER[2]], 0.0), (1, [0.4, 0.2, 0.03], np.pi / 2)):
        turn = rotation.exp(np.array([[roll, 0.0, 0.0]]))
        env.simulation.place(np.array([i]), "eraser", np.array([place]), turn)
    result = idle(env)
    assert result.terminated[:, 0].tolist() == [True, True, False]
    assert not result.success.any() and not result.truncated.any()


# -- numbers ---------------------------------------------------------------------------------------------------


def test_dense_terms_stay_within_bounds_and_grow_towards_success():
    env = make(4, reward=dict.fromkeys(EraseWhiteboard.term_names, 1.0))
    env.reset(seed=2)
    seen = []
    while not env.done.all():
        now = env.snapshot()
        terms = env.task.terms(now, np.ones(4))
        assert tuple(terms) == EraseWhiteboard.term_names
        assert all((value >= 0.0).all() and (value <= 1.0).all() for value in terms.values())
        seen.append({name: value.mean() for name, value in terms.items()})
        env.step_chunk(env.expert()[:, None])
    shares = [terms["wiped"] for terms in seen]
    assert shares == sorted(shares) and shares[0] == 0.0 and shares[-1] > 0.5
    assert seen[20]["reach"] > seen[0]["reach"] and seen[20]["grasp"] == 1.0


def test_privileged_numbers_say_what_they_are_named():
    env = make(8)
    env.reset(seed=5, options={"region": "all"})
    play(env, env.expert, 27)
    now = env.snapshot()
    told = dict(zip(EraseWhiteboard.privileged_names, env.task.privileged(now).T, strict=True))
    np.testing.assert_allclose(told["eraser_z"], now.position["eraser"][:, 2], rtol=1e-6)
    np.testing.assert_allclose(told["wiped"], wiped(env) / CELLS, rtol=1e-6)
    assert told["held"].all() and 0.0 < told["wiped"].mean() < 1.0
    assert set(told["pressed"]) <= {0.0, 1.0}
    # The nearest mark is a cell that has ink, and no such cell is nearer.
    cells = env.task._cells(now)[:, :, :2] - now.position["eraser"][:, None, :2]
    cells[env.task.wiped(now.memory)] = np.inf
    least = np.linalg.norm(cells, axis=2).min(axis=1)
    mark = np.hypot(told["mark_from_eraser_x"], told["mark_from_eraser_y"])
    np.testing.assert_allclose(mark, least, atol=2e-3)


def test_torch_and_numpy_agree_on_everything():
    env = make(6, randomisation="full")
    env.reset(seed=4, options={"region": "all"})
    erase, gripper = env.task, np.full(6, 0.0)
    for _ in range(4):
        play(env, env.expert, 11)
        now = Snapshot(*(_doubles(part) for part in env.snapshot()._replace(memory={})))
        now = now._replace(memory=env.snapshot().memory)
        there = Snapshot(*(_tensors(part) for part in now))
        target, turn = (_doubles(part) for part in env.targets())
        given = _tensors(target), _tensors(turn)
        for ours, theirs in (
            (erase.success(now, gripper), erase.success(there, _tensors(gripper))),
            (erase.lost(now), erase.lost(there)),
            (erase.held(now), erase.held(there)),
            (erase.privileged(now), erase.privileged(there)),
            (erase.expert(now, target, turn), erase.expert(there, *given)),
            (erase.terms(now, gripper), erase.terms(there, _tensors(gripper))),
            (erase.remember(now), erase.remember(there)),
            (erase.hidden(now.memory), erase.hidden(there.memory)),
        ):
            _assert_agree(ours, theirs)


def _doubles(part):
    if isinstance(part, dict):
        return {name: _doubles(value) for name, value in part.items()}
    return part if part.dtype == bool else part.astype(float)


def _tensors(part):
    if isinstance(part, dict):
        return {name: _tensors(value) for name, value in part.items()}
    return torch.from_numpy(np.ascontiguousarray(part))


def _assert_agree(ours, theirs):
    if not isinstance(ours, dict):
        ours, theirs = {"": ours}, {"": theirs}
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(theirs[name].numpy(), value, rtol=1e-5, atol=1e-6, err_msg=name)
        assert str(theirs[name].dtype).endswith(str(value.dtype)), name


# -- images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 128])
def test_ink_shows_in_the_picture_and_wiped_cells_do_not(size):
    env = make(6, render=True, image_size=size, cameras=("side",), randomisation="full")
    observation, _ = env.reset(seed=0, options={"region": "all"})
    key, everyone = image_key("side"), np.arange(6)
    full = observation[key].astype(int)

    def seen(gone):
        slid = np.broadcast_to(task.RUB * gone, (6, CELLS))
        env.simulation.hide(everyone, env.task.hidden({"slid": slid}))
        return env.simulation.images(everyone)["side"].astype(int)

    none, half = seen(np.ones(CELLS)), seen(np.arange(CELLS) < CELLS // 2)
    dark = [(none - image).max(axis=3) > 40 for image in (full, half)]
    pixels = [mask.sum(axis=(1, 2)) for mask in dark]
    assert (pixels[0] >= 12 * (size / 64) ** 2).all(), pixels[
        0
    ]  # 15 of 1 cm each at least, and dark
    ratio = pixels[1] / pixels[0]
    assert (ratio > 0.3).all() and (ratio < 0.7).all(), ratio
    assert not (dark[1] & ~dark[0]).any()
    again = seen(np.zeros(CELLS))
    np.testing.assert_array_equal(again, full)


def test_a_reset_brings_the_ink_back_and_an_episode_takes_it_away():
    env = make(2, render=True, image_size=32)
    first, info = env.reset(seed=6)
    # A white board without marks is what the side camera sees once the hand has gone.
    play(env, env.expert)
    assert env.done.all() and (wiped(env) >= ENOUGH * CELLS).all()
    last = env.simulation.images(np.arange(2))["side"].astype(int)
    env.simulation.hide(np.arange(2), env.task.hidden({"slid": np.zeros((2, CELLS))}))
    inked = env.simulation.images(np.arange(2))["side"].astype(int)
    assert (last - inked).max(axis=(1, 2, 3)).min() > 40
    second, _ = env.reset(options={"configurations": info["configurations"]})
    for key, value in first.items():
        np.testing.assert_array_equal(value, second[key], key)


def test_the_wrist_camera_sees_the_ink_while_the_hand_is_over_it():
    env = make(4, render=True, image_size=64, cameras=("wrist",))
    env.reset(seed=0)
    most = np.zeros(4)
    for _ in range(26):
        env.step_chunk(env.expert()[:, None])
        images = env.simulation.images(np.arange(4))["wrist"].astype(int)
        env.simulation.hide(np.arange(4), env.task.hidden({"slid": np.full((4, CELLS), task.RUB)}))
        bare = env.simulation.images(np.arange(4))["wrist"].astype(int)
        env.simulation.hide(np.arange(4), env.task.hidden(env.snapshot().memory))
        most = np.maximum(most, ((bare - images).max(axis=3) > 40).sum(axis=(1, 2)))
    assert (most > 40).all(), most
