"""INVERSION: the deterministic DDIM sampler and its inverse, from images to latents.

    sampling   x_prev = coef_x_0 x_0_pred + coef_x_t x_t    DDIM (arXiv 2010.02502), Eq. (12), with sigma = 0
    inversion  x_t = r x_prev + k eps(x_t, t)               the same equation, solved for x_t

The latent x_T of an image leads back to that image when it is sampled with eta = 0.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .denoiser import Denoiser
from .scheduling_ddpm import DDPMScheduler


def ddim_sample(denoiser: Denoiser, scheduler: DDPMScheduler, x_t: Tensor, timesteps: Sequence[int]) -> Tensor:
    """Sampling without noise and without clipping: DDIM, Eq. (12), with sigma = 0.

    Args:
        x_t: noisy images at timesteps[0], (B, C, H, W).
        timesteps: descending indices in [0, T).
    Returns:
        x_0, (B, C, H, W).
    """
    for t, prev_t in zip(timesteps, [*timesteps[1:], -1]):
        alpha_bars = scheduler.alpha_bars(torch.tensor([t]), torch.tensor([prev_t]))
        coef_x_0, coef_x_t, _ = (value.item() for value in scheduler.posterior_coefficients(*alpha_bars, eta=0.0))
        x_0_pred, _ = predict(denoiser, scheduler, x_t, t)
        x_t = coef_x_0 * x_0_pred + coef_x_t * x_t
    return x_t


def ddim_invert(
    denoiser: Denoiser,
    scheduler: DDPMScheduler,
    x_0: Tensor,
    timesteps: Sequence[int],
    fixed_point_iterations: int = 0,
    tolerance: float = 1e-5,
) -> Tensor:
    """Latents from which `ddim_sample` reproduces x_0: x_t = r x_prev + k eps(x_t, t), from the last timestep up.

    x_t is on both sides. The first guess uses eps of the step before. Each fixed-point iteration evaluates eps at the
    current guess, which gives a better one (Pan et al. 2023, arXiv 2309.04907; Meiri et al. 2023, arXiv 2312.12540).

    Args:
        x_0: images, (B, C, H, W), in [-1, 1].
        timesteps: descending indices in [0, T), those of the sampler.
        fixed_point_iterations: at most this many after the first evaluation, one network call each.
        tolerance: an image has converged at a timestep when no pixel changes by more than this.
    Returns:
        x_t at timesteps[0], (B, C, H, W).
    """
    x_prev, eps = x_0, torch.zeros_like(x_0)
    prev_t = -1
    for t in reversed(timesteps):
        r, k = _inversion_coefficients(scheduler, t, prev_t)
        guess = best = r * x_prev + k * eps
        smallest = torch.full((len(x_0),), math.inf, device=x_0.device)
        for _ in range(1 + fixed_point_iterations):
            _, eps_pred = predict(denoiser, scheduler, guess, t)
            update = r * x_prev + k * eps_pred
            change = (update - guess).abs().flatten(1).amax(1)
            # A converged image is left alone, so that its latent does not depend on the rest of the batch.
            better = (change < smallest) & (smallest > tolerance)
            best = torch.where(better.view(-1, 1, 1, 1), update, best)
            eps = torch.where(better.view(-1, 1, 1, 1), eps_pred, eps)
            smallest = torch.where(better, change, smallest)
            if not (smallest > tolerance).any():
                break
            guess = update
        x_prev, prev_t = best, t
    return x_prev


def predict(denoiser: Denoiser, scheduler: DDPMScheduler, x_t: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """(x_0_pred, eps_pred) of the network for x_t at index t, whatever its prediction type, with nothing clipped."""
    prediction, _ = scheduler.split_output(denoiser(x_t, t), x_t)
    x_0_pred, eps_pred = (
        scheduler.convert_prediction(prediction, torch.tensor([t]), x_t, scheduler.prediction_type, target)
        for target in ("sample", "epsilon")
    )
    return x_0_pred, eps_pred


def _inversion_coefficients(scheduler: DDPMScheduler, t: int, prev_t: int) -> tuple[float, float]:
    """(r, k) in x_t = r x_prev + k eps.

    From x_prev = sqrt(alpha_bar_prev) x_0 + sqrt(1 - alpha_bar_prev) eps with x_0 of Eq. (15), DDPM:
    r = sqrt(alpha_bar_t / alpha_bar_prev), k = sqrt(1 - alpha_bar_t) - r sqrt(1 - alpha_bar_prev).
    """
    alpha_bars = scheduler.alpha_bars(torch.tensor([t]), torch.tensor([prev_t]))
    alpha_bar_t, alpha_bar_prev = (value.item() for value in alpha_bars)
    r = math.sqrt(alpha_bar_t / alpha_bar_prev)
    return r, math.sqrt(1 - alpha_bar_t) - r * math.sqrt(1 - alpha_bar_prev)
