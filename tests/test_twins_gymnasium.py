"""Any gymnasium environment as an Env: keys, actions, autoreset modes, failures, seeds. Python 3.8 and gymnasium 0.29 too."""

import ast
import json
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from twinrl.env import PRIVILEGED, STATE, image_key
from twins.backends import gymnasium_fleet as fleets
from twins.backends import gymnasium_mapping as mapping
from twins.backends.gymnasium_env import BROKEN, GymnasiumEnv

ROOT = Path(__file__).parent.parent
COUNTER = "twinrl-test/Counter-v0"
SCENE = "twinrl-test/Scene-v0"
LIMIT = 50


class Counter(gymnasium.Env):
    """Observes [seed, its number of steps, the last action]; ends after `length` steps of its reset options.

    `break_at` says at which step it fails, and `how`.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}  # noqa: RUF012
    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = spaces.Box(-2.0, 2.0, (1,), np.float32)

    def __init__(self, render_mode=None, how="terminated"):
        self.render_mode, self.how = render_mode, how

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        options = options or {}
        self.seed = -1.0 if seed is None else float(seed % 1000)
        self.count, self.last = 0, 0.0
        self.length, self.break_at = options.get("length", 7), options.get("break_at", 0)
        if options.get("break_first"):
            if self.how == "raise":
                raise ArithmeticError("the counter burst")
            self.last = np.nan
        return self._see(), {}

    def step(self, action):
        self.count, self.last = self.count + 1, float(action[0])
        reward, observation = float(self.count), self._see()
        if self.count == self.break_at:
            if self.how == "raise":
                raise ArithmeticError("the counter burst")
            reward, observation = (
                (np.nan, observation) if self.how == "reward" else (0.0, observation * np.nan)
            )
        ended = self.count >= self.length
        flags = {"terminated": (True, False), "truncated": (False, True), "both": (True, True)}
        terminated, truncated = flags.get(self.how, (True, False)) if ended else (False, False)
        return observation, reward, terminated, truncated, {"done well": ended}

    def _see(self):
        return np.array([self.seed, self.count, self.last], np.float32)

    def render(self):
        return np.full((6, 9, 3), self.count, np.uint8)


class Scene(gymnasium.Env):
    """A dictionary of everything: groups, pictures of all kinds, choices, text."""

    metadata = {}  # noqa: RUF012
    observation_space = spaces.Dict(
        {
            "arm": spaces.Dict(
                {"joints": spaces.Box(-3, 3, (2,), np.float64), "held": spaces.Discrete(3)}
            ),
            "secret": spaces.Box(-1, 1, (2, 2), np.float32),
            "pixels": spaces.Dict(
                {
                    "top": spaces.Box(0, 255, (4, 8, 3), np.uint8),
                    "depth": spaces.Box(0.0, 1.0, (1, 8, 8), np.float32),
                }
            ),
        }
    )
    action_space = spaces.Discrete(3, start=5)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._see(), {}

    def step(self, action):
        return self._see(), float(action), False, False, {}

    def _see(self):
        top = np.zeros((4, 8, 3), np.uint8)
        top[:, :4] = 200
        return {
            "arm": {"joints": np.array([0.5, -0.5]), "held": 2},
            "secret": np.array([[1, 2], [3, 4]], np.float32),
            "pixels": {"top": top, "depth": np.ones((1, 8, 8), np.float32)},
        }


for _id, _class in ((COUNTER, Counter), (SCENE, Scene)):
    if _id not in gymnasium.registry:
        gymnasium.register(_id, _class, max_episode_steps=LIMIT, reward_threshold=None)


def zeros(env, chunk=1):
    return np.zeros((env.num_envs, chunk, 7), np.float32)


def with_lengths(env, lengths, **extra):
    """Reset to episodes of given lengths, seeds 1, 2, ..."""
    given = [
        {"seed": i + 1, "options": dict(extra.get(str(i), {}), length=length)}
        for i, length in enumerate(lengths)
    ]
    return env.reset(options={"configurations": given})


def vectorised(count, mode):
    """A VectorEnv of Counters that resets itself as `mode` says; None: as its gymnasium always does."""
    options = {}
    if mode:
        options["autoreset_mode"] = gymnasium.vector.AutoresetMode[mode]
    return gymnasium.vector.SyncVectorEnv([Counter] * count, **options)


def fleet(kind, count=3):
    """A fleet of Counters that reset themselves in each way there is."""
    how, _, mode = kind.partition(" ")
    if how == "single":
        return fleets.Singles([Counter() for _ in range(count)])
    if how == "alone":
        every = [vectorised(1, mode) for _ in range(count)]
        return fleets.Singles([fleets.Alone(e, fleets.autoreset_mode(e)) for e in every])
    if how == "processes":
        mode = gymnasium.vector.AutoresetMode[mode]
        return fleets.Together(
            gymnasium.vector.AsyncVectorEnv([Counter] * count, autoreset_mode=mode)
        )
    return fleets.Together(vectorised(count, mode))


KINDS = ["single", "alone"]
if fleets.MASKS:
    KINDS = [
        "single",
        *(f"{how} {mode}" for how in ("alone", "together") for mode in fleets.MODES),
        "processes DISABLED",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_however_it_resets_every_step_is_recorded_once_and_no_reset_is_one(kind):
    """Counts name each step: whatever an environment does when others go on must not show."""
    env = GymnasiumEnv(COUNTER, 3, fleet=fleet(kind), max_steps=LIMIT)
    lengths = [3, 7, 30]
    with_lengths(env, lengths)
    recorded, waiting = [[] for _ in lengths], np.zeros(3, bool)
    for number in range(12):
        step = env.step_chunk(zeros(env, 4))
        assert not step.invalid.any()
        for i in range(3):
            recorded[i] += step.states[i, step.mask[i]][:, 1].tolist()
            np.testing.assert_array_equal(step.mask[i], np.arange(4) < step.mask[i].sum())
        seen = step.observation[STATE]
        for i in np.flatnonzero(step.done):
            assert seen[i, 1] == lengths[i], (
                "the last observation is the episode's, not the next one's"
            )
            assert step.terminated[i].sum() == 1
            assert recorded[i] == list(range(1, lengths[i] + 1))
        waiting |= step.done
        if number == 3 or not waiting.any():  # ended ones may wait while others go on
            continue
        given = [{"seed": 10 + number, "options": {"length": n}} for n in lengths]
        after, info = env.reset(options={"reset_mask": waiting, "configurations": given})
        for i in range(3):
            assert (info["configurations"][i]["seed"] == 10 + number) == waiting[i]
            if waiting[i]:
                assert after[STATE][i].tolist() == [10 + number, 0, 0]
                recorded[i] = []
            else:
                np.testing.assert_array_equal(after[STATE][i], seen[i])
        waiting[:] = False
    assert recorded[2] == list(range(1, 17))
    env.close()


@pytest.mark.parametrize("kind", KINDS)
def test_ended_environments_stay_as_they_are(kind):
    env = GymnasiumEnv(COUNTER, 3, fleet=fleet(kind), cameras=["render"] if shows(kind) else [])
    with_lengths(env, [2, 5, 40])
    first = env.step_chunk(zeros(env, 3))
    for _ in range(3):
        again = env.step_chunk(zeros(env, 3))
    assert first.done.tolist() == [True, False, False]
    assert not again.mask[:2].any() and again.mask[2].all()
    assert again.done.tolist() == [False, False, False]
    for key, value in again.observation.items():
        np.testing.assert_array_equal(value[0], first.observation[key][0], key)
    assert again.observation[STATE][:, 1].tolist() == [2, 5, 12]
    if shows(kind):
        assert again.observation[image_key("render")][:, 0, 0, 0].tolist() == [2, 5, 12]
    env.close()


def shows(kind):
    """It can be rendered at an episode's end (our vectorised Counters are made without a render mode)."""
    return kind == "single"


