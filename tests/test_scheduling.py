"""The walk against closed forms in float64, Gaussian data (where everything is known) and diffusers' own schedulers."""

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

EXACT = {"rtol": 1e-12, "atol": 1e-12}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
# of every schedule once, and of a walk that ends in pure noise
WALKS = [{"beta_schedule": schedule} for schedule in BETA_SCHEDULES] + [ZERO_SNR]
SOURCES = [walk for walk in WALKS if walk is not ZERO_SNR]


def walk_id(walk):
    return "-".join(str(value) for value in walk.values())


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


# ---- One step out: q -------------------------------------------------------------------------------------------------


def test_the_schedules_are_what_their_papers_say():
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


@pytest.mark.parametrize("walk", [*SOURCES[:-1], {"rescale_betas_zero_snr": True}], ids=walk_id)
@pytest.mark.parametrize("num_steps", [10, 1000])
def test_the_schedules_are_the_built_in_ones(walk, num_steps):
    """To what their float32 tables allow on any processor: a beta may be 1 minus a quotient of two rounded numbers,
    each of a few operations, and alpha_bar is a product of num_steps of these."""
    theirs = BuiltInDDPMScheduler(num_steps, **walk)
    ours = DDPMScheduler(num_steps, **walk, prediction_type="v_prediction")
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(ours.betas.float(), theirs.betas, rtol=1e-5, atol=16 * eps)
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=4000 * eps, atol=16 * eps)


def test_the_rescaled_schedule_is_the_built_in_one_in_float64():
    """Without the rounding of its float32 tables, the built-in formula gives ours to 1e-12."""
    theirs = rescale_zero_terminal_snr(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    ours = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction").betas
    close(ours, theirs)


@pytest.mark.parametrize("walk", WALKS, ids=walk_id)
def test_many_steps_of_eq_2_are_one_of_eq_4(walk, images):
    scheduler = DDPMScheduler(**walk)
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


@pytest.mark.parametrize("walk", WALKS, ids=walk_id)
def test_snr_falls(walk):
    scheduler = DDPMScheduler(**walk)
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


@pytest.mark.parametrize("walk", WALKS, ids=walk_id)
@pytest.mark.parametrize("number", [1000, 50, 7])
def test_posterior_is_a_product_of_gaussians(walk, number, images):
    scheduler = DDPMScheduler(**walk, timestep_spacing="trailing")
    scheduler.set_timesteps(number)
    t, prev_t = scheduler.timesteps[:-1], scheduler.timesteps[1:]
    x_0, x_t = (values[:number] for values in images[:2])
    alpha_bar = as_images(scheduler.alphas_cumprod)
    mean, variance = posterior(alpha_bar[t], alpha_bar[prev_t], x_0[:-1], x_t[:-1])
    # its mean has a square root of a difference of rounded numbers, which is 1e-16 where it should be 0 in pure noise
    atol = 1e-7 if walk is ZERO_SNR else 1e-11
    for chosen in (prev_t, None) if number == 1000 else (prev_t,):
        moments = scheduler.q_posterior_mean_variance(x_0[:-1], x_t[:-1], t, chosen)
        close(moments.mean, mean, rtol=1e-11, atol=atol)
        close(moments.variance, variance, rtol=1e-11)
    home = scheduler.q_posterior_mean_variance(x_0[-1:], x_t[-1:], scheduler.timesteps[-1:], torch.tensor([-1]))
    close(home.mean, x_0[-1:])
    assert home.variance == 0


def test_posterior_of_a_walk_without_noise_stays_on_it(images):
    scheduler, x_0 = DDPMScheduler(), images[0]
    signal = as_images(scheduler.alphas_cumprod.sqrt())
    before = torch.cat([torch.ones_like(signal[:1]), signal[:-1]])
    close(scheduler.q_posterior_mean_variance(x_0, signal * x_0, ALL_T).mean, before * x_0)


def test_fewer_steps_leave_alpha_bar_alone(images):
    scheduler = DDPMScheduler(timestep_spacing="trailing")
    before = scheduler.add_noise(images[0], images[1], ALL_T)
    for number in (7, 50):
        scheduler.set_timesteps(number)
        assert torch.equal(scheduler.add_noise(images[0], images[1], ALL_T), before)
    close(scheduler.alphas_cumprod, torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0))


