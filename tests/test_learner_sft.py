"""SFT: how times are drawn, what is held out, when it is called overfitting, the encoder, and going on after an end."""

import numpy as np
import pytest
import torch

import learner.algorithms.sft as module
from learner.algorithms.sft import SFT, ImitationData, SFTConfig
from learner.dataset import concatenate, held_out
from learner.overfitting import Overfitting
from policies.registry import make_policy
from tests.training import POLICY, make_learner, make_segments, make_windows
from twinrl.core.errors import ConfigError


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return make_policy(POLICY)


def run(policy, data, seed=0, **options):
    """All steps of an SFT; the algorithm, and what each step measured."""
    policy.fit_actions(data.action.reshape(-1, 7))
    sft = SFT(policy, SFTConfig(**{"warmup": 5, "batch": 32, **options}), data, seed)
    measured = []
    while not sft.done:
        measured.append(sft.update())
    return sft, measured


def test_beta_times_are_pi0s_mirrored(policy):
    """pi0 draws 0.001 + 0.999 u, u ~ Beta(1.5, 1), where 1 is noise: ours is 1 minus that, in all quantiles."""
    like = torch.zeros(40_000, 1)
    t, eps = policy.flow.matching_points(like, 2, torch.Generator().manual_seed(0), "beta")
    assert t.shape == (40_000, 2, 1) and eps.shape == (40_000, 2, 28)
    u = torch.distributions.Beta(1.5, 1.0).sample((80_000,))
    at = torch.tensor([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
    theirs = 0.001 + 0.999 * u
    torch.testing.assert_close(
        t.flatten().quantile(at), 1 - theirs.quantile(1 - at), rtol=0, atol=0.01
    )
    assert t.min() >= 0 and t.max() <= 0.999
    uniform, _ = policy.flow.matching_points(like, 1, torch.Generator().manual_seed(0))
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match="time 'normal': one of uniform, beta"):
        policy.flow.matching_points(like, 1, None, "normal")


def test_given_points_give_the_same_loss(policy):
    """What was drawn once may be taken again; drawing with the same seed is the same."""
    features, chunk = torch.randn(6, *policy.feature_shape), torch.randn(6, 28)
    points = policy.flow.matching_points(features, 2, torch.Generator().manual_seed(1), "beta")
    arguments = (features, chunk, torch.ones(6, 28), 2)
    given = policy.flow.matching_loss(*arguments, points=points)
    drawn = policy.flow.matching_loss(*arguments, torch.Generator().manual_seed(1), "beta")
    assert torch.equal(given, drawn)


def test_whole_episodes_are_held_out_and_always_the_same():
    names = [f"episode {i}" for i in range(400) for _ in range(3)]
    apart = held_out(names, 0.2)
    assert 0.15 < apart.mean() < 0.25
    assert (apart.reshape(400, 3).sum(1) % 3 == 0).all()
    # Whatever else is there, and in whatever order.
    order = np.random.default_rng(0).permutation(600)
    np.testing.assert_array_equal(held_out([names[i] for i in order], 0.2), apart[order])
    assert held_out(names, 0.4)[apart].all()
    assert not held_out(names, 0.0).any()
    assert not held_out(names[:27], 0.9).any()  # of nine episodes none


def test_validation_windows_are_never_trained_on(policy):
    data = make_windows(60)
    apart = held_out(data.episode, 0.3)
    sft, measured = run(policy, data, steps=4, validation=0.3, validate_every=2)
    assert len(sft.validation) == apart.sum() and len(sft.data) == (~apart).sum()
    wanted = policy.action_normaliser(torch.from_numpy(data.action[~apart])).flatten(1)
    torch.testing.assert_close(sft.data.chunk, wanted)
    assert ["validation_loss" in each for each in measured] == [False, True, False, True]


def test_the_averaged_weights_are_validated_and_the_others_stay(policy):
    """At the end the averaged weights are the policy's, so that the last look is at the result."""
    sft, measured = run(policy, make_windows(60), steps=12, validation=0.3, validate_every=4)
    assert measured[-1]["validation_loss"] == pytest.approx(sft.validate(), rel=1e-6)
    other = [parameter + 1 for parameter in policy.flow.parameters()]
    with torch.no_grad():
        torch._foreach_copy_(list(policy.flow.parameters()), other)
    assert sft.validate() == pytest.approx(measured[-1]["validation_loss"], rel=1e-6)
    assert all(map(torch.equal, policy.flow.parameters(), other))


def test_learning_by_heart_is_called_overfitting(policy):
    """Few windows whose actions are noise: the loss on them falls, that of other episodes rises."""
    data = make_windows(80, noise=4.0)
    options = {"draws": 4, "learning_rate": 3e-3, "ema": 0.9, "validation": 0.5}
    sft, measured = run(policy, data, steps=400, validate_every=20, patience=3, **options)
    assert "overfitting" in sft.overfitting.warning
    assert f"best after {sft.overfitting.best_step} steps" in sft.overfitting.warning
    assert 0 < sft.overfitting.best_step < 300
    losses = [each["flow_loss"] for each in measured]
    assert np.mean(losses[-50:]) < 0.8 * np.mean(losses[:50])


def test_learning_a_rule_is_not(policy):
    sft, measured = run(
        policy, make_windows(300), steps=120, validation=0.2, validate_every=20, patience=2, draws=4
    )
    assert sft.overfitting.warning == "" and sft.overfitting.best_step >= 80
    assert measured[-1]["validation_loss"] < 0.9 * measured[19]["validation_loss"]


def test_overfitting_needs_both_losses_to_part():
    """A rise within the margin, for a short time, or with the training loss, is none."""

    def follow(training, validation, patience=2):
        judge = Overfitting(patience)
        for step, (low, high) in enumerate(zip(training, validation, strict=True)):
            judge.trained(low)
            judge.look(step, high)
        return judge

    assert follow([3, 2, 1, 0.5], [2, 1, 1.1, 1.2]).warning
    assert not follow([3, 2, 1, 0.5], [2, 1, 1.001, 1.01]).warning
    assert not follow([3, 2, 2.5, 2.6], [2, 1, 1.1, 1.2]).warning
    assert not follow([3, 2, 1, 0.5], [2, 1, 1.1, 0.9]).warning
    again = Overfitting(2)
    again.load_state_dict(follow([3, 2, 1], [2, 1, 1.1]).state_dict())
    again.trained(0.5)
    again.look(3, 1.2)
    assert "best after 1 steps (1) and is 1.2 after 3" in again.warning


def test_the_encoder_learns_what_may_learn(policy):
    """With train_encoder what requires a gradient moves, nothing else; without it nothing does."""
    encoder = policy.encoder_parameters()
    frozen, free = encoder[::2], encoder[1::2]
    for parameter in frozen:
        parameter.requires_grad_(False)

    def moved(trained):
        parts = (encoder, frozen, free, list(policy.flow.parameters()))
        before = [[each.detach().clone() for each in part] for part in parts]
        run(policy, make_windows(40), steps=3, train_encoder=trained)
        pairs = zip(parts, before, strict=True)
        return [not all(map(torch.equal, part, then)) for part, then in pairs]

    assert moved(trained=False) == [False, False, False, True]
    assert moved(trained=True) == [True, False, True, True]
    for parameter in encoder:
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing in the encoder requires a gradient"):
        run(policy, make_windows(40), steps=3, train_encoder=True)


def test_parts_of_a_batch_are_the_batch():
    results = []
    for parts in (1, 3):
        torch.manual_seed(0)
        policy = make_policy(POLICY)
        _, measured = run(policy, make_windows(50), steps=5, accumulate=parts)
        results.append((policy.state_dict(), [each["flow_loss"] for each in measured]))
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5)
    for name, tensor in results[0][0].items():
        torch.testing.assert_close(tensor, results[1][0][name], rtol=0, atol=1e-5)


