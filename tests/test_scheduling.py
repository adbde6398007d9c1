"""The scheduler against closed forms in float64, Gaussian data (where all is known) and diffusers' schedulers."""

import copy
import logging
import math
import pickle
import warnings

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler as BuiltInDDPMScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

from ddpm_pipeline.scheduling_ddpm import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    TIMESTEP_SPACINGS,
    VARIANCE_TYPES,
    DDPMScheduler,
)
from tests.oracles import Gaussian

ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
FINITE_SNR = [{"beta_schedule": schedule} for schedule in BETA_SCHEDULES]
SCHEDULES = [*FINITE_SNR, ZERO_SNR]


def values_of(options):
    return "-".join(str(value) for value in options.values())


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(actual, expected, rtol=1e-12, atol=1e-12):
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def as_images(table):
    return torch.as_tensor(table, dtype=torch.float64).view(-1, 1, 1, 1)


@pytest.fixture(scope="module")
def images():
    """One for each of 1000 timesteps: x_0 within [-1, 1], x_t and a network's output, (1000, 1, 2, 2)."""
    return randn(1000, 1, 2, 2, seed=1).clamp(-1, 1), randn(1000, 1, 2, 2, seed=2), randn(1000, 1, 2, 2, seed=3)


ALL_T = torch.arange(1000)


# ---- Forward process: q ----------------------------------------------------------------------------------------------


def test_beta_schedules_match_their_papers():
    i = np.arange(1000)
    expected = {
        "linear": 1e-4 + (0.02 - 1e-4) * i / 999,
        "scaled_linear": (0.01 + (math.sqrt(0.02) - 0.01) * i / 999) ** 2,
        "sigmoid": 1e-4 + (0.02 - 1e-4) / (1 + np.exp(6 - 12 * i / 999)),
        "su": 0.02 * (i + 1) / 1000,
    }
    for schedule, betas in expected.items():
        np.testing.assert_allclose(DDPMScheduler(beta_schedule=schedule).betas, betas, rtol=1e-12)
    cosine = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    alpha_bar = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    np.testing.assert_allclose(alpha_bar[:-1], (cosine / cosine[0])[1:-1], rtol=1e-12)  # the last beta is capped
    assert alpha_bar[-1] / alpha_bar[-2] == pytest.approx(0.001, rel=1e-12)


@pytest.mark.parametrize("schedule", [*FINITE_SNR[:-1], {"rescale_betas_zero_snr": True}], ids=values_of)
@pytest.mark.parametrize("num_steps", [10, 1000])
def test_beta_schedules_match_the_built_in_ones(schedule, num_steps):
    """Up to the rounding of their float32 tables on any processor: a beta is 1 minus a quotient of two rounded numbers,
    each of a few operations, and alpha_bar is a product of num_steps of these."""
    theirs = BuiltInDDPMScheduler(num_steps, **schedule)
    ours = DDPMScheduler(num_steps, **schedule, prediction_type="v_prediction")
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(ours.betas.float(), theirs.betas, rtol=1e-5, atol=16 * eps)
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=4000 * eps, atol=16 * eps)


def test_the_rescaled_schedule_matches_the_built_in_one_in_float64():
    """Without the rounding of its float32 tables, the built-in formula gives ours to 1e-12."""
    theirs = rescale_zero_terminal_snr(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    ours = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction").betas
    close(ours, theirs)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=values_of)
def test_many_steps_of_eq_2_equal_eq_4(schedule, images):
    scheduler = DDPMScheduler(**schedule)
    x_0, t = images[0], ALL_T
    mean, variance, means, variances = 1.0, 0.0, [], []
    for beta in scheduler.betas.tolist():
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        means.append(mean)
        variances.append(variance)
    moments = scheduler.q_mean_variance(x_0, t)
    close(moments.mean, as_images(means) * x_0)
    close(moments.variance, as_images(variances))
    eps = images[1]
    close(scheduler.add_noise(x_0, eps, t), as_images(means) * x_0 + as_images(variances).sqrt() * eps)
    close(scheduler.get_velocity(x_0, eps, t), as_images(means) * eps - as_images(variances).sqrt() * x_0)
    assert torch.equal(scheduler.add_noise(x_0, eps, t[500]), scheduler.add_noise(x_0, eps, t[500].expand(1000)))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=values_of)
@pytest.mark.parametrize("timesteps", [range(1000), (3, 4, 90, 91, 500, 999)])
def test_q_step_between_any_two_indices_composes_to_eq_4(schedule, timesteps):
    """Steps from -1 to each timestep in turn, all of them or a few, have the mean and the variance of Eq. 4. A step is
    linear in x_prev and the noise: two images determine its coefficients."""
    scheduler = DDPMScheduler(**schedule)
    unit, zero = torch.tensor([1.0, 0.0]).double().view(2, 1, 1, 1), torch.tensor([0.0, 1.0]).double().view(2, 1, 1, 1)
    mean, variance, prev_t, x_0 = 1.0, 0.0, -1, torch.tensor(0.3)
    for t in timesteps:
        indices = torch.tensor([[t], [prev_t]]).expand(2, 2)
        scale, std = scheduler.q_step(unit, *indices, zero).flatten().tolist()
        mean, variance, prev_t = scale * mean, scale**2 * variance + std**2, t
        moments = scheduler.q_mean_variance(x_0.double().view(1, 1, 1, 1), torch.tensor([t]))
        assert moments.mean.item() == pytest.approx(mean * x_0.item(), rel=1e-10, abs=1e-15)
        assert moments.variance.item() == pytest.approx(variance, rel=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=values_of)
def test_q_step_is_eq_2_and_from_the_clean_image_eq_4(schedule, images):
    scheduler = DDPMScheduler(**schedule)
    x, noise, _ = images
    beta, alpha_bar = as_images(scheduler.betas), as_images(scheduler.alphas_cumprod)
    # 1 - alpha_bar_t / alpha_bar_prev has lost the last digits of a beta of 1e-4
    close(
        scheduler.q_step(x, ALL_T, ALL_T - 1, noise),
        (1 - beta).sqrt() * x + beta.sqrt() * noise,
        rtol=1e-10,
        atol=1e-10,
    )
    clean = torch.full_like(ALL_T, -1)
    close(scheduler.q_step(x, ALL_T, clean, noise), scheduler.add_noise(x, noise, ALL_T))
    t, prev_t = torch.tensor([700, 41, 999]), torch.tensor([12, 40, 998])
    alpha = alpha_bar[t] / alpha_bar[prev_t]
    close(scheduler.q_step(x[:3], t, prev_t, noise[:3]), alpha.sqrt() * x[:3] + (1 - alpha).sqrt() * noise[:3])
    one = scheduler.q_step(x, t[:1], prev_t[:1], noise)
    assert torch.equal(one, scheduler.q_step(x, t[:1].expand(1000), prev_t[:1].expand(1000), noise))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=values_of)
