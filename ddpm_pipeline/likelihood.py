"""LIKELIHOOD: the variational bound term by term, bits per dimension, and the likelihood of the probability-flow ODE.

    -log p(x_0) <= L_T + sum_t L_{t-1} + L_0                                   (Eq. 5, DDPM; expectations over x_t)
    L_T     = KL(q(x_T | x_0) || N(0, I))                    what is left of the image after the forward process
    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))  the error of one step of the reverse process
    L_0     = -log p(x_0 | x_1)                              of whole pixel values: bins of a Gaussian (Eq. 13)

The bound holds for any sub-sequence of the diffusion timesteps. It is summed over all of them, or estimated without
bias from a few per image. The probability-flow ODE has the same marginals as the forward process and is deterministic,
so that the model's density can be computed exactly along it (Song et al. 2021, arXiv 2011.13456, section 4.3).

Everything is in nats per image, float64, until `bits_per_dim`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import rng
from .pixels import num_levels
from .precision import as_float64
from .scheduling_ddpm import DDPMScheduler, ReverseMeanVariance, check_timesteps

Network = Callable[[Tensor, Tensor], Any]  # (x_t (B, C, H, W), t (B,)) to its output, called as a UNet2DModel is

SMALLEST_VARIANCE = 1e-20  # of q, in place of 0 where t is 0
MAX_SCHEDULE_LENGTH = 1_000_000  # stride of the images in the noise's counter, above any number of timesteps


class VariationalBound(NamedTuple):
    """The terms of the bound for B images, nats per image, float64.

    Args:
        prior: L_T, (B,).
        t: (B, K) int64, ascending along K: the timesteps where a KL was computed.
        stratum_size: (K,) int64, how many timesteps each of the K stands for; all 1 if every step was computed.
        kl: L_{t-1} at these t, (B, K).
        decoder: L_0, (B,).
        squared_error: (B, 1 + K), mean over the values of (x_0_pred - x_0)^2, in [-1, 1]: first of the step that ends
            at x_0, then of the steps at t.
    """

    prior: Tensor
    t: Tensor
    stratum_size: Tensor
    kl: Tensor
    decoder: Tensor
    squared_error: Tensor

    @property
    def total(self) -> Tensor:
        """The bound, or its unbiased estimate, (B,)."""
        return self.prior + (self.kl * self.stratum_size).sum(1) + self.decoder


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
    """Eq. (5), DDPM, for each image, with one noise sample per image and timestep.

    Args:
        network: predicts what the scheduler's `prediction_type` and `variance_type` name, for x_t in x_0's dtype.
        x_0: images, (B, C, H, W), float32 or float64: `levels` values from -1 to 1.
        index: an index for each image, such as that in the data set, (B,) int64, on the CPU; 0, 1, ... by default. The
            noise and timesteps of an image depend on the seed and its index alone, not on the rest of the batch.
        timesteps: the sub-sequence of timesteps, descending, in [0, T); all by default.
        strata: instead of all L_{t-1}, compute one at a random t from each of this many strata of the timesteps. Strata
            are smaller near t = 0, where the terms change most. The sum stays unbiased; L_T and L_0 stay exact.
        levels: 256 for 8 bits, 65536 for 16; None: x_0 is continuous, and L_0 is that of its density.
        last_variance: variance of p(x_0 | x_1). "next": beta_tilde of the next noisier step, as in the code of Ho et
            al., which gives the better bound; for "learned_range" it is the lower end of the range. "own": the
            variance of the step itself, beta for "fixed_large" (the fixed small variance is 0 there, and is replaced as
            by "next").
    Raises:
        ValueError: a number is out of range, the timesteps do not descend, or x_0 is not in [-1, 1].
    """
    num_steps = scheduler.num_steps
    steps = list(range(num_steps))[::-1] if timesteps is None else check_timesteps(timesteps, num_steps)
    if strata is not None and not 1 <= strata <= max(1, len(steps) - 1):
        raise ValueError(f"strata is {strata!r}: give an integer from 1 to {max(1, len(steps) - 1)}, timesteps - 1")
    if levels is not None and levels < 2:
        raise ValueError(f"levels is {levels!r}: give 256 or 65536, or None for continuous values")
    if last_variance not in ("next", "own"):
        raise ValueError(f'last_variance is {last_variance!r}: give "next" or "own"')
    if not x_0.is_floating_point() or x_0.ndim != 4 or (levels is not None and x_0.abs().amax() > 1 + 1e-6):
        raise ValueError(f"x_0 is {x_0.dtype} of shape {tuple(x_0.shape)}: give floats (B, C, H, W) in [-1, 1]")
    batch_size, exact_x_0 = len(x_0), as_float64(x_0)
    device = exact_x_0.device
    index = torch.arange(batch_size) if index is None else index
    ascending = torch.tensor(steps[::-1])
    edges = _strata(len(steps) - 1, strata)

    # L_0: the step that ends at x_0. Schedule indices count the ascending timesteps; this one is 0.
    t = ascending[:1].expand(batch_size)
    x_t, output = _noise_and_predict(network, scheduler, x_0, t, _noise(seed, 0, index, x_0))
    next_variance = _next_variance(scheduler, steps)
    p = _reverse_moments(scheduler, output, t, x_t, torch.full_like(t, -1), next_variance)
    log_variance = p.log_variance
    if last_variance == "next" and scheduler.variance_type.startswith("fixed"):
        log_variance = torch.full_like(log_variance, math.log(next_variance))
    decoder = decoder_nats(x_0, p.mean, log_variance, levels)
    squared_error = [_mean_square(p.x_0_pred - exact_x_0)]

    # L_{t-1}: one timestep from each stratum.
    chosen_t, kls = [], []
    for stratum, (low, high) in enumerate(zip(edges, edges[1:])):
        stream = rng.key(seed, rng.Stream.BOUND_TIMESTEP, stratum)
        offset = rng.integers(stream, index, high - low) if high - low > 1 else 0
        schedule_index = torch.zeros_like(index) + 1 + low + offset
        t, prev_t = ascending[schedule_index], ascending[schedule_index - 1]
        x_t, output = _noise_and_predict(network, scheduler, x_0, t, _noise(seed, schedule_index, index, x_0))
        p = _reverse_moments(scheduler, output, t, x_t, prev_t)
        q = scheduler.q_posterior_mean_variance(exact_x_0, as_float64(x_t), t, prev_t)
        kls.append(gaussian_kl(q.mean, q.variance.log(), p.mean, p.log_variance))
        squared_error.append(_mean_square(p.x_0_pred - exact_x_0))
        chosen_t.append(t)

    mean, variance = scheduler.q_mean_variance(exact_x_0, ascending[-1:].expand(batch_size))
    empty = torch.zeros((batch_size, 0), dtype=torch.float64, device=device)
    return VariationalBound(
        prior=gaussian_kl(mean, variance.log(), torch.zeros_like(mean), torch.zeros_like(variance)),
        t=torch.stack(chosen_t, 1).to(device) if chosen_t else empty.long(),
        stratum_size=torch.tensor([high - low for low, high in zip(edges, edges[1:])], device=device),
        kl=torch.stack(kls, 1) if kls else empty,
        decoder=decoder,
        squared_error=torch.stack(squared_error, 1),
    )


def bound_term(
    scheduler: DDPMScheduler, output: Tensor, t: Tensor, x_t: Tensor, x_0: Tensor, levels: int | None = 256
) -> Tensor:
    """The bound's term of a step of the whole process: L_{t-1}, or L_0 where t is 0; with gradients. (B,), nats.

    Args:
        output: of the network for x_t at t, (B,) int64, in the dtype of x_t.
        x_0, levels: as in `variational_bound`.
    """
    next_variance = _next_variance(scheduler, list(range(min(2, scheduler.num_steps)))[::-1])
    p = scheduler.p_mean_variance(output, t, x_t, fallback_variance=next_variance)
    q = scheduler.q_posterior_mean_variance(x_0, x_t, t)
    kl = gaussian_kl(q.mean, q.variance.clamp(min=SMALLEST_VARIANCE).log(), p.mean, p.log_variance)
    # of the other images something finite: an infinite gradient times 0 is NaN
    ends = (t == 0).view(-1, 1, 1, 1)
    mean, log_variance = torch.where(ends, p.mean, x_0), torch.where(ends, p.log_variance, 0.0)
    return torch.where(t == 0, decoder_nats(x_0, mean, log_variance, levels).to(kl.dtype), kl)


def gaussian_kl(mean_a: Tensor, log_variance_a: Tensor, mean_b: Tensor, log_variance_b: Tensor) -> Tensor:
    """KL(N(mean_a, variance_a) || N(mean_b, variance_b)) of independent values, summed over an image: (B,), nats.

    (log var_b - log var_a + (var_a + (mean_a - mean_b)^2) / var_b - 1) / 2 for each value.
    """
    ratio = log_variance_a - log_variance_b
    # exp(r) - 1 - r, which is small where the variances are nearly equal
    nats = (torch.expm1(ratio) - ratio + (mean_a - mean_b).square() * (-log_variance_b).exp()) / 2
    return nats.expand_as(mean_a).flatten(1).sum(1)


def decoder_nats(x_0: Tensor, mean: Tensor, log_variance: Tensor, levels: int | None) -> Tensor:
    """-log p(x_0 | x_1), summed over an image: Eq. (13), DDPM. (B,), nats, float64.

    A value has the probability of its bin, half a brightness level to either side; the bins of -1 and 1 extend to
    infinity, so that the probabilities sum to 1. With levels None it is the density of N(mean, variance) at x_0.
    """
    x_0, mean, log_variance = (as_float64(value) for value in (x_0, mean, log_variance))
    std = (log_variance / 2).exp()
    if levels is None:
        nats = (((x_0 - mean) / std).square() + log_variance + math.log(2 * math.pi)) / 2
        return nats.flatten(1).sum(1)
    half = 1 / (levels - 1)
    upper = torch.where(x_0 > 1 - half, math.inf, (x_0 + half - mean) / std)
    lower = torch.where(x_0 < -1 + half, -math.inf, (x_0 - half - mean) / std)
    # Phi(upper) - Phi(lower) = Phi(-lower) - Phi(-upper): take the tail that loses no digits
    mirrored = x_0 > mean
    upper, lower = torch.where(mirrored, -lower, upper), torch.where(mirrored, -upper, lower)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    log_probability = log_upper + torch.log(-torch.expm1(log_lower - log_upper))
    return -log_probability.flatten(1).sum(1)


def bits_per_dim(nats: Tensor, shape: Sequence[int]) -> Tensor:
    """Nats per image as bits per dimension; shape is that of one image, (C, H, W)."""
    return nats / (math.prod(shape) * math.log(2))


class RateDistortion(NamedTuple):
    """Progressive coding (DDPM, section 4.3): x_T, ..., x_0 are sent in turn, and the receiver predicts x_0.

    Args:
        t: (M,) descending: mean over the images of the timestep at this index.
        rate: (M,) bits per dimension that have been sent when x_t is known.
        distortion: (M,) root mean squared error of x_0_pred at x_t, on the scale of 0 to 255.
    """

    t: Tensor
    rate: Tensor
    distortion: Tensor


def rate_distortion(bound: VariationalBound, shape: Sequence[int]) -> RateDistortion:
    """Means over the images of a bound, from the largest of its timesteps down to the step that ends at x_0."""
    last = torch.zeros((len(bound.t), 1), dtype=torch.int64, device=bound.t.device)
    t = as_float64(torch.cat([last, bound.t], dim=1)).mean(0)
    nats = (bound.kl * bound.stratum_size).mean(0)
    # x_t is known when L_T and all L above t have been sent: of its stratum of size s, (s - 1) / (2 s) on average
    above = nats.flip(0).cumsum(0).flip(0)
    middle = above - nats / 2 * (1 + 1 / bound.stratum_size)
    rate = bound.prior.mean() + torch.cat([above[:1] if len(nats) else above.new_zeros(1), middle])
    distortion = bound.squared_error.mean(0).sqrt() * 127.5
    return RateDistortion(t.flip(0), bits_per_dim(rate, shape).flip(0), distortion.flip(0))


# ---- The probability-flow ODE ----------------------------------------------------------------------------------------


def dequantise(pixels: Tensor, *, index: Tensor | None = None, seed: int = 0) -> Tensor:
    """Whole pixel values to continuous ones, by noise that is uniform over a value's bin: (B, C, H, W), float32.

    Args:
        pixels: uint8 or uint16, (B, C, H, W). Bins are centred where training puts the values, x = 2 v / 255 - 1.
        index: as in `variational_bound`, for the noise.
    """
    if pixels.dtype not in (torch.uint8, torch.uint16):
        raise ValueError(f"pixels are {pixels.dtype}: give uint8 or uint16")
    index = torch.arange(len(pixels)) if index is None else index
    dims = pixels[0].numel()
    counter = index[:, None] * dims + torch.arange(dims)
    uniform = rng.uniform(rng.key(seed, rng.Stream.DEQUANTISATION), counter).view(pixels.shape)
    x = 2 * (pixels.cpu().double() + uniform - 0.5) / (num_levels(pixels.dtype) - 1) - 1
    return x.float().to(pixels.device)


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
    """-log p(x_0) of the probability-flow ODE, nats per image: (B,), float64. Song et al. 2021, Eqs. 39 and 40.

    With u = log(noise_std / signal), which rises with t, the ODE of the exact network is

        dx/du = sqrt(1 - alpha_bar) eps(x, t(u)) - (1 - alpha_bar) x

    and along it the log-density falls by the divergence of the right-hand side. It is solved from t = 0, where
    x_t = sqrt(alpha_bar_t) x_0, to the last t, where the density is that of N(0, I). Between two timesteps t is
    fractional: the network was not trained there and has to interpolate.

    Args:
        network: as for `variational_bound`, but t is a float and a gradient can be taken; in float32 or float64, not in
            bfloat16.
        x_0: continuous images, (B, C, H, W): see `dequantise`.
        probes: random vectors of signs for the divergence (Hutchinson 1990); None: exact, one gradient for each value
            of an image.
        rtol, atol: tolerances of the solver, fifth-order Dormand-Prince. All images are one state of the solver, so
            the result of an image in another batch is the same to these tolerances only.
    Raises:
        ValueError: probes is below 1, or the scheduler has fewer than 2 timesteps.
    """
    from torchdiffeq import odeint

    if probes is not None and probes < 1:
        raise ValueError(f"probes is {probes!r}: give at least 1, or None for the exact divergence")
    index = torch.arange(len(x_0)) if index is None else index
    home = as_float64(x_0[:0]).device  # of the solver's state
    alpha_bar, _ = scheduler.alpha_bars(torch.arange(scheduler.num_steps))
    alpha_bar = alpha_bar[alpha_bar > 0].to(home)  # u is infinite at zero terminal SNR: end one timestep earlier
    if len(alpha_bar) < 2:
        raise ValueError(f"the scheduler has {scheduler.num_steps} timesteps: give one with at least 2")
    u_of_t = ((1 - alpha_bar).log() - alpha_bar.log()) / 2
    directions = _probe_vectors(x_0, index, seed, probes)

    def velocity(u: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """d/du of x, and of the log-density lost so far."""
        noise_variance = torch.sigmoid(2 * u)
        with torch.enable_grad():
            x = state[0].to(x_0.dtype).to(x_0.device).detach().requires_grad_()  # the solver's state is float64
            eps = _predict_eps(network, scheduler, x, _timestep_at(u, u_of_t), 1 - noise_variance)
            trace = torch.zeros(len(x), dtype=torch.float64, device=home)
            for i, direction in enumerate(directions):
                (pulled,) = torch.autograd.grad(eps, x, direction, retain_graph=i + 1 < len(directions))
                trace += as_float64(pulled * direction).flatten(1).sum(1)
        divergence = noise_variance.sqrt() * trace / (probes or 1) - noise_variance * x[0].numel()
        return as_float64(noise_variance.sqrt() * eps.detach() - noise_variance * x.detach()), divergence

    start = (as_float64(x_0 * alpha_bar[0].sqrt()), torch.zeros(len(x_0), dtype=torch.float64, device=home))
    with torch.no_grad():
        x, lost = odeint(velocity, start, u_of_t[[0, -1]], rtol=rtol, atol=atol, method="dopri5")
    log_prior = -(as_float64(x[-1]).square() + math.log(2 * math.pi)).flatten(1).sum(1) / 2
    log_scale = x_0[0].numel() * alpha_bar[0].log() / 2  # change of variables from x_t at t = 0 to x_0
    return -(log_prior + lost[-1] + log_scale)


def discrete_nats(nats: Tensor, shape: Sequence[int], levels: int) -> Tensor:
    """From the density of dequantised images in [-1, 1] to the probability of whole values.

    A bin is 2 / (levels - 1) wide, so each value adds log((levels - 1) / 2), the 6.99 bits of 8-bit images that are
    easily forgotten. The expectation is at least -log P (Theis et al. 2016, arXiv 1511.01844, section 3.1).
    """
    return nats + math.prod(shape) * math.log((levels - 1) / 2)


def _probe_vectors(x_0: Tensor, index: Tensor, seed: int, probes: int | None) -> Tensor:
    """Vectors v with E[v v^T] = I, to estimate a trace: (probes, B, C, H, W). For probes=None the standard basis."""
    dims = x_0[0].numel()
    if probes is None:
        basis = torch.eye(dims, dtype=x_0.dtype, device=x_0.device).view(-1, 1, *x_0.shape[1:])
        return basis.expand(-1, len(x_0), -1, -1, -1)
    vector = index[:, None] * probes + torch.arange(probes)
    counter = vector[..., None] * dims + torch.arange(dims)
    negative = rng.bits(rng.key(seed, rng.Stream.DIVERGENCE_PROBE), counter) < 0
    return negative.to(x_0.dtype).to(x_0.device).mul_(2).sub_(1).transpose(0, 1).reshape(-1, *x_0.shape)


def _predict_eps(network: Network, scheduler: DDPMScheduler, x: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
    """eps_pred at a fractional t, which the scheduler's tables lack: from its coefficients at this alpha_bar."""
    fractional_t = t.to(x.dtype).to(x.device).expand(len(x))
    output = _tensor_of(network(x, fractional_t))[:, : x.shape[1]]  # the rest is a predicted variance
    a, b = (value.to(x.dtype) for value in scheduler.eps_coefficients(alpha_bar, scheduler.prediction_type))
    return a * x + b * output


