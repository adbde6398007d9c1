"""Learned variance: L_hybrid against the bound, the closed form of its best variance, and a run of train.py."""

import math

import pytest
import torch
from diffusers import DDPMPipeline as BuiltInDDPMPipeline
from diffusers import DDPMScheduler as BuiltInDDPMScheduler
from safetensors.torch import load_file

from ddpm_pipeline import DDPMPipeline, DDPMScheduler, likelihood, objective
from tests.arrays import normal, save_images
from tests.models import quiet, tiny_unet
from tests.short_run import SHORT_RUN, flags, run_here

T = 50
OPTIONS = {"variance_type": "learned_range", "clip_sample": False}


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_terms_are_those_of_the_variational_bound(prediction_type):
    scheduler = DDPMScheduler(T, prediction_type=prediction_type, **OPTIONS)
    x_0 = normal(3, 2, 4, 4, dtype=torch.float64).clamp(-1, 1)
    seen = []

    def network(x_t, t):
        output = torch.cat([0.3 * x_t, torch.sin(5 * x_t)], dim=1)
        seen.append((x_t, t, output))
        return output

    bound = likelihood.variational_bound(network, scheduler, x_0, strata=10)
    terms = [likelihood.bound_term(scheduler, output, t, x_t, x_0) for x_t, t, output in seen]
    torch.testing.assert_close(terms[0], bound.decoder)
    torch.testing.assert_close(torch.stack(terms[1:], dim=1), bound.kl)
    assert seen[0][1].eq(0).all()
    mixed = [torch.cat([each[0][:1], each[1][1:]]) for each in zip(seen[0], seen[4])]  # t = 0 for the first image only
    x_t, t, output = mixed
    together = likelihood.bound_term(scheduler, output, t, x_t, x_0)
    torch.testing.assert_close(together, torch.cat([terms[0][:1], terms[4][1:]]))


def test_the_bound_trains_the_variance_alone():
    scheduler = DDPMScheduler(T, prediction_type="epsilon", **OPTIONS)
    x_0, eps = normal(4, 1, 3, 3).clamp(-1, 1).float(), normal(4, 1, 3, 3, seed=1).float()
    t = torch.tensor([0, 1, 20, 49])
    batch = objective.noised_batch(scheduler, x_0, t, eps)
    output = normal(4, 2, 3, 3, seed=2).float().requires_grad_()
    loss = objective.Loss(scheduler)
    (gradient,) = torch.autograd.grad(loss(output, batch, x_0), output)
    prediction = output[:, :1].detach().requires_grad_()
    (of_mean,) = torch.autograd.grad(objective.simple_loss(prediction, batch.target), prediction)
    assert gradient.isfinite().all() and (gradient[:, 1:] != 0).all()
    torch.testing.assert_close(gradient[:, :1], of_mean)
    nats = likelihood.bound_term(scheduler, output.detach(), t, batch.x_t, x_0)
    expected = objective.simple_loss(output[:, :1], batch.target) + 0.001 * T * nats.mean() / (9 * math.log(2))
    torch.testing.assert_close(loss(output, batch, x_0), expected)
    of_images = [
        loss(output[i : i + 1], objective.NoisedBatch(*(part[i : i + 1] for part in batch)), x_0[i : i + 1])
        for i in range(4)
    ]
    torch.testing.assert_close(loss.of_images(output, batch, x_0), torch.stack(of_images))


def test_weights_of_timesteps_leave_the_bound_alone():
    scheduler, weights = DDPMScheduler(T, prediction_type="epsilon", **OPTIONS), torch.linspace(0, 2, T)
    x_0, eps, output = (
        normal(2, 1, 3, 3).float(),
        normal(2, 1, 3, 3, seed=1).float(),
        normal(2, 2, 3, 3, seed=2).float(),
    )
    batch = objective.noised_batch(scheduler, x_0, torch.tensor([7, 31]), eps)
    difference = objective.Loss(scheduler, weights)(output, batch, x_0) - objective.Loss(scheduler)(output, batch, x_0)
    plain, weighted = output[:, :1], weights[batch.t]
    expected = ((weighted - 1) * (plain - batch.target).square().flatten(1).mean(1)).mean()
    torch.testing.assert_close(difference, expected)


