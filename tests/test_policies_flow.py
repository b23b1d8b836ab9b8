"""The flow head: exact path likelihood, deterministic integration, noise calibration."""

import math

import numpy as np
import pytest
import torch

from policies.experts import MLPExpert
from policies.flow import LOG_STD_BAND

FEATURES, DIM, BATCH = 5, 28, 7


@pytest.fixture
def head():
    torch.manual_seed(0)
    head = MLPExpert(FEATURES, DIM, hidden=32)
    for parameter in head.noise.parameters():  # a noise head that depends on its input
        torch.nn.init.normal_(parameter, std=0.3)
    return head


@pytest.fixture
def features():
    return torch.randn(BATCH, FEATURES, generator=torch.Generator().manual_seed(1))


def slow_log_prob(head, features, path):
    """Sum of scalar Gaussian log-densities, step by step and number by number, in float64."""
    head = head.double()
    total = np.zeros(len(path))
    steps = path.shape[1] - 1
    quiet = steps - (head.noisy_steps or steps)
    for row in range(len(path)):
        feature = features[row : row + 1].double()
        for k in range(steps):
            t = torch.full((1, 1), k / steps, dtype=torch.float64)
            start = path[row : row + 1, k].double()
            mean = start + head.velocity(feature, start, t) / steps
            if k < quiet:
                torch.testing.assert_close(path[row, k + 1].double(), mean[0], atol=1e-4, rtol=1e-4)
                continue
            log_std = head.log_std(feature, t)[0]
            for d in range(path.shape[2]):
                z = (float(path[row, k + 1, d]) - float(mean[0, d])) / math.exp(float(log_std[d]))
                total[row] += -0.5 * z * z - float(log_std[d]) - 0.5 * math.log(2 * math.pi)
    return total


@pytest.mark.parametrize(("steps", "noisy"), [(1, 0), (4, 0), (4, 1), (4, 3)])
def test_path_log_prob_equals_slow_computation(head, features, steps, noisy):
    """Both the sampler's and the evaluator's likelihood agree with an independent float64 sum."""
    head.noisy_steps = noisy
    with torch.no_grad():
        path, sampled = head.sample_path(features, steps, torch.Generator().manual_seed(2))
        evaluated = head.path_log_prob(features, path)
        slow = slow_log_prob(head, features, path)
    assert path.shape == (BATCH, steps + 1, DIM)
    np.testing.assert_allclose(sampled, slow, rtol=1e-4)
    np.testing.assert_allclose(evaluated, slow, rtol=1e-4)


def test_clipping_a_stored_path_shifts_its_likelihood(head, features):
    """Why paths are stored raw: clipping the final point changes the likelihood by many nats."""
    with torch.no_grad():
        path, log_prob = head.sample_path(features, 4, torch.Generator().manual_seed(3))
        clipped = path.clone()
        clipped[:, -1] = clipped[:, -1].clamp(-0.5, 0.5)
        shift = head.path_log_prob(features, clipped) - log_prob
    assert shift.abs().median() > 10.0


def test_log_std_stays_in_band(head, features):
    """Whatever the noise head says, the noise lies in the published band."""
    with torch.no_grad():
        log_std = head.log_std(100 * features, torch.rand(BATCH, 1))
    assert log_std.min() >= LOG_STD_BAND[0] and log_std.max() <= LOG_STD_BAND[1]


def test_integration_is_a_function_of_the_noise(head, features):
    """Equal noise gives equal chunks, and a noise-free path integrates alike."""
    noise = torch.randn(BATCH, DIM)
    with torch.no_grad():
        once, again = head.integrate(features, noise, 4), head.integrate(features, noise, 4)
        head.log_std_band.fill_(-30.0)
        path, _ = head.sample_path(features, 4, torch.Generator().manual_seed(4))
        quiet = head.integrate(features, path[:, 0], 4)
    assert torch.equal(once, again)
    torch.testing.assert_close(path[:, -1], quiet, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_calibration_reaches_the_same_action_noise_at_any_steps(head, features, steps):
    """The action noise of the paper's band at K = 10 is found again at other K."""
    features = features.repeat(40, 1)
    wanted = head.action_noise(features, 10, torch.Generator().manual_seed(0))
    reached = head.calibrate_noise(features, steps)
    assert reached == pytest.approx(wanted, rel=0.02)
    if steps == 10:
        assert head.log_std_band.tolist() == pytest.approx(LOG_STD_BAND, abs=0.01)


def test_calibration_accepts_a_target(head, features):
    """A wanted root mean square overrules the paper's band."""
    assert head.calibrate_noise(features.repeat(40, 1), 4, target=0.5) == pytest.approx(
        0.5, rel=0.02
    )


def test_matching_recovers_a_conditional_distribution():
    """Trained on two modes chosen by the feature, samples have each condition's mean and spread."""
    torch.manual_seed(0)
    head = MLPExpert(1, 2, hidden=64)
    optimiser = torch.optim.Adam(head.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, 1000)
    generator = torch.Generator().manual_seed(5)
    for _ in range(1000):
        condition = torch.randint(0, 2, (128, 1), generator=generator).float()
        noise = torch.randn(128, 2, generator=generator)
        data = torch.tensor([1.0, -0.5]) * (2 * condition - 1) + torch.tensor([0.1, 0.4]) * noise
        loss = head.matching_loss(condition, data, torch.ones_like(data), 2, generator).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        for condition, sign in ((0.0, -1.0), (1.0, 1.0)):
            noise = torch.randn(2000, 2, generator=generator)
            samples = head.integrate(torch.full((2000, 1), condition), noise, 10)
            torch.testing.assert_close(
                samples.mean(0), sign * torch.tensor([1.0, -0.5]), atol=0.08, rtol=0
            )
            torch.testing.assert_close(samples.std(0), torch.tensor([0.1, 0.4]), atol=0.08, rtol=0)


def test_masked_numbers_have_no_influence(head, features):
    """What stands in masked places changes neither loss nor gradient."""
    chunk, mask = torch.randn(BATCH, DIM), torch.ones(BATCH, DIM)
    mask[:, 14:] = 0
    other = torch.where(mask.bool(), chunk, torch.full_like(chunk, 9.0))
    losses = [
        head.matching_loss(features, value, mask, 2, torch.Generator().manual_seed(6))
        for value in (chunk, other)
    ]
    assert torch.equal(*losses)
    losses[0].sum().backward()
    assert head.network[-1][-1].bias.grad[14:].abs().max() == 0
    assert head.network[-1][-1].bias.grad[:14].abs().min() > 0


def test_quiet_steps_carry_gradient(head, features):
    """Noise in the last step only: the likelihood still depends on the weights through the steps before."""
    head.noisy_steps = 1
    with torch.no_grad():
        path, log_prob = head.sample_path(features, 3, torch.Generator().manual_seed(7))
    perturbed = path.clone()
    perturbed[:, 1:-1] += 1.0  # recomputed from the first point, never read
    torch.testing.assert_close(
        head.path_log_prob(features, perturbed), log_prob, rtol=1e-4, atol=1e-3
    )
    assert not torch.isclose(head.path_log_prob(features, path + 0.1), log_prob).all()
