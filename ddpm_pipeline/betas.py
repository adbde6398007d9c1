"""BETAS: the noise schedules, beta_1 .. beta_T, and what a schedule must satisfy."""

import math

import torch
from torch import Tensor

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "su")
MAX_TRAIN_TIMESTEPS = 100_000  # above this a typo is likelier than a real schedule, and tables grow large


def make_betas(schedule: str, num_steps: int, beta_start: float, beta_end: float) -> Tensor:
    """beta_1 .. beta_T, float64."""
    if schedule == "linear":
        return torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64)
    if schedule == "scaled_linear":  # of latent diffusion (Rombach et al. 2022)
        return torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64).square()
    if schedule == "sigmoid":  # of GeoDiff (Xu et al. 2022)
        sigmoid = torch.linspace(-6, 6, num_steps, dtype=torch.float64).sigmoid()
        return sigmoid * (beta_end - beta_start) + beta_start
    if schedule == "su":
        return 0.02 * torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps
    alpha_bar = _cosine if schedule == "squaredcos_cap_v2" else _laplace
    curve = [alpha_bar(i / num_steps) for i in range(num_steps + 1)]
    betas = [min(1 - after / before, 0.999) for before, after in zip(curve, curve[1:])]
    return torch.tensor(betas, dtype=torch.float64)


def _cosine(time: float) -> float:
    """alpha_bar of the cosine schedule, Nichol and Dhariwal 2021, Eq. 17, up to a factor. time is in [0, 1]."""
    return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2  # 0.008: s, their offset


def _laplace(time: float) -> float:
    """alpha_bar of diffusers' "laplace": the root of sigmoid(log_snr), with Laplace-distributed log_snr.

    Hang and Gu 2024, without the root.
    """
    log_snr = -0.5 * math.copysign(1, 0.5 - time) * math.log(1 - 2 * abs(0.5 - time) + 1e-6)
    return math.sqrt(1 / (1 + math.exp(-log_snr)))


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) so that it ends at 0 and starts where it did: Lin et al. 2023, Algorithm 1."""
    signal = torch.cumprod(1 - betas, dim=0).sqrt()
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    alpha_bar = torch.cat([torch.ones_like(signal[:1]), signal.square()])
    return 1 - alpha_bar[1:] / alpha_bar[:-1]


def check_betas(betas: Tensor, prediction_type: str) -> None:
    if betas.ndim != 1 or not 1 <= len(betas) <= MAX_TRAIN_TIMESTEPS:
        raise ValueError(
            f"trained_betas have shape {tuple(betas.shape)}: give a list of 1 to {MAX_TRAIN_TIMESTEPS} numbers"
        )
    wrong = ~((betas > 0) & (betas <= 1))
    if wrong.any():
        t = int(wrong.nonzero()[0])
        raise ValueError(f"beta is {betas[t].item():g} at t = {t}: all must be in (0, 1), and only the last may be 1")
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    vanished = alpha_bar < torch.finfo(torch.float64).tiny
    if vanished[:-1].any():
        t = int(vanished.nonzero()[0])
        raise ValueError(f"alpha_bar is 0 from t = {t} on, before the last step: give smaller betas, or fewer")
    if prediction_type == "epsilon" and alpha_bar[-1].sqrt() < torch.finfo(torch.float32).tiny:
        raise ValueError(
            'the schedule has zero terminal SNR, and prediction_type is "epsilon", from which x_0 cannot be computed '
            'there: give prediction_type "v_prediction" or "sample"'
        )