def test_features_that_do_not_fit_are_encoded_when_drawn(policy, monkeypatch):
    """The loss is the same, and `features` are those of the first windows."""
    data = make_windows(20)
    kept = ImitationData(policy, data, {"demo": 1.0})
    monkeypatch.setattr(module, "FEATURE_MEMORY", 0)
    drawn = ImitationData(policy, data, {"demo": 1.0})
    drawn.extend(policy, make_windows(4, seed=1))
    assert len(drawn) == 24
    torch.testing.assert_close(drawn.features[:20], kept.features)
    assert not drawn.features.requires_grad
    losses = [
        each.losses(
            policy.flow,
            torch.arange(6),
            policy.flow.matching_points(kept.chunk[:6], 1, torch.Generator().manual_seed(0)),
        )
        for each in (kept, drawn)
    ]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("encoder", [False, True])
def test_an_interrupted_stage_goes_on_as_if_nothing_had_been(tmp_path, encoder):
    """Bit for bit, validation and judgement included; what was left behind is removed at the end."""
    segments = make_segments(14)
    options = {"steps": 9, "batch": 16, "warmup": 2, "validation": 0.3, "validate_every": 2}
    options["train_encoder"] = encoder
    arguments = {"name": "sft", "sources": ["demo"], "options": options, "start": None}

    whole = make_learner(tmp_path / "whole", segments)
    summary = whole.run("sft", **arguments)
    assert summary["steps"] == 9 and summary["validation_windows"] > 0

    first = make_learner(tmp_path / "parts", segments)
    note = first.note
    first.note = lambda metrics, progress: (
        note(metrics, progress),
        progress > 0.4 and first.stop(),
    )
    assert first.run("sft", **arguments)["steps"] == 4
    assert not first.has("sft") and first.has("sft-running") and first._sink.version == -1
    first.close()

    second = make_learner(tmp_path / "parts", segments, seed=0)
    again = second.run("sft", **arguments)
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}
    assert second.has("sft") and not second.has("sft-running")
    for name, tensor in whole.policy.state_dict().items():
        assert torch.equal(tensor, second.policy.state_dict()[name]), name
    for each in (whole, second):
        each.close()


