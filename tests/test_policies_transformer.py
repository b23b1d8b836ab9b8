"""The VLA in all its forms: prefix cache, points in parallel, padding, any cameras, precision, compilation, learning."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from learner.optimiser import Optimiser
from policies.experts import TransformerExpert
from policies.flow import gaussian
from policies.layers import fourier
from policies.registry import make_policy
from policies.runner import PolicyRunner
from policies.weights import to_arrays
from twinrl.weights import checksum

STATE_DIM, POSE_DIM, SIZE, N = 9, 5, 16, 6
COMMON = {
    "state_dim": STATE_DIM,
    "pose_dim": POSE_DIM,
    "image_size": SIZE,
    "integration_steps": 3,
    "critics": 2,
    "width": 4,
    "keypoints": 4,
    "latent": 32,
    "hidden": 32,
    "head_dim": 16,
    "words": 8,
}
TRANSFORMER = {"trunk": "transformer", "expert": "transformer", "expert_layers": 2}
FORMS = {
    "keypoints-latent-mlp": {},
    "keypoints-trunk-mlp": {"trunk": "transformer"},
    "keypoints-latent-expert": {"expert": "transformer", "expert_layers": 2},
    "keypoints-trunk-expert": TRANSFORMER,
    "patches-trunk-expert": {**TRANSFORMER, "stem": "patches", "width": 8, "patch": 4},
    "patches-latent-mlp": {"stem": "patches", "width": 8, "patch": 4},
}
CAMERAS = ("side", "wrist")
STEPS = 120  # of the test that learns


def build(form, seed=0, **overrides):
    """A policy of a form whose action scales and state statistics are those of some data."""
    torch.manual_seed(seed)
    policy = make_policy({**COMMON, **FORMS[form], **overrides})
    rng = np.random.default_rng(0)
    policy.fit_actions(rng.normal(0, 0.01, (200, 7)).astype(np.float32))
    policy.fit_states(rng.normal(0, 2, (100, STATE_DIM)).astype(np.float32))
    return policy.eval()


def observe(cameras=CAMERAS, rows=N, seed=1):
    rng = np.random.default_rng(seed)
    images = {
        f"observation.images.{name}": rng.integers(0, 256, (rows, SIZE, SIZE, 3), dtype=np.uint8)
        for name in cameras
    }
    return {**images, "observation.state": rng.normal(size=(rows, STATE_DIM)).astype(np.float32)}


def features_of(policy, instruction="put the banana away", rows=N):
    with torch.no_grad():
        return policy.encode(policy.to_tensors(observe(policy.cameras, rows)), instruction)


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


def test_the_cached_prefix_is_computed_once_and_changes_nothing():
    """K steps on one cache equal K steps that each compute it anew; the prefix is projected once a layer."""
    policy = build("keypoints-trunk-expert")
    features, noise = features_of(policy), torch.randn(N, policy.flow.dim)
    calls = []
    hooks = [
        block.prefix.register_forward_hook(lambda *_: calls.append(1))
        for block in policy.flow.network.blocks
    ]
    with torch.no_grad():
        cached = policy.flow.integrate(features, noise, 5)
        assert len(calls) == 2
        for hook in hooks:
            hook.remove()
        x = noise
        for k in range(5):
            x = x + policy.velocity(features, x, torch.full((N, 1), k / 5)) / 5
    torch.testing.assert_close(cached, x)


def test_points_of_a_row_in_parallel_equal_one_by_one(form):
    """S points share a row's condition; none sees another."""
    policy = build(form)
    features = features_of(policy)
    x, t = torch.randn(N, 5, policy.flow.dim), torch.rand(N, 5, 1)
    with torch.no_grad():
        condition = policy.flow.condition(features)
        together = policy.flow.field(condition, x, t)
        alone = [policy.velocity(features, x[:, s], t[:, s]) for s in range(5)]
    torch.testing.assert_close(together, torch.stack(alone, 1), atol=1e-5, rtol=1e-4)