# ---- Conversions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("walk", SOURCES, ids=walk_id)
def test_conversions_there_and_back(walk, images):
    scheduler = DDPMScheduler(**walk)
    x_0, eps, _ = images
    x_t = scheduler.add_noise(x_0, eps, ALL_T)
    said = {"epsilon": eps, "sample": x_0, "v_prediction": scheduler.get_velocity(x_0, eps, ALL_T)}
    for source in PREDICTION_TYPES:
        for target in PREDICTION_TYPES:
            converted = scheduler.convert_prediction(said[source], ALL_T, x_t, source, target)
            # at the ends of the walk x_0 or eps is a small part of x_t: the rounding of 1e-16 grows by what divides it
            close(converted, said[target], rtol=0, atol=1e-15 * 10 / scheduler.alphas_cumprod[-1].sqrt().item() + 1e-12)


def test_conversions_in_pure_noise(images):
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


# ---- One step home: p ------------------------------------------------------------------------------------------------


def network_output(variance_type, x_t, seed=4):
    channels = x_t.shape[1] * (2 if variance_type.startswith("learned") else 1)
    return randn(x_t.shape[0], channels, *x_t.shape[2:], seed=seed)


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("number", [None, 7])
def test_p_mean_variance_at_any_t_is_the_step(variance_type, prediction_type, number):
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
    said = randn(999, 1, 2, 2, seed=7)
    expected = {
        "fixed_small": beta_tilde,
        "fixed_small_log": beta_tilde,
        "fixed_large": beta,
        "fixed_large_log": beta,
        "learned": said.exp(),
        "learned_range": beta ** ((1 + said) / 2) * beta_tilde ** ((1 - said) / 2),
    }
    for variance_type, variance in expected.items():
        scheduler = DDPMScheduler(variance_type=variance_type)
        output = torch.cat([x_t, said], dim=1) if variance_type.startswith("learned") else x_t
        close(scheduler.p_mean_variance(output, t, x_t).variance, variance, rtol=1e-10)
        predicted = said[499] if variance_type.startswith("learned") else None
        variance_500 = scheduler._get_variance(500, predicted)
        close(variance_500.expand(1, 2, 2), variance[499].expand(1, 2, 2), rtol=1e-10)
    assert DDPMScheduler().p_mean_variance(x_t[:1], torch.tensor([0]), x_t[:1]).variance == pytest.approx(1e-20)


@pytest.mark.parametrize("options", [{}, {"clip_sample_range": 0.5}, {"thresholding": True, "sample_max_value": 1.5}])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_x_0_pred_is_bounded_the_same_way_everywhere(options, prediction_type):
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
def test_threshold_is_the_quantile(ratio, shape):
    scheduler = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=2.5)
    x = 3 * randn(*shape)
    s = torch.quantile(x.abs().flatten(1), ratio, dim=1).clamp(1, 2.5).view(-1, 1, 1, 1)
    close(scheduler._threshold_sample(x), x.clamp(-s, s) / s)
    half = scheduler._threshold_sample(x.half())
    assert half.dtype == torch.float16 and (half.double() - x.clamp(-s, s) / s).abs().max() < 2e-3


# ---- Gaussian data: the whole walk home is known ---------------------------------------------------------------------