def _timestep_at(u: Tensor, u_of_t: Tensor) -> Tensor:
    """The fractional t with log(noise_std / signal) = u: linear between timesteps."""
    after = torch.searchsorted(u_of_t, u).clamp(1, len(u_of_t) - 1)
    low, high = u_of_t[after - 1], u_of_t[after]
    return after - 1 + (u - low) / (high - low)


# ---- Helpers ---------------------------------------------------------------------------------------------------------


def _strata(length: int, strata: int | None) -> list[int]:
    """Edges of the strata of 0 ... length - 1: each index alone, or this many strata, the k-th about k^2 long."""
    if strata is None or strata >= length:
        return list(range(length + 1))
    edges = [0]
    for k in range(1, strata + 1):
        edges.append(max(edges[-1] + 1, round(length * (k / strata) ** 3)))
    return [min(edge, length - strata + k) for k, edge in enumerate(edges)]


def _noise(seed: int, schedule_index: int | Tensor, index: Tensor, x_0: Tensor) -> Tensor:
    """The noise of each image at its schedule index, in x_0's shape and dtype."""
    counter = (index * MAX_SCHEDULE_LENGTH + schedule_index).to(x_0.device)
    return rng.normal(rng.key(seed, rng.Stream.BOUND_NOISE), counter, tuple(x_0.shape[1:])).to(x_0.dtype)


