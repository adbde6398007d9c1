"""The scheduler against closed forms in float64: its equations, and Gaussian data, where everything is known."""

import math

import numpy as np
import pytest
import torch

from ddpm_pipeline.scheduling_ddpm import PREDICTION_TYPES, VARIANCE_TYPES, DDPMScheduler
from tests.arrays import normal
from tests.oracles import Gaussian
from tests.schedules import (
    ALL_T,
    FINITE_SNR,
    SCHEDULES,
    ZERO_SNR,
    alpha_bar_table,
    as_images,
    beta_table,
    close,
    images_at_all_t,
    network_output,
    values_of,
)


@pytest.fixture(scope="module")
def images():
    return images_at_all_t()


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
        np.testing.assert_allclose(beta_table(DDPMScheduler(beta_schedule=schedule)), betas, rtol=1e-11)
    cosine = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    alpha_bar = alpha_bar_table(DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    np.testing.assert_allclose(alpha_bar[:-1], (cosine / cosine[0])[1:-1], rtol=1e-12)  # the last beta is capped
    assert alpha_bar[-1] / alpha_bar[-2] == pytest.approx(0.001, rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=values_of)
def test_many_steps_of_eq_2_equal_eq_4(schedule, images):
    scheduler = DDPMScheduler(**schedule)
    x_0, t = images[0], ALL_T
    mean, variance, means, variances = 1.0, 0.0, [], []
    for beta in beta_table(scheduler).tolist():
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
    beta, alpha_bar = as_images(beta_table(scheduler)), as_images(alpha_bar_table(scheduler))
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
    close(snr, alpha_bar_table(scheduler) / (1 - alpha_bar_table(scheduler)))


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
    alpha_bar = as_images(alpha_bar_table(scheduler))
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
    signal = as_images(alpha_bar_table(scheduler).sqrt())
    before = torch.cat([torch.ones_like(signal[:1]), signal[:-1]])
    close(scheduler.q_posterior_mean_variance(x_0, signal * x_0, ALL_T).mean, before * x_0)


def test_fewer_sampling_steps_do_not_change_alpha_bar(images):
    scheduler = DDPMScheduler(timestep_spacing="trailing")
    before = scheduler.add_noise(images[0], images[1], ALL_T)
    for number in (7, 50):
        scheduler.set_timesteps(number)
        assert torch.equal(scheduler.add_noise(images[0], images[1], ALL_T), before)
    close(alpha_bar_table(scheduler), torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0))


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
                atol=1e-15 * 10 / alpha_bar_table(scheduler)[-1].sqrt().item() + 1e-12,
            )


@pytest.mark.parametrize("schedule", FINITE_SNR, ids=values_of)
def test_x_0_from_the_noise_and_back(schedule, images):
    scheduler = DDPMScheduler(**schedule)
    x_0, eps, _ = images
    signal, noise_std = as_images(alpha_bar_table(scheduler)).sqrt(), as_images(1 - alpha_bar_table(scheduler)).sqrt()
    x_t = signal * x_0 + noise_std * eps
    # x_0 is divided by the signal, which is 5e-5 at the end of the cosine schedule
    tolerance = 1e-14 / signal.amin().item() + 1e-12

    def convert(prediction, source, target):
        return scheduler.convert_prediction(prediction, ALL_T, x_t, source, target)

    close(convert(eps, "epsilon", "sample"), x_0, rtol=0, atol=tolerance)
    close(convert(x_0, "sample", "epsilon"), eps, rtol=0, atol=1e-12)
    close(convert(convert(eps, "epsilon", "sample"), "sample", "epsilon"), eps, rtol=0, atol=1e-12)
    close(convert(convert(x_0, "sample", "epsilon"), "epsilon", "sample"), x_0, rtol=0, atol=tolerance)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=values_of)
