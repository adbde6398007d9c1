"""THE WEIGHTS OF THE LOSS: how much an error at each noise level counts, whatever the network predicts.

With SNR = alpha_bar / (1 - alpha_bar), an error of the prediction of x_0 is also one of epsilon and v:

    |eps - eps_pred|^2 = SNR |x_0 - x_0_pred|^2,    |v - v_pred|^2 = (SNR + 1) |x_0 - x_0_pred|^2

So a weighting is a function of log SNR in x_0 space, and the weight for what the network predicts follows from it
(Kingma and Gao 2023, arXiv 2303.00848). Weights are scaled to a mean of 1 over the timesteps: they say which timesteps
count more, not how large the loss is, and learning rate and gradient clipping keep their meaning.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from .scheduling_ddpm import DDPMScheduler, check_choice

LossWeighting = Literal[
    "simple", "sample", "epsilon", "v_prediction", "min_snr", "soft_min_snr", "edm", "sigmoid", "bound"
]  # fmt: skip
WEIGHTINGS = get_args(LossWeighting)
MIN_SNR_GAMMA = 5.0  # Hang et al. 2023
SOFT_MIN_SNR_GAMMA = 4.0  # Crowson et al. 2024
EDM_SIGMA_DATA = 0.5  # Karras et al. 2022
SIGMOID_BIAS = 2.0  # Kingma and Gao 2023


def loss_weights(scheduler: DDPMScheduler, weighting: str) -> Tensor | None:
    """The weight of the squared error of what the network predicts at each timestep, with a mean of 1.

    Returns:
        (T,) float32 on the CPU; None for "simple", where each is 1.
    Raises:
        ValueError: there is no such weighting.
    """
    check_choice("loss_weighting", weighting, WEIGHTINGS)
    if weighting == "simple":
        return None
    weights = x_0_weights(scheduler, weighting) / x_0_weights(scheduler, scheduler.prediction_type)
    return (weights / weights.mean()).float()


def x_0_weights(scheduler: DDPMScheduler, weighting: str) -> Tensor:
    """The weight of |x_0 - x_0_pred|^2 at each timestep, but for a constant factor: (T,) float64 on the CPU.

    sample, epsilon, v_prediction: L_simple of a network that predicts this.
    min_snr: min(SNR, 5) (Hang et al. 2023, arXiv 2303.09556).
    soft_min_snr: 1 / (1 / SNR + 1 / 4) (Crowson et al. 2024, arXiv 2401.11605).
    edm: SNR + 1 / 0.5^2, lambda(sigma) with SNR = 1 / sigma^2, not its distribution of sigma (Karras et al. 2022,
        arXiv 2206.00364, Table 1).
    sigmoid: SNR sigmoid(2 - log SNR) |d log SNR / dt| (Kingma and Gao 2023; Hoogeboom et al. 2024, arXiv 2410.19324).
    bound: SNR |d log SNR / dt|, the variational bound in continuous time (Kingma et al. 2021, arXiv 2107.00630).
    """
    # of a schedule with nothing of the image at its end a little
    snr = scheduler.snr(torch.arange(scheduler.num_steps)).cpu().clamp(1e-12, 1e12)
    log_snr = snr.log()
    (slope,) = torch.gradient(log_snr) if len(snr) > 1 else (torch.ones_like(snr),)
    return {
        "sample": torch.ones_like(snr),
        "epsilon": snr,
        "v_prediction": snr + 1,
        "min_snr": snr.clamp(max=MIN_SNR_GAMMA),
        "soft_min_snr": 1 / (1 / snr + 1 / SOFT_MIN_SNR_GAMMA),
        "edm": snr + 1 / EDM_SIGMA_DATA**2,
        "sigmoid": snr * torch.sigmoid(SIGMOID_BIAS - log_snr) * slope.abs(),
        "bound": snr * slope.abs(),
    }[weighting]
