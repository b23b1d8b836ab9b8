"""The likelihood of noisy integration paths and the marginals they have, against closed forms and numerical integration."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from policies.experts import MLPExpert
from policies.flow import LOG_STD_BAND, FlowExpert

FEATURES = 3


class GaussianFlow(FlowExpert):
    """The exact flow from N(0, 1) to N(mean, std^2), number by number."""

    def __init__(self, dim: int, mean: float, std: float) -> None:
        super().__init__(dim, FEATURES)
        self.mean, self.std = mean, std

    def condition(self, features):
        return None

    def field(self, condition, x, t):
        # E[A - eps | x_t = x] of the jointly Gaussian A, eps and x_t = (1 - t) eps + t A.
        slope = (t * self.std**2 - (1 - t)) / self.variance(t)
        return self.mean + slope * (x - t * self.mean)

    def summary(self, features):
        return features

    def variance(self, t):
        return (1 - t) ** 2 + (t * self.std) ** 2


def expert(dim=1, **settings):
    """A small network whose noise head depends on its input."""
    torch.manual_seed(0)
    made = MLPExpert(FEATURES, dim, hidden=16, layers=2, **settings)
    for parameter in made.noise.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def with_noise(flow, noise):
    """Wide enough noise of one kind, so that grids resolve it."""
    flow.log_std_band.copy_(torch.tensor([-1.0, -0.5]))
    flow.sde_noise.fill_(0.5 if noise == "sde" else 0.0)
    return flow


@pytest.mark.parametrize("noise", ["head", "sde"])
@pytest.mark.parametrize("noisy_steps", [0, 1])
def test_the_density_of_all_paths_from_a_point_integrates_to_one(noise, noisy_steps):
    """K = 2, one dimension: the integral over both later points; with one quiet step, over the last alone."""
    flow = with_noise(expert(noisy_steps=noisy_steps), noise)
    features = torch.randn(1, FEATURES)
    grid = torch.linspace(-7, 7, 281)
    if noisy_steps:
        first, second = torch.zeros(281), grid  # the first is integrated again
        cell = float(grid[1] - grid[0])
    else:
        first, second = torch.cartesian_prod(grid, grid).T
        cell = float(grid[1] - grid[0]) ** 2
    path = torch.stack([torch.full_like(first, 0.4), first, second], 1)[..., None]
    with torch.no_grad():
        density = flow.path_log_prob(features.expand(len(path), -1), path).exp()
    assert float(density.sum()) * cell == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("noise", ["head", "sde"])
def test_the_gradient_agrees_with_finite_differences(noise):
    """By every parameter's first number, and by the path's points."""
    flow = with_noise(expert(dim=2, noisy_steps=2), noise)
    features = torch.randn(4, FEATURES)
    path, _ = flow.sample_path(features, 3, torch.Generator().manual_seed(1))
    flow, features = flow.double(), features.double()
    path = path.detach().double().requires_grad_()
    flow.path_log_prob(features, path).sum().backward()
    checked = 0
    for tensor in [*flow.parameters(), path]:
        if tensor.grad is None:
            continue  # Flow-SDE leaves the noise head alone
        flat, step = tensor.data.view(-1), 1e-5
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                flat[0] += sign * step
                values.append(float(flow.path_log_prob(features, path).sum()))
                flat[0] -= sign * step
        expected = (values[0] - values[1]) / (2 * step)
        assert float(tensor.grad.view(-1)[0]) == pytest.approx(expected, rel=1e-5, abs=1e-6)
        checked += 1
    assert checked >= 8


@pytest.mark.parametrize(("steps", "noisy_steps"), [(1, 0), (5, 0), (5, 2)])
def test_a_stored_sde_path_has_the_likelihood_it_was_drawn_with(steps, noisy_steps):
    flow = with_noise(expert(dim=3, noisy_steps=noisy_steps), "sde")
    features = torch.randn(20, FEATURES)
    with torch.no_grad():
        path, drawn = flow.sample_path(features, steps, torch.Generator().manual_seed(2))
        torch.testing.assert_close(flow.path_log_prob(features, path), drawn, atol=1e-4, rtol=1e-4)
        flow.sde_noise.fill_(0.6)
        assert not torch.isclose(flow.path_log_prob(features, path), drawn).any()


@pytest.mark.parametrize("level", [0.3, 1.0])
def test_flow_sde_has_the_marginals_of_the_flow(level):
    """Mean and spread at every quarter of the way, as the exact flow's; the noise head's at the same strength widen."""
    flow = GaussianFlow(20, mean=1.5, std=0.2)
    features, steps = torch.zeros(1000, FEATURES), 100
    flow.sde_noise.fill_(level)
    with torch.no_grad():
        path, _ = flow.sample_path(features, steps, torch.Generator().manual_seed(3))
        apart = (path[:, -1] - flow.integrate(features, path[:, 0], steps)).std()
    for share in (0.25, 0.5, 0.75, 1.0):
        points = path[:, int(share * steps)]
        assert float(points.mean()) == pytest.approx(share * flow.mean, abs=0.02)
        wanted = math.sqrt(flow.variance(share))
        assert float(points.std()) == pytest.approx(wanted, rel=0.04)
    assert apart > 0.05  # it is another path, not the same one
    flow.sde_noise.zero_()
    flow.log_std_band.fill_(math.log(level / math.sqrt(steps)))
    with torch.no_grad():
        path, _ = flow.sample_path(features, steps, torch.Generator().manual_seed(3))
    assert float(path[:, -1].std()) > 1.05 * flow.std


@pytest.mark.parametrize("noise", ["head", "sde"])
@pytest.mark.parametrize("steps", [1, 2, 4, 10])
def test_every_number_of_steps_explores_alike_once_calibrated(noise, steps):
    """Later steps of a contracting flow swallow earlier noise, so the band of K = 10 is too little at other K."""
    flow = GaussianFlow(8, mean=0.0, std=0.3)
    features = torch.zeros(400, FEATURES)
    paper = flow.action_noise(features, 10, torch.Generator().manual_seed(0))
    if steps < 10:
        same_band = flow.action_noise(features, steps, torch.Generator().manual_seed(0))
        assert same_band < 0.93 * paper  # what calibration is for
    assert flow.calibrate_noise(features, steps, noise=noise) == pytest.approx(paper, rel=0.03)
    assert bool(flow.sde_noise > 0) == (noise == "sde")


def test_the_band_is_as_wide_as_wanted():
    """Exploration from scratch starts large and has to be able to fall."""
    flow = expert(dim=2)
    features = torch.randn(300, FEATURES)
    assert flow.calibrate_noise(features, 1, target=0.5, width=2.0) == pytest.approx(0.5, rel=0.03)
    low, high = flow.log_std_band.tolist()
    assert high - low == pytest.approx(2.0) and low < math.log(0.5) < high
    flow.calibrate_noise(features, 1)
    assert float(flow.log_std_band.diff()) == pytest.approx(LOG_STD_BAND[1] - LOG_STD_BAND[0])
    with pytest.raises(ValueError, match="head, sde"):
        flow.calibrate_noise(features, 1, noise="ode")


def test_at_one_step_a_mask_leaves_numbers_out():
    """The parts add up to the whole, and what is left out has no influence."""
    flow = with_noise(expert(dim=6), "head")
    features = torch.randn(5, FEATURES)
    with torch.no_grad():
        path = flow.sample_path(features, 1, torch.Generator().manual_seed(4))[0]
        mask = torch.zeros(5, 6)
        mask[:, :2] = 1.0
        parts = [flow.path_log_prob(features, path, part) for part in (mask, 1 - mask)]
        torch.testing.assert_close(parts[0] + parts[1], flow.path_log_prob(features, path))
        other = path.clone()
        other[:, -1, 2:] = 9.0
        torch.testing.assert_close(flow.path_log_prob(features, other, mask), parts[0])


def test_with_more_steps_a_mask_is_refused():
    """There, what was not executed moved what was: the whole path counts."""
    flow = expert(dim=2)
    with pytest.raises(ValueError, match="K = 1"):
        flow.path_log_prob(torch.zeros(1, FEATURES), torch.zeros(1, 3, 2), torch.ones(1, 2))


def test_matching_recovers_a_mixture_and_one_step_blurs_it():
    """Two modes of unequal weight: ten steps give both, with their weights; one step gives the mean between them."""
    torch.manual_seed(0)
    flow = MLPExpert(FEATURES, 1, hidden=64)
    optimiser = torch.optim.Adam(flow.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, 700)
    generator = torch.Generator().manual_seed(5)
    features = torch.zeros(256, FEATURES)
    for _ in range(700):
        right = (torch.rand(256, 1, generator=generator) < 0.3).float()
        data = 2 * right - 1 + 0.1 * torch.randn(256, 1, generator=generator)
        loss = flow.matching_loss(features, data, torch.ones(256, 1), 2, generator).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    noise = torch.randn(4000, 1, generator=generator)
    features = torch.zeros(4000, FEATURES)
    with torch.no_grad():
        ten = flow.integrate(features, noise, 10).numpy()
        one = flow.integrate(features, noise, 1).numpy()
    assert (ten > 0).mean() == pytest.approx(0.3, abs=0.05)
    for mode in (-1, 1):
        near = ten[np.abs(ten - mode) < 0.5]
        assert near.mean() == pytest.approx(mode, abs=0.06) and near.std() < 0.2
    assert (np.abs(np.abs(ten) - 1) < 0.5).mean() > 0.93
    assert one.mean() == pytest.approx(-0.4, abs=0.1) and one.std() < 0.15  # nobody showed -0.4


def test_without_start_noise_one_step_is_a_gaussian_policy():
    """K = 1, start_noise 0: one Gaussian whose mean is the noise-free action, whatever the generator."""
    flow = with_noise(expert(dim=2), "head")
    flow.start_noise = 0.0
    features = torch.randn(4, FEATURES)
    path, log_prob = flow.sample_path(features, 1, torch.Generator().manual_seed(1))
    mean = flow.integrate(features, flow.start((4, 2), features), 1)
    std = flow.log_std(flow.summary(features), torch.zeros(4, 1)).exp()
    expected = torch.distributions.Normal(mean, std).log_prob(path[:, -1]).sum(-1)
    torch.testing.assert_close(log_prob, expected)
    assert (path[:, -1] - mean).abs().min() > 0


def test_the_sde_refuses_another_start_noise():
    """Its score is that of a flow from N(0, 1)."""
    flow = expert()
    flow.start_noise = 0.5
    with pytest.raises(ValueError, match="start_noise"):
        flow.calibrate_noise(torch.randn(8, FEATURES), 2, noise="sde")