def test_snr_decreases(schedule):
    scheduler = DDPMScheduler(**schedule)
    snr = scheduler.snr(ALL_T)
    assert snr.dtype == torch.float64
    assert (snr.diff() < 0).all()
    close(snr, scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod))


def posterior(alpha_bar_t, alpha_bar_prev, x_0, x_t):
    """q(x_prev | x_t, x_0) as the product of two Gaussians in x_prev, from x_0 and to x_t: precisions add up."""
    alpha = alpha_bar_t / alpha_bar_prev
    precision = 1 / (1 - alpha_bar_prev) + alpha / (1 - alpha)
    mean = (alpha_bar_prev.sqrt() * x_0 / (1 - alpha_bar_prev) + alpha.sqrt() * x_t / (1 - alpha)) / precision
    return mean, 1 / precision


@pytest.mark.parametrize("schedule", SCHEDULES, ids=values_of)
@pytest.mark.parametrize("number", [1000, 50, 7])
def test_the_posterior_is_a_product_of_gaussians(schedule, number, images):
    scheduler = DDPMScheduler(**schedule, timestep_spacing="trailing")
    scheduler.set_timesteps(number)
    t, prev_t = scheduler.timesteps[:-1], scheduler.timesteps[1:]
    x_0, x_t = (values[:number] for values in images[:2])
    alpha_bar = as_images(scheduler.alphas_cumprod)
    mean, variance = posterior(alpha_bar[t], alpha_bar[prev_t], x_0[:-1], x_t[:-1])
    # its mean has a square root of a difference of rounded numbers, which is 1e-16 instead of 0 at zero SNR
    atol = 1e-7 if schedule is ZERO_SNR else 1e-11
    for chosen in (prev_t, None) if number == 1000 else (prev_t,):
        moments = scheduler.q_posterior_mean_variance(x_0[:-1], x_t[:-1], t, chosen)
        close(moments.mean, mean, rtol=1e-11, atol=atol)
        close(moments.variance, variance, rtol=1e-11)
    last = scheduler.q_posterior_mean_variance(x_0[-1:], x_t[-1:], scheduler.timesteps[-1:], torch.tensor([-1]))
    close(last.mean, x_0[-1:])
    assert last.variance == 0


def test_the_posterior_of_a_noise_free_x_t_is_noise_free(images):
    scheduler, x_0 = DDPMScheduler(), images[0]
    signal = as_images(scheduler.alphas_cumprod.sqrt())
    before = torch.cat([torch.ones_like(signal[:1]), signal[:-1]])
    close(scheduler.q_posterior_mean_variance(x_0, signal * x_0, ALL_T).mean, before * x_0)


def test_fewer_sampling_steps_do_not_change_alpha_bar(images):
    scheduler = DDPMScheduler(timestep_spacing="trailing")
    before = scheduler.add_noise(images[0], images[1], ALL_T)
    for number in (7, 50):
        scheduler.set_timesteps(number)
        assert torch.equal(scheduler.add_noise(images[0], images[1], ALL_T), before)
    close(scheduler.alphas_cumprod, torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0))


# ---- Conversions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", FINITE_SNR, ids=values_of)
def test_predictions_convert_there_and_back(schedule, images):
    scheduler = DDPMScheduler(**schedule)
    x_0, eps, _ = images
    x_t = scheduler.add_noise(x_0, eps, ALL_T)
    predictions = {"epsilon": eps, "sample": x_0, "v_prediction": scheduler.get_velocity(x_0, eps, ALL_T)}
    for source in PREDICTION_TYPES:
        for target in PREDICTION_TYPES:
            converted = scheduler.convert_prediction(predictions[source], ALL_T, x_t, source, target)
            # at the ends of the schedule x_0 or eps is a small part of x_t, and dividing by it magnifies the rounding
            close(
                converted,
                predictions[target],
                rtol=0,
                atol=1e-15 * 10 / scheduler.alphas_cumprod[-1].sqrt().item() + 1e-12,
            )


@pytest.mark.parametrize("schedule", FINITE_SNR, ids=values_of)
def test_x_0_from_eps_and_back(schedule, images):
    scheduler = DDPMScheduler(**schedule)
    x_0, eps, _ = images
    signal, noise_std = as_images(scheduler.alphas_cumprod).sqrt(), as_images(1 - scheduler.alphas_cumprod).sqrt()
    x_t = signal * x_0 + noise_std * eps
    # x_0 is divided by the signal, which is 5e-5 at the end of the cosine schedule
    tolerance = 1e-14 / signal.amin().item() + 1e-12
    close(scheduler.x_0_from_eps(x_t, eps, ALL_T), x_0, rtol=0, atol=tolerance)
    close(scheduler.eps_from_x_0(x_t, x_0, ALL_T), eps, rtol=0, atol=1e-12)
    close(scheduler.eps_from_x_0(x_t, scheduler.x_0_from_eps(x_t, eps, ALL_T), ALL_T), eps, rtol=0, atol=1e-12)
    close(scheduler.x_0_from_eps(x_t, scheduler.eps_from_x_0(x_t, x_0, ALL_T), ALL_T), x_0, rtol=0, atol=tolerance)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=values_of)
def test_coefficients_of_x_0_and_eps_satisfy_eq_4(schedule):
    """x_t = signal x_0 + noise_std eps, whatever the network predicts. (At zero SNR eps does not determine x_0.)"""
    scheduler = DDPMScheduler(**schedule)
    alpha_bar = scheduler.alphas_cumprod
    signal, noise_std = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    for prediction_type in PREDICTION_TYPES[1:] if schedule is ZERO_SNR else PREDICTION_TYPES:
        x_0, eps = (
            coefficients(alpha_bar, prediction_type)
            for coefficients in (scheduler.x_0_coefficients, scheduler.eps_coefficients)
        )
        close(signal * x_0[0] + noise_std * eps[0], torch.ones_like(alpha_bar))
        close(signal * x_0[1] + noise_std * eps[1], torch.zeros_like(alpha_bar))