def test_the_camera_render_shows_each_end():
    env = GymnasiumEnv(COUNTER, 2, cameras=["render"], image_size=8)
    with_lengths(env, [2, 9])
    step = env.step_chunk(zeros(env, 4))
    images = step.observation[image_key("render")]
    assert images.shape == (2, 8, 8, 3) and images.dtype == np.uint8
    assert images[0].max() == images[0].min() == 2
    assert images[1].max() == images[1].min() == 4


@pytest.mark.parametrize(
    ("how", "terminated", "truncated"),
    [("terminated", 1, 0), ("truncated", 0, 1), ("both", 1, 0)],
)
def test_an_episode_is_terminated_or_truncated(how, terminated, truncated):
    env = GymnasiumEnv(COUNTER, 1, kwargs={"how": how})
    with_lengths(env, [3])
    step = env.step_chunk(zeros(env, 5))
    assert step.terminated[0].tolist() == [False, False, bool(terminated), False, False]
    assert step.truncated[0].tolist() == [False, False, bool(truncated), False, False]
    assert step.reward[0].tolist() == [1, 2, 3, 0, 0]


def test_the_time_limit_truncates():
    env = GymnasiumEnv(COUNTER, 2, max_steps=4)
    with_lengths(env, [9, 4])
    step = env.step_chunk(zeros(env, 6))
    assert step.mask.sum(1).tolist() == [4, 4]
    assert step.truncated[:, 3].tolist() == [True, False]
    assert step.terminated[:, 3].tolist() == [False, True]
    assert GymnasiumEnv(COUNTER, 1).max_steps == LIMIT
    longer = GymnasiumEnv(COUNTER, 1, max_steps=60)  # beyond the registered limit
    with_lengths(longer, [99])
    assert longer.step_chunk(zeros(longer, 70)).mask.sum() == 60