def test_a_person_corrects_a_policy(tmp_path):
    """HG-DAgger: of the arm's episodes only a person's steps are cloned, as often as the demonstrations."""
    shown, acted = make_segments(10), make_segments(10, source="real", seed=1)
    for segment in acted:
        segment.columns["intervention"][4:] = True
    learner = make_learner(tmp_path, [*shown, *acted])
    options = {"steps": 2, "batch": 8}
    summary = learner.run(
        "sft", name="dagger", sources=["demo", "real"], options=options, start=None
    )
    assert summary["windows"] == 10 * 8 + 10 * 4
    with pytest.raises(ConfigError, match=r"sft\.options has no setting 'batches'; did you mean"):
        learner.run("sft", name="x", sources=["demo"], options={"batches": 8}, start=None)
    learner.close()


def test_bfloat16_computes_and_float32_is_kept(tmp_path):
    """Losses differ by rounding; parameters, averages and the published weights are float32."""
    found = {}
    for precision in ("float32", "bfloat16"):
        learner = make_learner(tmp_path / precision, make_segments(4), precision=precision)
        options = {"steps": 5, "batch": 16, "warmup": 1, "train_encoder": True}
        learner.run("sft", name="sft", sources=["demo"], options=options, start=None)
        found[precision] = (learner.policy.state_dict(), learner.losses()["loss/flow_loss"])
        learner.close()
    (exact, loss), (half, rounded) = found["float32"], found["bfloat16"]
    assert rounded != loss and rounded == pytest.approx(loss, rel=0.05)
    changed = [name for name in exact if not torch.equal(exact[name], half[name])]
    assert any(name.startswith("flow.") for name in changed)
    for name in changed:
        assert half[name].dtype == torch.float32
        torch.testing.assert_close(half[name], exact[name], rtol=0, atol=0.02)


def test_shares_weigh_sources(policy):
    data = concatenate([make_windows(30), make_windows(10, seed=1, source=2)])
    imitation = ImitationData(policy, data, {"demo": 0.25, "real": 0.75})
    rows, _ = imitation.draw(policy.flow, 4000, 1, torch.Generator().manual_seed(0))
    assert float((rows >= 30).float().mean()) == pytest.approx(0.75, abs=0.03)