def test_the_expert_equals_plain_attention_over_prefix_and_actions():
    """One softmax over padded prefix and own tokens, computed here point by point in float64 by torch's own."""
    policy = build("keypoints-trunk-expert").double()
    flow, network = policy.flow, policy.flow.network
    features = features_of(policy.float()).double()
    policy.double()
    x, t = torch.randn(N, flow.dim).double(), torch.rand(N, 1).double()
    prefix = features[:, : -flow.rows]
    known = (prefix != 0).any(-1)
    assert not known.all()  # the instruction is shorter than the longest

    def heads(tokens):
        return tokens.unflatten(-1, (2, 16)).transpose(1, 2)

    with torch.no_grad():
        h = network.inward(x.view(N, 4, 7)) + network.step
        h = h + (flow.context(flow.summary(features)) + network.time(fourier(t)))[:, None]
        for block in network.blocks:
            q, k, v = block.qkv(block.norm(h)).chunk(3, dim=-1)
            prefix_k, prefix_v = block.prefix(prefix).chunk(2, dim=-1)
            keys, values = torch.cat([prefix_k, k], 1), torch.cat([prefix_v, v], 1)
            mask = torch.cat([known, known.new_ones(N, 4)], 1)[:, None, None]
            mixed = functional.scaled_dot_product_attention(
                heads(q), heads(keys), heads(values), attn_mask=mask
            )
            h = h + block.out(mixed.transpose(1, 2).flatten(2))
            h = h + block.feed(h)
        expected = network.outward(network.norm(h)).flatten(1)
        torch.testing.assert_close(policy.velocity(features, x, t), expected)


def test_gradients_reach_the_encoder(form):
    """The flow's loss moves cameras, words and trunk; the pose head follows its own labels alone."""
    policy = build(form).train()
    features = policy.encode(policy.to_tensors(observe()), "put the banana away")
    chunk = torch.randn(N, policy.flow.dim)
    policy.flow.matching_loss(features, chunk, torch.ones_like(chunk)).mean().backward()
    for part in (policy.vision, policy.language, policy.trunk):
        assert sum(float(p.grad.abs().sum()) for p in part.parameters() if p.grad is not None) > 0
    assert all(p.grad is None for p in policy.pose.parameters())
    features = policy.encode(policy.to_tensors(observe()), "x")
    policy.predict_pose(features).square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in policy.pose.parameters())


@pytest.mark.parametrize("count", [0, 1, 3])
def test_any_number_of_cameras(form, count):
    """Without cameras features are state and words; each camera counts."""
    cameras = tuple(f"camera-{i}" for i in range(count))
    policy = build(form, cameras=cameras)
    observation = observe(cameras)
    chunk, info = policy.act(observation, "x", torch.Generator().manual_seed(0), explore=True)
    assert chunk.shape == (N, 4, 7) and info["path"].shape == (N, 4, 28)
    features = features_of(policy)
    assert features.shape == (N, *policy.feature_shape)
    assert policy.summary(features).shape == (N, policy.flow.summary_dim)
    state = policy.state_normaliser(torch.from_numpy(observation["observation.state"]))
    flat = policy.summary(features)
    words = policy.language.embedding.embedding_dim
    torch.testing.assert_close(flat[:, -STATE_DIM - words : -words], state.clamp(-5, 5))
    if not cameras:
        with pytest.raises(ValueError, match="without cameras"):
            policy.predict_pose(features)
    for name in cameras:
        other = dict(observation)
        other[f"observation.images.{name}"] = 255 - other[f"observation.images.{name}"]
        with torch.no_grad():
            changed = policy.encode(policy.to_tensors(other), "put the banana away")
        assert (changed - features).abs().max() > 1e-4


def test_state_goes_straight_to_the_expert_without_cameras():
    """A policy that sees nothing has no untrained network before its expert."""
    policy = build("keypoints-latent-mlp", cameras=())
    words = policy.language.embedding.embedding_dim
    assert policy.feature_shape == (STATE_DIM + words,)
    assert policy.trunk is None and policy.pose is None
    assert all("embedding" in name for name, _ in policy.language.named_parameters())
    assert policy.encoder_parameters() == list(policy.language.parameters())