def test_conversions_at_zero_snr(images):
    scheduler, t = DDPMScheduler(**ZERO_SNR), ALL_T[-1:]
    x_0, eps = images[0][:1], images[1][:1]
    close(scheduler.add_noise(x_0, eps, t), eps)
    close(scheduler.convert_prediction(-x_0, t, eps, "v_prediction", "sample"), x_0)
    close(scheduler.convert_prediction(-x_0, t, eps, "v_prediction", "epsilon"), eps)
    close(scheduler.convert_prediction(x_0, t, eps, "sample", "v_prediction"), -x_0)


def test_both_forms_of_eq_11_agree(images):
    """The posterior's mean at x_0_pred, and (x_t - beta eps / sqrt(1 - alpha_bar)) / sqrt(alpha)."""
    scheduler = DDPMScheduler(clip_sample=False)
    _, x_t, eps = images
    beta, alpha_bar = as_images(scheduler.betas), as_images(scheduler.alphas_cumprod)
    moments = scheduler.p_mean_variance(eps, ALL_T, x_t)
    close(moments.mean, (x_t - beta / (1 - alpha_bar).sqrt() * eps) / (1 - beta).sqrt(), rtol=1e-11, atol=1e-11)
    close(moments.x_0_pred, (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt(), rtol=1e-11, atol=1e-11)


# ---- Reverse process: p ----------------------------------------------------------------------------------------------


def network_output(variance_type, x_t, seed=4):
    channels = x_t.shape[1] * (2 if variance_type.startswith("learned") else 1)
    return randn(x_t.shape[0], channels, *x_t.shape[2:], seed=seed)


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("number", [None, 7])
def test_p_mean_variance_has_the_moments_of_step(variance_type, prediction_type, number):
    scheduler = DDPMScheduler(
        40,
        variance_type=variance_type,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    if number is not None:
        scheduler.set_timesteps(number)
    t = scheduler.timesteps
    prev_t = torch.cat([t[1:], torch.tensor([-1])])
    x_t = randn(len(t), 2, 2, 2, seed=5)
    output = network_output(variance_type, x_t)
    moments = scheduler.p_mean_variance(output, t, x_t, None if number is None else prev_t)
    close(moments.log_variance, moments.variance.log(), rtol=1e-12, atol=1e-10)
    for i, t_i in enumerate(t.tolist()):
        one = slice(i, i + 1)
        mean, x_0_pred = scheduler.step(output[one], t_i, x_t[one], variance_noise=torch.zeros(1), return_dict=False)
        close(mean, moments.mean[one])
        close(x_0_pred, moments.x_0_pred[one])
        noisy = scheduler.step(output[one], t_i, x_t[one], variance_noise=torch.ones_like(mean)).prev_sample
        std = moments.variance[one].sqrt() if prev_t[i] >= 0 else torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        close(noisy - mean, std.expand_as(mean), atol=1e-11)


def test_variance_types():
    scheduler = DDPMScheduler()
    t, x_t = ALL_T[1:], randn(999, 1, 2, 2)
    beta, alpha_bar = as_images(scheduler.betas), as_images(scheduler.alphas_cumprod)
    beta, beta_tilde = beta[1:], beta[1:] * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])
    predicted_variance = randn(999, 1, 2, 2, seed=7)
    expected = {
        "fixed_small": beta_tilde,
        "fixed_small_log": beta_tilde,
        "fixed_large": beta,
        "fixed_large_log": beta,
        "learned": predicted_variance.exp(),
        "learned_range": beta ** ((1 + predicted_variance) / 2) * beta_tilde ** ((1 - predicted_variance) / 2),
    }
    for variance_type, variance in expected.items():
        scheduler = DDPMScheduler(variance_type=variance_type)
        output = torch.cat([x_t, predicted_variance], dim=1) if variance_type.startswith("learned") else x_t
        close(scheduler.p_mean_variance(output, t, x_t).variance, variance, rtol=1e-10)
        predicted = predicted_variance[499] if variance_type.startswith("learned") else None
        variance_500 = scheduler._get_variance(500, predicted)
        close(variance_500.expand(1, 2, 2), variance[499].expand(1, 2, 2), rtol=1e-10)
    assert DDPMScheduler().p_mean_variance(x_t[:1], torch.tensor([0]), x_t[:1]).variance == pytest.approx(1e-20)


@pytest.mark.parametrize("options", [{}, {"clip_sample_range": 0.5}, {"thresholding": True, "sample_max_value": 1.5}])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_step_and_p_mean_variance_clip_x_0_pred_alike(options, prediction_type):
    scheduler = DDPMScheduler(**options, prediction_type=prediction_type)
    free = DDPMScheduler(clip_sample=False, prediction_type=prediction_type)
    x_t, output, t = 2 * randn(3, 2, 4, 4), 2 * randn(3, 2, 4, 4, seed=1), 300
    raw = free.step(output, t, x_t).pred_original_sample
    bound = options.get("clip_sample_range", 1.0)
    expected = raw.clamp(-bound, bound)
    if "thresholding" in options:
        s = torch.quantile(raw.abs().flatten(1), 0.995, dim=1).clamp(1, 1.5).view(-1, 1, 1, 1)
        expected = raw.clamp(-s, s) / s
    assert not torch.equal(raw, expected)
    close(scheduler.step(output, t, x_t).pred_original_sample, expected)
    close(scheduler.p_mean_variance(output, torch.tensor([t] * 3), x_t).x_0_pred, expected)