def test_coefficients_of_x_0_and_eps_satisfy_eq_4(schedule):
    """x_t = signal x_0 + noise_std eps, whatever the network predicts. (At zero SNR eps does not determine x_0.)"""
    scheduler = DDPMScheduler(**schedule)
    alpha_bar = alpha_bar_table(scheduler)
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
    beta, alpha_bar = as_images(beta_table(scheduler)), as_images(alpha_bar_table(scheduler))
    moments = scheduler.p_mean_variance(eps, ALL_T, x_t)
    close(moments.mean, (x_t - beta / (1 - alpha_bar).sqrt() * eps) / (1 - beta).sqrt(), rtol=1e-11, atol=1e-11)
    close(moments.x_0_pred, (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt(), rtol=1e-11, atol=1e-11)


# ---- Reverse process: p ----------------------------------------------------------------------------------------------


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
    x_t = normal(len(t), 2, 2, 2, seed=5)
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
    t, x_t = ALL_T[1:], normal(999, 1, 2, 2)
    beta, alpha_bar = as_images(beta_table(scheduler)), as_images(alpha_bar_table(scheduler))
    beta, beta_tilde = beta[1:], beta[1:] * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])
    predicted_variance = normal(999, 1, 2, 2, seed=7)
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
    assert DDPMScheduler().p_mean_variance(x_t[:1], torch.tensor([0]), x_t[:1]).variance == pytest.approx(1e-20)


@pytest.mark.parametrize("options", [{}, {"clip_sample_range": 0.5}, {"thresholding": True, "sample_max_value": 1.5}])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_step_and_p_mean_variance_clip_x_0_pred_alike(options, prediction_type):
    scheduler = DDPMScheduler(**options, prediction_type=prediction_type)
    free = DDPMScheduler(clip_sample=False, prediction_type=prediction_type)
    x_t, output, t = 2 * normal(3, 2, 4, 4), 2 * normal(3, 2, 4, 4, seed=1), 300
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
    x = 3 * normal(*shape)
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
        scheduler.step(data.eps(x_t, t), t, x_t, ddim_eta=eta, variance_noise=noise).prev_sample.flatten().tolist()
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
    data, (mean, variance) = Gaussian(alpha_bar_table(scheduler), mean=0.4, std=0.3), (0.0, 1.0)
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
        data = Gaussian(alpha_bar_table(scheduler), mean=0.4, std=0.3)
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
    data = Gaussian(alpha_bar_table(scheduler), mean=0.4, std=0.0)
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
    data, moments = Gaussian(alpha_bar_table(scheduler), mean=0.0, std=1.0), (0.0, 1.0)
    for t in scheduler.timesteps.tolist():
        moments = step_moments(scheduler, data, *moments, t, eta=1.0)
        assert moments == pytest.approx((0.0, 1.0 if t > 0 else 1 - beta_table(scheduler)[0].item()), abs=1e-10)


@pytest.mark.parametrize(
    ("eta", "variance_type"), [(1.0, "fixed_small"), (1.0, "fixed_large"), (0.5, "fixed_large"), (0, "learned")]
)
def test_a_large_sample_has_the_closed_form_moments(eta, variance_type):
    """40,000 samples of 20 steps in float32, with the scheduler's own random numbers: 4 standard errors."""
    n = 40_000
    scheduler = DDPMScheduler(variance_type=variance_type, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(20)
    data, generator = Gaussian(alpha_bar_table(scheduler), mean=0.4, std=0.3), torch.Generator().manual_seed(0)
    x_t = torch.randn(n, 1, 1, 1, generator=generator)
    expected = 0.0, 1.0
    steps = scheduler.timesteps.tolist()
    for t, prev_t in zip(steps, [*steps[1:], -1]):
        output = data.eps(x_t, t)
        if variance_type == "learned":
            output = torch.cat([output, torch.ones_like(output)], dim=1)
        x_t = scheduler.step(output, t, x_t, generator=generator, ddim_eta=eta).prev_sample
        expected = data.reverse_step(*expected, t, prev_t, eta, variance_type == "fixed_large")
    mean, variance = expected
    assert abs(x_t.mean().item() - mean) < 4 * math.sqrt(variance / n)
    assert abs(x_t.var().item() - variance) < 4 * variance * math.sqrt(2 / n)