def test_padding_of_the_instruction_changes_nothing(form):
    """A short instruction means the same beside a long one, and alone."""
    policy = build(form)
    short, long = "lift it", "put the banana into the basket"
    tensors = policy.to_tensors(observe())
    x, t = torch.randn(N, policy.flow.dim), torch.rand(N, 1)
    with torch.no_grad():
        alone = policy.encode(tensors, short)
        mixed = policy.encode(tensors, [short, long] * (N // 2))
        torch.testing.assert_close(mixed[::2], alone[::2], atol=1e-5, rtol=1e-4)
        assert (mixed[1::2] - alone[1::2]).abs().max() > 1e-3
        velocity = policy.velocity(mixed, x, t)[::2]
        torch.testing.assert_close(
            velocity, policy.velocity(alone, x, t)[::2], atol=1e-5, rtol=1e-4
        )
        policy.encode(tensors, "")  # nothing was said
    if isinstance(policy.flow, TransformerExpert) and policy.trunk.tokens > 1:
        with torch.no_grad():
            # Were padding not known as such, a cache without its rows would give another velocity.
            rows = alone.shape[1] - policy.flow.rows
            kept = [i for i in range(alone.shape[1]) if i >= rows or alone[0, i].any()]
            assert len(kept) == alone.shape[1] - (COMMON["words"] - 2)
            torch.testing.assert_close(
                policy.velocity(alone[:, kept], x, t),
                policy.velocity(alone, x, t),
                atol=1e-5,
                rtol=1e-4,
            )


def test_an_instruction_that_is_too_long_is_refused():
    """Words are not dropped silently."""
    with pytest.raises(ValueError, match="9 words, and this policy reads 8"):
        features_of(build("keypoints-trunk-expert"), "a b c d e f g h i")


def test_the_same_seed_gives_the_same_policy_and_the_same_actions(form):
    """Construction and acting are functions of their seeds."""
    once, again = (
        build(form).act(observe(), "x", torch.Generator().manual_seed(3), explore=True)
        for _ in range(2)
    )
    np.testing.assert_array_equal(once[0], again[0])
    np.testing.assert_array_equal(once[1]["path"], again[1]["path"])
    other = build(form).act(observe(), "x", torch.Generator().manual_seed(4), explore=True)
    assert (once[0] != other[0]).any()


def test_a_batch_is_its_rows(form):
    """What a row becomes does not depend on who is beside it."""
    policy = build(form, precision="float32")
    tensors = policy.to_tensors(observe())
    with torch.no_grad():
        whole = policy.encode(tensors, "x")
        part = policy.encode({key: value[2:4] for key, value in tensors.items()}, "x")
    torch.testing.assert_close(whole[2:4], part, atol=1e-5, rtol=1e-4)


def test_bfloat16_computes_half_and_stores_whole(form):
    """The autocast path: near the float32 policy, differentiable, with float32 features, weights and likelihoods."""
    whole, half = build(form, precision="float32"), build(form, precision="bfloat16")
    x, t = torch.randn(N, whole.flow.dim), torch.rand(N, 1)
    with torch.no_grad():
        features, near = features_of(whole), features_of(half)
        assert near.dtype == torch.float32 and (features != near).any()
        scale = features.abs().max()
        assert (features - near).abs().max() < 0.05 * scale
        velocity, close = whole.velocity(features, x, t), half.velocity(features, x, t)
        assert close.dtype == torch.float32
        torch.testing.assert_close(close, velocity, atol=0.1, rtol=0.1)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    tensors = half.to_tensors(observe())
    half.flow.matching_loss(half.encode(tensors, "x"), x, torch.ones_like(x)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in half.parameters() if p.grad is not None)


def test_the_learners_precision_reaches_a_float32_policy(form):
    """Under the learner's autocast trunk and expert compute in bfloat16 too, and outputs stay float32."""
    policy = build(form, precision="float32")
    features, x, t = features_of(policy), torch.randn(N, policy.flow.dim), torch.rand(N, 1)
    with torch.no_grad():
        velocity = policy.velocity(features, x, t)
        with torch.autocast("cpu", torch.bfloat16):
            half = policy.velocity(features, x, t)
            assert (features_of(policy) != features).any() and features.dtype == torch.float32
    assert (half.float() != velocity).any()
    torch.testing.assert_close(half.float(), velocity, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("form", ["keypoints-latent-mlp", "patches-trunk-expert"])
def test_compilation_is_asked_for_by_name_and_changes_no_output(form, monkeypatch):
    """Trunk and expert are compiled with the mode that was named. Traced here, without a code generator."""
    compile_module, modes = torch.compile, []

    def traced(module, *, mode):
        modes.append(mode)
        return compile_module(module, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    compiled, plain = build(form, compile="default"), build(form)
    assert modes == ["default", "default"]
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    features = features_of(plain)
    torch.testing.assert_close(features_of(compiled), features)
    noise = torch.randn(N, plain.flow.dim)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled.sample(features, noise), plain.sample(features, noise), atol=1e-5, rtol=1e-5
        )
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("setting", "value", "complaint"),
    [
        ("compile", "fast", "compile is 'fast': one of none, default"),
        ("stem", "eye", "stem is 'eye': one of keypoints, patches, pretrained"),
        ("trunk", "tree", "trunk is 'tree'"),
        ("expert", "linear", "expert is 'linear'"),
        ("precision", "half", "precision is 'half'"),
        ("stem", "pretrained", "vision_model"),
        ("vision_model", "google/siglip-base-patch16-224", "stem pretrained"),
        ("hiden", 3, "no setting 'hiden'; did you mean 'hidden'"),
        ("head_dim", 5, "multiple of head_dim 5"),
    ],
)
def test_wrong_settings_are_refused_with_what_would_be_right(setting, value, complaint):
    """What a policy cannot be, it says."""
    with pytest.raises(ValueError, match=complaint):
        build("keypoints-trunk-expert", **{setting: value})


def test_weights_of_every_form_travel(form):
    """A runner with published weights acts like the policy that published them."""
    policy = build(form, cameras=CAMERAS)
    arrays = {name: array.copy() for name, array in to_arrays(policy).items()}
    runner = PolicyRunner({**COMMON, **FORMS[form]}, seed=1)
    runner.load(1, arrays, checksum(arrays))
    actual, _ = runner.infer(observe(), "x", explore=False)
    twin = PolicyRunner({**COMMON, **FORMS[form]}, seed=1)
    twin.policy.load_state_dict(policy.state_dict())
    twin.version = 1
    np.testing.assert_array_equal(actual, twin.infer(observe(), "x", explore=False)[0])


def test_path_likelihood_of_a_transformer_is_the_samplers():
    """What acting stores is what the learner computes, in every noisy step."""
    policy = build("patches-trunk-expert")
    features = features_of(policy)
    with torch.no_grad():
        path, sampled = policy.sample_path(features, torch.Generator().manual_seed(2))
        torch.testing.assert_close(policy.path_log_prob(features, path), sampled, rtol=1e-4, atol=0)


@pytest.mark.parametrize("learner", ["keypoints-trunk-expert", "patches-trunk-expert"])
def test_it_learns_two_modes_that_an_image_tells_apart(learner):
    """A spot on the left or right of one camera decides between two chunks; the mean of both is wrong by 1."""
    sizes = {"width": 8, "keypoints": 8, "precision": "float32"}
    policy = build(learner, cameras=("side",), **sizes).train()
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(policy.flow.dim, generator=generator).sign()

    def draw(rows):
        side = torch.randint(0, 2, (rows,), generator=generator)
        at = torch.randint(0, SIZE // 2 - 3, (2, rows), generator=generator)
        images = torch.full((rows, SIZE, SIZE, 3), 60, dtype=torch.uint8)
        for row in range(rows):
            column = int(at[0, row]) + int(side[row]) * SIZE // 2
            images[row, int(at[1, row]) : int(at[1, row]) + 4, column : column + 4] = 220
        observation = {
            "observation.images.side": images,
            "observation.state": torch.zeros(rows, STATE_DIM),
        }
        return observation, (2.0 * side[:, None] - 1.0) * target

    optimiser = Optimiser(
        policy.parameters(), 1e-2, clip=1.0, schedule=lambda step: 1.0 - 0.9 * step / STEPS
    )
    for _ in range(STEPS):
        observation, chunk = draw(48)
        features = policy.encode(observation, "go")
        loss = policy.flow.matching_loss(features, chunk, torch.ones_like(chunk), 2, generator)
        optimiser.step(loss.mean())
    observation, chunk = draw(64)
    with torch.no_grad():
        features = policy.eval().encode(observation, "go")
        noise = gaussian((64, policy.flow.dim), features, generator)
        error = (policy.sample(features, noise, 10).flatten(1) - chunk).square().mean()
    assert float(chunk.square().mean()) == 1.0  # of the mean of both modes, 0
    assert math.sqrt(float(error)) < 0.5  # 0.2 to 0.3
