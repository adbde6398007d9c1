"""THE OBJECTIVE: noised batches, targets and the loss. Algorithm 1, DDPM.

    t ~ uniform, eps ~ N(0, I);  x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps
    L_simple = mean |target - network(x_t, t)|^2,  target = eps, x_0 or v                       (Eq. 14, DDPM, for eps)

With learned variance (Nichol and Dhariwal 2021, arXiv 2102.09672, Eq. 16) the network has twice the channels, and

    L_hybrid = L_simple + 0.001 sum_t L_{t-1}

whose second part trains the variance alone: its gradient stops at the mean.

t and eps are functions of (seed, step, index in the global batch): see rng.py. Everything is float32, whatever the
network computes in.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import likelihood, rng
from .scheduling_ddpm import DDPMScheduler
from .transfer import to_device

TimestepSampling = Literal["uniform", "stratified"]
GOLDEN_RATIO = (1 + math.sqrt(5)) / 2
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
) -> NoisedBatch:
    """Algorithm 1, DDPM, lines 3 and 4: draw t and eps, compute x_t.

    Args:
        x_0: clean images, (B, C, H, W), float32 in [-1, 1].
        seed: the run's seed.
        step: the optimizer step.
        index: indices of these images in the global batch, (B,) int64, on the CPU.
        timestep_sampling: see `draw_timesteps`.
    """
    t = draw_timesteps(scheduler.num_steps, timestep_sampling, seed=seed, step=step, index=index)
    key = rng.key(seed, rng.Stream.NOISE, step)
    eps = rng.normal(key, to_device(index, x_0.device), tuple(x_0.shape[1:]))
    return noised_batch(scheduler, x_0, to_device(t, x_0.device), eps)


def draw_timesteps(
    num_steps: int, timestep_sampling: TimestepSampling, *, seed: int, step: int, index: Tensor
) -> Tensor:
    """Timesteps in [0, num_steps), each equally likely: (B,) int64, on the CPU.

    uniform: each on its own.
    stratified: those of a step are spread evenly, with one random shift for all, so that the mean over a batch has less
        variance (Kingma et al. 2021, arXiv 2107.00630, Appendix I.1). Any part of the batch is spread evenly, too:
        number i is at frac(u + i / golden ratio).
    """
    if timestep_sampling == "uniform":
        return rng.integers(rng.key(seed, rng.Stream.TIMESTEP, step), index, num_steps)
    shift = rng.uniform(rng.key(seed, rng.Stream.TIMESTEP_SHIFT, step), torch.zeros(1, dtype=torch.int64))
    return ((shift + index / GOLDEN_RATIO) % 1 * num_steps).long()


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


def weighted_loss(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The squared error of each image times its weight, (B,), averaged over batch and pixels; a float32 scalar."""
    squares = torch.nn.functional.mse_loss(prediction.float(), target.float(), reduction="none")
    return (squares.flatten(1).mean(1) * weight).mean()


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
        prediction, of_variance = self.scheduler.split_output(output, batch.x_t)
        if self.weights is None:
            loss = simple_loss(prediction, batch.target)
        else:
            loss = weighted_loss(prediction, batch.target, self.weights[batch.t])
        if of_variance is None:
            return loss
        of_mean_only = torch.cat([prediction.detach(), of_variance], dim=1).float()
        nats = likelihood.bound_term(self.scheduler, of_mean_only, batch.t, batch.x_t, x_0, self.levels)
        bits = likelihood.bits_per_dim(nats.float().mean(), x_0.shape[1:])
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
