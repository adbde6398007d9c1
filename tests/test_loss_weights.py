"""Weights of the loss against closed forms, diffusers' formulas and each other."""

import math

import pytest
import torch
from diffusers.training_utils import compute_snr

from ddpm_pipeline import objective
from ddpm_pipeline.loss_weights import WEIGHTINGS, loss_weights, x_0_weights
from ddpm_pipeline.scheduling_ddpm import DDPMScheduler
from tests.arrays import normal

T = 1000
TYPES = ("sample", "epsilon", "v_prediction")


def snr_of(scheduler):
    """By diffusers."""
    return compute_snr(scheduler, torch.arange(scheduler.num_steps)).double()


@pytest.mark.parametrize("weighting", [name for name in WEIGHTINGS if name != "simple"])
def test_the_gradient_is_the_same_whatever_the_network_predicts(weighting):
    """But for one factor for all timesteps, since each has a mean of 1."""
    t = torch.tensor([0, 10, 200, 500, 900, 999])
    x_0, eps, x_0_pred = (normal(6, 1, 3, 3, seed=seed) for seed in range(3))
    gradients = []
    for prediction_type in TYPES:
        scheduler = DDPMScheduler(prediction_type=prediction_type)
        x_t, _, target = objective.noised_batch(scheduler, x_0, t, eps)
        guess = x_0_pred.clone().requires_grad_()
        prediction = scheduler.convert_prediction(guess, t, x_t, "sample", prediction_type)
        squares = (prediction - target).square().flatten(1).mean(1)
        weights = loss_weights(scheduler, weighting)
        assert weights.shape == (T,) and weights.dtype == torch.float32
        assert weights.double().mean().item() == pytest.approx(1, rel=1e-5)
        (gradient,) = torch.autograd.grad((squares * weights[t].double()).sum(), guess)
        gradients.append(gradient / gradient[3].norm())
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_weighting_of_ones_own_prediction_is_the_simple_loss(prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    assert loss_weights(scheduler, "simple") is None
    torch.testing.assert_close(loss_weights(scheduler, prediction_type), torch.ones(T))


def test_weights_in_x_0_space_are_those_of_their_sources():
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    snr = snr_of(scheduler)
    sigma = (1 / snr).sqrt()
    expected = {
        "sample": torch.ones(T),
        "epsilon": snr,
        "v_prediction": snr + 1,
        "min_snr": torch.minimum(snr, torch.tensor(5.0)),
        "soft_min_snr": 1 / (sigma**2 + 1 / 4),
        "edm": (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2,
    }
    for weighting, weights in expected.items():
        torch.testing.assert_close(x_0_weights(scheduler, weighting), weights.double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_the_bound_is_that_of_the_posterior_variance(beta_schedule):
    """|eps - eps_pred|^2 has the weight of Eq. (12), DDPM, in the limit of small steps."""
    scheduler = DDPMScheduler(prediction_type="epsilon", beta_schedule=beta_schedule)
    t = torch.arange(20, 980)
    ratio = loss_weights(scheduler, "bound")[t].double() / objective.bound_weight(scheduler, t)
    torch.testing.assert_close(ratio / ratio.mean(), torch.ones(len(t)).double(), rtol=0.06, atol=0)


def test_the_sigmoid_takes_the_bound_away_where_little_noise_is():
    scheduler = DDPMScheduler(prediction_type="epsilon")
    share = x_0_weights(scheduler, "sigmoid") / x_0_weights(scheduler, "bound")
    log_snr = snr_of(scheduler).log()
    torch.testing.assert_close(share, 1 / (1 + (log_snr - 2).exp()), rtol=1e-3, atol=0)
    assert share[0] < 0.01 and share[-1] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_finite_and_positive_for_any_schedule(weighting):
    for options in ({"rescale_betas_zero_snr": True}, {"num_train_timesteps": 2}, {"num_train_timesteps": 1}):
        for prediction_type in ("sample", "v_prediction"):  # epsilon says nothing of x_0 where it is all there is
            weights = loss_weights(DDPMScheduler(prediction_type=prediction_type, **options), weighting)
            assert weights is None or (weights.isfinite().all() and (weights > 0).all())


def test_another_weighting_is_named():
    with pytest.raises(ValueError, match="loss_weighting is 'snr': give one of 'simple'"):
        loss_weights(DDPMScheduler(), "snr")
    assert math.isclose(loss_weights(DDPMScheduler(), "min_snr").mean(), 1, rel_tol=1e-5)
