"""HOW MUCH IT KNOWS: how many bits a picture takes with this model. A bound term by term, and a second opinion.

    -log p(x_0) <= L_T + sum_t L_{t-1} + L_0                                             (Eq. 5, DDPM; means over x_t)
    L_T     = KL(q(x_T | x_0) || N(0, I))                what of the picture is left at the end of the walk
    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))                   how much one step home goes astray
    L_0     = -log p(x_0 | x_1)                          of whole pixel values, each a bin of a Gaussian (Eq. 13)

The bound holds for any steps that are kept of the walk. It can be summed over all of them, or estimated without bias
from a few of each picture. The second opinion follows the walk without noise, an ordinary differential equation, along
which a density can be computed exactly (Song et al. 2021, arXiv 2011.13456, section 4.3).

All is in nats for a whole picture, float64, until `bits_per_dim`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import rng
from .pixels import num_levels
from .scheduling_ddpm import DDPMScheduler, ReverseMeanVariance

Network = Callable[[Tensor, Tensor], Any]  # (x_t (B, C, H, W), t (B,)) to the output, as a UNet2DModel is called


class VariationalBound(NamedTuple):
    """The bound of B pictures, nats for a picture, float64.

    Args:
        prior: L_T, (B,).
        t: (B, K) int64, rising along K: the steps whose L_{t-1} was computed.
        share: (K,) int64, how many steps each of the K stands for; all 1 if none was left out.
        step: L_{t-1} at these t, (B, K).
        decoder: L_0, (B,).
        squared_error: (B, 1 + K), mean over the pixels of (x_0_pred - x_0)^2, in [-1, 1]: first that of the step which
            ends at the picture, then those at t.
    """

    prior: Tensor
    t: Tensor
    share: Tensor
    step: Tensor
    decoder: Tensor
    squared_error: Tensor

    @property
    def total(self) -> Tensor:
        """The bound itself, or its unbiased estimate, (B,)."""
        return self.prior + (self.step * self.share).sum(1) + self.decoder


@torch.no_grad()
def variational_bound(
    network: Network,
    scheduler: DDPMScheduler,
    x_0: Tensor,
    *,
    index: Tensor | None = None,
    seed: int = 0,
    timesteps: Sequence[int] | None = None,
    strata: int | None = None,
    levels: int | None = 256,
    last_variance: Literal["next", "own"] = "next",
) -> VariationalBound:
    """Eq. (5), DDPM, for each picture, with one noise for each picture and step.

    Args:
        network: gives what the scheduler's `prediction_type` and `variance_type` say, for x_t of x_0's dtype.
        x_0: pictures, (B, C, H, W), float32 or float64: `levels` values from -1 to 1.
        index: numbers of these pictures, (B,) int64, on the CPU; 0, 1, ... by default. A picture's noise and steps
            depend on the seed and its number alone, not on the others.
        timesteps: the steps that are kept, falling, in [0, T); all by default.
        strata: instead of all L_{t-1} compute one at random out of each of so many parts of the walk, which are
            shorter near the picture, where the terms change most. The sum stays unbiased; L_T and L_0 stay exact.
        levels: 256 for 8 bits, 65536 for 16; None: x_0 is continuous, and L_0 of its density.
        last_variance: of p(x_0 | x_1). "next": beta_tilde of the step before, as in Ho et al.'s code, which gives the
            better bound; for a learned range the lower end of it. "own": beta with "fixed_large", as in every other
            step (for beta_tilde, which is 0 there, it is "next" all the same).
    Raises:
        ValueError: a number out of range, timesteps that do not fall, or pictures of other values.
    """
    steps = _checked_steps(scheduler, timesteps)
    if strata is not None and not 1 <= strata <= max(1, len(steps) - 1):
        raise ValueError(f"strata is {strata!r}: give an integer from 1 to {max(1, len(steps) - 1)}, the steps but one")
    if levels is not None and levels < 2:
        raise ValueError(f"levels is {levels!r}: give 256 or 65536, or None for continuous values")
    if last_variance not in ("next", "own"):
        raise ValueError(f'last_variance is {last_variance!r}: give "next" or "own"')
    if not x_0.is_floating_point() or x_0.ndim != 4 or (levels is not None and x_0.abs().amax() > 1 + 1e-6):
        raise ValueError(f"x_0 is {x_0.dtype} of shape {tuple(x_0.shape)}: give floats (B, C, H, W) in [-1, 1]")
    number, device = len(x_0), x_0.device
    index = torch.arange(number) if index is None else index
    rising = torch.tensor(steps[::-1])
    edges = _strata(len(steps) - 1, strata)

    # The step that ends at the picture, place 0 of the rising row.
    t = rising[:1].expand(number)
    x_t, output = _asked(network, scheduler, x_0, t, _noise(seed, 0, index, x_0))
    least = _next_variance(scheduler, steps)
    p = _p(scheduler, output, t, x_t, torch.full_like(t, -1), least)
    log_variance = p.log_variance
    if last_variance == "next" and scheduler.variance_type.startswith("fixed"):
        log_variance = torch.full_like(log_variance, math.log(least))
    decoder = decoder_nats(x_0, p.mean, log_variance, levels)
    squared_error = [_mean_square(p.x_0_pred - x_0)]

    # One step of each part.
    chosen, nats = [], []
    for part, (low, high) in enumerate(zip(edges, edges[1:])):
        within = (
            rng.integers(rng.key(seed, rng.Stream.BOUND_TIMESTEP, part), index, high - low) if high - low > 1 else 0
        )
        place = torch.zeros_like(index) + 1 + low + within
        t, prev_t = rising[place], rising[place - 1]
        eps = _noise(seed, place, index, x_0)
        x_t, output = _asked(network, scheduler, x_0, t, eps)
        p = _p(scheduler, output, t, x_t, prev_t)
        q = scheduler.q_posterior_mean_variance(x_0.double(), x_t.double(), t.to(device), prev_t.to(device))
        nats.append(gaussian_kl(q.mean, q.variance.log(), p.mean, p.log_variance))
        squared_error.append(_mean_square(p.x_0_pred - x_0))
        chosen.append(t)

    mean, variance = scheduler.q_mean_variance(x_0.double(), rising[-1:].expand(number).to(device))
    none = torch.zeros((number, 0), dtype=torch.float64, device=device)
    return VariationalBound(
        prior=gaussian_kl(mean, variance.log(), torch.zeros_like(mean), torch.zeros_like(variance)),
        t=torch.stack(chosen, 1).to(device) if chosen else none.long(),
        share=torch.tensor([high - low for low, high in zip(edges, edges[1:])], device=device),
        step=torch.stack(nats, 1) if nats else none,
        decoder=decoder,
        squared_error=torch.stack(squared_error, 1),
    )


def gaussian_kl(mean_a: Tensor, log_variance_a: Tensor, mean_b: Tensor, log_variance_b: Tensor) -> Tensor:
    """KL(N(mean_a, variance_a) || N(mean_b, variance_b)) of independent values, summed over a picture: (B,), nats.

    (log var_b - log var_a + (var_a + (mean_a - mean_b)^2) / var_b - 1) / 2 for each value.
    """
    ratio = log_variance_a - log_variance_b
    # exp(r) - 1 - r, which is small where the variances are nearly equal
    nats = (torch.expm1(ratio) - ratio + (mean_a - mean_b).square() * (-log_variance_b).exp()) / 2
    return nats.expand_as(mean_a).flatten(1).sum(1)


def decoder_nats(x_0: Tensor, mean: Tensor, log_variance: Tensor, levels: int | None) -> Tensor:
    """-log p(x_0 | x_1), summed over a picture: Eq. (13), DDPM. (B,), nats, float64.

    A value has the probability of its bin, half a step of brightness to either side; the bins of -1 and 1 go on to
    infinity, so that all of them sum to 1. With levels None it is the density of N(mean, variance) at x_0.
    """
    x_0, mean, log_variance = (value.double() for value in (x_0, mean, log_variance))
    std = (log_variance / 2).exp()
    if levels is None:
        nats = (((x_0 - mean) / std).square() + log_variance + math.log(2 * math.pi)) / 2
        return nats.flatten(1).sum(1)
    half = 1 / (levels - 1)
    upper = torch.where(x_0 > 1 - half, math.inf, (x_0 + half - mean) / std)
    lower = torch.where(x_0 < -1 + half, -math.inf, (x_0 - half - mean) / std)
    # Phi(upper) - Phi(lower) = Phi(-lower) - Phi(-upper): the one in whose tail no digits are lost
    mirrored = x_0 > mean
    upper, lower = torch.where(mirrored, -lower, upper), torch.where(mirrored, -upper, lower)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    log_probability = log_upper + torch.log(-torch.expm1(log_lower - log_upper))
    return -log_probability.flatten(1).sum(1)


def bits_per_dim(nats: Tensor, shape: Sequence[int]) -> Tensor:
    """Nats of a whole picture as bits for each of its values; shape is that of a picture, (C, H, W)."""
    return nats / (math.prod(shape) * math.log(2))


class RateDistortion(NamedTuple):
    """Progressive coding (DDPM, section 4.3): sent step by step from the noisy end, a picture gets clearer.

    Args:
        t: (M,) falling: mean of the steps at this place.
        rate: (M,) bits for each value that have been sent when x_t is known.
        distortion: (M,) root of the mean squared error of what is then expected, on the scale of 0 to 255.
    """

    t: Tensor
    rate: Tensor
    distortion: Tensor


def rate_distortion(found: VariationalBound, shape: Sequence[int]) -> RateDistortion:
    """Means over the pictures of a bound, at the first, ..., last of its steps."""
    last = torch.zeros((len(found.t), 1), dtype=torch.int64, device=found.t.device)
    t = torch.cat([last, found.t], dim=1).double().mean(0)
    nats = (found.step * found.share).mean(0)
    # x_t is known when L_T and all L above t have been sent; of the terms in t's own part half, on average
    above = nats.flip(0).cumsum(0).flip(0)
    middle = above - nats / 2 * (1 + 1 / found.share)
    rate = found.prior.mean() + torch.cat([above[:1] if len(nats) else above.new_zeros(1), middle])
    distortion = found.squared_error.mean(0).sqrt() * 127.5
    return RateDistortion(t.flip(0), bits_per_dim(rate, shape).flip(0), distortion.flip(0))


# ---- The second opinion ----------------------------------------------------------------------------------------------


def dequantised(pixels: Tensor, *, index: Tensor | None = None, seed: int = 0) -> Tensor:
    """Whole pixel values to continuous ones, by noise that is uniform over a value's bin: (B, C, H, W), float32.

    Args:
        pixels: uint8 or uint16, (B, C, H, W), on the CPU. Their values lie where the network was shown them,
            x = 2 v / 255 - 1.
        index: numbers of these pictures, (B,), for the noise.
    """
    if pixels.dtype not in (torch.uint8, torch.uint16):
        raise ValueError(f"pixels are {pixels.dtype}: give uint8 or uint16")
    index = torch.arange(len(pixels)) if index is None else index
    number = pixels[0].numel()
    places = index[:, None] * number + torch.arange(number)
    uniform = rng.uniform(rng.key(seed, rng.Stream.DEQUANTISATION), places).view(pixels.shape)
    return (2 * (pixels.double() + uniform - 0.5) / (num_levels(pixels.dtype) - 1) - 1).float()


def probability_flow_nats(
    network: Network,
    scheduler: DDPMScheduler,
    x_0: Tensor,
    *,
    index: Tensor | None = None,
    seed: int = 0,
    probes: int | None = 1,
    rtol: float = 1e-4,
    atol: float = 1e-4,
) -> Tensor:
    """-log p(x_0) of the walk without noise, nats for a picture: (B,), float64. Song et al. 2021, Eqs. 39 and 40.

    With u = log(noise / signal), which rises along the walk, the walk without noise is, for the exact network,

        dx/du = sqrt(1 - alpha_bar) eps(x, t(u)) - (1 - alpha_bar) x

    and along it the logarithm of the density falls by the divergence of this. It leads from x_0, taken for sqrt(1 /
    alpha_bar) x_t of the first step, to N(0, I) at the last one. Between two steps of the walk, t is a fraction, which
    the network was not taught but understands.

    Args:
        network: as for `bound`, but t is float and a gradient can be taken; in float32 or float64, not in bf16.
        x_0: continuous pictures, (B, C, H, W): see `dequantised`.
        probes: random directions for the divergence (Hutchinson 1990, with signs); None: exact, one gradient for each
            value of a picture.
        rtol, atol: tolerances of the solver, Dormand and Prince's of order 5. It takes all pictures in one state, so
            that these digits, and no more, are the same in another batch.
    Raises:
        ValueError: probes is less than 1, or the walk is of one step.
    """
    from torchdiffeq import odeint

    if probes is not None and probes < 1:
        raise ValueError(f"probes is {probes!r}: give at least 1, or None for the exact divergence")
    index = torch.arange(len(x_0)) if index is None else index
    alpha_bar = scheduler.alphas_cumprod.to(x_0.device)
    alpha_bar = alpha_bar[alpha_bar > 0]  # a walk that ends in pure noise ends, here, one step before
    if len(alpha_bar) < 2:
        raise ValueError(f"the walk has {scheduler.num_steps} steps: give one of at least 2")
    log_sigma = ((1 - alpha_bar).log() - alpha_bar.log()) / 2
    if probes is not None:
        drawn = rng.bits(rng.key(seed, rng.Stream.DIVERGENCE_PROBE), (index[:, None] * probes + torch.arange(probes))[..., None]
                            * x_0[0].numel() + torch.arange(x_0[0].numel()))  # fmt: skip
        directions = (drawn < 0).to(x_0.device, x_0.dtype).mul_(2).sub_(1).transpose(0, 1).reshape(-1, *x_0.shape)
    else:
        basis = torch.eye(x_0[0].numel(), dtype=x_0.dtype, device=x_0.device).view(-1, 1, *x_0.shape[1:])
        directions = basis.expand(-1, len(x_0), -1, -1, -1)

    def velocity(u: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Of x and of the log-density lost."""
        noise_variance = torch.sigmoid(2 * u)
        with torch.enable_grad():
            x = state[0].to(x_0.dtype).detach().requires_grad_()  # the solver keeps all in float64
            eps = _eps(network, scheduler, x, _step_at(u, log_sigma), 1 - noise_variance)
            trace = torch.zeros(len(x), dtype=torch.float64, device=x.device)
            for i, direction in enumerate(directions):
                more = i + 1 < len(directions)
                (pulled,) = torch.autograd.grad(eps, x, direction, retain_graph=more)
                trace += (pulled * direction).double().flatten(1).sum(1)
        divergence = noise_variance.sqrt() * trace / (probes or 1) - noise_variance * x[0].numel()
        return noise_variance.sqrt() * eps.detach() - noise_variance * x.detach(), divergence

    start = (x_0 * alpha_bar[0].sqrt(), torch.zeros(len(x_0), dtype=torch.float64, device=x_0.device))
    with torch.no_grad():
        x, lost = odeint(velocity, start, log_sigma[[0, -1]], rtol=rtol, atol=atol, method="dopri5")
    log_prior = -(x[-1].double().square() + math.log(2 * math.pi)).flatten(1).sum(1) / 2
    scaled = x_0[0].numel() * alpha_bar[0].log() / 2  # x_t of the first step is this much smaller than x_0
    return -(log_prior + lost[-1] + scaled)


