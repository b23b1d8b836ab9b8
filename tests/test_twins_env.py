"""The environment: its API, repeatability and partial resets."""

import msgpack
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

import twins
from twinrl.env import PRIVILEGED, STATE, image_key
from twins.backends.contract import SimulationLost
from twins.env import MAX_SHIFT, MAX_TURN, clip_action

ENVS = 6
SIDE = image_key("side")


def make(**kwargs):
    return twins.make_env(num_envs=ENVS, **({"render": False} | kwargs))


def actions(seed, steps, count=ENVS):
    """Random motions around a descent, so that some touch the object or the table."""
    rng = np.random.default_rng(seed)
    chunk = rng.normal(0, 0.02, (count, steps, 7))
    chunk[..., 2] -= 0.01
    chunk[..., 6] = rng.uniform(size=(count, steps))
    return chunk.astype(np.float32)


def play(env, configurations, steps=12):
    env.reset(options={"configurations": configurations})
    return env.step_chunk(actions(0, steps))


def assert_same(first, second):
    for key in first.observation:
        np.testing.assert_array_equal(first.observation[key], second.observation[key], key)
    for name in ("states", "privileged", "action", "reward", "terminated", "truncated", "mask"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), name)


def test_spaces_and_attributes_describe_what_comes_out():
    env = make(render=True, image_size=32, cameras=("wrist",))
    observation, info = env.reset(seed=0)
    assert env.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    assert env.observation_space.contains(observation)
    assert observation[image_key("wrist")].shape == (ENVS, 32, 32, 3)
    assert SIDE not in observation
    assert len(env.state_names) == env.state_dim == observation[STATE].shape[1]
    assert len(env.privileged_names) == env.privileged_dim == observation[PRIVILEGED].shape[1]
    assert env.control_hz == pytest.approx(10.0) and env.max_steps == 64
    assert len(info["configurations"]) == ENVS
    observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
    assert env.observation_space.contains(observation)
    assert reward.shape == terminated.shape == truncated.shape == info["success"].shape == (ENVS,)
    env.close()


def test_a_seed_repeats_every_bit_on_any_number_of_threads():
    results = []
    for threads in (1, 1, 2):
        env = make(render=True, image_size=16, randomisation="full", threads=threads)
        env.reset(seed=7, options={"region": "all"})
        results.append(env.step_chunk(actions(1, 10)))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_a_configuration_repeats_its_episode_after_a_trip_over_the_wire():
    env = make(randomisation="full", variant="standin")
    env.reset(seed=3, options={"region": "ood"})
    packed = msgpack.packb(env.configurations())
    first = env.step_chunk(actions(0, 12))
    env.reset(seed=4)
    env.step_chunk(actions(5, 9))
    assert_same(first, play(env, msgpack.unpackb(packed)))
    assert_same(first, play(make(), msgpack.unpackb(packed)))


def test_other_environments_do_not_change_an_episode():
    env = make(randomisation="full")
    env.reset(seed=5)
    configurations = env.configurations()
    together = play(env, configurations)
    alone = twins.make_env(num_envs=1, render=False)
    alone.reset(options={"configurations": configurations[2:3]})
    result = alone.step_chunk(actions(0, 12)[2:3])
    np.testing.assert_array_equal(result.states[0], together.states[2])
    np.testing.assert_array_equal(result.privileged[0], together.privileged[2])


def test_step_and_step_chunk_agree():
    single, chunked = make(render=True, image_size=16), make(render=True, image_size=16)
    chunk = actions(2, 5)
    single.reset(seed=1)
    chunked.reset(seed=1)
    result = chunked.step_chunk(chunk)
    for k in range(5):
        observation, *_ = single.step(chunk[:, k])
        np.testing.assert_array_equal(observation[STATE], result.states[:, k])
    for key, value in observation.items():
        np.testing.assert_array_equal(value, result.observation[key], key)


def test_a_partial_reset_leaves_the_others_untouched():
    env = make(render=True, image_size=16)
    env.reset(seed=0)
    before = env.step_chunk(actions(3, 4)).observation
    kept = {key: value.copy() for key, value in before.items()}
    mask = np.array([True, False, True, False, False, False])
    after, _ = env.reset(options={"reset_mask": mask, "region": "ood"})
    for key in after:
        np.testing.assert_array_equal(after[key][~mask], kept[key][~mask], key)
        np.testing.assert_array_equal(before[key], kept[key], f"{key} was overwritten")
    assert (after[PRIVILEGED][mask, 1] > 0).all()
    twin = make()
    twin.reset(seed=0)
    twin.step_chunk(actions(3, 4))
    continued, other = env.step_chunk(actions(4, 4)), twin.step_chunk(actions(4, 4))
    np.testing.assert_array_equal(continued.states[~mask], other.states[~mask])


