"""Noised batches and the loss against the paper's equations, KL divergences from torch, and hand calculations."""

import math

import pytest
import torch
from scipy import stats
from torch.distributions import Normal, kl_divergence

from ddpm_pipeline import objective, rng
from ddpm_pipeline.scheduling_ddpm import DDPMScheduler
from ddpm_pipeline.timesteps import ImportanceSampling, draw_timesteps
from tests.arrays import normal

T = 1000


def alpha_bar(scheduler, t):
    """The product of alpha_1 to alpha_t, independent of the scheduler."""
    betas = torch.linspace(1e-4, 0.02, scheduler.num_steps, dtype=torch.float64)
    return (1 - betas).cumprod(0)[t].view(-1, 1, 1, 1)


# ---- The targets, Eq. (4) and Eq. (14) -------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_x_t_and_target_match_the_formulas(prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    x_0, eps, t = normal(5, 3, 4, 6), normal(5, 3, 4, 6, seed=1), torch.tensor([0, 1, 400, 998, 999])
    x_t, same_t, target = objective.noised_batch(scheduler, x_0, t, eps)
    signal, noise_std = alpha_bar(scheduler, t).sqrt(), (1 - alpha_bar(scheduler, t)).sqrt()
    assert same_t is t
    torch.testing.assert_close(x_t, signal * x_0 + noise_std * eps, rtol=1e-10, atol=1e-10)
    expected = {"epsilon": eps, "sample": x_0, "v_prediction": signal * eps - noise_std * x_0}[prediction_type]
    torch.testing.assert_close(target, expected, rtol=1e-10, atol=1e-10)
    # The clean image can be recovered from each of the three.
    torch.testing.assert_close(
        scheduler.convert_prediction(target, t, x_t, prediction_type, "sample"), x_0, rtol=0, atol=1e-9
    )


def test_a_noised_batch_is_float32_within_autocast_too():
    scheduler, index = DDPMScheduler(prediction_type="v_prediction"), torch.arange(8)
    x_0 = normal(8, 1, 8, 8, dtype=torch.float32).clamp(-1, 1)
    outside = objective.draw_noised_batch(scheduler, x_0, seed=0, step=0, index=index)
    with torch.autocast("cpu", torch.bfloat16):
        inside = objective.draw_noised_batch(scheduler, x_0, seed=0, step=0, index=index)
        loss = objective.simple_loss(outside.target.bfloat16(), outside.target)
    assert loss.dtype == torch.float32
    for a, b in zip(inside, outside):
        assert torch.equal(a, b)
    assert (inside.x_t.dtype, inside.t.dtype, inside.target.dtype) == (torch.float32, torch.int64, torch.float32)
    # bfloat16 would round away much of the noise of the first timestep, which has standard deviation 0.01.
    first = objective.noised_batch(
        scheduler, x_0, torch.zeros(8, dtype=torch.int64), normal(8, 1, 8, 8, dtype=torch.float32)
    )
    assert (first.x_t - x_0).std() == pytest.approx(0.01, rel=0.1)


# ---- Draws of t and eps ----------------------------------------------------------------------------------------------


def test_draws_depend_on_seed_step_and_global_index_alone():
    scheduler, x_0 = DDPMScheduler(), normal(64, 1, 4, 4, dtype=torch.float32)
    index = torch.arange(64)
    full = objective.draw_noised_batch(scheduler, x_0, seed=3, step=9, index=index)
    for size in (1, 16, 48):  # one rank or several, one micro-batch or several
        parts = [
            objective.draw_noised_batch(scheduler, x_0[part], seed=3, step=9, index=part) for part in index.split(size)
        ]
        for name in objective.NoisedBatch._fields:
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(full, name))
    for other in ({"seed": 4, "step": 9}, {"seed": 3, "step": 10}):
        changed = objective.draw_noised_batch(scheduler, x_0, index=index, **other)
        assert (changed.t != full.t).sum() > 55
        assert abs((changed.target * full.target).mean()) < 4 / math.sqrt(64 * 16)
    torch.testing.assert_close(scheduler.add_noise(x_0, full.target, full.t), full.x_t)


