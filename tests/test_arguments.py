"""Invalid arguments of the pipeline: every error names the argument, its value and what is allowed."""

import math
import re

import numpy as np
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
        ({"callback_on_step_end_tensor_inputs": None}, "callback_on_step_end_tensor_inputs has None"),
        ({"callback_on_step_end": 3}, "callback_on_step_end is 3"),
        ({"batch_size": "2"}, "batch_size is '2'"),
        ({"batch_size": True}, "batch_size is True"),
        ({"generator": 1}, "generator is 1: give a torch.Generator"),
        ({"generator": "cpu"}, "generator is 'cpu'"),
        ({"batch_size": 2, "generator": [torch.Generator(), 2]}, "generator is 2"),
        ({"seeds": 1.5}, "seeds is 1.5"),
        ({"seeds": "7"}, "seeds is '7'"),
        ({"seeds": math.nan}, "seeds is nan"),
        ({"seeds": torch.tensor(1.0)}, "seeds is tensor"),
        ({"seeds": object()}, "seeds is <object"),
        ({"seeds": [None]}, "seeds is None"),
        ({"num_inference_steps": "2"}, "num_inference_steps is '2'"),
        ({"num_inference_steps": math.nan}, "num_inference_steps is nan"),
        ({"num_inference_steps": True}, "num_inference_steps is True"),
        ({"timesteps": 3}, "timesteps is 3"),
        ({"timesteps": "32"}, "timesteps is '32'"),
        ({"timesteps": [2.5, 1]}, "timesteps is 2.5"),
        ({"timesteps": [math.nan]}, "timesteps is nan"),
        ({"timesteps": [None]}, "timesteps is None"),
        ({"eta": "0"}, "eta is '0'"),
        ({"eta": [0.5, 0.5]}, r"eta is \[0.5, 0.5\]"),
        ({"eta": True}, "eta is True"),
        ({"eta": torch.zeros(2)}, "eta is tensor"),
        ({"guidance_scale": math.nan}, "guidance_scale is nan"),
        ({"guidance_scale": math.inf}, "guidance_scale is inf"),
        ({"guidance_scale": "2"}, "guidance_scale is '2'"),
        ({"guidance_scale": None}, "guidance_scale is None"),
        ({"latents": [[0.0]]}, "latents is a list"),
        ({"latents": torch.zeros(1, 1, 8, 8).to_sparse()}, "give a dense tensor"),
        ({"timesteps": np.array(5)}, r"timesteps is array\(5\)"),
        ({"timesteps": {5: 1}}, "timesteps is {5: 1}"),
        ({"seeds": b"12"}, "seeds is b'12'"),
        ({"seeds": {1: 2}}, "seeds is {1: 2}"),
        ({"latents": np.zeros((1, 1, 8, 8))}, "latents is a ndarray"),
        ({"latents": torch.full((1, 1, 8, 8), math.nan)}, "latents have values that are nan"),
        ({"height": "8"}, "height is '8'"),
        ({"height": True}, "height is True"),
        ({"width": math.nan}, "width is nan"),
    ],
)
def test_invalid_arguments_of_a_call(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(**options)
    if not {"output_type", "callback_on_step_end", "callback_on_step_end_tensor_inputs"} & set(options):
        with pytest.raises(ValueError, match=message):
            pipe.trajectory(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"class_labels is None.*\[0, 3\)"),
        ({"class_labels": 3}, r"class_labels is 3.*\[0, 3\)"),
        ({"class_labels": [0, -1]}, r"\[0, -1\]"),
        ({"class_labels": [0.5]}, "0.5"),
        ({"class_labels": math.nan}, "nan"),
        ({"class_labels": "cat"}, r"class_labels has 'cat'.*give integers in \[0, 3\)"),
        ({"class_labels": [0, "cat"]}, "class_labels has 'cat'"),
        ({"class_labels": [None]}, r"class_labels is \[None\]"),
        ({"class_labels": True}, "class_labels is True"),
        ({"class_labels": 1, "guidance_scale": math.nan}, "guidance_scale is nan"),
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
        (lambda p, x: p.fuse(x[:1], x[1:], weight="0.5"), "weight is '0.5'"),
        (lambda p, x: p.fuse(list(x), weight=[0.5, 0.5], balance=True), "balance needs two images"),
        (lambda p, x: p.fuse(x[0], x[1], output_type="tensor"), "output_type is 'tensor'"),
        (lambda p, x: p.vary(x, 1.5), "strength is 1.5"),
        (lambda p, x: p.vary(x, math.nan), "strength is nan"),
        (lambda p, x: p.vary(x, "0.5"), "strength is '0.5'"),
        (lambda p, x: p.vary(x, None), "strength is None"),
        (lambda p, x: p.vary(x, 0.5, generator=1), "generator is 1"),
        (lambda p, x: p.vary(x, 0.5, eta="1"), "eta is '1'"),
        (lambda p, x: p.vary(x[:1], 0.5, seeds=[1, 2.5]), "seeds is 2.5"),
        (lambda p, x: p.inpaint(x, torch.ones(8, 8), seeds="1"), "seeds is '1'"),
        (lambda p, x: p.invert(x, tolerance=math.nan), "tolerance is nan"),
        (lambda p, x: p.invert(x, tolerance="0.1"), "tolerance is '0.1'"),
        (lambda p, x: p.fuse(x[0], x[1], tolerance=-1), "tolerance is -1"),
        (lambda p, x: p.fuse(x[0], x[1], distance=2), "distance is 2"),
        (lambda p, x: p.fuse(x[0], x[1], math.nan), "weight is nan"),
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


# ---- Numbers of other types ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [np.int64, np.int32, np.uint8, torch.tensor, lambda n: np.array(n)])
def test_integers_of_numpy_and_torch_are_integers(number):
    pipe = tiny_pipe(num_train_timesteps=T)
    expected = pipe(1, seeds=[3], num_inference_steps=2, output_type="latent").images
    given = {"seeds": number(3), "num_inference_steps": number(2), "output_type": "latent"}
    assert torch.equal(pipe(number(1), **given).images, expected)
    assert torch.equal(pipe(seeds=[number(3)], timesteps=[number(3), number(1)], output_type="latent").images, expected)
    wide = pipe(height=np.int64(4), width=np.int32(6), **given).images
    assert wide.shape == (1, 1, 4, 6)


def test_floats_of_numpy_and_torch_are_numbers():
    pipe = tiny_pipe(num_train_timesteps=T, num_class_embeds=3)
    options = {"seeds": [1], "output_type": "latent"}
    expected = pipe(eta=0.5, guidance_scale=2.0, class_labels=1, **options).images
    for number in (np.float64, torch.tensor):
        given = {"eta": number(0.5), "guidance_scale": number(2.0), "class_labels": 1}
        assert torch.equal(pipe(**given, **options).images, expected)


# ---- One image, several seeds ----------------------------------------------------------------------------------------

FROM_ONE_IMAGE = {
    "vary": lambda p, x, **options: p.vary(x, 0.7, 5, output_type="latent", **options).images,
    "vary by nothing": lambda p, x, **options: p.vary(x, 0, 5, output_type="latent", **options).images,
    "inpaint": lambda p, x, **options: p.inpaint(x, torch.ones(8, 8), 5, output_type="latent", **options).images,
    "fuse": lambda p, x, **options: (
        p.fuse(x, -x, path="noise", timestep=9, num_inference_steps=5, output_type="latent", **options).images
    ),
    "trajectory": lambda p, x, **options: list(p.trajectory(image=x, num_inference_steps=5, **options))[-1].x_0_pred,
}


@pytest.mark.parametrize("name", FROM_ONE_IMAGE)
def test_one_image_with_several_seeds_gives_several(name):
    pipe, method, image = tiny_pipe(), FROM_ONE_IMAGE[name], gaussian_images(1, dtype=torch.float32)
    several = method(pipe, image, seeds=[4, 5, 4])
    assert several.shape == (3, 1, 8, 8)
    torch.testing.assert_close(several[0], several[2], rtol=0, atol=1e-5)
    assert ((several[0] - several[1]).abs().max() > 0.1) == (name != "vary by nothing")
    for one, seed in zip(several, (4, 5, 4)):
        torch.testing.assert_close(method(pipe, image, seeds=seed)[0], one, rtol=0, atol=1e-5)
    if name != "trajectory":
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        assert method(pipe, image, generator=generators).shape == (2, 1, 8, 8)