def test_the_time_limit_truncates_and_then_nothing_moves():
    env = make(max_steps=5)
    env.reset(seed=0)
    result = env.step_chunk(np.zeros((ENVS, 8, 7), np.float32))
    assert result.truncated[:, 4].all() and not result.terminated.any()
    assert result.truncated.sum() == ENVS and result.done.all()
    np.testing.assert_array_equal(result.mask, np.tile(np.arange(8) < 5, (ENVS, 1)))
    assert not result.states[:, 5:].any() and not result.action[:, 5:].any()
    idle = env.step_chunk(actions(0, 2))
    assert not idle.mask.any()
    np.testing.assert_array_equal(idle.observation[STATE], result.states[:, 4])


def test_success_ends_an_episode_inside_a_chunk_and_is_never_truncated_too():
    env = make()
    env.reset(seed=2)
    steps = []
    while not env.done.all():
        steps.append(env.step_chunk(np.repeat(env.expert()[:, None], 3, axis=1)))
    terminated, truncated, success, reward, mask = (
        np.concatenate([getattr(s, name) for s in steps], axis=1)
        for name in ("terminated", "truncated", "success", "reward", "mask")
    )
    assert not (terminated & truncated).any()
    assert ((terminated | truncated).sum(axis=1) == 1).all()
    np.testing.assert_array_equal(reward, success.astype(np.float32))
    ends = np.argmax(terminated | truncated, axis=1)
    np.testing.assert_array_equal(mask.sum(axis=1), ends + 1)


def test_regions_are_the_two_halves_of_the_table():
    env = make()
    for region, sign in (("id", -1), ("ood", 1)):
        observation, info = env.reset(seed=0, options={"region": region})
        assert (sign * observation[PRIVILEGED][:, 1] > 0.02).all()
        assert {c["region"] for c in info["configurations"]} == {region}
    drawn = {env.draw("all")["region"] for _ in range(20)}
    assert drawn == {"id", "ood"}


def test_actions_are_clipped_in_length_and_said_so():
    env = make()
    env.reset(seed=0)
    wild = np.full((ENVS, 1, 7), 9.0, np.float32)
    executed = env.step_chunk(wild).action[:, 0]
    assert np.linalg.norm(executed[:, :3], axis=1) == pytest.approx(MAX_SHIFT, rel=1e-5)
    assert np.linalg.norm(executed[:, 3:6], axis=1) == pytest.approx(MAX_TURN, rel=1e-5)
    assert (executed[:, 6] == 1).all()
    np.testing.assert_allclose(executed, clip_action(wild[:, 0]), rtol=1e-6)


def test_the_state_tells_the_last_two_actions_and_what_is_under_way():
    env = make(randomisation={"latency": 1.0})
    env.reset(seed=1)
    chunk = actions(6, 2)
    chunk[..., :6] *= 0.2
    states = env.step_chunk(chunk).states
    first = env.state_names.index("last_action_0")
    np.testing.assert_allclose(states[:, 1, first : first + 7], chunk[:, 1], atol=1e-6)
    np.testing.assert_allclose(states[:, 1, first + 7 :], chunk[:, 0], atol=1e-6)


def test_latency_delays_the_motion_by_control_steps():
    env = make()
    env.reset(seed=0)
    base = env.configurations()[0]
    late = [base | {"draw": base["draw"] | {"latency": k}} for k in (0, 1, 2)] + [None] * 3
    env.reset(options={"configurations": late})
    down = np.zeros((ENVS, 4, 7), np.float32)
    down[..., 2], down[..., 6] = -0.02, 1.0
    height = env.step_chunk(down).states[:3, :, 2]
    np.testing.assert_allclose(height[0, :3], height[1, 1:], atol=1e-3)
    np.testing.assert_allclose(height[0, :2], height[2, 2:], atol=1e-3)


def test_a_partial_configuration_lays_the_same_scene_out_on_the_standin():
    env, standin = make(), make(variant="standin")
    env.reset(seed=0)
    places = [{k: c[k] for k in ("seed", "object", "basket")} for c in env.configurations()]
    standin.reset(options={"configurations": places})
    for ours, theirs in zip(env.configurations(), standin.configurations(), strict=True):
        assert ours["object"] == theirs["object"] and ours["joints"] == theirs["joints"]
        assert ours["draw"]["latency"] == 0 and theirs["draw"]["latency"] == 1