def test_t_is_uniform_and_independent_of_the_noise():
    scheduler, n = DDPMScheduler(), 4096
    batches = [
        objective.draw_noised_batch(scheduler, torch.zeros(n, 1, 1, 2), seed=0, step=step, index=torch.arange(n))
        for step in range(10)
    ]
    t = torch.cat([batch.t for batch in batches]).numpy()
    eps = torch.cat([batch.target for batch in batches]).flatten(1).numpy()
    assert stats.chisquare(torch.bincount(torch.from_numpy(t), minlength=T).numpy()).pvalue > 1e-3  # n = 40,960
    for pixel in eps.T:
        assert stats.kstest(pixel, "norm").pvalue > 1e-3
        assert abs(stats.spearmanr(t, pixel).statistic) < 4 / math.sqrt(len(t))
        assert abs(stats.spearmanr(t, abs(pixel)).statistic) < 4 / math.sqrt(len(t))


def test_a_noised_batch_has_the_timesteps_of_its_sampling():
    scheduler, options = DDPMScheduler(), {"seed": 3, "step": 9, "index": torch.arange(8)}
    x_0 = normal(8, 1, 4, 4, dtype=torch.float32)
    for sampling in ("uniform", "stratified", "logit_normal"):
        batch = objective.draw_noised_batch(scheduler, x_0, timestep_sampling=sampling, **options)
        assert torch.equal(batch.t, draw_timesteps(scheduler, sampling, **options))
    importance = ImportanceSampling(T, torch.device("cpu"))
    batch = objective.draw_noised_batch(scheduler, x_0, importance=importance, **options)
    assert torch.equal(batch.t, importance.draw(**options))


# ---- The nearest of several noises -----------------------------------------------------------------------------------


def candidates(number, x_0, seed, step, index):
    """(number, B, C, H, W)."""
    keys = [rng.key(seed, rng.Stream.NOISE, step)]
    keys += [rng.key(seed, rng.Stream.NOISE_CANDIDATE, step, i) for i in range(1, number)]
    return torch.stack([rng.normal(key, index, tuple(x_0.shape[1:])) for key in keys])


def test_one_candidate_is_the_noise_of_before():
    scheduler, x_0, index = DDPMScheduler(), normal(5, 3, 4, 4, dtype=torch.float32), torch.arange(5)
    batch = objective.draw_noised_batch(scheduler, x_0, seed=3, step=9, index=index, noise_candidates=1)
    assert torch.equal(batch.target, rng.normal(rng.key(3, 2, 9), index, (3, 4, 4)))  # 2: the stream of noise
    assert torch.equal(batch.x_t, scheduler.add_noise(x_0, batch.target, batch.t))


@pytest.mark.parametrize("number", [2, 7])
def test_the_nearest_candidate_is_that_of_brute_force(number):
    x_0, index = normal(40, 1, 3, 2, dtype=torch.float32), torch.arange(40)
    options = {"seed": 3, "step": 9, "candidates": number}
    eps = objective.draw_noise(x_0, index=index, **options)
    all_of_them = candidates(number, x_0, 3, 9, index)
    distances = torch.cdist(x_0.flatten(1)[:, None].double(), all_of_them.flatten(2).transpose(0, 1).double())[:, 0]
    nearest = distances.argmin(1)
    assert len(nearest.unique()) == number  # each is the nearest for some image
    assert torch.equal(eps, all_of_them[nearest, index])
    part = index[11:30]  # another rank, or another micro-batch
    assert torch.equal(objective.draw_noise(x_0[part], index=part, **options), eps[part])


def test_candidates_are_independent_noises():
    """Of k noises for an image of zeros, the nearest has the least norm: the least of k chi-squared numbers."""
    n, number = 20_000, 4
    eps = objective.draw_noise(torch.zeros(n, 1, 1, 3), seed=0, step=0, index=torch.arange(n), candidates=number)
    least = eps.double().square().flatten(1).sum(1).numpy()
    assert stats.kstest(least, lambda x: 1 - stats.chi2(3).sf(x) ** number).pvalue > 1e-3


# ---- Perturbed input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_noise_of_a_perturbed_input_has_variance_1_plus_gamma_squared(prediction_type):
    scheduler, n, gamma = DDPMScheduler(prediction_type=prediction_type), 4096, 0.5
    x_0, options = normal(n, 1, 2, 4, dtype=torch.float32), {"seed": 0, "step": 0, "index": torch.arange(n)}
    plain = objective.draw_noised_batch(scheduler, x_0, **options)
    perturbed = objective.draw_noised_batch(scheduler, x_0, input_perturbation=gamma, **options)
    assert torch.equal(perturbed.t, plain.t) and torch.equal(perturbed.target, plain.target)
    noise_std = (1 - alpha_bar(scheduler, plain.t)).sqrt()
    eps = scheduler.convert_prediction(plain.target, plain.t, plain.x_t, prediction_type, "epsilon").double()
    noise = (perturbed.x_t - alpha_bar(scheduler, plain.t).sqrt() * x_0) / noise_std
    xi = ((perturbed.x_t - plain.x_t) / noise_std / gamma).flatten()
    # n = 32,768, 4 standard errors
    assert noise.var().item() == pytest.approx(1 + gamma**2, rel=4 * math.sqrt(2 / noise.numel()))
    assert abs((xi * eps.flatten()).mean()) < 4 / math.sqrt(xi.numel())
    assert stats.kstest(xi.numpy(), "norm").pvalue > 1e-3


