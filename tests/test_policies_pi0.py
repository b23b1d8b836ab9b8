"""pi0 against an independent slow implementation, and what a policy must do: act, learn, travel."""

import copy

import numpy as np
import pytest
import torch

from learner.algorithms.sft import SFT, SFTConfig
from learner.dataset import Windows
from policies.lora import adapted_layers
from policies.pi0 import Pi0
from policies.pi0_layers import resize_with_pad, time_embedding
from policies.weights import WeightsError, load_arrays, to_arrays
from tests.slow_pi0 import Slow

STATE_DIM, CHUNK, BATCH = 5, 3, 3
CAMERAS = ("side", "wrist")
SMALL = {
    "width": 24, "mlp": 40, "expert_width": 16, "expert_mlp": 24, "layers": 2, "heads": 4, "kv_heads": 2,
    "head_dim": 8, "vocabulary": 150, "vision_width": 20, "vision_mlp": 28, "vision_layers": 2, "vision_heads": 2,
    "image": 28, "padded": 9,
}  # fmt: skip
INSTRUCTIONS = ["put the cube away", "stop", "wipe all of the board now"]


def make(**settings):
    """A small pi0 whose parameters are large enough for every one of them to matter."""
    torch.manual_seed(0)
    defaults = {
        "cameras": CAMERAS, "sizes": SMALL, "tokenizer": "hashed", "prompt_tokens": 9, "lora_rank": 2,
    }  # fmt: skip
    policy = Pi0(state_dim=STATE_DIM, chunk=CHUNK, **{**defaults, **settings})
    shake(policy)
    return policy.eval()


@torch.no_grad()
def shake(policy):
    """Random values everywhere but in the critics: weights of unit gain, LoRA's B, norms and biases not zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.named_parameters():
        if not name.startswith(("trunk.", "flow.")):
            continue
        scale = 0.2 if parameter.ndim < 2 or "lora_b" in name else parameter[0].numel() ** -0.5
        scale = 1.0 if "embed" in name and parameter.ndim == 2 else scale
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def observation():
    """Two cameras of other shapes than the model's, and a state."""
    rng = np.random.default_rng(2)
    return {
        "observation.state": rng.normal(size=(BATCH, STATE_DIM)).astype(np.float32),
        "observation.images.side": rng.integers(0, 256, (BATCH, 20, 40, 3)).astype(np.uint8),
        "observation.images.wrist": rng.integers(0, 256, (BATCH, 28, 28, 3)).astype(np.uint8),
    }


def encode(policy, observation):
    return policy.encode(policy.to_tensors(observation), INSTRUCTIONS)


