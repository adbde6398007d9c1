"""DDIM inversion on Gaussian data, where the deterministic trajectory is known in closed form."""

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler

from ddpm_pipeline.inversion import ddim_invert, ddim_sample
from ddpm_pipeline.scheduling_ddpm import DDPMScheduler
from tests.gaussian import MEAN, STD, gaussian_images, gaussian_pipe
from tests.models import tiny_pipe
from tests.oracles import Gaussian
from tests.schedules import alpha_bar_table


def sample(pipe, latents, steps, **options):
    return pipe(latents=latents, eta=0.0, num_inference_steps=steps, output_type="latent", **options).images


@pytest.mark.filterwarnings("ignore:timestep_spacing")  # 100 of these diffusion timesteps do not end in pure noise
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    ("spacing", "steps", "num_train_timesteps"), [("trailing", 50, 1000), ("leading", 7, 100), ("linspace", 20, 30)]
)
def test_inversion_and_sampling_are_the_identity(prediction_type, spacing, steps, num_train_timesteps):
    pipe, x_0 = gaussian_pipe(prediction_type, spacing, num_train_timesteps), gaussian_images()
    latents = pipe.invert(x_0, steps, fixed_point_iterations=200, tolerance=1e-12)
    assert (sample(pipe, latents, steps) - x_0).abs().max() < 1e-9
    assert pipe.inversion_error.shape == (2,) and pipe.inversion_error.max() < 1e-15


def test_the_functions_take_any_denoiser():
    """A closed-form network as a plain function of (x_t, t), without a pipeline."""
    scheduler = DDPMScheduler(timestep_spacing="trailing")
    data, x_0 = Gaussian(alpha_bar_table(scheduler), MEAN, STD), gaussian_images()
    timesteps = list(range(999, 0, -20))
    latents = ddim_invert(data.eps, scheduler, x_0, timesteps, fixed_point_iterations=200, tolerance=1e-12)
    assert (ddim_sample(data.eps, scheduler, latents, timesteps) - x_0).abs().max() < 1e-9
    expected = gaussian_pipe().invert(x_0, 50, fixed_point_iterations=200, tolerance=1e-12)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-10)


def test_latents_converge_to_the_closed_form():
    """Along the ODE (x_t - sqrt(a) m) / sqrt(a s^2 + 1 - a) is constant; the error is of order 1 in the step size."""
    x_0, errors = gaussian_images(), []
    for steps in (125, 250, 500, 1000):
        pipe = gaussian_pipe()
        a = alpha_bar_table(pipe.scheduler)[-1].item()
        exact = math.sqrt(a) * MEAN + math.sqrt(a * STD**2 + 1 - a) * (x_0 - MEAN) / STD
        latents = pipe.invert(x_0, steps, fixed_point_iterations=100, tolerance=1e-12)
        errors.append((latents - exact).abs().max().item())
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert errors[-1] < 0.05 and all(0.7 < order < 1.5 for order in orders), (errors, orders)


def test_the_reconstruction_error_without_iterations_is_of_higher_order_than_the_step():
    """The first guess reuses eps of the step before, so one call per step is enough for an order above 1."""
    x_0, errors = gaussian_images(), []
    for steps in (50, 100, 200, 400):
        pipe = gaussian_pipe()
        reconstruction = sample(pipe, pipe.invert(x_0, steps, measure_error=False), steps)
        errors.append((reconstruction - x_0).abs().max().item())
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert errors[-1] < 1e-3 and min(orders) > 1.0, (errors, orders)


def test_fixed_point_iterations_are_network_calls_and_reduce_the_error():
    x_0, errors = gaussian_images(), {}
    for iterations in (0, 1, 3):
        pipe = gaussian_pipe()
        pipe.invert(x_0, 20, fixed_point_iterations=iterations, tolerance=1e-15)
        errors[iterations] = pipe.inversion_error.max().item()
        assert pipe.unet.calls == 20 * (1 + iterations) + 20
    assert errors[0] > 10 * errors[1] > 100 * errors[3]


def test_inversion_is_conditioned_on_class_labels():
    pipe, x_0 = gaussian_pipe(num_class_embeds=3), gaussian_images(3)
    labels = [0, 1, 2]
    latents = pipe.invert(x_0, 20, class_labels=labels, fixed_point_iterations=50, tolerance=1e-12)
    assert (sample(pipe, latents, 20, class_labels=labels) - x_0).abs().max() < 1e-9
    other = pipe.invert(x_0, 20, class_labels=[0, 0, 0], fixed_point_iterations=50, tolerance=1e-12)
    difference = (other - latents).abs().flatten(1).amax(1)
    assert difference[0] == 0 and difference[1:].min() > 0.01


def test_a_learned_variance_is_ignored():
    pipe = tiny_pipe(out_channels=2, scheduler=DDPMScheduler(20, variance_type="learned_range"))
    assert pipe.invert(gaussian_images(dtype=torch.float32), 20).shape == (2, 1, 8, 8)


def test_images_of_a_batch_are_independent():
    """A batch of 8 equals 8 single images in every method. The images need different numbers of iterations."""
    pipe = tiny_pipe()
    x_0 = gaussian_images(8, dtype=torch.float32)
    seeds, mask = list(range(8)), torch.zeros(8, 8)
    mask[2:5, 3:] = 1

    def every_method(x_0, other, seeds):
        options = {"num_inference_steps": 5, "output_type": "latent"}
        return {
            "invert": pipe.invert(x_0, 5, fixed_point_iterations=4, tolerance=1e-2),
            "vary": pipe.vary(x_0, 0.6, seeds=seeds, **options).images,
            "inpaint": pipe.inpaint(x_0, mask, seeds=seeds, jump_length=2, resamples=2, **options).images,
            "fuse": pipe.fuse(x_0, other, path="noise", seeds=seeds, **options).images,
            "balance": pipe.fuse(x_0, other, 0.3, balance=True, **options).images,
            "trajectory": list(pipe.trajectory(image=x_0, seeds=seeds, num_inference_steps=5))[-1].x_0_pred,
        }

    batch = every_method(x_0, x_0.flip(0), seeds)
    for i in range(8):
        for name, image in every_method(x_0[i : i + 1], x_0.flip(0)[i : i + 1], [i]).items():
            assert (image[0] - batch[name][i]).abs().max() <= 1e-5, (name, i)


def test_other_schedulers_are_refused_and_the_error_names_the_fix():
    pipe = tiny_pipe()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    for method in (pipe.invert, pipe.vary, lambda x: pipe.fuse(x, x), lambda x: pipe.inpaint(x, x > 0)):
        with pytest.raises(ValueError, match=r"DDPMScheduler\.from_config"):
            method(gaussian_images(1, dtype=torch.float32))
