"""Invalid arguments of the pipeline: every error names the argument, its value and what is allowed."""

import math
import re

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler as BuiltInDDPMScheduler

from tests.arrays import normal
from tests.gaussian import gaussian_images
from tests.models import tiny_pipe

T = 4


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipe(num_train_timesteps=T)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"batch_size": 2, "generator": [torch.Generator()]}, "list of 1, but the number of images is 2"),
        ({"generator": []}, "list of 0"),
        ({"generator": torch.Generator(), "seeds": [3]}, r"seeds=\[3\] are both given"),
        ({"seeds": []}, "seeds has 0 entries"),
        ({"batch_size": 4, "seeds": 7}, "seeds has 1 entries, but the batch has 4"),
        ({"batch_size": 4, "seeds": [7, 8]}, "seeds has 2 entries, but the batch has 4"),
        ({"seeds": [1.5]}, "seeds is 1.5"),
        ({"seeds": [1, -1]}, "seeds is -1"),
        ({"seeds": [2**32]}, f"seeds is {2**32}"),
        ({"seeds": [1], "latents": normal(3, 1, 8, 8)}, "seeds has 1 entries, but the batch has 3"),
        ({"seeds": [1, 2], "latents": normal(3, 1, 8, 8)}, "seeds has 2 entries, but the batch has 3"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": T + 1}, f"num_inference_steps is {T + 1}.*from 1 to {T}"),
        ({"num_inference_steps": 2.5}, "2.5"),
        ({"timesteps": [2, 1], "num_inference_steps": 2}, "num_inference_steps=2"),
        ({"timesteps": [1, 2]}, r"\[1, 2\]"),
        ({"timesteps": [4, 2]}, "4"),
        ({"timesteps": []}, r"\[\]"),
        ({"eta": 1.5}, "eta is 1.5"),
        ({"eta": -0.1}, "eta is -0.1"),
        ({"eta": math.nan}, "eta is nan"),
        ({"class_labels": [1]}, r"class_labels is \[1\], but this network has no classes"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"\(1, 3, 8, 8\).*\(1, 1, 8, 8\)"),
        ({"latents": torch.zeros(1, 8, 8)}, r"\(1, 8, 8\)"),
        ({"latents": torch.zeros(2, 1, 8, 8), "batch_size": 3}, "latents has 2 entries, but the batch has 3"),
        ({"latents": torch.zeros(1, 1, 8, 8), "height": 6}, r"\(1, 1, 8, 8\).*\(1, 1, 6, 8\)"),
        ({"latents": torch.zeros(1, 1, 8, 8, dtype=torch.int64)}, "int64"),
        ({"latents": torch.zeros(1, 1, 7, 8)}, "height is 7.*multiples of 2"),
        ({"height": 7}, "height is 7.*multiples of 2"),
        ({"width": 0}, "width is 0"),
        ({"width": -2}, "width is -2"),
        ({"height": 8.0}, "height is 8.0"),
        ({"output_type": "jpg"}, "output_type is 'jpg'.*'pil', 'np', 'pt', 'latent'"),
        ({"output_type": None}, "output_type is None"),
        ({"callback_on_step_end_tensor_inputs": ["latents", "prompt"]}, r"\['prompt'\].*\['latents'\]"),
    ],
)
def test_invalid_arguments_of_a_call(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(**options)
    if not {"output_type", "callback_on_step_end_tensor_inputs"} & set(options):
        with pytest.raises(ValueError, match=message):
            pipe.trajectory(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"class_labels is None.*\[0, 3\)"),
        ({"class_labels": 3}, r"class_labels is 3.*\[0, 3\)"),
        ({"class_labels": [0, -1]}, r"\[0, -1\]"),
        ({"class_labels": [0.5]}, "0.5"),
        ({"class_labels": [[0, 1]]}, r"\[\[0, 1\]\]"),
        ({"class_labels": [0, 1], "batch_size": 3}, "class_labels has 2 entries, but the batch has 3"),
        ({"class_labels": [0], "latents": normal(2, 1, 8, 8)}, "class_labels has 1 entries, but the batch has 2"),
        ({"class_labels": [0, 1], "seeds": [1, 2, 3]}, "class_labels has 2 entries, but the batch has 3"),
        ({"class_labels": [0, 1], "seeds": 1}, "seeds has 1 entries, but the batch has 2"),
    ],
)
def test_invalid_class_labels(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipe(num_train_timesteps=T, num_class_embeds=3)(**options)


@pytest.mark.parametrize(
    ("scheduler", "options", "message"),
    [
        (DPMSolverMultistepScheduler(T), {"eta": 0.5}, "eta is 0.5, but DPMSolverMultistepScheduler"),
        (DDIMScheduler(T), {"timesteps": [3, 1]}, "timesteps is given, but DDIMScheduler"),
        (DDIMScheduler(T), {"eta": 2.0}, "eta is 2.0"),
        (DDIMScheduler(T), {"num_inference_steps": 9}, "num_inference_steps is 9"),
        (BuiltInDDPMScheduler(T), {"eta": 0.5}, "eta is 0.5, but DDPMScheduler"),
    ],
)
def test_arguments_that_another_scheduler_does_not_take(scheduler, options, message):
    pipe = tiny_pipe(num_train_timesteps=T)
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        pipe(**options)


def test_a_network_without_sample_size_needs_height_and_width():
    for options in ({}, {"height": 8}, {"width": 8}):
        with pytest.raises(ValueError, match="sample_size None"):
            tiny_pipe(num_train_timesteps=T, sample_size=None)(**options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, x: p.invert(x * 255), "give floats in [-1, 1]"),
        (lambda p, x: p.invert(x.int()), "images is torch.int32"),
        (lambda p, x: p.invert([]), "images is an empty list"),
        (lambda p, x: p.invert("moon.png"), "images: moon.png: No such file"),
        (lambda p, x: p.invert({"moon": 1}), "images is a dict"),
        (lambda p, x: p.invert(x[:, :, :4]), "images is 4 x 8 pixels: this network generates 8 x 8"),
        (lambda p, x: p.invert(x.expand(-1, 3, -1, -1)), "images has shape (2, 3, 8, 8)"),
        (lambda p, x: p.invert(x * math.nan), "give floats in [-1, 1]"),
        (lambda p, x: p.invert(x, 21), "num_inference_steps"),
        (lambda p, x: p.invert(x, 0), "num_inference_steps"),
        (lambda p, x: p.invert(x, timesteps=[3, 9]), "descending"),
        (lambda p, x: p.invert(x, 5, timesteps=[9, 3]), "both given"),
        (lambda p, x: p.invert(x, fixed_point_iterations=-1), "fixed_point_iterations"),
        (lambda p, x: p.invert(x, tolerance=0), "tolerance is 0"),
        (lambda p, x: p.invert(x, class_labels=1), "no classes"),
        (lambda p, x: p.fuse(x[0], x[1], 1.5), "weight is 1.5: give numbers from 0 to 1"),
        (lambda p, x: p.fuse(x[0], x[1], [0.5, -1]), "weight is [0.5, -1]"),
        (lambda p, x: p.fuse(x[0], x[1], "half"), "weight is 'half'"),
        (lambda p, x: p.fuse(x[0], x[1], path="pixel"), "path is 'pixel': give one of 'latent', 'noise'"),
        (lambda p, x: p.fuse(x, x[1]), "image_a has shape (2, 1, 8, 8) and image_b (1, 1, 8, 8)"),
        (lambda p, x: p.fuse(x[0], x[1], seeds=[1]), 'seeds is given, but path="latent" adds no noise'),
        (lambda p, x: p.fuse(x[0], x[1], timestep=5), "timestep is given"),
        (lambda p, x: p.fuse(x[0], x[1], path="noise", timestep=20), "timestep"),
        (lambda p, x: p.fuse(x[0], x[1], path="noise", eta=2), "eta is 2"),
        (
            lambda p, x: p.fuse(x, x, path="noise", seeds=[1, 2, 3]),
            "seeds has 3 entries, but the number of images is 2",
        ),
        (lambda p, x: p.fuse(x[0], x[1], fixed_point_iterations=-1), "fixed_point_iterations"),
        (lambda p, x: p.fuse(list(x), weight=[0.5, 0.6]), "2 numbers of at least 0 with sum 1"),
        (lambda p, x: p.fuse(list(x), weight=[0.5, 0.5], balance=True), "balance needs two images"),
        (lambda p, x: p.fuse(x[0], x[1], output_type="tensor"), "output_type is 'tensor'"),
        (lambda p, x: p.vary(x, 1.5), "strength is 1.5"),
        (lambda p, x: p.vary(x, 0.5, seeds=[1]), "seeds has 1 entries, but the number of images is 2"),
        (lambda p, x: p.vary(x, 0.5, seeds=[1, -2]), "seeds"),
        (lambda p, x: p.vary(x, 0.5, seeds=[1, 2], generator=torch.Generator()), "both given"),
        (lambda p, x: p.inpaint(x, torch.zeros(8, 8)), "mask is black"),
        (lambda p, x: p.inpaint(x, torch.ones(7, 8)), "mask has shape (7, 8)"),
        (lambda p, x: p.inpaint(x, "mask.png"), "mask: mask.png: No such file"),
        (lambda p, x: p.inpaint(x, [1]), "mask is a list"),
        (lambda p, x: p.inpaint(x, torch.ones(8, 8), jump_length=0), "jump_length"),
        (lambda p, x: p.inpaint(x, torch.ones(8, 8), resamples=0), "resamples"),
        (lambda p, x: p.trajectory(image=x, latents=x), "both given"),
        (lambda p, x: p.trajectory(3, image=x), "image has 2 entries, but the batch has 3"),
    ],
)
def test_invalid_arguments_of_methods_that_start_from_images(call, message):
    pipe = tiny_pipe()
    with pytest.raises(ValueError, match=re.escape(message)):
        call(pipe, gaussian_images(2, dtype=torch.float32))