@pytest.mark.parametrize("action_dim", [7, 9])
def test_field_equals_the_slow_implementation_mirrored(observation, action_dim):
    """Masks, cache, positions, grouped heads and padding: v(x, t) = -u(x, 1 - t), for points side by side."""
    policy = make(action_dim=action_dim)
    slow = Slow(policy)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(BATCH, 2, CHUNK * action_dim, generator=generator)
    t = torch.rand(BATCH, 2, 1, generator=generator)
    with torch.no_grad():
        features = encode(policy, observation)
        fast = policy.flow.field(policy.flow.condition(features), x, t)
    for row in range(BATCH):
        prefix, state = (
            slow.prefix(policy, observation, row, INSTRUCTIONS[row]),
            slow.state(policy, observation, row),
        )
        for point in range(2):
            tau = 1 - float(t[row, point])
            actions = slow.fill(x[row, point].view(CHUNK, action_dim).double(), tau)
            u = slow.velocity(prefix, state, actions, tau)[:, :action_dim]
            torch.testing.assert_close(
                fast[row, point].double(), -u.flatten(), atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize(
    "wrong",
    [
        lambda query, key: True,  # the prefix would see the actions, and the cache would be void
        lambda query, key: key < query or key == query == 0,  # actions would not see each other
        lambda query, key: key <= query and not (query == 2 and key == 1),  # nor the state
    ],
)
def test_other_masks_give_other_velocities(observation, wrong):
    """The comparison above can fail: each block's rule shows in the numbers."""
    policy = make(action_dim=9)
    slow = Slow(policy)
    prefix, state = (
        slow.prefix(policy, observation, 0, INSTRUCTIONS[0]),
        slow.state(policy, observation, 0),
    )
    actions = torch.randn(CHUNK, 9, generator=torch.Generator().manual_seed(4)).double()
    right = slow.velocity(prefix, state, actions, 0.4)
    assert (right - slow.velocity(prefix, state, actions, 0.4, wrong)).abs().max() > 1e-3


@pytest.mark.parametrize("action_dim", [7, 9])
def test_integration_goes_the_published_way(observation, action_dim):
    """openpi's loop from t = 1 to 0 with step -1 / K gives the chunk that ours gives from 0 to 1."""
    policy = make(action_dim=action_dim)
    slow, steps = Slow(policy), 4
    noise = torch.randn(BATCH, CHUNK * action_dim, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        chunk = policy.sample(encode(policy, observation), noise, steps)
    for row in range(2):
        prefix, state = (
            slow.prefix(policy, observation, row, INSTRUCTIONS[row]),
            slow.state(policy, observation, row),
        )
        x, tau, dt = noise[row].view(CHUNK, action_dim).double(), 1.0, -1.0 / steps
        while tau >= -dt / 2:
            u = slow.velocity(prefix, state, slow.fill(x, tau), tau)
            x, tau = x + dt * u[:, :action_dim], tau + dt
        torch.testing.assert_close(chunk[row].double(), x, atol=1e-5, rtol=1e-5)


def test_loss_is_the_published_loss(observation):
    """|v - (A - eps)|^2 at x = (1 - t) eps + t A is |u - (eps - A)|^2 at x = tau eps + (1 - tau) A, tau = 1 - t."""
    policy = make(action_dim=9)
    slow = Slow(policy)
    generator = torch.Generator().manual_seed(6)
    chunk, eps = torch.randn(2, BATCH, CHUNK * 9, generator=generator)
    t = torch.rand(BATCH, 1, 1, generator=generator)
    with torch.no_grad():
        loss = policy.flow.matching_loss(
            encode(policy, observation), chunk, torch.ones_like(chunk), points=(t, eps[:, None])
        )
    for row in range(BATCH):
        tau = 1 - float(t[row])
        a, e = (each[row].view(CHUNK, 9).double() for each in (chunk, eps))
        u = slow.velocity(
            slow.prefix(policy, observation, row, INSTRUCTIONS[row]), slow.state(policy, observation, row),
            tau * e + (1 - tau) * a, tau,
        )  # fmt: skip
        torch.testing.assert_close(
            float(loss[row]), float((u - (e - a)).square().mean()), rtol=1e-5, atol=1e-5
        )


def test_times_of_training_are_the_published_ones_mirrored():
    """1 - t has the distribution 0.001 + 0.999 Beta(1.5, 1): most times are near noise, which is our t = 0."""
    policy = make()
    rows = torch.zeros(20_000, 1)
    t, _ = policy.flow.matching_points(rows, 1, torch.Generator().manual_seed(7), "beta")
    torch.manual_seed(8)
    theirs = 0.001 + 0.999 * torch.distributions.Beta(1.5, 1.0).sample((200_000,))
    levels = torch.linspace(0.05, 0.95, 10)
    torch.testing.assert_close(
        torch.quantile(1 - t.flatten(), levels), torch.quantile(theirs, levels), atol=0.01, rtol=0
    )
    assert t.min() >= 0 and t.max() <= 0.999 and t.median() < 0.5


def test_time_embedding_is_sines_then_cosines_of_periods():
    """The shortest period is 4 ms of t, the longest 4."""
    embedded = time_embedding(torch.tensor([0.0, 0.001, 1.0]), 8)
    torch.testing.assert_close(embedded[0], torch.tensor([0.0] * 4 + [1.0] * 4))
    torch.testing.assert_close(embedded[1, [0, 4]], torch.tensor([1.0, 0.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(embedded[2, [3, 7]], torch.tensor([1.0, 0.0]), atol=1e-5, rtol=0)


# -- images and rows -------------------------------------------------------------------------------------------


def test_images_are_fitted_between_black_bars():
    """Twice as wide as high: a quarter of black above and below; colours stay, in [-1, 1]."""
    image = torch.full((1, 20, 40, 3), 255, dtype=torch.uint8)
    image[..., 1] = 0
    fitted = resize_with_pad(image, 28)
    assert fitted.shape == (1, 3, 28, 28) and fitted.dtype == torch.float32
    assert (fitted[:, :, :7] == -1).all() and (fitted[:, :, 21:] == -1).all()
    torch.testing.assert_close(fitted[0, :, 7:21].mean((1, 2)), torch.tensor([1.0, -1.0, 1.0]))
    tall = resize_with_pad(image.transpose(1, 2), 28)
    torch.testing.assert_close(tall, fitted.transpose(2, 3))
    same = torch.randint(0, 256, (1, 28, 28, 3), dtype=torch.uint8)
    torch.testing.assert_close(
        resize_with_pad(same, 28), same.permute(0, 3, 1, 2).float() / 127.5 - 1
    )


def test_rows_do_not_depend_on_their_neighbours(observation):
    """Padding of a short instruction beside a long one changes nothing."""
    policy = make()
    with torch.no_grad():
        together = encode(policy, observation)
        one = {name: array[1:2] for name, array in observation.items()}
        alone = policy.encode(policy.to_tensors(one), INSTRUCTIONS[1])
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)


# -- a policy ----------------------------------------------------------------------------------------------------


def test_act_gives_physical_chunks_and_repeats_itself(observation):
    policy = make(critics=2)
    policy.fit_actions(np.random.default_rng(0).uniform(-0.1, 0.1, (50, 7)).astype(np.float32))
    act = lambda explore: policy.act(  # noqa: E731
        observation, INSTRUCTIONS, torch.Generator().manual_seed(9), explore
    )
    chunk, info = act(False)
    assert chunk.shape == (BATCH, CHUNK, 7) and chunk.dtype == np.float32 and info == {}
    assert np.abs(chunk[..., :6]).max() <= 0.1
    np.testing.assert_array_equal(chunk, act(False)[0])
    policy.candidates.fill_(4)
    assert act(False)[0].shape == chunk.shape
    noisy, info = act(True)
    assert info["path"].shape == (BATCH, policy.integration_steps + 1, CHUNK * 7)
    assert not np.array_equal(noisy, chunk)


def test_a_path_has_the_likelihood_it_was_drawn_with(observation):
    """The sampler evaluates one point at a time, the likelihood all of them side by side."""
    policy = make()
    with torch.no_grad():
        features = encode(policy, observation)
        path, log_prob = policy.sample_path(features, torch.Generator().manual_seed(10))
        torch.testing.assert_close(
            policy.path_log_prob(features, path), log_prob, atol=1e-3, rtol=1e-5
        )


def test_features_are_rows(observation):
    """Algorithms keep, index and concatenate them."""
    policy = make()
    x, t = torch.randn(BATCH, CHUNK * 7), torch.full((BATCH, 1), 0.3)
    with torch.no_grad():
        features = encode(policy, observation)
        assert features.shape == (BATCH, *policy.feature_shape) and features.dtype == torch.float32
        order = torch.tensor([2, 0, 1])
        mixed = torch.cat([features[2:], features[:2]])
        torch.testing.assert_close(
            policy.velocity(mixed, x[order], t), policy.velocity(features, x, t)[order]
        )
        summary = policy.summary(features)
    assert summary.shape == (BATCH, policy.flow.summary_dim)
    state = policy.state_normaliser(torch.from_numpy(observation["observation.state"]))
    torch.testing.assert_close(summary[:, SMALL["width"] :][:, :STATE_DIM], state)


def test_the_state_is_limited(observation):
    """A number that hardly moved in the data, and then does, counts five deviations and no more."""
    policy = make()
    far, limit = (
        {**observation, "observation.state": np.full((BATCH, STATE_DIM), value, np.float32)}
        for value in (1e6, 5.0)
    )
    with torch.no_grad():
        assert torch.equal(encode(policy, far), encode(policy, limit))


def flow_loss(policy, observation, chunk, seed=11):
    generator = torch.Generator().manual_seed(seed)
    features = encode(policy, observation)
    return policy.flow.matching_loss(features, chunk, torch.ones_like(chunk), 4, generator).mean()


def test_gradients_reach_lora_and_expert_and_nothing_frozen(observation):
    """Through keys and values in the features; what the last layer does after them concerns critics alone."""
    policy = make()
    chunk = torch.randn(BATCH, CHUNK * 7)
    flow_loss(policy, observation, chunk).backward()
    last = f"language_model.layers.{SMALL['layers'] - 1}."
    for name, layer in adapted_layers(policy.trunk):
        unused = name.startswith(last) and not name.endswith(("k_proj", "v_proj"))
        for matrix in (layer.lora_a, layer.lora_b):
            moved = matrix.grad is not None and bool(matrix.grad.abs().max() > 0)
            assert moved != unused, name
        assert layer.weight.grad is None
    for name, parameter in policy.flow.named_parameters():
        assert parameter.grad is not None or name.startswith("noise."), name
    lora = {
        id(p)
        for n, p in policy.trunk.named_parameters()
        if n.rpartition(".")[2] in ("lora_a", "lora_b")
    }
    assert {id(p) for p in policy.encoder_parameters()} == lora


def test_sft_with_the_encoder_lowers_the_loss():
    """LoRA and expert together learn actions that depend on the state, with pi0's times."""
    torch.manual_seed(12)
    policy = Pi0(
        state_dim=STATE_DIM, cameras=CAMERAS, chunk=CHUNK, sizes=SMALL, tokenizer="hashed", prompt_tokens=9,
        lora_rank=2, critics=0,
    )  # fmt: skip
    rng = np.random.default_rng(13)
    rows, shape = 32, (32, 28, 28, 3)
    state = rng.normal(size=(rows, STATE_DIM)).astype(np.float32)
    action = 0.2 * np.tile(state[:, None, :1], (1, CHUNK, 7))
    windows = Windows(
        {f"observation.images.{name}": rng.integers(0, 256, shape).astype(np.uint8) for name in CAMERAS},
        state, action, np.ones((rows, CHUNK), np.float32), np.zeros(rows, np.int64), ["go"] * rows,
    )  # fmt: skip
    policy.fit_actions(action.reshape(-1, 7))
    before = {name: p.clone() for name, p in policy.named_parameters()}
    settings = SFTConfig(
        steps=80, batch=16, draws=4, learning_rate=3e-3, warmup=5, time="beta", train_encoder=True,
        shares={"demo": 1.0},
    )  # fmt: skip
    sft = SFT(policy, settings, windows)
    losses = []
    while not sft.done:
        losses.append(sft.update()["flow_loss"])
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10]), losses
    changed = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert all(".lora_" in name or name.startswith("flow.") for name in changed)
    assert any(".lora_" in name for name in changed)


def test_recomputing_activations_changes_no_gradient(observation):
    chunk = torch.randn(BATCH, CHUNK * 7)
    gradients = []
    for recompute in (False, True):
        policy = make(recompute=recompute).train()
        flow_loss(policy, observation, chunk).backward()
        gradients.append({n: p.grad for n, p in policy.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_without_lora_the_whole_trunk_is_trained(observation):
    policy = make(lora_rank=0)
    assert len(policy.encoder_parameters()) == len(list(policy.trunk.parameters()))
    flow_loss(policy, observation, torch.randn(BATCH, CHUNK * 7)).backward()
    assert policy.trunk.vision_tower.embeddings.patch_embedding.weight.grad.abs().max() > 0


def test_bfloat16_computes_nearly_the_same_and_travels(observation):
    """Frozen weights have eight bits of mantissa and travel as uint16; trained ones stay float32."""
    exact, policy = make(), make(dtype="bfloat16")
    x, t = torch.randn(BATCH, CHUNK * 7), torch.full((BATCH, 1), 0.3)
    with torch.no_grad():
        wanted = exact.velocity(encode(exact, observation), x, t)
        found = policy.velocity(encode(policy, observation), x, t)
    assert found.dtype == torch.float32
    assert (found - wanted).square().mean() < 0.01 * wanted.square().mean()
    arrays = {name: array.copy() for name, array in to_arrays(policy).items()}
    kinds = {
        name: array.dtype
        for name, array in arrays.items()
        if name.endswith(("q_proj.weight", "lora_a"))
    }
    assert {d for n, d in kinds.items() if n.startswith("trunk.") and "lora" not in n} == {
        np.dtype("uint16")
    }
    assert {d for n, d in kinds.items() if n.startswith("flow.") or "lora" in n} == {
        np.dtype("float32")
    }
    other = Pi0(
        state_dim=STATE_DIM, cameras=CAMERAS, chunk=CHUNK, sizes=SMALL, tokenizer="hashed", prompt_tokens=9,
        lora_rank=2, dtype="bfloat16",
    ).eval()  # fmt: skip
    load_arrays(other, arrays)
    with torch.no_grad():
        assert torch.equal(other.velocity(encode(other, observation), x, t), found)
    arrays["trunk.language_model.norm.weight"] = np.zeros(SMALL["width"], np.float32)
    with pytest.raises(WeightsError, match=r"norm.weight: dtype float32"):
        load_arrays(other, arrays)


def test_settings_that_cannot_be_are_refused():
    for settings, message in (
        ({"sizes": "huge"}, r"no sizes 'huge': one of \['pi0', 'tiny'\]"),
        ({"sizes": {"depth": 3}}, r"sizes have no \['depth'\]"),
        (
            {"dtype": "float16"},
            r"policy.dtype is 'float16', should be one of \['bfloat16', 'float32'\]",
        ),
        ({"cameras": ()}, "at least one camera"),
        ({"action_dim": 10}, "10 numbers of an action; pi0 takes at most 9"),
        ({"sizes": {**SMALL, "padded": 4}}, "takes at most 4"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**settings)


def test_a_policy_can_be_copied():
    """Averages of weights are kept in copies."""
    policy = make()
    twin = copy.deepcopy(policy)
    assert all(
        torch.equal(a, b) for a, b in zip(policy.parameters(), twin.parameters(), strict=True)
    )
