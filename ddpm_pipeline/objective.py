"""THE OBJECTIVE: noised batches, targets and the loss. Algorithm 1, DDPM.

    t ~ uniform, eps ~ N(0, I);  x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps
    L_simple = mean |target - network(x_t, t)|^2,  target = eps, x_0 or v                       (Eq. 14, DDPM, for eps)

With learned variance (Nichol and Dhariwal 2021, arXiv 2102.09672, Eq. 16) the network has twice the channels, and

    L_hybrid = L_simple + 0.001 sum_t L_{t-1}

whose second part trains the variance alone: its gradient stops at the mean.

t and eps are functions of (seed, step, index in the global batch): see rng.py; which t are drawn: see timesteps.py.
Everything is float32, whatever the network computes in.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import likelihood, rng
from .scheduling_ddpm import DDPMScheduler
from .timesteps import ImportanceSampling, TimestepSampling, draw_timesteps
from .transfer import to_device

BOUND_WEIGHT = 0.001  # lambda of L_hybrid, with the bound in bits per dimension


class NoisedBatch(NamedTuple):
    """The network's input (x_t, t) and its target: (B, C, H, W), (B,), (B, C, H, W)."""

    x_t: Tensor
    t: Tensor
    target: Tensor


def draw_noised_batch(
    scheduler: DDPMScheduler,
    x_0: Tensor,
    *,
    seed: int,
    step: int,
    index: Tensor,
    timestep_sampling: TimestepSampling = "uniform",
    importance: ImportanceSampling | None = None,
    noise_candidates: int = 1,
    input_perturbation: float = 0.0,
) -> NoisedBatch:
    """Algorithm 1, DDPM, lines 3 and 4: draw t and eps, compute x_t.

    Args:
        x_0: clean images, (B, C, H, W), float32 in [-1, 1].
        seed: the run's seed.
        step: the optimizer step.
        index: indices of these images in the global batch, (B,) int64, on the CPU.
        timestep_sampling: see timesteps.py.
        importance: draws t instead, if timestep_sampling is "importance".
        noise_candidates: see `draw_noise`.
        input_perturbation: gamma. x_t is noised by eps + gamma xi with another noise xi, while the target is that of
            eps: so the network meets errors in its input, as it does while sampling (Ning et al. 2023,
            arXiv 2301.11706, Algorithm 1 there). 0: x_t is noised by eps.
    Raises:
        ValueError: timestep_sampling is "importance" without `importance`, or there is no such sampling.
    """
    if importance is None:
        t = draw_timesteps(scheduler, timestep_sampling, seed=seed, step=step, index=index)
    else:
        t = importance.draw(seed=seed, step=step, index=index)
    t, index = to_device(t, x_0.device), to_device(index, x_0.device)
    eps = draw_noise(x_0, seed=seed, step=step, index=index, candidates=noise_candidates)
    batch = noised_batch(scheduler, x_0, t, eps)
    if input_perturbation == 0:
        return batch
    xi = rng.normal(rng.key(seed, rng.Stream.INPUT_PERTURBATION, step), index, tuple(x_0.shape[1:]))
    return batch._replace(x_t=scheduler.add_noise(x_0, eps + input_perturbation * xi, t))


def draw_noise(x_0: Tensor, *, seed: int, step: int, index: Tensor, candidates: int = 1) -> Tensor:
    """eps of each image, (B, C, H, W): from N(0, I), or the nearest to the image of several candidates from it.

    The nearest one is that of Immiscible Diffusion (Li et al. 2024, arXiv 2406.12303) as in its second paper (Li et al.
    2025, arXiv 2505.18521): noises that belong to nearby images have fewer images in common. Such noise is no longer
    N(0, I): it is a little smaller and leans towards the image.

    Args:
        index: on the device of x_0.
    """
    keys = [rng.key(seed, rng.Stream.NOISE, step)]
    keys += [rng.key(seed, rng.Stream.NOISE_CANDIDATE, step, i) for i in range(1, candidates)]
    noises = (rng.normal(key, index, tuple(x_0.shape[1:])) for key in keys)
    eps = next(noises)
    for other in noises:
        is_nearer = (other - x_0).square().sum((1, 2, 3)) < (eps - x_0).square().sum((1, 2, 3))
        eps = torch.where(is_nearer[:, None, None, None], other, eps)
    return eps