@pytest.mark.parametrize("ratio", [0.001, 0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("shape", [(3, 1, 1, 1), (2, 3, 5, 7), (4, 3, 16, 16)])
def test_dynamic_threshold_is_the_quantile(ratio, shape):
    scheduler = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=2.5)
    x = 3 * randn(*shape)
    s = torch.quantile(x.abs().flatten(1), ratio, dim=1).clamp(1, 2.5).view(-1, 1, 1, 1)
    close(scheduler._threshold_sample(x), x.clamp(-s, s) / s)
    half = scheduler._threshold_sample(x.half())
    assert half.dtype == torch.float16 and (half.double() - x.clamp(-s, s) / s).abs().max() < 2e-3


# ---- Gaussian data: the moments of every sampling step are known -----------------------------------------------------


def step_moments(scheduler, data, mean, variance, t, eta):
    """Mean and variance after our step, which is linear in x_t and the noise: three images determine it."""
    x_t = as_images([0.0, 1.0, 0.0])
    noise = as_images([0.0, 0.0, 1.0])
    at_0, at_1, noisy = (
        scheduler.step(data.eps(x_t, t), t, x_t, eta=eta, variance_noise=noise).prev_sample.flatten().tolist()
    )
    return at_0 + (at_1 - at_0) * mean, (at_1 - at_0) ** 2 * variance + (noisy - at_0) ** 2


# schedule, number of sampling steps, eta; all 1000 steps for three of the schedules
SAMPLING = [(schedule, number, eta) for schedule in FINITE_SNR for number in (50, 7) for eta in (0.0, 0.3, 1.0)]
SAMPLING += [(schedule, 1000, eta) for schedule in FINITE_SNR[::2] for eta in (0.0, 1.0)]
sampling = pytest.mark.parametrize(
    ("schedule", "number", "eta"),
    SAMPLING,
    ids=lambda value: values_of(value) if isinstance(value, dict) else str(value),
)


@sampling
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_sampling_gaussian_data_follows_the_closed_form(schedule, number, eta, variance_type):
    scheduler = DDPMScheduler(**schedule, variance_type=variance_type, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(number)
    data, (mean, variance) = Gaussian(scheduler.alphas_cumprod, mean=0.4, std=0.3), (0.0, 1.0)
    expected = mean, variance
    steps = scheduler.timesteps.tolist()
    for t, prev_t in zip(steps, [*steps[1:], -1]):
        mean, variance = step_moments(scheduler, data, mean, variance, t, eta)
        expected = data.reverse_step(*expected, t, prev_t, eta, variance_type == "fixed_large")
        assert (mean, variance) == pytest.approx(expected, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_more_sampling_steps_reduce_the_error(eta, variance_type):
    """The distribution of the samples tends to that of the data; the error of its std falls about as 1 / N."""
    errors = []
    for number in (40, 80, 160, 320):
        scheduler = DDPMScheduler(variance_type=variance_type, timestep_spacing="trailing", clip_sample=False)
        scheduler.set_timesteps(number)
        data = Gaussian(scheduler.alphas_cumprod, mean=0.4, std=0.3)
        mean, variance = data.marginal(999)
        for t in scheduler.timesteps.tolist():
            mean, variance = step_moments(scheduler, data, mean, variance, t, eta)
        assert mean == pytest.approx(0.4, abs=1e-6)  # eps is exact at the mean, whatever the steps
        errors.append(abs(math.sqrt(variance) - 0.3))
    ratios = [before / after for before, after in zip(errors, errors[1:])]
    assert errors[-1] < 0.02
    assert all(1.5 < ratio < 3 for ratio in ratios), (errors, ratios)


@sampling
def test_data_at_one_point_keeps_every_marginal(schedule, number, eta):
    scheduler = DDPMScheduler(**schedule, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(number)
    data = Gaussian(scheduler.alphas_cumprod, mean=0.4, std=0.0)
    steps = scheduler.timesteps.tolist()
    mean, variance = data.marginal(steps[0])
    for t, prev_t in zip(steps, [*steps[1:], -1]):
        mean, variance = step_moments(scheduler, data, mean, variance, t, eta)
        # at the end of the cosine schedule eps, and its rounding, are divided by a signal of 5e-5
        assert (mean, variance) == pytest.approx(data.marginal(prev_t), rel=1e-9, abs=1e-9)
    assert variance == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("schedule", FINITE_SNR, ids=values_of)
def test_standard_normal_data_with_variance_beta_is_stationary(schedule):
    scheduler = DDPMScheduler(**schedule, variance_type="fixed_large", clip_sample=False)
    data, moments = Gaussian(scheduler.alphas_cumprod, mean=0.0, std=1.0), (0.0, 1.0)
    for t in scheduler.timesteps.tolist():
        moments = step_moments(scheduler, data, *moments, t, eta=1.0)
        assert moments == pytest.approx((0.0, 1.0 if t > 0 else scheduler.alphas[0].item()), abs=1e-10)


@pytest.mark.parametrize(
    ("eta", "variance_type"), [(1.0, "fixed_small"), (1.0, "fixed_large"), (0.5, "fixed_large"), (0, "learned")]
)
def test_a_large_sample_has_the_closed_form_moments(eta, variance_type):
    """40,000 samples of 20 steps in float32, with the scheduler's own random numbers: 4 standard errors."""
    n = 40_000
    scheduler = DDPMScheduler(variance_type=variance_type, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(20)
    data, generator = Gaussian(scheduler.alphas_cumprod, mean=0.4, std=0.3), torch.Generator().manual_seed(0)
    x_t = torch.randn(n, 1, 1, 1, generator=generator)
    expected = 0.0, 1.0
    steps = scheduler.timesteps.tolist()
    for t, prev_t in zip(steps, [*steps[1:], -1]):
        output = data.eps(x_t, t)
        if variance_type == "learned":
            output = torch.cat([output, torch.ones_like(output)], dim=1)
        x_t = scheduler.step(output, t, x_t, generator=generator, eta=eta).prev_sample
        expected = data.reverse_step(*expected, t, prev_t, eta, variance_type == "fixed_large")
    mean, variance = expected
    assert abs(x_t.mean().item() - mean) < 4 * math.sqrt(variance / n)
    assert abs(x_t.var().item() - variance) < 4 * variance * math.sqrt(2 / n)


# ---- Against diffusers' own schedulers -------------------------------------------------------------------------------

BUILT_IN_IS_RIGHT = (
    "fixed_small",
    "fixed_small_log",
    "fixed_large",
    "learned_range",
)  # the others: rows 4, 5 of test_stock.py


def one_step_of_each(theirs, ours, variance_type, rtol, atol, table_error=0.0, dtype=torch.float64):
    for t in (0, 1, 2, 50, 500, 998, 999):
        x_t = randn(2, 3, 4, 4, seed=t, dtype=dtype)
        output = network_output(variance_type, x_t, seed=t + 1).to(dtype)
        # x_0_pred is compared as well: previews show it
        expected, actual = (
            scheduler.step(output, t, x_t, generator=torch.Generator().manual_seed(t)) for scheduler in (theirs, ours)
        )
        allowed = atol + table_error / (1 - ours.alphas_cumprod[max(t - 1, 0)].item())
        close(actual.pred_original_sample, expected.pred_original_sample, rtol, allowed)
        close(actual.prev_sample, expected.prev_sample, rtol, allowed)


@pytest.mark.parametrize(
    "options", [{}, {"clip_sample": False}, {"thresholding": True, "sample_max_value": 1.5}], ids=values_of
)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", BUILT_IN_IS_RIGHT)
def test_step_matches_the_built_in_formula(variance_type, prediction_type, options):
    """With our tables in the built-in scheduler, so that only the formulas differ."""
    options = {**options, "variance_type": variance_type, "prediction_type": prediction_type}
    theirs, ours = BuiltInDDPMScheduler(**options), DDPMScheduler(**options)
    theirs.alphas_cumprod, theirs.one = ours.alphas_cumprod, ours.one.double()
    one_step_of_each(theirs, ours, variance_type, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("variance_type", BUILT_IN_IS_RIGHT)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", FINITE_SNR[:-1], ids=values_of)
def test_step_matches_the_built_in_step(schedule, prediction_type, variance_type):
    """In float32, with its own tables, whose alpha_bar is rounded by 6e-8 and divided by 1 - alpha_bar (row 17)."""
    options = {**schedule, "variance_type": variance_type, "prediction_type": prediction_type}
    theirs, ours = BuiltInDDPMScheduler(**options), DDPMScheduler(**options)
    one_step_of_each(theirs, ours, variance_type, rtol=1e-5, atol=1e-4, table_error=1e-7, dtype=torch.float32)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("number", [1000, 50])
def test_step_with_eta_matches_ddim(prediction_type, clip_sample, eta, number):
    options = {"prediction_type": prediction_type, "clip_sample": clip_sample}
    theirs, ours = DDIMScheduler(**options), DDPMScheduler(**options)
    theirs.alphas_cumprod = ours.alphas_cumprod
    theirs.set_timesteps(number)
    ours.set_timesteps(number)
    assert torch.equal(theirs.timesteps, ours.timesteps)
    for t in (*ours.timesteps[:-1].tolist()[:: number // 10], ours.timesteps[-2].item(), ours.timesteps[-1].item()):
        x_t, output, noise = (randn(2, 3, 4, 4, seed=seed) for seed in (t, t + 1, t + 2))
        expected = theirs.step(output, t, x_t, eta=eta, use_clipped_model_output=True, variance_noise=noise)
        actual = ours.step(output, t, x_t, eta=eta, variance_noise=noise)
        close(actual.pred_original_sample, expected.pred_original_sample, rtol=1e-9, atol=1e-10)
        close(actual.prev_sample, expected.prev_sample, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:timestep_spacing")
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("num_steps", [1000, 37, 1])
def test_timestep_spacings_match_the_built_in_ones_where_those_are_right(spacing, num_steps):
    theirs = BuiltInDDPMScheduler(num_steps, timestep_spacing=spacing)
    ours = DDPMScheduler(num_steps, timestep_spacing=spacing)
    for number in range(1, num_steps + 1):
        ours.set_timesteps(number)
        theirs.set_timesteps(number)
        steps = ours.timesteps
        assert len(steps) == number == ours.num_inference_steps
        assert (steps.diff() < 0).all() and steps[-1] >= 0 and steps[0] < num_steps
        assert torch.equal(steps, theirs.timesteps[:number])
        assert len(theirs.timesteps) == number or spacing == "trailing"  # which is sometimes one too long: row 1
        assert ours.previous_timestep(steps[0]) == (steps[1] if number > 1 else -1)
        assert ours.previous_timestep(steps[-1].item()) == -1


@pytest.mark.parametrize("num_steps", [2, 3, 10, 99, 128, 999])
def test_trailing_spacing_is_right_for_every_number_of_steps(num_steps):
    scheduler = DDPMScheduler(num_steps, timestep_spacing="trailing")
    for number in range(1, num_steps + 1):
        steps = scheduler._spaced(number)
        assert len(steps) == number and steps[0] == num_steps - 1 and steps[-1] >= 0
        assert all(later < earlier for earlier, later in zip(steps, steps[1:]))


def test_starting_in_the_middle_of_the_schedule_warns():
    with pytest.warns(UserWarning, match=r"501 steps starts at t = 500, where 27\.\d% of the image is left.*trailing"):
        DDPMScheduler().set_timesteps(501)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DDPMScheduler().set_timesteps(1000)
        DDPMScheduler().set_timesteps(50)
        DDPMScheduler(timestep_spacing="trailing").set_timesteps(501)
        # a short schedule with much of the image left at its end: trailing would start there too
        DDPMScheduler(20).set_timesteps(20)
        DDPMScheduler(20, timestep_spacing="linspace").set_timesteps(7)
        DDPMScheduler().set_timesteps(timesteps=[500, 100])


# ---- Dtypes, batches, and what is not modified -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=values_of)
def test_half_precision_is_exact_to_its_rounding(dtype, schedule, images):
    scheduler = DDPMScheduler(**schedule)
    x_0, eps = (values.to(dtype) for values in images[:2])
    info = torch.finfo(dtype)

    def q_step(x_prev, noise, t):
        return scheduler.q_step(x_prev, t, t.div(2, rounding_mode="floor") - 1, noise)

    for call in (scheduler.add_noise, scheduler.get_velocity, q_step):
        exact, rounded = call(x_0.double(), eps.double(), ALL_T), call(x_0, eps, ALL_T)
        assert rounded.dtype == dtype
        # half a unit in the last place, which is eps / 2 of the power of two below, and 1e-6 for float32
        half_a_unit = (2.0 ** exact.abs().log2().floor() * info.eps).clamp(min=info.smallest_normal * info.eps) / 2
        assert ((rounded.double() - exact).abs() <= half_a_unit + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("variance_type", ["fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_step_in_other_dtypes(dtype, variance_type, prediction_type):
    scheduler = DDPMScheduler(variance_type=variance_type, prediction_type=prediction_type)
    for t in (0, 500, 999):
        x_t, noise = randn(2, 3, 4, 4).to(dtype), randn(2, 3, 4, 4, seed=1).to(dtype)
        output = network_output(variance_type, x_t).to(dtype)
        exact = scheduler.step(output.double(), t, x_t.double(), variance_noise=noise.double())
        rounded = scheduler.step(output, t, x_t, variance_noise=noise)
        for name in ("prev_sample", "pred_original_sample"):
            assert rounded[name].dtype == dtype
            error = (rounded[name].double() - exact[name]).abs().max()
            assert error < 1e-4 + 4 * torch.finfo(dtype).eps  # 1e-4: x_0_pred at t = 999 is 158 times what is rounded
        assert rounded.prev_sample.data_ptr() not in (x_t.data_ptr(), output.data_ptr())
        moments = scheduler.p_mean_variance(output, torch.tensor([t, t]), x_t)
        assert {value.dtype for value in moments} == {dtype}


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("options", [{}, {"clip_sample": False}, {"thresholding": True}], ids=values_of)
def test_arguments_are_not_modified(variance_type, prediction_type, options):
    scheduler = DDPMScheduler(variance_type=variance_type, prediction_type=prediction_type, **options)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x_t, noise = 2 * randn(2, 3, 4, 4).to(dtype), randn(2, 3, 4, 4, seed=1).to(dtype)
        output, t = 2 * network_output(variance_type, x_t).to(dtype), torch.tensor([5, 700])
        arguments = (x_t, noise, output, t)
        before = [value.clone() for value in arguments]
        for eta in (0.0, 0.5, 1.0):
            for t_i in (0, 500, torch.tensor(999)):
                scheduler.step(output, t_i, x_t, eta=eta, variance_noise=noise)
        scheduler.p_mean_variance(output, t, x_t)
        scheduler.q_posterior_mean_variance(x_t, noise, t)
        scheduler.q_mean_variance(x_t, t)
        scheduler.add_noise(x_t, noise, t)
        scheduler.q_step(x_t, t, t - 3, noise)
        scheduler.get_velocity(x_t, noise, t)
        scheduler.x_0_from_eps(x_t, noise, t)
        scheduler.eps_from_x_0(x_t, noise, t)
        for source in PREDICTION_TYPES:
            scheduler.convert_prediction(noise, t, x_t, prediction_type, source)
        assert all(torch.equal(value, kept) for value, kept in zip(arguments, before))


def test_batches_and_generators():
    scheduler, x_t, output = DDPMScheduler(), randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (7, 8)]

    both = scheduler.step(output, 500, x_t, generator=generators()).prev_sample
    assert torch.equal(both, scheduler.step(output, torch.tensor(500), x_t, generator=generators()).prev_sample)
    for i, generator in enumerate(generators()):
        single = scheduler.step(output[i : i + 1], 500, x_t[i : i + 1], generator=generator).prev_sample
        assert torch.equal(single[0], both[i])
    noise = torch.cat([torch.randn(1, 3, 4, 4, generator=g, dtype=torch.float64) for g in generators()])
    assert torch.equal(both, scheduler.step(output, 500, x_t, variance_noise=noise).prev_sample)
    unused = torch.Generator().manual_seed(0)
    state = unused.get_state()
    scheduler.step(output, 500, x_t, generator=unused, eta=0.0)
    scheduler.step(output, 0, x_t, generator=unused)
    assert torch.equal(unused.get_state(), state)  # no noise is drawn where none is added
    assert isinstance(scheduler.step(output, 500, x_t, return_dict=False), tuple)


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned", "learned_range"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_step_is_differentiable(variance_type, prediction_type):
    """As classifier guidance needs: against finite differences."""
    scheduler = DDPMScheduler(variance_type=variance_type, prediction_type=prediction_type, clip_sample_range=0.7)
    x_t, noise = randn(1, 1, 2, 2).requires_grad_(), randn(1, 1, 2, 2, seed=1)
    output = network_output(variance_type, x_t, seed=2).requires_grad_()

    def step(output, x_t):
        return scheduler.step(output, 100, x_t, variance_noise=noise, return_dict=False)

    assert torch.autograd.gradcheck(step, (output, x_t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_step_on_another_device_reads_nothing_back(dtype, variance_type):
    """Tensors on "meta" have no values: whatever would make the host wait is an error there."""
    scheduler = DDPMScheduler(variance_type=variance_type)
    scheduler.set_timesteps(50, device="meta")
    x_t, t = randn(2, 3, 4, 4).to("meta", dtype), torch.tensor([5, 700], device="meta")
    output = network_output(variance_type, randn(2, 3, 4, 4)).to("meta", dtype)
    for timestep in (scheduler.timesteps[3], torch.tensor(500), 500):
        stepped = scheduler.step(output, timestep, x_t)
        assert (stepped.prev_sample.shape, stepped.prev_sample.dtype) == (x_t.shape, dtype)
    scheduler.p_mean_variance(output, t, x_t)
    scheduler.add_noise(x_t, x_t, t)
    scheduler.q_step(x_t, t, t - 3, x_t)
    scheduler.get_velocity(x_t, x_t, t)
    scheduler.x_0_from_eps(x_t, x_t, t)
    scheduler.eps_from_x_0(x_t, x_t, t)
    assert scheduler.alphas_cumprod.device.type == scheduler.betas.device.type == "cpu"


@pytest.mark.parametrize("compiling", [False, True])
def test_set_timesteps_drops_the_cached_coefficients(compiling, monkeypatch):
    """Both kinds of coefficients that step may read: floats, and the table for compiled steps and accelerators."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    used, x_t = DDPMScheduler(timestep_spacing="trailing"), randn(2, 3, 4, 4)
    for number in (1000, 50, 10):
        fresh = DDPMScheduler(timestep_spacing="trailing")
        for scheduler in (used, fresh):
            scheduler.set_timesteps(number)
        for eta in (0.0, 1.0):
            t = used.timesteps[1]
            arguments = {"timestep": t, "sample": x_t, "eta": eta, "variance_noise": x_t.flip(0)}
            assert torch.equal(used.step(x_t, **arguments).prev_sample, fresh.step(x_t, **arguments).prev_sample)
    if compiling:  # a timestep that is not in the schedule, where it cannot be checked
        assert used.step(x_t, torch.tensor(901), x_t).prev_sample.isnan().all()


def test_compiled_methods_give_the_same():
    """Compiled methods read coefficients from a table, as on an accelerator: with learned variance and eta as well."""
    torch.compiler.reset()
    scheduler = DDPMScheduler(variance_type="learned_range", timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    x_t, noise = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    output, t = network_output("learned_range", x_t), torch.tensor([5, 700])
    step = torch.compile(scheduler.step, fullgraph=True, backend="eager")
    for t_i in (torch.tensor(999), torch.tensor(49), 499):
        expected = scheduler.step(output, t_i, x_t, eta=0.5, variance_noise=noise)
        actual = step(output, t_i, x_t, eta=0.5, variance_noise=noise)
        close(actual.prev_sample, expected.prev_sample)
        close(actual.pred_original_sample, expected.pred_original_sample)
    moments = torch.compile(scheduler.p_mean_variance, fullgraph=True, backend="eager")(output, t, x_t)
    close(moments.mean, scheduler.p_mean_variance(output, t, x_t).mean)
    noisy = torch.compile(scheduler.add_noise, fullgraph=True, backend="eager")(x_t, noise, t)
    close(noisy, scheduler.add_noise(x_t, noise, t))


# ---- Configuration ---------------------------------------------------------------------------------------------------


@pytest.fixture
def diffusers_log(caplog):
    """Records of diffusers' logger, which does not propagate."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("other", [BuiltInDDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_every_diffusers_scheduler_loads_the_su_schedule(other, tmp_path, diffusers_log):
    ours = DDPMScheduler(200, beta_schedule="su", timestep_spacing="trailing")
    close(ours.betas, 0.02 * torch.arange(1, 201, dtype=torch.float64) / 200)
    ours.save_pretrained(tmp_path)
    for loaded in (other.from_config(ours.config), other.from_pretrained(tmp_path)):
        assert type(loaded) is other
        torch.testing.assert_close(loaded.betas, ours.betas.float(), rtol=1e-6, atol=0)
        assert loaded.config.num_train_timesteps == 200 and loaded.config.timestep_spacing == "trailing"
        back = DDPMScheduler.from_config(loaded.config)
        assert torch.equal(back.betas, ours.betas)
    assert not diffusers_log.records


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range", "prediction_type": "v_prediction"},
        {"beta_schedule": "su", "num_train_timesteps": 50, "clip_sample": False},
        {"trained_betas": [0.1, 0.2, 0.3]},
        {"trained_betas": np.linspace(1e-4, 0.03, 30)},
        ZERO_SNR,
        {"timestep_spacing": "trailing", "steps_offset": 1, "thresholding": True, "sample_max_value": 2.0},
    ],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_save_and_load_round_trip(options, tmp_path, diffusers_log):
    scheduler = DDPMScheduler(**options)
    scheduler.save_pretrained(tmp_path)
    copies = [
        DDPMScheduler.from_pretrained(tmp_path),
        DDPMScheduler.from_config(scheduler.config),
        DDPMScheduler.from_config(BuiltInDDPMScheduler.from_pretrained(tmp_path).config),
        copy.deepcopy(scheduler),
        pickle.loads(pickle.dumps(scheduler)),
    ]
    x_t = randn(1, 3, 4, 4)
    output, t = network_output(scheduler.variance_type, x_t), len(scheduler) // 2
    expected = scheduler.step(output, t, x_t, generator=torch.Generator().manual_seed(0)).prev_sample
    for loaded in copies:
        assert torch.equal(loaded.betas, scheduler.betas)
        assert torch.equal(loaded.timesteps, scheduler.timesteps)
        assert len(loaded) == len(scheduler.betas) == loaded.config.num_train_timesteps
        stepped = loaded.step(output, t, x_t, generator=torch.Generator().manual_seed(0)).prev_sample
        assert torch.equal(stepped, expected)
    assert not diffusers_log.records


def test_it_is_a_diffusers_scheduler():
    scheduler = DDPMScheduler()
    assert isinstance(scheduler, BuiltInDDPMScheduler)
    assert isinstance(scheduler, diffusers.SchedulerMixin)
    assert dict(scheduler.config) == dict(BuiltInDDPMScheduler().config)
    x = randn(1, 3, 4, 4)
    assert scheduler.scale_model_input(x, 5) is x
    assert scheduler.init_noise_sigma == 1


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_schedule": "cosine"}, "'cosine'.*'squaredcos_cap_v2'"),
        ({"variance_type": "fixed_smal"}, "'fixed_smal'.*'fixed_small'"),
        ({"prediction_type": "v"}, "'v'.*'v_prediction'"),
        ({"timestep_spacing": "even"}, "'even'.*'trailing'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0: .* 1 to 100000"),
        ({"num_train_timesteps": 10**10}, "10000000000"),
        ({"num_train_timesteps": 10.5}, "10.5"),
        ({"steps_offset": -1}, "steps_offset is -1"),
        ({"dynamic_thresholding_ratio": 1.5}, "dynamic_thresholding_ratio is 1.5"),
        ({"dynamic_thresholding_ratio": 0}, "dynamic_thresholding_ratio is 0"),
        ({"clip_sample_range": 0}, "clip_sample_range is 0"),
        ({"sample_max_value": math.nan}, "sample_max_value is nan"),
        ({"beta_end": 2.0}, r"beta is 1\.\d+ at t = \d+"),
        ({"beta_start": -0.1}, r"beta is -0\.1 at t = 0"),
        ({"beta_start": math.nan}, "beta is nan at t = 0"),
        ({"trained_betas": [0.1, 0.0]}, "beta is 0 at t = 1"),
        ({"trained_betas": [0.1, 1.0, 0.1], "prediction_type": "sample"}, "alpha_bar is 0 from t = 1"),
        ({"trained_betas": []}, r"shape \(0,\)"),
        ({"trained_betas": [[0.1, 0.2]]}, r"shape \(1, 2\)"),
        ({"rescale_betas_zero_snr": True}, '"epsilon".*"v_prediction" or "sample"'),
        ({"trained_betas": [0.1, 1.0]}, '"epsilon".*"v_prediction" or "sample"'),
        ({"num_train_timesteps": 20_000}, '"epsilon".*"v_prediction" or "sample"'),  # alpha_bar is 1e-88
        ({"num_train_timesteps": 100_000, "prediction_type": "v_prediction"}, r"alpha_bar is 0 from t = \d+"),
    ],
)
def test_bad_options_are_named_in_the_error(options, message):
    with pytest.raises(ValueError, match=message):
        DDPMScheduler(**options)


X = torch.zeros(2, 3, 4, 4)
T = torch.tensor([5, 700])


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("set_timesteps", {"num_inference_steps": 0}, "num_inference_steps is 0: .* 1 to 1000"),
        ("set_timesteps", {"num_inference_steps": 1001}, "1001"),
        ("set_timesteps", {"num_inference_steps": 10.0}, "10.0"),
        ("set_timesteps", {}, "None and timesteps is None"),
        ("set_timesteps", {"num_inference_steps": 2, "timesteps": [5, 3]}, r"2 and timesteps is \[5, 3\]"),
        ("set_timesteps", {"timesteps": []}, r"\[\]"),
        ("set_timesteps", {"timesteps": [5, 5]}, r"\[5, 5\].*descending"),
        ("set_timesteps", {"timesteps": [3, 5]}, r"\[3, 5\].*descending"),
        ("set_timesteps", {"timesteps": [1000, 5]}, "1000.*0 to 999"),
        ("set_timesteps", {"timesteps": [5, -3]}, "-3.*0 to 999"),
        ("set_timesteps", {"timesteps": [5.5, 3]}, "5.5.*0 to 999"),
        ("set_timesteps", {"timesteps": torch.tensor([5.0, 3.0])}, r"tensor\(5.\)"),
        ("step", {"model_output": X, "timestep": 1000, "sample": X}, r"1000.*\[999, 998, .*\(1000 of them\)"),
        ("step", {"model_output": X, "timestep": -1, "sample": X}, "-1"),
        ("step", {"model_output": X, "timestep": 0.5, "sample": X}, "0.5"),
        ("step", {"model_output": X, "timestep": T, "sample": X}, "2 elements.*p_mean_variance"),
        ("step", {"model_output": X, "timestep": 5, "sample": X, "eta": 1.5}, "eta is 1.5"),
        ("step", {"model_output": X, "timestep": 5, "sample": X, "eta": -0.1}, "eta is -0.1"),
        ("step", {"model_output": X, "timestep": 5, "sample": X, "eta": math.nan}, "eta is nan"),
        ("step", {"model_output": X[:, :1], "timestep": 5, "sample": X}, r"\(2, 1, 4, 4\).*3 channels"),
        ("step", {"model_output": torch.cat([X, X], 1), "timestep": 5, "sample": X}, r"\(2, 6, 4, 4\).*fixed_small"),
        ("step", {"model_output": X[:1], "timestep": 5, "sample": X}, r"\(1, 3, 4, 4\)"),
        ("previous_timestep", {"timestep": 1000}, "1000"),
        ("add_noise", {"original_samples": X, "noise": X, "timesteps": T + 300}, r"\[305, 1000\].*\[0, 1000\)"),
        ("add_noise", {"original_samples": X, "noise": X, "timesteps": -T}, r"\[-5, -700\]"),
        ("add_noise", {"original_samples": X, "noise": X, "timesteps": T.float()}, r"700\.\]\).*int64"),
        ("add_noise", {"original_samples": X, "noise": X, "timesteps": T > 9}, "True.*int64"),
        ("add_noise", {"original_samples": X, "noise": X, "timesteps": 5}, "t is 5"),
        ("add_noise", {"original_samples": X, "noise": X, "timesteps": torch.arange(3)}, r"3 entries.*\(2, 3, 4, 4\)"),
        ("add_noise", {"original_samples": X.byte(), "noise": X, "timesteps": T}, "uint8"),
        ("q_step", {"x_prev": X, "t": T + 300, "prev_t": T, "noise": X}, r"\[305, 1000\].*\[0, 1000\)"),
        ("q_step", {"x_prev": X, "t": T, "prev_t": T, "noise": X}, r"prev_t is \[5, 700\]"),
        ("q_step", {"x_prev": X, "t": T, "prev_t": -T, "noise": X}, r"prev_t is \[-5, -700\]"),
        ("q_step", {"x_prev": X, "t": 5, "prev_t": T, "noise": X}, "t is 5"),
        ("q_step", {"x_prev": X, "t": T, "prev_t": T - 1, "noise": X[:1]}, r"\(2, 3, 4, 4\) and noise \(1, 3, 4, 4\)"),
        ("q_step", {"x_prev": X, "t": torch.arange(3), "prev_t": torch.arange(3) - 1, "noise": X}, "3 entries"),
        ("q_step", {"x_prev": X.byte(), "t": T, "prev_t": T - 1, "noise": X}, "uint8"),
        ("x_0_from_eps", {"x_t": X, "eps": X[:, :1], "t": T}, r"eps \(2, 1, 4, 4\)"),
        ("x_0_from_eps", {"x_t": X, "eps": X, "t": T + 300}, "1000"),
        ("eps_from_x_0", {"x_t": X, "x_0": X[:, :1], "t": T}, r"x_0 \(2, 1, 4, 4\)"),
        ("eps_from_x_0", {"x_t": X, "x_0": X, "t": -T}, "-700"),
        ("get_velocity", {"sample": X, "noise": X, "timesteps": T + 300}, "1000"),
        ("snr", {"t": torch.tensor([1000])}, "1000"),
        ("q_mean_variance", {"x_0": X, "t": T + 300}, "1000"),
        ("q_posterior_mean_variance", {"x_0": X, "x_t": X[:, :1], "t": T}, r"\(2, 3, 4, 4\).*\(2, 1, 4, 4\)"),
        ("q_posterior_mean_variance", {"x_0": X, "x_t": X, "t": T + 300}, "1000"),
        ("q_posterior_mean_variance", {"x_0": X, "x_t": X, "t": torch.arange(3)}, "3 entries"),
        ("q_posterior_mean_variance", {"x_0": X, "x_t": X, "t": T, "prev_t": T}, r"prev_t is \[5, 700\]"),
        ("q_posterior_mean_variance", {"x_0": X, "x_t": X, "t": T, "prev_t": T - 100}, r"prev_t is \[-95, 600\]"),
        ("p_mean_variance", {"model_output": X, "t": -T, "x_t": X}, r"\[-5, -700\]"),
        ("p_mean_variance", {"model_output": X, "t": 5, "x_t": X}, "t is 5"),
        ("p_mean_variance", {"model_output": X[:, :1], "t": T, "x_t": X}, r"\(2, 1, 4, 4\)"),
        ("convert_prediction", {"prediction": X, "t": T, "x_t": X, "source": "x", "target": "sample"}, "source is 'x'"),
        ("convert_prediction", {"prediction": X, "t": T, "x_t": X, "source": "sample", "target": "v"}, "target is 'v'"),
        ("convert_prediction", {"prediction": X, "t": -T, "x_t": X, "source": "sample", "target": "epsilon"}, "-700"),
    ],
)
def test_bad_arguments_are_named_in_the_error(method, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(DDPMScheduler(), method)(**arguments)


def test_bad_calls():
    with pytest.raises(TypeError, match="15 arguments, got 16"):
        DDPMScheduler(*range(16))
    with pytest.raises(TypeError, match="num_train_timesteps"):
        DDPMScheduler(1000, num_train_timesteps=1000)
    scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match="steps_offset"):
        DDPMScheduler(steps_offset=1).set_timesteps(1000)
    scheduler.set_timesteps(50)
    with pytest.raises(ValueError, match=r"timestep is 501: .*980, 960"):
        scheduler.step(X, 501, X)
    with pytest.raises(ValueError, match="descending"):
        scheduler.set_timesteps(timesteps=[3, 5])
    assert scheduler.num_inference_steps == 50  # the rejected call changed nothing
