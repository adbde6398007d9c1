"""TIMESTEPS: which timesteps the images of a batch are noised to.

uniform: each on its own, as Algorithm 1 of DDPM has it.
stratified: those of a step are spread evenly, with one random shift for all, so that the mean over a batch has less
    variance (Kingma et al. 2021, arXiv 2107.00630, Appendix I.1).
logit_normal: more of those in the middle. t / T of rectified flow, whose signal is 1 - t / T and whose noise is t / T,
    is logistic(N(0, 1)) (Esser et al. 2024, arXiv 2403.03206, Section 3.1): log SNR = -2 logit(t / T) is N(0, 4). Here
    log SNR is drawn, so the noise levels are the same whatever the schedule. As in the source nothing is divided by the
    probability: what is drawn more often counts more in the loss. Unlike there, a tenth of the timesteps are uniform:
    T - 1, where sampling begins, would be drawn once in four million times, and with a terminal SNR of 0 never.
importance: in proportion to the root of the second moment of the loss, see `ImportanceSampling`; the loss stays that
    of uniform timesteps.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from . import rng
from .scheduling_ddpm import DDPMScheduler, check_choice
from .transfer import to_device

TimestepSampling = Literal["uniform", "stratified", "logit_normal", "importance"]
GOLDEN_RATIO = (1 + math.sqrt(5)) / 2
LOG_SNR_STD = 2.0  # of logit_normal

NUM_BINS = 100  # of timesteps, at most: each has one second moment
KEEP = 1 - 1 / 64  # of a moment at each loss of its bin: the last 64 of them count most
LEAST = 10  # losses of each bin before sampling is by moments, as of each timestep in Nichol and Dhariwal 2021
UNIFORM_SHARE = 0.1  # of the draws are uniform: with importance no weight is above 10, and no moment is forgotten
LOSS_RANGE = 1e-15, 1e15  # whose squares are in the range of float32


def draw_timesteps(
    scheduler: DDPMScheduler, timestep_sampling: TimestepSampling, *, seed: int, step: int, index: Tensor
) -> Tensor:
    """Timesteps in [0, T): (B,) int64, on the CPU.

    Args:
        timestep_sampling: see above, but not importance, for which there is `ImportanceSampling.draw`. Any part of a
            stratified batch is spread evenly, too: number i is at frac(u + i / golden ratio).
        seed, step, index: as for `objective.draw_noised_batch`.
    Raises:
        ValueError: another timestep_sampling.
    """
    check_choice("timestep_sampling", timestep_sampling, ("uniform", "stratified", "logit_normal"))
    num_steps = scheduler.num_steps
    if timestep_sampling == "stratified":
        shift = rng.uniform(rng.key(seed, rng.Stream.TIMESTEP_SHIFT, step), torch.zeros(1, dtype=torch.int64))
        return ((shift + index / GOLDEN_RATIO) % 1 * num_steps).long()
    uniform = rng.integers(rng.key(seed, rng.Stream.TIMESTEP, step), index, num_steps)
    if timestep_sampling == "uniform":
        return uniform
    log_snr = LOG_SNR_STD * rng.normal(rng.key(seed, rng.Stream.TIMESTEP_LOG_SNR, step), index, ()).double()
    of_timesteps = scheduler.snr(torch.arange(num_steps)).log()  # falls
    middles = (of_timesteps[1:] + of_timesteps[:-1]) / 2
    nearest = torch.searchsorted(-middles, -log_snr)  # the timestep with the nearest one
    is_uniform = rng.uniform(rng.key(seed, rng.Stream.TIMESTEP_KIND, step), index) < UNIFORM_SHARE
    return torch.where(is_uniform, uniform, nearest)


class ImportanceSampling:
    """Timesteps in proportion to the root of the loss' second moment: Eq. (18), Nichol and Dhariwal 2021.

        L = E_{t ~ p}[L_t / (T p_t)],  p_t ~ sqrt(E[L_t^2])                              (arXiv 2102.09672, Section 3.3)

    The gradient is that of uniform timesteps in expectation, with less noise where the losses of timesteps differ.
    E[L_t^2] is a running mean over the losses of each of NUM_BINS bins of neighbouring timesteps, all of which have one
    probability. Until each bin has had LEAST losses, timesteps are uniform. Nothing here makes the host wait.

    Args:
        num_steps: T.
        device: of the losses.
        total: the sum of a tensor over all ranks, so that all have the same moments.
    """

    def __init__(self, num_steps: int, device: torch.device, total: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        num_bins = min(num_steps, NUM_BINS)
        edges = torch.arange(num_bins + 1) * num_steps // num_bins
        bins = torch.arange(num_bins)
        self._total, self._num_steps = total, num_steps
        self._first, self._sizes = edges[:-1].to(device), edges.diff().to(device)
        self._bins, self._bin_of_t = bins.to(device), bins.repeat_interleave(edges.diff()).to(device)
        self._is_before = (bins < bins[:, None]).to(device)
        # Of each bin: the sum of KEEP^age L^2 and of KEEP^age, both times 1 - KEEP
        self._moments = torch.zeros(2, num_bins, device=device)
        self._seen = torch.zeros(2, num_bins, device=device)  # in this step, on this rank: the sum of L^2, the number

    def probabilities(self) -> Tensor:
        """p of each timestep: (T,) float32, on the device."""
        return (self._of_bins() / self._sizes)[self._bin_of_t]

    def draw(self, *, seed: int, step: int, index: Tensor) -> Tensor:
        """Timesteps by the moments after `step` steps: (B,) int64, on the device; index is on the CPU."""
        # The inverse of the distribution function, from sums that a GPU computes in one order, unlike those of `cumsum`
        u = to_device(rng.uniform(rng.key(seed, rng.Stream.TIMESTEP, step), index).float(), self._bins.device)
        p = self._of_bins()
        before = (self._is_before * p).sum(1)
        found = (u[:, None] >= before).sum(1) - 1
        within = (u - before[found]) / p[found] * self._sizes[found]
        return self._first[found] + torch.minimum(within.long(), self._sizes[found] - 1)

    def mean(self, losses: Tensor, t: Tensor) -> Tensor:
        """The mean of L_t / (T p_t), a scalar. Takes note of the losses, until `update`.

        Args:
            losses: of images, (B,) float32.
            t: (B,) int64, of `draw`.
        """
        squares = losses.detach().clamp(*LOSS_RANGE).square()
        is_in_bin = (self._bin_of_t[t][:, None] == self._bins).float()
        self._seen += torch.stack([(squares[:, None] * is_in_bin).sum(0), is_in_bin.sum(0)])
        return (losses / (self._num_steps * self.probabilities()[t])).mean()

    def update(self, skip: Tensor) -> None:
        """After a step: its losses change the moments, unless it is skipped; all ranks together.

        Args:
            skip: 1 if the step is skipped, else 0; a scalar on the device.
        """
        squares, number = torch.where(skip > 0, 0, self._total(self._seen))
        kept = KEEP**number
        means = torch.stack([squares / number.clamp(min=1), torch.ones_like(number)])
        self._moments = kept * self._moments + (1 - kept) * means
        self._seen.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        squares, weight = self._moments
        return {"squares": squares, "weight": weight}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._moments = torch.stack([state["squares"], state["weight"]]).to(self._moments)

    def _of_bins(self) -> Tensor:
        """The probability of each bin, (bins,)."""
        squares, weight = self._moments
        has_enough = (weight >= 1 - KEEP ** (LEAST - 0.5)).all()  # half a loss is room for rounding
        share = torch.where(has_enough, (squares / weight).sqrt(), 1.0) * self._sizes
        return (1 - UNIFORM_SHARE) * share / share.sum() + UNIFORM_SHARE * self._sizes / self._num_steps