def discrete_nats(nats: Tensor, shape: Sequence[int], levels: int) -> Tensor:
    """From the density of dequantised pictures in [-1, 1] to the probability of whole values.

    A bin is 2 / (levels - 1) wide, so each value adds log((levels - 1) / 2), the 6.99 bits of 8-bit pictures that are
    easily forgotten. On average it is at least -log P (Theis et al. 2016, arXiv 1511.01844, section 3.1).
    """
    return nats + math.prod(shape) * math.log((levels - 1) / 2)


def _eps(network: Network, scheduler: DDPMScheduler, x: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
    output = _said(network(x, t.to(x.dtype).expand(len(x))))[:, : x.shape[1]]  # what follows is a learned variance
    if scheduler.prediction_type == "epsilon":
        return output
    a, b = (value.to(x.dtype) for value in scheduler.x_0_coefficients(alpha_bar, scheduler.prediction_type))
    signal, noise_std = alpha_bar.sqrt().to(x.dtype), (1 - alpha_bar).sqrt().to(x.dtype)
    return (x - signal * (a * x + b * output)) / noise_std


def _step_at(u: Tensor, log_sigma: Tensor) -> Tensor:
    """t, a fraction, at which log(noise / signal) is u: linear between the steps of the walk."""
    after = torch.searchsorted(log_sigma, u).clamp(1, len(log_sigma) - 1)
    low, high = log_sigma[after - 1], log_sigma[after]
    return after - 1 + (u - low) / (high - low)


# ---- Small things ----------------------------------------------------------------------------------------------------


def _checked_steps(scheduler: DDPMScheduler, timesteps: Sequence[int] | None) -> list[int]:
    steps = list(range(scheduler.num_steps))[::-1] if timesteps is None else [int(t) for t in timesteps]
    if not steps or any(after >= before for before, after in zip(steps, steps[1:])):
        raise ValueError(f"timesteps are {steps[:8]}...: give integers in descending order")
    if not 0 <= steps[-1] <= steps[0] < scheduler.num_steps:
        raise ValueError(f"timesteps go from {steps[0]} to {steps[-1]}: all must be in [0, {scheduler.num_steps})")
    return steps


def _strata(number: int, strata: int | None) -> list[int]:
    """Edges of parts of 0 ... number - 1: single steps, or so many parts, the k-th from the start growing like k^2."""
    if strata is None or strata >= number:
        return list(range(number + 1))
    edges = [0]
    for k in range(1, strata + 1):
        edges.append(max(edges[-1] + 1, round(number * (k / strata) ** 3)))
    return [min(edge, number - strata + k) for k, edge in enumerate(edges)]


def _noise(seed: int, place: int | Tensor, index: Tensor, x_0: Tensor) -> Tensor:
    """A picture's noise at a place of the schedule, in which it has a million places at most."""
    both = (index * 1_000_000 + place).to(x_0.device)
    return rng.normal(rng.key(seed, rng.Stream.BOUND_NOISE), both, tuple(x_0.shape[1:])).to(x_0.dtype)


def _asked(network: Network, scheduler: DDPMScheduler, x_0: Tensor, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and what the network says there."""
    t = t.to(x_0.device)
    x_t = scheduler.add_noise(x_0, eps, t)
    return x_t, _said(network(x_t, t))


def _said(output: Any) -> Tensor:
    """The tensor itself, or that in what a network of diffusers returns."""
    said: Tensor = getattr(output, "sample", output)
    return said


def _p(
    scheduler: DDPMScheduler, output: Tensor, t: Tensor, x_t: Tensor, prev_t: Tensor, least: float = 1.0
) -> ReverseMeanVariance:
    """p(x_prev | x_t) in float64."""
    t, prev_t = t.to(x_t.device), prev_t.to(x_t.device)
    return scheduler.p_mean_variance(output.double(), t, x_t.double(), prev_t, least_variance=least)


def _next_variance(scheduler: DDPMScheduler, steps: list[int]) -> float:
    """beta_tilde of the step before the last one; of a single step beta, as there is no other."""
    if len(steps) == 1:
        alpha_bars, variance_type = scheduler.alpha_bars(torch.tensor(steps), torch.tensor([-1])), "fixed_large"
    else:
        alpha_bars = scheduler.alpha_bars(torch.tensor(steps[-2:-1]), torch.tensor(steps[-1:]))
        variance_type = "fixed_small"
    return scheduler.log_variance(*alpha_bars, variance_type)[0].exp().item()


def _mean_square(difference: Tensor) -> Tensor:
    return difference.double().square().flatten(1).mean(1)