class GaussianData:
    """N(m, s^2) for every pixel. Everything about its walk is a Gaussian with a closed form."""

    def __init__(self, scheduler, m=0.4, s=0.3):
        self.alpha_bar, self.m, self.s = [*scheduler.alphas_cumprod.tolist(), 1.0], m, s  # the last is that of t = -1

    def marginal(self, t):
        """Mean and variance of x_t: Eq. 4."""
        return math.sqrt(self.alpha_bar[t]) * self.m, self.alpha_bar[t] * self.s**2 + 1 - self.alpha_bar[t]

    def eps(self, x_t, t):
        """E[eps | x_t], which a perfect network gives: minus the score times sqrt(1 - alpha_bar)."""
        mean, variance = self.marginal(t)
        return math.sqrt(1 - self.alpha_bar[t]) * (x_t - mean) / variance

    def step_home(self, mean, variance, t, prev_t, eta, large):
        """Mean and variance after a step home with that eps, by DDIM's Eq. 12: x_0_pred and eps are linear in x_t."""
        ab_t, ab_prev = self.alpha_bar[t], self.alpha_bar[prev_t]
        beta = 1 - ab_t / ab_prev
        sigma2 = eta**2 * beta * (1 - ab_prev) / (1 - ab_t)
        marginal_mean, marginal_variance = self.marginal(t)
        eps_slope = math.sqrt(1 - ab_t) / marginal_variance
        x_0_slope = (1 - math.sqrt(1 - ab_t) * eps_slope) / math.sqrt(ab_t)
        slope = math.sqrt(ab_prev) * x_0_slope + math.sqrt(max(1 - ab_prev - sigma2, 0)) * eps_slope
        # at the mean of the marginal eps is 0 and x_0_pred is m
        mean = math.sqrt(ab_prev) * self.m + slope * (mean - marginal_mean)
        noise = 0.0 if prev_t == -1 else eta**2 * beta if large else sigma2
        return mean, slope**2 * variance + noise


def push(scheduler, data, mean, variance, t, eta):
    """Mean and variance after our step, which is linear in x_t and the noise: three images tell all about it."""
    x_t = as_images([0.0, 1.0, 0.0])
    noise = as_images([0.0, 0.0, 1.0])
    at_0, at_1, noisy = (
        scheduler.step(data.eps(x_t, t), t, x_t, eta=eta, variance_noise=noise).prev_sample.flatten().tolist()
    )
    return at_0 + (at_1 - at_0) * mean, (at_1 - at_0) ** 2 * variance + (noisy - at_0) ** 2


# walk, number of steps, eta; a whole walk for three of the schedules
HOMEWARD = [(walk, number, eta) for walk in SOURCES for number in (50, 7) for eta in (0.0, 0.3, 1.0)]
HOMEWARD += [(walk, 1000, eta) for walk in SOURCES[::2] for eta in (0.0, 1.0)]
homeward = pytest.mark.parametrize(
    ("walk", "number", "eta"), HOMEWARD, ids=lambda value: walk_id(value) if isinstance(value, dict) else str(value)
)