@pytest.mark.parametrize("how", ["observation", "reward", "raise"])
def test_a_failure_voids_one_episode_and_disturbs_nobody(how):
    env, calm = (GymnasiumEnv(COUNTER, 3, kwargs={"how": how}) for _ in range(2))
    with_lengths(env, [9, 9, 9], **{"1": {"break_at": 3}})
    with_lengths(calm, [9, 9, 9])
    step, expected = env.step_chunk(zeros(env, 5)), calm.step_chunk(zeros(env, 5))
    assert step.invalid.tolist() == [False, True, False] == step.done.tolist()
    assert step.mask.sum(1).tolist() == [5, 2, 5]
    assert not step.terminated.any() and not step.truncated.any()
    assert step.observation[STATE][1, 1] == 2  # the last good one
    assert all(np.isfinite(value).all() for value in step.observation.values())
    for i in (0, 2):
        np.testing.assert_array_equal(step.states[i], expected.states[i])
        np.testing.assert_array_equal(step.reward[i], expected.reward[i])
    assert env.invalid_episodes == 1
    assert "environment 1, after 2 steps" in env.last_failure
    assert not env.step_chunk(zeros(env, 2)).mask[1].any()
    env.reset(options={"reset_mask": step.done})
    assert env.step_chunk(zeros(env, 2)).mask[1].all()


@pytest.mark.parametrize("how", ["observation", "raise"])
def test_a_failure_in_a_reset_is_told_by_the_next_step(how):
    env = GymnasiumEnv(COUNTER, 3, kwargs={"how": how})
    with_lengths(env, [9, 9, 9])
    env.step_chunk(zeros(env, 2))
    before, _ = with_lengths(env, [9, 9, 9], **{"1": {"break_first": True}})
    assert all(np.isfinite(value).all() for value in before.values())
    assert before[STATE][:, 1].tolist() == [0, 2, 0]
    step = env.step_chunk(zeros(env, 2))
    assert step.invalid.tolist() == [False, True, False] == step.done.tolist()
    assert step.mask.sum(1).tolist() == [2, 0, 2]
    assert not env.step_chunk(zeros(env)).invalid.any()  # said once
    with_lengths(env, [9, 9, 9])
    assert env.step_chunk(zeros(env, 2)).mask.all() and env.invalid_episodes == 1


def test_an_environment_that_never_works_is_an_error():
    env = GymnasiumEnv(COUNTER, 1, kwargs={"how": "raise"})
    with pytest.raises(RuntimeError, match="the counter burst"):
        for _ in range(BROKEN):
            with_lengths(env, [9], **{"0": {"break_at": 1}})
            env.step_chunk(zeros(env))