def test_without_perturbation_the_bits_are_the_same():
    scheduler, x_0 = DDPMScheduler(), normal(5, 3, 4, 4, dtype=torch.float32)
    options = {"seed": 3, "step": 9, "index": torch.arange(5)}
    for a, b in zip(
        objective.draw_noised_batch(scheduler, x_0, input_perturbation=0.0, **options),
        objective.draw_noised_batch(scheduler, x_0, **options),
    ):
        assert torch.equal(a, b)


# ---- The loss, Eqs. (8), (12) and (14) -------------------------------------------------------------------------------


def test_simple_loss_matches_a_hand_calculation():
    prediction = torch.tensor([[[[1.0, 2.0]]], [[[0.0, -1.0]]]])
    target = torch.tensor([[[[1.5, 0.0]]], [[[0.0, 2.0]]]])
    loss = objective.simple_loss(prediction, target)
    assert loss.item() == (0.25 + 4 + 0 + 9) / 4
    assert loss.shape == ()
    from_bfloat16 = objective.simple_loss(prediction.bfloat16(), target.bfloat16())
    assert (from_bfloat16.dtype, from_bfloat16.item()) == (torch.float32, loss.item())


@pytest.mark.parametrize("weights", [None, torch.tensor([9.0, 2.0, 0.5])])
def test_the_losses_of_images_match_a_hand_calculation(weights):
    prediction = torch.tensor([[[[1.0, 2.0]]], [[[0.0, -1.0]]]])
    target = torch.tensor([[[[1.5, 0.0]]], [[[0.0, 2.0]]]])
    loss = objective.Loss(DDPMScheduler(), weights)
    batch = objective.NoisedBatch(target, torch.tensor([1, 2]), target)
    expected = [(0.25 + 4) / 2, 9 / 2] if weights is None else [2 * (0.25 + 4) / 2, 0.5 * 9 / 2]
    for output in (prediction, prediction.bfloat16()):
        losses = loss.of_images(output, batch, target)
        assert (losses.dtype, losses.tolist()) == (torch.float32, expected)
        assert loss(output, batch, target).item() == sum(expected) / 2


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_eq_8_equals_eq_12(variance_type):
    """KL(q(x_{t-1} | x_t, x_0), p(x_{t-1} | x_t)) = C + weight |eps - eps_pred|^2; C does not depend on eps_pred."""
    scheduler = DDPMScheduler(variance_type=variance_type, clip_sample=False)
    t = torch.tensor([1, 2, 10, 500, 998, 999])
    x_0, eps, eps_pred = (normal(6, 2, 3, 3, seed=seed) for seed in range(3))
    x_t = objective.noised_batch(scheduler, x_0, t, eps).x_t
    q = scheduler.q_posterior_mean_variance(x_0, x_t, t)

    def kl(prediction):
        p = scheduler.p_mean_variance(prediction, t, x_t)
        divergence = kl_divergence(Normal(q.mean, q.variance.sqrt()), Normal(p.mean, p.variance.sqrt()))
        return divergence.sum(dim=(1, 2, 3))

    squared_error = (eps - eps_pred).square().sum(dim=(1, 2, 3))
    torch.testing.assert_close(
        kl(eps_pred) - kl(eps), objective.bound_weight(scheduler, t) * squared_error, rtol=1e-9, atol=0
    )


def test_bound_weight_decreases_with_the_noise():
    weights = objective.bound_weight(DDPMScheduler(variance_type="fixed_large"), torch.arange(1, T))
    assert weights.dtype == torch.float64
    # For sigma^2 = beta it is beta / (2 alpha (1 - alpha_bar)), and 1 - alpha_bar_2 is about beta_1 + beta_2.
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    assert weights[0] == pytest.approx((betas[1] / 2 / (betas[0] + betas[1])).item(), rel=1e-3)
    assert weights[-1] == pytest.approx(0.02 / 2 / 0.98, rel=1e-3)
    assert weights[0] > 20 * weights[-1]