@homeward
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_the_walk_home_of_gaussian_data_follows_theory(walk, number, eta, variance_type):
    scheduler = DDPMScheduler(**walk, variance_type=variance_type, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(number)
    data, (mean, variance) = GaussianData(scheduler), (0.0, 1.0)
    expected = mean, variance
    steps = scheduler.timesteps.tolist()
    for t, prev_t in zip(steps, [*steps[1:], -1]):
        mean, variance = push(scheduler, data, mean, variance, t, eta)
        expected = data.step_home(*expected, t, prev_t, eta, variance_type == "fixed_large")
        assert (mean, variance) == pytest.approx(expected, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_more_steps_come_nearer_to_the_data(eta, variance_type):
    """The law at the end tends to that of the data, and the error of its std falls about as 1 / N."""
    errors = []
    for number in (40, 80, 160, 320):
        scheduler = DDPMScheduler(variance_type=variance_type, timestep_spacing="trailing", clip_sample=False)
        scheduler.set_timesteps(number)
        data = GaussianData(scheduler)
        mean, variance = data.marginal(999)
        for t in scheduler.timesteps.tolist():
            mean, variance = push(scheduler, data, mean, variance, t, eta)
        assert mean == pytest.approx(0.4, abs=1e-6)  # eps is exact at the mean, whatever the steps
        errors.append(abs(math.sqrt(variance) - 0.3))
    ratios = [before / after for before, after in zip(errors, errors[1:])]
    assert errors[-1] < 0.02
    assert all(1.5 < ratio < 3 for ratio in ratios), (errors, ratios)


@homeward
def test_data_at_a_point_keeps_every_marginal(walk, number, eta):
    scheduler = DDPMScheduler(**walk, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(number)
    data = GaussianData(scheduler, m=0.4, s=0.0)
    steps = scheduler.timesteps.tolist()
    mean, variance = data.marginal(steps[0])
    for t, prev_t in zip(steps, [*steps[1:], -1]):
        mean, variance = push(scheduler, data, mean, variance, t, eta)
        # eps of the cosine schedule's end is divided by a signal of 5e-5 there, and so is its rounding
        assert (mean, variance) == pytest.approx(data.marginal(prev_t), rel=1e-9, abs=1e-9)
    assert variance == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("walk", SOURCES, ids=walk_id)
def test_standard_normal_data_with_variance_beta_stays(walk):
    scheduler = DDPMScheduler(**walk, variance_type="fixed_large", clip_sample=False)
    data, moments = GaussianData(scheduler, m=0.0, s=1.0), (0.0, 1.0)
    for t in scheduler.timesteps.tolist():
        moments = push(scheduler, data, *moments, t, eta=1.0)
        assert moments == pytest.approx((0.0, 1.0 if t > 0 else scheduler.alphas[0].item()), abs=1e-10)


@pytest.mark.parametrize(
    ("eta", "variance_type"), [(1.0, "fixed_small"), (1.0, "fixed_large"), (0.5, "fixed_large"), (0, "learned")]
)
def test_a_large_sample_has_the_law_that_theory_gives(eta, variance_type):
    """40,000 walks of 20 steps in float32, with the scheduler's own random numbers: 4 standard errors."""
    n = 40_000
    scheduler = DDPMScheduler(variance_type=variance_type, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(20)
    data, generator = GaussianData(scheduler), torch.Generator().manual_seed(0)
    x_t = torch.randn(n, 1, 1, 1, generator=generator)
    expected = 0.0, 1.0
    steps = scheduler.timesteps.tolist()
    for t, prev_t in zip(steps, [*steps[1:], -1]):
        output = data.eps(x_t, t)
        if variance_type == "learned":
            output = torch.cat([output, torch.ones_like(output)], dim=1)
        x_t = scheduler.step(output, t, x_t, generator=generator, eta=eta).prev_sample
        expected = data.step_home(*expected, t, prev_t, eta, variance_type == "fixed_large")
    mean, variance = expected
    assert abs(x_t.mean().item() - mean) < 4 * math.sqrt(variance / n)
    assert abs(x_t.var().item() - variance) < 4 * variance * math.sqrt(2 / n)


# ---- Beside diffusers' own schedulers --------------------------------------------------------------------------------

RIGHT_THERE = (
    "fixed_small",
    "fixed_small_log",
    "fixed_large",
    "learned_range",
)  # else: rows 4, 5 of test_stock.py


def one_step_of_each(theirs, ours, variance_type, rtol, atol, table_error=0.0, dtype=torch.float64):
    for t in (0, 1, 2, 50, 500, 998, 999):
        x_t = randn(2, 3, 4, 4, seed=t, dtype=dtype)
        output = network_output(variance_type, x_t, seed=t + 1).to(dtype)
        # what we said of the picture is compared as well: it is what previews show
        expected, actual = (
            scheduler.step(output, t, x_t, generator=torch.Generator().manual_seed(t)) for scheduler in (theirs, ours)
        )
        allowed = atol + table_error / (1 - ours.alphas_cumprod[max(t - 1, 0)].item())
        close(actual.pred_original_sample, expected.pred_original_sample, rtol, allowed)
        close(actual.prev_sample, expected.prev_sample, rtol, allowed)


@pytest.mark.parametrize(
    "options", [{}, {"clip_sample": False}, {"thresholding": True, "sample_max_value": 1.5}], ids=walk_id
)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", RIGHT_THERE)
def test_step_is_the_built_in_formula(variance_type, prediction_type, options):
    """With our tables in its place, so that nothing but the formulas differ."""
    options = {**options, "variance_type": variance_type, "prediction_type": prediction_type}
    theirs, ours = BuiltInDDPMScheduler(**options), DDPMScheduler(**options)
    theirs.alphas_cumprod, theirs.one = ours.alphas_cumprod, ours.one.double()
    one_step_of_each(theirs, ours, variance_type, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("variance_type", RIGHT_THERE)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("walk", SOURCES[:-1], ids=walk_id)
def test_step_is_the_built_in_step(walk, prediction_type, variance_type):
    """In float32, with its own tables. There alpha_bar is rounded by 6e-8, and divided by 1 - alpha_bar (row 17)."""
    options = {**walk, "variance_type": variance_type, "prediction_type": prediction_type}
    theirs, ours = BuiltInDDPMScheduler(**options), DDPMScheduler(**options)
    one_step_of_each(theirs, ours, variance_type, rtol=1e-5, atol=1e-4, table_error=1e-7, dtype=torch.float32)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("number", [1000, 50])
def test_step_with_eta_is_that_of_ddim(prediction_type, clip_sample, eta, number):
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
def test_spacings_are_the_built_in_ones_where_those_are_right(spacing, num_steps):
    theirs = BuiltInDDPMScheduler(num_steps, timestep_spacing=spacing)
    ours = DDPMScheduler(num_steps, timestep_spacing=spacing)
    for number in range(1, num_steps + 1):
        ours.set_timesteps(number)
        theirs.set_timesteps(number)
        steps = ours.timesteps
        assert len(steps) == number == ours.num_inference_steps
        assert (steps.diff() < 0).all() and steps[-1] >= 0 and steps[0] < num_steps
        assert torch.equal(steps, theirs.timesteps[:number])
        assert len(theirs.timesteps) == number or spacing == "trailing"  # which is one too long at times: row 1
        assert ours.previous_timestep(steps[0]) == (steps[1] if number > 1 else -1)
        assert ours.previous_timestep(steps[-1].item()) == -1


@pytest.mark.parametrize("num_steps", [2, 3, 10, 99, 128, 999])
def test_trailing_is_right_for_every_count(num_steps):
    scheduler = DDPMScheduler(num_steps, timestep_spacing="trailing")
    for number in range(1, num_steps + 1):
        steps = scheduler._spaced(number)
        assert len(steps) == number and steps[0] == num_steps - 1 and steps[-1] >= 0
        assert all(later < earlier for earlier, later in zip(steps, steps[1:]))


def test_a_warning_where_the_walk_home_starts_in_the_middle():
    with pytest.warns(UserWarning, match=r"501 steps starts at t = 500, where 27\.\d% of the image is left.*trailing"):
        DDPMScheduler().set_timesteps(501)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DDPMScheduler().set_timesteps(1000)
        DDPMScheduler().set_timesteps(50)
        DDPMScheduler(timestep_spacing="trailing").set_timesteps(501)
        # a short walk with much of the image left at its end: trailing would start there too
        DDPMScheduler(20).set_timesteps(20)
        DDPMScheduler(20, timestep_spacing="linspace").set_timesteps(7)
        DDPMScheduler().set_timesteps(timesteps=[500, 100])


# ---- Dtypes, batches, and what is left alone -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("walk", WALKS, ids=walk_id)
def test_half_precision_is_exact_to_its_rounding(dtype, walk, images):
    scheduler = DDPMScheduler(**walk)
    x_0, eps = (values.to(dtype) for values in images[:2])
    info = torch.finfo(dtype)
    for call in (scheduler.add_noise, scheduler.get_velocity):
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
@pytest.mark.parametrize("options", [{}, {"clip_sample": False}, {"thresholding": True}], ids=walk_id)
def test_nothing_given_is_changed(variance_type, prediction_type, options):
    scheduler = DDPMScheduler(variance_type=variance_type, prediction_type=prediction_type, **options)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x_t, noise = 2 * randn(2, 3, 4, 4).to(dtype), randn(2, 3, 4, 4, seed=1).to(dtype)
        output, t = 2 * network_output(variance_type, x_t).to(dtype), torch.tensor([5, 700])
        given = (x_t, noise, output, t)
        before = [value.clone() for value in given]
        for eta in (0.0, 0.5, 1.0):
            for t_i in (0, 500, torch.tensor(999)):
                scheduler.step(output, t_i, x_t, eta=eta, variance_noise=noise)
        scheduler.p_mean_variance(output, t, x_t)
        scheduler.q_posterior_mean_variance(x_t, noise, t)
        scheduler.q_mean_variance(x_t, t)
        scheduler.add_noise(x_t, noise, t)
        scheduler.get_velocity(x_t, noise, t)
        for source in PREDICTION_TYPES:
            scheduler.convert_prediction(noise, t, x_t, prediction_type, source)
        assert all(torch.equal(value, kept) for value, kept in zip(given, before))


def test_batches_and_random_numbers():
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
    assert torch.equal(unused.get_state(), state)  # where no noise is added none is drawn
    assert isinstance(scheduler.step(output, 500, x_t, return_dict=False), tuple)


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned", "learned_range"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_gradients_go_through_a_step(variance_type, prediction_type):
    """As guidance by a classifier needs: against differences."""
    scheduler = DDPMScheduler(variance_type=variance_type, prediction_type=prediction_type, clip_sample_range=0.7)
    x_t, noise = randn(1, 1, 2, 2).requires_grad_(), randn(1, 1, 2, 2, seed=1)
    output = network_output(variance_type, x_t, seed=2).requires_grad_()

    def step(output, x_t):
        return scheduler.step(output, 100, x_t, variance_noise=noise, return_dict=False)

    assert torch.autograd.gradcheck(step, (output, x_t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_a_step_elsewhere_reads_nothing_back(dtype, variance_type):
    """On "meta" nothing has a value: whatever the host would wait for is an error there."""
    scheduler = DDPMScheduler(variance_type=variance_type)
    scheduler.set_timesteps(50, device="meta")
    x_t, t = randn(2, 3, 4, 4).to("meta", dtype), torch.tensor([5, 700], device="meta")
    output = network_output(variance_type, randn(2, 3, 4, 4)).to("meta", dtype)
    for timestep in (scheduler.timesteps[3], torch.tensor(500), 500):
        stepped = scheduler.step(output, timestep, x_t)
        assert (stepped.prev_sample.shape, stepped.prev_sample.dtype) == (x_t.shape, dtype)
    scheduler.p_mean_variance(output, t, x_t)
    scheduler.add_noise(x_t, x_t, t)
    scheduler.get_velocity(x_t, x_t, t)
    assert scheduler.alphas_cumprod.device.type == scheduler.betas.device.type == "cpu"


@pytest.mark.parametrize("compiling", [False, True])
def test_used_again_it_forgets_the_last_schedule(compiling, monkeypatch):
    """Both kinds of coefficients that a step may read: numbers, and the table for compiled steps and accelerators."""
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
    if compiling:  # a timestep that is not in the schedule, where it cannot be looked at
        assert used.step(x_t, torch.tensor(901), x_t).prev_sample.isnan().all()


def test_compiled_it_gives_the_same():
    """Compiled, coefficients are read from a table as they are on an accelerator: learned variance and eta as well."""
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
    """What diffusers' logger says, which it does not pass on."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("other", [BuiltInDDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_any_scheduler_of_diffusers_takes_the_su_schedule(other, tmp_path, diffusers_log):
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
def test_saved_and_loaded_it_is_the_same(options, tmp_path, diffusers_log):
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


def test_it_is_diffusers_scheduler():
    scheduler = DDPMScheduler()
    assert isinstance(scheduler, BuiltInDDPMScheduler)
    assert isinstance(scheduler, diffusers.SchedulerMixin)
    assert dict(scheduler.config) == dict(BuiltInDDPMScheduler().config)
    x = randn(1, 3, 4, 4)
    assert scheduler.scale_model_input(x, 5) is x
    assert scheduler.init_noise_sigma == 1


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
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
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        DDPMScheduler(**options)


X = torch.zeros(2, 3, 4, 4)
T = torch.tensor([5, 700])


@pytest.mark.parametrize(
    ("method", "arguments", "words"),
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
def test_bad_arguments_are_named(method, arguments, words):
    with pytest.raises(ValueError, match=words):
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
    assert scheduler.num_inference_steps == 50  # what was refused changed nothing