def test_keys_become_state_privileged_and_cameras():
    env = GymnasiumEnv(SCENE, 2, image_size=16, privileged=["secret"])
    observation, _ = env.reset(seed=0)
    assert env.state_names == (
        "arm.joints_0",
        "arm.joints_1",
        "arm.held_0",
        "arm.held_1",
        "arm.held_2",
    ) or (
        env.state_names
        == ("arm.held_0", "arm.held_1", "arm.held_2", "arm.joints_0", "arm.joints_1")
    )  # older gymnasium sorts
    by_name = dict(zip(env.state_names, observation[STATE][1].tolist()))  # noqa: B905
    assert (
        by_name["arm.joints_0"] == 0.5 and by_name["arm.held_2"] == 1 and by_name["arm.held_0"] == 0
    )
    assert observation[PRIVILEGED].tolist() == [[1, 2, 3, 4]] * 2
    assert env.spec.privileged_names == tuple(f"secret_{i}" for i in range(4))
    assert sorted(env.cameras) == ["depth", "top"]
    top, depth = observation[image_key("top")][0], observation[image_key("depth")][0]
    assert top.shape == depth.shape == (16, 16, 3)
    assert (depth == 255).all()
    assert top[:, :7].min() == 200 and top[:, 9:].max() == 0
    assert env.instruction == SCENE and env.control_hz == 10
    chosen = GymnasiumEnv(
        SCENE,
        1,
        state=["arm.joints"],
        images={"front": "pixels.top"},
        cameras=["front"],
        image_size=4,
    )
    seen, _ = chosen.reset()
    assert set(seen) == {STATE, PRIVILEGED, image_key("front")}
    assert seen[PRIVILEGED].shape == (1, 0) and chosen.state_dim == 2
    assert set(GymnasiumEnv(SCENE, 1, cameras=[]).reset()[0]) == {STATE, PRIVILEGED}


def test_pictures_are_resized_by_the_mean_of_what_a_pixel_covers():
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    assert mapping.resized(image, 2).shape == (2, 2, 3)
    blocks = image.reshape(2, 2, 2, 3, 3).mean((1, 3))
    np.testing.assert_allclose(mapping.resized(image, 2), blocks, atol=0.5)
    assert (mapping.resized(np.full((3, 5, 3), 77, np.uint8), 64) == 77).all()
    same = np.random.default_rng(0).integers(0, 255, (8, 8, 3)).astype(np.uint8)
    assert mapping.resized(same, 8) is same
    assert mapping.resized(np.ones((3, 8, 8), np.float32), 8).min() == 255  # colours first, 0 to 1
    assert mapping.resized(np.full((8, 8), 9, np.uint8), 8).shape == (8, 8, 3)
    rgba = np.zeros((8, 8, 4), np.uint8)
    assert mapping.resized(rgba, 8).shape == (8, 8, 3)
    with pytest.raises(ValueError, match="shape"):
        mapping.resized(np.zeros(5), 8)


def one(space, action, **options):
    given = np.zeros((1, 7), np.float32)
    given[0, : len(action)] = action
    mapped = mapping.Actions(space, **options)(given)
    return mapped.own[0], mapped.executed[0].tolist()


def test_actions_reach_the_bounds_of_a_box():
    box = spaces.Box(np.float32([-2, 0]), np.float32([2, 10]))
    own, executed = one(box, [-1, 1])
    assert own.tolist() == [-2, 10] and executed == [-1, 1, 0, 0, 0, 0, 0]
    own, executed = one(box, [5, -3, 9])  # clipped, and said so; what is not used is 0
    assert own.tolist() == [2, 0] and executed == [1, -1, 0, 0, 0, 0, 0]
    assert own.dtype == np.float32 and box.contains(own)
    own, executed = one(box, [0, 0, 0, 0, 0, 0.5, 1], dims=[5, 6])
    assert own.tolist() == [1, 10] and executed[5:] == [0.5, 1]  # a gripper goes from 0 to 1
    own, _ = one(box, [0.03, 0], low=[-0.03, -1], high=[0.03, 1])
    assert own.tolist() == pytest.approx([2, 5])
    endless = spaces.Box(-np.inf, np.inf, (2,))
    assert one(endless, [30, -7])[0].tolist() == [30, -7]
    assert one(spaces.Box(0, 4, (1,), np.int64), [0.4])[0].tolist() == [3]
    assert one(spaces.Box(-1, 1, ()), [0.5])[0].shape == ()
    space = mapping.Actions(endless).low, mapping.Actions(box).low
    assert space[0][:2].tolist() == [-np.inf] * 2 and space[1].tolist() == [-1] * 6 + [0]


