"""What the tests of the scheduler share: schedules, comparison in float64, images and network outputs."""

import torch

from ddpm_pipeline.scheduling_ddpm import BETA_SCHEDULES
from tests.arrays import normal

ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
FINITE_SNR = [{"beta_schedule": schedule} for schedule in BETA_SCHEDULES]
SCHEDULES = [*FINITE_SNR, ZERO_SNR]
ALL_T = torch.arange(1000)


def values_of(options):
    """The id of a parametrized test."""
    return "-".join(str(value) for value in options.values())


def close(actual, expected, rtol=1e-12, atol=1e-12):
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def alpha_bar_table(scheduler):
    """alpha_bar_t for each t, float64. The public `alphas_cumprod` is float32."""
    return scheduler.alpha_bars(torch.arange(scheduler.num_steps))[0]


def beta_table(scheduler):
    """beta_t for each t, float64."""
    alpha_bar = alpha_bar_table(scheduler)
    return 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])


def as_images(table):
    return torch.as_tensor(table, dtype=torch.float64).view(-1, 1, 1, 1)


def images_at_all_t():
    """One for each of 1000 timesteps: x_0 within [-1, 1], x_t and a network's output, (1000, 1, 2, 2)."""
    return normal(1000, 1, 2, 2, seed=1).clamp(-1, 1), normal(1000, 1, 2, 2, seed=2), normal(1000, 1, 2, 2, seed=3)


def network_output(variance_type, x_t, seed=4):
    channels = x_t.shape[1] * (2 if variance_type.startswith("learned") else 1)
    return normal(x_t.shape[0], channels, *x_t.shape[2:], seed=seed)