@pytest.mark.parametrize("t", [1, 5, 25, 49])
def test_the_loss_is_least_at_the_optimal_variance(t):
    """For Gaussian data with an exact mean: beta_tilde + c^2 Var(x_0 | x_t), Bao et al. 2022 (arXiv 2201.06503)."""
    scheduler, variance = DDPMScheduler(T, prediction_type="sample", **OPTIONS), 0.3
    n, steps = 20_000, torch.full((20_000,), t)
    x_0 = variance**0.5 * normal(n, 1, 1, 1)
    alpha_bar, before = (scheduler.alphas_cumprod[i].double().item() for i in (t, t - 1))
    x_t = alpha_bar**0.5 * x_0 + (1 - alpha_bar) ** 0.5 * normal(n, 1, 1, 1, seed=1)
    marginal = alpha_bar * variance + 1 - alpha_bar
    x_0_pred, posterior = alpha_bar**0.5 * variance / marginal * x_t, variance * (1 - alpha_bar) / marginal
    beta = 1 - alpha_bar / before
    beta_tilde, c = (1 - before) / (1 - alpha_bar) * beta, before**0.5 * beta / (1 - alpha_bar)
    optimal = (math.log(beta_tilde + c**2 * posterior) - math.log(beta_tilde)) / (math.log(beta) - math.log(beta_tilde))
    assert 0 < optimal < 1

    def mean_nats(share):
        v = torch.full_like(x_t, 2 * share - 1)
        return likelihood.bound_term(scheduler, torch.cat([x_0_pred, v], 1), steps, x_t, x_0, levels=None).mean().item()

    gap = 0.15 if t > 1 else 0.05  # where the range is wide
    assert mean_nats(optimal) < min(mean_nats(optimal - gap), mean_nats(optimal + gap))


def test_a_variance_that_cannot_be_trained_is_named():
    with pytest.raises(ValueError, match='variance_type is "learned": give "learned_range"'):
        objective.Loss(DDPMScheduler(T, variance_type="learned"))


# ---- A run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned-variance")
    save_images(folder / "images", 60, 16, 16)
    tiny_unet(1, size=16).save_config(folder)
    return folder


def train(work, name, **options):
    own = {"train_batch_size": 4, "num_sample_images": 2, "ddpm_num_inference_steps": 2, "report_to": "none"}
    own |= {"validation_steps": 3, "num_validation_images": 8, "save_images_steps": 0, "checkpointing_steps": 3}
    folders = {"output_dir": work / name, "cache_dir": work / "cache", "train_data_dir": work / "images"}
    return run_here("train.py", flags(SHORT_RUN | own | folders | {"denoiser": work / "config.json"} | options))


def test_a_trained_model_samples_here_and_in_the_built_in_classes(work, capsys):
    assert not train(work, "run", variance_type="learned_range")
    pipe = quiet(DDPMPipeline.from_pretrained(work / "run" / "pipeline"))
    assert pipe.unet.config.out_channels == 2 and pipe.scheduler.variance_type == "learned_range"
    untrained = tiny_unet(1, size=16, out_channels=2).state_dict()["conv_out.weight"]
    assert pipe.unet.state_dict()["conv_out.weight"].shape == untrained.shape
    assert pipe(seeds=[1], num_inference_steps=5).images[0].size == (16, 16)
    built_in = quiet(BuiltInDDPMPipeline.from_pretrained(work / "run" / "pipeline"))
    assert isinstance(built_in.scheduler, BuiltInDDPMScheduler)
    assert built_in(num_inference_steps=5).images[0].size == (16, 16)
    # a resumed run ends with the same bits, and cannot leave the variance out
    assert not train(work, "first", variance_type="learned_range", max_train_steps=3, lr_scheduler="constant")
    assert not train(work, "whole", variance_type="learned_range", lr_scheduler="constant")
    resumed = {"lr_scheduler": "constant", "resume_from_checkpoint": "latest"}
    assert not train(work, "first", variance_type="learned_range", **resumed)
    weights = "pipeline/unet/diffusion_pytorch_model.safetensors"
    first, whole = (load_file(work / name / weights) for name in ("first", "whole"))
    assert all(torch.equal(first[name], whole[name]) for name in whole)
    capsys.readouterr()
    assert train(work, "first", variance_type="fixed_large", **resumed) == 2
    assert "variance_type 'learned_range', but now it is 'fixed_large'" in capsys.readouterr().err