def noised_batch(scheduler: DDPMScheduler, x_0: Tensor, t: Tensor, eps: Tensor) -> NoisedBatch:
    """x_t and the target of the scheduler's `prediction_type`."""
    x_t = scheduler.add_noise(x_0, eps, t)
    if scheduler.prediction_type == "epsilon":
        return NoisedBatch(x_t, t, eps)
    if scheduler.prediction_type == "sample":
        return NoisedBatch(x_t, t, x_0)
    return NoisedBatch(x_t, t, scheduler.get_velocity(x_0, eps, t))


def simple_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """L_simple, Eq. (14), DDPM: the squared error, averaged over batch and pixels; a float32 scalar."""
    return torch.nn.functional.mse_loss(prediction.float(), target.float())


def squared_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """The squared error of each image, averaged over pixels: (B,), float32."""
    squares = torch.nn.functional.mse_loss(prediction.float(), target.float(), reduction="none")
    return squares.flatten(1).mean(1)


@dataclass(frozen=True)
class Loss:
    """The loss of a batch: L_simple, or with a learned variance L_hybrid.

    Args:
        scheduler: what the network predicts.
        weights: of each timestep, (T,), on the device: see loss_weights.py; None: 1.
        levels: of the pixels, 256 or 65536.
    Raises:
        ValueError: the variance is learned, and not between beta_tilde and beta ("learned_range").
    """

    scheduler: DDPMScheduler
    weights: Tensor | None = None
    levels: int = 256

    def __post_init__(self) -> None:
        if self.scheduler.variance_type == "learned":
            raise ValueError('variance_type is "learned": give "learned_range", which the loss trains, or a fixed one')

    def __call__(self, output: Tensor, batch: NoisedBatch, x_0: Tensor) -> Tensor:
        """A float32 scalar.

        Args:
            output: of the network, (B, C, H, W), or (B, 2 C, H, W) with a learned variance.
            batch: noised from x_0, (B, C, H, W).
        """
        if self.weights is not None:
            return self.of_images(output, batch, x_0).mean()
        prediction, nats = self._parts(output, batch, x_0)
        loss = simple_loss(prediction, batch.target)
        return loss if nats is None else self._hybrid(loss, nats.mean(), x_0)

    def of_images(self, output: Tensor, batch: NoisedBatch, x_0: Tensor) -> Tensor:
        """The loss of each image, (B,) float32."""
        prediction, nats = self._parts(output, batch, x_0)
        losses = squared_errors(prediction, batch.target)
        if self.weights is not None:
            losses = losses * self.weights[batch.t]
        return losses if nats is None else self._hybrid(losses, nats, x_0)

    def _parts(self, output: Tensor, batch: NoisedBatch, x_0: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prediction; the terms of the bound, (B,) nats, which train the variance alone, or None if it is fixed."""
        prediction, of_variance = self.scheduler.split_output(output, batch.x_t)
        if of_variance is None:
            return prediction, None
        of_mean_only = torch.cat([prediction.detach(), of_variance], dim=1).float()
        nats = likelihood.bound_term(self.scheduler, of_mean_only, batch.t, batch.x_t, x_0, self.levels)
        return prediction, nats.float()

    def _hybrid(self, loss: Tensor, nats: Tensor, x_0: Tensor) -> Tensor:
        """L_hybrid, of each image or of their mean."""
        bits = likelihood.bits_per_dim(nats, x_0.shape[1:])
        return loss + BOUND_WEIGHT * self.scheduler.num_steps * bits


def bound_weight(scheduler: DDPMScheduler, t: Tensor) -> Tensor:
    """Weight of |eps - eps_pred|^2 in the bound's term L_{t-1}: Eq. (12), DDPM, with p's variance sigma^2.

    beta^2 / (2 sigma^2 alpha (1 - alpha_bar)), in nats: (B,), float64; t is (B,) int64 in [1, T). L_simple has weight 1
    instead.

    Raises:
        ValueError: the variance is learned, so the scheduler does not know it.
    """
    if scheduler.variance_type.startswith("learned"):
        raise ValueError(f'variance_type is "{scheduler.variance_type}": give a scheduler with a fixed one')
    alpha_bar_t, alpha_bar_prev = scheduler.alpha_bars(t)
    beta = 1 - alpha_bar_t / alpha_bar_prev
    log_variance, _ = scheduler.log_variance(alpha_bar_t, alpha_bar_prev)
    return beta.square() / (2 * log_variance.exp() * (1 - beta) * (1 - alpha_bar_t))