def test_the_largest_number_chooses_and_what_was_executed_repeats_it():
    space = spaces.Discrete(3, start=5)
    for action, choice in (
        ([0.1, 0.9, 0.2], 6),
        ([9, 11, 10], 6),
        ([0, 0, 0], 5),
        ([-3, -2, -1], 7),
    ):
        own, executed = one(space, action)
        assert own == choice and space.contains(own)
        assert one(space, executed)[0] == choice
    assert one(space, [0, 0, 0, 1, 2, 3], dims=[3, 4, 5])[0] == 7
    assert one(space, [0, 0, 0, 1, 2, 3], dims=[5, 4, 3])[0] == 5


@pytest.mark.parametrize(
    ("rule", "expected"),
    [({"info": "done well"}, 1), ({"return": 5.9}, 1), ({"return": 6.1}, 0), (None, 0)],
)
def test_success_is_told_or_earned(rule, expected):
    env = GymnasiumEnv(COUNTER, 1, success=rule)
    with_lengths(env, [3])
    assert env.step_chunk(zeros(env, 4)).success.sum() == expected


def test_seeds_and_configurations_repeat_episodes():
    env, other = GymnasiumEnv("CartPole-v1", 3, seed=4), GymnasiumEnv("CartPole-v1", 2, seed=9)
    first, info = env.reset(options={"region": "id"})
    configurations = json.loads(json.dumps(info["configurations"]))
    assert len({c["seed"] for c in configurations}) == 3
    rng = np.random.default_rng(0)
    actions = rng.normal(size=(3, 12, 7)).astype(np.float32)
    step = env.step_chunk(actions)
    again, _ = other.reset(options={"configurations": configurations[:2]})
    np.testing.assert_array_equal(first[STATE][:2], again[STATE])
    np.testing.assert_array_equal(step.states[:2], other.step_chunk(actions[:2]).states)
    assert GymnasiumEnv("CartPole-v1", 3, seed=4).reset()[1] == info
    assert env.reset(seed=8)[1] == GymnasiumEnv("CartPole-v1", 3).reset(seed=8)[1]


def test_regions_are_options_of_reset():
    regions = {"id": {}, "ood": {"low": 0.1, "high": 0.2}}
    env = GymnasiumEnv("CartPole-v1", 8, regions=regions)
    inside, _ = env.reset(options={"region": "id"})
    outside, info = env.reset(options={"region": "ood"})
    assert np.abs(inside[STATE]).max() <= 0.05
    assert outside[STATE].min() >= 0.1 and outside[STATE].max() <= 0.2
    assert info["configurations"][0]["options"] == regions["ood"]
    both = {
        c["region"]
        for _ in range(4)
        for c in env.reset(options={"region": "all"})[1]["configurations"]
    }
    assert both == {"id", "ood"} == set(env.spec.regions)