def test_a_simulation_that_diverges_voids_its_own_episode_and_no_other():
    env, calm = make(render=True, image_size=16), make(render=True, image_size=16)
    for e in (env, calm):
        e.reset(seed=0)
        e.step_chunk(actions(3, 2))
    env.simulation.qvel[2, -1] = 1e300
    env.simulation.qpos[4, 3] = np.nan
    result, other = env.step_chunk(actions(4, 3)), calm.step_chunk(actions(4, 3))
    assert result.invalid.tolist() == [False, False, True, False, True, False]
    assert result.done.tolist() == env.done.tolist() == result.invalid.tolist()
    assert not result.mask[result.invalid].any() and env.invalid_episodes == 2
    for value in result.observation.values():
        assert np.isfinite(value).all()
    assert_same(_of(result, ~result.invalid), _of(other, ~result.invalid))
    env.reset(options={"reset_mask": result.invalid})
    again = env.step_chunk(actions(5, 3))
    assert again.mask.all() and not again.invalid.any() and np.isfinite(again.states).all()


def _of(step, rows):
    """The chunk step of some environments."""
    fields = {name: value[rows] for name, value in step._asdict().items() if name != "observation"}
    observation = {key: value[rows] for key, value in step.observation.items()}
    return type(step)(observation=observation, **fields)


def test_a_simulation_lost_in_a_reset_is_told_of_with_the_next_step(monkeypatch):
    env = make()
    env.reset(seed=0)

    def lose(*_):
        raise SimulationLost("its process was killed")

    for method in ("configure", "snapshot", "step"):
        with monkeypatch.context() as broken:
            broken.setattr(env.simulation, method, lose)
            if method == "configure":
                env.reset(options={"reset_mask": np.arange(ENVS) == 1})
            elif method == "snapshot":
                env.expert()
            result = env.step_chunk(actions(0, 2))
        assert result.invalid.all() and result.done.all() and not result.mask.any(), method
        assert not env.step_chunk(actions(0, 2)).done.any()  # told once
        env.reset()
        assert env.step_chunk(actions(0, 2)).mask.all(), method
    assert env.invalid_episodes == 3 * ENVS


def test_dense_terms_are_paid_with_the_weights_asked_for():
    env, sparse = make(reward={"reach": 0.5}), make()
    for e in (env, sparse):
        e.reset(seed=0)
    dense, plain = env.step_chunk(actions(0, 4)), sparse.step_chunk(actions(0, 4))
    np.testing.assert_array_equal(dense.states, plain.states)
    assert not plain.reward.any() and (dense.reward > 0).all() and (dense.reward < 0.5).all()


def test_a_custom_region_is_where_resets_draw_from():
    corner = {"corner": {"object": {"x": [0.4, 0.42], "y": [-0.2, -0.18]}}}
    env = make(regions=corner, region="corner")
    env.reset(seed=0)
    for configuration in env.configurations():
        x, y, _ = configuration["object"]
        assert 0.4 <= x <= 0.42 and -0.2 <= y <= -0.18 and configuration["region"] == "corner"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: twins.make_env("pick-and-plaice"), "pick-and-place"),
        (lambda: make(variant="dream"), "standin"),
        (lambda: make(randomisation="some"), "full"),
        (lambda: make(randomisation={"fricton": 1.0}), "friction"),
        (lambda: make(cameras=("front",), render=True), "side"),
        (lambda: make(region="mars"), "ood"),
        (lambda: make(regions={"far": {"object": {"x": [0.4, 1.9]}}}), "outside what the arm"),
        (lambda: make(regions={"far": {"objct": {}}}), "'object'"),
        (lambda: make(regions={"far": {"object": {"z": [0, 1]}}}), "axis 'z'"),
        (lambda: make(regions={"id": {}}), "another name"),
        (lambda: make(reward={"reech": 1.0}), "'reach'"),
        (lambda: make(backend="mujocco"), "'mujoco'"),
        (lambda: make(randomisation={"light": 3.0}), "from 0 to 1"),
        (lambda: twins.make_env(num_envs=0), "at least 1"),
        (lambda: make().reset(options={"mask": None}), "mask"),
        (lambda: make().reset(options={"reset_mask": [True]}), "reset_mask"),
        (lambda: make().reset(options={"configurations": [{"objekt": 1}] * ENVS}), "objekt"),
        (lambda: make().reset(options={"configurations": [{"task": "x"}] * ENVS}), "'x'"),
        (lambda: make().step_chunk(np.zeros((ENVS, 7))), "expected"),
        (lambda: make().step_chunk(np.full((ENVS, 1, 7), np.nan)), "finite"),
    ],
)
def test_mistakes_are_answered_with_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()
