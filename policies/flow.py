"""The action expert: a flow-matching velocity field over action chunks, and its exact path likelihood.

Convention (pi0's paper): t = 0 is noise, t = 1 is data, x_t = (1 - t) * eps + t * A, target A - eps.
openpi and LeRobot checkpoints mirror it (t = 1 is noise).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from policies.layers import fourier, mlp
from policies.streams import Streams

LOG_STD_BAND = (-2.5, -2.0)  # PPOFlow's noise head, at K = 10
NOISES = ("head", "sde")
BAND_STEPS = 10
TIME_FEATURES = 8
BETA_POWER, BETA_RANGE = 1.5, 0.999  # of the times that pi0 trains on


class FlowExpert(nn.Module):
    """The mathematics of a flow policy; a subclass brings the network.

    Shapes: B rows, D = C * A numbers of a normalised chunk, S points of a row that are evaluated at once (integration
    steps of a stored path, or draws of a loss), `features` (B, ...) what the policy's encoder gives.

    A subclass implements `condition`, `field` and `summary`, and sets `summary_dim` before it calls
    `super().__init__()`'s noise head into being.
    """

    def __init__(self, dim: int, summary_dim: int, noisy_steps: int = 0) -> None:
        """`noisy_steps`: how many of the last integration steps add noise; 0 for all, as in PPOFlow.

        Later steps contract the noise of earlier ones, so that their likelihood says little about the action: with
        noise in the last step only, all of the likelihood's gradient is about the action that was executed.
        """
        super().__init__()
        self.dim = dim
        self.summary_dim = summary_dim
        self.noisy_steps = noisy_steps
        self.start_noise = 1.0
        self.noise = mlp(summary_dim + TIME_FEATURES, 64, dim, 1)
        nn.init.zeros_(self.noise[-1].weight)
        nn.init.zeros_(self.noise[-1].bias)
        self.register_buffer("log_std_band", torch.tensor(LOG_STD_BAND))
        # Flow-SDE's noise level; 0: the noise head speaks. Both are set by calibrate_noise and travel with the weights.
        self.register_buffer("sde_noise", torch.tensor(0.0))

    # -- what a subclass brings ----------------------------------------------------------------------------

    def condition(self, features: Tensor) -> Any:
        """What K integration steps share, computed once: a projection, or the prefix's keys and values."""
        raise NotImplementedError

    def field(self, condition: Any, x: Tensor, t: Tensor) -> Tensor:
        """Velocity (B, S, D) at `x` (B, S, D) and `t` (B, S, 1) in [0, 1]."""
        raise NotImplementedError

    def summary(self, features: Tensor) -> Tensor:
        """`features` (B, ...) as one vector (B, summary_dim), for noise head and critics."""
        raise NotImplementedError

    # -- the same for every network ------------------------------------------------------------------------

    def start(
        self,
        shape: tuple[int, ...],
        like: Tensor,
        generator: torch.Generator | Streams | None = None,
    ) -> Tensor:
        """First points x_0 (*shape) of integrations, from N(0, `start_noise`^2).

        1, where the flow is cloned: what it shows of several ways, it shows by x_0. With 0 and K = 1 the policy is a
        Gaussian about x + v, as PPO's usually is: RL from nothing has no ways to keep apart, and a field that forgets
        to undo x_0 adds noise that no gradient takes away.
        """
        return self.start_noise * gaussian(shape, like, generator)

    def velocity(self, features: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Velocity (B, D) at `x` (B, D) and `t` (B, 1)."""
        return self._velocity(self.condition(features), x, t)

    def _velocity(self, condition: Any, x: Tensor, t: Tensor) -> Tensor:
        return self.field(condition, x[:, None], t[:, None])[:, 0]

    def log_std(self, summary: Tensor, t: Tensor) -> Tensor:
        """Log standard deviation (..., D) of the noise added in the integration step that starts at t (..., 1)."""
        low, high = self.log_std_band
        return low + (high - low) * torch.sigmoid(
            self.noise(torch.cat([summary, fourier(t)], dim=-1))
        )

    def integrate(self, features: Tensor, noise: Tensor, steps: int) -> Tensor:
        """`steps` Euler steps of dx = v dt from `noise` (B, D) at t = 0 -> x (B, D) at t = 1."""
        condition = self.condition(features)
        x = noise
        for k in range(steps):
            x = x + self._velocity(condition, x, x.new_full((len(x), 1), k / steps)) / steps
        return x

    def step(
        self, condition: Any, summary: Tensor, x: Tensor, t: Tensor, steps: int
    ) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation (B, S, D) of x_{k+1}, given x_k = `x` (B, S, D) at t = k / K (B, S, 1).

        With the noise head (PPOFlow): mean x + v / K, and what `log_std` says. With `sde_noise` a > 0, Flow-SDE (pi_RL,
        arXiv 2510.25889), the Euler-Maruyama step of the stochastic equation that has the marginals of dx = v dt:

            dx = [v + sigma^2 / 2 * score] dt + sigma dw,   score = -(x - t v) / (1 - t),   sigma = a sqrt((1 - t) / t)

        where x - t v is the flow's estimate of the noise in x. Any sigma keeps the marginals; this one calms down
        towards the data, and t is taken as at least 1 / K, where sigma would be infinite.
        """
        velocity = self.field(condition, x, t)
        if not self.sde_noise:
            summary = summary[:, None].expand(-1, x.shape[1], -1)
            return x + velocity / steps, self.log_std(summary, t)
        late = t.clamp_min(1 / steps)
        drift = velocity - self.sde_noise.square() / (2 * late) * (x - t * velocity)
        log_std = self.sde_noise.log() + 0.5 * ((1 - t) / (late * steps)).log()
        return x + drift / steps, log_std.expand_as(x)

    def sample_path(
        self, features: Tensor, steps: int, generator: torch.Generator | Streams | None = None
    ) -> tuple[Tensor, Tensor]:
        """x_{k+1} = mean + sigma * n, as `step` says -> path (B, K+1, D), log-probability (B,) given x_0.

        sigma = 0 in the first K - `noisy_steps` steps, which integrate dx = v dt.
        """
        batch = len(features)
        condition = self.condition(features)
        summary = self.summary(features)
        x = self.start((batch, self.dim), features, generator)
        path, total = [x], x.new_zeros(batch)
        for k in range(steps):
            t = x.new_full((batch, 1), k / steps)
            if k < self._quiet(steps):
                x = x + self._velocity(condition, x, t) / steps
            else:
                mean, log_std = self.step(condition, summary, x[:, None], t[:, None], steps)
                n = gaussian((batch, self.dim), features, generator)
                x = mean[:, 0] + log_std[:, 0].exp() * n
                total = total + _log_density(n, log_std[:, 0]).sum(-1)
            path.append(x)
        return torch.stack(path, dim=1), total

    def path_log_prob(self, features: Tensor, path: Tensor, mask: Tensor | None = None) -> Tensor:
        """Sum over noisy k of log N(x_{k+1}; mean, sigma^2) (B,) of a raw `path` (B, K+1, D).

        Steps without noise are integrated again from x_0, with gradient: they are part of the mean. The density
        of x_0 is left out: it has no parameters, and cancels in a ratio for a stored x_0.

        `mask` (B, D) leaves out numbers of the chunk that were never executed. Only at K = 1 are the numbers independent
        given x_0; with more steps all of x_k moves all of x_{k+1}, and a mask is refused (ValueError).
        """
        batch, steps = path.shape[0], path.shape[1] - 1
        if mask is not None and steps > 1:
            raise ValueError(
                f"a path of {steps} steps has no likelihood of a part of its chunk: mask at K = 1 only"
            )
        quiet = self._quiet(steps)
        condition = self.condition(features)
        x = path[:, 0]
        for k in range(quiet):
            x = x + self._velocity(condition, x, x.new_full((batch, 1), k / steps)) / steps
        t = torch.arange(quiet, steps, dtype=path.dtype, device=path.device) / steps
        t = t.view(1, -1, 1).expand(batch, -1, -1)
        start = torch.cat([x[:, None], path[:, quiet + 1 : -1]], dim=1)
        mean, log_std = self.step(condition, self.summary(features), start, t, steps)
        density = _log_density((path[:, quiet + 1 :] - mean) / log_std.exp(), log_std)
        return (density if mask is None else density * mask[:, None]).sum((1, 2))

    def _quiet(self, steps: int) -> int:
        """How many integration steps add no noise."""
        return max(0, steps - self.noisy_steps) if self.noisy_steps else 0

    def matching_loss(
        self,
        features: Tensor,
        chunk: Tensor,
        mask: Tensor,
        draws: int = 1,
        generator: torch.Generator | None = None,
        time: str = "uniform",
        points: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Flow-matching error (B,) of normalised `chunk` (B, D); `mask` (B, D) marks the known dimensions.

        E || v(x_t, t) - (A - eps) ||^2, averaged over `draws` pairs (t, eps) per row: drawing again is far
        cheaper than another encoding. Unknown dimensions carry noise only and no loss. `time` says how t is drawn
        (`matching_points`); `points` (t, eps) are taken instead of drawing, where a loss is to be the same again.
        """
        chunk = (chunk * mask)[:, None]  # (B, 1, D)
        if points is None:
            points = self.matching_points(features, draws, generator, time)
        t, eps = points
        predicted = self.field(self.condition(features), (1 - t) * eps + t * chunk, t)
        error = (predicted - (chunk - eps)).square().mean(1)
        return (error * mask).sum(-1) / mask.sum(-1).clamp_min(1.0)

    def matching_points(
        self,
        features: Tensor,
        draws: int = 1,
        generator: torch.Generator | None = None,
        time: str = "uniform",
    ) -> tuple[Tensor, Tensor]:
        """`draws` times t (B, draws, 1) and noise eps (B, draws, D) for each row of `features`.

        `time`: "uniform" in [0, 1), or "beta" as in pi0, more of the times near noise, where the field is hardest to
        learn: t = 0.999 (1 - u), u ~ Beta(1.5, 1), which is pi0's 0.001 + 0.999 u where its t = 1 is noise.
        """
        batch = len(features)
        t = _drawn(torch.rand, (batch, draws, 1), features, generator)
        if time == "beta":
            t = BETA_RANGE * (1 - t ** (1 / BETA_POWER))  # Beta(a, 1) has the quantile q^(1/a)
        elif time != "uniform":
            raise ValueError(f"time {time!r}: one of uniform, beta")
        return t, self.start((batch, draws, self.dim), features, generator)

    @torch.no_grad()
    def action_noise(self, features: Tensor, steps: int, generator: torch.Generator) -> float:
        """Root mean square distance between noisy and noise-free integration from the same x_0."""
        path, _ = self.sample_path(features, steps, generator)
        return float(
            (path[:, -1] - self.integrate(features, path[:, 0], steps)).square().mean().sqrt()
        )

    @torch.no_grad()
    def calibrate_noise(
        self,
        features: Tensor,
        steps: int,
        seed: int = 0,
        target: float = 0.0,
        noise: str = "head",
        width: float = LOG_STD_BAND[1] - LOG_STD_BAND[0],
    ) -> float:
        """Set the level of `noise` so that the action noise at `steps` equals that of the paper's band at K = 10.

        Later steps contract earlier noise, so no formula carries a level from one K to another: it is measured
        on `features` (B, ...) and found by bisection. `target` overrules the wanted root mean square
        (normalised units). -> the root mean square reached.

        `noise`: "head", the learnable noise head, whose band of log standard deviations is `width` wide; or "sde", Flow-SDE.
        """
        if noise not in NOISES:
            raise ValueError(f"noise {noise!r}: one of {', '.join(NOISES)}")
        if noise == "sde" and self.start_noise != 1.0:
            raise ValueError(
                f"start_noise {self.start_noise:g} with noise 'sde': its score is that of start_noise 1"
            )

        def draw(count: int) -> float:
            return self.action_noise(features, count, torch.Generator().manual_seed(seed))

        if not target:
            self.sde_noise.zero_()
            self.log_std_band.copy_(torch.tensor(LOG_STD_BAND))
            noisy_steps, self.noisy_steps = self.noisy_steps, 0
            target = draw(BAND_STEPS)
            self.noisy_steps = noisy_steps
        band = sum(LOG_STD_BAND) / 2 + width * torch.tensor([-0.5, 0.5])
        low, high = -3.0, 3.0
        for _ in range(12):
            shift = (low + high) / 2
            self.log_std_band.copy_(band + shift)
            self.sde_noise.fill_(math.exp(shift) if noise == "sde" else 0.0)
            low, high = (low, shift) if draw(steps) > target else (shift, high)
        return draw(steps)


def _log_density(standard: Tensor, log_std: Tensor) -> Tensor:
    """Log density of a Gaussian, number by number, at `standard` deviations from its mean."""
    return -0.5 * standard.square() - log_std - 0.5 * math.log(2 * math.pi)


def gaussian(
    shape: tuple[int, ...], like: Tensor, generator: torch.Generator | Streams | None
) -> Tensor:
    """Standard normal float32 numbers on the device of `like`, from a generator of any device."""
    return _drawn(torch.randn, shape, like, generator)


def _drawn(
    draw: Callable[..., Tensor],
    shape: tuple[int, ...],
    like: Tensor,
    generator: torch.Generator | Streams | None,
) -> Tensor:
    """Random float32 numbers on the device of `like`, from a generator of any device."""
    if isinstance(generator, Streams):
        return generator.draw(draw, shape).to(like.device)
    device = generator.device if generator is not None else like.device
    return draw(shape, generator=generator, device=device).to(like.device)