class GlobalDraw(Counter):
    """Draws from NumPy's global generator, as some environments do."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        self.last = np.random.uniform()
        return self._see(), {}


def test_environments_that_draw_globally_can_be_repeated():
    if "twinrl-test/Global-v0" not in gymnasium.registry:
        gymnasium.register("twinrl-test/Global-v0", GlobalDraw)
    env = GymnasiumEnv("twinrl-test/Global-v0", 2, global_seed=True)
    first, info = env.reset()
    again, _ = env.reset(options=info)
    np.testing.assert_array_equal(first[STATE], again[STATE])


def test_the_metadata_says_how_an_environment_resets_itself():
    class Told:
        def __init__(self, mode):
            self.metadata = {} if mode is None else {"autoreset_mode": mode}

    assert fleets.autoreset_mode(Told("SameStep"), "DISABLED") == "SAME_STEP"
    assert fleets.autoreset_mode(Told("next_step")) == "NEXT_STEP"
    if fleets.MASKS:
        from gymnasium.vector import AutoresetMode

        for mode in AutoresetMode:
            assert fleets.autoreset_mode(Told(mode)) == mode.name
        assert fleets.autoreset_mode(Told(None), "same_step") == "SAME_STEP"
        with pytest.raises(ValueError, match="autoreset, one of"):
            fleets.autoreset_mode(Told(None))
    else:  # before metadata told it, the version did
        assert fleets.autoreset_mode(Told(None)) in ("SAME_STEP", "NEXT_STEP")
    with pytest.raises(ValueError, match="did you mean 'SAME_STEP'"):
        fleets.autoreset_mode(Told("SAME_STEPP"))


def test_a_lost_last_observation_is_an_error_not_a_failed_episode():
    class Forgetful(gymnasium.Env):
        num_envs, metadata = 1, {}
        single_observation_space, single_action_space = (
            Counter.observation_space,
            Counter.action_space,
        )

        def reset(self, **_):
            return np.zeros((1, 3), np.float32), {}

        def step(self, action):
            return np.zeros((1, 3), np.float32), np.ones(1), np.array([True]), np.array([False]), {}

    lost = fleets.Singles([fleets.Alone(Forgetful(), "SAME_STEP")])
    env = GymnasiumEnv(COUNTER, 1, fleet=lost)
    env.reset()
    with pytest.raises(fleets.AutoresetError, match="no last observation"):
        env.step_chunk(zeros(env))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GymnasiumEnv("CartPol-v1", 1), "did you mean 'CartPole-v1'"),
        (lambda: GymnasiumEnv("no_such_module:X-v0", 1), "cannot import 'no_such_module'"),
        (lambda: GymnasiumEnv("CartPole-v1", 0), "at least 1"),
        (lambda: GymnasiumEnv("CartPole-v1", 1, sucess={}), "did you mean 'success'"),
        (lambda: GymnasiumEnv("CartPole-v1", 1, success={"key": 1}), "{info: key}"),
        (lambda: GymnasiumEnv("CartPole-v1", 1, kwargs={"gravity": 1}), "gravity"),
        (lambda: GymnasiumEnv("CartPole-v1", 1, vectorization="asink"), "did you mean 'async'"),
        (
            lambda: GymnasiumEnv("Pendulum-v1", 1, vectorization="vector"),
            "use vectorization 'single'",
        ),
        (lambda: GymnasiumEnv("CartPole-v1", 1, cameras=["side"]), "known: render"),
        (lambda: GymnasiumEnv(SCENE, 1, cameras=["tob"]), "did you mean 'top'"),
        (lambda: GymnasiumEnv(SCENE, 1, state=["arm.joint"]), "did you mean 'arm.joints'"),
        (lambda: GymnasiumEnv(SCENE, 1, privileged=["secrets"]), "did you mean 'secret'"),
        (lambda: GymnasiumEnv(SCENE, 1, images={"a": "pixel"}), "pixels"),
        (lambda: GymnasiumEnv("CartPole-v1", 1, action={"dims": [0, 9]}), "needs 2 different ones"),
        (lambda: GymnasiumEnv("Pendulum-v1", 1, action={"low": 2}), "not below"),
        (lambda: GymnasiumEnv("CartPole-v1", 1, region="ood"), "known: all, id"),
        (lambda: GymnasiumEnv("CartPole-v1", 1, regions={"ood": {}}), "one must be 'id'"),
        (
            lambda: GymnasiumEnv("CartPole-v1", 1).reset(options={"mask": 1}),
            "did you mean 'reset_mask'",
        ),
        (
            lambda: GymnasiumEnv("CartPole-v1", 1).reset(options={"reset_mask": [True, False]}),
            "reset_mask has 2",
        ),
        (
            lambda: GymnasiumEnv("CartPole-v1", 1).reset(options={"configurations": [{"sead": 1}]}),
            "did you mean 'seed'",
        ),
        (
            lambda: GymnasiumEnv("CartPole-v1", 1).reset(
                options={"configurations": [{"task": "x"}]}
            ),
            "of task 'x'",
        ),
        (lambda: GymnasiumEnv("CartPole-v1", 2).step_chunk(np.zeros((2, 7))), "expected"),
        (
            lambda: GymnasiumEnv("CartPole-v1", 2).step_chunk(np.full((2, 1, 7), np.nan)),
            r"\[0, 1\]",
        ),
        (lambda: mapping.Actions(spaces.Box(-1, 1, (8,))), "8 numbers"),
        (lambda: mapping.Actions(spaces.Discrete(8)), "8 choices"),
        (lambda: mapping.Actions(spaces.MultiBinary(2)), "Box or Discrete"),
    ],
)
def test_mistakes_are_answered_with_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "file", [*sorted((ROOT / "twins/backends").glob("gymnasium_*.py")), ROOT / "twinrl/env.py"]
)
def test_it_keeps_to_the_syntax_of_old_interpreters(file):
    ast.parse(file.read_text(), feature_version=(3, 8))