def _noise_and_predict(
    network: Network, scheduler: DDPMScheduler, x_0: Tensor, t: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """x_t and the network's output there."""
    x_t = scheduler.add_noise(x_0, eps, t)
    return x_t, _tensor_of(network(x_t, t.to(x_0.device)))


def _tensor_of(output: Any) -> Tensor:
    """The output itself, or the `sample` of a diffusers output object."""
    tensor: Tensor = getattr(output, "sample", output)
    return tensor


def _reverse_moments(
    scheduler: DDPMScheduler, output: Tensor, t: Tensor, x_t: Tensor, prev_t: Tensor, fallback_variance: float = 1.0
) -> ReverseMeanVariance:
    """p(x_prev | x_t) in float64."""
    return scheduler.p_mean_variance(
        as_float64(output), t, as_float64(x_t), prev_t, fallback_variance=fallback_variance
    )


def _next_variance(scheduler: DDPMScheduler, steps: list[int]) -> float:
    """beta_tilde of the step before the last one; beta if there is a single step."""
    if len(steps) == 1:
        alpha_bars, variance_type = scheduler.alpha_bars(torch.tensor(steps), torch.tensor([-1])), "fixed_large"
    else:
        alpha_bars = scheduler.alpha_bars(torch.tensor(steps[-2:-1]), torch.tensor(steps[-1:]))
        variance_type = "fixed_small"
    return scheduler.log_variance(*alpha_bars, variance_type)[0].exp().item()


def _mean_square(difference: Tensor) -> Tensor:
    return difference.square().flatten(1).mean(1)
